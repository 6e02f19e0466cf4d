"""norm=prepbn: the equations of Guo et al. 2024 as a float64 loop, and whole models of such norms."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixforge.evaluator.weights import load_weights, save_weights
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.model import LanguageModel
from mixforge.search_space.notation import from_json, parse
from mixforge.search_space.parts.progressive_norm import ProgressiveNorm

TEXT = "lm(2 * (gdn + mlp), width=16, norm=prepbn(4), place=sandwich, shortcut=attention)"
NORMS = 2 * 4 + 2


def drawn(number: int, *shape: int) -> Tensor:
    return (
        3 * torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64) + number
    )


def tokens(number: int, length: int = 13) -> Tensor:
    return torch.randint(256, (2, length), generator=torch.Generator().manual_seed(number))


def trained(passes: int, text: str = TEXT) -> LanguageModel:
    """After so many steps of descent, in evaluation mode."""
    model = parse(text).build(dtype=torch.float64).train()
    descend(model, 0, passes)
    return model.eval()


def descend(model: nn.Module, first: int, passes: int) -> None:
    for number in range(first, first + passes):
        model.zero_grad()
        model(tokens(number)).logsumexp(-1).mean().backward()
        with torch.no_grad():
            for weight in model.parameters():
                assert weight.grad is not None
                weight -= 0.05 * weight.grad


def norms(model: nn.Module) -> list[ProgressiveNorm]:
    return [module for module in model.modules() if isinstance(module, ProgressiveNorm)]


def test_training_is_its_equations() -> None:
    """Seven tokens of three channels, in fourteen batches of which five have a share of LN."""
    norm = ProgressiveNorm(3, 5, nn.LayerNorm(3), eps=1e-3).double().train()
    with torch.no_grad():
        for number, weight in enumerate(norm.parameters(), 1):
            weight += 0.1 * drawn(number, *weight.shape)
    weights = {name: weight.tolist() for name, weight in norm.named_parameters()}
    layer_gains, layer_biases = weights["layer.weight"], weights["layer.bias"]
    gains, biases, eta = weights["weight"], weights["bias"], weights["eta"]
    seen: list[list[list[float]]] = []
    for number in range(14):
        x_BTD = drawn(number, 1, 7, 3)
        y_BTD = norm(x_BTD)
        share = max(0.0, 1 - number / 5)
        # The mean of the batches so far, of which the tenth and later have a weight of a tenth.
        mean, variance = [0.0] * 3, [1.0] * 3
        for place, batch in enumerate(seen):
            weight = max(0.1, 1 / (place + 1))
            for c in range(3):
                channel = [token[c] for token in batch]
                middle = sum(channel) / 7
                mean[c] += weight * (middle - mean[c])
                variance[c] += weight * (sum((each - middle) ** 2 for each in channel) / 7 - variance[c])
        for t in range(7):
            x = x_BTD[0, t].tolist()
            middle = sum(x) / 3
            spread = sum((each - middle) ** 2 for each in x) / 3
            for c in range(3):
                layer = (x[c] - middle) / (spread + 1e-5) ** 0.5 * layer_gains[c] + layer_biases[c]
                batch = (x[c] - mean[c]) / (variance[c] + 1e-3) ** 0.5 * gains[c] + biases[c] + eta * x[c]
                expected = share * layer + (1 - share) * batch
                assert y_BTD[0, t, c].item() == pytest.approx(expected, rel=1e-10)
        seen.append(x_BTD[0].tolist())


def test_after_the_schedule_it_is_a_line_for_each_channel() -> None:
    model = trained(6)
    for norm in norms(model):
        first, second = drawn(1, 5, 16), drawn(2, 5, 16)
        torch.testing.assert_close(norm((first + second) / 2), (norm(first) + norm(second)) / 2)


@pytest.mark.parametrize("passes", [0, 1, 3, 6])
def test_in_training_no_token_sees_a_later_one_and_in_evaluation_a_step_equals_forward(passes: int) -> None:
    model = trained(passes)
    given, other = tokens(20), tokens(21)
    other[:, :6] = given[:, :6]
    first, second = copy.deepcopy(model).train()(given), copy.deepcopy(model).train()(other)
    torch.testing.assert_close(first[:, :6], second[:, :6], rtol=1e-12, atol=1e-12)
    expected = model(given)
    logits, state = model.prefill(given[:, :5], capacity=13)
    torch.testing.assert_close(logits, expected[:, 4])
    for t in range(5, 13):
        logits, state = model.step(given[:, t], state)
        torch.testing.assert_close(logits, expected[:, t])


def test_only_training_counts_and_every_norm_does_once_a_pass() -> None:
    model = trained(3)
    assert [int(norm.passes) for norm in norms(model)] == [3] * NORMS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(tokens(5))
    with torch.no_grad():
        model.train()(tokens(5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_that_were_saved_go_on_where_training_was(tmp_path: Path) -> None:
    model = trained(2)
    save_weights(model, tmp_path / "weights.safetensors")
    again = parse(TEXT).build(dtype=torch.float64, seed=9)
    load_weights(again, tmp_path / "weights.safetensors")
    for each in (model, again):
        descend(each.train(), 2, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_compiled_model_trains_as_another() -> None:
    # Without functions of autograd, of which torch's own compiler warns.
    text = TEXT.replace("gdn", "attn(pos=none)")
    model, other = (parse(text).build(dtype=torch.float64).train() for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for number in range(3):
        torch.testing.assert_close(compiled(tokens(number)), model(tokens(number)))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_two_passes_before_a_backward_pass_have_their_own_gradients() -> None:
    """Gradients are of the statistics that a pass had, whatever came after it."""
    model, other = trained(2).train(), trained(2).train()
    first, second = model(tokens(7)).logsumexp(-1).mean(), model(tokens(8)).logsumexp(-1).mean()
    (first + second).backward()
    for number in (7, 8):
        other(tokens(number)).logsumexp(-1).mean().backward()
    for (name, weight), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, twin.grad, msg=name)


def test_a_model_of_bfloat16_stays_finite() -> None:
    model = parse(TEXT).build(dtype=torch.bfloat16).train()
    for number in range(6):
        logits = model(tokens(number))
        logits.float().logsumexp(-1).mean().backward()
        assert torch.isfinite(logits).all()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_statistics_of_a_model_in_half_precision_go_on_in_float32() -> None:
    norm = ProgressiveNorm(4, 10, nn.LayerNorm(4)).to(torch.bfloat16).train()
    for _ in range(60):
        norm(torch.full((1, 2, 4), 1.001, dtype=torch.float32).to(torch.bfloat16))
    norm(torch.full((1, 2, 4), 1.01).to(torch.bfloat16))
    # A tenth of a difference of 2^-7, which no bfloat16 near 1 could hold.
    assert norm.mean.dtype == torch.float32
    assert torch.all((norm.mean > 1.0) & (norm.mean < 1.002))


def test_the_text_and_the_json_say_the_steps() -> None:
    architecture: Architecture = parse(TEXT)
    assert str(architecture) == TEXT
    assert from_json(architecture.canonical_json) == architecture
    assert architecture != parse(TEXT.replace("prepbn(4)", "prepbn(5)"))
    epsilons = {norm.eps for norm in norms(parse(f"{TEXT[:-1]}, eps=1e-06)").build())}
    assert epsilons == {1e-6}
    with pytest.raises(ValueError, match=r"expected prepbn\(a whole number from 1"):
        parse(TEXT.replace("prepbn(4)", "prepbn(0)"))
