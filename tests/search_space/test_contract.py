"""What every mixer of the catalogue keeps to, over a spread of its genes.

No mixer is named here: genes and their legal values are read from the catalogue. The default and every alias pass each
test by itself; each value of each gene, and a covering array of pairs of them (see `covering`), pass the short form of
them all at the end.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import Any

import pytest
import torch
from covering import WIDTH, famous, genes, pairs, singles
from flops import Flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixforge.kernels import operands
from mixforge.search_space.genes import Form
from mixforge.search_space.mixer import Loan, Mixer
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.mixers.linear import Linear
from mixforge.search_space.parts.layer import Pass, Pointwise, TokenMixer
from mixforge.search_space.settled import why_illegal

LENGTHS = (1, 13, 63)


def cases(chosen: Callable[[str], Iterable[Mixer]]) -> pytest.MarkDecorator:
    """One test for each point."""
    return pytest.mark.parametrize(
        "mixer",
        [
            pytest.param(mixer, id=f"{word}{number}")
            for word in CATALOGUE
            for number, mixer in enumerate(chosen(word))
        ],
    )


def other_points(word: str) -> list[Mixer]:
    """Each gene in turn and the covering array of pairs, without the famous points."""
    return [each for each in dict.fromkeys([*singles(word), *pairs(word)]) if each not in famous(word)]


every_mixer = cases(famous)


def built(
    mixer: Mixer,
    dtype: torch.dtype = torch.float64,
    backend: str = "torch",
    width: int = WIDTH,
    seed: int = 0,
) -> TokenMixer:
    # `torch.manual_seed` notes where it was called, once for each kind of device.
    torch.default_generator.manual_seed(seed)
    module = mixer.build(width, backend).build().to(dtype).eval()  # type: ignore[arg-type]
    return Pointwise(module) if mixer.is_pointwise else module


def at(
    mixer: Mixer, start: int, end: int, dtype: torch.dtype = torch.float64, capacity: int = 0, batch: int = 2
) -> Pass:
    """A pass over tokens start to end, with what the mixer borrows, if anything."""
    shared = {
        name: lent(loan, start, end, max(end, capacity), batch, dtype)
        for name, loan in mixer.borrows(WIDTH).items()
    }
    return Pass(torch.arange(start, end), start, shared)


def lent(
    loan: Loan, start: int, end: int, capacity: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The same loan in every pass, as far as the pass can see it."""
    found = []
    for whole in drawn(loan):
        if loan.extent == "weights":
            found.append(whole.to(dtype))
            continue
        seen = whole[:batch].to(dtype)
        found.append(seen[:, :capacity].transpose(1, 2) if loan.extent == "cache" else seen[:, start:end])
    return tuple(found)


@cache
def drawn(loan: Loan) -> tuple[Tensor, ...]:
    """Weights, or entries of a hundred tokens of twelve sequences."""
    generator = torch.Generator().manual_seed(7)
    sizes = () if loan.extent == "weights" else (12, 100)
    found = [torch.randn(*sizes, *shape, generator=generator, dtype=torch.float64) for shape in loan.shapes]
    return tuple(each * each.shape[-1] ** -0.5 if loan.extent == "weights" else each for each in found)


def borrowed_bytes(mixer: Mixer, length: int, itemsize: int) -> int:
    """Bytes of what it borrows that one more token reads: a whole cache, the weights that it says; values are at hand."""
    entries = {"cache": length, "weights": 1, "pass": 0}
    return sum(
        entries[loan.extent] * torch.Size(_read_shape(loan, shape)).numel() * itemsize
        for loan in mixer.borrows(WIDTH).values()
        for shape in loan.shapes
    )


def _read_shape(loan: Loan, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if loan.read is None else (loan.read, *shape[1:])


def inputs(length: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def by_steps(module: TokenMixer, mixer: Mixer, x_BTD: Tensor, state: dict[str, Tensor], start: int) -> Tensor:
    outputs = []
    for t in range(start, x_BTD.shape[1]):
        module.between(state, t)
        y_BD, state = module.step(x_BTD[:, t], state, at(mixer, t, t + 1, x_BTD.dtype, x_BTD.shape[1]))
        outputs.append(y_BD)
    return torch.stack(outputs, 1)


def in_pieces(module: TokenMixer, mixer: Mixer, x_BTD: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """Pieces of these lengths, of which the first holds the whole prefix of a mixer that has one; then steps."""
    length = x_BTD.shape[1]
    state = module.initial_state(2, length, x_BTD.device, x_BTD.dtype)
    ends = [min(end, length) for end in accumulate(pieces)]
    ahead = min(mixer.prefix, length)
    ends = [ahead, *(end for end in ends if end > ahead)] if ahead else ends
    outputs = []
    for start, end in pairwise([0, *ends]):
        y_BTD, state = module(x_BTD[:, start:end], state, at(mixer, start, end))
        outputs.append(y_BTD)
    done = ends[-1] if ends else 0
    if done < length:
        outputs.append(by_steps(module, mixer, x_BTD, state, done))
    return torch.cat(outputs, 1)


@every_mixer
def test_step_equals_forward(mixer: Mixer) -> None:
    module = built(mixer)
    for length in LENGTHS:
        x_BTD = inputs(length)
        with torch.no_grad():
            whole, none = module(x_BTD, None, at(mixer, 0, length))
            steps = in_pieces(module, mixer, x_BTD, ())
        assert none is None
        torch.testing.assert_close(steps, whole, rtol=1e-9, atol=1e-9)


@every_mixer
@torch.no_grad()
def test_prefill_in_pieces_and_steps_equal_one_forward(mixer: Mixer) -> None:
    module = built(mixer)
    for pieces in ((1, 5, 7), (13, 40), (50, 1)):
        end = sum(pieces) + 3
        x_BTD = inputs(end)
        whole, _ = module(x_BTD, None, at(mixer, 0, end))
        torch.testing.assert_close(in_pieces(module, mixer, x_BTD, pieces), whole, rtol=1e-9, atol=1e-9)


@every_mixer
@torch.no_grad()
def test_no_token_sees_a_later_one(mixer: Mixer) -> None:
    """But for those of a prefix, which may see it whole."""
    module = built(mixer)
    x_BTD = inputs(63)
    before, _ = module(x_BTD, None, at(mixer, 0, 63))
    reacts = False
    for t in sorted({max(each, mixer.prefix) for each in (1, 20, 62)}):
        after, _ = module(changed_from(t, x_BTD), None, at(mixer, 0, 63))
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-12, atol=1e-12)
        reacts = reacts or not torch.allclose(after[:, t], before[:, t])
    assert reacts, "no token has a say in its own output"


def changed_from(t: int, x_BTD: Tensor) -> Tensor:
    """The same inputs before token t, others from it on."""
    return torch.cat([x_BTD[:, :t], inputs(x_BTD.shape[1], seed=2)[:, t:]], 1)


def counted_flops(module: TokenMixer, mixer: Mixer, length: int) -> int:
    x_BTD, place = inputs(length, torch.float32)[:1], at(mixer, 0, length, torch.float32, batch=1)
    with torch.no_grad(), Flops() as counted:
        module(x_BTD, None, place)
    return counted.total


@every_mixer
def test_parameters_and_flops_are_exact(mixer: Mixer) -> None:
    module = built(mixer, torch.float32)
    for length in (*LENGTHS, 32):
        cost = mixer.cost(WIDTH, length)
        assert cost.params == sum(weight.numel() for weight in module.parameters())
        assert cost.flops == counted_flops(module, mixer, length), f"at length {length}"


def written_bytes(mixer: Mixer, length: int, dtype: torch.dtype, batch: int = 12) -> int:
    """Bytes of a sequence's state that a step may change: looked for until three batches in a row change nothing new.

    Under three draws of weights in turn, as features of one may exclude one another.
    """
    modules: dict[int, TokenMixer] = {}
    changed: dict[str, Tensor] = {}
    idle = seed = written = 0
    while idle < 3:
        seed += 1
        draw = seed % 3
        if draw not in modules:
            modules[draw] = built(mixer, dtype, seed=draw)
        state = modules[draw].initial_state(batch, length + 1, torch.device("cpu"), dtype)
        generator = torch.Generator().manual_seed(seed)
        for tensor in state.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            # Small additions would be lost beside larger entries.
            tensor[::4] = 0
        before = {name: tensor.clone() for name, tensor in state.items()}
        x_BD = 3 * torch.randn(batch, WIDTH, generator=generator).to(dtype)
        _, state = modules[draw].step(x_BD, state, at(mixer, length, length + 1, dtype, batch=batch))
        for name, tensor in state.items():
            seen = changed.get(name, torch.zeros(())).bool()
            changed[name] = seen | (tensor != before[name]).any(0)
        found = sum(int(changed[name].sum()) * state[name].itemsize for name in changed)
        idle = 0 if found > written else idle + 1
        written = found
        if all(seen.all() for seen in changed.values()):
            break
    return written


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_state_and_decode_bytes_are_exact(mixer: Mixer, dtype: torch.dtype) -> None:
    module = built(mixer, dtype)
    for length in (1, 5, 63):
        cost = mixer.cost(WIDTH, length, dtype.itemsize)
        kept = module.initial_state(1, length, torch.device("cpu"), dtype)
        assert cost.state_bytes == sum(tensor.nbytes for tensor in kept.values())
        # One more token: every entry that changes is written, and all that was kept is read.
        written = written_bytes(mixer, length, dtype)
        read = cost.state_bytes + borrowed_bytes(mixer, length, dtype.itemsize)
        assert cost.decode_bytes == cost.active_params * dtype.itemsize + read + written, (
            f"at length {length}"
        )


@every_mixer
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradients_are_finite_and_reach_every_weight(mixer: Mixer, scale: float) -> None:
    module = built(mixer, torch.float32)
    x_BTD = (scale * inputs(63, torch.float32)).requires_grad_()
    y_BTD, _ = module(x_BTD, None, at(mixer, 0, 63, torch.float32))
    (y_BTD * inputs(63, torch.float32, seed=3)).sum().backward()
    assert x_BTD.grad is not None
    assert torch.isfinite(x_BTD.grad).all()
    for name, weight in module.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        if scale == 1.0:
            assert weight.grad.abs().max() > 0, name


@every_mixer
@torch.no_grad()
def test_backends_agree(mixer: Mixer) -> None:
    reference, fast = (built(mixer, torch.float32, backend) for backend in ("reference", "torch"))
    x_BTD = inputs(63, torch.float32)
    expected, _ = reference(x_BTD, None, at(mixer, 0, 63, torch.float32))
    y_BTD, _ = fast(x_BTD, None, at(mixer, 0, 63, torch.float32))
    torch.testing.assert_close(y_BTD, expected, rtol=1e-4, atol=1e-5)


@every_mixer
def test_bfloat16_stays_bfloat16(mixer: Mixer) -> None:
    _check_bfloat16(mixer, 0.1)


@torch.no_grad()
def _check_bfloat16(mixer: Mixer, most: float, share: float = 1.0) -> None:
    """The error of the outputs, of this share of the tokens, those of the least errors."""
    module = built(mixer, torch.bfloat16)
    x_BTD = inputs(13, torch.bfloat16)
    y_BTD, _ = module(x_BTD, None, at(mixer, 0, 13, torch.bfloat16))
    assert y_BTD.dtype == torch.bfloat16
    state = module.initial_state(2, 13, x_BTD.device, x_BTD.dtype)
    y_BD, after = module.step(x_BTD[:, 0], state, at(mixer, 0, 1, torch.bfloat16, 13))
    assert y_BD.dtype == torch.bfloat16
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    # The same rounded weights and inputs, so that a choice, as of experts, is the same one.
    expected, _ = module.double()(x_BTD.double(), None, at(mixer, 0, 13))
    errors = (y_BTD.double() - expected).square().mean(-1).flatten().sort().values
    error = errors[: round(share * len(errors))].mean().sqrt() / expected.square().mean().sqrt()
    assert error < most


@every_mixer
@torch.no_grad()
def test_a_step_writes_into_the_state_that_it_was_given(mixer: Mixer) -> None:
    module = built(mixer, torch.float32)
    state = module.initial_state(2, 4, torch.device("cpu"), torch.float32)
    _, after = module.step(inputs(1, torch.float32)[:, 0], state, at(mixer, 0, 1, torch.float32, 4))
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }


class Apart(TorchDispatchMode):
    """Refuses what waits for the host or brings a number from it, which a graph of a GPU's work cannot capture."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        refused = (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)
        assert func not in refused, f"a step calls {func}"
        return func(*args, **(kwargs or {}))


@every_mixer
@torch.no_grad()
def test_a_step_exchanges_nothing_with_the_host(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, whose values no check looks at.
    monkeypatch.setattr(operands, "is_at_hand", lambda given: False)
    module = built(mixer, torch.float32)
    state = module.initial_state(2, 4, torch.device("cpu"), torch.float32)
    x_BD, place = inputs(1, torch.float32)[:, 0], at(mixer, 0, 1, torch.float32, 4)
    with Apart():
        module.step(x_BD, state, place)


@every_mixer
@torch.no_grad()
def test_weights_are_those_of_the_seed(mixer: Mixer) -> None:
    first, second = built(mixer), built(mixer)
    x_BTD = inputs(13)
    y_BTD, _ = first(x_BTD, None, at(mixer, 0, 13))
    again, _ = second(x_BTD, None, at(mixer, 0, 13))
    assert torch.equal(y_BTD, again)


def narrowed(mixer: Mixer, share: Fraction) -> Mixer | None:
    """The branch with this share of the heads; None where they do not divide so, or what is left is illegal."""
    try:
        branch = mixer.narrow(WIDTH, share)
    except ValueError:
        return None
    return branch if branch.why_illegal(WIDTH) is None else None


def test_a_branch_with_a_share_of_the_heads_is_canonical_and_smaller() -> None:
    seen = 0
    for word in CATALOGUE:
        for mixer in singles(word) + pairs(word):
            for parts in (2, 3):
                branch = narrowed(mixer, Fraction(1, parts))
                if branch is None:
                    continue
                assert branch.canonical(WIDTH) == branch
                assert branch.cost(WIDTH, 13).params < mixer.cost(WIDTH, 13).params
                seen += 1
    assert seen > 20


@every_mixer
def test_canonical_is_idempotent_and_the_same_model(mixer: Mixer) -> None:
    assert mixer.canonical(WIDTH) == mixer
    assert mixer.why_illegal(WIDTH) is None


def uncanonical(word: str, most: int = 2) -> list[Mixer]:
    """Points with a value of a gene that is put back: of each value, on the first of the default and the aliases."""
    kind = CATALOGUE[word]
    bases = [kind(), *(kind(**given) for given in kind.aliases.values())]
    found: list[Mixer] = []
    for name, options in genes(kind).items():
        for value in options:
            some = (replace(base, **{name: value}) for base in bases)
            legal = (each for each in some if why_illegal(each, WIDTH) is None)
            back = (each for each in legal if getattr(each.canonical(WIDTH), name) != value)
            found += islice(back, most)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("word", CATALOGUE)
@torch.no_grad()
def test_a_gene_put_back_to_its_default_changes_no_module(word: str) -> None:
    """The same weights give the same outputs and costs, whether or not the genes without an effect are said."""
    for given in uncanonical(word):
        plain = given.canonical(WIDTH)
        assert given.cost(WIDTH, 13) == plain.cost(WIDTH, 13), given
        first, second = built(given), built(plain)
        second.load_state_dict(first.state_dict())
        x_BTD = inputs(13)
        y_BTD, _ = first(x_BTD, None, at(given, 0, 13))
        same, _ = second(x_BTD, None, at(plain, 0, 13))
        torch.testing.assert_close(y_BTD, same, rtol=1e-12, atol=1e-14, msg=str(given))
        for each in (first, second):
            each.train()
        torch.manual_seed(5)
        y_BTD, _ = first(x_BTD, None, at(given, 0, 13))
        torch.manual_seed(5)
        same, _ = second(x_BTD, None, at(plain, 0, 13))
        torch.testing.assert_close(y_BTD, same, rtol=1e-12, atol=1e-14, msg=f"{given} in training")


@cases(other_points)
def test_every_gene_and_pair_of_genes_keeps_to_it(mixer: Mixer) -> None:
    test_canonical_is_idempotent_and_the_same_model(mixer)
    module = built(mixer, torch.float32)
    cost = mixer.cost(WIDTH, 29)
    assert cost.params == sum(weight.numel() for weight in module.parameters())
    assert cost.flops == counted_flops(module, mixer, 29)
    kept = module.initial_state(1, 29, torch.device("cpu"), torch.float32)
    assert cost.state_bytes == sum(tensor.nbytes for tensor in kept.values())
    fewer = mixer.cost(WIDTH, 5)
    with torch.no_grad():
        written = written_bytes(mixer, 5, torch.float32)
    read = fewer.active_params * 4 + fewer.state_bytes + borrowed_bytes(mixer, 5, 4)
    assert fewer.decode_bytes == read + written
    # Heads of two or three channels behind a norm make more of a rounding. Where two scores are all that is normalised,
    # a token of which they nearly tie may fall to the other side.
    _check_bfloat16(mixer, 0.3, share=0.9 if isinstance(mixer, Attn) and mixer.score == "normalise" else 1.0)
    _check_sequence_forms(mixer)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")
@pytest.mark.parametrize("word", CATALOGUE)
def test_every_point_can_be_built_for_triton(word: str) -> None:
    """But for those that say why: rules that cannot cut a state, over more key channels than a kernel holds."""
    for mixer in pairs(word):
        has_slots = isinstance(mixer, Linear) and isinstance(mixer.rule, Form)
        one_state = isinstance(mixer, Linear) and (
            mixer.rule == "dplr" or mixer.decay == "both" or (mixer.rule == "delta" and mixer.levels == "log")
        )
        most = 128 if has_slots else 256 if one_state else None
        if isinstance(mixer, Linear) and most is not None and mixer.sizes(WIDTH).features > most:
            with pytest.raises(ValueError, match=rf"at most {most} key channels with (rule|decay)="):
                mixer.build(WIDTH, "triton")
        else:
            mixer.build(WIDTH, "triton")


def _check_sequence_forms(mixer: Mixer) -> None:
    """In pieces and by steps as at once, causally, with finite gradients for every weight."""
    module = built(mixer)
    x_BTD = inputs(29).requires_grad_()
    whole, _ = module(x_BTD, None, at(mixer, 0, 29))
    (whole * inputs(29, seed=3)).sum().backward()
    assert x_BTD.grad is not None
    assert torch.isfinite(x_BTD.grad).all()
    for name, weight in module.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
    with torch.no_grad():
        pieces = in_pieces(module, mixer, x_BTD, (6, 13))
        torch.testing.assert_close(pieces, whole.detach(), rtol=1e-9, atol=1e-9)
        for t in {mixer.prefix or 17, 17}:
            after, _ = module(changed_from(t, x_BTD), None, at(mixer, 0, 29))
            torch.testing.assert_close(after[:, :t], whole[:, :t], rtol=1e-12, atol=1e-12)
        # Keys and values that are borrowed are not of these inputs.
        if mixer.prefix and not mixer.borrows(WIDTH):
            after, _ = module(changed_from(mixer.prefix - 1, x_BTD), None, at(mixer, 0, 29))
            assert not torch.allclose(after[:, 0], whole[:, 0]), "the first token does not see its prefix"
