"""How a task trains: the same for every candidate, so that candidates differ by their architecture alone."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine down to zero.

    Source: Loshchilov and Hutter 2017 (arXiv 1711.05101), algorithm 2; the cosine of arXiv 1608.03983,
    equation 5.
    """

    steps: int
    batch: int
    """Sequences in one step."""
    lr: tuple[float, ...]
    """Highest learning rate. Of several, each is trained and the best on the selection split counts."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.1
    """Of matrices; vectors (norms, biases, gates) are not decayed."""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together."""

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000_000:
            raise ValueError(f"steps {self.steps} is not between 1 and 100000000")
        if not 1 <= self.batch <= 1_048_576:
            raise ValueError(f"batch {self.batch} is not between 1 and 1048576 sequences")
        if not 1 <= len(self.lr) <= 8 or not all(0 < rate <= 10 for rate in self.lr):
            raise ValueError(f"lr {self.lr} is not one to eight numbers above 0 and up to 10, such as 3e-3")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup {self.warmup} is not a share of the steps, 0 to 1")
        if not 0 <= self.weight_decay <= 10:
            raise ValueError(f"weight_decay {self.weight_decay} is not between 0 and 10")
        if not 0 < self.clip <= 1e9:
            raise ValueError(f"clip {self.clip} is not between 0 and 1e9, and above 0")

    def rate(self, step: int, highest: float) -> float:
        """The learning rate of step 0 to steps - 1."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return highest * (step + 1) / rising
        return highest * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))
