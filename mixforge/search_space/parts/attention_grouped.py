"""Attention in two levels: first among blocks, then inside each block.

    G_t = softmax over the own block's tokens s <= t with q_t . k_s, and over earlier blocks j with q_t . m_j
    w_ts = G_ts in the own block;   G_tj softmax_{s in j}(q_t . k_s) in an earlier one
    o_t = sum_s w_ts v_s

with scores divided by sqrt(K), and of the earlier blocks only the `count` with the highest q_t . m_j. m_j is the
key of the block's last token (`landmark`) or the mean of the block's keys (`hsa`). With hsa the own block stands
outside of G and is not seen: a recurrent layer below knows the tokens near by.

Sources: Mohtashami and Jaggi 2023 (arXiv 2305.16300), equations 2 to 4. Their landmarks are tokens put into the
text behind each block, which a mixer cannot do; here the block's own last token is the landmark, and it is seen as
well. Hu et al. 2025 (HSA, arXiv 2504.16795), section 3.2, whose landmarks come out of an encoder over the chunk and
whose keys come from a layer in the middle of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_blocks import Sight
from mixforge.search_space.parts.attention_choice import among_best, block_scores


class Grouped(nn.Module):
    """Scores in two levels over all tokens kept in order (see `EveryTokenKept`)."""

    def __init__(self, block: int, count: int, own: bool, scale: float) -> None:
        super().__init__()
        self.block = block
        self.count = count
        self.own = own
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """[B, H, T, V]."""
        group = q_BHTK.shape[1] // k_BHSK.shape[1]
        # Whole blocks, so that block and place in it are two axes; nobody sees what pads the last one.
        missing = -k_BHSK.shape[2] % self.block
        k, v = (F.pad(x, (0, 0, 0, missing)).repeat_interleave(group, 1) for x in (k_BHSK, v_BHSV))
        scores = torch.unflatten((q_BHTK * self.scale) @ k.transpose(2, 3), 3, (-1, self.block))
        landmark_BHTC = scores[..., -1] if self.own else block_scores(q_BHTK, k, self.block) * self.scale
        weights = self.weigh(scores, landmark_BHTC, sight.query_T).flatten(3)
        return weights.to(v.dtype) @ v

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        return self.forward(q_BHTK, k_BHSK, v_BHSV, sight)

    def weigh(self, scores_BHTCL: Tensor, landmark_BHTC: Tensor, query_T: Tensor) -> Tensor:
        """The weights of all pairs [B, H, T, C, L]."""
        count, block = scores_BHTCL.shape[3:]
        block_C = torch.arange(count, device=query_T.device)
        here_TC = block_C == (query_T // self.block)[:, None]
        earlier_TC = block_C < (query_T // self.block)[:, None]
        landmark_BHTC = landmark_BHTC.masked_fill(~earlier_TC, -torch.inf)
        chosen = among_best(landmark_BHTC, self.count) & earlier_TC
        landmark_BHTC = landmark_BHTC.masked_fill(~chosen, -torch.inf)
        inside = scores_BHTCL.softmax(4) * chosen[..., None]
        if not self.own:
            # A query of the first block sees no block: its weights are 0, not 0 / 0.
            top = landmark_BHTC.amax(3, keepdim=True).clamp(min=torch.finfo(landmark_BHTC.dtype).min)
            raised = (landmark_BHTC - top).exp()
            gate = raised / raised.sum(3, keepdim=True).clamp(min=torch.finfo(raised.dtype).tiny)
            return gate[..., None] * inside
        offset = torch.arange(block, device=query_T.device)
        near_TCL = here_TC[..., None] & (offset <= (query_T % self.block)[:, None, None])
        near = scores_BHTCL.masked_fill(~near_TCL, -torch.inf).flatten(3)
        both = torch.cat([near, landmark_BHTC], 3).softmax(3)
        own, gate = both[..., :-count], both[..., -count:]
        weights: Tensor = torch.unflatten(own, 3, (count, block)) + gate[..., None] * inside
        return weights
