"""Importing mlx-lm without transformers, without downloads, without lower limits of open files."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


@contextmanager
def own_file_limits() -> Iterator[None]:
    """mlx_lm.utils sets the limits of open files to (2048, 4096) when imported, the hard one for
    good. Within, it can only raise the soft one, which checkpoints of many files need on a Mac."""

    def raise_soft_limit(kind: int, limits: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(kind)
        most = limits[0] if hard == resource.RLIM_INFINITY else min(limits[0], hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            setrlimit(kind, (most, hard))

    setrlimit = resource.setrlimit
    resource.setrlimit = raise_soft_limit
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


class _Package(ModuleType):
    """mlx_lm, whose own code runs when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def without_unused(module: str) -> Iterator[None]:
    """mlx_lm and mlx_lm.utils import transformers for tokenizers and huggingface_hub for downloads,
    which we do not have from them: 0.01 s instead of 0.75. Who asks for either still gets it."""
    package, tokenizers, hub = "mlx_lm", "mlx_lm.tokenizer_utils", "huggingface_hub"
    # As mlx_lm does: transformers would tell everybody that PyTorch is missing.
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    if tokenizers in sys.modules:
        yield
        return
    if package not in sys.modules and (spec := find_spec(package)):
        sys.modules[package] = module_from_spec(spec)
        sys.modules[package].__class__ = _Package
    if module == tokenizers:
        with _without_transformers():
            yield
        return
    later = ModuleType(tokenizers)
    vars(later).update(
        TokenizerWrapper=Any,  # which mlx_lm.utils has in annotations alone
        load=lambda *args, **options: import_module(tokenizers).load(*args, **options),
    )
    sys.modules[tokenizers] = later
    try:
        with _imported_later(import_module(hub), "snapshot_download"):
            yield
    finally:
        if sys.modules.get(tokenizers) is later:
            del sys.modules[tokenizers]


class _StandIn(ModuleType):
    """Every name is a class, to be derived from or registered with."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"register": lambda *args, **options: None})


@contextmanager
def _without_transformers() -> Iterator[None]:
    """Inside, mlx_lm.tokenizer_utils is imported for what it has of its own, 0.02 s instead of 0.6;
    afterwards it is forgotten, and who imports it gets all of it."""
    package, name = "mlx_lm", "tokenizer_utils"
    needed = ("transformers", "transformers.tokenization_utils_base")
    if needed[0] in sys.modules:
        yield
        return
    sys.modules.update({module: _StandIn(module) for module in needed})
    try:
        yield
    finally:
        for module in (*needed, f"{package}.{name}"):
            sys.modules.pop(module, None)
        vars(sys.modules[package]).pop(name, None)


@contextmanager
def _imported_later(module: ModuleType, name: str) -> Iterator[None]:
    """A function of a module that imports it when it is first asked for: inside, asking gives one
    that does so when it is called."""
    if name in vars(module):
        yield
        return

    def call(*args: Any, **options: Any) -> Any:
        if vars(module).get(name) is call:
            delattr(module, name)
        return getattr(module, name)(*args, **options)

    setattr(module, name, call)
    try:
        yield
    finally:
        if vars(module).get(name) is call:
            delattr(module, name)
