"""Attention maps over the hidden states of a state space model: local attention, then a scan of what it says.

    q, k, v = W x, q and k turned by their position, in two halves of heads
    y_1 = A_1 v_1,  y_2 = A_2 (y_1 + v_2)              A_1, A_2: softmax maps over a window and over a dilated window
    u = silu(conv([y_1; y_2]) + b)
    h_t[f] = exp(dt_t[f] A[f]) h_{t-1}[f] + dt_t[f] B_t u_t[f]          N numbers for each channel f
    s = F [A_1 h_1; A_2 h_2] + b_F                      the maps once more, over states; F mixes heads
    z_t[f] = C_t . s_t[f] + D[f] u_t[f]
    out = W_o LN((LN(z) + conv(v) + b_v) silu(W_g x))

dt, B and C follow from u as in `ssm`. A window of W tokens with dilation d sees every d-th token.

Source: Lou et al. 2025 (A2Mamba, arXiv 2507.16624), its mixer MASS, as in the authors' public code.

Departures: one dimension, with windows that reach backwards and causal convolutions, where the paper's are centred in
an image; the gate has no batch norm, and projections have no biases. The dilation is a gene and does not follow from
the image's size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from torch import nn

from mixforge.kernels import attention, gated_scan, short_conv
from mixforge.search_space.genes import Whole
from mixforge.search_space.heads import default_heads, undivided
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.mixers.ssm import step_rank
from mixforge.search_space.part import Part
from mixforge.search_space.parts.attended_states import AttendedStates
from mixforge.search_space.parts.attention_pattern import Window, fused_pairs
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.state_space import Selection


@dataclass(frozen=True, slots=True)
class Mass(Mixer):
    """Attention maps over hidden states. Genes: heads, the window of both halves of them and the dilation of the
    second, numbers of a channel's state, tokens of the convolutions.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(2, 256)] = None
    window: Annotated[int, Whole(2, 65_536)] = 16
    dilation: Annotated[int, Whole(1, 4_096)] = 4
    state: Annotated[int, Whole(1, 64)] = 1
    conv: Annotated[int, Whole(2, 8)] = 5

    def all_heads(self, width: int) -> int:
        """Heads of both halves."""
        return usual_heads(width) if self.heads is None else self.heads

    @property
    def spans(self) -> tuple[int, int]:
        """Tokens from the farthest one that a half sees to the token itself."""
        return self.window, (self.window - 1) * self.dilation + 1

    def why_illegal(self, width: int) -> str | None:
        heads = self.all_heads(width)
        if heads % 2 != 0:
            return f"{heads} heads have no two halves (mixer mass); say {heads + 1}"
        if width % heads != 0:
            return undivided("mass", heads, width)
        if (width // heads) % 2 != 0:
            return (
                f"rotary positions need an even head_dim, not {width // heads} (mixer mass); say other heads"
            )
        return None

    def canonical(self, width: int) -> Self:
        return replace(self, heads=None if self.heads == usual_heads(width) else self.heads)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, rank, taps = self.all_heads(width), step_rank(width), self.conv
        states = width * self.state
        matrices = 5 * width * width + 2 * taps * width + width * (2 * rank + 2 * self.state)
        params = matrices + heads * (heads + 1) + states + 8 * width
        pairs = fused_pairs(length, self.window, 1, 0) + fused_pairs(length, self.window, self.dilation, 0)
        # Of both halves: scores for values and again for states, and what is summed.
        maps = pairs * (3 * width + states) // 2
        kept = sum(min(length, span) for span in self.spans) * (2 * width + states) // 2 * itemsize
        carried = 2 * (taps - 1) * width * itemsize + 4 * states
        return Cost(
            params=params,
            flops=2 * (length * (matrices + heads * states + states) + maps),
            state_bytes=kept + carried,
            decode_bytes=params * itemsize + kept + 2 * carried + (2 * width + states) * itemsize,
        )

    def build(self, width: int, backend: Backend) -> Part:
        local, conv = (
            Part(
                ShortConvolution,
                channels=width,
                size=self.conv,
                activation=activation,
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
                bias=True,
            )
            for activation in ("none", "silu")
        )
        windows = [
            Part(
                Window,
                window=self.window,
                dilation=dilation,
                first=0,
                shorter=None,
                operation=attention.window_form(backend),
                masked=attention.masked_form(backend),
            )
            for dilation in (1, self.dilation)
        ]
        return Part(
            AttendedStates,
            width=width,
            heads=self.all_heads(width),
            states=self.state,
            windows=windows,
            local=local,
            conv=conv,
            selection=Part(Selection, channels=width, states=self.state, rank=step_rank(width), norms=[]),
            scan=gated_scan.form(backend),
            scan_step=gated_scan.step_form(backend),
            norms=[Part(nn.LayerNorm, normalized_shape=width) for _ in range(2)],
        )


def usual_heads(width: int) -> int:
    """The usual number of heads, twice as many where it is odd."""
    heads = default_heads(width)
    return heads if heads % 2 == 0 else 2 * heads
