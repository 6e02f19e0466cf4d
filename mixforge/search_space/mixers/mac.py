"""Memory as context: attention inside a segment, to persistent tokens, to what a memory reads for the segment, and to it.

For a segment of tokens x, M being the memory as the segments before have left it:

    h_t = W_r norm(M(q(x_t)))
    y_t = W_o softmax attention of x_t to [p; h_s; x_s]        s <= t in the segment, keys and values of all by W_k, W_v
    M_t takes a step on the loss of M(k(y_t)) against v(y_t)
    o_t = y_t sigmoid(W_r norm(M_t(q(y_t))))

q, k and v are silu(W .) behind a norm without weights, q and k of length 1. What the memory is and how it learns stands
in `parts.test_time_memory`: a multi-layer network for each head, the squared loss, momentum and a decay, with a
segment's gradients taken where it begins. p are learned keys and values.

Source: Behrouz et al. 2025 (Titans, arXiv 2501.00663), section 4.1, equations 21 to 25, with section 4.4 for projections.

Departures: a token attends to what was read for itself and those before it, as what was read for later tokens follows
from these; the memory's projections have no convolution; what it reads passes a norm and a matrix, and gates by a
sigmoid; the memory and its gates are as in `ttm`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

from mixforge.search_space.genes import Call, Choice, Form, Real, Whole
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.mixers.ttm import TWO_LAYERS, Ttm
from mixforge.search_space.part import Part
from mixforge.search_space.parts.memory_context import MemoryAsContext
from mixforge.search_space.parts.test_time_memory import piece_flops


@dataclass(frozen=True, slots=True)
class Mac(Mixer):
    """Memory as context. Genes: tokens of a segment, persistent tokens, the memory's form and width, heads."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    segment: Annotated[int, Whole(2, 256)] = 16
    persistent: Annotated[int, Whole(1, 4096)] = 4
    memory: Annotated[str | Form, Choice("matrix"), Call("mlp", Whole(1, 4))] = TWO_LAYERS
    expand: Annotated[int | float, Real(0.125, 32)] = 4
    heads: Annotated[int | None, Whole(1, 256)] = None

    @property
    def learner(self) -> Ttm:
        """Its memory as a mixer by itself."""
        return Ttm(memory=self.memory, expand=self.expand, heads=self.heads, chunk=self.segment, conv="none")

    def why_illegal(self, width: int) -> str | None:
        reason = self.learner.why_illegal(width)
        if reason is not None:
            return reason.replace("mixer ttm", "mixer mac")
        heads, head_dim = self.learner.sizes(width)
        if head_dim % 2 != 0:
            return (
                f"rotary positions need an even head_dim, not {head_dim} of {heads} heads (mixer mac); "
                "say another number of heads"
            )
        return None

    def canonical(self, width: int) -> Self:
        learner = self.learner.canonical(width)
        return replace(self, heads=learner.heads, expand=learner.expand)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.learner.sizes(width)
        inner, dims = heads * head_dim, self.learner.dims(width)
        matrices = heads * sum(into * out_of for into, out_of in pairwise(dims))
        # Attention, the memory's queries, keys and values, what it reads, its gates.
        weights = 4 * width * inner + 3 * width * inner + inner * width + 3 * heads * width
        params = weights + 3 * heads + 2 * self.persistent * inner + head_dim + matrices
        # Context tokens have keys and values too; queries and readings are made of tokens and of what attention says.
        products = weights + 2 * width * inner + width * inner + inner * width
        whole, rest = divmod(length, self.segment)
        pairs = whole * self._pairs(self.segment) + self._pairs(rest)
        learnt = whole * piece_flops(self.segment, dims, True) + piece_flops(rest, dims, True)
        flops = 2 * length * (products + matrices) + 4 * inner * pairs + heads * learnt
        moving = 4 * matrices * 2
        kept = 4 * min(length, self.segment) * inner * itemsize
        state = kept + moving + 4 * matrices
        begun = 4 * matrices if length % self.segment == 0 else 0
        return Cost(
            params=params,
            flops=flops,
            state_bytes=state,
            decode_bytes=(params - matrices) * itemsize + state + 4 * inner * itemsize + moving + begun,
            # Decoding has the first memory in its state.
            idle_params=matrices,
        )

    def _pairs(self, tokens: int) -> int:
        """Of queries and keys in a segment of so many tokens, masked ones included."""
        return tokens * (self.persistent + 2 * tokens)

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.learner.sizes(width)
        learner = self.learner.build(width, backend).arguments
        return Part(
            MemoryAsContext,
            width=width,
            heads=heads,
            head_dim=head_dim,
            persistent=self.persistent,
            memory=learner["memory"],
            norm=learner["norm"],
        )
