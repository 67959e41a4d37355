"""One turn: what llm asks, as the engine takes it, and what the engine tells, as llm takes it."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import llm
from llm.parts import StreamEvent

from llm_flash_moe.engines import Key, Work, warn
from llm_flash_moe.messages import schema_of, to_chat, to_tools
from llm_flash_moe.options import ModelOptions
from llm_flash_moe.places import folder
from llm_flash_moe.progress import StatusLine
from llm_flash_moe.registry import Entry

if TYPE_CHECKING:
    from flash_moe.chat.events import Event
    from flash_moe.engine import Engine, Reply

KINDS = {"text": "text", "reasoning": "reasoning"}


class Turn:
    """`work` makes the events in the inference thread; `told` and `finish` are for the caller's."""

    def __init__(
        self,
        name: str,
        entry: Entry,
        prompt: llm.Prompt,
        response: llm.Response | llm.AsyncResponse,
    ) -> None:
        self._options = cast(ModelOptions, prompt.options)
        self._messages = to_chat(prompt)
        self._tools = to_tools(prompt)
        self._schema = schema_of(prompt, response)
        self._response = response
        self._calls: dict[int, str] = {}
        self._reply: Reply | None = None
        self._engine: Engine | None = None
        self._prefill = StatusLine("reading the prompt", " tokens")
        self.key: Key = (folder(name, entry), self._options.settings(entry.experts))

    def work(self, interrupted: Callable[[], bool] = lambda: False) -> Work[Event]:
        def events(engine: Engine, cancelled: Callable[[], bool]) -> Iterator[Event]:
            options = self._options
            self._engine = engine
            self._reply = engine.reply(
                self._messages,
                max_tokens=options.max_tokens,
                context_length=options.context_length,
                sampling=options.sampling(),
                stop=options.stops(),
                tools=self._tools,
                schema=self._schema,
                thinking=options.thinking,
                thinking_budget=options.thinking_budget,
                likeliest=options.logprobs,
                cancelled=lambda: cancelled() or interrupted(),
                progress=self._prefill.update,
            )
            yield from self._reply.events()

        return events

    def told(self, event: Event) -> Iterator[StreamEvent]:
        self._prefill.clear()
        if event.kind in KINDS:
            yield StreamEvent(type=KINDS[event.kind], chunk=event.text)
            return
        # Ids tell the calls of one conversation apart: counting would begin anew in every turn.
        number = self._calls.setdefault(event.index, f"call_{uuid.uuid4().hex[:16]}")
        if event.call is None:
            yield StreamEvent(type="tool_call_name", chunk=event.text, tool_call_id=number)
            return
        name, arguments = event.call["name"], event.call["arguments"]
        text = json.dumps(arguments, ensure_ascii=False)
        yield StreamEvent(type="tool_call_args", chunk=text, tool_call_id=number)
        # The events are for the eye and the log: only this makes llm call the tool.
        self._response.add_tool_call(
            llm.ToolCall(name=name, arguments=arguments, tool_call_id=number)
        )

    def finish(self) -> None:
        """Also of a reply that was broken off: llm logs what there is."""
        self._prefill.clear()
        if self._reply is None or self._engine is None:
            return
        stats, plan = self._reply.stats, self._engine.model.plan
        details = {"cached": stats.cached_tokens, "reasoning_tokens": stats.reasoning_tokens}
        self._response.set_usage(
            input=stats.prompt_tokens,
            output=stats.generated_tokens,
            details={name: count for name, count in details.items() if count} or None,
        )
        self._response.response_json = {**stats.to_json(), "lossy": plan.lossy}
        if self._options.logprobs is not None:
            self._response.response_json["logprobs"] = self._reply.choices()
        self._response.set_resolved_model(f"{plan.architecture} {plan.bits}")
        if stats.warning:
            warn(stats.warning)
        if self._schema is not None and not self._reply.complete:
            warn(
                f"The JSON is not complete ({stats.finish_reason}, "
                f"{stats.generated_tokens} tokens). Allow more: -o max_tokens N"
            )
        if self._options.stats:
            print(f"\n{stats.summary()}", file=sys.stderr)
