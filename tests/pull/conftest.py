"""A hub for every test that asks for one, and huggingface_hub's own client against it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.pull.hub import TOKEN, Hub, serving

Serve = Callable[[Path], Hub]


@contextmanager
def using(hub: Hub) -> Iterator[None]:
    """As HF_ENDPOINT does for a process of its own: in this one, the client is loaded already."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(_http, "_HUB_ORIGINS", frozenset({_http._url_origin(hub.endpoint)}))
        yield
        _http.close_session()


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(folder: Path) -> Hub:
            hub = stack.enter_context(serving(folder))
            stack.enter_context(using(hub))
            return hub

        yield start


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of several shards, with tensors in no order, as mlx-lm's are."""
    from tests.pull.sources import shuffled_checkpoint

    folder = tmp_path_factory.mktemp("pulled") / "Model-4bit"
    shuffled_checkpoint(folder)
    yield folder
    shutil.rmtree(folder.parent)
