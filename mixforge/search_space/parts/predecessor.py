"""The tokens before each token, as mixers see them that look back by one or a few."""

from __future__ import annotations

import torch
from torch import Tensor


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
