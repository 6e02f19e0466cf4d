"""What attention keeps of a token, and keys and values made of it.

A memory says what it keeps by name (`kept`), makes it of the tokens of a pass (`entries`), and turns what a pattern
brings back into keys and values (`read`). A cache of [B, heads, slots, channels] for each name is the module's around it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixforge.search_space.parts.attention_position import turned
from mixforge.search_space.parts.layer import Pass, split_heads


class Memory(nn.Module):
    """Abstract."""

    publishes: bool = False
    """Whether layers above read its keys and values."""

    def kept(self) -> dict[str, tuple[int, int]]:
        """Heads and channels of each entry that is kept of a token."""
        raise NotImplementedError

    def entries(self, x_BTD: Tensor, angle: Tensor | None) -> dict[str, Tensor]:
        """Entries [B, H, T, ...] of the tokens of a pass."""
        raise NotImplementedError

    def read(self, entries: dict[str, Tensor], at: Pass) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, K] and values [B, H, S, V] of the tokens whose entries these are."""
        raise NotImplementedError


class KeysValues(Memory):
    """Keys and values of `heads` heads, kept as they are; with `publishes`, for layers above as well."""

    def __init__(
        self, width: int, heads: int, head_dim: int, norm: nn.Module | None, publishes: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.publishes = publishes
        self.key = nn.Linear(width, heads * head_dim, bias=False)
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        self.norm = norm

    def kept(self) -> dict[str, tuple[int, int]]:
        return {"key": (self.heads, self.head_dim), "value": (self.heads, self.head_dim)}

    def entries(self, x_BTD: Tensor, angle: Tensor | None) -> dict[str, Tensor]:
        k_BTHK = split_heads(self.key(x_BTD), self.heads)
        v_BTHK = split_heads(self.value(x_BTD), self.heads)
        if self.norm is not None:
            k_BTHK = self.norm(k_BTHK)
        return {"key": turned(k_BTHK, angle).transpose(1, 2), "value": v_BTHK.transpose(1, 2)}

    def read(self, entries: dict[str, Tensor], at: Pass) -> tuple[Tensor, Tensor]:
        return entries["key"], entries["value"]


class Borrowed(Memory):
    """The keys and values that a layer below has published. Nothing is kept."""

    def kept(self) -> dict[str, tuple[int, int]]:
        return {}

    def entries(self, x_BTD: Tensor, angle: Tensor | None) -> dict[str, Tensor]:
        return {}

    def read(self, entries: dict[str, Tensor], at: Pass) -> tuple[Tensor, Tensor]:
        k_BHSK, v_BHSK = at.shared["cache"]
        return k_BHSK, v_BHSK
