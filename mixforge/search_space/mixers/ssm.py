"""Diagonal state space: a state of N numbers for each channel, in Mamba's block.

    u, z = W_in x;  u = silu(conv(u) + bias)
    h_t[f] = exp(dt_t[f] A[f]) h_{t-1}[f] + B_t[f] u_t[f]       N numbers for each channel f
    y_t[f] = C_t . h_t[f] + D[f] u_t[f]
    out = W_out (y * silu(z))

rule=s6: dt = softplus(W_dt W_low u + b), B and C are products of u, and B_t[f] is dt_t[f] B_t: Gu and Dao 2023
  (arXiv 2312.00752), section 3.4 and algorithm 2. A starts as -1 .. -N, dt between 0.001 and 0.1 (section 3.6); the
  rank of dt is width/16. norm=dt_b_c puts a root-mean-square norm on low-rank dt, B and C, as Jamba
  (Lieber et al. 2024, arXiv 2403.19887, section 6.4) and Falcon Mamba (Zuo et al. 2024, arXiv 2410.05355) do.
  Projections, biases and their order are those of the public code, so that its checkpoints can be loaded.
rule=s4d: nothing follows from the input: B = (exp(dt A) - 1) / A, C is learned; Gu et al. 2022 (arXiv 2206.11893),
  equation 6 and section 4. poles=complex: N/2 conjugate pairs that start as -1/2 + i pi n (S4D-Lin); poles=real: N
  that start as -1 .. -N (S4D-Real). In Mamba's block these are the rows S4D of its table 6.
gate=glu is S4D's own block: u = x, out = a * sigmoid(b), [a; b] = W_out gelu(y). gate=none leaves silu(z) off.
fixed_point=householder(n): a dense recurrence by n scans (see `parts.fixed_point`).

Departures: gate=glu has no biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels import diagonal_ssm, selective_scan, short_conv
from mixforge.search_space.expansion import NARROWEST, WIDEST, hidden_width, shortest_expand
from mixforge.search_space.genes import Call, Choice, Form, GeneValue, Real, Whole, replace
from mixforge.search_space.mixer import Backend, Cost, Mixer
from mixforge.search_space.part import Part
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.fixed_point import FixedPointScan, HouseholderMixer
from mixforge.search_space.parts.layer import Pass, TokenMixer
from mixforge.search_space.parts.norm import norm_part
from mixforge.search_space.parts.short_convolution import ShortConvolution
from mixforge.search_space.parts.state_space import DiagonalScan, Selection, SelectiveScan, StateSpace

# Vectors of two numbers pass near zero so often that rounding the weights to bfloat16 moves outputs by a fifth.
LEAST_DIRECTIONS = 4


@dataclass(frozen=True, slots=True)
class Ssm(Mixer):
    """Diagonal state space. A gene that has no effect is dropped from the canonical form."""

    kind: ClassVar[Literal["token", "channel"]] = "token"
    aliases: ClassVar[Mapping[str, Mapping[str, GeneValue]]] = {
        "s4d": {"rule": "s4d", "gate": "glu", "state": 64},
    }

    rule: Annotated[str, Choice("s6", "s4d")] = "s6"
    poles: Annotated[str, Choice("complex", "real")] = "complex"
    state: Annotated[int, Whole(1, 1024)] = 16
    expand: Annotated[int | float, Real(NARROWEST, WIDEST)] = 2
    conv: Annotated[str | int, Choice("none"), Whole(2, 8)] = 4
    gate: Annotated[str, Choice("silu", "none", "glu")] = "silu"
    norm: Annotated[str, Choice("none", "dt_b_c")] = "none"
    fixed_point: Annotated[str | Form, Choice("none"), Call("householder", Whole(1, 32))] = "none"

    def inner(self, width: int) -> int:
        """Channels that have a state."""
        return width if self.gate == "glu" else hidden_width(self.expand, width)

    def iterations(self) -> int:
        """Scans of a fixed point; 0 where there is none."""
        return int(self.fixed_point.arguments[0]) if isinstance(self.fixed_point, Form) else 0

    def why_illegal(self, width: int) -> str | None:
        if self.rule == "s4d" and self.poles == "complex" and self.state % 2 != 0:
            return f"state {self.state} is no number of conjugate pairs (mixer ssm); say an even state or poles=real"
        if self.fixed_point == "none":
            return None
        if self.rule == "s4d":
            return f"fixed_point={self.fixed_point} needs B and C of the input: say rule=s6 (mixer ssm)"
        if self.norm != "none":
            return (
                f"norm={self.norm} and fixed_point={self.fixed_point} exclude each other, as a fixed point puts B and "
                "C to length 1 itself (mixer ssm); leave norm out"
            )
        if self.state < LEAST_DIRECTIONS:
            return (
                f"fixed_point={self.fixed_point} puts B and C to length 1, whose direction jumps where they are of only "
                f"{self.state} numbers (mixer ssm); say state={LEAST_DIRECTIONS} or more"
            )
        return None

    def canonical(self, width: int) -> Self:
        has_block = self.gate != "glu"
        return replace(
            self,
            poles=self.poles if self.rule == "s4d" else "complex",
            norm=self.norm if self.rule == "s6" else "none",
            expand=shortest_expand(self.expand, width) if has_block else 2,
            conv=self.conv if has_block else 4,
        )

    def narrow(self, width: int, share: Fraction) -> Self:
        if self.gate == "glu":
            raise ValueError("ssm(gate=glu) is as wide as the model and has no channels to share")
        inner = self.inner(width) * share
        if inner.denominator != 1:
            raise ValueError(f"a share of {share} does not divide ssm's {self.inner(width)} channels")
        return replace(self, expand=int(inner) / width).canonical(width)

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        inner, states, rank = self.inner(width), self.state, step_rank(width)
        taps = self.conv if isinstance(self.conv, int) and self.gate != "glu" else 0
        vectors = inner if taps > 0 else 0
        matrices = width * inner * (3 if self.gate == "silu" else 2)
        state = 4 * inner * states
        scans = inner * states
        if self.rule == "s4d":
            vectors += inner * (2 * states + 2)
        else:
            matrices += inner * (2 * rank + 2 * states)
            vectors += inner * (states + 2) + (rank + 2 * states if self.norm == "dt_b_c" else 0)
        if self.iterations() > 0:
            mixing = 2 * inner * (inner + 1 + states)
            scans = self.iterations() * (mixing + scans) - mixing
            matrices += mixing + (inner * inner if self.gate == "silu" else 0)
            vectors += 1 + 2 * inner
            state = self.iterations() * (state + 4 * inner)
        params = matrices + vectors + inner * taps
        state += inner * max(0, taps - 1) * itemsize
        return Cost(
            params=params,
            flops=2 * length * (matrices + inner * taps + scans),
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        inner = self.inner(width)
        if self.gate == "glu":
            return Part(StateSpaceUnit, width=width, scan=self._scan(width, backend))
        conv = None
        if isinstance(self.conv, int):
            conv = Part(
                ShortConvolution,
                channels=inner,
                size=self.conv,
                activation="silu",
                operation=short_conv.form(backend),
                one_step=short_conv.step_form(backend),
                bias=True,
            )
        return Part(
            StateSpaceBlock,
            width=width,
            inner=inner,
            has_gate=self.gate == "silu",
            conv=conv,
            scan=self._scan(width, backend),
        )

    def _scan(self, width: int, backend: Backend) -> Part:
        inner, rank = self.inner(width), step_rank(width)
        if self.rule == "s4d":
            return Part(
                DiagonalScan,
                channels=inner,
                states=self.state,
                is_complex=self.poles == "complex",
                operation=diagonal_ssm.form(backend),
                one_step=diagonal_ssm.step_form(backend),
            )
        sizes = [rank, self.state, self.state] if self.norm == "dt_b_c" else []
        norms = [norm_part(size, backend) for size in sizes]
        selection = Part(Selection, channels=inner, states=self.state, rank=rank, norms=norms)
        forms = {"operation": selective_scan.form(backend), "one_step": selective_scan.step_form(backend)}
        if self.iterations() == 0:
            return Part(SelectiveScan, selection=selection, **forms)
        return Part(
            FixedPointScan,
            channels=inner,
            states=self.state,
            iterations=self.iterations(),
            selection=selection,
            mixer=Part(HouseholderMixer, channels=inner),
            has_gate=self.gate == "silu",
            **forms,
        )


def step_rank(width: int) -> int:
    """Rank of the projection that makes dt."""
    return math.ceil(width / 16)


class StateSpaceBlock(TokenMixer):
    """Mamba's block [B, T, D] -> [B, T, D]."""

    def __init__(
        self, width: int, inner: int, has_gate: bool, conv: ShortConvolution | None, scan: StateSpace
    ) -> None:
        super().__init__()
        # u first, then z.
        self.into = Dense(width, inner * (2 if has_gate else 1), bias=False)
        self.inner = inner
        self.conv = conv
        self.scan = scan
        self.out = Dense(inner, width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state = self.scan.initial_state(batch, device, dtype)
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        after: dict[str, Tensor] = {}
        u_BTF, z_BTF = self.split(self.into(x_BTD))
        if self.conv is not None:
            u_BTF, after["conv"] = self.conv(u_BTF, None if state is None else state["conv"])
        y_BTF, feed_BTF, scanned = self.scan(u_BTF, state)
        return self.finish(y_BTF, z_BTF, feed_BTF), None if state is None else after | scanned

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        u_BF, z_BF = self.split(self.into(x_BD))
        if self.conv is not None:
            u_BF = self.conv.step(u_BF, state["conv"])
        y_BF, feed_BF = self.scan.step(u_BF, state)
        return self.finish(y_BF, z_BF, feed_BF), state

    def split(self, into: Tensor) -> tuple[Tensor, Tensor | None]:
        """u and, where there is a gate, z."""
        if into.shape[-1] == self.inner:
            return into, None
        u, z = into.chunk(2, -1)
        return u, z

    def finish(self, y: Tensor, z: Tensor | None, feed: Tensor | None) -> Tensor:
        """Gate and output projection."""
        if z is not None:
            y = y * F.silu(z if feed is None else z + feed)
        out: Tensor = self.out(y)
        return out


class StateSpaceUnit(TokenMixer):
    """S4D's block [B, T, D] -> [B, T, D]: a scan of the input itself, then a gated linear unit."""

    def __init__(self, width: int, scan: StateSpace) -> None:
        super().__init__()
        self.scan = scan
        self.out = Dense(width, 2 * width, bias=False)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        return self.scan.initial_state(batch, device, dtype)

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        y_BTD, _, after = self.scan(x_BTD, state)
        return F.glu(self.out(F.gelu(y_BTD)), -1), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        y_BD, _ = self.scan.step(x_BD, state)
        return F.glu(self.out(F.gelu(y_BD)), -1), state
