"""Block-recurrent attention: a window of tokens, and state vectors that are updated once for each block of tokens.

Tokens t of block b, with keys k, values v and queries q and p of their own, and c^b the S state vectors:

    y_t = W_o [softmax_s(q_t . k_s / sqrt(K)) v_s over t - W < s <= t;  softmax_j(p_t . ks_j / sqrt(K)) vs_j]
    ks, vs, qs, ps = U norm(c^b + e)                          e: learned, so that no two states are alike
    h_i = [softmax_j(qs_i . ks_j / sqrt(K)) vs_j;  softmax_s(ps_i . k_s / sqrt(K)) v_s over the tokens of block b]
    c^{b+1} = g c^b + (1 - g) (U_o h + b),  g = sigmoid(b_g), c^0 learned

Only q and k between tokens are rotated by position. With one token at a time the states change in `between`, after the
last token of a block and before the first of the next.

Source: Hutchins et al. 2022 (arXiv 2203.07852), section 3.1 and 3.2 with the fixed gate and the skip configuration, and
the authors' code (google-research/meliad, transformer_layer.py) for the states' own projections, norm and e.

Departures: the states read the tokens of one block, those of the code also the block before; positions are rotary, not
T5's relative ones; queries and keys have no norm; b_g begins at 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from mixforge.kernels import attention
from mixforge.kernels.attention import attended_pairs
from mixforge.search_space.genes import Whole
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.block_recurrence import BlockRecurrence, StateVectors
from mixforge.search_space.parts.norm import norm_part


@dataclass(frozen=True, slots=True)
class Blockrec(Mixer):
    """Genes: heads and their size, tokens of a block (which is the window too), state vectors."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(2, 1024)] = None
    window: Annotated[int, Whole(2, 65_536)] = 16
    states: Annotated[int, Whole(1, 65_536)] = 16

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def why_illegal(self, width: int) -> str | None:
        heads, head_dim = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return undivided("blockrec", heads, width)
        if head_dim % 2 != 0:
            return f"rotary positions need an even head_dim, not {head_dim} (mixer blockrec)"
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
        return replace(self, heads=shared_heads("blockrec", heads, share), head_dim=head_dim).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner = heads * head_dim
        side = 6 * width * inner
        params = 2 * side + 2 * self.states * width + 3 * width
        blocks = -(-length // self.window)
        tokens = 2 * length * side + 4 * inner * (attended_pairs(length, self.window) + length * self.states)
        asked = blocks * 2 * self.states * 4 * width * inner
        pairs = self.states * (self.states + self.window)
        changed = (blocks - 1) * (4 * inner * pairs + 2 * self.states * 2 * inner * width)
        slots = 3 * min(length, self.window) * inner
        state_bytes = (slots + self.states * (width + 2 * inner)) * itemsize
        return Cost(
            params=params,
            flops=tokens + asked + changed,
            state_bytes=state_bytes,
            decode_bytes=params * itemsize + state_bytes + 3 * inner * itemsize,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        sizes = {"width": width, "heads": heads, "head_dim": head_dim}
        vectors = Part(StateVectors, **sizes, states=self.states, norm=norm_part(width, backend))
        operation = attention.window_form(backend)
        return Part(BlockRecurrence, **sizes, window=self.window, vectors=vectors, operation=operation)
