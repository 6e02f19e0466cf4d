"""Which experts a token goes to and with what weight, and what keeps their load even.

    s = softmax(W x) or sigmoid(W x)              scores of all experts, in float32 or better
    chosen = the k largest of s + b               b: the balancing bias, which selects and never weighs
    g_i = s_i / sum of the chosen s               with renorm; s_i without

Experts in groups: only those of the best groups can be chosen. A group's score is its largest s (DeepSeek-AI
2024, arXiv 2405.04434, section 2.2.2), or the sum of its two largest s + b where scores are sigmoids (DeepSeek-AI
2024, arXiv 2412.19437, section 2.1.2, and its public code).

Balance, in training only:
    bias    after each pass b_i += rate sign(mean load - load_i) (Wang et al. 2024, arXiv 2408.15664, algorithm 1)
    loss    rate E/(A M) sum_i load_i P_i, with load_i the tokens of M that chose i, A the experts that each chose and
            P_i the mean over tokens of s_i / sum s (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6; for A > 1
            as in Dai et al. 2024, arXiv 2401.06066, equation 12)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.tracing import unaliased
from mixforge.search_space.parts.dense import Dense


class Router(nn.Module):
    """[M, D] -> (weights [M, A] in float32 or better, experts [M, A], the balancing loss or None).

    The bias of `balance=bias` is a buffer, not a weight: nothing descends on it. A pass that is computed twice, as
    activation checkpointing does, moves it twice.
    """

    bias: Tensor | None

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        score: Literal["softmax", "sigmoid"],
        renorm: bool,
        scale: float,
        groups: tuple[int, int] | None,
        balance: Literal["none", "bias", "loss"],
        rate: float,
        logit_bias: bool,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.score = score
        self.renorm = renorm
        self.scale = scale
        self.groups = groups
        self.balance = balance
        self.rate = rate
        self.logits = Dense(width, experts, bias=logit_bias)
        self.register_buffer("bias", torch.zeros(experts) if balance == "bias" else None)

    def forward(self, x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        exact = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        logit_bias = None if self.logits.bias is None else self.logits.bias.to(exact)
        logits_ME = F.linear(x_MD.to(exact), self.logits.weight.to(exact), logit_bias)
        score_ME = logits_ME.softmax(-1) if self.score == "softmax" else logits_ME.sigmoid()
        index_MA = self._chosen(score_ME.detach())
        weight_MA = score_ME.gather(1, index_MA)
        if self.renorm:
            weight_MA = weight_MA / (weight_MA.sum(-1, keepdim=True) + 1e-20)
        loss = None
        if self.balance != "none" and self.training and torch.is_grad_enabled():
            load_E = F.one_hot(index_MA, score_ME.shape[1]).sum((0, 1)).to(exact)
            if self.bias is not None:
                with torch.no_grad():
                    self.bias += self.rate * torch.sign(load_E.mean() - load_E).to(self.bias.dtype)
            if self.balance == "loss":
                share_E = (score_ME / score_ME.sum(-1, keepdim=True)).mean(0)
                loss = self.rate * len(load_E) / index_MA.numel() * (load_E * share_E).sum()
        return self.scale * weight_MA, index_MA, loss

    def _chosen(self, score_ME: Tensor) -> Tensor:
        if self.bias is not None:
            score_ME = score_ME + self.bias
        if self.groups is not None:
            groups, kept = self.groups
            score_MGE = score_ME.view(len(score_ME), groups, -1)
            best = min(2, score_MGE.shape[2]) if self.score == "sigmoid" else 1
            group_MG = score_MGE.topk(best, -1).values.sum(-1)
            open_MG = torch.zeros_like(group_MG, dtype=torch.bool)
            open_MG.scatter_(1, group_MG.topk(kept, -1).indices, True)
            score_ME = score_MGE.masked_fill(~open_MG[..., None], -torch.inf).flatten(1)
        return score_ME.topk(self.top_k, -1).indices


class AttachLoss(torch.autograd.Function):
    """y, unchanged; backward also descends on `loss`, as if it had been added to the loss of the model.

    So a layer's own loss reaches training without a place in what layers return. It is added once for each backward
    pass and knows nothing of a factor on the model's loss, such as a scaler's for float16.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.shape, loss.dtype, loss.device)
        return unaliased(y.view_as(y))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return gradients[0], torch.ones(shape, dtype=dtype, device=device)
