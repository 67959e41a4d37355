"""The engine as the front end sees it: load a model, give it messages, iterate over its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flash_moe.chat.events import Event, Markers, Splitter
from flash_moe.chat.stops import StopScanner
from flash_moe.chat.template import with_schema
from flash_moe.chat.thought import markers_of, thought_of
from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, tool_format
from flash_moe.decode.loop import Generation
from flash_moe.decode.sampling import Sampling
from flash_moe.decode.statistics import Stats
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Constraint
from flash_moe.grammar.grammar import Grammar
from flash_moe.model.load import Progress, Settings, StreamedModel, load
from flash_moe.prefix.store import PrefixSettings, PrefixStore

# A thinking model may need thousands of tokens; a random one never stops by itself.
DEFAULT_MAX_TOKENS = 8192


class Engine:
    """A loaded model and its tokenizer. Owns both; use it from the thread that loaded it."""

    def __init__(
        self, model: StreamedModel, tokenizer: ChatTokenizer, prefix: PrefixStore | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prefix = prefix

    @classmethod
    def load(
        cls,
        path: Path,
        settings: Settings = Settings(),
        progress: Progress = lambda done, total: None,
        prefix: PrefixSettings | None = PrefixSettings(),
    ) -> Engine:
        """`prefix` says where prompts are kept for the next turn; None keeps nothing."""
        # The tokenizer first: what is missing there is found before gigabytes are read.
        tokenizer = load_tokenizer(path)
        model = load(path, settings, progress)
        kept = None if prefix is None else PrefixStore.open(model, tokenizer, prefix)
        return cls(model, tokenizer, kept)

    def reply(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_tokens: int | None = None,
        context_length: int | None = None,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        tools: Sequence[dict[str, Any]] = (),
        schema: dict[str, Any] | None = None,
        thinking: bool | None = None,
        thinking_budget: int | None = None,
        likeliest: int | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = lambda done, total: None,
    ) -> Reply:
        """The assistant's next turn. Iterate over it for text, or over its `events()` for thoughts
        and calls, too; `stats` is complete at its end.

        With a schema the answer is JSON that is valid against it, if it is not cut off; calls are
        of the tools, with arguments that are valid; with both, a reply is the one or the other.
        `thinking` None is the template's default; after `thinking_budget` tokens a thought is
        closed.
        """
        if not messages:
            raise OptionError("The prompt is empty: there is nothing to answer.")
        if schema is not None:
            messages = with_schema(messages, schema)
        asked = {} if thinking is None else {"enable_thinking": thinking}
        prompt = self.tokenizer.encode_chat(messages, tools=list(tools) or None, **asked)
        form = tool_format(self.model.path, self.tokenizer) if tools else None
        constraint = self._grammar(schema, tools, form).constraint(
            prompt, thinking_budget=thinking_budget
        )
        generation = Generation(
            self.model,
            prompt,
            max_tokens=self._room(len(prompt), max_tokens, context_length),
            sampling=sampling,
            stop_tokens=self.tokenizer.stop_tokens,
            constraint=constraint,
            likeliest=likeliest,
            cancelled=cancelled,
            progress=progress,
            begin=self.prefix.begin if self.prefix else None,
        )
        thought = thought_of(self.tokenizer)
        open_thought = thought is not None and thought.is_open(prompt, self.tokenizer.stop_tokens)
        markers = Markers(markers_of(self.tokenizer), form, tools)
        return Reply(generation, self.tokenizer, stop, markers, open_thought, constraint)

    def _grammar(
        self,
        schema: dict[str, Any] | None,
        tools: Sequence[dict[str, Any]],
        form: ToolFormat | None,
    ) -> Grammar:
        if schema is not None and tools:
            return Grammar.for_both(self.tokenizer, schema, tools, form)
        if schema is not None:
            return Grammar.for_schema(self.tokenizer, schema)
        if tools:
            return Grammar.for_tools(self.tokenizer, tools, form)
        return Grammar.free(self.tokenizer)

    def _room(self, prompt: int, max_tokens: int | None, context_length: int | None) -> int:
        """Tokens that the reply may have. Beyond its context a model writes nonsense."""
        wanted = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
        text = self.model.config.get("text_config", self.model.config)
        own = text.get("max_position_embeddings")
        limit = context_length or own
        if not limit:
            return wanted
        if prompt >= limit:
            whose = "-o context_length" if context_length else "the model's context"
            raise OptionError(
                f"The conversation has {prompt:,} tokens, and {whose} is {limit:,}: "
                "begin a new one, or leave something out."
            )
        return min(wanted, limit - prompt)

    def close(self) -> None:
        self.model.close()


class Reply:
    def __init__(
        self,
        generation: Generation,
        tokenizer: ChatTokenizer,
        stop: Sequence[str],
        markers: Markers,
        thinking: bool,
        constraint: Constraint | None,
    ) -> None:
        self._generation = generation
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(markers.all())
        self._splitter = Splitter(markers, thinking)
        self._stops = StopScanner(stop)

    @property
    def stats(self) -> Stats:
        return self._generation.stats

    def choices(self) -> list[dict[str, Any]]:
        """Every chosen token with its log-probability and the likeliest ones, as text."""
        text = self._tokenizer.text_of
        return [
            {
                "token": text(choice.token),
                "logprob": round(choice.logprob, 4),
                "likeliest": [[text(token), round(value, 4)] for token, value in choice.likeliest],
            }
            for choice in self._generation.choices
        ]

    @property
    def complete(self) -> bool:
        """Whether all was said that a schema or a call needs."""
        return self._constraint is None or self._constraint.complete

    def __iter__(self) -> Iterator[str]:
        """The answer alone."""
        return (event.text for event in self.events() if event.kind == "text")

    def events(self) -> Iterator[Event]:
        for token in self._generation:
            self.stats.reasoning_tokens += self._splitter.thinking
            yield from self._stopped(self._splitter.feed(self._stream.add(token)))
            if self._stops.stopped:
                return
        rest = self._splitter.feed(self._stream.finish()) + self._splitter.finish()
        yield from self._stopped(rest)
        if text := self._stops.finish():
            yield Event("text", text)

    def _stopped(self, events: list[Event]) -> Iterator[Event]:
        """Up to a stop string in the answer; thoughts and calls may hold one."""
        for event in events:
            if event.kind != "text":
                # What was held back of the text comes before what follows it.
                if text := self._stops.finish():
                    yield Event("text", text)
                yield event
            elif text := self._stops.feed(event.text):
                yield Event("text", text)
            if self._stops.stopped:
                self.stats.finish_reason = "stop"
                return
