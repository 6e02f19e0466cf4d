"""Mixers beside one another in one residual unit, and the ways of making one output of theirs.

Sources: Dong et al. 2024 (arXiv 2411.13676), equation 3, for `mean`; Zuo et al. 2025 (arXiv 2507.22448) for
`sum` and `concat` of attention and state-space branches; Lan et al. 2025 (arXiv 2503.01496), equation 8, for
`scalar`, here with learned weights that begin at one part each; Pilault et al. 2023 (arXiv 2306.09539), figure 1, for
branches that read the others' outputs and alone are the output (`read`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import Pass, TokenMixer


class Beside(TokenMixer):
    """Branches that read the same input. Their states share a dictionary, as `0.key`, `1.matrix`.

    readers: the indices of those that also read the context, which is the sum of what the others say.
    """

    def __init__(self, branches: Sequence[TokenMixer], fuse: nn.Module, readers: Sequence[int] = ()) -> None:
        super().__init__()
        self.readers = list(readers)
        self.order = [index for index in range(len(branches)) if index not in readers] + self.readers
        self.branches = nn.ModuleList(branches)
        self.fuse = fuse

    def branch(self, index: int) -> TokenMixer:
        branch = self.branches[index]
        assert isinstance(branch, TokenMixer)
        return branch

    def initial_state(
        self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for index in range(len(self.branches)):
            state |= prefixed(index, self.branch(index).initial_state(batch, capacity, device, dtype))
        return state

    def forward(
        self, x_BTD: Tensor, state: dict[str, Tensor] | None, at: Pass
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        outputs: dict[int, Tensor] = {}
        after: dict[str, Tensor] = {}
        for index in self.order:
            if index in self.readers:
                at.shared["context"] = (self.context(outputs),)
            mine = None if state is None else without_prefix(index, state)
            outputs[index], new = self.branch(index)(x_BTD, mine, at)
            after |= prefixed(index, new or {})
        return self.fuse(x_BTD, in_order(outputs)), None if state is None else after

    def step(self, x_BD: Tensor, state: dict[str, Tensor], at: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: dict[int, Tensor] = {}
        after: dict[str, Tensor] = {}
        for index in self.order:
            if index in self.readers:
                at.shared["context"] = (self.context(outputs)[:, None],)
            outputs[index], new = self.branch(index).step(x_BD, without_prefix(index, state), at)
            after |= prefixed(index, new)
        return self.fuse(x_BD, in_order(outputs)), after

    def context(self, outputs: dict[int, Tensor]) -> Tensor:
        """The sum of what the branches say that read no context."""
        return torch.stack([y for index, y in outputs.items() if index not in self.readers]).sum(0)

    def between(self, state: dict[str, Tensor], length: int) -> None:
        for index in range(len(self.branches)):
            self.branch(index).between(without_prefix(index, state), length)


def prefixed(branch: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A branch's state as a part of the whole."""
    return {f"{branch}.{name}": tensor for name, tensor in state.items()}


def without_prefix(branch: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of the whole that is a branch's state."""
    prefix = f"{branch}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def in_order(outputs: dict[int, Tensor]) -> list[Tensor]:
    """The branches' outputs by their indices."""
    return [outputs[index] for index in range(len(outputs))]


class SumFuse(nn.Module):
    """y = sum of the branches."""

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return torch.stack(outputs).sum(0)


class MeanFuse(nn.Module):
    """y = mean over the branches of norm_i(y_i), each with its own learned scale."""

    def __init__(self, norms: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return torch.stack([norm(y) for norm, y in zip(self.norms, outputs, strict=True)]).mean(0)


class NormedFuse(nn.Module):
    """y = fuse(norm_1(y_1), ..., norm_n(y_n)), each norm with its own learned scale."""

    def __init__(self, norms: list[nn.Module], fuse: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norms)
        self.fuse = fuse

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        y: Tensor = self.fuse(x, [norm(y) for norm, y in zip(self.norms, outputs, strict=True)])
        return y


class ScalarFuse(nn.Module):
    """y = sum_i a_i y_i, with one learned number for each branch."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((branches,), 1 / branches))

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return (torch.stack(outputs, -1) * self.weights).sum(-1)


class GateFuse(nn.Module):
    """y = sum_i softmax_i(W x) y_i, with one weight for each token and branch."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.gate = Dense(width, branches, bias=False)

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        share = self.gate(x).softmax(-1)
        y: Tensor = (torch.stack(outputs, -2) * share[..., None]).sum(-2)
        return y


class ConcatFuse(nn.Module):
    """y = W [y_1; ...; y_n]. W starts as n identities: the sum of the branches."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.mix = Dense(branches * width, width, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.eye(width).repeat(1, branches))

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        y: Tensor = self.mix(torch.cat(outputs, -1))
        return y


class ReadFuse(nn.Module):
    """y = sum of the branches that read the context."""

    def __init__(self, readers: Sequence[int]) -> None:
        super().__init__()
        self.readers = list(readers)

    def forward(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return torch.stack([outputs[index] for index in self.readers]).sum(0)
