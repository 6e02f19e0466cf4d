"""Attention of a gated attention unit by the codes of its keys, with biases of the distance of near tokens.

Sources and equations: see `mixers.gau` and `attention_codes`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_codes import (
    apart,
    by_blocks_with_bias,
    mean_value,
    nearest,
    no_codes,
    over_codes,
    over_codes_step,
)
from mixforge.search_space.parts.gated_attention import DistanceBias, ScaleOffset, SharedAttention
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.routing import AttachLoss


class CodedAttention(SharedAttention):
    """Over all tokens, by the codes of their keys; those that a bias reaches one by one.

    The state has a count and a sum of values for each code, and the tokens that the bias reaches in a ring.
    """

    def __init__(self, key_dim: int, channels: int, codes: int, bias: DistanceBias | None) -> None:
        super().__init__()
        self.channels = channels
        self.bias = bias
        self.query = ScaleOffset(key_dim, False)
        self.key = ScaleOffset(key_dim, False)
        # As far from zero as the shared vector starts.
        self.codebook = nn.Parameter(0.3 * torch.randn(1, codes, key_dim))

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state = no_codes(self.codebook, self.channels, batch, device, dtype)
        if self.bias is None:
            return state
        slots = min(self.bias.reach, capacity)
        ring = {"near_key": self.codebook.shape[2], "near_value": self.channels}
        return state | {
            name: torch.zeros(batch, 1, slots, size, device=device, dtype=dtype)
            for name, size in ring.items()
        }

    def forward(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor] | None, at: Pass) -> Tensor:
        q, k, v = self.read(z_BTK, v_BTF, at)
        if self.bias is None:
            o_BHTV, code_BHTK = over_codes(q, k, v, self.codebook, state)
        else:
            o_BHTV, code_BHTK = self.with_bias(self.bias, q, k, v, state, at)
        o_BTF = o_BHTV[:, 0].to(v_BTF.dtype)
        if state is None and self.training and torch.is_grad_enabled():
            o_BTF = AttachLoss.apply(o_BTF, apart(k, code_BHTK))  # type: ignore[no-untyped-call]
        return o_BTF

    def with_bias(
        self,
        bias: DistanceBias,
        q_BHTK: Tensor,
        k_BHTK: Tensor,
        v_BHTV: Tensor,
        state: dict[str, Tensor] | None,
        at: Pass,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and the keys' codes. Tokens of the ring stand before those of the pass."""
        codes_HCK = self.codebook.to(q_BHTK.dtype)
        is_of_BHTC = nearest(k_BHTK, codes_HCK)
        code_BHTK = is_of_BHTC @ codes_HCK
        near_BHTK = code_BHTK + (k_BHTK - k_BHTK.detach())
        given = (codes_HCK, None, bias.reach, bias)
        if state is None:
            return by_blocks_with_bias(q_BHTK, near_BHTK, v_BHTV, is_of_BHTC, *given), code_BHTK
        slots, end = state["near_key"].shape[2], at.start + q_BHTK.shape[2]
        lead = min(at.start, slots)
        place_T = torch.arange(at.start - lead, at.start, device=q_BHTK.device) % slots
        ring = (state[name][:, :, place_T].to(q_BHTK.dtype) for name in ("near_key", "near_value"))
        k, v = (torch.cat([old, new], 2) for old, new in zip(ring, (near_BHTK, v_BHTV), strict=True))
        is_of = nearest(k, codes_HCK)
        past = (state["count"], state["sum"])
        q = F.pad(q_BHTK, (0, 0, lead, 0))
        o = by_blocks_with_bias(q, k, v, is_of, codes_HCK, past, bias.reach, bias)
        left = max(0, k.shape[2] - slots)
        state["count"].add_(is_of[:, :, :left].sum(2))
        state["sum"].add_(is_of[:, :, :left].transpose(2, 3) @ v[:, :, :left])
        place_T = torch.arange(end - (k.shape[2] - left), end, device=q.device) % slots
        state["near_key"].index_copy_(2, place_T, k[:, :, left:].to(state["near_key"].dtype))
        state["near_value"].index_copy_(2, place_T, v[:, :, left:].to(state["near_value"].dtype))
        return o[:, :, lead:], code_BHTK

    def step(self, z_BTK: Tensor, v_BTF: Tensor, state: dict[str, Tensor], at: Pass) -> Tensor:
        q, k, v = self.read(z_BTK, v_BTF, at)
        if self.bias is None:
            return over_codes_step(q, k, v, self.codebook, state)[:, 0].to(v_BTF.dtype)
        codes_HCK = self.codebook.to(q.dtype)
        key, value = state["near_key"], state["near_value"]
        slots, place_T = key.shape[2], at.positions_T % key.shape[2]
        # The token whose slot is taken is one of those that are counted.
        leaves = at.positions_T >= slots
        gone_BHC1 = nearest(key[:, :, place_T].to(q.dtype), codes_HCK).transpose(2, 3) * leaves
        state["count"].add_(gone_BHC1[..., 0])
        state["sum"].add_(gone_BHC1 * value[:, :, place_T].to(q.dtype))
        key.index_copy_(2, place_T, (nearest(k, codes_HCK) @ codes_HCK).to(key.dtype))
        value.index_copy_(2, place_T, v.to(value.dtype))
        distance_TS = (at.positions_T[:, None] - torch.arange(slots, device=q.device)) % slots
        near = q @ key.to(q.dtype).transpose(2, 3) + self.bias(distance_TS).to(q.dtype)
        near = near.masked_fill(distance_TS > at.positions_T[:, None], -torch.inf)
        far = q @ codes_HCK.transpose(1, 2) + state["count"].log()[:, :, None]
        weights = torch.cat([far, near], 3).softmax(3)
        codes = codes_HCK.shape[1]
        o = weights[..., :codes] @ mean_value(state["count"], state["sum"])
        o_BHTV = o + weights[..., codes:] @ value.to(q.dtype)
        return o_BHTV[:, 0].to(v_BTF.dtype)

    def read(self, z_BTK: Tensor, v_BTF: Tensor, at: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, divided by sqrt(K), keys and values [B, 1, T, ...], in float32 or better."""
        exact = torch.float64 if v_BTF.dtype == torch.float64 else torch.float32
        q_BTK = self.query(z_BTK, at.positions_T).to(exact) * z_BTK.shape[2] ** -0.5
        k_BTK = self.key(z_BTK, at.positions_T).to(exact)
        return q_BTK[:, None], k_BTK[:, None], v_BTF.to(exact)[:, None]
