"""The tokens before each token, as mixers see them that look back by one or a few."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shifted(x_BTD: Tensor, past_BD: Tensor | None) -> Tensor:
    """Each token's predecessor [B, T, D]; that of the first is `past_BD`, or zeros."""
    first_BD = torch.zeros_like(x_BTD[:, 0]) if past_BD is None else past_BD.to(x_BTD.dtype)
    return torch.cat([first_BD[:, None], x_BTD[:, :-1]], 1)


def last_tokens(x_BTD: Tensor, past_BWD: Tensor) -> tuple[Tensor, Tensor]:
    """Each token behind the W before it, oldest first: ([B, T, (W+1) D], the last W tokens [B, W, D])."""
    length = x_BTD.shape[1]
    window_BTD = torch.cat([past_BWD.to(x_BTD.dtype), x_BTD], 1)
    size = past_BWD.shape[1] + 1
    seen_BTF = torch.cat([window_BTD[:, back : back + length] for back in range(size)], -1)
    return seen_BTF, window_BTD[:, length:].clone()


class TokenShift(nn.Module):
    """mu x_t + (1 - mu) x_{t-1}, one share mu for each channel. Source: Peng et al. 2023 (arXiv 2305.13048)."""

    def __init__(self, share_D: Tensor) -> None:
        super().__init__()
        self.share = nn.Parameter(share_D.clone())

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return torch.lerp(past.to(x.dtype), x, self.share)
