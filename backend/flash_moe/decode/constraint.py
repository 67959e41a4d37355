"""What may be said next: the protocol that grammars implement and the loop steps through."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# One bool for each token of the vocabulary; what a model's head has beyond it may not be said.
Mask = NDArray[np.bool_]


class Constraint(Protocol):
    """Serves one reply. It knows tokens alone, neither logits nor the model."""

    @property
    def finished(self) -> bool:
        """All is said: nothing but the end of the turn could follow."""

    @property
    def complete(self) -> bool:
        """Whether the reply could end here."""

    @property
    def holds(self) -> bool:
        """Whether some token may not come next."""

    def mask(self) -> Mask | None:
        """The tokens that may come next; None where every token may. Changes nothing."""

    def accept(self, token: int) -> bool:
        """Go on by a token. False: it is not said, and `forced` has what is said instead."""

    def forced(self) -> list[int]:
        """The next tokens as far as there is no choice; each still has to be accepted."""


class Unconstrained:
    """Every token may come next."""

    finished = False
    complete = True
    holds = False

    def mask(self) -> Mask | None:
        return None

    def accept(self, token: int) -> bool:
        return True

    def forced(self) -> list[int]:
        return []
