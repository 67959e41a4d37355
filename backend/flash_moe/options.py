"""Every choice a user has: declared, explained, typed and checked here, once. Needs no MLX.

`Settings` is what a model is loaded with, `Request` what one reply is asked for, `Sampling` the
part of a request that chooses tokens. A field that carries an `Option` is one that users set by
name; a front end makes its own options from `OPTIONS`. None always means: not set, the default
applies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flash_moe.callbacks import Cancelled, Progress, never, no_progress
from flash_moe.errors import OptionError

Message = dict[str, Any]  # {"role", "content", …}, as chat templates take them
Phase = Literal["prompt", "reply", "grammar"]
RuntimeName = Literal["metal", "cuda", "native", "mlx"]
ReadMode = Literal["buffered", "direct"]

# Where all experts can be asked for in full; elsewhere `full_experts` counts.
FULL_PHASES: tuple[Phase, ...] = ("prompt", "grammar")
RUNTIMES = ("auto", *get_args(RuntimeName))

# The working set, both lanes. 256 MB are 64 experts of the 397B at 2 bits; a lane then serves
# any K up to 32 at once, and prefill reads and computes in groups large enough for 1 MiB reads.
BANK_BYTES = 256 << 20
# From the page cache, 16 cores, 16 MB a layer: 45 GB/s, where 8 threads and 1 MiB at a time get 31.
# No difference on 2 cores, nor on two virtio disks; whole records at a time were slower there (0.95
# against 1.41 GB/s).
READ_THREADS = 16
READ_CHUNK = 512 << 10
# What an evaluation measures, each apart.
EVALUATION_SECTIONS = ("text", "questions", "json", "tools")
# What experts can be packed with.
PACK_BITS, PACK_GROUP_SIZES = (2, 3, 4), (64, 128)
# A thinking model may need thousands of tokens; a random one never stops by itself.
MAX_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Option:
    """`help` is one sentence for users. Numbers lie between `least` and `most`, both allowed, and
    are less than `below`."""

    help: str
    least: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Which value of the right type to choose instead, or None if this one is allowed."""
        if self.choices:
            values = (value,) if isinstance(value, str) else value
            allowed = all(item in self.choices for item in values)
            return None if allowed else f"choose {_either(self.choices)}"
        if self.least is None:
            return None
        most = math.inf if self.most is None else self.most
        below = math.inf if self.below is None else self.below
        if self.least <= value <= most and value < below:
            return None
        return f"choose {self._range()}"

    def _range(self) -> str:
        if self.most is not None:
            return f"{_plain(self.least)} to {_plain(self.most)}"
        less = "" if self.below is None else f", and less than {_plain(self.below)}"
        return f"{_plain(self.least)} or more{less}"


def option(help: str, **limits: Any) -> Any:
    """A field that users set by name."""
    return field(default=None, metadata={"option": Option(help, **limits)})


@dataclass(frozen=True, slots=True)
class UserOption:
    """An option with its name and the type of its values."""

    name: str
    type: Any
    option: Option

    @property
    def kind(self) -> Any:
        """bool, int, float or str; tuple or Sequence for several texts."""
        kind = get_args(self.type)[0]
        return get_origin(kind) or kind

    def problem(self, value: Any) -> str | None:
        """Which value to choose instead, or None if this one is allowed."""
        if not _is(self.kind, value):
            choices = _either(self.option.choices) if self.kind is str else ""
            return f"choose {choices or _TYPES[self.kind]}"
        return self.option.problem(value)

    def check(self, value: Any) -> None:
        """OptionError, unless the value is allowed; None always is."""
        if value is not None and (problem := self.problem(value)):
            raise OptionError(f"{self.name}={_shown(value)}: {problem}.")


_TYPES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a tuple of texts",
    Sequence: "a list of texts",
}


def _is(kind: Any, value: Any) -> bool:
    if kind in (tuple, Sequence):
        several = isinstance(value, kind) and not isinstance(value, (str, bytes))
        return several and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


@cache
def user_options(owner: type) -> dict[str, UserOption]:
    """The fields of `owner` that users set by name, in order."""
    types = get_type_hints(owner)
    return {
        one.name: UserOption(one.name, types[one.name], one.metadata["option"])
        for one in fields(owner)
        if "option" in one.metadata
    }


def check(options: Any) -> None:
    owner: Any = type(options)
    for name, option in user_options(owner).items():
        option.check(getattr(options, name))


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _either(choices: tuple[str, ...]) -> str:
    return (" or " if len(choices) == 2 else ", ").join(choices)


def _plain(number: float | None) -> str:
    """10,000,000 rather than 1e+07."""
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Unset in a request: as the model's makers say. If they do not
    say, either: greedy, no filter, no penalty, as in mlx-lm."""

    temperature: float | None = option(
        "Randomness, 0 to 10; 0 always takes the likeliest token (the model's own, else 0)",
        least=0,
        most=10,
    )
    top_p: float | None = option(
        "Sample from the likeliest tokens that have this much probability together, 0 to 1",
        least=0,
        most=1,
    )
    top_k: int | None = option("Sample from the k likeliest tokens", least=0, most=1_000_000)
    min_p: float | None = option(
        "Leave out tokens less likely than this share of the likeliest one, 0 to 1",
        least=0,
        most=1,
    )
    repetition_penalty: float | None = option(
        "Divide the logits of tokens already used by this", least=0.01, most=10
    )
    presence_penalty: float | None = option(
        "Subtract this once from each token already used", least=-2, most=2
    )
    frequency_penalty: float | None = option(
        "Subtract this for every use of a token", least=-2, most=2
    )
    seed: int | None = option("Make sampling repeatable", least=0, most=2**63 - 1)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a model is loaded with. `experts` to `cache_tolerance` change results, `runtime` only
    their rounding; the rest changes nothing but speed and memory."""

    experts: int | None = option(
        "Experts a token uses in each layer: fewer is faster and less exact", least=1
    )
    full_experts: int | None = option(
        "Two-plane packs: how many of a token's top experts to read at 4 bits; the others are "
        "read at 2 (all)",
        least=0,
    )
    full_experts_in: tuple[Phase, ...] | None = option(
        "With full_experts: where to read every expert at 4 bits: prompt, grammar (text held to "
        "one), or both, as prompt,grammar",
        choices=FULL_PHASES,
    )
    cache_tolerance: float | None = option(
        "In replies, take a cached expert in place of one that is likelier by no more than this "
        "share, 0 to 1; replies are then no longer repeatable",
        least=0,
        below=1,
    )
    runtime: str | None = option(
        f"What computes the experts: {', '.join(RUNTIMES)}; auto takes the fastest here, mlx is "
        "mlx-lm's own arithmetic, bit-identical to it on a CPU",
        choices=RUNTIMES,
    )
    bank_bytes: int = BANK_BYTES
    # What may stay mapped of the experts in the page cache; None: half of the memory.
    mapped_bytes: int | None = None
    threads: int = READ_THREADS
    chunk: int = READ_CHUNK
    mode: ReadMode = "buffered"

    def __post_init__(self) -> None:
        check(self)

    def given(self) -> str:
        """The options that are set, for people: `experts 4, runtime mlx`."""
        values = {name: getattr(self, name) for name in user_options(Settings)}
        return ", ".join(f"{name} {_shown(v)}" for name, v in values.items() if v is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(Sampling):
    """One reply: what is said, what it is held to, and how it is made.

    With a schema the answer is JSON that is valid against it, if it is not cut off; tool calls
    name one of the tools, with valid arguments; with both, a reply is the one or the other.
    `cancelled` is asked between tokens; `progress` hears how much of the prompt is read.
    """

    messages: Sequence[Message] = ()
    tools: Sequence[dict[str, Any]] = ()
    schema: dict[str, Any] | None = None
    max_tokens: int | None = option(f"Most tokens to generate ({MAX_TOKENS})", least=1)
    context_length: int | None = option(
        "Most tokens of conversation and reply together (the model's own)", least=1
    )
    stop: Sequence[str] | None = option('Text at which the answer ends, or several: ["a", "b"]')
    stop_loops: bool | None = option(
        "End a reply that says the same over and over, 8 times and 256 tokens of it (true)"
    )
    thinking: bool | None = option("Think before answering (the model's own default)")
    thinking_budget: int | None = option(
        "Tokens after which a thought is closed and the answer begins", least=0
    )
    save_prompts: bool | None = option(
        "Save the state after the prompt on disk, for the next turn (as llm logs, or does not)"
    )
    logprobs: int | None = option(
        "Log the log-probability of every token, and of this many of the likeliest", least=0
    )
    cancelled: Cancelled = field(default=never, compare=False)
    progress: Progress = field(default=no_progress, compare=False)


def parse(name: str, value: Any) -> Any:
    """A value as people write it → as its field holds it: `prompt,grammar` for several phases,
    one text or a JSON list of them for several stops. All others come as they are."""
    if not isinstance(value, str):
        return value
    if name == "full_experts_in":
        return tuple(value.split(","))
    if name == "stop":
        return _texts(value)
    return value


def _texts(value: str) -> list[str]:
    try:
        several = json.loads(value) if value.startswith("[") else None
    except ValueError:
        several = None
    if isinstance(several, list) and all(isinstance(item, str) for item in several):
        return several
    return [value]


OPTIONS = user_options(Request) | user_options(Settings)
