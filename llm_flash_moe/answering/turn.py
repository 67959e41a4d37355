"""One turn: llm's prompt as the engine's request, and the engine's events as llm's."""

from __future__ import annotations

import functools
import gc
import json
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import click
import llm
from llm.parts import StreamEvent

from flash_moe import Request
from llm_flash_moe.answering.engines import Keep, Key, Work, warn
from llm_flash_moe.answering.messages import schema_of, to_chat, to_tools
from llm_flash_moe.durations import parse_duration
from llm_flash_moe.options import ModelOptions
from llm_flash_moe.progress import StatusLine
from llm_flash_moe.registry import Entry, folder_of

if TYPE_CHECKING:
    from flash_moe import Engine, Event, Reply, hold


def _command_of_llm() -> dict[str, Any] | None:
    """The parameters of llm's own command, if this is one and not somebody's program."""
    context = click.get_current_context(silent=True)
    if context is None or getattr(context.command.callback, "__module__", "") != "llm.cli":
        return None
    return context.params


@functools.cache
def _keep_what_is_imported() -> None:
    """What llm has imported stays until the process ends: to have the garbage collector look
    through all of it takes 0.06 s while a model is loaded, and 0.2 s at the end."""
    gc.freeze()


def is_logged() -> bool:
    """Whether llm logs what is said on its command line, as far as the user decides it. What it
    does not log, the user does not want on the disk."""
    asked = _command_of_llm() or {}
    if asked.get("no_log"):
        return False
    return bool(asked.get("log")) or not (llm.user_dir() / "logs-off").exists()


class Turn:
    """`work` makes the events in the inference thread; the rest is for the caller's thread. The
    response is held weakly: the inference thread keeps a turn that is not over, and must not keep
    a response that its reader has dropped."""

    def __init__(
        self,
        name: str,
        entry: Entry,
        prompt: llm.Prompt,
        response: llm.Response | llm.AsyncResponse,
    ) -> None:
        self._in_command = _command_of_llm() is not None
        if self._in_command:
            _keep_what_is_imported()
        self._options = cast(ModelOptions, prompt.options)
        self._reading = StatusLine("reading the prompt", " tokens")
        self._request = Request(
            messages=to_chat(prompt),
            tools=to_tools(prompt),
            schema=schema_of(prompt, response),
            progress=self._reading.update,
            **{"save_prompts": is_logged(), **self._options.request()},
        )
        self._response = weakref.ref(response)
        self._call_ids: dict[int, str] = {}
        self._engine: Engine | hold.HeldModel | None = None
        self._reply: Reply | hold.HeldReply | None = None
        self.key = Key(folder_of(name, entry), self._options.settings(entry.experts))
        asked = self._options.keep_alive
        self.keep = None if asked is None else Keep(name, parse_duration(asked))

    def work(self, interrupted: Callable[[], bool] = lambda: False) -> Work[Event]:
        def events(
            engine: Engine | hold.HeldModel, cancelled: Callable[[], bool]
        ) -> Generator[Event, None, None]:
            request = replace(self._request, cancelled=lambda: cancelled() or interrupted())
            self._engine = engine
            self._reply = engine.reply(request)
            yield from self._reply.events()

        return events

    def to_stream_events(self, event: Event) -> Iterator[StreamEvent]:
        self._reading.clear()
        if event.kind in ("text", "reasoning"):
            yield StreamEvent(type=event.kind, chunk=event.text)
            return
        # Ids tell the calls of one conversation apart: counting would begin anew in every turn.
        call_id = self._call_ids.setdefault(event.index, f"call_{uuid.uuid4().hex[:16]}")
        if event.call is None:
            yield StreamEvent(type="tool_call_name", chunk=event.text, tool_call_id=call_id)
            return
        name, arguments = event.call["name"], event.call["arguments"]
        text = json.dumps(arguments, ensure_ascii=False)
        yield StreamEvent(type="tool_call_args", chunk=text, tool_call_id=call_id)
        # The events are for the eye and the log: only this makes llm call the tool.
        if response := self._response():
            response.add_tool_call(
                llm.ToolCall(name=name, arguments=arguments, tool_call_id=call_id)
            )

    def finish(self) -> None:
        """Also for a reply that was broken off: llm logs as much as there is."""
        self._reading.clear()
        response, reply, engine = self._response(), self._reply, self._engine
        if response is None or reply is None or engine is None:
            return
        stats, plan = reply.stats, engine.plan
        details = {"cached": stats.cached_tokens, "reasoning_tokens": stats.reasoning_tokens}
        response.set_usage(
            input=stats.prompt_tokens,
            output=stats.generated_tokens,
            details={name: count for name, count in details.items() if count} or None,
        )
        if not self._in_command:
            # The processor time of somebody's whole program.
            stats.first_word.pop("start", None)
        response.response_json = {**stats.to_json(), "lossy": engine.lossy}
        if self._request.logprobs is not None:
            response.response_json["logprobs"] = reply.logprobs()
        response.set_resolved_model(f"{plan.architecture} {plan.bits}")
        if stats.warning:
            warn(stats.warning)
        if stats.finish_reason == "loop":
            warn(
                "The reply said the same over and over and was ended. Let it go on: -o stop_loops 0"
            )
        if self._request.schema is not None and not reply.complete:
            warn(
                f"The JSON is not complete ({stats.finish_reason}, "
                f"{stats.generated_tokens} tokens). Allow more: -o max_tokens N"
            )
        if self._options.stats:
            click.echo(f"\n{stats.summary()}", err=True)
