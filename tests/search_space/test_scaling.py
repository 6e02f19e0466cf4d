"""Initial weights and learning rates that follow the width, and matrices of a given spectral norm."""

from __future__ import annotations

import pytest
import torch

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch
from mixforge.evaluator.train import _adamw, _step
from mixforge.search_space.notation import parse
from mixforge.search_space.parts.sigma import SigmaLinear
from mixforge.search_space.parts.stacked import Stacked


def change(scale: str, width: int) -> float:
    """The size of what three steps of Adam change in the residual stream: a coordinate check."""
    model = parse(f"lm(attn(head_dim=32) + swiglu, width={width}, vocab=16, scale={scale})").build()
    candidate = Candidate(model, None)
    recipe = Recipe(steps=3, batch=2, lr=(1e-2,), clip=1e9)
    optimizer = _adamw(candidate, recipe, 1e-2)
    tokens = torch.randint(16, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        before = model.body(model.embed(inputs))
    for _ in range(3):
        _step(candidate, Batch(inputs, targets), optimizer, recipe, 1e-2)
    with torch.no_grad():
        return float((model.body(model.embed(inputs)) - before).std())


def test_what_a_step_changes_does_not_depend_on_the_width() -> None:
    scaled, plain = (change(scale, 256) / change(scale, 64) for scale in ("mup", "standard"))
    assert 1 / 3 < scaled < 3
    assert plain > 3 * scaled


def test_at_the_base_width_it_is_the_standard_model() -> None:
    plain, scaled = (
        parse(f"lm(attn + swiglu, width=64, scale={scale})").build() for scale in ("standard", "mup")
    )
    tokens = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(tokens), scaled(tokens))
    assert set(scaled.rate_factors.values()) == {1.0}


def test_rates_fall_where_a_weight_is_summed_over_the_width() -> None:
    text = "lm(attn(qk_norm=rms) + gla + conv + swiglu, width=256, scale=mup, embed=untied)"
    model = parse(text).build()
    factors = model.rate_factors
    assert set(factors.values()) == {0.25}
    names = {name for name, _ in model.named_parameters()}
    whole = {name for name in names if name not in factors}
    # Norms, taps of convolutions, what leaves a rank that does not grow, and the two ends of the model.
    assert {"embedding.weight", "readout.weight", "norm.weight"} <= whole
    assert not [name for name in whole if any(part in name for part in (".down.", ".query.", ".out."))]
    assert any(".up." in name for name in whole)
    recipe = Recipe(steps=1, batch=1, lr=(1.0,), weight_decay=0.1)
    groups = _adamw(Candidate(model, None), recipe, 1.0).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {(group["factor"], group["weight_decay"]) for group in groups} == {(0.25, 0.4), (1, 0.1), (1, 0)}


def test_an_architecture_without_a_wider_one_is_refused() -> None:
    with pytest.raises(ValueError, match="one of width 131072, which is illegal: width 131072"):
        parse("lm(attn, width=65536, scale=mup)").build()


def test_sigma_divides_by_the_spectral_norm() -> None:
    """y = gamma / sigma(W) W x, sigma by the power method with one iteration in a forward pass of training."""
    torch.manual_seed(0)
    inner = torch.nn.Linear(12, 8, bias=True, dtype=torch.float64)
    module = SigmaLinear(inner)
    with torch.no_grad():
        module.gamma.fill_(1.5)
    x = torch.randn(5, 12, dtype=torch.float64)
    left, weight = module.left.clone(), inner.weight.detach()
    for _ in range(3):
        y = module(x)
        right = left @ weight / (left @ weight).norm()
        left = weight @ right / (weight @ right).norm()
        torch.testing.assert_close(y, 1.5 / (left @ weight @ right) * x @ weight.T + inner.bias)
    sigma = torch.linalg.matrix_norm(weight, 2)
    torch.testing.assert_close(left @ weight @ right, sigma, rtol=1e-3, atol=0)
    module.eval()
    kept = module.sigma.clone()
    torch.testing.assert_close(kept, (left @ weight).norm())
    torch.testing.assert_close(module(x), 1.5 / kept * x @ weight.T + inner.bias)
    assert torch.equal(module.sigma, kept)
    # A matrix of twice the size is the same map, so its gradient has nothing along the matrix itself.
    module.train()
    for _ in range(100):
        y = module(x)
    y.square().sum().backward()
    assert inner.weight.grad is not None
    assert abs(float((inner.weight.grad * weight).sum())) < 1e-9 * float(y.detach().square().sum())


def test_sigma_takes_every_matrix_of_the_stack() -> None:
    model = parse("lm(attn + beside(gdn, swiglu, fuse=gate), width=32, weights=sigma, embed=untied)").build()
    inside = [module for module in model.stack.modules() if type(module) is torch.nn.Linear]
    assert not inside
    for module in model.modules():
        if isinstance(module, SigmaLinear):
            torch.testing.assert_close(
                module.sigma, torch.linalg.matrix_norm(module.matrix, 2), rtol=0.1, atol=0
            )


@pytest.mark.parametrize("mixer", ["moe(experts=3, top_k=2)", "rglru(heads=2)"])
def test_sigma_takes_each_of_stacked_matrices(mixer: str) -> None:
    architecture = parse(f"lm(attn + {mixer}, width=32, vocab=11, weights=sigma)")
    model = architecture.build(dtype=torch.float64)
    stacks = [module for module in model.modules() if isinstance(module, Stacked)]
    assert len(stacks) == 2
    assert architecture.cost(1).params == sum(weight.numel() for weight in model.parameters())
    model.train()
    tokens_BT = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        model(tokens_BT)
    for stack in (*stacks, *(module for module in model.eval().modules() if isinstance(module, Stacked))):
        norms = torch.linalg.matrix_norm(stack.weight, 2)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=0)
    # One gamma for each matrix.
    with torch.no_grad():
        gamma = stacks[0].parametrizations["weight"][0].gamma  # type: ignore[index]
        gamma.copy_(torch.arange(1.0, len(gamma) + 1))
    torch.testing.assert_close(torch.linalg.matrix_norm(stacks[0].weight, 2), gamma, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "mixer",
    [
        "rnn(cell=gru)",
        "rnn(cell=lstm)",
        "rwkv6",
        "moe",
        "moe(bias=all)",
        "rglru",
        "hyena",
        "attn(kv=mla(4, 2))",
    ],
)
def test_sigma_takes_matrices_that_a_mixer_multiplies_itself(mixer: str) -> None:
    """A sequence and steps see the same matrices, and every gamma is learned."""
    model = parse(f"lm({mixer} + attn, width=16, vocab=11, weights=sigma)").build(dtype=torch.float64)
    tokens_BT = torch.randint(11, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BT)
    whole.square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
    state = model.initial_state(2, 20)
    for t in range(20):
        logits, state = model.step(tokens_BT[:, t], state)
        torch.testing.assert_close(logits, whole[:, t].detach())
