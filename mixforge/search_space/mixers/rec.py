"""Gated linear recurrence of vectors: h_t = a_t h_{t-1} + b_t, element by element.

    cell=rglru    x = conv(W_in u);  r_t = sigmoid(W_r x + b_r),  i_t = sigmoid(W_i x + b_i)
                  log a_t = -8 softplus(lambda) r_t,  b_t = sqrt(1 - a_t^2) (i_t x_t), but b_0 = i_0 x_0
      De et al. 2024 (arXiv 2402.19427), equations 1 to 4 and figure 2. W_r and W_i are block diagonal, one block for
      each head, as in its authors' code (RecurrentGemma, arXiv 2404.07839); a is between 0.9 and 0.999 at r = 1 at first.
    cell=hgrn     |a_t| = floor + (1 - floor) sigmoid(W_f x + b_f),  b_t = (1 - |a_t|) silu(W_c x + b_c)
      Qin et al. 2023 (arXiv 2311.04823), equations 2 to 6: h is complex and a_t turns it by an angle that is learned for
      each channel (phase=learned), or it is real (phase=none). The lower bound `floor` rises with depth: it is k / K in
      layer k of K, from 0, unless a number is given. An output norm follows the gate.
    cell=lru      a = exp(-exp(nu) + i exp(theta)) for each channel,  b_t = exp(gamma) B x_t,  y_t = Re C h_t + D x_t
      Orvieto et al. 2023 (arXiv 2303.06349), equations 4 to 6 and section 3; B and C complex, D diagonal.
    cell=qrnn     a_t = sigmoid(W_f X_t),  b_t = (1 - a_t) tanh(W_z X_t),  gate sigmoid(W_o X_t)
      Bradbury et al. 2016 (arXiv 1611.01576), section 2 (fo-pooling); X_t is the last `conv` tokens.
    cell=mingru   a_t = 1 - z_t,  b_t = z_t (W_h x + b_h),  z_t = sigmoid(W_z x + b_z)
    cell=minlstm  a_t = f_t / (f_t + i_t),  b_t = i_t / (f_t + i_t) (W_h x + b_h),  f_t, i_t as z_t
      Feng et al. 2024 (arXiv 2410.01201), sections 3.1 and 3.2, in the form without logarithms.

Every block ends as W_out (act(W_gate x) * h). What a paper gives its cell is what `conv`, `gate` and `phase` are unless
they are said; any cell takes any of them. A convolution is depthwise, and before the cell; but for qrnn its filters are
those of W_f, W_z and W_o.

Departures: each block has an output projection, which qrnn, mingru and minlstm have not; projections have no biases but
where one is written, unless bias=all gives them to the projections around the cell and to the convolution, as
RecurrentGemma has them, whose gate is gelu_tanh. rglru is as wide as the model, not 4/3 as wide, unless head_dim says so.
hgrn's lower bounds are not learned (they are what its learned ones start as), its norm is RMS. lru is without the gated
linear unit that follows it in its paper: a channel mixer says that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from torch import Tensor

from mixforge.kernels import gated_scan, gated_scan_complex, short_conv
from mixforge.search_space.genes import Choice, GeneValue, Real, Whole, replace
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.activation import gelu, gelu_tanh, sigmoid, silu
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.gated_cells import (
    HgrnCell,
    LruCell,
    MinGruCell,
    MinLstmCell,
    QrnnCell,
    RglruCell,
)
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.recurrence import LinearRecurrence
from mixforge.search_space.parts.short_convolution import ShortConvolution

MOST_HEADS = 256
WIDEST_HEAD = 16_384


@dataclass(frozen=True, slots=True)
class Rec(Mixer):
    """Linear recurrence of vectors. Genes that are left off are those of the cell's paper."""

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "hgrn": {"cell": "hgrn"},
        "lru": {"cell": "lru"},
        "mingru": {"cell": "mingru"},
        "minlstm": {"cell": "minlstm"},
        "qrnn": {"cell": "qrnn"},
        "rglru": {"cell": "rglru"},
    }

    cell: Annotated[str, Choice("hgrn", "lru", "mingru", "minlstm", "qrnn", "rglru")] = "hgrn"
    heads: Annotated[int | None, Whole(1, MOST_HEADS)] = None
    head_dim: Annotated[int | None, Whole(1, WIDEST_HEAD)] = None
    conv: Annotated[str | int | None, Choice("none"), Whole(2, 8)] = None
    gate: Annotated[str | None, Choice("none", "gelu", "sigmoid", "silu", "gelu_tanh")] = None
    phase: Annotated[str, Choice("learned", "none")] = "learned"
    floor: Annotated[int | float | None, Real(0, 0.999)] = None
    bias: Annotated[str, Choice("none", "all")] = "none"

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head. Only rglru has matrices for each head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def taps(self) -> int:
        """Tokens that the convolution sees, its own included; 1 where there is none."""
        conv = _USUAL_CONV.get(self.cell, 1) if self.conv is None else self.conv
        return conv if isinstance(conv, int) else 1

    def activation(self) -> str:
        """The gate's activation, or none."""
        return _USUAL_GATE.get(self.cell, "none") if self.gate is None else self.gate

    @property
    def is_complex(self) -> bool:
        """Whether h is of complex numbers."""
        return self.cell == "lru" or (self.cell == "hgrn" and self.phase == "learned")

    def placed(self, index: int, count: int) -> Self:
        return replace(self, floor=index / count) if self.cell == "hgrn" and self.floor is None else self

    def why_illegal(self, width: int) -> str | None:
        heads, _ = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return undivided("rec", heads, width)
        return None

    def canonical(self, width: int) -> Self:
        heads, head_dim = self.sizes(width)
        if self.cell != "rglru":
            heads, head_dim = fewest_heads(heads * head_dim, width)
        follows = width % heads == 0 and head_dim == width // heads
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if follows else head_dim,
            conv=None if self.taps() == _USUAL_CONV.get(self.cell, 1) else self.conv,
            gate=None if self.activation() == _USUAL_GATE.get(self.cell, "none") else self.gate,
            phase=self.phase if self.cell == "hgrn" else "learned",
            floor=self.floor if self.cell == "hgrn" else None,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        heads, head_dim = self.sizes(width)
        if self.cell == "rglru":
            return replace(self, heads=shared_heads("rglru", heads, share), head_dim=head_dim).canonical(
                width
            )
        channels = heads * head_dim * share
        if channels.denominator != 1:
            raise ValueError(f"a share of {share} does not divide {self.cell}'s {heads * head_dim} channels")
        return replace(self, heads=1, head_dim=int(channels)).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner, taps = heads * head_dim, self.taps()
        features = 2 * inner if self.is_complex else inner
        looks_back = taps - 1 if self.cell == "qrnn" else 0
        seen = (1 + looks_back) * width
        # Multiply-adds of the cell, and its vectors.
        products, vectors = {
            "hgrn": (
                seen * (inner + features),
                inner + features + (inner if self.is_complex else 0) + features,
            ),
            "lru": (seen * features, 3 * inner + width),
            "mingru": (seen * 2 * inner, 2 * inner),
            "minlstm": (seen * 3 * inner, 3 * inner),
            "qrnn": (seen * 2 * inner, 0),
            "rglru": (width * inner + 2 * inner * head_dim, 3 * inner),
        }[self.cell]
        convolved = 0 if self.cell == "qrnn" or taps == 1 else inner if self.cell == "rglru" else width
        products += features * width + convolved * taps
        products += seen * features if self.activation() != "none" else 0
        if self.bias == "all":
            vectors += width + (features if self.activation() != "none" else 0)
            vectors += inner if self.cell == "rglru" else 0
            vectors += convolved if taps > 1 else 0
        state = 4 * features + (convolved * (taps - 1) + looks_back * width) * itemsize
        params = products + vectors
        return Cost(
            params=params,
            flops=2 * length * products,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        inner, taps = heads * head_dim, self.taps()
        features = 2 * inner if self.is_complex else inner
        looks_back = taps - 1 if self.cell == "qrnn" else 0
        seen = (1 + looks_back) * width
        has_conv = self.cell != "qrnn" and taps > 1
        conv = Part(
            ShortConvolution,
            channels=inner if self.cell == "rglru" else width,
            size=taps,
            activation="none",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
            bias=self.bias == "all",
        )
        activation = _ACTIVATIONS[self.activation()]
        scan = gated_scan_complex if self.is_complex else gated_scan
        return Part(
            LinearRecurrence,
            width=width,
            features=features,
            is_complex=self.is_complex,
            looks_back=looks_back,
            into=self._projection(seen, inner) if self.cell == "rglru" else None,
            conv=conv if has_conv else None,
            cell=self._cell(width if self.cell != "qrnn" else seen, heads, head_dim),
            gate=None if activation is None else self._projection(seen, features),
            activation=activation,
            norm=norm_part(features, backend) if self.cell == "hgrn" else None,
            has_skip=self.cell == "lru",
            bias=self.bias == "all",
            operation=scan.form(backend),
            one_step=scan.step_form(backend),
        )

    def _cell(self, seen: int, heads: int, head_dim: int) -> Part:
        channels = heads * head_dim
        match self.cell:
            case "rglru":
                return Part(RglruCell, heads=heads, head_dim=head_dim)
            case "hgrn":
                floor = 0.0 if self.floor is None else float(self.floor)
                return Part(HgrnCell, width=seen, channels=channels, floor=floor, is_complex=self.is_complex)
        return Part(_CELLS[self.cell], width=seen, channels=channels)

    def _projection(self, width: int, features: int) -> Part:
        return Part(Dense, in_features=width, out_features=features, bias=self.bias == "all")


_USUAL_CONV = {"qrnn": 2, "rglru": 4}
_USUAL_GATE = {"hgrn": "sigmoid", "qrnn": "sigmoid", "rglru": "gelu"}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "sigmoid": sigmoid,
    "silu": silu,
}
_CELLS = {"lru": LruCell, "mingru": MinGruCell, "minlstm": MinLstmCell, "qrnn": QrnnCell}


def fewest_heads(channels: int, width: int) -> tuple[int, int]:
    """Heads and their channels where only the number of channels counts: the usual ones, or else the fewest.

    Numbers that the genes do not hold are given where there are no others.
    """
    usual = default_heads(width)
    if channels == width:
        return usual, width // usual
    few = (*range(-(-channels // WIDEST_HEAD), MOST_HEADS + 1), usual)
    heads = next((h for h in few if channels % h == 0 and channels // h <= WIDEST_HEAD), 1)
    return heads, channels // heads
