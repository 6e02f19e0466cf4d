"""The width rules of mixers whose heads are all alike."""

from __future__ import annotations

from fractions import Fraction
from typing import Self

from mixforge.search_space.genes import replace
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.mixer import Mixer


class HeadedMixer(Mixer):
    """A mixer with the genes `heads`, None for the usual number, and `head_dim`, None for what fills the width."""

    __slots__ = ()

    heads: int | None
    head_dim: int | None

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def why_illegal(self, width: int) -> str | None:
        heads, _ = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return undivided(self.word(), heads, width)
        return None

    def canonical(self, width: int) -> Self:
        heads, head_dim = self.sizes(width)
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if width % heads == 0 and head_dim == max(1, width // heads) else head_dim,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        heads, head_dim = self.sizes(width)
        return replace(self, heads=shared_heads(self.word(), heads, share), head_dim=head_dim).canonical(
            width
        )
