"""Residual units and fused branches against their papers' equations, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixforge.evaluator.candidate import token_loss
from mixforge.search_space.model import LanguageModel
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.beside import Beside
from mixforge.search_space.parts.layer import Pass
from mixforge.search_space.parts.norm import RMSNorm
from mixforge.search_space.parts.residual import Branch, Residual, ResidualStack, Stack, Unit


def built(text: str) -> LanguageModel:
    """The model in float64, its norms' weights drawn anew so that none is 1."""
    model = parse(text).build(dtype=torch.float64)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model


def inputs(length: int = 7) -> Tensor:
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def units(model: LanguageModel) -> list[Residual]:
    assert isinstance(model.stack, Stack)
    found = [model.stack.unit(index) for index in model.stack.order]
    assert all(isinstance(unit, Residual) for unit in found)
    return found  # type: ignore[return-value]


def rms(x: Tensor, weight: Tensor | float, eps: float = 1e-6) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def f(unit: Residual, x_BTD: Tensor) -> Tensor:
    return unit.mixer(x_BTD, None, Pass(torch.arange(x_BTD.shape[1]), 0))[0]


@torch.no_grad()
def test_deep_norm_weighs_the_stream_by_the_depth() -> None:
    """x_{l+1} = LN(alpha x_l + f(x_l)) with alpha = (2 N)^(1/4) for N layers of two units."""
    model = built("lm(3 * (attn + mlp), width=16, place=deep)")
    x_BTD = inputs()
    expected = x_BTD
    for unit in units(model):
        assert unit.after.weight is not None
        expected = rms(6**0.25 * expected + f(unit, expected), unit.after.weight)
    torch.testing.assert_close(model.body(x_BTD), expected)
    # The matrices that end a branch begin with the gain (8 N)^(-1/4) squared, those of pre with (2 N)^(-1/2).
    pre = parse("lm(3 * (attn + mlp), width=16)").build().state_dict()
    deep = parse("lm(3 * (attn + mlp), width=16, place=deep)").build().state_dict()
    name = next(name for name in pre if name.endswith("out.weight"))
    torch.testing.assert_close(deep[name] * 24**0.5, pre[name] * 6**0.5)


@torch.no_grad()
def test_inside_norms_what_the_branch_adds() -> None:
    model = built("lm(attn + swiglu, width=16, place=inside)")
    x_BTD = inputs()
    expected = x_BTD
    for unit in units(model):
        expected = expected + rms(f(unit, expected), unit.inside.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(model.body(x_BTD), expected)


@torch.no_grad()
def test_a_residual_has_its_own_place() -> None:
    """Of Olmo Hybrid: norms before some mixers, after others."""
    model = built("lm(gdn + residual(attn, place=inside) + residual(mlp, place=post), width=16)")
    x_BTD = inputs()
    first, second, third = units(model)
    expected = x_BTD + f(first, rms(x_BTD, first.before.weight))  # type: ignore[arg-type]
    expected = expected + rms(f(second, expected), second.inside.weight)  # type: ignore[arg-type]
    expected = rms(expected + f(third, expected), third.after.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(model.body(x_BTD), expected)


@pytest.mark.parametrize("place", ["pre", "inside", "sandwich", "post", "deep", "none", "gated"])
@torch.no_grad()
def test_one_residual_is_around_mixers_one_after_the_other(place: str) -> None:
    """y = x + attn(mlp(x)) and then x + gdn(y), with a norm for each mixer or for each sum."""
    text = f"residual(residual(mlp + attn, place={place}) + gdn, place={place})"
    model = built(f"lm({text}, width=16)")
    assert isinstance(model.stack, Stack)
    outer = model.stack.unit(0)
    assert isinstance(outer, ResidualStack)
    inner = outer.body.unit(0)
    assert isinstance(inner, ResidualStack)

    def normed(norm: nn.Module, x: Tensor) -> Tensor:
        return x if isinstance(norm, nn.Identity) else rms(x, norm.weight)  # type: ignore[arg-type]

    def applied(branch: Unit, x: Tensor) -> Tensor:
        assert isinstance(branch, Branch)
        y = branch.mixer(normed(branch.before, x), None, Pass(torch.arange(x.shape[1]), 0))[0]
        return normed(branch.inside, y)

    def summed(unit: ResidualStack, x: Tensor, y: Tensor) -> Tensor:
        if place == "gated":
            assert unit.gate is not None
            return unit.gate(x, torch.relu(y))  # type: ignore[no-any-return]
        return normed(unit.after, (3**0.25 if place == "deep" else 1) * x + y)

    x_BTD = inputs()
    y_BTD = applied(inner.body.unit(1), applied(inner.body.unit(0), x_BTD))
    y_BTD = applied(outer.body.unit(1), summed(inner, x_BTD, y_BTD))
    torch.testing.assert_close(model.body(x_BTD), summed(outer, x_BTD, y_BTD))
    norms = sum(isinstance(module, RMSNorm) for module in model.stack.modules())
    # And that of gdn's heads.
    assert norms == {"none": 0, "post": 2, "deep": 2, "sandwich": 6}.get(place, 3) + 1


@torch.no_grad()
def test_a_block_reads_the_embeddings_and_feeds_one_mixer() -> None:
    """Zamba2's layer, x + mamba2(norm(x + mlp(norm(attn(norm([x; e])))))), attention as a loop over tokens."""
    text = "residual(residual(attn(heads=2, head_dim=16, pos=none, reads=embeddings) + geglu) + mamba2)"
    model = built(f"lm(mlp + {text}, width=16)")
    e_BTD = inputs()
    assert isinstance(model.stack, Stack)
    first, block = model.stack.unit(0), model.stack.unit(1)
    x_BTD = first(e_BTD, None, Pass(torch.arange(7), 0))[0]
    w = {name: weight.detach() for name, weight in block.named_parameters()}
    attn, glu, last = "body.units.0.body.units.0.mixer", "body.units.0.body.units.1", "body.units.1"
    both = rms(torch.cat([x_BTD, e_BTD], -1), w[f"{attn}.norm.weight"])
    q, k, v = (
        (both @ w[f"{attn}.inner.{name}.weight"].T).view(2, 7, 2, 16)
        for name in ("queries.query", "memory.key", "memory.value")
    )
    read = torch.zeros(2, 7, 2, 16, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for t in range(7):
                share = torch.softmax(k[b, : t + 1, h] @ q[b, t, h] / 4, 0)
                read[b, t, h] = share @ v[b, : t + 1, h]
    a = rms(read.flatten(2) @ w[f"{attn}.inner.output.out.weight"].T, w[f"{glu}.before.weight"])
    gate = a @ w[f"{glu}.mixer.inner.gate.weight"].T
    y = gate * (1 + torch.erf(gate / 2**0.5)) / 2 * (a @ w[f"{glu}.mixer.inner.up.weight"].T)
    summed = x_BTD + y @ w[f"{glu}.mixer.inner.out.weight"].T
    assert isinstance(block, ResidualStack)
    mamba2 = block.body.unit(1)
    assert isinstance(mamba2, Branch)
    normed = rms(summed, w[f"{last}.before.weight"])
    expected = x_BTD + mamba2.mixer(normed, None, Pass(torch.arange(7), 0))[0]
    torch.testing.assert_close(model.body(e_BTD), expected)
    # No norm stands before a mixer that norms what it reads.
    assert isinstance(block.body.unit(0).body.unit(0).before, nn.Identity)  # type: ignore[union-attr,operator]


@torch.no_grad()
def test_none_has_no_norm_but_the_last() -> None:
    model = built("lm(attn + swiglu, width=16, place=none, norm=simple)")
    x_BTD = inputs()
    expected = x_BTD
    for unit in units(model):
        expected = expected + f(unit, expected)
    torch.testing.assert_close(model.body(x_BTD), expected)
    torch.testing.assert_close(model.final(expected), rms(expected, 1.0))


@torch.no_grad()
def test_gated_is_a_recurrent_unit_along_depth() -> None:
    """g(x, y) = (1 - z) x + z h, channel by channel, with W of the relu of what the mixer gives."""
    model = built("lm(attn + mlp, width=16, place=gated)")
    x_BTD = inputs(3)
    expected = x_BTD
    for unit in units(model):
        gate = unit.gate
        assert gate is not None
        w_r, w_z, w_g = gate.output.weight.reshape(3, 16, 16)  # type: ignore[operator,union-attr]
        u_r, u_z = gate.stream.weight.reshape(2, 16, 16)  # type: ignore[operator,union-attr]
        y_BTD = torch.relu(f(unit, rms(expected, unit.before.weight)))  # type: ignore[arg-type]
        after = torch.empty_like(expected)
        for b in range(2):
            for t in range(3):
                x, y = expected[b, t], y_BTD[b, t]
                r = torch.sigmoid(w_r @ y + u_r @ x)
                z = torch.sigmoid(w_z @ y + u_z @ x - gate.bias)  # type: ignore[operator]
                h = torch.tanh(w_g @ y + gate.reset.weight @ (r * x))  # type: ignore[operator,union-attr]
                after[b, t] = (1 - z) * x + z * h
        expected = after
    torch.testing.assert_close(model.body(x_BTD), expected)
    fresh = parse("lm(attn + mlp, width=16, place=gated)").build()
    assert all((unit.gate.bias == 2).all() for unit in units(fresh))  # type: ignore[union-attr]


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@torch.no_grad()
def test_eps_stands_under_every_root(eps: float) -> None:
    model = built(f"lm(attn(qk_norm=rms) + beside(attn, mlp, norm=rms), width=16, eps={eps}, place=sandwich)")
    found = [module.eps for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(found) == 2 * 2 + 2 + 2 + 1
    assert set(found) == {eps}
    x_BTD = inputs()
    torch.testing.assert_close(model.final(x_BTD), rms(x_BTD, model.norm.weight, eps))  # type: ignore[arg-type]


@torch.no_grad()
def test_embeddings_are_scaled_and_logits_capped() -> None:
    model = built("lm(attn, width=16, embed_scale=sqrt, softcap=2)")
    tokens_BT = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    embedded = model.embedding.weight[tokens_BT] * 4
    torch.testing.assert_close(model.embed(tokens_BT), embedded)
    x_BTD = 5 * model.body(embedded)
    logits = model.final(x_BTD) @ model.embedding.weight.T
    capped = 2 * torch.tanh(logits / 2)
    torch.testing.assert_close(model.head(x_BTD), capped)
    loss = token_loss(model, x_BTD.flatten(0, 1), tokens_BT.flatten())
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(capped.flatten(0, 1), tokens_BT.flatten())
    )


@pytest.mark.parametrize("fuse", ["sum", "mean", "gate", "concat", "scalar"])
@pytest.mark.parametrize("norm", ["none", "rms"])
@torch.no_grad()
def test_branches_are_normed_and_fused(fuse: str, norm: str) -> None:
    model = built(f"lm(beside(attn, mlp, fuse={fuse}, norm={norm}), width=16)")
    beside = units(model)[0].mixer
    assert isinstance(beside, Beside)
    x_BTD = inputs()
    at = Pass(torch.arange(7), 0)
    outputs = [beside.branch(index)(x_BTD, None, at)[0] for index in range(2)]
    weights = dict(beside.fuse.named_parameters())
    if norm == "rms":
        outputs = [rms(y, weights[f"norms.{index}.weight"]) for index, y in enumerate(outputs)]
    inner = "fuse." if norm == "rms" and fuse != "mean" else ""
    match fuse:
        case "sum":
            expected = outputs[0] + outputs[1]
        case "mean":
            expected = (outputs[0] + outputs[1]) / 2
        case "scalar":
            first, second = weights[f"{inner}weights"]
            expected = first * outputs[0] + second * outputs[1]
        case "gate":
            share = torch.softmax(x_BTD @ weights[f"{inner}gate.weight"].T, -1)
            expected = share[..., :1] * outputs[0] + share[..., 1:] * outputs[1]
        case _:
            expected = torch.cat(outputs, -1) @ weights[f"{inner}mix.weight"].T
    torch.testing.assert_close(beside(x_BTD, None, at)[0], expected)
