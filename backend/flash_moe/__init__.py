"""flash_moe: run a Mixture-of-Experts model that is bigger than memory, on MLX.

    from flash_moe import Engine, Request

    engine = Engine.load(path)
    for text in engine.reply(Request(messages=[{"role": "user", "content": "Hello"}])):
        print(text, end="", flush=True)

These names are all that users of the engine need; each is imported when it is first used, so that
importing the package loads neither MLX nor mlx-lm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flash_moe import clock, errors, options

if TYPE_CHECKING:
    from flash_moe import hold
    from flash_moe.built_in import BUILT_IN
    from flash_moe.chat.event import Event
    from flash_moe.engine import Engine, Reply
    from flash_moe.evaluation.evaluation import Evaluation
    from flash_moe.format.atomic import write_json
    from flash_moe.inspection import Checkpoint
    from flash_moe.measure.bench import Benchmark
    from flash_moe.measure.doctor import Diagnosis
    from flash_moe.options import Request, Settings
    from flash_moe.pack.job import PackJob
    from flash_moe.prefix.folder import PromptFolder
    from flash_moe.prefix.store import PrefixSettings
    from flash_moe.pull.job import PullJob
    from flash_moe.synth.job import SynthJob
    from flash_moe.thread import InferenceThread

__version__ = "0.1.0"

__all__ = [
    "BUILT_IN",
    "Benchmark",
    "Checkpoint",
    "Diagnosis",
    "Engine",
    "Evaluation",
    "Event",
    "InferenceThread",
    "PackJob",
    "PrefixSettings",
    "PromptFolder",
    "PullJob",
    "Reply",
    "Request",
    "Settings",
    "SynthJob",
    "errors",
    "hold",
    "options",
    "write_json",
]

_HOMES = {
    "BUILT_IN": "built_in",
    "Benchmark": "measure.bench",
    "Checkpoint": "inspection",
    "Diagnosis": "measure.doctor",
    "Engine": "engine",
    "Evaluation": "evaluation.evaluation",
    "Event": "chat.event",
    "InferenceThread": "thread",
    "PackJob": "pack.job",
    "PrefixSettings": "prefix.store",
    "PromptFolder": "prefix.folder",
    "PullJob": "pull.job",
    "Reply": "engine",
    "Request": "options",
    "Settings": "options",
    "SynthJob": "synth.job",
    "write_json": "format.atomic",
}


def __getattr__(name: str) -> Any:
    if name == "hold":
        return import_module("flash_moe.hold")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with clock.part("imports"):
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
