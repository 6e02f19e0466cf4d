"""From queries, keys and values to the outputs of the heads.

    Fused     softmax by the fused operation of the pattern, nothing being added to a score
    Biased    softmax by the fused operation over given pairs, with terms that are added to scores
    Scored    the scores themselves: any weighing, terms that depend on the query, heads that mix

Terms, for a query t and a key s of head h:

    forget     log L_ts, the sum of log f_i over s < i <= t, with f_i = sigmoid(w_h . x_i + b_h)
    alibi      -m_h (t - s), m_h = 2^(-8 h / H)
    balanced   as alibi for half of the heads, and +m_h (t - s) for the others
    sink       one more key with the logit b_h, and no value
    meta       n learned entries that every token sees, without a term

`Weigh` makes weights of scores: softmax; sigmoid(z); relu(z) / n and relu(z)^2 / n over n keys that are seen;
`normalise` subtracts the mean over these keys, and divides by their standard deviation and by n. With forget=mask the
gate is no term: L_ts multiplies the weights.

Sources: Lin et al. 2025 (arXiv 2503.02130), equations 3 and 4; Press et al. 2021 (arXiv 2108.12409), section 3; Fu et
al. 2025 (arXiv 2502.18845), section 3.2, for sigmoid and balanced slopes; OpenAI 2025 (arXiv 2508.10925) for the
sink, as in the reference code of GPT-OSS; Dong et al. 2024 (arXiv 2411.13676) for meta tokens; Wortsman et al. 2023
(arXiv 2309.08586) for relu / n; Hua et al. 2022 (arXiv 2202.10447) for relu^2; Richter and Wattenhofer 2020 (arXiv
2005.09561) for normalised scores; Shaw et al. 2018 (arXiv 1803.02155), equations 3 and 4, for relative positions;
Zhao et al. 2025 (PPMA, arXiv 2506.15940) for a mask of decays on softmax attention.

Departures: meta tokens are keys and values of a layer, where in the paper they are tokens of the input; relu^2
divides by n outside of the square; normalised scores are divided by n, so that an output does not grow with the
sequence. PPMA's mask runs along paths over an image, both ways, and its decays are those of Mamba-2,
exp(-a softplus(z)), which for a = 1 is sigmoid(-z); its public code adds log L, which is forget=head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.attention_blocks import Sight, in_blocks
from mixforge.search_space.parts.attention_mix import HeadMix
from mixforge.search_space.parts.dense import Dense


class ForgetGate(nn.Module):
    """Sums of log f over the tokens so far, [B, H, T, 1], in float32 or better."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.gate = Dense(width, heads)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {"forgotten": torch.zeros(batch, self.heads, device=device, dtype=exact)}

    def forward(self, x_BTD: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        """The state is brought up to date in place."""
        exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        sum_BHT = F.logsigmoid(self.gate(x_BTD).to(exact)).cumsum(1).transpose(1, 2)
        if state is not None:
            sum_BHT = sum_BHT + state["forgotten"][..., None]
            state["forgotten"].copy_(sum_BHT[..., -1])
        return sum_BHT[..., None]


class Slopes(nn.Module):
    """-m_h (t - s) [H, T, S]; with `balanced`, with both signs."""

    def __init__(self, heads: int, balanced: bool) -> None:
        super().__init__()
        self.heads = heads
        self.balanced = balanced

    def forward(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        slope_H = self.of_heads(sight.query_T.device, dtype)
        return slope_H[:, None, None] * (sight.query_T[:, None] - sight.key_S).to(dtype)

    def of_heads(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What a token of distance adds, [H]."""
        falling = -(-self.heads // 2) if self.balanced else self.heads
        return torch.cat(
            [-alibi_slopes(falling, device, dtype), alibi_slopes(self.heads - falling, device, dtype)]
        )


def alibi_slopes(heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """2^(-8 h / H) for a power of two; else those of the next lower one, and every other one of twice as many."""
    power = 2 ** int(math.log2(max(1, heads)))
    # On the device, as a graph of a step cannot bring numbers there.
    head = torch.arange(heads, device=device, dtype=dtype)
    return torch.exp2(torch.where(head < power, head + 1, head - power + 0.5) * (-8 / power))


class Terms(nn.Module):
    """What is added to the scores: the forget gate's sums and slopes."""

    def __init__(self, forgets: bool, slopes: Slopes | None) -> None:
        super().__init__()
        self.forgets = forgets
        self.slopes = slopes

    def forward(self, sight: Sight, dtype: torch.dtype) -> Tensor | None:
        """[B or 1, H, T, S] in float32 or better; None where there is nothing to add."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        term = None if self.slopes is None else self.slopes(sight, exact)[None]
        if self.forgets:
            term = log_left(sight) if term is None else term + log_left(sight)
        return term

    def of_tokens(self, sight: Sight, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The same as running sums [B, H, T] of a sequence without a past, and as slopes [H]."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        left_BHT = sight.present["forget"][..., 0] if self.forgets else None
        return left_BHT, None if self.slopes is None else self.slopes.of_heads(sight.query_T.device, exact)


def log_left(sight: Sight) -> Tensor:
    """log L [B, H, T, S], of no meaning for keys that are not earlier."""
    return sight.present["forget"] - sight.entries["forget"].transpose(2, 3)


class Fused(nn.Module):
    """Softmax attention with scores q . k times `scale`, which is 1 / sqrt(K)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """A sequence: [B, H, T, V]."""
        return sight.pattern.attend(q_BHTK, k_BHSK, v_BHSV, sight.query_T, sight.key_S)

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        """One query over the slots of a cache."""
        seen = sight.pattern.choose(q_BHTK, k_BHSK, sight.query_T, sight.key_S)
        return attend(q_BHTK, k_BHSK, v_BHSV, seen, scale=self.scale)


class Biased(nn.Module):
    """As `Fused`, with terms, a sink and meta tokens, over the pairs of the pattern.

    operation: over given pairs. flexible: over the last tokens, if there is such a form, for sequences without a past.
    """

    def __init__(
        self,
        scale: float,
        terms: Terms,
        sinks: int,
        operation: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
        flexible: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.terms = terms
        self.operation = operation
        self.flexible = flexible
        self.sink = nn.Parameter(torch.zeros(sinks)) if sinks else None

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        length = q_BHTK.shape[2]
        last = sight.pattern.last(length) if k_BHSK.shape[2] == length else None
        if self.flexible is None or last is None:
            return in_blocks(self.every_pair, q_BHTK, k_BHSK, v_BHSV, sight)
        left_BHT, slope_H = self.terms.of_tokens(sight, q_BHTK.dtype)
        return self.flexible(q_BHTK, k_BHSK, v_BHSV, last, left_BHT, slope_H, self.sink, self.scale)

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        return self.attend(q_BHTK, k_BHSK, v_BHSV, sight, attend_given)

    def every_pair(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        return self.attend(q_BHTK, k_BHSK, v_BHSV, sight, self.operation)

    def attend(
        self,
        q_BHTK: Tensor,
        k_BHSK: Tensor,
        v_BHSV: Tensor,
        sight: Sight,
        operation: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor],
    ) -> Tensor:
        seen = sight.pattern.sees(sight.query_T, sight.key_S)
        term = self.terms(sight, q_BHTK.dtype)
        if term is None and self.sink is None:
            return operation(q_BHTK, k_BHSK, v_BHSV, F.pad(seen, (sight.meta, 0), value=True), self.scale)
        if term is None:
            term = torch.zeros(1, 1, *seen.shape, device=q_BHTK.device, dtype=q_BHTK.dtype)
        mask = F.pad(term.masked_fill(~seen, -torch.inf).to(q_BHTK.dtype), (sight.meta, 0))
        if self.sink is not None:
            batch, _, length, _ = mask.shape
            logit = self.sink[:, None, None].expand(batch, -1, length, 1)
            mask = torch.cat([logit, mask.expand(-1, len(self.sink), -1, -1)], 3)
            k_BHSK, v_BHSV = F.pad(k_BHSK, (0, 0, 1, 0)), F.pad(v_BHSV, (0, 0, 1, 0))
        return operation(q_BHTK, k_BHSK, v_BHSV, mask, self.scale)


def attend_given(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The fused operation over given pairs."""
    return attend(q_BHTK, k_BHSK, v_BHSV, mask, scale=scale)


class Weigh(nn.Module):
    """Scores [B, H, T, S] to weights, which are zero where no key is seen; in float32 or better."""

    def __init__(
        self, score: Literal["softmax", "sigmoid", "relu", "relu2", "normalise"], sinks: int
    ) -> None:
        super().__init__()
        self.score = score
        self.sink = nn.Parameter(torch.zeros(sinks)) if sinks else None

    def forward(self, z_BHTS: Tensor, seen_TS: Tensor) -> Tensor:
        if self.score == "softmax":
            z_BHTS = z_BHTS.masked_fill(~seen_TS, -torch.inf)
            if self.sink is None:
                return z_BHTS.softmax(-1)
            logit = (
                self.sink[:, None, None].to(z_BHTS.dtype).expand(*z_BHTS.shape[:1], -1, z_BHTS.shape[2], 1)
            )
            return torch.cat([logit, z_BHTS], -1).softmax(-1)[..., 1:]
        z_BHTS = z_BHTS.masked_fill(~seen_TS, 0)
        count = seen_TS.sum(-1, keepdim=True)
        if self.score == "sigmoid":
            return torch.sigmoid(z_BHTS).masked_fill(~seen_TS, 0)
        if self.score == "normalise":
            away = (z_BHTS - z_BHTS.sum(-1, keepdim=True) / count).masked_fill(~seen_TS, 0)
            variance = away.square().sum(-1, keepdim=True) / count
            return away * (variance + 1e-6).rsqrt() / count
        weight = F.relu(z_BHTS)
        return (weight.square() if self.score == "relu2" else weight) / count


class Relative(nn.Module):
    """Keys and values for distances from 0 to `clip`, which stands for all that are farther; one set for all heads.

    ahead: the same for the distances of keys behind the query, which a prefix has.
    """

    def __init__(self, clip: int, key_dim: int, value_dim: int, ahead: int = 0) -> None:
        super().__init__()
        self.clip = clip
        self.ahead = ahead
        count = ahead + 1 + clip
        self.key = nn.Parameter(torch.randn(count, key_dim) * key_dim**-0.5)
        self.value = nn.Parameter(torch.randn(count, value_dim) * value_dim**-0.5)

    def distances(self, weights_BHTS: Tensor, sight: Sight) -> Tensor:
        """[B, H, T, S], clipped, and counted from the farthest key behind the query."""
        distance_TS = (sight.query_T[:, None] - sight.key_S).clamp(-self.ahead, self.clip)
        return (distance_TS + self.ahead).expand_as(weights_BHTS)

    def score(self, q_BHTK: Tensor, z_BHTS: Tensor, sight: Sight) -> Tensor:
        """q . key of the distance."""
        return (q_BHTK @ self.key.T).gather(3, self.distances(z_BHTS, sight))

    def mix(self, weights_BHTS: Tensor, sight: Sight) -> Tensor:
        """Sum of weights times the value of the distance."""
        each = torch.zeros(
            *weights_BHTS.shape[:3], len(self.value), device=self.value.device, dtype=self.value.dtype
        )
        by_distance = each.scatter_add(3, self.distances(weights_BHTS, sight), weights_BHTS)
        o_BHTV: Tensor = by_distance @ self.value
        return o_BHTV


class Scored(nn.Module):
    """Scores and weights of all pairs, in plain products; with `fades`, weights times what the forget gate leaves."""

    def __init__(
        self,
        scale: float,
        terms: Terms,
        weigh: Weigh,
        fades: bool,
        relative: Relative | None,
        mix: HeadMix | None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.terms = terms
        self.weigh = weigh
        self.fades = fades
        self.relative = relative
        self.mix = mix

    def forward(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        return in_blocks(self.every_pair, q_BHTK, k_BHSK, v_BHSV, sight)

    def every_pair(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        exact = torch.float64 if q_BHTK.dtype == torch.float64 else torch.float32
        group = q_BHTK.shape[1] // k_BHSK.shape[1]
        k, v = (x_BHSK.repeat_interleave(group, 1) for x_BHSK in (k_BHSK, v_BHSV))
        q_BHTK = q_BHTK * self.scale
        z = q_BHTK @ k.transpose(2, 3)
        if self.relative is not None:
            z = z + self.relative.score(q_BHTK, z, sight)
        if self.mix is not None:
            z = self.mix(z, 0, sight.mix, sight.entries.get("mix"))
        term = self.terms(sight, z.dtype)
        z = z.to(exact)
        if term is not None:
            z = z + F.pad(term, (sight.meta, 0))
        seen = sight.pattern.sees(sight.query_T, sight.key_S)
        weights = self.weigh(z, F.pad(seen, (sight.meta, 0), value=True))
        if self.fades:
            left = log_left(sight).masked_fill(~seen, -torch.inf).exp()
            weights = weights * F.pad(left, (sight.meta, 0), value=1)
        weights = weights.to(v.dtype)
        if self.mix is not None:
            weights = self.mix(weights, 1, sight.mix, sight.entries.get("mix"))
        o_BHTV: Tensor = weights @ v
        return o_BHTV if self.relative is None else o_BHTV + self.relative.mix(weights, sight)

    def step(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, sight: Sight) -> Tensor:
        return self.every_pair(q_BHTK, k_BHSK, v_BHSV, sight)
