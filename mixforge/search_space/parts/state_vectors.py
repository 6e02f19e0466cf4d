"""The S state vectors of a block-recurrent layer: what tokens see of them, and how a block of tokens changes them.

A change reads what was noted of the block's tokens. Tokens of a sequence are noted a block at a time (`note`); with a
state, tokens are noted as they come (`keep`), under the same names. Equations and sources: see `mixers.blockrec`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.decay import exact
from mixforge.search_space.parts.dense import Dense
from mixforge.search_space.parts.layer import split_heads


class StateVectors(nn.Module):
    """S vectors [B, S, D]. Abstract."""

    def __init__(
        self, width: int, heads: int, head_dim: int, states: int, norm: nn.Module, parts: int
    ) -> None:
        super().__init__()
        self.heads = heads
        self.parts = parts
        self.first = nn.Parameter(torch.randn(states, width))
        self.identity = nn.Parameter(torch.randn(states, width) * 0.02)
        self.norm = norm
        self.project = Dense(width, parts * heads * head_dim, bias=False)

    def ask(self, c_BSD: Tensor) -> list[Tensor]:
        """Keys and values of the states, and what else a change needs of them, each [B, H, S, K]."""
        parts = self.project(self.norm(c_BSD + self.identity)).chunk(self.parts, -1)
        return [split_heads(part, self.heads).transpose(1, 2) for part in parts]

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """What is noted of a block's tokens beside their values, with room for `slots` of them."""
        raise NotImplementedError

    def note(
        self, x_BLD: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, before: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """Of a whole block: its inputs, keys, which are not rotated, and values; and what was noted of the one before."""
        raise NotImplementedError

    def keep(self, state: dict[str, Tensor], x_BTD: Tensor, k_BHTK: Tensor, place_T: Tensor) -> None:
        """Of some tokens of one block, from their places in it. The state is brought up to date in place."""
        raise NotImplementedError

    def after(self, c_BSD: Tensor, asked: list[Tensor], noted: Mapping[str, Tensor]) -> Tensor:
        """The states after a block."""
        raise NotImplementedError


class AttendingStates(StateVectors):
    """States that read one another and the block: c = g c + (1 - g) (U h + b)."""

    def __init__(self, width: int, heads: int, head_dim: int, states: int, norm: nn.Module) -> None:
        super().__init__(width, heads, head_dim, states, norm, 4)
        self.head_dim = head_dim
        self.change = Dense(2 * heads * head_dim, width)
        self.gate = nn.Parameter(torch.ones(width))

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        shape = (batch, self.heads, slots, self.head_dim)
        return {"plain_key": torch.zeros(shape, device=device, dtype=dtype)}

    def note(
        self, x_BLD: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, before: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        return {"plain_key": k_BHLK, "value": v_BHLV}

    def keep(self, state: dict[str, Tensor], x_BTD: Tensor, k_BHTK: Tensor, place_T: Tensor) -> None:
        state["plain_key"].index_copy_(2, place_T, k_BHTK)

    def after(self, c_BSD: Tensor, asked: list[Tensor], noted: Mapping[str, Tensor]) -> Tensor:
        k, v, q, p = asked
        read = torch.cat([attend(q, k, v, None), attend(p, noted["plain_key"], noted["value"], None)], -1)
        keep = torch.sigmoid(self.gate)
        change_BSD: Tensor = self.change(read.transpose(1, 2).flatten(2))
        return keep * c_BSD + (1 - keep) * change_BSD


class GatedCache(StateVectors):
    """A recurrent unit for each state, whose input is the last token of one of S stretches of the block.

    Of a block that is shorter than S each token is the input of several states.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        states: int,
        norm: nn.Module,
        block: int,
        change_norm: nn.Module,
    ) -> None:
        super().__init__(width, heads, head_dim, states, norm, 2)
        self.block = block
        self.kept = min(states, block)
        self.gates = Dense(2 * width, 2 * width)
        self.change = Dense(2 * width, width)
        self.change_norm = change_norm

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        shape = (batch, self.kept, self.first.shape[1])
        return {"picked": torch.zeros(shape, device=device, dtype=dtype)}

    def note(
        self, x_BLD: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, before: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        begin_S = torch.arange(1, self.kept + 1, device=x_BLD.device) * self.block
        return {"picked": x_BLD[:, (begin_S + self.kept - 1) // self.kept - 1]}

    def keep(self, state: dict[str, Tensor], x_BTD: Tensor, k_BHTK: Tensor, place_T: Tensor) -> None:
        stretch_T = place_T * self.kept // self.block
        if x_BTD.shape[1] > 1:
            # No slot is written twice at once.
            is_last_T = F.pad(stretch_T[1:] != stretch_T[:-1], (0, 1), value=True)
            stretch_T, x_BTD = stretch_T[is_last_T], x_BTD[:, is_last_T]
        state["picked"].index_copy_(1, stretch_T, x_BTD)

    def after(self, c_BSD: Tensor, asked: list[Tensor], noted: Mapping[str, Tensor]) -> Tensor:
        states = c_BSD.shape[1]
        x_BSD = noted["picked"][:, torch.arange(states, device=c_BSD.device) * self.kept // states]
        reset, update = torch.sigmoid(self.gates(torch.cat([c_BSD, x_BSD], -1))).chunk(2, -1)
        change_BSD: Tensor = self.change_norm(F.gelu(self.change(torch.cat([reset * c_BSD, x_BSD], -1))))
        kept_BSD: Tensor = (1 - update) * c_BSD
        return kept_BSD + update * change_BSD


class GatedQueue(StateVectors):
    """First in, first out: the mean of a block enters through a gate beside the newest state, the oldest leaves."""

    def __init__(
        self, width: int, heads: int, head_dim: int, states: int, norm: nn.Module, block: int
    ) -> None:
        super().__init__(width, heads, head_dim, states, norm, 2)
        self.block = block
        self.gate = Dense(2 * width, width)

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return {"sum": torch.zeros(batch, self.first.shape[1], device=device, dtype=exact)}

    def note(
        self, x_BLD: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, before: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        exact = torch.float64 if x_BLD.dtype == torch.float64 else torch.float32
        return {"sum": x_BLD.sum(1, dtype=exact)}

    def keep(self, state: dict[str, Tensor], x_BTD: Tensor, k_BHTK: Tensor, place_T: Tensor) -> None:
        # The first token of a block begins anew.
        state["sum"].mul_(place_T[:1] > 0).add_(x_BTD.sum(1, dtype=state["sum"].dtype))

    def after(self, c_BSD: Tensor, asked: list[Tensor], noted: Mapping[str, Tensor]) -> Tensor:
        mean_BD = (noted["sum"] / self.block).to(c_BSD.dtype)
        newest_BD = c_BSD[:, -1]
        gate = torch.sigmoid(self.gate(torch.cat([newest_BD, mean_BD], -1)))
        entry_BD = gate * mean_BD + (1 - gate) * newest_BD
        return torch.cat([c_BSD[:, 1:], entry_BD[:, None]], 1)


class FilteredStates(StateVectors):
    """What each of S filters over all tokens so far says of the last token of a block.

    A filter is a diagonal state space: `numbers` / 2 pairs of poles of its own, the same for every channel, and weights
    for each of them and each channel.
    """

    def __init__(
        self, width: int, heads: int, head_dim: int, states: int, norm: nn.Module, numbers: int
    ) -> None:
        super().__init__(width, heads, head_dim, states, norm, 2)
        pairs = numbers // 2
        self.step_size = nn.Parameter(torch.empty(states).uniform_(math.log(0.001), math.log(0.1)))
        self.rate = nn.Parameter(torch.full((states, pairs), math.log(0.5)))
        self.frequency = nn.Parameter((math.pi * torch.arange(pairs)).repeat(states, 1))
        # Channels first, for no weight is summed over them (`scaling.rate_factors`).
        self.weight = nn.Parameter(torch.randn(width, states, pairs, 2) / math.sqrt(2))
        self.skip = nn.Parameter(torch.randn(width, states))
        self.planes = (2, states, pairs)

    def initial_state(
        self, batch: int, slots: int, device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        held = torch.float64 if dtype == torch.float64 else torch.float32
        width = len(self.weight)
        return {
            "hidden": torch.zeros(batch, *self.planes, width, device=device, dtype=held),
            "last": torch.zeros(batch, width, device=device, dtype=dtype),
        }

    def note(
        self, x_BLD: Tensor, k_BHLK: Tensor, v_BHLV: Tensor, before: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        return {
            "hidden": self.read(x_BLD, None if before is None else before["hidden"]),
            "last": x_BLD[:, -1],
        }

    def keep(self, state: dict[str, Tensor], x_BTD: Tensor, k_BHTK: Tensor, place_T: Tensor) -> None:
        state["hidden"].copy_(self.read(x_BTD, state["hidden"]))
        state["last"].copy_(x_BTD[:, -1])

    def read(self, x_BTD: Tensor, hidden: Tensor | None) -> Tensor:
        """h = a h + x, token after token: [B, 2, S, P, D] after the last one, as real and imaginary planes."""
        x_BTD = exact(x_BTD)
        power_SPT = self.powers(torch.arange(x_BTD.shape[1], -1, -1, device=x_BTD.device))
        written = torch.view_as_real(power_SPT[..., 1:]).movedim(-1, 0).flatten(0, 2) @ x_BTD
        after: Tensor = torch.unflatten(written, 1, self.planes)
        if hidden is None:
            return after
        whole = torch.view_as_real(power_SPT[..., 0])[..., None]
        real, imaginary = whole[..., 0, :], whole[..., 1, :]
        turned = [
            hidden[:, 0] * real - hidden[:, 1] * imaginary,
            hidden[:, 0] * imaginary + hidden[:, 1] * real,
        ]
        return after + torch.stack(turned, 1)

    def poles(self) -> tuple[Tensor, Tensor]:
        """dt Re A and dt Im A [S, P]."""
        dt_S1 = exact(self.step_size).exp()[:, None]
        return -dt_S1 * exact(self.rate).exp(), dt_S1 * exact(self.frequency)

    def powers(self, exponent_T: Tensor) -> Tensor:
        """exp(n dt A) [S, P, T], complex."""
        rate_SP, angle_SP = self.poles()
        exponent_T = exponent_T.to(rate_SP.dtype)
        return torch.polar((rate_SP[..., None] * exponent_T).exp(), angle_SP[..., None] * exponent_T)

    def after(self, c_BSD: Tensor, asked: list[Tensor], noted: Mapping[str, Tensor]) -> Tensor:
        rate_SP, angle_SP = self.poles()
        # (exp(dt A) - 1) / A, which is what holding an input for dt gives, times the weights.
        held_SP = (torch.polar(rate_SP.exp(), angle_SP) - 1) / torch.complex(rate_SP, angle_SP)
        held_SP = held_SP * exact(self.step_size).exp()[:, None]
        weight = exact(self.weight).permute(3, 1, 2, 0)
        first, second = held_SP.real[..., None], held_SP.imag[..., None]
        real, imaginary = weight[0] * first - weight[1] * second, weight[0] * second + weight[1] * first
        said_BSD = 2 * (noted["hidden"][:, 0] * real - noted["hidden"][:, 1] * imaginary).sum(2)
        said_BSD = said_BSD + exact(self.skip).T * exact(noted["last"])[:, None]
        return said_BSD.to(c_BSD.dtype)
