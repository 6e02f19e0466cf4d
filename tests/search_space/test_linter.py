"""The linter: what it says of architectures and spaces before a device is touched."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from mixforge.search_space.grammar import Space
from mixforge.search_space.limits import read_limits
from mixforge.search_space.linter import Finding, lint, lint_space, survey
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import PRESETS, preset
from mixforge.search_space.probe import probe


def of(findings: Iterable[Finding], severity: str) -> list[tuple[str, str]]:
    return [(each.rule, each.sentence) for each in findings if each.severity == severity]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_errors(name: str) -> None:
    assert of(lint(preset(name)), "error") == []


@pytest.mark.parametrize(
    "name", ["griffin", "hybrid_3to1", "parallel_hybrid", "yoco", "jrt_rnn", "universal_transformer"]
)
def test_a_gradient_flows_through_known_models(name: str) -> None:
    found = lint(preset(name), flow=True)
    assert of(found, "error") + of(found, "warning") == []
    assert {"genes", "token mixer", "causality", "residual", "params", "state", "gradient"} <= {
        each.rule for each in found
    }
    assert ("read together" in dict(of(found, "note"))["causality"]) == (preset(name).prefix > 0)


@pytest.mark.parametrize(
    ("text", "rule", "said"),
    [
        ("lm(mlp + swiglu, width=64)", "no token mixer", "no layer mixes tokens"),
        ("lm(attn(heads=5) + mlp, width=64)", "genes", "layer 1: attn(heads=5): heads 5 does not divide"),
        ("lm(attn + attn(kv=shared), width=64)", "no owner", "layer 2"),
        ("lm(2 * attn | 1 * conv, width=64)", "shares", "layer 1"),
    ],
)
def test_what_cannot_be_built_is_an_error(text: str, rule: str, said: str) -> None:
    errors = of(lint(parse(text), flow=True), "error")
    assert [each for each, _ in errors] == [rule]
    assert said in errors[0][1]


def test_every_faulty_layer_is_named() -> None:
    errors = of(lint(parse("lm(attn + attn(heads=5) + gdn(heads=7) + mlp, width=64)")), "error")
    assert [sentence.partition(":")[0] for _, sentence in errors] == ["layer 2", "layer 3"]


def test_limits_are_held_from_the_text_alone() -> None:
    architecture = parse("lm(attn + mlp, width=64)")
    limits = read_limits({"params": "<= 1e4", "state_bytes": "<= 1e8 at 100"})
    errors = of(lint(architecture, limits), "error")
    assert errors == [("limits", f"params is {architecture.cost(1).params}, the limit is params <= 10000")]
    kept = of(lint(architecture, limits[1:]), "note")
    assert ("limits", "keeps to state_bytes <= 100000000 at 100") in kept
    assert ("state", "524288 bytes of state after 1024 tokens, then 512 more for each token") in of(
        lint(architecture, context=1024), "note"
    )
    constant = dict(of(lint(parse("lm(gdn + mlp, width=64)")), "note"))
    assert constant["state"].endswith("no more however long the context is")


def test_shared_caches_and_deep_post_norm_are_told() -> None:
    notes = dict(of(lint(preset("yoco")), "note"))
    assert notes["sharing"] == "what 1 owner lent is read by 1 mixer"
    notes = dict(of(lint(preset("block_state_transformer")), "note"))
    assert notes["sharing"] == "mixers that read what the branches beside them say: 3"
    deep = of(lint(parse("lm(12 * (attn + mlp), width=64, place=post)")), "warning")
    assert [rule for rule, _ in deep] == ["residual"]


def test_the_probe_keeps_the_stack_and_makes_it_narrow() -> None:
    flow = probe(
        parse("lm(3 * (gdn + swiglu) + attn(heads=16, kv=gqa(4)) + swiglu, width=1024, vocab=50000)")
    )
    assert flow.width < 1024
    assert flow.is_finite
    assert flow.is_causal
    assert flow.dead == ()
    long, short = (parse(f"lm(attn(mask=prefix({n})) + mlp, width=64)") for n in (4096, 16))
    with pytest.raises(
        ValueError, match=r"prefix of 4096 tokens, .* at most 2048: say a shorter .* leave out --flow"
    ):
        probe(long)
    # The way out that it names asks the same of the same weights.
    assert long.cost(1).params == short.cost(1).params
    assert probe(short).length == 16 + 48
    with pytest.raises(ValueError, match="cannot be built"):
        probe(parse("lm(mlp, width=64)"))


def test_a_probe_of_too_many_parameters_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixforge.search_space.probe.MOST_PARAMS", 1000)
    with pytest.raises(ValueError, match=r"parameters at width 32, .* at most 1000: .* leave out --flow"):
        probe(parse("lm(attn + mlp, width=64)"))


def test_the_probe_sees_what_only_training_reaches_and_says_the_same_again() -> None:
    # The batch norms count from the second training pass on; windows and first states are drawn in training.
    layers = "attn(window=stochastic(4, 16)) + linear(init=noise(1)) + mlp"
    architecture = parse(f"lm({layers}, width=32, norm=prepbn(100))")
    flow = probe(architecture)
    assert flow.dead == ()
    assert flow.is_causal
    before = torch.random.get_rng_state()
    assert probe(architecture) == flow
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_no_gradient_reaches_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: original(x).detach())
    warnings = of(lint(parse("lm(attn + mlp, width=32)"), flow=True), "warning")
    assert [rule for rule, _ in warnings] == ["gradient"]
    # The projection before the activation, and the norm before that.
    assert warnings[0][1].startswith("no gradient reaches 2 weights: stack.units.1.")


@pytest.mark.parametrize(
    ("changed", "severity", "rule", "said"),
    [
        (
            {"ratio": 1e-5},
            "warning",
            "gradient",
            "vanishing: the gradient after the first unit is 1e-05 times",
        ),
        (
            {"ratio": 1e5},
            "warning",
            "gradient",
            "exploding: the gradient after the first unit is 1e+05 times",
        ),
        ({"is_finite": False}, "error", "gradient", "not finite"),
        ({"is_causal": False}, "error", "causality", "a later token changes"),
    ],
)
def test_what_a_gradient_shows_is_told(
    changed: dict[str, object], severity: str, rule: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = replace(probe(parse("lm(conv, width=32)")), **changed)  # type: ignore[arg-type]
    monkeypatch.setattr("mixforge.search_space.probe.probe", lambda architecture: flow)
    found = of(lint(parse("lm(conv, width=32)"), flow=True), severity)
    assert [each for each, _ in found] == [rule]
    assert said in found[0][1]


def test_a_survey_counts_reasons_rates_and_repairs() -> None:
    space = Space.from_table({
        "start": "lm(any(1, 2) ** any(attn(heads=any(1, 2, 5)), mlp), width=any(32, 64))",
        "limits": {"params": "<= 5e4"},
    })  # fmt: skip
    found = survey(space, random.Random(0), draws=300, repairs=10)
    assert (found.drawn, found.admitted + sum(found.rejected.values())) == (300, 300)
    assert 0 < found.rate < 1
    assert set(found.rejected) == {"illegal: genes", "illegal: no token mixer", "limit: params <= 50000"}
    assert {option for _, option, _ in found.barren} == {"5"}
    assert found.tried == 10
    assert found.repaired == len(found.changes) == 10
    sentences = {each.rule: each for each in lint_space(found)}
    assert sentences["rate"].severity == "note"
    assert "of 300 draws gave candidates" in sentences["rate"].sentence
    assert "and never in a candidate" in sentences["option"].sentence
    assert "10 of 10 refused sentences could be repaired" in sentences["repair"].sentence
    assert sentences["duplicates"].severity == "warning"
    assert survey(space, random.Random(0), draws=300, repairs=10) == found


def test_a_space_without_candidates_is_an_error() -> None:
    space = Space.from_table({"start": "lm(any(mlp, swiglu), width=64)"})
    found = survey(space, random.Random(0), draws=5)
    assert [each.rule for each in lint_space(found) if each.severity == "error"] == ["rate"]
    with pytest.raises(ValueError, match="draws 0"):
        survey(space, random.Random(0), draws=0)


def test_linting_a_text_needs_no_model() -> None:
    code = (
        "from mixforge.search_space.linter import lint\n"
        "from mixforge.search_space.notation import parse\n"
        "import sys\n"
        "lint(parse('lm(attn + mlp, width=64)'))\n"
        "assert 'mixforge.search_space.probe' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
