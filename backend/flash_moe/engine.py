"""The engine as a front end sees it: load a model, give it a Request, iterate over its Reply."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flash_moe.callbacks import Notice, Progress, no_notice, no_progress
from flash_moe.chat.event import Event
from flash_moe.chat.events import Markers, Splitter
from flash_moe.chat.makers import completed, makers_sampling, without_effect
from flash_moe.chat.stops import StopScanner
from flash_moe.chat.template import with_schema
from flash_moe.chat.thought import find_thought, thought_markers
from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, find_tool_format
from flash_moe.checkpoint.plan import Plan
from flash_moe.clock import part
from flash_moe.decode.constraint import Constraint
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.decode.statistics import Stats
from flash_moe.errors import OptionError, Remedy
from flash_moe.grammar.grammar import Grammar
from flash_moe.mlx_library import find_backends
from flash_moe.model.load import StreamedModel, load
from flash_moe.native.build import announcing
from flash_moe.options import MAX_TOKENS, Request, Settings
from flash_moe.prefix.store import PrefixSettings, PrefixStore

COMPILING = "MLX compiles its kernels for this GPU, once: the first word may take two minutes."


class Engine:
    """A loaded model and its tokenizer. Owns both; use it from the thread that loaded it.
    `warning` is for the user: a fault of the installation that makes replies slow; `notice`, too:
    what the first reply waits for on a new machine."""

    def __init__(
        self, model: StreamedModel, tokenizer: ChatTokenizer, prefix: PrefixStore | None = None
    ) -> None:
        self.warning = find_backends().problem or model.warning
        self.notice = COMPILING if model.compiles else None
        self.model = model
        self.tokenizer = tokenizer
        self.prefix = prefix
        self._makers_sampling = makers_sampling(model.path)

    @classmethod
    def load(
        cls,
        path: Path,
        settings: Settings = Settings(),
        progress: Progress = no_progress,
        prefix: PrefixSettings | None = PrefixSettings(),
        notice: Notice = no_notice,
    ) -> Engine:
        """`prefix` says where states of prompts are saved for the next turn; None saves none.
        `notice` hears of what takes seconds on a machine's first use."""
        # The tokenizer first: what is missing there is noticed before gigabytes are read.
        with part("tokenizer"):
            tokenizer = load_tokenizer(path)
        with announcing(notice):
            model = load(path, settings, progress)
        with part("kept prompt"):
            store = None if prefix is None else PrefixStore.open(model, tokenizer, prefix)
        return cls(model, tokenizer, store)

    @property
    def plan(self) -> Plan:
        return self.model.plan

    @property
    def lossy(self) -> list[str]:
        """What makes it less exact than the checkpoint, in words; empty if nothing does."""
        return self.model.lossy

    def reply(self, request: Request) -> Reply:
        """The assistant's next turn. Iterate over it for text, or over its `events()` for thoughts
        and tool calls, too; `stats` is complete at its end."""
        if not request.messages:
            raise OptionError("The prompt is empty: there is nothing to answer.")
        messages = request.messages
        if request.schema is not None:
            messages = with_schema(messages, request.schema)
        thinking = {} if request.thinking is None else {"enable_thinking": request.thinking}
        tools = list(request.tools) or None
        with part("tokenizer"):
            prompt = self.tokenizer.encode_chat(messages, tools=tools, **thinking)
        with part("grammar"):
            tool_format = find_tool_format(self.model.path, self.tokenizer) if tools else None
            constraint = self._grammar(request, tool_format).constraint(
                prompt, thinking_budget=request.thinking_budget
            )
        sampling = completed(request, self._makers_sampling)
        tokens = TokenRequest(
            prompt=prompt,
            max_tokens=self._max_tokens(len(prompt), request),
            stop_tokens=self.tokenizer.stop_tokens,
            constraint=constraint,
            sampling=sampling,
            logprobs=request.logprobs,
            stop_loops=request.stop_loops is not False,
            cancelled=request.cancelled,
            progress=request.progress,
        )
        begin = None
        if self.prefix is not None:
            begin = partial(self.prefix.begin, write=request.save_prompts is not False)
        generation = Generation(self.model, tokens, begin)
        if idle := without_effect(request, sampling):
            generation.stats.warning = (
                f"{' and '.join(idle)} had no effect: at temperature 0 the likeliest token is "
                "always taken."
            )
        thought = find_thought(self.tokenizer)
        inside = thought is not None and thought.is_open(prompt, self.tokenizer.stop_tokens)
        markers = Markers(thought_markers(self.tokenizer), tool_format, request.tools)
        splitter = Splitter(markers, thinking=inside)
        stops = StopScanner(request.stop or ())
        return Reply(generation, self.tokenizer, splitter, stops, constraint)

    def _grammar(self, request: Request, tool_format: ToolFormat | None) -> Grammar:
        schema, tools = request.schema, request.tools
        if schema is not None and tools:
            return Grammar.for_both(self.tokenizer, schema, tools, tool_format)
        if schema is not None:
            return Grammar.for_schema(self.tokenizer, schema)
        if tools:
            return Grammar.for_tools(self.tokenizer, tools, tool_format)
        return Grammar.free(self.tokenizer)

    def _max_tokens(self, prompt: int, request: Request) -> int:
        """Tokens that the reply may have. Beyond its context a model writes nonsense."""
        wanted = MAX_TOKENS if request.max_tokens is None else request.max_tokens
        text = self.model.config.get("text_config", self.model.config)
        limit = request.context_length or text.get("max_position_embeddings")
        if not limit:
            return wanted
        if prompt >= limit:
            whose = "context_length" if request.context_length else "the model's context"
            raise OptionError(
                f"The conversation has {prompt:,} tokens and {whose} is {limit:,}, which leaves no "
                "room for a reply: begin a new conversation, or leave something out.",
                Remedy.SHORTEN_CONVERSATION if request.context_length else None,
            )
        return min(wanted, limit - prompt)

    def close(self) -> None:
        self.model.close()


class Reply:
    """Iterate once, in the model's thread."""

    def __init__(
        self,
        generation: Generation,
        tokenizer: ChatTokenizer,
        splitter: Splitter,
        stops: StopScanner,
        constraint: Constraint | None,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(splitter.markers.all())
        self._splitter = splitter
        self._stops = stops
        self._constraint = constraint

    @property
    def stats(self) -> Stats:
        return self._generation.stats

    @property
    def complete(self) -> bool:
        """Whether everything is there that a schema or a tool call needs."""
        return self._constraint is None or self._constraint.complete

    def logprobs(self) -> list[dict[str, Any]]:
        """Every chosen token with its log-probability and the likeliest ones, as text."""
        text = self._tokenizer.text_of
        return [
            {
                "token": text(chosen.token),
                "logprob": round(chosen.logprob, 4),
                "likeliest": [[text(token), round(value, 4)] for token, value in chosen.likeliest],
            }
            for chosen in self._generation.logprobs
        ]

    def __iter__(self) -> Iterator[str]:
        """The answer alone."""
        return (event.text for event in self.events() if event.kind == "text")

    def events(self) -> Iterator[Event]:
        for token in self._generation:
            self.stats.reasoning_tokens += self._splitter.thinking
            yield from self._until_stop(self._splitter.feed(self._stream.add(token)))
            if self._stops.stopped:
                return
        rest = self._splitter.feed(self._stream.finish()) + self._splitter.finish()
        yield from self._until_stop(rest)
        if text := self._stops.finish():
            yield Event("text", text)

    def _until_stop(self, events: list[Event]) -> Iterator[Event]:
        """Up to a stop string in the answer; thoughts and tool calls may hold one."""
        for event in events:
            if event.kind != "text":
                # Text that was held back comes before what follows it.
                if text := self._stops.finish():
                    yield Event("text", text)
                yield event
            elif text := self._stops.feed(event.text):
                yield Event("text", text)
            if self._stops.stopped:
                self.stats.finish_reason = "stop"
                return
