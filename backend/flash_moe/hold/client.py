"""A model that another process holds, used like an `Engine` that was loaded here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flash_moe import clock
from flash_moe.chat.event import Event
from flash_moe.decode.statistics import Stats
from flash_moe.errors import HolderGone
from flash_moe.hold import protocol
from flash_moe.hold.connection import Answer, Connection, News, as_gone
from flash_moe.hold.launch import launch
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Place, common_folder, is_private, printable, require_private
from flash_moe.hold.protocol import Frame, Malformed
from flash_moe.options import Request

# A process that is there answers in a moment, whatever it computes; one that just begins imports.
HELLO_SECONDS, START_SECONDS = 5.0, 20.0
AGAIN_SECONDS = 0.02


def find(loading: Loading, seconds: float | None = None, news: News = News()) -> HeldModel | None:
    """Who holds exactly this, if somebody does: never an error. With `seconds`, it stays so long
    after every reply from now on; infinite is for ever."""
    folder = common_folder()
    # Without a look at the model's files, if nothing is held at all.
    if not is_private(folder) or not any(folder.glob("*.sock")):
        return None
    try:
        identity = loading.identity()
        connection = Connection.open(Place.of(identity), identity, HELLO_SECONDS)
    except OSError:
        return None
    return None if connection is None else HeldModel(connection, news, seconds)


def start(loading: Loading, name: str, seconds: float, news: News = News()) -> HeldModel:
    """Who holds exactly this, or a new process that does, under this name: one, of however many ask
    at once. HolderGone if there cannot be one."""
    identity = loading.identity()
    place = Place.of(identity)
    require_private(place.folder)
    deadline, launched = time.monotonic() + START_SECONDS, False
    while not launched and time.monotonic() < deadline:
        if (lock := place.take(create=True)) is not None:
            launch(place, lock, loading, name, seconds)
            launched = True
        if connection := Connection.open(place, identity, START_SECONDS):
            return HeldModel(connection, news, seconds)
        time.sleep(AGAIN_SECONDS)
    raise HolderGone("The process that was to hold the model did not begin.")


@dataclass(slots=True)
class HeldPlan:
    architecture: str = ""
    bits: str = ""


class HeldModel:
    """For one reply. `plan`, `lossy` and `warning` are known when the reply has begun."""

    def __init__(self, connection: Connection, news: News, seconds: float | None = None) -> None:
        self.plan = HeldPlan()
        self.lossy: list[str] = []
        self.warning = ""
        self._connection = connection
        self._news = news
        self._keep: Frame = {} if seconds is None else {"keep": seconds}

    def reply(self, request: Request) -> HeldReply:
        ask = {"request": protocol.request_to_json(request), **self._keep}
        return HeldReply(self, Answer(self._connection, ask, request, self._news), request)

    def wait(self) -> None:
        """Until the model is loaded. Errors are those of `Engine.load`."""
        ask = {"ready": True, **self._keep}
        for frame in Answer(self._connection, ask, Request(), self._news).frames():
            if "begin" in frame:
                with as_gone():
                    self.describe(frame["begin"])

    def describe(self, begin: Any) -> None:
        match begin:
            case {"architecture": str(name), "bits": str(bits), "lossy": list(lossy)}:
                self.plan = HeldPlan(printable(name), printable(bits))
                self.lossy = [str(one) for one in lossy]
                self.warning = printable(str(begin.get("warning") or ""))
            case _:
                raise Malformed("not a beginning")

    def close(self) -> None:
        self._connection.close()


class HeldReply:
    """As `Reply`: iterate once."""

    def __init__(self, model: HeldModel, answer: Answer, request: Request) -> None:
        self.stats = Stats()
        self.complete = request.schema is None and not request.tools
        self._model = model
        self._answer = answer
        self._logprobs: list[dict[str, Any]] = []
        self._start = clock.take()

    def logprobs(self) -> list[dict[str, Any]]:
        return self._logprobs

    def __iter__(self) -> Iterator[str]:
        """The answer alone."""
        return (event.text for event in self.events() if event.kind == "text")

    def events(self) -> Iterator[Event]:
        try:
            for frame in self._answer.frames():
                if event := self._take(frame):
                    yield event
        except GeneratorExit:
            for frame in self._answer.rest():
                self._take(frame)
            raise
        finally:
            self._model.close()

    def _take(self, frame: Frame) -> Event | None:
        with as_gone():
            if "event" in frame:
                return protocol.event_from_json(frame["event"])
            if "begin" in frame:
                self._model.describe(frame["begin"])
            elif "logprobs" in frame and protocol.is_list_of(dict, frame["logprobs"]):
                self._logprobs += frame["logprobs"]
            elif "end" in frame and isinstance(frame["end"], dict):
                self.stats = protocol.stats_from_json(frame["end"].get("stats"))
                # The start is this process's; all the rest the other one did.
                self.stats.first_word = {**self._start, **self.stats.first_word, **self._start}
                self.complete = frame["end"].get("complete") is True
            else:
                raise Malformed("not a frame of a reply")
        return None
