"""2-simplicial attention: a query weighs pairs of tokens.

    a_tij = softmax_{i, j}(sum_c q_tc k_ic k'_jc / sqrt(K)),   0 <= t - i < W1,  0 <= t - j < W2
    o_t   = sum_ij a_tij (v_i * v'_j)

Source: Roy et al. 2025 (arXiv 2507.02754), equations 4 to 7 and section 5 for the two windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_memory import Memory
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, split_heads


class TwoKeysValues(Memory):
    """Two keys and two values of each token, each pair stacked along the channels."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.key = Dense(width, 2 * heads * head_dim, bias=False)
        self.value = Dense(width, 2 * heads * head_dim, bias=False)

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (self.heads, 2 * self.head_dim), "value": (self.heads, 2 * self.head_dim)}

    def entries(
        self, x_BTD: Tensor, angle: Tensor | None, state: dict[str, Tensor] | None, at: Pass
    ) -> dict[str, Tensor]:
        k_BTHK = split_heads(self.key(x_BTD), self.heads)
        v_BTHV = split_heads(self.value(x_BTD), self.heads)
        return {"key": k_BTHK.transpose(1, 2), "value": v_BTHV.transpose(1, 2)}

    def read(self, entries: dict[str, Tensor], angle: Tensor | None, at: Pass) -> tuple[Tensor, Tensor]:
        return entries["key"], entries["value"]


class Simplicial(nn.Module):
    """Scores over pairs of the last `first` and the last `second` tokens."""

    def __init__(self, first: int, second: int, scale: float) -> None:
        super().__init__()
        self.windows = (first, second)
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """A sequence, whose keys follow one another up to the last query's: [B, H, T, V]."""
        length = q_BHTK.shape[2]
        tokens = []
        for window, k, v in zip(self.windows, k_BHSK.chunk(2, 3), v_BHSV.chunk(2, 3), strict=True):
            # The last `window` tokens of each query as an axis of their own, [B, H, T, W, K].
            held = [F.pad(x, (0, 0, max(0, length + window - 1 - x.shape[2]), 0)) for x in (k, v)]
            k, v = (x[:, :, -(length + window - 1) :].unfold(2, window, 1).transpose(3, 4) for x in held)
            before_W = torch.arange(window - 1, -1, -1, device=k.device)
            tokens.append((k, v, sight.query_T[:, None] - before_W >= 0))
        return self.weigh(q_BHTK, tokens)

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        age_TS = sight.query_T[:, None] - sight.key_S
        is_there = (age_TS >= 0) & (sight.key_S >= 0)
        parts = zip(self.windows, k_BHSK.chunk(2, 3), v_BHSV.chunk(2, 3), strict=True)
        return self.weigh(
            q_BHTK, [(k[:, :, None], v[:, :, None], is_there & (age_TS < w)) for w, k, v in parts]
        )

    def weigh(self, q_BHTK: Tensor, tokens: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Over all pairs of one token of each list: keys [B, H', T, W, K], values, and which of them are seen [T, W]."""
        group = q_BHTK.shape[1] // tokens[0][0].shape[1]
        k1, k2 = (k.repeat_interleave(group, 1) for k, _, _ in tokens)
        v1, v2 = (v.repeat_interleave(group, 1) for _, v, _ in tokens)
        seen = tokens[0][2][:, :, None] & tokens[1][2][:, None]
        scores = ((q_BHTK * self.scale)[:, :, :, None] * k1) @ k2.transpose(3, 4)
        weights = scores.masked_fill(~seen, -torch.inf).flatten(3).softmax(3).view_as(scores)
        o_BHTV: Tensor = ((weights @ v2) * v1).sum(3)
        return o_BHTV
