"""Test-time memory: a network for each head that is trained on the keys and values it reads, while it reads them.

    q, k, v = silu(conv(W x)), with q and k of length 1 and x behind a norm without weights
    o_t = M_t(q_t), where M_t has taken a step on the loss of M(k_t) against v_t
    y_t = W_out (norm(o_t) * sigmoid(W_g x_t))

What the memory is, its loss, its retention and the order of its chunks stand in `parts.test_time_memory`. The gates are
alpha, eta = sigmoid(w . x + b), theta = (1 - eta) sigmoid(w . x + b) and delta = softplus(w . x + b), one of each for a
token and head.

Sources: Behrouz et al. 2025 (Titans, arXiv 2501.00663), equations 8 to 14 (loss=l2, retention=l2, optimiser=momentum)
and section 4.4 for the projections; Behrouz et al. 2025 (Miras, arXiv 2504.13173), section 5.3 (equations 24 to 27) for
    moneta   loss=lp(3), retention=lq(4)
    yaad     loss=huber
    memora   retention=kl
  with optimiser=gd and the two-layer memory x + LN(W_2 gelu(W_1 x)), and section 5.4 for chunks.

A memory that learns too fast is chaotic: gradients through it grow without a bound as the text grows longer. So inputs
pass a norm, as in lucidrains' titans-pytorch (`pre_rmsnorm`); theta has the factor 1 - eta, so that steps along one
direction add up to no more under a longer momentum; and no step goes past the value that it learns (the reach).

Departures: the norm, the reach and the least size of lq's norm are in neither paper. loss=huber is that of the error's
length (Miras, equation 15), whose slope has no jump as Yaad's mixture of two losses has (equation 16). Gates are one
number for each head, not one for each channel; there is a memory for each head, not one for the whole width; the first
memory is learned. Titans' persistent tokens belong to its attention, as what they would write here is in the first
memory. Inside a chunk the weights move in a straight line for every retention, as in section 5.4, but a chunk's end
takes its sum of gradients through the retention at once, without Memora's lag token. The norm of retention=lq is that
of a mean and not of a sum, and weights of retention=kl are those of a distribution less the uniform one: so both have a
size of their own whatever the width, and both signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels import short_conv
from mixforge.search_space.expansion import hidden_width, shortest_expand
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole
from mixforge.search_space.heads import default_heads, shared_heads, undivided
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.norm import RMSNorm, SimpleRMSNorm, norm_part
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.test_time_memory import (
    TestTimeMemory,
    gates_of,
    piece_flops,
    unit,
    usual_gates,
)

TWO_LAYERS = Form("mlp", (2,))
# The fewest channels of a head that the memory's norm takes.
NARROWEST_HEAD = 4


@dataclass(frozen=True, slots=True)
class Ttm(Mixer):
    """Test-time memory. Genes: the memory's form and width, its loss, what it forgets, how it learns, the tokens that
    share a gradient, heads, and the convolution's tokens.
    """

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "titans": {},
        "moneta": {"loss": Form("lp", (3,)), "retention": Form("lq", (4,)), "optimiser": "gd"},
        "yaad": {"loss": "huber", "optimiser": "gd"},
        "memora": {"retention": "kl", "optimiser": "gd"},
    }

    memory: Annotated[str | Form, Choice("matrix"), Call("mlp", Whole(1, 4))] = TWO_LAYERS
    loss: Annotated[str | Form, Choice("l2", "huber"), Call("lp", Real(1, 8))] = "l2"
    retention: Annotated[str | Form, Choice("l2", "kl"), Call("lq", Real(2, 16))] = "l2"
    optimiser: Annotated[str, Choice("momentum", "gd")] = "momentum"
    chunk: Annotated[int, Whole(1, 256)] = 16
    expand: Annotated[int | float, Real(0.125, 32)] = 4
    conv: Annotated[str | int, Choice("none"), Whole(2, 8)] = 4
    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None

    def sizes(self, width: int) -> tuple[int, int]:
        """Heads and channels of a head."""
        heads = default_heads(width) if self.heads is None else self.heads
        return heads, max(1, width // heads) if self.head_dim is None else self.head_dim

    def dims(self, width: int) -> list[int]:
        """The memory's widths from key to value."""
        _, head_dim = self.sizes(width)
        layers = 1 if isinstance(self.memory, str) else int(self.memory.arguments[0])
        return [head_dim, *[hidden_width(self.expand, head_dim)] * (layers - 1), head_dim]

    def why_illegal(self, width: int) -> str | None:
        heads, head_dim = self.sizes(width)
        if self.head_dim is None and width % heads != 0:
            return undivided("ttm", heads, width)
        if self.memory == "matrix" and isinstance(self.loss, Form):
            return (
                f"loss={self.loss} has gradients that grow without a bound in memory=matrix, which has no norm "
                "(mixer ttm); say memory=mlp(1), or loss=huber"
            )
        if head_dim < NARROWEST_HEAD and self.memory != "matrix":
            return (
                f"a norm over the {head_dim} channels of a head leaves little but their order (mixer ttm); "
                f"say a head_dim of {NARROWEST_HEAD} or more, or memory=matrix"
            )
        return None

    def canonical(self, width: int) -> Self:
        heads, head_dim = self.sizes(width)
        follows = width % heads == 0 and head_dim == width // heads
        return replace(
            self,
            heads=None if heads == default_heads(width) else heads,
            head_dim=None if follows else head_dim,
            retention="l2" if self.retention == Form("lq", (2,)) else self.retention,
            expand=shortest_expand(self.expand, head_dim) if len(self.dims(width)) > 2 else 4,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        heads, head_dim = self.sizes(width)
        return replace(self, heads=shared_heads("ttm", heads, share), head_dim=head_dim).canonical(width)

    def _gates(self) -> int:
        return 2 + (self.optimiser == "momentum") + (self.loss == "huber")

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        inner, dims = heads * head_dim, self.dims(width)
        momentum = self.optimiser == "momentum"
        taps = 0 if isinstance(self.conv, str) else self.conv
        gates = heads * self._gates()
        products = 5 * width * inner + 3 * inner * taps + width * gates
        matrices = heads * sum(into * out_of for into, out_of in pairwise(dims))
        params = products + gates + matrices + head_dim
        pieces, rest = divmod(length, self.chunk)
        read = heads * (pieces * piece_flops(self.chunk, dims, momentum) + piece_flops(rest, dims, momentum))
        conv_state = 3 * inner * max(0, taps - 1) * itemsize
        # What every token writes, and the chunk's start, which the first token of a chunk does.
        remembers = self.retention not in ("l2", Form("lq", (2,)))
        moving = 4 * matrices * (1 + momentum + remembers)
        state = conv_state + moving + 4 * matrices
        begun = 4 * matrices if length % self.chunk == 0 else 0
        return Cost(
            params=params,
            flops=2 * length * products + read,
            state_bytes=state,
            decode_bytes=(params - matrices) * itemsize + state + conv_state + moving + begun,
            # Decoding has the first memory in its state.
            idle_params=matrices,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        conv = None
        if isinstance(self.conv, int):
            conv = Part(
                ShortConvolution,
                channels=3 * heads * head_dim,
                size=self.conv,
                activation="silu",
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
            )
        memory = Part(
            TestTimeMemory,
            heads=heads,
            dims=self.dims(width),
            residual=self.memory != "matrix",
            loss=self.loss if isinstance(self.loss, str) else self.loss.name,
            power=self.loss.arguments[0] if isinstance(self.loss, Form) else 2,
            retention=self.retention if isinstance(self.retention, str) else self.retention.name,
            order=self.retention.arguments[0] if isinstance(self.retention, Form) else 2,
            momentum=self.optimiser == "momentum",
            chunk=self.chunk,
        )
        return Part(
            MemoryMixer,
            width=width,
            heads=heads,
            head_dim=head_dim,
            gates=self._gates(),
            conv=conv,
            memory=memory,
            norm=norm_part(head_dim, backend),
        )


class MemoryMixer(TokenMixer):
    """[B, T, D] -> [B, T, D]."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        gates: int,
        conv: ShortConvolution | None,
        memory: TestTimeMemory,
        norm: RMSNorm,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.before = SimpleRMSNorm()
        self.qkv = Dense(width, 3 * inner, bias=False)
        self.conv = conv
        self.gates = Dense(width, gates * heads)
        self.memory = memory
        self.norm = norm
        self.gate = Dense(width, inner, bias=False)
        self.out = Dense(inner, width, bias=False)
        with torch.no_grad():
            self.gates.bias.copy_(usual_gates(memory, heads))

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            tensors = self.memory.initial(batch).tensors()
        state = {name: tensor.to(device, copy=True).contiguous() for name, tensor in tensors.items()}
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        x_BTD = self.before(x_BTD)
        qkv_BTD, after = self.qkv(x_BTD), {}
        if self.conv is None:
            qkv_BTD = F.silu(qkv_BTD)
        else:
            qkv_BTD, after["conv"] = self.conv(qkv_BTD, None if state is None else state["conv"])
        q, k, v = (split_heads(each, self.heads).transpose(1, 2) for each in exact(qkv_BTD).chunk(3, -1))
        memory = self.memory.initial(x_BTD.shape[0]) if state is None else self.memory.stored(state)
        gates = gates_of(self.memory, self.gates(x_BTD), self.heads)
        o_BHTK, memory = self.memory(unit(q), unit(k), v, gates, memory, at.start)
        y_BTD = self._finish(o_BHTK.transpose(1, 2), x_BTD)
        kept = {} if self.conv is None else {"conv": after["conv"]}
        return y_BTD, None if state is None else memory.tensors() | kept

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BD = self.before(x_BD)
        qkv_BD = self.qkv(x_BD)
        qkv_BD = F.silu(qkv_BD) if self.conv is None else self.conv.step(qkv_BD, state["conv"])
        q, k, v = (split_heads(each, self.heads) for each in exact(qkv_BD).chunk(3, -1))
        memory = self.memory.stored(state)
        gates = gates_of(self.memory, self.gates(x_BD[:, None]), self.heads)
        o_BHK, after = self.memory.step(unit(q), unit(k), v, gates, memory, at.positions_T)
        for name, tensor in after.tensors().items():
            state[name].copy_(tensor)
        return self._finish(o_BHK, x_BD), state

    def _finish(self, o: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.norm(o.to(x.dtype)).flatten(-2) * torch.sigmoid(self.gate(x)))
        return y
