"""How a decay scales the products inside a chunk and the states between chunks.

With G the running sum of the log decays in a chunk of L tokens:

    gram(X, Y)_ij = sum_c X_ic Y_jc e^(G_ic - G_jc) for i >= j, else 0
    reading(X) = X e^G                  what row i reads of the state before the chunk
    writing(X) = X e^(G_L - G)          what row i leaves in the state after it
    keep(S) = e^(G_L) S

Tensors are [C, B, G, L, *]: chunks, batch, heads, rows of a chunk. Log decays are [C, B, G, L, 1 or K], or
with a batch of 1 where every sequence has the same.

Source: Yang et al. 2023 (arXiv 2312.06635, section 4). Departures: the exponents of scalar decays are
differences that are cut before the exponential; channel decays take the chunk's first row as their anchor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

# Exponents are cut here: e^-60 is nothing beside the rounding of a float64, and a smaller power would make
# denormal numbers, on which a CPU is up to eighty times slower.
FLOOR = -60.0


class Gates(ABC):
    """The products of all chunks under one decay, and their adjoints."""

    @abstractmethod
    def __init__(self, log: Tensor | None) -> None:
        """From the log decays, None for none."""

    @abstractmethod
    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """Decayed products of rows, [C, B, G, L, L], lower triangular with the diagonal."""

    @abstractmethod
    def gram_adjoint(self, d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and y from that of `gram(x, y)`, of which the lower triangle counts."""

    @abstractmethod
    def reading(self, x: Tensor) -> Tensor:
        """x e^G. May return x itself."""

    @abstractmethod
    def writing(self, x: Tensor) -> Tensor:
        """x e^(G_L - G). May return x itself."""

    @abstractmethod
    def keep(self, chunk: int, state: Tensor) -> Tensor:
        """The state [B, G, K, V] after the decay of one whole chunk. May return the state itself."""

    @abstractmethod
    def log_grad(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        columns: Sequence[tuple[Tensor, Tensor]],
        states: Tensor,
        dstates: Tensor,
    ) -> Tensor | None:
        """Gradient of the log decays.

        `rows` are pairs (x, dx) of what was scaled by e^G, `columns` of what was scaled by e^-G; `states` are
        those after each chunk.
        """


class PlainGates(Gates):
    """No decay."""

    def __init__(self, log: Tensor | None) -> None:
        assert log is None

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).tril_()

    def gram_adjoint(self, d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = d.tril()
        return d @ y, d.mT @ x

    def reading(self, x: Tensor) -> Tensor:
        return x

    def writing(self, x: Tensor) -> Tensor:
        return x

    def keep(self, chunk: int, state: Tensor) -> Tensor:
        return state

    def log_grad(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        columns: Sequence[tuple[Tensor, Tensor]],
        states: Tensor,
        dstates: Tensor,
    ) -> Tensor | None:
        return None


class ScalarGates(Gates):
    """One decay for all key channels of a token: log decays [C, B or 1, G, L, 1], of any size."""

    def __init__(self, log: Tensor | None) -> None:
        assert log is not None
        self.shape = log.shape
        dtype = log.dtype
        # Summed in float64 and differenced as two parts: after a decay of -1000 a float32 sum would leave the
        # later pairs with a relative error of 1e-4.
        total = log.double().cumsum(-2)
        high = total.to(dtype)
        low = (total - high).to(dtype)
        pairs = high - high.mT
        pairs += low
        pairs -= low.mT
        self.pairs = pairs.clamp_(FLOOR, 0).exp_().tril_()
        self.read = total.clamp(min=FLOOR).exp().to(dtype)
        self.write = (total[..., -1:, :] - total).clamp_(min=FLOOR).exp().to(dtype)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT).mul_(self.pairs)

    def gram_adjoint(self, d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = d * self.pairs
        return d @ y, d.mT @ x

    def reading(self, x: Tensor) -> Tensor:
        return x * self.read

    def writing(self, x: Tensor) -> Tensor:
        return x * self.write

    def keep(self, chunk: int, state: Tensor) -> Tensor:
        return self.read[chunk, ..., -1:, :] * state

    def log_grad(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        columns: Sequence[tuple[Tensor, Tensor]],
        states: Tensor,
        dstates: Tensor,
    ) -> Tensor | None:
        d = (states * dstates).sum((-2, -1))[..., None]
        d = torch.nn.functional.pad(d, (self.shape[-2] - 1, 0))
        for x, dx in rows:
            d += torch.linalg.vecdot(x, dx)
        for x, dx in columns:
            d -= torch.linalg.vecdot(x, dx)
        return d.flip(-1).cumsum(-1).flip(-1)[..., None].sum_to_size(self.shape)


class ChannelGates(Gates):
    """A decay for each key channel of a token: log decays [C, B, G, L, K], chunks of at most 16 rows.

    With log decays of at least -5, 15 of them from the first row to the last, no power passes e^75, which is
    inside the range of float32.
    """

    def __init__(self, log: Tensor | None) -> None:
        assert log is not None
        total = log.cumsum(-2)
        first = total[..., :1, :]
        # The anchor is the chunk's first row, so that nothing of a later row enters an earlier one.
        self.left = (total - first).exp_()
        self.right = (first - total).exp_()
        self.read = self.left * first.exp()
        self.write = self.right * self.left[..., -1:, :]

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        return ((x * self.left) @ (y * self.right).mT).tril_()

    def gram_adjoint(self, d: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        d = d.tril()
        return (d @ (y * self.right)).mul_(self.left), (d.mT @ (x * self.left)).mul_(self.right)

    def reading(self, x: Tensor) -> Tensor:
        return x * self.read

    def writing(self, x: Tensor) -> Tensor:
        return x * self.write

    def keep(self, chunk: int, state: Tensor) -> Tensor:
        return self.read[chunk, ..., -1, :, None] * state

    def log_grad(
        self,
        rows: Sequence[tuple[Tensor, Tensor]],
        columns: Sequence[tuple[Tensor, Tensor]],
        states: Tensor,
        dstates: Tensor,
    ) -> Tensor | None:
        d = torch.zeros_like(self.read)
        d[..., -1, :] = torch.linalg.vecdot(states, dstates)
        for x, dx in rows:
            d.addcmul_(x, dx)
        for x, dx in columns:
            d.addcmul_(x, dx, value=-1)
        return d.flip(-2).cumsum(-2).flip(-2)
