"""A model under training for one task: the language model and what the task puts in front of its stack."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.model import LanguageModel


class Candidate(nn.Module):
    """logits = head(body(front(embed(tokens)))), computed at the positions that are asked for."""

    def __init__(self, model: LanguageModel, front: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.front = front

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, X] and targets [N] of the N positions whose target is not negative."""
        x_BTD = self.model.embed(inputs_BT)
        if self.front is not None:
            x_BTD = self.front(x_BTD)
        x_BTD = self.model.body(x_BTD)
        asked_BT = targets_BT >= 0
        return self.model.head(x_BTD[asked_BT]), targets_BT[asked_BT]

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the positions that are asked for."""
        logits_NX, targets_N = self.answer(inputs_BT, targets_BT)
        return F.cross_entropy(logits_NX.float(), targets_N)
