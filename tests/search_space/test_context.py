"""Branches that read what the branches beside them say, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.notation import from_json, parse
from mixforge.search_space.parts.beside import Beside
from mixforge.search_space.parts.layer import Pass

WIDTH, LENGTH, BLOCK = 16, 21, 6


def attention(w: dict[str, Tensor], heads: int, x: Tensor, given: Tensor, rows: list[range]) -> Tensor:
    """Queries of x, keys and values of what is given: token t sees rows[t]."""
    dim = WIDTH // heads
    q = (x @ w["queries.query.weight"].T).view(-1, heads, dim)
    k = (given @ w["memory.key.weight"].T).view(-1, heads, dim)
    v = (given @ w["memory.value.weight"].T).view(-1, heads, dim)
    outputs = []
    for t, seen in enumerate(rows):
        said = []
        for h in range(heads):
            weight = torch.stack([torch.exp(q[t, h] @ k[s, h] / math.sqrt(dim)) for s in seen])
            said.append((weight / weight.sum()) @ torch.stack([v[s, h] for s in seen]))
        outputs.append(torch.cat(said))
    return torch.stack(outputs) @ w["output.out.weight"].T


def weights(module: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name.removeprefix(prefix): weight for name, weight in named if name.startswith(prefix)}


def layer(text: str) -> Beside:
    model = parse(f"lm({text}, width={WIDTH})").build(dtype=torch.float64)
    mixer = model.stack.units[0].mixer  # type: ignore[union-attr,index]
    assert isinstance(mixer, Beside)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return mixer


def inputs() -> Tensor:
    return torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def at(start: int = 0, end: int = LENGTH) -> Pass:
    return Pass(torch.arange(start, end), start)


@torch.no_grad()
def test_a_block_attends_to_its_tokens_and_to_states_of_the_same_input() -> None:
    """The layer of arXiv 2306.09539: W_o of what attention says of a block's tokens and of its context states."""
    module = layer(f"beside(attn(source=both, heads=2, pos=none, sparse=chunk({BLOCK})), ssm, fuse=read)")
    x_BTD = inputs()
    states_TD = module.branch(1)(x_BTD, None, at())[0][0]
    rows = [range(t - t % BLOCK, t + 1) for t in range(LENGTH)]
    tokens = attention(weights(module, "branches.0.branches.0."), 2, x_BTD[0], x_BTD[0], rows)
    context = attention(weights(module, "branches.0.branches.1."), 2, x_BTD[0], states_TD, rows)
    torch.testing.assert_close(module(x_BTD, None, at())[0][0], tokens + context)


@pytest.mark.parametrize("fuse", ["sum", "read", "mean", "gate", "concat"])
@torch.no_grad()
def test_the_context_is_the_sum_of_the_branches_that_read_none(fuse: str) -> None:
    module = layer(f"beside(attn(source=context, heads=2, pos=none, window=5), mamba2, mlp, fuse={fuse})")
    x_BTD = inputs()
    reader = next(index for index in range(3) if index in module.readers)
    said = {index: module.branch(index)(x_BTD, None, at())[0] for index in range(3) if index != reader}
    rows = [range(max(0, t - 4), t + 1) for t in range(LENGTH)]
    w = weights(module, f"branches.{reader}.")
    said[reader] = attention(w, 2, x_BTD[0], sum(said.values())[0], rows)[None]  # type: ignore[index,arg-type]
    expected = said[reader]
    if fuse != "read":
        expected = module.fuse(x_BTD, [said[index] for index in range(3)])
    torch.testing.assert_close(module(x_BTD, None, at())[0], expected)


@torch.no_grad()
def test_a_state_is_written_what_attention_says() -> None:
    """The delta rule with queries and keys of the token and values of what the branch beside it says."""
    genes = "heads=1, key_dim=6, value_dim=5, conv=none, out_norm=none, out_gate=none"
    module = layer(f"attn(heads=2) | linear(rule=delta, values=context, {genes})")
    x_BTD = inputs()
    said_BTD = module.branch(0)(x_BTD, None, at())[0]
    w = weights(module, "branches.1.")
    q, k, v = torch.split(w["mixed.weight"], [6, 6, 5])
    matrix, outputs = torch.zeros(6, 5, dtype=torch.float64), []
    for x, said in zip(x_BTD[0], said_BTD[0], strict=True):
        query, key = (y / math.sqrt(y @ y + 1e-6) for y in (q @ x, k @ x))
        beta = torch.sigmoid(w["beta.logit.weight"][0] @ x)
        matrix = matrix + torch.outer(key, beta * (v @ said - matrix.T @ key))
        outputs.append(w["output.out.weight"] @ matrix.T @ query / math.sqrt(6))
    torch.testing.assert_close(module(x_BTD, None, at())[0], said_BTD + torch.stack(outputs))


@pytest.mark.parametrize(
    "text",
    [
        "beside(attn(source=both, sparse=chunk(6)), ssm, fuse=read)",
        "attn(source=context, window=5) | gdn | attn(source=both, kv=mla(8, 4))",
        "beside(attn(heads=2), rwkv7(heads=1, key_dim=8, value_dim=8, values=context), fuse=gate)",
        "beside(attn(source=context, kv=mqa, kv_shift=token, sparse=checkpoints(4)), titans, fuse=gate)",
    ],
)
@torch.no_grad()
def test_a_model_of_them_reads_in_pieces_and_costs_what_it_says(text: str) -> None:
    architecture = parse(f"lm(2 * (({text}) + swiglu), width={WIDTH})")
    assert from_json(architecture.canonical_json) == parse(str(architecture)) == architecture
    model = architecture.build(dtype=torch.float64)
    assert architecture.cost(LENGTH).params == sum(weight.numel() for weight in model.parameters())
    tokens_BT = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BT)
    logits, state = model.prefill(tokens_BT[:, :9], capacity=LENGTH)
    torch.testing.assert_close(logits, whole[:, 8])
    logits, state = model.prefill(tokens_BT[:, 9:15], state)
    for t in range(15, LENGTH):
        logits, state = model.step(tokens_BT[:, t], state)
        torch.testing.assert_close(logits, whole[:, t])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("attn(source=context)", "reads what branches beside it say that read no context"),
        ("attn + attn(source=both)", "reads what branches beside it say that read no context"),
        ("gdn(values=context) + attn", "reads what branches beside it say that read no context"),
        (
            "attn(source=context) | attn(source=both)",
            "reads what branches beside it say that read no context",
        ),
        ("beside(attn, ssm, fuse=read)", "fuse=read leaves what reads the branches beside it, and none does"),
        ("beside(attn(source=context), ssm, fuse=read, norm=rms)", "say norm=none"),
        (
            "(attn(source=both, kv=own) | ssm) + attn(kv=shared)",
            "kv=own is a cache of tokens for many layers",
        ),
        ("attn(source=context, query=learned, pos=none) | ssm", "it takes no source=context"),
    ],
)
def test_what_no_branch_says_is_not_read(text: str, reason: str) -> None:
    found = parse(f"lm({text}, width={WIDTH})").why_illegal()
    assert found is not None
    assert reason in found


def test_two_attentions_cost_as_much_as_both() -> None:
    both, token, context = (Attn(source=each) for each in ("both", "token", "context"))
    assert both.cost(WIDTH, 9) == token.cost(WIDTH, 9) + context.cost(WIDTH, 9)
    assert token.cost(WIDTH, 9) == context.cost(WIDTH, 9)
