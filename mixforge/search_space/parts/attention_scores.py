"""From queries, keys and values to the outputs of the heads.

`Fused` is softmax attention by the fused operation of the pattern, without anything added to a score.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mixforge.kernels.attention import attend
from mixforge.search_space.parts.attention_pattern import Pattern


@dataclass
class Sight:
    """What the scores of a pass may depend on beside queries and keys.

    query_T, key_S: positions of the queries and of the keys; a key's below 0 says that its slot is empty.
    pattern: which pairs are seen. entries: what is kept of the tokens at `key_S`, by name, [B, H or 1, S, ...].
    present: the same of the queries' tokens.
    """

    query_T: Tensor
    key_S: Tensor
    pattern: Pattern
    entries: dict[str, Tensor]
    present: dict[str, Tensor]


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
        seen = sight.pattern.sees(sight.query_T, sight.key_S)
        return attend(q_BHTK, k_BHSK, v_BHSV, seen, scale=self.scale)
