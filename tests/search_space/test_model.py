"""The whole model: what `Architecture.build` makes, its costs, and decoding with it."""

from __future__ import annotations

import pytest
import torch
from flops import sdpa_cpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mixforge.search_space.architecture import Architecture
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.model import LanguageModel, language_model
from mixforge.search_space.notation import parse
from mixforge.search_space.part import Part
from mixforge.search_space.presets import preset

TEXTS = [
    "lm(2 * (attn + swiglu), width=16)",
    "lm(attn(window=4) + mlp, width=16, embed=untied, norm=layer, place=post)",
    "lm(gdn + geglu + rglru + mlp, width=16, place=sandwich, vocab=11)",
    "lm(3 @ (mamba2 + swiglu) + conv, width=16)",
    "lm(2 @ attn(heads=2, window=3) + static(window=4), width=16)",
    "lm((attn(heads=2) | kda(heads=2)) + swiglu, width=16)",
    "lm((2 * attn(heads=4) | 2 * gla(heads=4)) + swiglu, width=16)",
    "lm(beside(attn, swiglu, fuse=mean) + beside(gdn, attn, fuse=gate), width=16)",
    "lm(beside(attn, rglru, mlp, fuse=concat), width=16, norm=layer)",
    "lm(attn(window=4) + swiglu + attn(kv=own) + swiglu + 3 * (attn(kv=shared) + swiglu), width=16)",
    "lm(2 @ (attn(kv=own) + attn(kv=shared)) + based + retnet, width=16)",
    "lm(attn + swiglu, width=16, place=deep, norm=layer, eps=1e-3)",
    "lm(attn(qk_norm=rms) + swiglu, width=16, place=gated, embed=untied, embed_scale=sqrt, eps=1e-5)",
    "lm(2 * (gdn + swiglu), width=16, place=inside, softcap=30, embed_scale=0.5)",
    "lm(beside(attn, rglru, fuse=scalar) + mlp, width=16, place=none, norm=simple)",
    "lm(gdn + swiglu + residual(attn, place=inside) + residual(swiglu, place=inside), width=16)",
    "lm(residual(residual(attn(window=4) + swiglu) + gdn) + 2 @ residual(mlp + conv, place=gated), width=16)",
    "lm(2 * (mamba2 + residual(residual(attn(reads=embeddings) + geglu) + mamba2)), width=16, embed_scale=sqrt)",
    "lm(2 @ attn(reads=embeddings) + residual(mlp + attn(reads=embeddings), place=post), width=16, place=sandwich)",
    "lm(attn(reads=embeddings, kv=own) + 2 @ attn(reads=embeddings, kv=shared), width=16, norm=layer, place=gated)",
    "lm(segment(residual(attn + mlp, place=sandwich), length=5, memory=2) + swiglu, width=16, weights=sigma)",
    "lm(residual(residual((attn | gdn) + mlp, place=deep) + mlp) + attn, width=16, norm=layer, place=post)",
    "lm(beside(attn, swiglu, norm=rms) + beside(attn, gdn, fuse=mean, norm=none), width=16, norm=simple)",
    "lm(beside(1 * attn(heads=2), 1 * gla(heads=2), fuse=concat, norm=rms), width=16, place=sandwich)",
    "lm(attn + 2 @ (swiglu + gdn) + mlp, width=16, shortcut=average)",
    "lm(2 * (attn + swiglu), width=64, shortcut=attention, norm=layer)",
    "lm(residual(attn + mlp, place=gated) + (gdn | swiglu), width=16, norm=prepbn(5), shortcut=attention)",
    "lm(beside(attn, gdn, fuse=gate) + swiglu, width=16, weights=sigma, place=gated)",
    "lm(attn + swiglu + rglru, width=16, weights=sigma, shortcut=attention)",
    "lm(rglru + moe(weights=own) + attn + moe(weights=shared), width=16, weights=sigma)",
    "lm(2 * (attn + swiglu), width=128, scale=mup)",
    "lm(reuse(attn + mlp, times=3, halt=act, signal=step) + swiglu, width=16, weights=sigma)",
    "lm(2 @ reuse(gdn + attn(window=3), times=2, signal=step) + reuse(rglru, times=2, halt=act), width=16)",
    "lm(segment(attn + gdn + mlp, length=5, memory=2) + swiglu, width=16)",
    "lm(attn + 2 @ segment(attn(window=4) + swiglu, length=8, memory=1), width=16, place=gated, shortcut=average)",
    "lm(segment(attn(kv=own) + attn(kv=shared) + 2 @ conv, length=29, memory=3), width=16)",
    "lm(segment(reuse(attn + mlp, times=2, halt=act), length=64, memory=3), width=16, weights=sigma)",
    "lm(segment(mlp + 2 * (attn + mlp) + rglru, length=5, memory=2, carry=associative(4)), width=16)",
    "lm(attn(window=4) + mlp + blockrec(window=4, states=3) + mlp, width=16)",
    "lm(grc(window=4, states=3) + mlp + gated_fifo(window=5, states=2) + mlp, width=16)",
    "lm(segment(grc(window=2, states=3) + (gated_fifo(window=3) | attn), length=6, memory=3), width=16)",
    "lm(2 @ (blockrec(window=3, states=2) | attn) + reuse(blockrec(window=5), times=2, halt=act), width=16)",
    "lm(segment(blockrec(window=2, states=3) + mlp, length=5, memory=2), width=16)",
    "lm(segment(blockrec(window=4, states=3) + mlp, length=6, memory=4, carry=associative(4)), width=16)",
    "lm(segment(2 @ (gdn + mlp), length=14, memory=2, carry=associative(4)), width=16, weights=sigma)",
    "lm(attn(mask=prefix(6), kv=own) + 2 @ attn(kv=shared, mask=prefix(3)) + conv, width=16, shortcut=average)",
    "lm(reuse((attn(mask=prefix(5)) | gdn(init=prefix(7))) + mlp, times=2, halt=act) + based(init=prefix(9)), width=16)",
]
every_text = pytest.mark.parametrize("text", TEXTS)


def tokens(architecture: Architecture, length: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, architecture.vocab, (batch, length), generator=generator)


@every_text
@torch.no_grad()
def test_prefill_and_steps_equal_forward(text: str) -> None:
    architecture = parse(text)
    model = architecture.build(dtype=torch.float64)
    given = tokens(architecture, 29)
    expected = model(given)
    for pieces in ((1,), (7, 1, 9), (28,)):
        # The first piece holds the prefix, if there is one.
        pieces = (max(pieces[0], architecture.prefix), *pieces[1:])
        state, done = None, 0
        for piece in pieces:
            logits, state = model.prefill(given[:, done : done + piece], state, capacity=29)
            done += piece
            torch.testing.assert_close(logits, expected[:, done - 1])
        for t in range(done, 29):
            logits, state = model.step(given[:, t], state)
            torch.testing.assert_close(logits, expected[:, t])
        assert state is not None
        assert state.length == int(state.position) == 29


@pytest.mark.parametrize(
    ("units", "whole", "alone"),
    [
        # Two caches and what asks them, and a channel mixer between; behind them a channel mixer and two readers.
        ("attn(window=8) + mlp + attn(kv=own) + mlp + 2 * (attn(kv=shared) + mlp)", 10, 10),
        ("2 @ (attn + mlp)", 10, 2),
        ("attn + residual(attn + mlp)", 8, 2),
    ],
)
def test_a_prefill_leaves_layers_that_keep_nothing_to_the_last_token(
    units: str, whole: int, alone: int
) -> None:
    """Sun et al. 2024, section 2.3: behind the shared cache all tokens but the last leave early."""
    model = parse(f"lm({units}, width=64)").build()
    seen: list[int] = []

    def count(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.append(given[0].numel() // given[0].shape[-1])

    for product in model.stack.modules():
        if isinstance(product, torch.nn.Linear):
            product.register_forward_pre_hook(count)
    tokens = torch.randint(256, (1, 20), generator=torch.Generator().manual_seed(0))
    logits, _ = model.prefill(tokens)
    assert sorted(seen) == [1] * alone + [20] * whole
    torch.testing.assert_close(logits, model(tokens)[:, -1])


@every_text
@torch.no_grad()
def test_no_token_sees_a_later_one(text: str) -> None:
    architecture = parse(text)
    model = architecture.build(dtype=torch.float64)
    first, second = tokens(architecture, 29), tokens(architecture, 29, seed=1)
    second[:, :15] = first[:, :15]
    torch.testing.assert_close(model(first)[:, :15], model(second)[:, :15], rtol=1e-12, atol=1e-12)
    if ahead := architecture.prefix:
        second[:, :ahead] = first[:, :ahead]
        second[:, ahead] = (first[:, ahead] + 1) % architecture.vocab
        torch.testing.assert_close(model(first)[:, :ahead], model(second)[:, :ahead], rtol=1e-12, atol=1e-12)
        second[:, ahead - 1] = (first[:, ahead - 1] + 1) % architecture.vocab
        assert (model(first)[:, : ahead - 1] != model(second)[:, : ahead - 1]).any(2).all()


@every_text
@torch.no_grad()
def test_costs_are_those_of_the_built_model(text: str) -> None:
    architecture = parse(text)
    model = architecture.build()
    cost = architecture.cost(29)
    assert cost.params == sum(weight.numel() for weight in model.parameters())
    state = model.initial_state(1, 29)
    assert cost.state_bytes == sum(tensor.nbytes for layer in state.layers for tensor in layer.values())
    operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={operation: sdpa_cpu}) as counter:
        model(tokens(architecture, 29, batch=1))
    assert cost.flops == counter.get_total_flops()


@every_text
def test_one_training_step_moves_every_weight(text: str) -> None:
    architecture = parse(text)
    model = architecture.build()
    given = tokens(architecture, 29)
    logits = model(given[:, :-1])
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name


def test_seed_decides_the_weights_and_leaves_the_generator_alone() -> None:
    architecture = parse(TEXTS[2])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = architecture.build(seed=1), architecture.build(seed=1), architecture.build(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    given = tokens(architecture, 9)
    assert torch.equal(first(given), second(given))
    assert not torch.equal(first(given), other(given))


def test_a_first_loss_is_that_of_logits_of_unit_variance() -> None:
    """log 256 + 1/2, whatever the mixer and at any depth."""
    for depth in (1, 12):
        for word in ("attn", "gdn", "mamba2", "rglru"):
            architecture = parse(f"lm({depth} * ({word} + swiglu), width=64, embed=untied)")
            given = tokens(architecture, 33)
            logits = architecture.build()(given[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten())
            assert loss.item() == pytest.approx(6.045, abs=0.35)


def test_a_full_state_says_the_way_out() -> None:
    architecture = parse(TEXTS[0])
    model = architecture.build()
    given = tokens(architecture, 6)
    _, state = model.prefill(given, capacity=6)
    with pytest.raises(ValueError, match=r"full at 6 tokens.*capacity"):
        model.step(given[:, 0], state)
    with pytest.raises(ValueError, match=r"6 tokens after 6.*capacity=12"):
        model.prefill(given, state)
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(given[:, :0])


def test_a_prefix_is_of_the_whole_sequence() -> None:
    assert parse("lm(2 @ (attn(mask=prefix(6)) + mlp) + (attn(mask=prefix(9)) | gdn), width=16)").prefix == 9
    assert parse("lm(2 * (attn + mlp), width=16)").prefix == 0
    for carry in ("tokens", "associative(4)"):
        text = f"lm(attn + segment(residual(attn(mask=prefix(6)) + mlp), length=8, memory=2, carry={carry}), width=16)"
        found = parse(text).illegality()
        assert found is not None
        assert found.fault == "segments"
        assert found.sentence.startswith("layer 2: attn(mask=prefix(6)): its prefix is that of the sequence")
        assert found.sentence.endswith("put it outside the segment")


def test_illegal_architectures_and_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="heads 5 does not divide width 16"):
        parse("lm(attn(heads=5), width=16)").build()
    with pytest.raises(ValueError, match="'cuda' is not one of reference, torch"):
        parse(TEXTS[0]).build(backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'gpu' is none that torch knows; give cpu, cuda"):
        parse(TEXTS[0]).build(device="gpu")
    with pytest.raises(
        ValueError,
        match=r"device 'cuda:99' is not here: torch .* sees GPUs: .*; build with device='cpu'",
    ):
        parse(TEXTS[0]).build("triton", device="cuda:99")


@torch.no_grad()
def test_reused_weights_are_the_same_and_have_states_of_their_own() -> None:
    once, thrice = parse("lm(gdn, width=16)"), parse("lm(3 @ gdn, width=16)")
    assert once.cost(8).params == thrice.cost(8).params
    assert len(thrice.build().initial_state(1, 8).layers) == 3


@torch.no_grad()
def test_advance_can_be_replayed_on_its_own_buffers() -> None:
    """What a captured graph does: the same call again on the tensors that it was captured with."""
    architecture = parse(TEXTS[9])
    model = architecture.build(dtype=torch.float64)
    given = tokens(architecture, 12)
    _, state = model.prefill(given[:, :3], capacity=12)
    pointers = [tensor.data_ptr() for layer in state.layers for tensor in layer.values()]
    expected = model(given)
    for t in range(3, 12):
        logits, layers = model.advance(given[:, t], state.position, state.layers)
        state.position.add_(1)
        torch.testing.assert_close(logits, expected[:, t])
        assert [tensor.data_ptr() for layer in layers for tensor in layer.values()] == pointers


def test_the_stages_of_forward_can_be_called_one_by_one() -> None:
    model: LanguageModel = parse(TEXTS[0]).build()
    given = tokens(parse(TEXTS[0]), 9)
    assert torch.equal(model.head(model.body(model.embed(given))), model(given))


def test_catalogue_lists_the_folder_in_order() -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)
    assert {"attn", "conv", "glu", "linear", "mlp", "rec", "static"} <= set(CATALOGUE)
    for word, mixer in CATALOGUE.items():
        assert mixer.word() == word
        assert isinstance(mixer().build(64, "torch"), Part)


@every_text
@torch.no_grad()
def test_a_step_asks_the_device_for_no_value(text: str) -> None:
    """On fake tensors, which have no values, anything that reads one fails; so would capturing a graph."""
    architecture = parse(text)
    with FakeTensorMode():
        model = language_model(architecture, "torch").build()
        state = model.initial_state(2, 9)
        logits, _ = model.advance(torch.zeros(2, dtype=torch.int64), state.position, state.layers)
    assert logits.shape == (2, architecture.vocab)


@pytest.mark.parametrize(
    "name", ["transformer_gqa", "gdn", "kda", "parallel_hybrid", "rodimus_plus", "deepseek_v2"]
)
def test_a_published_size_on_meta_takes_no_memory(name: str) -> None:
    architecture = preset(name, "published")
    before = torch.random.get_rng_state()
    model = architecture.build(device="meta", dtype=torch.bfloat16)
    weights = list(model.parameters())
    assert sum(weight.numel() for weight in weights) == architecture.cost(1).params > 1e9
    assert all(each.is_meta for each in [*weights, *model.buffers()])
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    plain = [value for module in model.modules() for value in vars(module).values()]
    assert not any(isinstance(value, Tensor) for value in plain)
    assert torch.equal(torch.random.get_rng_state(), before)
