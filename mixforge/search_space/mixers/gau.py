"""Gated attention unit: one head of attention whose queries and keys share a narrow vector, under gates as wide as its
values; of the input, or of what moving averages, a state space or convolutions make of it first.

    x' = feed(x),  z = silu(W_z x' + b_z),  v = silu(W_v x + b_v)
    q = a_q z + b_q,  k = a_k z + b_k       a and b numbers for each channel; turned by position with pos=rope
    o_t = sum_s w(q_t . k_s / sqrt(K) + b_{t-s}) v_s        b learned for distances below n with pos=distance(n), else 0

gate=unit     y = W_o (silu(W_g x' + b_g) o) + b_o
gate=triple   y = W_o ((o^g v) sigmoid(o^v g)) + b_o,  g = silu(W_g x' + b_g),  o^v as o, and o^g the same over g for v
gate=update   y = u (h - x),  u = sigmoid(W_u x' + b_u),  h = silu(W_h x' + b_h + W_o (silu(W_g x' + b_g) o) + b_o):
              with place=post, x + y = u h + (1 - u) x
feed=ema(n), s4d(n)   x' = silu(scan(x)): n damped moving averages of each channel, or a fixed state space of n numbers
feed=tcn(l, r, n)     x' is x and n convolutions over l tokens, each r times as far apart as those of the one before
sparse=chunk(l)       s up to t in the block of t; mixed(l): and beside it, with a and b of its own, linear attention
              q'_t . (sum of k'_s v_s over earlier blocks) / l
sparse=vq(n)  all s, of keys quantised to n codes (see `parts.attention_codes`), with pos=none or distance(n)
score         softmax, or relu(z)^2 over the number of keys that are seen

Sources: Hua et al. 2022 (FLASH, arXiv 2202.10447), section 3 for the unit and section 4 for mixed chunk attention;
Zhao and Ma 2023 (MossFormer, arXiv 2302.11824) and its public code for gate=triple; Ma et al. 2022 (MEGA, arXiv
2209.10655), equations 4 and 7 to 16 and the public code, for feed=ema and gate=update, and section 3.4 for chunks;
Terzic et al. 2023 (TCNCA, arXiv 2312.05605) for convolutions in the place of moving averages; Liu et al. 2024 (LongVQ,
arXiv 2404.11163) for a state space there and quantised keys.

Departures: scales a start as normal numbers of deviation 1, where those of the papers' code have 0.02, which leaves
scores near zero. Scores under relu2 are divided by sqrt(K) too, which FLASH's are not, and the square is divided by the
number of keys that a query sees, not by that of the sequence or the block. Convolutions are residual and of numbers,
not matrices. MossFormer's convolutions before its projections are not here. Under scale=mup, queries and keys
of the default key_dim, a quarter of the width, are not a head of one size (see `scaling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from mixforge.kernels import attention, diagonal_ssm
from mixforge.search_space.attention_cost import EXACT, code_products
from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attention_scores import Weigh
from mixforge.search_space.parts.feeds import ConvolutionFeed, ScanFeed
from mixforge.search_space.parts.gated_attention import (
    BlockAttention,
    DistanceBias,
    EarlierBlocks,
    GatedAttentionUnit,
)
from mixforge.search_space.parts.gated_codes import CodedAttention
from mixforge.search_space.parts.state_space import DiagonalScan, MovingAverage

# Tokens that a feed's farthest convolution reaches back.
FARTHEST = 1_048_576


@dataclass(frozen=True, slots=True)
class Gau(Mixer):
    """Gated attention unit. Genes: channels of queries and keys, those of values over the width, what is read in the
    place of the input, the gates, who sees whom, positions, and what is made of scores.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "mega": {"feed": Form("ema", (16,)), "gate": "update"},
    }

    key_dim: Annotated[int | None, Whole(1, 1024)] = None
    expand: Annotated[int | float, Real(NARROWEST, WIDEST)] = 2
    feed: Annotated[
        str | Form,
        Choice("none"),
        Call("ema", Whole(1, 1024)),
        Call("s4d", Whole(2, 1024)),
        Call("tcn", Whole(2, 256), Whole(1, 64), Whole(1, 16)),
    ] = "none"
    gate: Annotated[str, Choice("unit", "triple", "update")] = "unit"
    sparse: Annotated[
        str | Form,
        Choice("none"),
        Call("chunk", Whole(2, 65536)),
        Call("mixed", Whole(2, 65536)),
        Call("vq", Whole(2, 65536)),
    ] = "none"
    pos: Annotated[str | Form, Choice("rope", "none"), Call("distance", Whole(1, 65536))] = "rope"
    score: Annotated[str, Choice("softmax", "relu2")] = "softmax"

    def sizes(self, width: int) -> tuple[int, int]:
        """Channels of queries and keys, and those of values."""
        return default_key_dim(width) if self.key_dim is None else self.key_dim, hidden_width(
            self.expand, width
        )

    def read(self, width: int) -> int:
        """Channels that attention weighs."""
        return self.sizes(width)[1] * (2 if self.gate == "triple" else 1)

    @property
    def pattern(self) -> tuple[str, int]:
        """The name of who sees whom, and the tokens of a block or the codes; 0 where there are neither."""
        if isinstance(self.sparse, str):
            return self.sparse, 0
        return self.sparse.name, int(self.sparse.arguments[0])

    @property
    def convolutions(self) -> tuple[int, int, int] | None:
        """Of a feed of convolutions: taps, by how much they spread, and how many there are."""
        if not isinstance(self.feed, Form) or self.feed.name != "tcn":
            return None
        size, spread, layers = map(int, self.feed.arguments)
        return size, spread, layers

    @property
    def reach(self) -> int:
        """Distances that have a bias: of those that are said, the ones between tokens of a block."""
        if not isinstance(self.pos, Form):
            return 0
        said, (name, size) = int(self.pos.arguments[0]), self.pattern
        return min(said, size) if name in ("chunk", "mixed") else said

    @property
    def scanned(self) -> int:
        """Numbers that a feed's scan keeps of each channel."""
        return int(self.feed.arguments[0]) if isinstance(self.feed, Form) and self.convolutions is None else 0

    def why_illegal(self, width: int) -> str | None:
        keys, _ = self.sizes(width)
        if isinstance(self.feed, Form) and self.feed.name == "s4d" and self.scanned % 2 != 0:
            return f"feed={self.feed} is no number of conjugate pairs (mixer gau); say an even one"
        if self.convolutions is not None:
            size, spread, layers = self.convolutions
            reach = (size - 1) * spread ** (layers - 1)
            if reach > FARTHEST:
                return (
                    f"the last convolution of feed={self.feed} reaches back more than {FARTHEST} tokens (mixer gau); "
                    "say fewer or nearer ones"
                )
        if self.pattern[0] == "vq" and (self.pos == "rope" or self.score != "softmax"):
            given = f"pos={self.pos}" if self.pos == "rope" else f"score={self.score}"
            return (
                f"sparse={self.sparse} sees all tokens by the codes of their keys, so it takes no {given} (mixer gau); "
                "say pos=none or distance(n), and score=softmax"
            )
        if self.pos == "rope" and keys % 2 != 0:
            return f"pos=rope turns pairs of channels, and key_dim {keys} is odd (mixer gau); say an even one"
        return None

    def canonical(self, width: int) -> Self:
        feed = self.feed
        if self.convolutions is not None and self.convolutions[2] == 1:
            # One convolution has none before it that its taps would be farther apart than.
            feed = Form("tcn", (self.convolutions[0], 1, 1))
        return replace(
            self,
            pos=Form("distance", (self.reach,)) if self.reach else self.pos,
            feed=feed,
            key_dim=None if self.key_dim == default_key_dim(width) else self.key_dim,
            expand=shortest_expand(self.expand, width),
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        _, values = self.sizes(width)
        inner = values * share
        if inner.denominator != 1:
            raise ValueError(f"a share of {share} does not divide gau's {values} channels of values")
        expand = int(inner) / width
        if expand < NARROWEST:
            raise ValueError(
                f"a share of {share} leaves gau {int(inner)} channels of values, {expand:g} times the width; "
                f"give it an expand of {NARROWEST / share} or more"
            )
        return replace(self, expand=expand).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        keys, values = self.sizes(width)
        name, size = self.pattern
        made = keys + values + (2 * width if self.gate == "update" else 0)
        matrices = width * (made + 2 * values)
        vectors = made + values + width + (8 if name == "mixed" else 4) * keys
        vectors += (size * keys if name == "vq" else 0) + self.reach
        fed_params, fed_products, fed_state, fed_written = self._feed_cost(width, itemsize)
        products, kept, written = self._seen_cost(width, length, itemsize)
        params = matrices + vectors + fed_params
        state = kept + fed_state
        return Cost(
            params=params,
            flops=2 * length * (matrices + fed_products) + 2 * products,
            state_bytes=state,
            decode_bytes=params * itemsize + state + written + fed_written,
        )

    def _feed_cost(self, width: int, itemsize: int) -> tuple[int, int, int, int]:
        """Weights, multiply-adds of a token, bytes that are kept, and of these those that a token writes."""
        if self.convolutions is not None:
            size, spread, layers = self.convolutions
            taps = width * size * layers
            reach = sum((size - 1) * spread**number for number in range(layers))
            return taps, taps, width * reach * itemsize, width * layers * itemsize
        if self.scanned == 0:
            return 0, 0, 0, 0
        numbers = width * self.scanned
        weights = 4 * numbers + width
        if isinstance(self.feed, Form) and self.feed.name == "s4d":
            weights = 2 * numbers + 2 * width
        return weights, numbers, EXACT * numbers, EXACT * numbers

    def _seen_cost(self, width: int, length: int, itemsize: int) -> tuple[int, int, int]:
        """Multiply-adds of a sequence, bytes that are kept, and of these those that a token writes."""
        keys, values = self.sizes(width)[0], self.read(width)
        name, size = self.pattern
        if name == "vq":
            carried = EXACT * size * (values + 1)
            if self.reach == 0:
                return code_products(length, size, keys, values), carried, carried
            # Tokens are counted when they leave the ring.
            entry, counted = (keys + values) * itemsize, carried if length >= self.reach else 0
            products = code_products(length, size, keys, values, self.reach)
            return products, carried + min(self.reach, length) * entry, counted + entry
        block = min(size, length) if size else length
        padded = -(-length // block) * block
        # The fused operation without a mask widens the narrower ones.
        both = 2 * max(keys, values) if self.score == "softmax" and self.reach == 0 else keys + values
        products, entry = padded * block * both, (keys + values) * itemsize
        kept, written = block * entry, entry
        if name == "mixed":
            sums = EXACT * keys * values
            products += 2 * padded * keys * values
            kept += 2 * sums
            # When a block begins, its tokens so far are none, and those before are more.
            written += sums * (2 if length % size == 0 else 1)
        return products, kept, written

    def build(self, width: int, backend: Backend) -> Part:
        keys, values = self.sizes(width)
        return Part(
            GatedAttentionUnit,
            width=width,
            key_dim=keys,
            inner=values,
            updates=self.gate == "update",
            triple=self.gate == "triple",
            feed=self._feed(width, backend),
            attention=self._attention(width, backend),
        )

    def _feed(self, width: int, backend: Backend) -> Part | None:
        if self.convolutions is not None:
            size, spread, layers = self.convolutions
            return Part(ConvolutionFeed, width=width, size=size, dilation=spread, layers=layers)
        if not isinstance(self.feed, Form):
            return None
        forms = {"operation": diagonal_ssm.form(backend), "one_step": diagonal_ssm.step_form(backend)}
        given = {"channels": width, "states": self.scanned, **forms}
        if self.feed.name == "s4d":
            return Part(ScanFeed, scan=Part(DiagonalScan, is_complex=True, **given))
        return Part(ScanFeed, scan=Part(MovingAverage, **given))

    def _bias(self) -> Part | None:
        return Part(DistanceBias, reach=self.reach) if self.reach else None

    def _attention(self, width: int, backend: Backend) -> Part:
        keys, values = self.sizes(width)[0], self.read(width)
        name, size = self.pattern
        if name == "vq":
            return Part(CodedAttention, key_dim=keys, channels=values, codes=size, bias=self._bias())
        turns = self.pos == "rope"
        earlier = Part(EarlierBlocks, key_dim=keys, channels=values, block=size, turns=turns)
        return Part(
            BlockAttention,
            key_dim=keys,
            channels=values,
            block=size or None,
            turns=turns,
            bias=self._bias(),
            weigh=None if self.score == "softmax" else Part(Weigh, score=self.score, sinks=0),
            earlier=earlier if name == "mixed" else None,
            operation=attention.form(backend),
            masked=attention.masked_form(backend),
        )


def default_key_dim(width: int) -> int:
    """A quarter of the width, in pairs: the 256 of MEGA's 1,024 channels."""
    return max(2, width // 8 * 2)
