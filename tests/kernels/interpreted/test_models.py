"""Whole models on the Triton backend, under the interpreter: what they compute is what the torch form computes."""

from __future__ import annotations

import pytest
import torch

from mixforge.kernels.launch import recording
from mixforge.kernels.linear_decode_triton import linear_decode_triton
from mixforge.search_space.notation import parse

MIXERS = [
    "gdn",
    "kda",
    "mamba2(heads=4)",
    "gla",
    "retnet",
    "deltanet(out_gate=silu, conv=none)",
    "linear(phi=relu, key_heads=1, heads=4, out_norm=none)",
    "linear(decay=scalar, forget=sigmoid, out_gate=sigmoid, phi=elu1)",
    "linear(phi=elu1, norm=denominator)",
    "based",
    "linear(rule=delta, phi=taylor(2), key_dim=16, heads=1)",
    "hgrn2",
    "mlstm",
    "rwkv6(forget_rank=4)",
    "rwkv7",
    "linear(decay=both)",
    "latte",
    "hla2",
    "linear(rule=slots(4), decay=channel)",
    "mamba2(levels=log, heads=2)",
    "gdn(levels=log, heads=2)",
    "attn(query=learned, pos=none)",
    "attn(score=sigmoid)",
    "gau(score=relu2, sparse=mixed(8))",
    "rglru",
    "conv",
    "ssm(state=4, expand=1)",
    "ssm(rule=s4d, gate=glu, state=4)",
    "ssm(rule=s4d, poles=real, state=4)",
    "ssm(state=4, expand=1, fixed_point=householder(2))",
    "hgrn",
    "slstm",
    "lstm",
    "lstm(heads=2)",
    "rnn(cell=gru)",
    "rnn(cell=gru, heads=1, conv=4)",
]


def models(mixer: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    architecture = parse(f"lm({mixer} + swiglu, width=32)")
    return architecture.build("triton"), architecture.build("torch")


@pytest.mark.parametrize("mixer", MIXERS)
def test_forward_and_gradients(mixer: str) -> None:
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for model in models(mixer):
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append([weight.grad for weight in model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_steps(mixer: str) -> None:
    """Steps after a prefill equal the forward pass, as they do in the torch form."""
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for model in models(mixer):
            expected = model(tokens)
            logits, state = model.prefill(tokens[:, :5], capacity=9)
            for position in range(5, 9):
                logits, state = model.step(tokens[:, position], state)
                torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-4)


# Between the norm in front and those of the channel mixer and the end.
LAUNCHES = {
    "gdn": ["conv_step", "linear_decode"],
    "ssm(state=4, expand=1)": ["conv_step", "selective_step"],
    "ssm(state=4, expand=1, fixed_point=householder(2))": ["conv_step", *2 * ["selective_step"]],
    "hgrn": ["scan_step", "norm_forward"],
    "ssm(rule=s4d, gate=glu, state=4)": ["diagonal_step"],
    "ssm(rule=s4d, poles=real, conv=none, state=4)": ["diagonal_step"],
    "attn(query=learned, pos=none)": ["softmax_step"],
    "mamba2(levels=log, heads=2)": ["conv_step", "log_linear_step", "norm_forward"],
    "gdn(levels=log, heads=2)": ["conv_step", "log_linear_step", "norm_forward"],
    "hla2": ["linear_step", "linear_step", "norm_forward"],
    "linear(rule=slots(4), decay=channel)": ["conv_step", "linear_step", "linear_step", "norm_forward"],
}


@pytest.mark.parametrize("mixer", LAUNCHES)
def test_a_step_holds_few_launches(mixer: str) -> None:
    """Beside the products of torch: the norms, the convolution, and few kernels for all that is between them."""
    model = parse(f"lm({mixer} + swiglu, width=32)").build("triton")
    with torch.no_grad():
        _, state = model.prefill(torch.zeros(1, 4, dtype=torch.long), capacity=8)
        with recording("sm_90") as recorded:
            model.step(torch.zeros(1, dtype=torch.long), state)
    names = [launch.name for launch in recorded.launches]
    assert names == ["norm_forward", *LAUNCHES[mixer], "norm_forward", "norm_forward"]


@pytest.mark.parametrize("mixer", ["gdn", "kda", "mamba2(heads=4)"])
def test_a_step_is_an_operation_of_torch(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = parse(f"lm({mixer} + swiglu, width=32)").build("triton"), []
    block = next(module for module in model.modules() if hasattr(module, "decode"))
    decode = block.decode

    def seen(*args: object) -> torch.Tensor:
        given.append([arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args])
        return decode(*args)

    monkeypatch.setattr(block, "decode", seen)
    with torch.no_grad():
        _, state = model.prefill(torch.zeros(2, 4, dtype=torch.long), capacity=8)
        model.step(torch.zeros(2, dtype=torch.long), state)
    (args,) = given
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_decode_triton, args, test_utils=checks)


def test_what_cannot_run_is_refused_when_it_is_built() -> None:
    with pytest.raises(ValueError, match="at most 256 key channels with rule=dplr, and this mixer has 300"):
        parse("lm(linear(rule=dplr, key_dim=300, heads=1) + swiglu, width=32)").build("triton")


def test_a_state_that_cannot_be_written_is_refused() -> None:
    model = parse("lm(gdn + swiglu, width=32)").build("triton")
    with torch.no_grad():
        _, state = model.prefill(torch.zeros(2, 4, dtype=torch.long), capacity=8)
        for layer in state.layers:
            if "matrix" in layer:
                layer["matrix"] = layer["matrix"][:1].expand(2, -1, -1, -1)
        with pytest.raises(ValueError, match="it must be float32 and contiguous"):
            model.step(torch.zeros(2, dtype=torch.long), state)


def test_attention_needs_a_gpu() -> None:
    model = parse("lm(attn + swiglu, width=32)").build("triton")
    with pytest.raises(ValueError, match="backend='triton'"):
        model(torch.zeros(1, 4, dtype=torch.long))
