"""SelectivBench: its grammars, its data and its score, each against a plain loop of the definition."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mixforge.evaluator.candidate import Candidate, asked
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.recipe import Recipe
from mixforge.evaluator.task import Batch
from mixforge.evaluator.tasks.selectiv import Grammar, Selectiv, draw_grammar
from mixforge.search_space.notation import parse

GAPS = {"fewest_blanks": 0, "most_blanks": 3, "held_out_blanks": 2}


def _task(**changes: float) -> Selectiv:
    given = {"symbols": 24, "examples": 200, "intruders_from": 5, **changes}
    return Selectiv(**given, training=Recipe(steps=1, batch=64, lr=(1e-3,)))  # type: ignore[arg-type]


def _follows(rules: Grammar) -> list[dict[int, int]]:
    """Of each state, the state that each letter leads to; of the end, which several starts may share, none."""
    letters = rules.letter_S.tolist()
    rows = [[state for state in row if state >= 0] for row in rules.next_SE.tolist()]
    return [{letters[state]: state for state in row} for row in rows]


@pytest.mark.parametrize(("letters", "ambiguous", "copies"), [(4, 4, 4), (6, 2, 3), (9, 9, 1), (40, 40, 40)])
def test_grammars_are_those_of_the_definition(letters: int, ambiguous: int, copies: int) -> None:
    rules = draw_grammar(letters, ambiguous, copies, seed=3)
    letter_of = rules.letter_S.tolist()
    end = len(letter_of) - 1
    assert [letter_of.count(each) for each in range(letters + 1)] == (
        [copies] * ambiguous + [1] * (letters - ambiguous + 1)
    )
    rows = [[state for state in row if state >= 0] for row in rules.next_SE.tolist()]
    assert [len(row) for row in rows] == rules.count_S.tolist()
    assert len(set(rows[end])) == 4
    assert end not in rows[end]
    edges = {True: 0, False: 0}
    for row in rows[:end]:
        # One state of each letter at most.
        assert len({letter_of[state] for state in row}) == len(row)
        for letter in range(letters + 1):
            is_certain = letter < ambiguous and 0.4 * copies >= 1
            edges[is_certain] += letter in {letter_of[state] for state in row}
    sure = ambiguous if 0.4 * copies >= 1 else 0
    assert edges[True] == end * sure
    # Of the others 0.4, a letter that several states share more.
    share = edges[False] / (end * (letters + 1 - sure))
    assert share == pytest.approx(0.4, abs=0.15)
    reaching = {end}
    while more := {state for state, row in enumerate(rows) if reaching & set(row)} - reaching:
        reaching |= more
    assert len(reaching) == end + 1


def _steps(inputs_T: list[int], targets_T: list[int], task: Selectiv) -> list[tuple[int, int, int]]:
    """Letter, state and blanks of each symbol."""
    found: list[list[int]] = []
    for read, said in zip(inputs_T, targets_T, strict=True):
        if said < 0:
            assert read == task.blank
        elif read == task.blank:
            assert said == found[-1][1]
            found[-1][2] += 1
        else:
            found.append([read - task.states, said, 0])
    return [(letter, state, blanks) for letter, state, blanks in found]


@pytest.mark.parametrize("changes", [{}, {"letters": 6, "ambiguous": 2, "copies": 3}, GAPS])
@pytest.mark.parametrize("intruders", [0.0, 0.3])
def test_sequences_follow_the_definition(changes: dict[str, int], intruders: float) -> None:
    task = _task(**changes, intruders=intruders)
    rules = draw_grammar(task.letters, task.ambiguous, task.copies, task.grammar)
    follows, letter_of = _follows(rules), rules.letter_S.tolist()
    end = task.states - 1
    starts = {state for state in rules.next_SE[end].tolist() if state >= 0}
    first = letter_of[end]
    odd = there = 0
    for batch, fewest, most in [
        (next(task.train_batches(0)), task.fewest_blanks, task.most_blanks),
        (next(task.held_out("test")), task.held_out_blanks, task.held_out_blanks),
    ]:
        seen = set()
        for inputs_T, targets_T in zip(batch.inputs_BT.tolist(), batch.targets_BT.tolist(), strict=True):
            last = end
            steps = _steps(inputs_T, targets_T, task)
            assert len(steps) == 24
            for place, (letter, state, blanks) in enumerate(steps):
                seen.add(blanks)
                may_follow = {letter_of[each] for each in starts} if last == end else set(follows[last])
                if letter in may_follow:
                    assert letter_of[state] == letter
                    assert state in starts if last == end else state == follows[last][letter]
                else:
                    assert intruders > 0
                    assert place >= 5
                    assert state == last
                    odd += 1
                there += place >= 5 and len(may_follow) <= first
                last = state
            assert 0 <= max(letter for letter, _, _ in steps) <= first
        assert seen == set(range(fewest, most + 1))
    assert odd / there == pytest.approx(intruders, abs=0.04)


def test_what_may_follow_is_equally_likely() -> None:
    task = _task(letters=3, ambiguous=3, copies=2, symbols=50)
    rules = draw_grammar(3, 3, 2, task.grammar)
    pairs = torch.zeros(task.states, task.states)
    for batch in itertools.islice(task.train_batches(0), 12):
        states_BN = batch.targets_BT[:, ::2]
        for before, after in zip(states_BN[:, :-1].T, states_BN[:, 1:].T, strict=True):
            pairs.index_put_((before, after), torch.ones(len(before)), accumulate=True)
    share = pairs / pairs.sum(1, keepdim=True)
    for state in range(task.states):
        count = int(rules.count_S[state])
        expected = torch.zeros(task.states)
        expected[rules.next_SE[state, :count]] = 1 / count
        torch.testing.assert_close(share[state], expected, atol=0.05, rtol=0)


def _letters(batch: Batch, task: Selectiv) -> set[tuple[int, ...]]:
    """Each sequence without its blanks."""
    return {tuple(token for token in row if token != task.blank) for row in batch.inputs_BT.tolist()}


def test_splits_are_disjoint_whatever_the_blanks_where_sequences_repeat() -> None:
    # Two letters: of 10 symbols there are few sequences, each met many times, so a leak would show.
    task = _task(letters=2, ambiguous=0, copies=1, symbols=10, examples=400, **GAPS)
    train: set[tuple[int, ...]] = set()
    for batch in itertools.islice(task.train_batches(0), 150):
        train |= _letters(batch, task)
    selection, test = (
        set().union(*(_letters(batch, task) for batch in task.held_out(split)))
        for split in ("selection", "test")  # type: ignore[attr-defined]
    )
    assert len(train) > 500
    assert min(len(selection), len(test)) > 50
    assert not train & selection
    assert not train & test
    assert not selection & test


def test_held_out_splits_have_the_asked_size_and_stay_the_same() -> None:
    first, again = ([batch.inputs_BT for batch in _task(**GAPS).held_out("selection")] for _ in range(2))
    assert sum(map(len, first)) == 200
    assert all(part.shape[1] == 24 * 3 for part in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_longer_gaps_are_the_same_letters_further_apart() -> None:
    near, far = _task(held_out_blanks=1), _task(held_out_blanks=9)
    (one, *_), (ten, *_) = near.held_out("test"), far.held_out("test")
    same = min(len(one.inputs_BT), len(ten.inputs_BT))
    assert torch.equal(one.inputs_BT[:same, ::2], ten.inputs_BT[:same, ::10])
    assert torch.equal(one.targets_BT[:same, ::2], ten.targets_BT[:same, 9::10])


def test_same_seed_same_data_other_seed_other_data_other_grammar_other_states() -> None:
    one, same, other = (next(_task(**GAPS).train_batches(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.inputs_BT, same.inputs_BT)
    assert torch.equal(one.targets_BT, same.targets_BT)
    assert not torch.equal(one.inputs_BT[:, :20], other.inputs_BT[:, :20])
    assert not torch.equal(draw_grammar(4, 4, 4, 1).next_SE, draw_grammar(4, 4, 4, 2).next_SE)


def test_the_papers_setting_has_its_classes() -> None:
    task = _task(letters=40, ambiguous=40, copies=40, symbols=200, intruders_from=50)
    assert task.states == 1601
    assert task.vocab == 1601 + 42
    assert next(task.train_batches(0)).inputs_BT.shape == (64, 400)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"letters": 0}, "letters 0 is not between 1"),
        ({"ambiguous": 5}, "ambiguous 5 is not between 0 and 4, the letters"),
        ({"copies": 0}, "copies 0"),
        (
            {"letters": 1024, "ambiguous": 1024, "copies": 1024},
            "make 1048577 states, and 1074791425 pairs of a state and a letter; at most 4194304 are drawn",
        ),
        ({"symbols": 9}, "symbols 9 is not between 10"),
        ({"fewest_blanks": 2}, "fewest_blanks 2 and most_blanks 1 are not two numbers"),
        ({"held_out_blanks": -1}, "held_out_blanks -1"),
        ({"intruders": 1.0}, "intruders 1 is not a probability"),
        ({"intruders_from": 24}, "intruders_from 24 is not between 1 and 23"),
        ({"grammar": -1}, "grammar -1 is not a seed"),
        ({"examples": 0}, "examples 0"),
        (
            {"letters": 1, "ambiguous": 1, "copies": 1},
            "1 different beginnings of ten letters, too few to split; 1000",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _task(**changes)


class _Oracle(torch.nn.Module):
    """Sure of the state at a letter's blanks alone, and there as `share` says; at the letter of another state."""

    def __init__(self, task: Selectiv, share: float, prefix: int = 0) -> None:
        super().__init__()
        self.model = SimpleNamespace(prefix=prefix)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.task = task
        self.share = share

    def answer(self, inputs_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        asked_BT = asked(targets_BT, self.model.prefix)
        states_N = targets_BT[asked_BT]
        is_blank_N = inputs_BT[asked_BT] == self.task.blank
        other_N = (states_N + 1) % self.task.states
        chance_NX = torch.zeros(len(states_N), self.task.vocab)
        rows = torch.arange(len(states_N))
        chance_NX[rows, states_N] = torch.where(is_blank_N, self.share, 0.0)
        chance_NX[rows, other_N] = torch.where(is_blank_N, 1 - self.share, 1.0)
        return chance_NX.log(), states_N


@pytest.mark.parametrize(
    ("blanks", "share", "score"), [(3, 0.7, 1.0), (3, 0.6, 0.0), (1, 0.9, 0.0), (2, 0.8, 1.0)]
)
def test_score_is_of_the_sum_over_a_letter_and_its_blanks(blanks: int, share: float, score: float) -> None:
    """With three blanks 3 p stands against 1 + 3 (1 - p)."""
    task = _task(held_out_blanks=blanks)
    assert task.score(_Oracle(task, share), "test", Deadline(60)) == score  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prefix", "share", "score"),
    [(5, 0.6, 0.0), (6, 0.6, 1 / 23), (8, 0.7, 1.0), (9, 0.6, 0.0), (93, 0.7, 1.0)],
)
def test_behind_a_prefix_a_letter_is_named_by_the_steps_that_are_left(
    prefix: int, share: float, score: float
) -> None:
    """Steps are asked for from the prefix's last one on. A letter without its own step needs half of its blanks only."""
    task = _task(held_out_blanks=3)
    assert task.score(_Oracle(task, share, prefix), "test", Deadline(60)) == score  # type: ignore[arg-type]


@torch.no_grad()
def test_models_with_a_prefix_are_scored() -> None:
    task = _task(examples=8)
    model = parse(f"lm(attn(mask=prefix(5)), width=16, vocab={task.vocab})").build()
    assert 0 <= task.score(Candidate(model, None), "selection", Deadline(60)) < 1
