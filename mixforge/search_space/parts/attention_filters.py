"""Keys and values that each head makes of what a state space of its own makes of the input.

    y_h = SSM_h(x),   k_h = W_k^h y_h,   v_h = W_v^h y_h

SSM_h is diagonal and does not depend on the input (`state_space`), with numbers of its own for each head and channel.

Source: Pilault et al. 2023 (Block-State Transformers, arXiv 2306.09539), the context states of several heads, in the form
of the listing in its appendix, whose filters have no activation behind them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.attention_heads import normalised
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.stacked import Stacked
from mixforge.search_space.parts.state_space import StateSpace


class OwnLinear(Stacked):
    """A linear map for each head: [B, T, H, D] -> [B, T, H, K]."""

    def __init__(self, heads: int, into: int, out_of: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(into)
        self.weight = nn.Parameter(torch.empty(heads, out_of, into).uniform_(-bound, bound))

    def forward(self, x_BTHD: Tensor) -> Tensor:
        return torch.einsum("bthd,hkd->bthk", x_BTHD, self.weight)


class FilteredKeysValues(Memory):
    """Keys and values of `heads` heads, of a scan over the channels of the input once for each head."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        width: int,
        scan: StateSpace,
        key_norm: nn.Module | None,
        whole: bool,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.whole = whole
        self.scan = scan
        self.key = OwnLinear(heads, width, head_dim)
        self.value = OwnLinear(heads, width, head_dim)
        self.key_norm = key_norm

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (self.heads, self.head_dim), "value": (self.heads, self.head_dim)}

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.scan.initial_state(batch, device, dtype)

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        u_BTF = x_BTD.repeat(1, 1, self.heads)
        if state is not None and u_BTF.shape[1] == 1:
            y_BTF = self.scan.step(u_BTF[:, 0], state)[0][:, None]
        else:
            y_BTF, _, after = self.scan(u_BTF, state)
            if state is not None:
                state["hidden"].copy_(after["hidden"])
        y_BTHD = torch.unflatten(y_BTF, 2, (self.heads, -1))
        k_BTHK = normalised(self.key(y_BTHD).flatten(2), self.heads, self.key_norm, self.whole)
        return {"key": turned(k_BTHK, angle).transpose(1, 2), "value": self.value(y_BTHD).transpose(1, 2)}

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        return entries["key"], entries["value"]
