"""Grammars: drawing, counting, listing, membership and named choices, against plain expansion."""

from __future__ import annotations

import pickle
import random
import tomllib
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from mixforge.search_space import membership
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.derivation import Derivation
from mixforge.search_space.grammar import Rejection, Space, weighted
from mixforge.search_space.notation import parse
from mixforge.search_space.production import Overgrown
from mixforge.search_space.syntax import Apply, Expression, Name, Number, Operation, Table, read

LAPTOP = Path(__file__).parents[2] / "examples" / "laptop.toml"

SPACES: dict[str, dict[str, object]] = {
    "one line": {"start": "lm(4 ** any(attn, swiglu, rglru), width=64)"},
    "no choice": {"start": "lm(2 * (attn + swiglu), width=64)"},
    "whole models": {
        "start": "any(lm(attn, width=64), lm(stack, width=any(32, 64)))",
        "rules": {"stack": "conv"},
    },
    "copies and draws": {
        "start": "lm(stack, width=any(64, 96), norm=any(rms, layer))",
        "rules": {
            "stack": "any(1, 2) ** group",
            "group": "any(1, 2) * (token + mlp)",
            "token": "any(gdn, conv)",
        },
    },
    "recursion": {
        "start": "lm(stack, width=64)",
        "rules": {"stack": "any(layer, layer + stack, 2 * stack)", "layer": "any(attn, swiglu)"},
        "recursion": 3,
    },
    "left recursion": {
        "start": "lm(stack, width=64)",
        "rules": {"stack": "any(attn, stack + any(conv, mlp))"},
        "recursion": 4,
    },
    "beside and reuse": {
        "start": "lm(any(1, 2, 4) @ (any(2, 3) @ mixed) + mlp, width=64)",
        "rules": {"mixed": "any(gdn | attn(heads=4), beside(conv, attn, fuse=any(sum, mean)), conv)"},
    },
    "long forms": {
        "start": "lm(any(reuse(body, times=any(2, 3), halt=any(none, act)), "
        "segment(body, length=any(8, 16), memory=2)) + mlp, width=64, place=any(pre, gated), eps=any(auto, 1e-5))",
        "rules": {"body": "attn + any(mlp, beside(conv, attn, fuse=scalar, norm=any(none, rms)))"},
    },
    "residuals": {
        "start": "lm(2 * around + any(attn, residual(around + gdn)), width=64, place=any(pre, inside))",
        "rules": {"around": "residual(attn + any(mlp, mlp | conv), place=any(auto, pre, post))"},
    },
    "same places": {
        "start": "lm(any(a + a, a + b + a, any(b, 2 * b)), width=any(32, 64))",
        "rules": {
            "a": "any(attn, conv)",
            "b": "attn(window=any(none, any(16, 32)), kv=kinds)",
            "kinds": "any(mha, mqa)",
        },
    },
}  # fmt: skip


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> Space:
    return Space.from_table(SPACES[request.param])


def expand(node: Expression, rules: dict[str, Expression], left: dict[str, int]) -> list[str]:
    """Every sentence as text, by substitution. `left`: how often each recursive rule may still be entered."""
    match node:
        case Name() if node.id in rules:
            if left.get(node.id, 1) == 0:
                return []
            fewer = {name: room - 1 for name, room in left.items()} if node.id in left else left
            return expand(rules[node.id], rules, fewer)
        case Name() | Number():
            return [str(node)]
        case Apply(function="any", arguments=(Table(pairs=pairs),)):
            return [text for option, _ in pairs for text in expand(option, rules, left)]
        case Apply(function="any"):
            return [text for option in node.arguments for text in expand(option, rules, left)]
        case Apply():
            lists = [expand(each, rules, left) for each in node.arguments]
            lists += [
                [f"{name}={text}" for text in expand(each, rules, left)] for name, each in node.keywords
            ]
            return [f"{node.function}({', '.join(texts)})" for texts in product(*lists)]
        case Operation(symbol="**"):
            bodies = expand(node.right, rules, left)
            drawn: list[str] = []
            for times in expand(node.left, rules, left):
                drawn += [f"({' + '.join(texts)})" for texts in product(bodies, repeat=int(times))]
            return drawn
        case Operation():
            pairs = product(expand(node.left, rules, left), expand(node.right, rules, left))
            return [f"({first} {node.symbol} {second})" for first, second in pairs]
    raise AssertionError(node)


def expanded(table: dict[str, object]) -> list[Architecture]:
    rules = {name: read(text) for name, text in table.get("rules", {}).items()}  # type: ignore[attr-defined]
    left = {"stack": table["recursion"]} if "recursion" in table else {}
    return [parse(text) for text in expand(read(str(table["start"])), rules, left)]  # type: ignore[arg-type]


@pytest.mark.parametrize("table", SPACES.values(), ids=SPACES)
def test_sentences_are_those_of_plain_expansion(table: dict[str, object]) -> None:
    space = Space.from_table(table)
    wanted = expanded(table)
    listed = list(space.enumerate())
    assert space.count() == len(listed) == len(wanted)
    assert Counter(each.architecture for each in listed) == Counter(wanted)
    legal = {each for each in wanted if each.illegality() is None}
    assert space.distinct() == len(legal)


def test_listing_is_lazy_stable_and_without_repeats(space: Space) -> None:
    first, second = list(space.enumerate()), list(space.enumerate())
    assert first == second
    picks = [tuple(each.picks.items()) for each in first]
    assert len(set(picks)) == len(picks)
    huge = Space.from_text("lm(40 ** any(attn, swiglu, conv), width=64)")
    assert huge.count() == 3**40
    assert str(next(huge.enumerate()).architecture) == "lm(40 * attn, width=64)"


def test_names_have_one_set_of_options_and_come_once(space: Space) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for derivation in space.enumerate():
        names = [choice.name for choice in derivation.choices]
        assert len(set(names)) == len(names)
        for choice in derivation.choices:
            assert seen.setdefault(choice.name, choice.options) == choice.options
            assert len(set(choice.options)) == len(choice.options) > 1


def test_picks_replay_to_the_same_derivation(space: Space) -> None:
    def unasked(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        raise AssertionError(f"{name} was not answered")

    for derivation in space.enumerate():
        assert space.replay(derivation.picks, unasked) == derivation


def test_draws_are_listed_sentences_and_follow_the_seed(space: Space) -> None:
    listed = {each.expression: each for each in space.enumerate()}
    one, other = random.Random(7), random.Random(7)
    for _ in range(50):
        derivation = space.draw(one)
        assert derivation == space.draw(other)
        assert derivation.expression in listed


@pytest.mark.parametrize("table", SPACES.values(), ids=SPACES)
def test_contains_what_means_the_same_and_nothing_else(table: dict[str, object]) -> None:
    space = Space.from_table(table)
    inside = set(expanded(table))
    for architecture in inside:
        found = space.contains(parse(str(architecture)))
        assert found is not None
        assert found.architecture == architecture
        assert found in list(space.enumerate()) if space.count() < 200 else True
    for other, elsewhere in SPACES.items():
        for architecture in set(expanded(elsewhere)):
            found = space.contains(architecture)
            assert (found is not None) == (architecture in inside), f"{architecture} of {other}"


@pytest.mark.parametrize(
    ("start", "text", "inside"),
    [
        ("lm(any(gdn, conv), width=64)", "lm(linear(rule=delta, decay=scalar), width=64)", True),
        ("lm(any(1, 2) * attn(kv=any(mha, gqa(1))), width=32)", "lm(attn(heads=1) + attn, width=32)", True),
        ("lm(any(1, 2) * attn, width=64)", "lm(3 * attn, width=64)", False),
        ("lm(any(2, 3) * any(attn, conv), width=64)", "lm(attn + conv, width=64)", False),
        ("lm(any(2, 3) ** any(attn, conv), width=64)", "lm(attn + conv, width=64)", True),
        ("lm(2 @ (any(2, 3) @ attn), width=64)", "lm(6 @ attn, width=64)", True),
        ("lm(2 @ (any(2, 3) @ attn), width=64)", "lm(8 @ attn, width=64)", False),
        ("lm(2 @ (any(2, 3) @ attn), width=64)", "lm(6 * attn, width=64)", False),
        ("lm(any(1, 2) @ (attn + conv), width=64)", "lm(attn + conv, width=64)", True),
        ("lm(any(gdn, conv) | attn, width=64)", "lm(attn | conv, width=64)", True),
        ("lm(any(1, 2) * attn(heads=4) | 2 * conv, width=64)", "lm(attn | conv, width=64)", False),
        (
            "lm(any(1, 2) * attn(heads=4) | 2 * gdn(heads=4), width=64)",
            "lm(1 * gdn(heads=4) | 1 * attn(heads=4), width=64)",
            True,
        ),
        ("lm(attn, width=any(64, 96), vocab=any(256, 512))", "lm(attn, width=96)", True),
        ("lm(attn, width=any(64, 96), vocab=512)", "lm(attn, width=96)", False),
        ("lm(attn(kv=own) + any(attn, conv), width=64)", "lm(attn + conv, width=64)", True),
        (
            "lm(attn(kv=own) + attn(kv=any(shared, mha)), width=64)",
            "lm(attn(kv=own) + attn(kv=shared), width=64)",
            True,
        ),
        ("lm(2 * any(attn, conv) + mlp, width=64)", "lm(attn + attn + mlp, width=64, norm=layer)", False),
    ],
)  # fmt: skip
def test_contains_by_meaning(start: str, text: str, inside: bool) -> None:
    space = Space.from_text(start)
    found = space.contains(parse(text))
    assert (found is not None) == inside
    assert found is None or found.architecture == parse(text)


def test_contains_misses_only_mixed_readings_of_owners() -> None:
    owner, plain = "attn(kv=own)", "attn"
    target = parse(f"lm({plain} + mlp + {owner} + {plain} + attn(kv=shared), width=64)")
    for options, found in ((f"{plain}, {owner}", True), (f"{owner}, {plain}", False)):
        space = Space.from_text(f"lm({owner} + mlp + {owner} + any({options}) + attn(kv=shared), width=64)")
        assert target in {each.architecture for each in space.enumerate()}
        assert (space.contains(target) is not None) == found


def test_contains_refuses_a_unit_of_too_many_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "MOST_LISTED", 500)
    sizes = ", ".join(str(number) for number in range(1, 102))
    space = Space.from_text(f"lm(attn(heads=any(1, 2, 4, 8, 16), head_dim=any({sizes})), width=64)")
    assert space.contains(parse("lm(attn(heads=1, head_dim=8), width=64)")) is not None
    assert space.contains(parse("lm(conv, width=64)")) is None
    with pytest.raises(ValueError, match="more than 500 sentences"):
        space.contains(parse("lm(attn(heads=3, head_dim=8), width=64)"))


def test_laptop_space_by_hand() -> None:
    space = Space.from_table(tomllib.loads(LAPTOP.read_text())["space"])
    recurrent, attention, channel = 2 * 4 + 3, 2 * 2 * 2 * 2, 3
    pairs, end = recurrent * channel, attention * channel
    assert space.count() == 3 * 2 * (pairs + 3 * pairs * end + end)
    drawn = space.draw_legal(random.Random(0))
    found = space.contains(drawn.architecture)
    assert found is not None
    assert found.architecture.digest == drawn.architecture.digest
    names = {choice.name for seed in range(40) for choice in space.draw(random.Random(seed)).choices}
    # The recurrent layer is one question, whichever shape of group it stands in.
    assert {"width", "stack/times", "stack/group", "stack/group/times", "stack/group/recurrent"} <= names
    assert "stack/group/recurrent/linear.decay" in names
    assert "stack/group/recurrent#2" not in names


def test_names_of_copies_and_repeated_places() -> None:
    space = Space.from_table(
        {
            "start": "lm(any(1, 2) ** group + 2 ** any(attn, conv), width=64)",
            "rules": {"group": "token + token + any(mlp, swiglu)", "token": "any(gdn, conv)"},
        }
    )
    longest = max(space.enumerate(), key=lambda each: len(each.choices))
    assert [choice.name for choice in longest.choices] == [
        "times",
        "group[0]/token",
        "group[0]/token#2",
        "group[0]/any",
        "group[1]/token",
        "group[1]/token#2",
        "group[1]/any",
        "copy[0]",
        "copy[1]",
    ]


def test_tree_says_what_lies_within_what() -> None:
    space = Space.from_table(SPACES["copies and draws"])
    derivation = max(space.enumerate(), key=lambda each: len(each.choices))
    assert derivation.root.symbol == "start"
    groups = [node for node in derivation.root.walk() if node.symbol == "group"]
    assert [group.scope for group in groups] == ["stack/group[0]", "stack/group[1]"]
    assert [choice.name for choice in groups[1].choices()] == ["stack/group[1]/times", "stack/group[1]/token"]
    # What grew at one place of a symbol can grow at the other: the paths inside are renamed, nothing else.
    swapped = dict(derivation.picks)
    for choice in groups[0].choices():
        swapped[choice.name.replace(groups[0].scope, groups[1].scope)] = choice.taken
    merged = space.replay(swapped, lambda name, options, weights: 0)
    first, second = (node for node in merged.root.walk() if node.symbol == "group")
    assert [choice.taken for choice in first.choices()] == [choice.taken for choice in second.choices()]


def test_regrowing_a_subtree_leaves_the_rest() -> None:
    space = Space.from_table(SPACES["recursion"])
    rng = random.Random(3)
    for _ in range(50):
        derivation = space.draw(rng)
        node = rng.choice([node for node in derivation.root.walk() if node.choices()])
        gone = {choice.name for choice in node.choices()}
        kept = {name: taken for name, taken in derivation.picks.items() if name not in gone}
        child = space.replay(kept, lambda name, options, weights: rng.randrange(len(options)))
        assert kept.items() <= child.picks.items()


def test_weights_steer_draws() -> None:
    space = Space.from_text("lm(any({attn: 3, conv: 1}), width=64)")
    rng = random.Random(0)
    drawn = Counter(space.draw(rng).choices[0].taken for _ in range(4_000))
    assert 0.72 < drawn["attn"] / 4_000 < 0.78


def test_repeat_draws_once_and_power_draws_anew() -> None:
    once = Space.from_text("lm(3 * any(attn, conv), width=64)")
    anew = Space.from_text("lm(3 ** any(attn, conv), width=64)")
    assert (once.count(), anew.count()) == (2, 8)
    assert {len(set(each.architecture.stack)) for each in once.enumerate()} == {1}


def test_counts_are_exact_beyond_machine_integers() -> None:
    assert Space.from_text("lm(300 ** any(attn, conv, gdn), width=64)").count() == 3**300
    endless = {"start": "lm(s, width=64)", "rules": {"s": "any(attn, 9 ** s, 5 ** s)"}}
    space = Space.from_table(endless)
    with pytest.raises(ValueError, match="binary digits"):
        space.count()
    with pytest.raises(ValueError, match="too many to list"):
        space.enumerate()
    with pytest.raises(ValueError, match="more than the 100000"):
        Space.from_text("lm(300 ** any(attn, conv, gdn), width=64)").distinct()


def test_growth_past_the_bound_is_a_rejection() -> None:
    space = Space.from_table({"start": "lm(s, width=64)", "rules": {"s": "any({attn: 1, 9 ** s: 3})"}})
    with pytest.raises(Overgrown, match="4096 decisions"):
        space.derive(lambda name, options, weights: len(options) - 1)
    assert set(space.draw_legal(random.Random(1)).rejected) <= {"too many decisions", "too many layers"}


def test_distinct_counts_models_not_sentences() -> None:
    space = Space.from_text("lm(any(attn, attn(pos=rope), gdn, linear(rule=delta, decay=scalar)), width=64)")
    assert (space.count(), space.distinct()) == (4, 2)


def test_limits_and_kinds_of_rejection() -> None:
    table = {
        "start": "lm(any({1: 9, 2: 9, 1100: 1}) ** any(attn(heads=any(1, 3)), mlp), width=64)",
        "limits": {
            "params": ">= 20000, <= 60000",
            "state_bytes": "<= 1e5 at 100",
            "depth": "<= 4",
        },
    }
    space = Space.from_table(table)
    assert [str(limit) for limit in space.limits] == [
        "params >= 20000",
        "params <= 60000",
        "state_bytes <= 100000 at 100",
        "depth <= 4",
    ]
    kinds: Counter[str] = Counter()
    rng = random.Random(0)
    for _ in range(300):
        derivation = space.draw(rng)
        found = space.admit(derivation)
        if isinstance(found, Rejection):
            kinds[found.kind] += 1
            continue
        assert found.illegality() is None
        assert 20_000 <= found.cost(1).params <= 60_000
        assert found.cost(100).state_bytes <= 100_000
    assert set(kinds) == {
        "too many layers",
        "illegal: genes",
        "illegal: no token mixer",
        "limit: params <= 60000",
        "limit: state_bytes <= 100000 at 100",
    }


@pytest.mark.parametrize("quantity", ["flops", "state_bytes", "decode_bytes"])
def test_limits_hold_at_their_context(quantity: str) -> None:
    architecture = parse("lm(attn + mlp, width=64)")
    cost = architecture.cost(100)
    value = {"flops": cost.flops, "state_bytes": cost.state_bytes, "decode_bytes": cost.decode_bytes}[
        quantity
    ]
    for bound, kept in ((value, True), (value - 1, False)):
        table = {"start": "lm(attn + mlp, width=64)", "limits": {quantity: f"<= {bound} at 100"}}
        space = Space.from_table(table)
        assert isinstance(space.admit(space.draw(random.Random(0))), Architecture) == kept


def test_a_space_without_a_legal_sentence_says_why() -> None:
    space = Space.from_table(
        {"start": "lm(any(mlp, attn), width=64)", "limits": {"params": "<= 1e3"}},
    )
    with pytest.raises(ValueError, match="none of 50 sentences") as caught:
        space.draw_legal(random.Random(0), attempts=50)
    assert "illegal: no token mixer" in str(caught.value)
    assert "limit: params <= 1000" in str(caught.value)


def test_a_space_crosses_processes() -> None:
    space = Space.from_table(SPACES["recursion"])
    again: Space = pickle.loads(pickle.dumps(space))  # noqa: S301
    assert again == space
    assert again.draw(random.Random(1)) == space.draw(random.Random(1))
    derivation: Derivation = pickle.loads(pickle.dumps(space.draw(random.Random(2))))  # noqa: S301
    assert derivation.architecture == space.draw(random.Random(2)).architecture


CHAIN = {f"r{i}": f"r{i + 1} + attn" for i in range(250)}


def rules(**texts: str) -> dict[str, object]:
    return {"start": "lm(stack, width=64)", "rules": texts}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "has no start"),
        ({"strat": "lm(attn, width=64)"}, "unknown key 'strat'; did you mean 'start'"),
        ({"start": 3}, "space.start: 3 is not a text"),
        ({"start": "lm(attn, width=64"}, "space.start: this is not an expression"),
        ({"start": "attn"}, "an architecture is written lm"),
        ({"start": "lm(attn, widht=64)"}, "did you mean 'width'"),
        ({"start": "lm(attn, width=any(64, 0))"}, "width=0 is not legal"),
        ({"start": "lm(attn, width=64)", "rules": 3}, "space.rules: 3 is not a table"),
        ({"start": "lm(attn, width=64)", "recursion": 0}, "space.recursion 0"),
        ({"start": "lm(attn, width=64)", "recursion": True}, "space.recursion True"),
        (rules(stack="any(attn, recurent)", recurrent="gdn"), "'recurent'.*did you mean 'recurrent'"),
        (rules(stack="any(attn, swiglo)"), "space.rules.stack: 'swiglo'.*did you mean 'swiglu'"),
        (rules(stack="attn(windw=3)"), "no gene 'windw'"),
        (rules(stack="any(attn(window=any(none, nine)), conv)"), "'nine' is neither"),
        (rules(stack="any(conv, attn(heads=any(1, 999)))"), "heads=999 is not legal"),
        (rules(stack="attn", attn="conv"), "'attn' is a word of the notation"),
        (rules(stack="attn", start="conv"), "'start' is a word"),
        (rules(stack="attn") | {"rules": {"stack": "attn", "a-b": "attn"}}, "'a-b' is no name"),
        (rules(stack=3), "space.rules.stack: 3 is not a text"),  # type: ignore[arg-type]
        (rules(stack="stack + attn"), "space.rules.stack never ends.*stack -> stack"),
        (rules(stack="any(b, b + b)", b="2 * stack"), "space.rules.stack never ends.*stack -> b -> stack"),
        (rules(stack="attn", b="b"), "space.rules.b never ends"),
        (rules(stack="any()"), "has no options"),
        (rules(stack="any"), "needs its options"),
        (rules(stack="any(attn, attn)"), "twice"),
        (rules(stack="any({attn: 0, conv: 1})"), "above 0"),
        (rules(stack="any({attn: mlp, conv: 1})"), "above 0"),
        (rules(stack="any(attn, k=2)"), "not 'k='"),
        (rules(stack="{attn: 1}"), "only inside any"),
        (rules(stack="token(a=2)", token="attn"), "a rule takes no arguments"),
        (rules(stack="attn ** 2"), "no number of copies"),
        (rules(stack="any(0, 2) ** attn"), "no number of copies"),
        (rules(stack="any(1.5, 2) ** attn"), "no number of copies"),
        (rules(stack="any(attn, 3)"), "a number stands before"),
        (rules(stack="any(attn, 3) * attn"), "the number stands first"),
        ({"start": "lm(attn, width=64)", "limits": {"parms": "<= 2"}}, "did you mean 'params'"),
        ({"start": "lm(attn, width=64)", "limits": {"params": 2}}, "write a text such as"),
        ({"start": "lm(attn, width=64)", "limits": {"params": "< 2"}}, "is not a condition"),
        ({"start": "lm(attn, width=64)", "limits": {"flops": "<= 2"}}, "does not say at what context"),
        ({"start": "lm(attn, width=64)", "limits": {"flops": "<= 2 at 0"}}, "does not say at what context"),
        ({"start": "lm(attn, width=64)", "limits": {"params": "<= 2 at 9"}}, "leave out 'at 9'"),
        (rules(**CHAIN, r250="attn", stack="r0"), "nested too deeply"),
        (rules(**CHAIN, **{f"s{i}": "attn" for i in range(10)}, r250="attn", stack="r0"), "at most 256"),
        (rules(stack="any(attn, a)", a="attn + b", b="any(stack, stack + conv)") | {"recursion": 64}, None),
        (rules(stack="a", a="any(a, b + b)", b="any(attn, a)") | {"recursion": 1}, "raise it"),
    ],
)  # fmt: skip
def test_bad_spaces_are_refused(table: dict[str, object], message: str | None) -> None:
    if message is None:
        assert Space.from_table(table).draw_legal(random.Random(0)).architecture.illegality() is None
        return
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Space.from_table(table)


def test_a_genes_value_comes_before_a_rule_of_its_name() -> None:
    space = Space.from_table(
        {
            "start": "lm(linear(decay=any(none, channel)) + channel, width=64)",
            "rules": {"channel": "any(mlp, swiglu)"},
        }
    )
    assert space.count() == 4
    assert {choice.name for each in space.enumerate() for choice in each.choices} == {
        "linear.decay",
        "channel",
    }


def test_sentences_are_numbered_as_they_are_listed(space: Space) -> None:
    assert [space.sentence(number) for number in range(space.count())] == list(space.enumerate())
    for wrong in (-1, space.count()):
        with pytest.raises(IndexError, match=f"sentence {wrong} is not one of"):
            space.sentence(wrong)


def test_a_uniform_draw_gives_each_sentence_the_same_chance() -> None:
    # Weights and depths that make a plain draw anything but even.
    space = Space.from_table({
        "start": "lm(stack, width=64)",
        "rules": {"stack": "any({attn: 5, any(1, 3) ** any({conv: 9, gdn: 1}): 1, 2 * stack: 1})"},
        "recursion": 2,
    })  # fmt: skip
    rng, draws = random.Random(12), 2_200
    seen = Counter(tuple(space.draw_uniform(rng).picks.items()) for _ in range(draws))
    cells = space.count()
    expected = draws / cells
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    chi_square += (cells - len(seen)) * expected
    # 21 degrees of freedom: 38.9 is passed once in a hundred.
    assert (cells, len(seen)) == (22, 22)
    assert chi_square < 38.9
    plain = Counter(tuple(space.draw(rng).picks.items()) for _ in range(draws))
    assert sum((plain[each] - expected) ** 2 / expected for each in seen) > 500


def test_numbers_of_sentences_are_exact_beyond_machine_integers() -> None:
    space = Space.from_text("lm(300 ** any(attn, conv, gdn), width=64)")
    assert str(space.sentence(0).architecture) == "lm(300 * attn, width=64)"
    assert str(space.sentence(3**300 - 1).architecture) == "lm(300 * gdn, width=64)"
    assert str(space.sentence(3**299 + 1).architecture) == "lm(conv + 298 * attn + conv, width=64)"


def test_a_replay_beside_its_parent_is_the_replay(space: Space) -> None:
    rng = random.Random(9)
    for _ in range(20):
        parent, other = space.draw(rng), space.draw(rng)
        kept = [name for name in parent.picks if rng.random() < 0.7]
        picks = {**other.picks, **{name: parent.picks[name] for name in kept}}
        seed = rng.randrange(1_000)
        alone = space.replay(picks, weighted(random.Random(seed)))
        assert space.replay(picks, weighted(random.Random(seed)), parent) == alone
