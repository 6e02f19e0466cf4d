"""How a decay scales the products inside a chunk and the states between chunks.

With G the running sum of the log decays in a chunk of L tokens, and g' the log decay of its first row:

    gram(X, Y)_ij = sum_c X_ic Y_jc e^(G_ic - G_jc) for i >= j, else 0
    reading(X) = X e^G                  what row i reads of the state before the chunk
    writing(X) = X e^(G_L - G)          what row i leaves in the state after it
    keep(S) = e^(G_L) S

No decay has the lower triangle of X Y^T and nothing else. Scalar decays multiply it by all pairs e^(G_i - G_j).
Channel decays need no pairs: rows(X) = X e^(G - g') and columns(Y) = Y e^(g' - G) are scaled once, and their
product is the gram. The states are then held as e^(g') S, so that what reads them are rows(X) themselves.

Tensors are [C, B, G, R, L, *]: chunks, batch, heads, roles (such as q and k, which are scaled alike), rows of a
chunk. Log decays are [C, B, G, 1, L, 1 or K], or with a batch of 1 where every sequence has the same.

Source: Yang et al. 2023 (arXiv 2312.06635, section 4). Departures: the exponents of scalar decays are
differences that are cut before the exponential; channel decays take the chunk's first row as their anchor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Exponents are cut here: e^-60 is nothing beside the rounding of a float64, and a smaller power would make
# denormal numbers, on which a CPU is up to eighty times slower.
FLOOR = -60.0


class Gates(ABC):
    """The scalings of all chunks under one decay. Each is its own adjoint."""

    # The factors of `reading`, [C, B, G, 1, L, 1]; None where rows need none.
    read: Tensor | None = None

    @staticmethod
    @abstractmethod
    def powers(log: Tensor | None) -> tuple[Tensor, ...]:
        """What takes long to make of the log decays: once for all chunks, and kept for the adjoint."""

    @abstractmethod
    def __init__(self, *powers: Tensor) -> None:
        """From the powers of some chunks."""

    @abstractmethod
    def rows(self, x: Tensor, out: Tensor) -> Tensor:
        """What enters a gram as X. Fills and returns `out`, which may be x."""

    @abstractmethod
    def columns(self, x: Tensor, out: Tensor) -> Tensor:
        """What enters a gram as Y. Fills and returns `out`, which may be x."""

    @abstractmethod
    def scale_(self, products: Tensor) -> Tensor:
        """The products of rows and columns, [C * B * G, R * L, L], made grams in place, up to their diagonals."""

    def mask_(self, products: Tensor) -> Tensor:
        """As `scale_`, with zeros above the diagonal."""
        # No product with zeros: what is above the diagonal may be infinite, where later tokens are not to be read.
        size = products.shape[2]
        self.scale_(products).view(-1, size, size).tril_()
        return products

    @abstractmethod
    def reading(self, x: Tensor, out: Tensor) -> Tensor:
        """From rows(X), what reads the state: in `out`, which may be x, or where nothing changes x itself."""

    @abstractmethod
    def writing(self, x: Tensor, out: Tensor) -> Tensor:
        """From columns(X), what is left in the state: as `reading`."""

    @abstractmethod
    def enter(self, state: Tensor) -> Tensor:
        """The state before the first chunk, as the chunk reads it. May return the state itself."""

    @abstractmethod
    def keeps(self, states: Tensor) -> Sequence[Tensor | None]:
        """For each chunk, the factor of its state [B * G, K, V], [B * G, K or 1, 1]; None for one."""

    @abstractmethod
    def log_grad(self, along: Tensor, states: Tensor, dstates: Tensor, out: Tensor) -> None:
        """Fills `out` with the gradient of the log decays. Uses `along` and `dstates` up.

        From x * dx of all rows less that of columns, which may be summed over channels that have one decay.
        """


class PlainGates(Gates):
    """No decay."""

    @staticmethod
    def powers(log: Tensor | None) -> tuple[Tensor, ...]:
        return ()

    def __init__(self, *powers: Tensor) -> None:
        pass

    def rows(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    def columns(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    def scale_(self, products: Tensor) -> Tensor:
        return products

    def reading(self, x: Tensor, out: Tensor) -> Tensor:
        return x

    def writing(self, x: Tensor, out: Tensor) -> Tensor:
        return x

    def enter(self, state: Tensor) -> Tensor:
        return state

    def keeps(self, states: Tensor) -> Sequence[Tensor | None]:
        return [None] * (len(states) - 1)

    def log_grad(self, along: Tensor, states: Tensor, dstates: Tensor, out: Tensor) -> None:
        raise AssertionError("there is no decay to have a gradient")


class ScalarGates(Gates):
    """One decay for all key channels of a token: log decays [C, B or 1, G, 1, L, 1], of any size."""

    read: Tensor

    @staticmethod
    def powers(log: Tensor | None) -> tuple[Tensor, ...]:
        """e^(G_i - G_j) for i >= j, else 0; e^G; e^(G_L - G); e^(G_L)."""
        assert log is not None
        # Summed in float64 and differenced as two parts: after a decay of -1000 a float32 sum would leave the
        # later pairs with a relative error of 1e-4.
        total = log.double().cumsum(-2)
        high = total.to(log.dtype)
        low = (total - high).to(log.dtype)
        pairs = high - high.mT
        pairs += low
        pairs -= low.mT
        write = (total[..., -1:, :] - total).clamp_(min=FLOOR).exp_().to(log.dtype)
        read = total.clamp_(min=FLOOR).exp_().to(log.dtype)
        # A product with ones takes a third of the time of `tril_`, and no power is infinite.
        below = log.new_ones(pairs.shape[-2:]).tril_()
        return pairs.clamp_(FLOOR, 0).exp_().mul_(below), read, write, read[:, :, :, 0, -1:].clone()

    def __init__(self, *powers: Tensor) -> None:
        self.pairs, self.read, self.write, self.kept = powers

    def rows(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    def columns(self, x: Tensor, out: Tensor) -> Tensor:
        return out.copy_(x)

    def scale_(self, products: Tensor) -> Tensor:
        chunks, _, heads, _, size, _ = self.pairs.shape
        products.view(chunks, -1, heads, products.shape[1] // size, size, size).mul_(self.pairs)
        return products

    def mask_(self, products: Tensor) -> Tensor:
        # The pairs are zeros there.
        return self.scale_(products)

    def reading(self, x: Tensor, out: Tensor) -> Tensor:
        return fill(out, torch.mul, x, self.read)

    def writing(self, x: Tensor, out: Tensor) -> Tensor:
        return fill(out, torch.mul, x, self.write)

    def enter(self, state: Tensor) -> Tensor:
        return state

    def keeps(self, states: Tensor) -> Sequence[Tensor | None]:
        kept = self.kept.expand(-1, states.shape[1], -1, -1, -1)
        # Chunks that have one decay share one factor in memory.
        return each_state(kept) if kept.stride(0) else [kept[0].flatten(0, 1)] * len(kept)

    def log_grad(self, along: Tensor, states: Tensor, dstates: Tensor, out: Tensor) -> None:
        d = along.sum_to_size(*along.shape[:-1], 1)
        last = d[..., 0, -1, 0]
        last += dstates[1:].mul_(states[1:]).sum((-2, -1))
        out.copy_(d.sum_to_size(out.shape).flip(-2).cumsum(-2).flip(-2))


class ChannelGates(Gates):
    """A decay for each key channel of a token: log decays [C, B, G, 1, L, K], chunks of at most 16 rows.

    With log decays of at least -5, 15 of them from the first row to the last, no power passes e^75, which is
    inside the range of float32.
    """

    @staticmethod
    def powers(log: Tensor | None) -> tuple[Tensor, ...]:
        """e^(G - g'); e^g'; their product from one chunk's first row to the next one's.

        The anchor is the chunk's first row, so that nothing of a later row enters an earlier one.
        """
        assert log is not None
        total = torch.empty(log.shape, dtype=log.dtype, device=log.device)
        # Row after row, which takes a third of the time of `cumsum`.
        sums = total.unbind(-2)
        sums[0].zero_()
        for row, before, now in zip(log.unbind(-2)[1:], sums[:-1], sums[1:], strict=True):
            fill(now, torch.add, before, row)
        left, first = total.exp_(), log[:, :, :, 0, 0, :, None].exp()
        kept = left[..., 0, -1, :, None].clone()
        kept[:-1] *= first[1:]
        return left, first, kept

    def __init__(self, *powers: Tensor) -> None:
        self.left, self.first, self.kept = powers
        self.right = self.left.reciprocal()

    def rows(self, x: Tensor, out: Tensor) -> Tensor:
        return fill(out, torch.mul, x, self.left)

    def columns(self, x: Tensor, out: Tensor) -> Tensor:
        return fill(out, torch.mul, x, self.right)

    def scale_(self, products: Tensor) -> Tensor:
        return products

    def reading(self, x: Tensor, out: Tensor) -> Tensor:
        return x

    def writing(self, x: Tensor, out: Tensor) -> Tensor:
        return fill(out, torch.mul, x, self.kept.mT.unsqueeze(3))

    def enter(self, state: Tensor) -> Tensor:
        return state * self.first[0]

    def keeps(self, states: Tensor) -> Sequence[Tensor | None]:
        return each_state(self.kept.expand(-1, states.shape[1], -1, -1, -1))

    def log_grad(self, along: Tensor, states: Tensor, dstates: Tensor, out: Tensor) -> None:
        ends = torch.linalg.vecdot(states, dstates).unsqueeze(3)
        *into, last = out.unbind(-2)
        *of_rows, of_last = along.unbind(-2)
        fill(last, torch.add, ends[1:], of_last)
        for row, of_row in zip(reversed(into[1:]), reversed(of_rows[1:]), strict=True):
            last = fill(row, torch.add, last, of_row)
        into[0].copy_(ends[:-1])


def each_state(states: Tensor) -> tuple[Tensor, ...]:
    """Of states [C, B, G, *, *], those of each chunk as matrices [B * G, *, *]."""
    return states.flatten(1, 2).unbind()


def fill(out: Tensor, operation: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """Fill `out`, of any strides, with operation(*x), and return it."""
    # torch.compile refuses `out=` where the tensor is not contiguous.
    return out.copy_(operation(*x)) if torch.compiler.is_compiling() else operation(*x, out=out)
