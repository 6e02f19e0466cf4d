"""Feature maps of queries and keys: elementwise, over the channels of a head, or learned.

elu1      elu(x) + 1: Katharopoulos et al. 2020 (arXiv 2006.16236), equation 7
exp       e^x, its exponent cut at 20
softmax   over the channels of a head: Lan et al. 2025 (arXiv 2503.01496)
taylor(n) phi(q) . phi(k) = sum over i <= n of (q.k/sqrt(K))^i / i!: Arora et al. 2024 (arXiv 2402.18668) for n = 2;
          Mongaras and Larson 2025 (arXiv 2507.23632) for every n
learned   relu(W_h x + b_h): Kasai et al. 2021 (arXiv 2103.13076); Mercat et al. 2024 (arXiv 2405.06640)
hedgehog  softmax over the channels of (W_h x + b_h, -W_h x - b_h): Zhang et al. 2024 (arXiv 2402.04347)
favor(m)  e^{w_i . x' - |x'|^2 / 2} / sqrt(m), x' = x / K^(1/4), with m fixed orthogonal directions w_i:
          Choromanski et al. 2020 (arXiv 2009.14794); its exponent cut at 20
outer(r)  relu(x) times each of the r of relu(P_h x): Pramanik et al. 2023 (arXiv 2310.15719), whose second
              factor reads the input and not the key

Under norm=denominator relu, learned and outer(r) add 1e-3 to each feature, as the public code of Choromanski et al.
2020 does for relu (`numerical_stabilizer`): a query may have no feature in common with any key, and then the least
rounding decides what is read.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# e^20 for a query and a key, and 1e4 of their products, are far inside float32, and so are the gradients.
MOST_EXPONENT = 20.0


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, which is positive."""
    return F.elu(x) + 1


def exponential(x: Tensor) -> Tensor:
    """e^min(x, 20)."""
    return x.clamp(max=MOST_EXPONENT).exp()


def softmax(x: Tensor) -> Tensor:
    """Over the last axis."""
    return x.softmax(-1)


def taylor_features(channels: int, order: int) -> int:
    """Features of the expansion: products of up to `order` channels, each once."""
    return math.comb(channels + order, order)


def taylor_line(x: Tensor) -> Tensor:
    """[..., K] -> [..., 1 + K], whose product is 1 + q.k/sqrt(K)."""
    return torch.cat([torch.ones_like(x[..., :1]), x * x.shape[-1] ** -0.25], -1)


def taylor(x: Tensor) -> Tensor:
    """[..., K] -> [..., 1 + K + K(K+1)/2], with taylor(q) . taylor(k) = 1 + q.k/sqrt(K) + (q.k)^2/(2K)."""
    channels = x.shape[-1]
    row, column = torch.triu_indices(channels, channels, device=x.device)
    # A product of two channels stands for the two equal terms of (q.k)^2; a square for one.
    terms = (2 - (row == column).to(x.dtype)) / (2 * channels)
    pairs = x[..., row] * x[..., column] * terms.sqrt()
    return torch.cat([torch.ones_like(x[..., :1]), x * channels**-0.25, pairs], -1)


def taylor_cubic(x: Tensor) -> Tensor:
    """[..., K] -> [..., (K+1)(K+2)(K+3)/6], whose product has (q.k)^3 / (6 K^(3/2)) too."""
    channels = x.shape[-1]
    index = torch.arange(channels, device=x.device)
    a, b, c = torch.combinations(index, 3, with_replacement=True).unbind(-1)
    # A product of three channels stands for the 6, 3 or 1 equal terms of (q.k)^3.
    equal = (a == b).to(x.dtype) + (b == c).to(x.dtype)
    terms = torch.where(equal == 0, 6.0, torch.where(equal == 1, 3.0, 1.0)).to(x.dtype)
    cubes = x[..., a] * x[..., b] * x[..., c] * (terms / (6 * channels**1.5)).sqrt()
    return torch.cat([taylor(x), cubes], -1)


class LearnedMap(nn.Module):
    """relu(W_h x + b_h) [..., H, K] -> [..., H, K]."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        # The map starts near the identity, so that a head starts with keys that differ.
        noise = torch.randn(heads, channels, channels) * (0.1 / math.sqrt(channels))
        self.weight = nn.Parameter(torch.eye(channels) + noise)
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        y_BTHK: Tensor = torch.einsum("bthk,hkf->bthf", x_BTHK, self.weight) + self.bias
        return F.relu(y_BTHK)


class HedgehogMap(nn.Module):
    """softmax(W_h x + b_h, -W_h x - b_h) [..., H, K] -> [..., H, 2K]."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        noise = torch.randn(heads, channels, channels) * (0.1 / math.sqrt(channels))
        self.weight = nn.Parameter(torch.eye(channels) + noise)
        self.bias = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        y_BTHK: Tensor = torch.einsum("bthk,hkf->bthf", x_BTHK, self.weight) + self.bias
        return torch.cat([y_BTHK, -y_BTHK], -1).softmax(-1)


class FavorMap(nn.Module):
    """e^{w_i . x' - |x'|^2 / 2} / sqrt(m) [..., K] -> [..., m]; the directions are kept with the weights."""

    directions: Tensor

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.register_buffer("directions", draw_directions(channels, count))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        count, channels = self.directions.shape
        x = x_BTHK * channels**-0.25
        exponent = x @ self.directions.mT.to(x.dtype) - x.square().sum(-1, keepdim=True) / 2
        features: Tensor = exponent.clamp(max=MOST_EXPONENT).exp() / math.sqrt(count)
        return features


def draw_directions(channels: int, count: int) -> Tensor:
    """[count, K]: orthogonal in blocks of K, as long as normal vectors are (Choromanski et al. 2020)."""
    if torch.get_default_device().type == "meta":
        return torch.empty(count, channels)
    blocks = [torch.linalg.qr(torch.randn(channels, channels))[0].mT for _ in range(-(-count // channels))]
    lengths: Tensor = torch.randn(count, channels).norm(dim=-1, keepdim=True)
    return torch.cat(blocks)[:count] * lengths


class OuterMap(nn.Module):
    """relu(x)_i relu(P_h x)_j [..., H, K] -> [..., H, K r]."""

    def __init__(self, heads: int, channels: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, channels, count) / math.sqrt(channels))

    def forward(self, x_BTHK: Tensor) -> Tensor:
        second_BTHR: Tensor = F.relu(torch.einsum("bthk,hkr->bthr", x_BTHK, self.weight))
        return (F.relu(x_BTHK)[..., :, None] * second_BTHR[..., None, :]).flatten(-2)
