"""Recurrence of vectors that is not linear: the gates see the last output, so tokens follow one another.

    i, f, g, o = W x_t + R h_{t-1} + b   (for each cell its own gates; R is block diagonal, one block for each head)
    cell=lstm    c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t)
      Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as torch's LSTM has it.
    cell=gru     r, z = sigmoid(...),  n = tanh(W_n x_t + b_n + r (R_n h_{t-1} + b'_n)),  h_t = (1 - z) n + z h_{t-1}
      Cho et al. 2014 (arXiv 1406.1078) with the reset gate behind the product, as torch's GRU has it.
    cell=slstm   m_t = max(log sigmoid(f) + m_{t-1}, i);  f' = exp(log sigmoid(f) + m_{t-1} - m_t),  i' = exp(i - m_t)
                 c_t = f' c_{t-1} + i' tanh(g),  n_t = f' n_{t-1} + i',  h_t = sigmoid(o) c_t / n_t
      Beck et al. 2024 (arXiv 2405.04517), equations 8 to 17 and appendix A.1, where g is z; a layer norm of each head
      follows.
    y_t = W_out h_t

conv=k: a depthwise convolution with SiLU in front of the input and forget gates (r and z of a GRU) alone, as in xLSTM's
block (figure 10 there; NX-AI/xlstm).

lstm and gru have one head unless `heads` says more, slstm has several. One head without a convolution runs by torch's
own LSTM and GRU over sequences; the others, and single tokens, by `mixforge.kernels.recurrent_cells`, with the products
of the whole input taken at once.

Departures: the output projection, which none of the three has. xLSTM's code makes the projections of the input block
diagonal too, its paper does not; its convolution has a bias and its forget gate a positive bias at first. Its block's
gated feed-forward half is a channel mixer here (geglu(expand=1.33)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

from mixforge.kernels import recurrent_cells, short_conv
from mixforge.search_space.genes import Choice, GeneValue, Whole, replace
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.nonlinear_recurrence import (
    HeadNorm,
    Recurrence,
    RecurrentWeights,
    whole_gru,
    whole_lstm,
)
from mixforge.search_space.parts.short_convolution import ShortConvolution


@dataclass(frozen=True, slots=True)
class Rnn(Mixer):
    """Recurrence that is not linear. Genes: its cell, the blocks of its matrix, their width, a convolution."""

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "gru": {"cell": "gru"},
        "lstm": {"cell": "lstm"},
        "slstm": {"cell": "slstm"},
    }

    cell: Annotated[str, Choice("lstm", "gru", "slstm")] = "lstm"
    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 16384)] = None
    conv: Annotated[str | int | None, Choice("none"), Whole(2, 8)] = None

    def usual_heads(self, width: int) -> int:
        """Heads where none are said."""
        return default_heads(width) if self.cell == "slstm" else 1

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = self.usual_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def taps(self) -> int:
        """Tokens that the convolution sees, its own included; 1 where there is none."""
        if self.conv is None:
            return 4 if self.cell == "slstm" else 1
        return self.conv if isinstance(self.conv, int) else 1

    def why_illegal(self, width: int) -> str | None:
        heads, _ = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return undivided("rnn", heads, width)
        return None

    def canonical(self, width: int) -> Self:
        heads, head_dim = self.sizes(width)
        follows = width % heads == 0 and head_dim == width // heads
        return replace(
            self,
            heads=None if heads == self.usual_heads(width) else heads,
            head_dim=None if follows else head_dim,
            conv=None if self.taps() == replace(self, conv=None).taps() else self.conv,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        heads, head_dim = self.sizes(width)
        if heads > 1:
            heads = shared_heads(self.cell, heads, share)
            return replace(self, heads=heads, head_dim=head_dim).canonical(width)
        channels = head_dim * share
        if channels.denominator != 1:
            raise ValueError(f"a share of {share} does not divide {self.cell}'s {head_dim} channels")
        return replace(self, heads=1, head_dim=int(channels)).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner, taps = heads * head_dim, self.taps()
        cell = recurrent_cells.CELLS[self.cell]
        products = cell.gates * inner * (width + head_dim) + inner * width
        products += width * taps if taps > 1 else 0
        vectors = cell.gates * inner + (0 if self.cell == "lstm" else inner)
        state = 4 * len(cell.first) * inner + width * (taps - 1) * itemsize
        params = products + vectors
        return Cost(
            params=params,
            flops=2 * length * products,
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        taps = self.taps()
        cell = recurrent_cells.CELLS[self.cell]
        is_whole = heads == 1 and taps == 1 and self.cell in _WHOLE
        conv = Part(
            ShortConvolution,
            channels=width,
            size=taps,
            activation="silu",
            operation=short_conv.form(backend),
            one_step=short_conv.step_form(backend),
        )
        return Part(
            Recurrence,
            width=width,
            heads=heads,
            head_dim=head_dim,
            conv=conv if taps > 1 else None,
            gates=cell.gates,
            first=list(cell.first),
            cell=Part(
                RecurrentWeights, heads=heads, head_dim=head_dim, gates=cell.gates, has_bias=cell.has_bias
            ),
            operation=recurrent_cells.form(backend, self.cell),
            one_step=recurrent_cells.step_form(backend, self.cell),
            whole=_WHOLE[self.cell] if is_whole and backend != "reference" else None,
            norm=Part(HeadNorm, channels=heads * head_dim) if self.cell == "slstm" else None,
        )


_WHOLE = {"lstm": whole_lstm, "gru": whole_gru}
