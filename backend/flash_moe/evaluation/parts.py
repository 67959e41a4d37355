"""The parts of a report: what was measured, and figures with their standard errors.

`to_json` is what scripts and saved results rely on: its names stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_moe.evaluation.figures import Estimate, finite


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured, and on what: with another K, other bits or another runtime, the figures
    are others. `options` are the settings that the user chose."""

    model: str
    path: str
    architecture: str
    experts_per_token: int
    own_experts_per_token: int
    bits: str
    lossy: list[str]
    runtime: str
    options: dict[str, Any]
    data: str
    limit: int | None
    constrained: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`bits_per_byte` and `nbytes` are of texts alone; they compare models of any tokenizer."""

    perplexity: Estimate
    documents: int
    tokens: int
    bits_per_byte: float | None = None
    nbytes: int = 0

    def to_json(self) -> dict[str, Any]:
        value = {
            **self.perplexity.to_json("perplexity"),
            "documents": self.documents,
            "tokens": self.tokens,
        }
        if self.nbytes:
            value |= {"bits_per_byte": finite(self.bits_per_byte), "bytes": self.nbytes}
        return value


@dataclass(frozen=True, slots=True)
class Perplexities:
    """Of everything, and of its parts: texts by source, replies by kind."""

    total: Perplexity
    parts: Mapping[str, Perplexity]

    def to_json(self, name: str) -> dict[str, Any]:
        parts = {part: perplexity.to_json() for part, perplexity in self.parts.items()}
        return {**self.total.to_json(), name: parts}


@dataclass(frozen=True, slots=True)
class Share:
    """Of `of` things, the share that is as it should be."""

    share: Estimate
    of: int

    def to_json(self) -> dict[str, Any]:
        return {**self.share.to_json("share"), "of": self.of}


# By what was judged: right, valid, schema, equal, parses, names, arguments.
Shares = Mapping[str, Share]


@dataclass(frozen=True, slots=True)
class Replies:
    """How many of the model's own replies are right: of one section, and of each kind in it."""

    total: Shares
    kinds: Mapping[str, Shares]

    def to_json(self) -> dict[str, Any]:
        kinds = {kind: _shares_json(shares) for kind, shares in self.kinds.items()}
        return {**_shares_json(self.total), "kinds": kinds}


@dataclass(frozen=True, slots=True)
class AllowedMass:
    """How much probability grammars left, of `tokens` that the model chose under one. At p1 = 0.2,
    one token in a hundred had less than that left. Estimates are None where there was no reply."""

    tokens: int
    mean: Estimate | None = None
    p1: Estimate | None = None

    def to_json(self) -> dict[str, Any]:
        estimates = {"mean": self.mean, "p1": self.p1}
        present = {name: e.to_json() for name, e in estimates.items() if e is not None}
        return {"tokens": self.tokens, **present}


@dataclass(frozen=True, slots=True)
class AllowedMasses:
    """`forced_tokens` are not counted in the masses: the model does not choose them."""

    total: AllowedMass
    forced_tokens: int
    sections: Mapping[str, AllowedMass]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.total.to_json(),
            "forced_tokens": self.forced_tokens,
            "sections": {name: mass.to_json() for name, mass in self.sections.items()},
        }


@dataclass(frozen=True, slots=True)
class Divergence:
    """From a reference, in nats a token. `nats_more` is the log loss above the reference's,
    `agreement` how often both find the same token the likeliest."""

    kl: Estimate
    kl_p99: Estimate
    agreement: Share
    nats_more: Estimate
    documents: int

    @property
    def tokens(self) -> int:
        return self.agreement.of

    def to_json(self) -> dict[str, Any]:
        return {
            "kl": self.kl.to_json(),
            "kl_p99": self.kl_p99.to_json(),
            "agreement": self.agreement.to_json(),
            "nats_more": self.nats_more.to_json(),
            "tokens": self.tokens,
            "documents": self.documents,
        }


@dataclass(frozen=True, slots=True)
class Against:
    """The comparison with a reference: `model` is what its file says of the model that saved it.
    `total` is None if no document was compared; `spans` are those of evaluation.spans."""

    file: Path
    model: Mapping[str, Any]
    documents: int
    total: Divergence | None
    spans: Mapping[str, Divergence]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            "reference": dict(self.model),
            "documents_compared": self.documents,
            **(self.total.to_json() if self.total else {}),
            "spans": {span: divergence.to_json() for span, divergence in self.spans.items()},
        }


def _shares_json(shares: Shares) -> dict[str, Any]:
    return {name: share.to_json() for name, share in shares.items()}
