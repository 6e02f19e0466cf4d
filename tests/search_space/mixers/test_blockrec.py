"""Block-recurrent attention against the paper's two directions, written out block by block and head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixforge.search_space.mixers.blockrec import Blockrec
from mixforge.search_space.parts.block_recurrence import BlockRecurrence
from mixforge.search_space.parts.layer import Pass

WIDTH, HEADS, DIM, WINDOW, STATES = 12, 3, 4, 5, 3


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary position of one head's channels."""
    half = DIM // 2
    out = x.clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / DIM)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attended(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = torch.softmax(torch.stack([query @ key for key in keys]) / math.sqrt(DIM), 0)
    return (weights[:, None] * torch.stack(values)).sum(0)


@torch.no_grad()
def test_tokens_and_states_read_one_another() -> None:
    torch.manual_seed(0)
    mixer = Blockrec(heads=HEADS, head_dim=DIM, window=WINDOW, states=STATES)
    module: BlockRecurrence = mixer.build(WIDTH, "torch").build().double()
    vectors = module.vectors
    vectors.gate.normal_()
    vectors.norm.weight.normal_()  # type: ignore[operator,union-attr]
    x_TD = torch.randn(13, WIDTH, dtype=torch.float64)

    def parts(weight: Tensor, x: Tensor) -> list[list[Tensor]]:
        """Keys, values, and the two queries of one row, each by heads."""
        rows = (weight @ x).reshape(4, HEADS, DIM)
        return [list(part) for part in rows]

    c = [each.clone() for each in vectors.first]
    expected = []
    tokens = [parts(module.project.weight, x) for x in x_TD]
    for begin in range(0, 13, WINDOW):
        block = range(begin, min(begin + WINDOW, 13))
        asked = []
        for vector, identity in zip(c, vectors.identity, strict=True):
            row = vector + identity
            normed = row / torch.sqrt((row**2).mean() + 1e-6) * vectors.norm.weight
            asked.append(parts(vectors.project.weight, normed))
        for t in block:
            seen = range(max(0, t - WINDOW + 1), t + 1)
            heads = []
            for h in range(HEADS):
                plain_query = tokens[t][2][h]
                keys = [turned(tokens[s][0][h], s) for s in seen]
                own = attended(turned(plain_query, t), keys, [tokens[s][1][h] for s in seen])
                state = attended(tokens[t][3][h], [a[0][h] for a in asked], [a[1][h] for a in asked])
                heads.append(torch.cat([own, state]))
            expected.append(module.out.weight @ torch.cat(heads))
        after = []
        for vector, mine in zip(c, asked, strict=True):
            heads = []
            for h in range(HEADS):
                among = attended(mine[2][h], [a[0][h] for a in asked], [a[1][h] for a in asked])
                read = attended(
                    mine[3][h], [tokens[t][0][h] for t in block], [tokens[t][1][h] for t in block]
                )
                heads.append(torch.cat([among, read]))
            change = vectors.change.weight @ torch.cat(heads) + vectors.change.bias
            keep = torch.sigmoid(vectors.gate)
            after.append(keep * vector + (1 - keep) * change)
        c = after
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(13), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(expected))


def test_an_odd_head_is_refused() -> None:
    reason = Blockrec(heads=2, head_dim=5).why_illegal(16)
    assert reason == "rotary positions need an even head_dim, not 5 (mixer blockrec)"
    assert "legal heads: 1, 2, 4" in (Blockrec(heads=3).why_illegal(16) or "")
