"""The module of the linear family, whose equations `mixers/linear.py` has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.layer import Pass, TokenMixer, split_heads
from mixforge.search_space.parts.rotary import rotate
from mixforge.search_space.parts.short_convolution import ShortConvolution


class LinearAttention(TokenMixer):
    """One point of the family: what its genes leave out is None."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_heads: int,
        key_dim: int,
        value_dim: int,
        features: int,
        scale: float,
        operation: Callable[..., tuple[Tensor, Tensor]],
        one_step: Callable[..., tuple[Tensor, Tensor]],
        conv: ShortConvolution | None,
        theta: float | None,
        feature: Callable[[Tensor], Tensor] | None,
        unit_keys: bool,
        decay: nn.Module | None,
        beta: nn.Module | None,
        dt_values: bool,
        normalised: bool,
        skip: nn.Module | None,
        output: nn.Module,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads = heads, key_heads
        self.key_dim, self.value_dim, self.features = key_dim, value_dim, features
        self.scale = scale
        self.operation = operation
        self.one_step = one_step
        self.theta = theta
        self.feature = feature
        self.unit_keys = unit_keys
        self.dt_values = dt_values
        self.normalised = normalised
        self.mixed = nn.Linear(width, 2 * key_heads * key_dim + heads * value_dim, bias=False)
        self.conv = conv
        self.decay = decay
        self.beta = beta
        self.skip = skip
        self.output = output

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        columns = self.value_dim + int(self.normalised)
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shape = (batch, self.heads, self.features, columns)
        state = {"matrix": torch.zeros(shape, device=device, dtype=state_dtype)}
        if self.conv is not None:
            state["conv"] = self.conv.initial_state(batch, device, dtype)
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        after: dict[str, Tensor] = {}
        mixed_BTF = self.mixed(x_BTD)
        if self.conv is not None:
            mixed_BTF, after["conv"] = self.conv(mixed_BTF, None if state is None else state["conv"])
        q_BTHK, k_BTHK, v_BTHV = self.heads_of(mixed_BTF, at.positions_T)
        decay, write_BTHV, beta_BTH = self.gates_of(x_BTD, v_BTHV)
        matrix = None if state is None else state["matrix"]
        o_BTHV, after["matrix"] = self.operation(q_BTHK, k_BTHK, write_BTHV, decay, beta_BTH, matrix)
        return self.finish(o_BTHV, v_BTHV, x_BTD), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        x_BTD = x_BD[:, None]
        mixed_BF = self.mixed(x_BD)
        if self.conv is not None:
            mixed_BF = self.conv.step(mixed_BF, state["conv"])
        q_BTHK, k_BTHK, v_BTHV = self.heads_of(mixed_BF[:, None], at.positions_T)
        decay, write_BTHV, beta_BTH = self.gates_of(x_BTD, v_BTHV)
        now = decay if decay is None or decay.dim() == 1 else decay[:, 0]
        beta_BH = None if beta_BTH is None else beta_BTH[:, 0]
        o_BHV, matrix = self.one_step(
            q_BTHK[:, 0], k_BTHK[:, 0], write_BTHV[:, 0], now, beta_BH, state["matrix"]
        )
        if matrix is not state["matrix"]:
            state["matrix"].copy_(matrix)
        return self.finish(o_BHV[:, None], v_BTHV, x_BTD)[:, 0], state

    def heads_of(self, mixed_BTF: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys [B, T, key heads, features] and values [B, T, H, V]."""
        keys = self.key_heads * self.key_dim
        q, k, v = torch.split(mixed_BTF, [keys, keys, self.heads * self.value_dim], -1)
        q_BTHK = self.map_key(split_heads(q, self.key_heads), positions_T)
        k_BTHK = self.map_key(split_heads(k, self.key_heads), positions_T)
        return q_BTHK * self.scale, k_BTHK, split_heads(v, self.heads)

    def map_key(self, x_BTHK: Tensor, positions_T: Tensor) -> Tensor:
        """Rotation, feature map and norm of queries or keys."""
        if self.theta is not None:
            x_BTHK = rotate(x_BTHK, positions_T, self.theta)
        if self.feature is not None:
            x_BTHK = self.feature(x_BTHK)
        return F.normalize(x_BTHK, dim=-1, eps=1e-6) if self.unit_keys else x_BTHK

    def gates_of(self, x_BTD: Tensor, v_BTHV: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Log decays, the values as they are written, and the write strength."""
        decay, dt_BTH = (None, None) if self.decay is None else self.decay(x_BTD)
        if self.normalised:
            v_BTHV = torch.cat([v_BTHV, torch.ones_like(v_BTHV[..., :1])], -1)
        if self.dt_values:
            assert dt_BTH is not None
            v_BTHV = v_BTHV * dt_BTH[..., None].to(v_BTHV.dtype)
        return decay, v_BTHV, None if self.beta is None else self.beta(x_BTD)

    def finish(self, o_BTHV: Tensor, v_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Normaliser, skip, norm, gate and output projection."""
        if self.normalised:
            o_BTHV = o_BTHV[..., :-1] / (o_BTHV[..., -1:] + 1e-6)
        if self.skip is not None:
            o_BTHV = o_BTHV + self.skip(v_BTHV)
        y: Tensor = self.output(o_BTHV, x_BTD)
        return y
