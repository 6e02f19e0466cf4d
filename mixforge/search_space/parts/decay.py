"""Decays of a matrix state, as logarithms at most 0.

    head      log(1 - 2^(-5-h)), fixed: Sun et al. 2023 (arXiv 2307.08621), equation 8
    layer     -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5), fixed, in layer l of L: Qin et al. 2023 (arXiv 2307.14995), in
              the form of MiniMax 2025 (arXiv 2501.08313)
    softplus  -exp(a) softplus(W x + b): Gu and Dao 2023 (arXiv 2312.00752), algorithm 2; Kimi Team 2025
              (arXiv 2510.26692) for one a channel
    sigmoid   log sigmoid(W x + b) / tau: Yang et al. 2023 (arXiv 2312.06635), section 4.4
    key       log sigmoid(k) / 16, or of the mean of k: Lan et al. 2025 (arXiv 2503.01496)
    bounded   log(gamma + (1 - gamma) sigmoid(W x)): Qin et al. 2024 (arXiv 2404.07904)
    exp       -exp(W x + b): Peng et al. 2024 (arXiv 2404.05892)
    learned   -exp(b), which is the same for all tokens: the same, section 4.1 (Eagle)
    capped    -e^(-1/2) sigmoid(W x + b): Peng et al. 2025 (arXiv 2503.14456), section 4
    tempered  -g tau, g = softplus(W x + b), tau = sigmoid(W' x + b'), and the gate g^tau of the keys: He et al. 2024
              (arXiv 2410.06577)

Each module takes the input and the keys. It gives the log decay and a gate of what is written that belongs to it:
softplus's dt, tempered's g^tau, or None.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads

# Below it, which keeps 0.7 % a token, the chunked form of decays per channel would leave float32.
CHANNEL_FLOOR = -5.0
# tau of a decay that is made of the keys.
KEY_TEMPERATURE = 16.0


def exact(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def capped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap): Beck et al. 2025 (arXiv 2503.13427), section 3.2."""
    return x if cap is None else cap * torch.tanh(x / cap)


def draw_dt_bias(count: int) -> Tensor:
    """b with softplus(b) log-uniform between 0.001 and 0.1 (Gu and Dao 2023, section 3.6)."""
    dt = torch.exp(torch.empty(count).uniform_(math.log(0.001), math.log(0.1)))
    return dt + torch.log(-torch.expm1(-dt))


def draw_rate(count: int) -> Tensor:
    """a with exp(a) uniform between 1 and 16 (Dao and Gu 2024, arXiv 2405.21060)."""
    return torch.log(torch.empty(count).uniform_(1, 16))


def remember_(bias: Tensor, temperature: float) -> None:
    """Biases from 3 to 6 where the temperature is 1, as in Beck et al. 2024 (arXiv 2405.04517).

    At the temperature of 16 a bias of 0 already keeps 96 % a token.
    """
    if temperature < 4:
        with torch.no_grad():
            bias.copy_(torch.linspace(3, 6, bias.numel()))


class HeadDecay(nn.Module):
    """log gamma_h = log(1 - 2^(-5-h)) [H]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        head = torch.arange(self.heads, device=x_BTD.device, dtype=exact(x_BTD).dtype)
        return torch.log1p(-torch.exp2(-5 - head)), None


class LayerDecay(nn.Module):
    """log gamma_h = -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5) [H] in layer l of L."""

    def __init__(self, heads: int, layer: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        head = torch.arange(1, self.heads + 1, device=x_BTD.device, dtype=exact(x_BTD).dtype)
        return -self.factor * torch.exp2(-8 / self.heads * head), None


class SoftplusDecay(nn.Module):
    """log D_t = -exp(a) dt, dt = softplus(W x + b): (log D [B, T, H], dt [B, T, H])."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.step_size = Dense(width, heads, bias=False)
        self.bias = nn.Parameter(draw_dt_bias(heads))
        self.rate = nn.Parameter(draw_rate(heads))

    def forward(
        self, x_BTD: Tensor, k_BTHK: Tensor, logit_BTH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logit_BTH = self.step_size(x_BTD) if logit_BTH is None else logit_BTH
        dt_BTH = F.softplus(exact(logit_BTH) + exact(self.bias))
        return -exact(self.rate).exp() * dt_BTH, dt_BTH


class SigmoidDecay(nn.Module):
    """log D_t = log sigmoid(W x + b) / tau [B, T, H]; with a cap, W x + b becomes cap tanh((W x + b) / cap)."""

    def __init__(self, width: int, heads: int, temperature: float = 16.0, cap: float | None = None) -> None:
        super().__init__()
        self.temperature = temperature
        self.cap = cap
        self.logit = Dense(width, heads)
        remember_(self.logit.bias, temperature)

    def forward(
        self, x_BTD: Tensor, k_BTHK: Tensor, logit_BTH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logit_BTH = self.logit(x_BTD) if logit_BTH is None else logit_BTH
        return F.logsigmoid(capped(exact(logit_BTH), self.cap)) / self.temperature, None


class SoftplusChannelDecay(nn.Module):
    """log D_t = -exp(a_h) softplus(W x + b) [B, T, H, K], at least -5; W of low rank, or full where that is None."""

    def __init__(self, width: int, heads: int, channels: int, rank: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Identity() if rank is None else Dense(width, rank, bias=False)
        self.up = Dense(width if rank is None else rank, heads * channels, bias=False)
        self.bias = nn.Parameter(draw_dt_bias(heads * channels))
        self.rate = nn.Parameter(draw_rate(heads))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        dt_BTF = F.softplus(exact(self.up(self.down(x_BTD))) + exact(self.bias))
        log_BTHK = -exact(self.rate).exp()[:, None] * split_heads(dt_BTF, self.heads)
        return log_BTHK.clamp(min=CHANNEL_FLOOR), None


class SigmoidChannelDecay(nn.Module):
    """log D_t = log sigmoid(W x + b) / tau [B, T, H, K], at least -5; W of low rank, or full where that is None."""

    def __init__(
        self, width: int, heads: int, channels: int, rank: int | None, temperature: float = 16.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = temperature
        self.down = nn.Identity() if rank is None else Dense(width, rank, bias=False)
        self.up = Dense(width if rank is None else rank, heads * channels)
        remember_(self.up.bias, temperature)

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        log_BTF = F.logsigmoid(exact(self.up(self.down(x_BTD)))) / self.temperature
        return split_heads(log_BTF, self.heads).clamp(min=CHANNEL_FLOOR), None


class KeyDecay(nn.Module):
    """log D_t = log sigmoid(k) / 16 [B, T, H, K], or of the mean of a head's key [B, T, H]: no weights."""

    def __init__(self, heads: int, by_channel: bool) -> None:
        super().__init__()
        self.heads = heads
        self.by_channel = by_channel

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        logit = exact(k_BTHK).repeat_interleave(self.heads // k_BTHK.shape[2], 2)
        log = F.logsigmoid(logit if self.by_channel else logit.mean(-1)) / KEY_TEMPERATURE
        return (log.clamp(min=CHANNEL_FLOOR) if self.by_channel else log), None


class BoundedDecay(nn.Module):
    """log D_t = log(gamma + (1 - gamma) sigmoid(W x)), gamma = (l + sigmoid(c)) / L in layer l of L.

    [B, T, H], or [B, T, H, K] and at least -5 with `channels`; W of low rank, or full where that is None.
    """

    def __init__(
        self, width: int, heads: int, channels: int | None, rank: int | None, layer: int, layers: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.by_channel = channels is not None
        self.layer, self.layers = layer, layers
        count = heads * (1 if channels is None else channels)
        self.down = nn.Identity() if rank is None else Dense(width, rank, bias=False)
        self.up = Dense(width if rank is None else rank, count, bias=False)
        # gamma starts at about l / L, where the paper's equal shares start.
        self.bound = nn.Parameter(torch.full((count,), -4.0))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        least = (self.layer + torch.sigmoid(exact(self.bound))) / self.layers
        log = F.logsigmoid(exact(self.up(self.down(x_BTD))))
        log = torch.logaddexp(least.log(), torch.log1p(-least) + log).clamp(max=0)
        return (split_heads(log, self.heads).clamp(min=CHANNEL_FLOOR) if self.by_channel else log), None


class ExpDecay(nn.Module):
    """log D_t = -exp(W x + b), b from -6 to -1, or with `capped` -e^(-1/2) sigmoid(W x + b), b from -5.5 to 0.5.

    b grows over a head's channels or the heads. [B, T, H], or [B, T, H, K] and at least -5 with `channels`; W x is
    W_2 tanh(W_1 x) with a rank.
    """

    def __init__(
        self, width: int, heads: int, channels: int | None, rank: int | None, capped: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.by_channel = channels is not None
        self.capped = capped
        first, last = (-5.5, 0.5) if capped else (-6.0, -1.0)
        start = torch.linspace(first, last, heads if channels is None else channels)
        self.down = None if rank is None else Dense(width, rank, bias=False)
        self.up = Dense(width if rank is None else rank, heads * (1 if channels is None else channels))
        with torch.no_grad():
            self.up.bias.copy_(start.repeat(1 if channels is None else heads))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x_BTD if self.down is None else torch.tanh(self.down(x_BTD))
        logit = exact(self.up(x))
        # e^4 forgets everything in float64 too; what is larger only overflows.
        log = -math.exp(-0.5) * torch.sigmoid(logit) if self.capped else -logit.clamp(max=4).exp()
        return (split_heads(log, self.heads).clamp(min=CHANNEL_FLOOR) if self.by_channel else log), None


class LearnedDecay(nn.Module):
    """log D = -exp(b), the same for all tokens: [B, T, H], or [B, T, H, K] and at least -5 with `channels`.

    b starts as that of `ExpDecay`.
    """

    def __init__(self, heads: int, channels: int | None) -> None:
        super().__init__()
        start = torch.linspace(-6.0, -1.0, heads if channels is None else channels)
        self.rate = nn.Parameter(start if channels is None else start.repeat(heads, 1))

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        log = -exact(self.rate).clamp(max=4).exp()
        log = log.clamp(min=CHANNEL_FLOOR) if log.dim() == 2 else log
        return log.expand(*x_BTD.shape[:2], *log.shape), None


class TemperedDecay(nn.Module):
    """log D_t = -g tau [B, T, H, K], at least -5, and g^tau of the same shape."""

    def __init__(self, width: int, heads: int, channels: int, rank: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.down = nn.Identity() if rank is None else Dense(width, rank, bias=False)
        self.up = Dense(width if rank is None else rank, 2 * heads * channels)
        with torch.no_grad():
            self.up.bias.zero_()
            self.up.bias[: heads * channels] = draw_dt_bias(heads * channels)

    def forward(self, x_BTD: Tensor, k_BTHK: Tensor) -> tuple[Tensor, Tensor | None]:
        g, tau = exact(self.up(self.down(x_BTD))).chunk(2, -1)
        g, tau = split_heads(g, self.heads), torch.sigmoid(split_heads(tau, self.heads))
        # log softplus(x) is x itself far below 0, where softplus(x) would be 0 and its power without a slope.
        log_g = torch.where(g < -15, g, F.softplus(g.clamp(min=-15)).log())
        return (-F.softplus(g) * tau).clamp(min=CHANNEL_FLOOR), (tau * log_g).exp()


class LatentDecay(nn.Module):
    """A softmax over time of each key channel, as a decay and the keys that belong to it.

        z_t = z_{t-1} + e^{k_t}        S_t = (z_{t-1} / z_t) S_{t-1} + (e^{k_t} / z_t) v_t^T

    Its state is log z [B, H, K]. The log decay is at least -5: a key that outweighs all before it by more than 148
    to 1 leaves 0.7 % of what they wrote, and not less.
    """

    def forward(self, k_BTHK: Tensor, state_BHK: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(log decay, keys, log z after the last token)."""
        k = exact(k_BTHK)
        sums = k.logcumsumexp(1)
        first = torch.full_like(sums[:, :1], -math.inf)
        if state_BHK is not None:
            first = state_BHK[:, None].to(k.dtype)
            sums = torch.logaddexp(sums, first)
        before = torch.cat([first, sums[:, :-1]], 1)
        return (before - sums).clamp(CHANNEL_FLOOR, 0), (k - sums).exp(), sums[:, -1]
