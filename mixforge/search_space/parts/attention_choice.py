"""Patterns of attention that choose blocks of earlier tokens by their keys.

A token sees its own block up to itself, and of the blocks before it those that it chooses by s_tj = q_t . m_j, with
m_j the mean of the block's keys:

    block_topk(l, k)    the k - 1 blocks of highest score
    block_cdf(l, p)     the fewest blocks that hold a share p of softmax_j(s_tj / sqrt(K))

Sources: Lu et al. 2025 (MoBA, arXiv 2502.13189), equations 3 to 7, whose k counts the own block; Mikhailov et al.
2025 (NABLA, arXiv 2507.13546), section 3, for the share, here chosen by each query and not by a block of queries,
which would let a query see later ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixforge.search_space.parts.attention_strides import Masked, MaskedPairs


class ChosenBlocks(MaskedPairs):
    """Blocks chosen by each query and head. Abstract."""

    def __init__(self, block: int, masked: Masked) -> None:
        super().__init__(masked)
        self.size = block

    def sees(self, query_T: Tensor, key_S: Tensor) -> Tensor:
        """The pairs that may be chosen."""
        return (key_S <= query_T[:, None]) & (key_S >= 0)

    def visible(self, query_T: Tensor) -> Tensor:
        return query_T + 1

    def choose(self, q_BHTK: Tensor, k_BHSK: Tensor, query_T: Tensor, key_S: Tensor) -> Tensor:
        """[B, H, T, S], True where a query sees a key; `key_S` are all positions from 0 on."""
        score_BHTC = block_scores(q_BHTK, k_BHSK, self.size)
        block_C = torch.arange(score_BHTC.shape[3], device=q_BHTK.device)
        earlier_TC = block_C < (query_T // self.size)[:, None]
        chosen_BHTC = self.choose_blocks(score_BHTC, earlier_TC, q_BHTK.shape[3]) & earlier_TC
        chosen_BHTC = chosen_BHTC | (block_C == (query_T // self.size)[:, None])
        chosen_BHTS = chosen_BHTC.repeat_interleave(self.size, 3)[..., : k_BHSK.shape[2]]
        return chosen_BHTS & self.sees(query_T, key_S)

    def choose_blocks(self, score_BHTC: Tensor, earlier_TC: Tensor, dim: int) -> Tensor:
        """[B, H, T, C], True for the chosen blocks; what it says of blocks that are not earlier does not count."""
        raise NotImplementedError


class BestBlocks(ChosenBlocks):
    """The `others` earlier blocks of highest score."""

    def __init__(self, block: int, others: int, masked: Masked) -> None:
        super().__init__(block, masked)
        self.others = others

    def choose_blocks(self, score_BHTC: Tensor, earlier_TC: Tensor, dim: int) -> Tensor:
        return among_best(score_BHTC.masked_fill(~earlier_TC, -torch.inf), self.others)


class LikelyBlocks(ChosenBlocks):
    """The fewest earlier blocks that hold `share` of the weight of all earlier blocks."""

    def __init__(self, block: int, share: float, masked: Masked) -> None:
        super().__init__(block, masked)
        self.share = share

    def choose_blocks(self, score_BHTC: Tensor, earlier_TC: Tensor, dim: int) -> Tensor:
        scores = (score_BHTC * dim**-0.5).masked_fill(~earlier_TC, -torch.inf)
        # A query of the first block has nothing to weigh; softmax over nothing is NaN, and NaN chooses nothing.
        weight, order = scores.softmax(3).sort(dim=3, descending=True, stable=True)
        before = weight.cumsum(3) - weight
        return torch.zeros_like(scores, dtype=torch.bool).scatter(3, order, before < self.share)


def block_scores(q_BHTK: Tensor, k_BHSK: Tensor, block: int) -> Tensor:
    """q . mean of each block's keys: [B, H, T, C]. A last block that is not full is padded with zeros."""
    length = k_BHSK.shape[2]
    padded = F.pad(k_BHSK, (0, 0, 0, -length % block))
    mean_BHCK = torch.unflatten(padded, 2, (-1, block)).mean(3)
    return q_BHTK @ mean_BHCK.repeat_interleave(q_BHTK.shape[1] // k_BHSK.shape[1], 1).transpose(2, 3)


def among_best(score_BHTC: Tensor, count: int) -> Tensor:
    """True for the `count` highest along the last axis, the first of equal ones."""
    order = score_BHTC.sort(dim=3, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(score_BHTC, dtype=torch.bool).scatter(3, order, True)
