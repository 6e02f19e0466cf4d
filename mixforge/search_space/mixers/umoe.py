"""Attention whose values and outputs are feed-forward experts, which feed-forward layers may share.

    G, g = the k best of a router's scores of x, and their weights
    q_i = (W_q + B_i A_i) x,  k = W_k x                    turned by their position; one key for all experts
    m_i = sum_s softmax_s(q_i . k_s / sqrt(K)) x_s         s <= t: tokens are mixed before an expert sees them
    y = sum_{i in G} g_i E_i(m_i) + S(m_0)                 q_0 = W_0 x, for the `shared` experts S

E_i is a feed-forward layer as in `moe` (see `parts.experts`), of which attention's value and output matrices are the
case without an activation. A cache has keys and the layer's inputs. weights=own lends the experts to layers above, such
as moe(weights=shared), whose router is its own; weights=shared reads those of the nearest owner below.

Source: Yang et al. 2025 (UMoE, arXiv 2505.07260), pre-mixing attention, with queries of low rank for each expert and
shared experts as in the authors' public code.

Departures: weights of the picked experts sum to 1, as in `moe`, whose balancing loss it has too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from mixforge.kernels import attention
from mixforge.search_space.expansion import WIDEST
from mixforge.search_space.genes import Choice, Real, Whole
from mixforge.search_space.mixer import Backend, Cost, Loan, Mixer
from mixforge.search_space.mixers.moe import LEAST_EXPAND, Moe
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attention_pattern import EveryToken
from mixforge.search_space.parts.premixed_experts import PremixedExperts


@dataclass(frozen=True, slots=True)
class Umoe(Mixer):
    """Attention with feed-forward experts. Genes: how many experts, how many of them a token visits, how many every
    token passes, their form, width and owner, channels of queries and keys, and the rank of an expert's own queries.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"

    experts: Annotated[int, Whole(2, 4096)] = 8
    top_k: Annotated[int, Whole(2, 256)] = 2
    shared: Annotated[int, Whole(0, 256)] = 0
    act: Annotated[str, Choice("swiglu", "geglu", "gelu", "relu", "relu2", "silu")] = "swiglu"
    expand: Annotated[int | float | None, Real(LEAST_EXPAND, WIDEST)] = None
    weights: Annotated[str, Choice("own", "shared")] = "own"
    head_dim: Annotated[int, Whole(2, 1024)] = 64
    query_rank: Annotated[int, Whole(1, 1024)] = 16

    @property
    def feed_forward(self) -> Moe:
        """The layer that its experts would be by themselves."""
        return Moe(
            experts=self.experts,
            top_k=self.top_k,
            shared=self.shared,
            act=self.act,
            expand=self.expand,
            weights=self.weights,
            balance="loss",
        )

    @property
    def heads(self) -> int:
        """Queries of a token."""
        return self.top_k + (1 if self.shared else 0)

    def lends(self, width: int) -> Mapping[str, Loan]:
        return self.feed_forward.lends(width)

    def borrows(self, width: int) -> Mapping[str, Loan]:
        return self.feed_forward.borrows(width)

    def why_illegal(self, width: int) -> str | None:
        if self.top_k > self.experts:
            return f"top_k {self.top_k} is more than the {self.experts} experts (mixer umoe)"
        if self.head_dim % 2 != 0:
            return f"rotary positions need an even head_dim, not {self.head_dim} (mixer umoe); say {self.head_dim + 1}"
        return None

    def canonical(self, width: int) -> Self:
        return replace(self, expand=self.feed_forward.canonical(width).expand)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        low = self.query_rank * (width + self.head_dim)
        common = (self.heads - self.top_k + 2) * width * self.head_dim
        pairs = length * length * self.heads
        entry = (width + self.head_dim) * itemsize
        return self.feed_forward.cost(width, length, itemsize) + Cost(
            params=common + self.experts * low,
            # The narrower ones of keys and values are widened (`causal_attention_torch`).
            flops=2 * length * (common + self.top_k * low) + 4 * pairs * max(width, self.head_dim),
            state_bytes=length * entry,
            decode_bytes=(common + self.top_k * low) * itemsize + (length + 1) * entry,
            idle_params=(self.experts - self.top_k) * low,
        )

    def build(self, width: int, backend: Backend) -> Part:
        # The router, the experts and the shared experts, and what these do between their matrices.
        parts = self.feed_forward.build(width, backend).arguments
        names = ("router", "experts", "shared", "act", "gated")
        return Part(
            PremixedExperts,
            width=width,
            head_dim=self.head_dim,
            query_rank=self.query_rank,
            count=self.experts,
            pattern=Part(EveryToken, operation=attention.form(backend)),
            **{name: parts[name] for name in names},
        )
