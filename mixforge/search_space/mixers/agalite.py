"""Gated linear attention whose matrix state is a few vectors of keys and of values, told apart by cosines of time.

For each head, with q, k, v, b, g and p, p', p'' affine in x_t:

    psi_k = relu(k) x relu(p),  psi_q = relu(q) x relu(p')      outer products with E numbers, as vectors of E K
    gamma = sigmoid(g) x sigmoid(p''),  beta = sigmoid(b)
    k^i_t = (1 - gamma) k^i_{t-1} + cos(w_i t) gamma psi_k      for each of R cosines, w from -pi to pi
    v^i_t = (1 - beta) v^i_{t-1} + cos(w_i t) beta v,  s_t = (1 - gamma) s_{t-1} + gamma psi_k
    o_t = sum_i v^i_t (k^i_t . psi_q) / (2 R s_t . psi_q + 1e-5),  y = W_o o + b_o

The sum over i is near the matrix sum_s (beta v)_s (gamma psi_k)_s^T under its gates, with R (E + 1) K numbers in the
place of E K^2, as far as products of the cosines of two times sum up to little: averaged over t, to 1/R of what they
sum up to at equal times, with either sign, but to all of it where the times differ by a multiple of R - 1, which the
gates have to end. As w runs from -pi to pi and a cosine is even, half of the vectors are copies of the others, here
as there.

Source: Pramanik et al. 2023 (arXiv 2310.15719), AGaLiTe, in the form of its public code, which counts t from 2. The exact
matrix, GaLiTe, is nearly a point of `linear`: decay=both, in_gate=tied, phi=outer(E), whose features are multiplied by
features of themselves, not of the input.

Departures: gamma is at most 1 - 2^-20, so that its gate has a logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.kernels import gated_scan
from mixforge.search_space.genes import Whole
from mixforge.search_space.headed import HeadedMixer
from mixforge.search_space.mixer import Backend, Cost
from mixforge.search_space.part import Part
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads

# Of what a gate writes.
MOST_WRITTEN = 1 - 2.0**-20


@dataclass(frozen=True, slots=True)
class Agalite(HeadedMixer):
    """Approximate gated linear attention. Genes: heads and their channels, numbers of the outer products, cosines."""

    kind: ClassVar[Literal["token", "channel"]] = "token"

    heads: Annotated[int | None, Whole(1, 256)] = None
    head_dim: Annotated[int | None, Whole(1, 1024)] = None
    features: Annotated[int, Whole(1, 16)] = 4
    cosines: Annotated[int, Whole(1, 64)] = 4

    def cost(self, width: int, length: int, itemsize: int = 4) -> Cost:
        heads, head_dim = self.sizes(width)
        made = heads * (5 * head_dim + 3 * self.features)
        matrices = width * (made + heads * head_dim)
        params = matrices + made + width
        read = self.cosines * heads * (self.features + 1) * head_dim
        state = 4 * (read + heads * self.features * head_dim)
        return Cost(
            params=params,
            flops=2 * length * (matrices + read),
            state_bytes=state,
            decode_bytes=params * itemsize + 2 * state,
        )

    def build(self, width: int, backend: Backend) -> Part:
        heads, head_dim = self.sizes(width)
        return Part(
            CosineBank,
            width=width,
            heads=heads,
            head_dim=head_dim,
            features=self.features,
            cosines=self.cosines,
            operation=gated_scan.form(backend),
            one_step=gated_scan.step_form(backend),
        )


class CosineBank(TokenMixer):
    """[B, T, D] -> [B, T, D]. The state has the vectors of all cosines, and the sum of keys behind those of keys."""

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        features: int,
        cosines: int,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__()
        self.heads = heads
        self.features = features
        self.cosines = cosines
        self.sizes = [5 * heads * head_dim, 3 * heads * features]
        # Of the scan: keys of each cosine and their sum, then values of each cosine.
        self.banks = [(cosines + 1) * heads * features * head_dim, cosines * heads * head_dim]
        self.operation = operation
        self.one_step = one_step
        self.made = Dense(width, sum(self.sizes))
        self.out = Dense(heads * head_dim, width)

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        return {"banks": torch.zeros(batch, sum(self.banks), device=device, dtype=held)}

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        log_BTC, written_BTC, q_BTHF = self.gates(x_BTD, at.positions_T)
        h_BTC, after = self.operation(log_BTC, written_BTC, None if state is None else state["banks"])
        return self.read(h_BTC, q_BTHF, x_BTD.dtype), None if state is None else {"banks": after}

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        log_BTC, written_BTC, q_BTHF = self.gates(x_BD[:, None], at.positions_T)
        h_BC, after = self.one_step(log_BTC[:, 0], written_BTC[:, 0], state["banks"])
        if after is not state["banks"]:
            state["banks"].copy_(after)
        return self.read(h_BC[:, None], q_BTHF, x_BD.dtype)[:, 0], state

    def gates(self, x_BTD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log gates and what is written [B, T, C], and the queries' features [B, T, H, F]."""
        wide, narrow = torch.split(exact(self.made(x_BTD)), self.sizes, -1)
        q, k, v, b, g = split_heads(wide, self.heads).chunk(5, -1)
        p_k, p_q, p_g = split_heads(narrow, self.heads).chunk(3, -1)
        q_BTHF, k_BTHF = outer(F.relu(q), F.relu(p_q)), outer(F.relu(k), F.relu(p_k))
        gamma_BTHF = outer(torch.sigmoid(g), torch.sigmoid(p_g)).clamp(max=MOST_WRITTEN)
        cosine_TR = self.turns(positions_T).to(q.dtype)
        once_TR = F.pad(cosine_TR, (0, 1), value=1.0)
        logs = [self.for_each(torch.log1p(-gamma_BTHF), torch.ones_like(once_TR))]
        logs.append(self.for_each(F.logsigmoid(-b), torch.ones_like(cosine_TR)))
        written = [self.for_each(gamma_BTHF * k_BTHF, once_TR)]
        written.append(self.for_each(torch.sigmoid(b) * v, cosine_TR))
        return torch.cat(logs, -1), torch.cat(written, -1), q_BTHF

    def turns(self, positions_T: Tensor) -> Tensor:
        """cos(w_i t) [T, R], in float64, as an angle grows with the time."""
        place = torch.arange(self.cosines, device=positions_T.device, dtype=torch.float64)
        w_R = math.pi * (2 * place / max(1, self.cosines - 1) - 1)
        return torch.cos((positions_T + 2)[:, None] * w_R)

    def for_each(self, x_BTHF: Tensor, factor_TR: Tensor) -> Tensor:
        """[B, T, R H F]: x times each factor."""
        return (x_BTHF[:, :, None] * factor_TR[:, :, None, None]).flatten(2)

    def read(self, h_BTC: Tensor, q_BTHF: Tensor, dtype: torch.dtype) -> Tensor:
        """What the banks say, divided by what the sum of keys says."""
        keys, values = torch.split(h_BTC, self.banks, -1)
        k_BTHRF = torch.unflatten(keys, -1, (self.cosines + 1, *q_BTHF.shape[2:])).transpose(2, 3)
        v_BTHRV = torch.unflatten(values, -1, (self.cosines, self.heads, -1)).transpose(2, 3)
        share_BTHR = (k_BTHRF[..., :-1, :] @ q_BTHF[..., None])[..., 0]
        total_BTH = (k_BTHRF[..., -1, :] * q_BTHF).sum(-1)
        said_BTHV = (share_BTHR[..., None, :] @ v_BTHRV)[..., 0, :]
        o_BTHV = said_BTHV / (2 * self.cosines * total_BTH + 1e-5)[..., None]
        y_BTD: Tensor = self.out(o_BTHV.flatten(2).to(dtype))
        return y_BTD


def outer(x_BTHK: Tensor, p_BTHE: Tensor) -> Tensor:
    """[B, T, H, E K]: each of E numbers times x."""
    return (p_BTHE[..., :, None] * x_BTHK[..., None, :]).flatten(-2)
