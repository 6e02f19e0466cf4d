"""A model under training for one task: the language model and what the task puts in front of its stack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.cross_entropy import linear_cross_entropy
from mixforge.search_space.model import LanguageModel


class Candidate(nn.Module):
    """logits = head(body(front(embed(tokens)))), computed at the positions that are asked for."""

    def __init__(self, model: LanguageModel, front: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.front = front

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, X] and targets [N] of the N positions that are asked for."""
        x_ND, targets_N = self._asked(inputs_BT, targets_BT)
        return self.model.head(x_ND), targets_N

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the positions that are asked for."""
        return token_loss(self.model, *self._asked(inputs_BT, targets_BT))

    def _asked(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The stack's outputs [N, D] at the positions that are asked for, and the targets."""
        x_BTD = self.model.embed(inputs_BT)
        if self.front is not None:
            x_BTD = self.front(x_BTD)
        x_BTD = self.model.body(x_BTD)
        asked_BT = asked(targets_BT, self.model.prefix)
        return x_BTD[asked_BT], targets_BT[asked_BT]


def asked(targets_BT: Tensor, prefix: int) -> Tensor:
    """[B, T], where an answer counts: where there is one, and the next token is not in the prefix that is read together.

    Targets of a prefix would be there to be copied.
    """
    asked_BT = targets_BT >= 0
    asked_BT[:, : max(0, prefix - 1)] = False
    return asked_BT


def token_loss(model: LanguageModel, x_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy in nats of what the model's head makes of the stack's outputs."""
    if model.softcap is None:
        return linear_cross_entropy(model.final(x_ND), model.read_weight(), targets_N)
    logits_NX = model.head(x_ND)
    return F.cross_entropy(logits_NX if logits_NX.dtype.itemsize >= 4 else logits_NX.float(), targets_N)
