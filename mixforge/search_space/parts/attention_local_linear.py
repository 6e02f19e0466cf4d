"""Local linear attention: a line fitted around the query, in the place of softmax attention's local constant.

    w_s  = softmax_s(q_t . k_s / sqrt(K)),   z_s = k_s - q_t
    b, W = argmin sum_s w_s |v_s - b - W z_s|^2 + lambda |W|^2
    mu   = sum_s w_s z_s,   rho = (sum_s w_s z_s z_s^T + lambda)^-1 mu
    o_t  = b = sum_s w_s (1 - z_s . rho) v_s / (1 - mu . rho)

Softmax attention is W = 0. lambda > 0 is learned, one for each head.

Source: Zuo et al. 2025 (arXiv 2510.01450), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.attention_blocks import Sight


class LocalLinear(nn.Module):
    """Sums and the solution of K x K systems in float32 or better. lambda starts at 1."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # softplus(0.5413) = 1.
        self.ridge = nn.Parameter(torch.full((heads,), 0.5413))

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """[B, H, T, V]."""
        exact = torch.float64 if v_BHSV.dtype == torch.float64 else torch.float32
        group = q_BHTK.shape[1] // k_BHSK.shape[1]
        q = q_BHTK.to(exact)
        k, v = (x.to(exact).repeat_interleave(group, 1) for x in (k_BHSK, v_BHSV))
        seen = sight.pattern.sees(sight.query_T, sight.key_S)
        scores = (q * self.scale) @ k.transpose(2, 3)
        w_BHTS = scores.masked_fill(~seen, -torch.inf).softmax(3)
        mean = w_BHTS @ k
        # sum w z z^T from the moments of the keys, as the weights add up to 1.
        second = torch.unflatten(w_BHTS @ (k[..., None] * k[..., None, :]).flatten(3), 3, (k.shape[3], -1))
        cross = q[..., None] * mean[..., None, :]
        spread = second - cross - cross.transpose(3, 4) + q[..., None] * q[..., None, :]
        ridge = F.softplus(self.ridge.to(exact))[:, None, None, None]
        eye = torch.eye(k.shape[3], device=k.device, dtype=exact)
        mu = mean - q
        rho = torch.linalg.solve(spread + ridge * eye, mu[..., None])[..., 0]
        tilt = 1 + (q * rho).sum(3, keepdim=True) - rho @ k.transpose(2, 3)
        o_BHTV: Tensor = (w_BHTS * tilt) @ v / (1 - (mu * rho).sum(3, keepdim=True))
        return o_BHTV.to(v_BHSV.dtype)

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        return self.forward(q_BHTK, k_BHSK, v_BHSV, sight)
