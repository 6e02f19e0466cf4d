"""Attention to summaries of earlier blocks: in the place of their tokens, or to choose which of them are read.

A block's summary is the mean of its keys and the mean of its values. With a_t(S) the softmax attention of query t
over a set S of keys and values:

    summary    o_t = a_t(own block up to t, and the summaries of earlier blocks)
    nsa        o_t = g1 a_t(summaries) + g2 a_t(chosen blocks) + g3 a_t(the last W tokens),  g = sigmoid(W_g x_t) a head

For nsa the chosen blocks are the own one and, of the earlier ones, those to which a_t gives the most weight, summed
over the query heads that share a key head. A token of the first block sees no summary, and that term is 0.

Sources: Ren et al. 2021 (Combiner, arXiv 2107.05768), section 4.1, with a summary in the softmax where the paper
factors it into two; Yuan et al. 2025 (NSA, arXiv 2502.11089), equations 5 to 12, with means in the place of a
learned map of a block, blocks of compression that are the blocks of selection and do not overlap, and one set of
keys and values for all three.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_choice import among_best
from mixforge.search_space.parts.dense import Dense


class Summarised(nn.Module):
    """The own block's tokens and the summaries of earlier blocks in one softmax."""

    def __init__(self, block: int, scale: float) -> None:
        super().__init__()
        self.block = block
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """[B, H, T, V]."""
        group = q_BHTK.shape[1] // k_BHSK.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k_BHSK, v_BHSV))
        keys = torch.cat([k, block_means(k, self.block)], 2)
        values = torch.cat([v, block_means(v, self.block)], 2)
        query_T1 = sight.query_T[:, None]
        own = (sight.key_S // self.block == query_T1 // self.block) & (sight.key_S <= query_T1)
        block_C = torch.arange(keys.shape[2] - k.shape[2], device=k.device)
        seen = torch.cat([own, block_C < query_T1 // self.block], 1)
        return masked_softmax((q_BHTK * self.scale) @ keys.transpose(2, 3), seen).to(v.dtype) @ values

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        return self.forward(q_BHTK, k_BHSK, v_BHSV, sight)


class NativeSparse(nn.Module):
    """Summaries, chosen blocks and a window, each with a gate."""

    def __init__(self, width: int, heads: int, block: int, count: int, window: int, scale: float) -> None:
        super().__init__()
        self.heads = heads
        self.block = block
        self.count = count
        self.window = window
        self.scale = scale
        self.gate = Dense(width, 3 * heads, bias=False)

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """[B, H, T, V]."""
        kv_heads = k_BHSK.shape[1]
        k, v = (x.repeat_interleave(self.heads // kv_heads, 1) for x in (k_BHSK, v_BHSV))
        q_BHTK = q_BHTK * self.scale
        query_T1 = sight.query_T[:, None]
        block_C = torch.arange(-(-k.shape[2] // self.block), device=k.device)
        earlier_TC = block_C < query_T1 // self.block
        share_BHTC = masked_softmax(q_BHTK @ block_means(k, self.block).transpose(2, 3), earlier_TC)
        summaries = share_BHTC.to(v.dtype) @ block_means(v, self.block)
        by_group = torch.unflatten(share_BHTC, 1, (kv_heads, -1)).sum(2)
        best = among_best(by_group.masked_fill(~earlier_TC, -torch.inf), self.count - 1) & earlier_TC
        chosen_BGTC = best | (block_C == query_T1 // self.block)
        chosen = chosen_BGTC.repeat_interleave(self.heads // kv_heads, 1).repeat_interleave(self.block, 3)
        past_TS = (sight.key_S <= query_T1) & (sight.key_S >= 0)
        scores = q_BHTK @ k.transpose(2, 3)
        near_TS = past_TS & (query_T1 - sight.key_S < self.window)
        gate_BHT3 = torch.unflatten(self.gate(sight.x_BTD).sigmoid(), 2, (self.heads, 3)).transpose(1, 2)
        first, second, third = gate_BHT3.unsqueeze(3).unbind(4)
        weights = second * masked_softmax(scores, chosen[..., : k.shape[2]] & past_TS)
        weights = weights + third * masked_softmax(scores, near_TS)
        o_BHTV: Tensor = first * summaries + weights.to(v.dtype) @ v
        return o_BHTV

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        return self.forward(q_BHTK, k_BHSK, v_BHSV, sight)


def block_means(x_BHSK: Tensor, block: int) -> Tensor:
    """[B, H, C, K], a last block that is not full padded with zeros: nobody reads its mean before it is full."""
    padded = F.pad(x_BHSK, (0, 0, 0, -x_BHSK.shape[2] % block))
    return torch.unflatten(padded, 2, (-1, block)).mean(3)


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; 0 throughout where nothing is."""
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) * seen
