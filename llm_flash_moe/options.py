"""The options of `llm -m … -o`: the engine's, and `stats`. All are None unless set, so that llm
logs what the user chose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import llm
from pydantic import Field, ValidationInfo, create_model, field_validator

from flash_moe import Request, Settings, options
from llm_flash_moe.durations import parse_duration


class EngineOptions(llm.Options):
    """What `ModelOptions` does with the engine's options, which are its fields."""

    @field_validator("*")
    @classmethod
    def _allowed(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if value is not None and name in options.OPTIONS:
            parsed = options.parse(name, value)
            if problem := options.OPTIONS[name].problem(parsed):
                raise ValueError(problem)
            return parsed if isinstance(parsed, list) else value
        if value is not None and name == "keep_alive":
            parse_duration(value)
        return value

    def settings(self, experts: int | None = None) -> Settings:
        """What the model is loaded with; `experts` is its own number of them, if not the option."""
        return Settings(**{"experts": experts, **self.loading()})

    def loading(self) -> dict[str, Any]:
        """Fields of Settings that are set."""
        return self._engine_values(Settings)

    def request(self) -> dict[str, Any]:
        """Fields of a Request that are set."""
        return self._engine_values(Request)

    def _engine_values(self, owner: type) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in options.user_options(owner)}
        return {name: options.parse(name, v) for name, v in values.items() if v is not None}


def _field(option: options.UserOption) -> tuple[Any, Any]:
    """Lists are texts on the command line: prompt,grammar or ["a", "b"]."""
    kinds = {kind for kind in get_args(option.type) if kind in (bool, int, float, str)}
    kind = next(iter(kinds)) if kinds else str if option.option.choices else str | list[str]
    return kind | None, Field(None, description=option.option.help)


_STATS = (bool | None, Field(None, description="Print statistics to stderr after the reply"))
_KEEP_ALIVE = (
    str | int | float | None,
    Field(
        None,
        description="Keep the model in memory after the reply, for later commands: 10m, 1h30m, 90 "
        "(seconds), -1 for ever; 0 frees it (not at all)",
    ),
)
_FIELDS = {name: _field(option) for name, option in options.OPTIONS.items()}
_FIELDS |= {"keep_alive": _KEEP_ALIVE, "stats": _STATS}

if TYPE_CHECKING:

    class ModelOptions(EngineOptions):
        keep_alive: str | float | None
        stats: bool | None

else:
    ModelOptions = create_model("ModelOptions", __base__=EngineOptions, **_FIELDS)

SETTINGS = tuple(options.user_options(Settings))
