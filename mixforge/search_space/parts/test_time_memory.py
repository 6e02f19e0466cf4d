"""A small network for each head whose weights are the memory: it learns the map from keys to values as it reads.

    memory      M(x) = W x, or x + LN(W_n gelu(... gelu(W_1 x)))            LN without a scale
    loss        of M(k_t) against v_t, with e = M(k_t) - v_t:
      l2        |e|^2 / 2
      lp        sum |e|^p, with sign(e) ~ tanh(10 e) and |e| ~ sqrt(e^2 + 1e-6)
      huber     |e|^2 / 2 where |e| <= delta_t, else delta_t (|e| - delta_t / 2)
    surprise    S_t = eta_t S_{t-1} - theta_t r_t grad_t, without momentum eta = 0
    reach       r_t = min(1, (s . e) / |grad_t|^2), s the slope of the loss on M(k_t)
    retention   A_t = (1 - alpha_t) A_{t-1} + S_t, and the weights are
      l2        W = A
      lq        W = A / max(1, |A|_q)^{q-2}, |A|_q^q the mean of |a|^q over the matrix
      kl        W = n softmax(A) - 1 by rows of n

Chunks: the gradients of a chunk are taken at the weights W of its start, so that all of them are products of matrices.
Inside a chunk a token reads M_t = (1 - alpha_t) M_{t-1} + S_t, from M = W at the chunk's start: what retention does
beyond a decay is done once, at the chunk's end. With chunks of one token the weights are those of the equations.

The reach keeps a memory from swinging. To first order a step takes r theta |grad|^2 from s . e, so with theta up to 1 no
step goes past the value that it learns. It is 1 for a matrix with the loss l2 and keys of length 1; through a norm
gradients grow as the weights in front of it decay, and their square is more than s . e.

For a layer with inputs h_i and error signals d_i (grad_i = r_i d_i h_i^T) the tokens of a chunk read

    M_t x = a_t M_0 x + b_t S_0 x - sum_{i <= t} c_ti d_i (h_i . x),     c = P_alpha P_eta diag(theta), b = P_alpha e

where P_g[t, i] is the product of a gate's values after i up to t, and e_t that of all eta up to t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.search_space.parts.decay import exact


@dataclass
class Gates:
    """What a token says of its own writing, [B, H, T] each: logarithms of 1 - alpha and of eta, theta, and delta."""

    keep: Tensor
    rate: Tensor
    momentum: Tensor | None
    threshold: Tensor | None

    def between(self, begin: int, end: int) -> Gates:
        """Those of some tokens."""
        found = [
            None if gate is None else gate[..., begin:end]
            for gate in (self.keep, self.rate, self.momentum, self.threshold)
        ]
        assert found[0] is not None
        assert found[1] is not None
        return Gates(found[0], found[1], found[2], found[3])


@dataclass
class Memory:
    """Weights [B, H, out, in] of each layer, at some token.

    start: at the chunk's start, where gradients are taken. now: read by the token. surprise: S. dual: A, where it is
    not `now`.
    """

    start: list[Tensor]
    now: list[Tensor]
    surprise: list[Tensor] | None
    dual: list[Tensor] | None

    def tensors(self) -> dict[str, Tensor]:
        """As a state."""
        named = {"start": self.start, "now": self.now, "surprise": self.surprise, "dual": self.dual}
        return {f"{name}{i}": w for name, some in named.items() for i, w in enumerate(some or [])}


class TestTimeMemory(nn.Module):
    """`dims` are the widths from key to value. Everything is computed in float32 or better."""

    # Its name is that of the field, not of a test.
    __test__ = False

    def __init__(
        self,
        heads: int,
        dims: list[int],
        residual: bool,
        loss: Literal["l2", "lp", "huber"],
        power: float,
        retention: Literal["l2", "lq", "kl"],
        order: float,
        momentum: bool,
        chunk: int,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.loss = loss
        self.power = power
        self.retention = retention
        self.order = order
        self.momentum = momentum
        self.chunk = chunk
        self.layers = len(dims) - 1
        # Keys have length 1, and what a norm follows must not start small. Other retentions scale themselves.
        spreads = [into**-0.5 for into in dims[:-1]]
        if residual:
            spreads[0] = 1.0
        if retention != "l2":
            spreads = [1.0] * self.layers
        self.first = nn.ParameterList(
            nn.Parameter(torch.randn(heads, out_of, into) * spread)
            for into, out_of, spread in zip(dims, dims[1:], spreads, strict=False)
        )

    def initial(self, batch: int) -> Memory:
        """Before the first token."""
        first = [exact(weight).expand(batch, *weight.shape) for weight in self.first]
        linked = self._linked(first)
        zeros = [torch.zeros_like(weight) for weight in first]
        return Memory(
            linked, linked, zeros if self.momentum else None, None if self.retention == "l2" else first
        )

    def stored(self, state: dict[str, Tensor]) -> Memory:
        """What `Memory.tensors` wrote."""
        names = ("start", "now", "surprise", "dual")
        found = [
            [state[f"{name}{i}"] for i in range(self.layers)] if f"{name}0" in state else None
            for name in names
        ]
        assert found[0] is not None
        assert found[1] is not None
        return Memory(found[0], found[1], found[2], found[3])

    def forward(
        self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, gates: Gates, memory: Memory, start: int
    ) -> tuple[Tensor, Memory]:
        """What each token reads after it has written, and the memory after the last; `start` tokens came before."""
        length, begin, read = q_BHTK.shape[2], 0, []
        while begin < length:
            if (start + begin) % self.chunk == 0:
                memory = self.begun(memory)
            end = min(length, begin + self.chunk - (start + begin) % self.chunk)
            q, k, v = (x[:, :, begin:end] for x in (q_BHTK, k_BHTK, v_BHTK))
            y, memory = self._piece(q, k, v, gates.between(begin, end), memory)
            read.append(y)
            begin = end
        return torch.cat(read, 2), memory

    def step(
        self, q_BHK: Tensor, k_BHK: Tensor, v_BHK: Tensor, gates: Gates, memory: Memory, position: Tensor
    ) -> tuple[Tensor, Memory]:
        """One token."""
        memory = self.begun_at(memory, position)
        start, now = memory.start, memory.now
        signals = self._signals(start, k_BHK[:, :, None], v_BHK[:, :, None], gates.threshold)
        rate, keep = gates.rate[..., None], gates.keep.exp()[..., None]
        surprise = [-rate * (d.transpose(2, 3) @ h) for h, d in signals]
        if memory.surprise is not None:
            assert gates.momentum is not None
            eta = gates.momentum.exp()[..., None]
            surprise = [eta * old + new for old, new in zip(memory.surprise, surprise, strict=True)]
        now = [keep * old + new for old, new in zip(now, surprise, strict=True)]
        dual = None
        if memory.dual is not None:
            dual = [keep * old + new for old, new in zip(memory.dual, surprise, strict=True)]
        return self.read(now, q_BHK[:, :, None])[:, :, 0], Memory(
            start, now, surprise if self.momentum else None, dual
        )

    def read(self, weights: list[Tensor], q_BHTK: Tensor) -> Tensor:
        """What a network of these weights says of queries."""
        x = q_BHTK
        for i, weight in enumerate(weights):
            x = self._between(x @ weight.transpose(2, 3), i)
        return self._ended(x, q_BHTK)

    def begun_at(self, memory: Memory, position: Tensor) -> Memory:
        """The memory that the token at `position` [1] finds: as `begun` where a chunk begins with it."""
        is_new, fresh = position % self.chunk == 0, self.begun(memory)
        start = [torch.where(is_new, new, old) for new, old in zip(fresh.start, memory.start, strict=True)]
        now = [torch.where(is_new, new, old) for new, old in zip(fresh.now, memory.now, strict=True)]
        return Memory(start, now, memory.surprise, memory.dual)

    def begun(self, memory: Memory) -> Memory:
        """The memory at the beginning of a chunk."""
        linked = memory.now if memory.dual is None else self._linked(memory.dual)
        return Memory(linked, linked, memory.surprise, memory.dual)

    def _linked(self, dual: list[Tensor]) -> list[Tensor]:
        """The weights that retention makes of what is kept."""
        if self.retention == "kl":
            return [weight.shape[-1] * weight.softmax(-1) - 1 for weight in dual]
        if self.retention == "lq":
            return [weight / self._size(weight) for weight in dual]
        return dual

    def _size(self, weight: Tensor) -> Tensor:
        """max(1, |A|_q)^{q-2} of each head's matrix; the small term keeps its slope finite at zero."""
        mean = (weight * weight + 1e-12).pow(self.order / 2).mean((-2, -1), keepdim=True)
        return mean.pow((self.order - 2) / self.order).clamp(min=1)

    def _between(self, a: Tensor, layer: int) -> Tensor:
        return F.gelu(a) if layer < self.layers - 1 else a

    def _ended(self, a: Tensor, x: Tensor) -> Tensor:
        return x + F.layer_norm(a, a.shape[-1:], eps=1e-6) if self.residual else a

    def _signals(
        self, weights: list[Tensor], k_BHTK: Tensor, v_BHTK: Tensor, threshold: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Each layer's inputs h and error signals d: within reach the gradient of a token's loss is d h^T."""
        inputs, sums = [k_BHTK], []
        for i, weight in enumerate(weights):
            sums.append(inputs[-1] @ weight.transpose(2, 3))
            if i < self.layers - 1:
                inputs.append(F.gelu(sums[-1]))
        error = self._ended(sums[-1], k_BHTK) - v_BHTK
        d = self._slope(error, threshold)
        gain = (d * error).sum(-1, keepdim=True)
        if self.residual:
            y = F.layer_norm(sums[-1], sums[-1].shape[-1:], eps=1e-6)
            spread = (sums[-1].var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
            d = (d - d.mean(-1, keepdim=True) - y * (d * y).mean(-1, keepdim=True)) / spread
        errors = [d]
        for i in range(self.layers - 1, 0, -1):
            errors.append((errors[-1] @ weights[i]) * _gelu_slope(sums[i - 1]))
        errors.reverse()
        size = sum(
            h.square().sum(-1, keepdim=True) * d.square().sum(-1, keepdim=True)
            for h, d in zip(inputs, errors, strict=True)
        )
        reach = (gain / (size + 1e-12)).clamp(max=1)
        return [(h, reach * d) for h, d in zip(inputs, errors, strict=True)]

    def _slope(self, e: Tensor, threshold: Tensor | None) -> Tensor:
        """The gradient of the loss on what the memory says."""
        if self.loss == "lp":
            return self.power * torch.tanh(10 * e) * (e * e + 1e-6).pow((self.power - 1) / 2)
        if self.loss == "huber":
            assert threshold is not None
            delta = threshold[..., None]
            size = (e * e).sum(-1, keepdim=True).add(1e-12).sqrt()
            return e * (delta / size).clamp(max=1)
        return e

    def _piece(
        self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, gates: Gates, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Tokens of one chunk."""
        signals = self._signals(memory.start, k_BHTK, v_BHTK, gates.threshold)
        kept_BHT, keep_BHTT = _products(gates.keep)
        write_BHTT = gates.rate[:, :, None, :].expand_as(keep_BHTT)
        if gates.momentum is not None:
            carried_BHT, momentum_BHTT = _products(gates.momentum)
            write_BHTT = momentum_BHTT * write_BHTT
            coefficient_BHTT = keep_BHTT @ write_BHTT
            past_BHT1 = keep_BHTT @ carried_BHT[..., None]
        else:
            coefficient_BHTT = keep_BHTT * write_BHTT
        x, now, surprise, dual = q_BHTK, [], [], []
        for i, (h, d) in enumerate(signals):
            old = memory.now[i]
            a = kept_BHT[..., None] * (x @ old.transpose(2, 3))
            change = -(coefficient_BHTT[:, :, -1, :, None] * d).transpose(2, 3) @ h
            if memory.surprise is not None:
                s = memory.surprise[i]
                a = a + past_BHT1 * (x @ s.transpose(2, 3))
                change = change + past_BHT1[:, :, -1:] * s
                new = (write_BHTT[:, :, -1, :, None] * d).transpose(2, 3) @ h
                surprise.append(carried_BHT[:, :, -1, None, None] * s - new)
            a = a - (coefficient_BHTT * (x @ h.transpose(2, 3))) @ d
            last = kept_BHT[:, :, -1, None, None]
            now.append(last * old + change)
            if memory.dual is not None:
                dual.append(last * memory.dual[i] + change)
            x = self._between(a, i)
        after = Memory(
            memory.start,
            now,
            None if memory.surprise is None else surprise,
            None if memory.dual is None else dual,
        )
        return self._ended(x, q_BHTK), after


def usual_gates(memory: TestTimeMemory, heads: int) -> Tensor:
    """A bias of the gates with which a memory starts where it learns and not where it swings: slow forgetting, long
    momentum, steps that add up to less than one over a chunk, and a threshold of about 1.
    """
    usual = {"keep": -4.0, "rate": -3.0, "momentum": 2.0, "threshold": 0.5}
    names = ["keep", "rate", *(["momentum"] if memory.momentum else [])]
    names += ["threshold"] if memory.loss == "huber" else []
    return torch.tensor([usual[name] for name in names for _ in range(heads)])


def gates_of(memory: TestTimeMemory, logits_BTG: Tensor, heads: int) -> Gates:
    """Gates of tokens from what a projection says of them, those of one kind beside one another.

    The rate has the factor 1 - eta.
    """
    each = exact(logits_BTG).transpose(1, 2).chunk(logits_BTG.shape[-1] // heads, 1)
    threshold = F.softplus(each[-1]) if memory.loss == "huber" else None
    rate, momentum = torch.sigmoid(each[1]), None
    if memory.momentum:
        rate, momentum = rate * torch.sigmoid(-each[2]), F.logsigmoid(each[2])
    return Gates(F.logsigmoid(-each[0]), rate, momentum, threshold)


def _products(log_gate_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Products of all gates up to t [B, H, T], and of those after i up to t [B, H, T, T], zero for i > t."""
    total_BHT = log_gate_BHT.cumsum(-1)
    length = total_BHT.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=total_BHT.device).triu(1)
    between_BHTT = (total_BHT[..., :, None] - total_BHT[..., None, :]).masked_fill(later, -torch.inf)
    return total_BHT.exp(), between_BHTT.exp()


def unit(x: Tensor) -> Tensor:
    """Of length 1 over the last axis."""
    return F.normalize(x, dim=-1, eps=1e-6)


def _gelu_slope(a: Tensor) -> Tensor:
    """The derivative of the exact GELU."""
    return 0.5 * (1 + torch.erf(a / math.sqrt(2))) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def piece_flops(length: int, dims: list[int], momentum: bool) -> int:
    """Matmul FLOPs of one head for `length` tokens of one chunk."""
    flops = 2 * length**3 + 2 * length**2 if momentum else 0
    for i, (into, out_of) in enumerate(pairwise(dims)):
        # Keys through the chunk's start, queries through the memory, the chunk's writing; back through all layers
        # but the first; with momentum, queries through the surprise and its own writing.
        passes = 3 + (1 if i > 0 else 0) + (2 if momentum else 0)
        flops += passes * 2 * length * into * out_of + 2 * length**2 * (into + out_of)
    return flops
