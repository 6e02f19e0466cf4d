"""Block-recurrent attention against the papers' updates of states, written out block by block and head by head."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mixforge.search_space.genes import Form
from mixforge.search_space.mixers.blockrec import Blockrec
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.beside import Beside
from mixforge.search_space.parts.block_recurrence import BlockRecurrence
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.state_vectors import AttendingStates, FilteredStates, GatedCache, GatedQueue
from mixforge.search_space.scaling import rate_factors

Change = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
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


def parts(weight: Tensor, x: Tensor) -> list[list[Tensor]]:
    """Keys, values, and where there are any the two queries of one row, each by heads."""
    return [list(part) for part in (weight @ x).reshape(-1, HEADS, DIM)]


def normed(row: Tensor, norm: nn.Module) -> Tensor:
    assert isinstance(norm.weight, Tensor)
    return row / torch.sqrt((row**2).mean() + 1e-6) * norm.weight


@torch.no_grad()
def test_tokens_and_states_read_one_another() -> None:
    torch.manual_seed(0)
    mixer = Blockrec(heads=HEADS, head_dim=DIM, window=WINDOW, states=STATES)
    module: BlockRecurrence = mixer.build(WIDTH, "torch").build().double()
    vectors = module.vectors
    assert isinstance(vectors, AttendingStates)
    vectors.gate.normal_()
    vectors.norm.weight.normal_()  # type: ignore[operator,union-attr]
    x_TD = torch.randn(13, WIDTH, dtype=torch.float64)
    c = [each.clone() for each in vectors.first]
    expected = []
    tokens = [parts(module.project.weight, x) for x in x_TD]
    for begin in range(0, 13, WINDOW):
        block = range(begin, min(begin + WINDOW, 13))
        asked = []
        for vector, identity in zip(c, vectors.identity, strict=True):
            normed_row = normed(vector + identity, vectors.norm)
            asked.append(parts(vectors.project.weight, normed_row))
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


def read_in_chunks(module: BlockRecurrence, x_TD: Tensor, change: Change) -> Tensor:
    """Each token reads its own chunk up to itself and the slots, a share of the latter for each head."""
    vectors, slots, expected = module.vectors, list(module.vectors.first), []
    assert module.share is not None
    tokens = [parts(module.project.weight, x) for x in x_TD]
    for begin in range(0, len(x_TD), WINDOW):
        chunk = range(begin, min(begin + WINDOW, len(x_TD)))
        asked = [
            parts(vectors.project.weight, normed(slot + identity, vectors.norm))
            for slot, identity in zip(slots, vectors.identity, strict=True)
        ]
        for t in chunk:
            heads = []
            for h in range(HEADS):
                keys = [turned(tokens[s][0][h], s) for s in range(begin, t + 1)]
                values = [tokens[s][1][h] for s in range(begin, t + 1)]
                own = attended(turned(tokens[t][2][h], t), keys, values)
                memory = attended(tokens[t][3][h], [a[0][h] for a in asked], [a[1][h] for a in asked])
                share = 1 / (1 + torch.exp(-module.share[h]))
                heads.append(share * memory + (1 - share) * own)
            expected.append(module.out.weight @ torch.cat(heads))
        if len(chunk) == WINDOW:
            slots = change(slots, [x_TD[t] for t in chunk])
    return torch.stack(expected)


@pytest.mark.parametrize("states", [3, 5, 7])
@torch.no_grad()
def test_a_gated_recurrent_cache_is_that_of_the_cached_transformer(states: int) -> None:
    torch.manual_seed(0)
    mixer = Blockrec(HEADS, DIM, WINDOW, states, **Blockrec.aliases["grc"])  # type: ignore[arg-type]
    module: BlockRecurrence = mixer.build(WIDTH, "torch").build().double()
    cache = module.vectors
    assert isinstance(cache, GatedCache)
    for norm in (cache.norm, cache.change_norm):
        norm.weight.normal_()  # type: ignore[operator,union-attr]

    def change(slots: list[Tensor], chunk: list[Tensor]) -> list[Tensor]:
        # The last token of each of 3 stretches of 5; each token once; 7 slots of 5 tokens, nearest from below.
        picked = {3: [1, 3, 4], 5: [0, 1, 2, 3, 4], 7: [0, 0, 1, 2, 2, 3, 4]}[len(slots)]
        after = []
        for slot, place in zip(slots, picked, strict=True):
            x = chunk[place]
            gates = torch.sigmoid(cache.gates.weight @ torch.cat([slot, x]) + cache.gates.bias)
            reset, update = gates[:WIDTH], gates[WIDTH:]
            row = cache.change.weight @ torch.cat([reset * slot, x]) + cache.change.bias
            gelu = row * (1 + torch.erf(row / math.sqrt(2))) / 2
            after.append((1 - update) * slot + update * normed(gelu, cache.change_norm))
        return after

    x_TD = torch.randn(13, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(13), 0))
    torch.testing.assert_close(y_BTD[0], read_in_chunks(module, x_TD, change))


def queued(queue: nn.Module) -> Change:
    assert isinstance(queue, GatedQueue)

    def change(slots: list[Tensor], chunk: list[Tensor]) -> list[Tensor]:
        mean = torch.stack(chunk).mean(0)
        gate = torch.sigmoid(queue.gate.weight @ torch.cat([slots[-1], mean]) + queue.gate.bias)
        return [*slots[1:], gate * mean + (1 - gate) * slots[-1]]

    return change


@torch.no_grad()
def test_a_gated_queue_takes_the_mean_of_a_chunk_and_drops_the_oldest() -> None:
    torch.manual_seed(0)
    mixer = Blockrec(HEADS, DIM, WINDOW, STATES, **Blockrec.aliases["gated_fifo"])  # type: ignore[arg-type]
    module: BlockRecurrence = mixer.build(WIDTH, "torch").build().double()
    module.vectors.norm.weight.normal_()  # type: ignore[operator,union-attr]
    x_TD = torch.randn(23, WIDTH, dtype=torch.float64)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(23), 0))
    torch.testing.assert_close(y_BTD[0], read_in_chunks(module, x_TD, queued(module.vectors)))


@torch.no_grad()
def test_attention_to_all_tokens_is_read_beside_a_chunk_and_a_queue() -> None:
    """The three paths of arXiv 2507.00453: in one block, each with a matrix of its outputs, of which there is one sum."""
    heads = f"heads={HEADS}, head_dim={DIM}"
    text = f"beside(attn({heads}), gated_fifo({heads}, window={WINDOW}, states={STATES}))"
    model = parse(f"lm({text}, width={WIDTH}, vocab=11)").build(dtype=torch.float64)
    block = model.stack.units[0].mixer  # type: ignore[union-attr,index]
    assert isinstance(block, Beside)
    (near,) = [each for each in block.branches if isinstance(each, BlockRecurrence)]
    (far,) = [each for each in block.branches if each is not near]
    x_TD = torch.randn(23, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w = dict(far.named_parameters())
    query, key, value = (
        [(w[name] @ x).reshape(HEADS, DIM) for x in x_TD]
        for name in ("queries.query.weight", "memory.key.weight", "memory.value.weight")
    )
    expected = []
    for t in range(23):
        said = [
            attended(
                turned(query[t][h], t),
                [turned(key[s][h], s) for s in range(t + 1)],
                [value[s][h] for s in range(t + 1)],
            )
            for h in range(HEADS)
        ]
        expected.append(w["output.out.weight"] @ torch.cat(said))
    both_TD = torch.stack(expected) + read_in_chunks(near, x_TD, queued(near.vectors))
    y_BTD, _ = block(x_TD[None], None, Pass(torch.arange(23), 0))
    torch.testing.assert_close(y_BTD[0], both_TD)


@torch.no_grad()
def test_filters_say_what_they_are_after_the_last_token_of_a_block() -> None:
    """The context states of several filters of arXiv 2306.09539: S state spaces over all tokens, read once a window."""
    torch.manual_seed(0)
    mixer = Blockrec(HEADS, DIM, WINDOW, STATES, Form("filters", (4,)), "chunk")
    module: BlockRecurrence = mixer.build(WIDTH, "torch").build().double()
    filters = module.vectors
    assert isinstance(filters, FilteredStates)
    for weight in filters.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    x_TD = torch.randn(18, WIDTH, dtype=torch.float64)
    tokens = [parts(module.project.weight, x) for x in x_TD]
    hidden = torch.zeros(STATES, 2, WIDTH, dtype=torch.complex128)
    a = torch.complex(-filters.rate.exp(), filters.frequency)
    step = torch.exp(a * filters.step_size.exp()[:, None])
    c, expected = list(filters.first), []
    for t, x in enumerate(x_TD):
        if t % WINDOW == 0:
            asked = [
                parts(filters.project.weight, normed(vector + identity, filters.norm))
                for vector, identity in zip(c, filters.identity, strict=True)
            ]
        seen = range(t - t % WINDOW, t + 1)
        heads = []
        for h in range(HEADS):
            keys = [turned(tokens[s][0][h], s) for s in seen]
            own = attended(turned(tokens[t][2][h], t), keys, [tokens[s][1][h] for s in seen])
            state = attended(tokens[t][3][h], [each[0][h] for each in asked], [each[1][h] for each in asked])
            heads.append(torch.cat([own, state]))
        expected.append(module.out.weight @ torch.cat(heads))
        c = []
        for j in range(STATES):
            for p in range(2):
                hidden[j, p] = step[j, p] * hidden[j, p] + (step[j, p] - 1) / a[j, p] * x
            weight = torch.view_as_complex(filters.weight[:, j]).T
            c.append(2 * (weight * hidden[j]).sum(0).real + filters.skip[:, j] * x)
    y_BTD, _ = module(x_TD[None], None, Pass(torch.arange(18), 0))
    torch.testing.assert_close(y_BTD[0], torch.stack(expected))


def test_filters_learn_at_the_rate_of_what_is_not_summed_over() -> None:
    narrow, wide = (
        Blockrec(update=Form("filters", (4,))).build(width, "torch").build() for width in (256, 512)
    )
    assert not {"vectors.weight", "vectors.skip"} & set(rate_factors(narrow, wide, 256))


def test_what_is_no_pair_is_refused() -> None:
    reason = Blockrec(update=Form("filters", (3,))).why_illegal(16)
    assert reason == "update=filters(3) is no number of conjugate pairs (mixer blockrec); say an even one"


def test_an_odd_head_is_refused() -> None:
    reason = Blockrec(heads=2, head_dim=5).why_illegal(16)
    assert reason == "rotary positions need an even head_dim, not 5 (mixer blockrec)"
    assert "legal heads: 1, 2, 4" in (Blockrec(heads=3).why_illegal(16) or "")
