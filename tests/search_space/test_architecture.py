"""The value: limits, legality, costs exact to the built model, layers, copies across processes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from mixforge.search_space.architecture import Architecture, Beside, Layer, Reuse
from mixforge.search_space.mixers.attn import Attn
from mixforge.search_space.mixers.glu import Glu
from mixforge.search_space.notation import parse

MODELS = [
    "lm(attn + swiglu, width=64)",
    "lm(2 * (gdn + swiglu) + attn(kv=mqa, window=8) + geglu, width=96, vocab=100, embed=untied)",
    "lm(mamba2 + rglru + conv + mlp, width=64, norm=layer, place=post)",
    "lm(3 @ (attn + swiglu) + retnet, width=64, place=sandwich)",
    "lm((attn | swiglu) + (2*attn | gdn), width=192)",
    "lm(beside(attn, gdn, fuse=mean) + swiglu, width=64)",
    "lm(beside(attn, gdn, kda, fuse=gate) + swiglu, width=64, norm=layer, place=sandwich)",
    "lm(2 @ beside(attn, swiglu, fuse=concat), width=64)",
    "lm(attn(window=8) + attn(kv=own) + swiglu + 2 * attn(kv=shared), width=64)",
    "lm(attn + beside(attn, swiglu, fuse=scalar, norm=rms), width=64, norm=simple)",
    "lm(3 @ (attn + swiglu), width=64, norm=layer, place=gated)",
]


@pytest.mark.parametrize("text", MODELS)
def test_parameters_are_those_of_the_built_model(text: str) -> None:
    architecture = parse(text)
    assert architecture.why_illegal() is None
    model = architecture.build()
    assert architecture.cost(16).params == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("text", MODELS)
def test_state_bytes_are_those_of_the_built_model(text: str) -> None:
    architecture = parse(text)
    state = architecture.build().initial_state(batch=1, capacity=16)
    held = sum(tensor.numel() * tensor.element_size() for layer in state.layers for tensor in layer.values())
    assert architecture.cost(16).state_bytes == held


def test_costs_add_up_by_hand() -> None:
    one = Attn().cost(64, 10)
    channel = Glu().cost(64, 10)
    cost = parse(
        "lm(2 @ (attn + swiglu), width=64, vocab=50, embed=untied, norm=layer, place=sandwich)"
    ).cost(10)
    norms = 2 * 2 * 128
    assert cost.params == one.params + channel.params + norms + 2 * 50 * 64 + 128
    assert cost.flops == 2 * (one.flops + channel.flops) + 2 * 10 * 50 * 64
    assert cost.state_bytes == 2 * one.state_bytes
    read = 2 * (one.decode_bytes + channel.decode_bytes + 4 * norms)
    assert cost.decode_bytes == read + 4 * (64 + 50 * 64 + 128)
    with pytest.raises(ValueError, match="length 0"):
        parse("lm(attn, width=64)").cost(0)


@pytest.mark.parametrize(
    ("text", "fault", "saying"),
    [
        ("lm(swiglu, width=64)", "no token mixer", "add one"),
        ("lm(attn(heads=5) + swiglu, width=64)", "genes", "layer 1: attn(heads=5): heads 5 does not divide"),
        ("lm(attn + 2 @ (swiglu + attn(heads=5)), width=64)", "genes", "layer 2: attn(heads=5)"),
        ("lm((attn(heads=5) | swiglu), width=64)", "genes", "layer 1: attn(heads=5)"),
        ("lm(2*attn | gdn, width=64)", "shares", "layer 1"),
        ("lm(attn + attn(kv=shared), width=64)", "no owner", "layer 2: attn(kv=shared) reads"),
        ("lm(attn(kv=own) | attn(kv=shared), width=64)", "no owner", "beside it"),
        (
            "lm(attn(kv=own) + segment(attn(kv=shared), length=8, memory=2), width=64)",
            "no owner",
            "no layer before it in its segment",
        ),
        (
            "lm(segment(attn + 2 @ segment(attn, length=4, memory=2), length=8, memory=2), width=64)",
            "segments",
            "layer 1: a segment inside a segment",
        ),
        ("lm(attn(kv=own) + attn(kv=shared, heads=4), width=64)", "no owner", "4 x 16"),
        (
            "lm(segment(mlp + residual(attn(reads=embeddings) + mlp), length=8, memory=2), width=64)",
            "no owner",
            "put it outside the segment",
        ),
        ("lm(attn(reads=embeddings) | mlp, width=64)", "genes", "put it in a layer of its own"),
        (
            "lm(residual(mlp + attn(heads=5)), width=64)",
            "genes",
            "layer 1: attn(heads=5): heads 5 does not divide",
        ),
        (
            "lm(attn(kv=own, pos=none) + attn(kv=shared), width=64)",
            "no owner",
            "with pos=rope, theta=10000, rotary=1",
        ),
        (
            "lm(attn(kv=own) + attn(kv=shared, theta=500), width=64)",
            "no owner",
            "give both the same position",
        ),
        (
            "lm(attn + 2 @ (mlp + mlp), width=64, norm=prepbn(9))",
            "norm",
            "norm=prepbn(9): training takes",
        ),
        ("lm(segment(attn, length=8, memory=2), width=64, norm=prepbn(9))", "norm", "say norm=layer"),
    ],
)
def test_illegal_architectures_say_why(text: str, fault: str, saying: str) -> None:
    architecture = parse(text)
    found = architecture.illegality()
    assert found is not None
    assert found.fault == fault
    assert saying in found.sentence
    assert architecture.why_illegal() == found.sentence
    assert parse(str(architecture)) == architecture
    with pytest.raises(ValueError, match=r"."):
        architecture.build()


def test_genes_beyond_their_values_are_illegal_from_python_too() -> None:
    wrong = Architecture((Layer(Attn(window=-3)),), width=64)
    assert "window=-3 is not legal" in (wrong.why_illegal() or "")
    assert (
        Attn(window=-3, heads=0).fault
        == "heads=0 is not legal; expected a whole number from 1 to 256 or auto"
    )
    # It equals 1, so it is written as 1.
    assert Attn(dilation=True, heads=True).json == Attn(heads=1).json


@pytest.mark.parametrize(
    ("changes", "saying"),
    [
        ({"stack": ()}, "at least one layer"),
        ({"width": 0}, "width 0"),
        ({"vocab": 1}, "vocab 1"),
        ({"norm": "rmz"}, "did you mean 'rms'"),
        ({"eps": 1.0}, "eps 1.0 is not legal; expected a number from 1e-12 to 0.1"),
        ({"softcap": "nun"}, "did you mean 'none'"),
        ({"stack": (Layer(Attn()),) * 1025}, "at most 1024"),
        ({"stack": (Reuse(1000, (Layer(Attn()), Layer(Attn()))),)}, "at most 1024"),
    ],
)
def test_limits_hold_from_python_too(changes: dict[str, object], saying: str) -> None:
    given: dict[str, object] = {"stack": (Layer(Attn()),), "width": 64, **changes}
    with pytest.raises(ValueError, match=saying):
        Architecture(**given)  # type: ignore[arg-type]


def test_units_refuse_what_is_none() -> None:
    for make in (
        lambda: Reuse(0, (Layer(Attn()),)),
        lambda: Reuse(2, ()),
        lambda: Beside((Attn(),)),
        lambda: Beside((Attn(), Attn()), "product"),  # type: ignore[arg-type]
        lambda: Beside((Attn(), Attn()), "sum", (1, 0)),
    ):
        with pytest.raises(ValueError, match=r"."):
            make()


def test_replace_keeps_the_stack() -> None:
    architecture = parse("lm(3 * (gdn + swiglu), width=128)")
    wider = architecture.replace(vocab=1000, embed="untied")
    assert str(wider) == "lm(3 * (gdn + swiglu), width=128, vocab=1000, embed=untied)"
    assert wider.stack == architecture.stack
    assert wider.digest != architecture.digest
    assert architecture.replace() == architecture


def test_layers_are_a_flat_list_for_tables() -> None:
    architecture = parse("lm(attn(window=8) + 2 @ (gdn + swiglu) + (attn | swiglu), width=64)")
    rows = [(row.number, row.name, row.genes, row.kind, row.times, row.beside) for row in architecture.layers]
    assert rows == [
        (1, "attn", "window=8", "token", 1, 1),
        (2, "gdn", "", "token", 2, 1),
        (3, "swiglu", "", "channel", 2, 1),
        (4, "attn", "", "token", 1, 2),
        (4, "swiglu", "", "channel", 1, 2),
    ]
    inside = sum(row.cost(16).flops for row in architecture.layers)
    assert architecture.cost(16).flops == inside + 2 * 16 * 256 * 64
    assert architecture.mixers == ("attn", "gdn", "swiglu")
    assert architecture.depth == 6


def test_canonical_json_is_flat_and_drops_defaults() -> None:
    record = json.loads(
        parse("lm(2 * (attn(window=8) + swiglu) + 2 @ gdn, width=64, place=post)").canonical_json
    )
    assert record == {
        "place": "post",
        "units": [
            ["attn", {"window": 8}],
            ["glu", {}],
            ["attn", {"window": 8}],
            ["glu", {}],
            {"reuse": 2, "body": [["linear", {"decay": "scalar", "rule": "delta"}]]},
        ],
        "width": 64,
    }


def test_digests_are_the_same_in_every_process_and_reading_loads_no_torch() -> None:
    text = "lm(2 * (gdn + swiglu) + (2*attn | gdn), width=192)"
    code = f"""
import sys
import mixforge.search_space.architecture
assert "torch" not in sys.modules
import pickle
from mixforge import parse
architecture = parse({text!r})
hash(architecture.stack[0].mixer)
sys.stdout.buffer.write(pickle.dumps(architecture))
"""
    # A worker has other string hashes than its driver: what crosses must not hold any.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    import pickle

    sent = pickle.loads(done.stdout)  # noqa: S301
    assert isinstance(sent, Architecture)
    assert sent == parse(text)
    assert sent.digest == parse(text).digest
    unit = parse(text).stack[0]
    assert {sent.stack[0]} == {unit}
    assert isinstance(sent.stack[0], Layer)
    assert isinstance(unit, Layer)
    assert {sent.stack[0].mixer} == {unit.mixer}


def test_architectures_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("lm(attn, width=64)").width = 128  # type: ignore[misc]
