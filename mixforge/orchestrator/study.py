"""What to try next: the sampler's proposals and the random arm's, legal, within the limits, not tried before
and with a kernel of the campaign's backend for each mixer.

An Optuna study in memory holds what the sampler knows. It is rebuilt from the stored trials, each with the
sampler's own notes, so that a campaign which was killed goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from mixforge.db.values import Choice, Trial
from mixforge.evaluator.evaluation import Outcome
from mixforge.evaluator.seeds import seed_for
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.samplers import SAMPLERS
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.derivation import Derivation
from mixforge.search_space.grammar import Rejection, weighted
from mixforge.search_space.model import language_model
from mixforge.search_space.production import Choose, Overgrown

BASELINE = "baseline"
RANDOM = "random"
DUPLICATE = "already tried"

# A sampler's proposal is varied in one choice so many times, then in two, and so on.
_DRAWS_A_CHOICE = 10
# Draws for one trial, over whatever reasons. A space that yields nothing new in so many is taken as
# exhausted.
_MOST_DRAWS = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A proposal that is worth a worker's time."""

    architecture: Architecture
    origin: str
    choices: tuple[Choice, ...]
    attributes: Mapping[str, object]
    """The sampler's notes, which `Study` wants back when it is rebuilt."""
    rejected: Mapping[str, int]
    """Draws before this one that were refused, by reason."""


class Study:
    """The sampler and its memory. Trials are known by their campaign's numbers."""

    def __init__(self, campaign: Campaign, history: Iterable[Trial] = ()) -> None:
        """`history`: the campaign's stored trials, in order."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._campaign = campaign
        self._first = len(campaign.baselines)
        self._share = Fraction(str(campaign.random_share))
        better = {"lower": StudyDirection.MINIMIZE, "higher": StudyDirection.MAXIMIZE}
        self._study = optuna.create_study(directions=[better[each.better] for each in campaign.objectives])
        self._optuna_numbers: dict[int, int] = {}
        for trial in history:
            self._replay(trial)

    def is_random(self, number: int) -> bool:
        """Whether the trial of this number belongs to the random arm: every tenth, for a share of 0.1."""
        index = number - self._first
        return self._campaign.sampler == RANDOM or int((index + 1) * self._share) > int(index * self._share)

    def propose(self, number: int, is_known: Callable[[str], bool]) -> Draft | Mapping[str, int]:
        """The proposal for the trial of this number, or why its draws were refused where none can be taken.

        `is_known`: whether the campaign has a trial of the architecture with a digest. It is not proposed
        again. What the sampler proposes and cannot be taken is varied, a choice or two first, then more of
        them: an optimum often lies at a limit, where drawing anew from the sampler would go on for long.
        """
        rng = random.Random(seed_for(self._campaign.seed, "propose", str(number)))
        arm = self.is_random(number)
        asked = None if arm else self._ask(number)
        first = self._derive(weighted(rng) if asked is None else _answers(asked))
        rejected: Counter[str] = Counter()
        derivation = first
        for draw in range(_MOST_DRAWS):
            if draw > 0 and (arm or isinstance(first, Rejection)):
                derivation = self._derive(weighted(rng))
            elif draw > 0:
                assert isinstance(first, Derivation)
                derivation = self._vary(first, 1 + draw // _DRAWS_A_CHOICE, rng)
            found = self._admit(derivation, is_known)
            if isinstance(found, Rejection):
                rejected[found.kind] += 1
                continue
            assert isinstance(derivation, Derivation)
            attributes = self._enter(number, asked, derivation, varied=draw > 0)
            return Draft(
                architecture=found,
                origin=RANDOM if arm else self._campaign.sampler,
                choices=_choices(derivation),
                attributes=attributes,
                rejected=dict(rejected),
            )
        return dict(rejected)

    def tell(self, trial: Trial) -> None:
        """Give the sampler the result of a finished trial."""
        number = self._optuna_numbers.pop(trial.number, None)
        if number is None:
            return
        values = self._values(trial)
        if values is None:
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, values)

    def _ask(self, number: int) -> optuna.Trial:
        # A new sampler with its own seed for each trial: what it proposes follows from the history alone.
        seed = seed_for(self._campaign.seed, "sampler", str(number)) % 2**32
        build = SAMPLERS[self._campaign.sampler].build
        self._study.sampler = build(seed=seed, trials=self._campaign.trials, before=self._study.sampler)
        return self._study.ask()

    def _derive(self, choose: Choose) -> Derivation | Rejection:
        try:
            return self._campaign.space.derive(choose)
        except Overgrown as error:
            return Rejection("too many decisions", str(error))

    def _vary(self, derivation: Derivation, choices: int, rng: random.Random) -> Derivation | Rejection:
        """The derivation with so many of its choices, and what follows from them, drawn by chance."""
        picks = dict(derivation.picks)
        for name in rng.sample(sorted(picks), min(choices, len(picks))):
            del picks[name]
        try:
            return self._campaign.space.replay(picks, weighted(rng))
        except Overgrown as error:
            return Rejection("too many decisions", str(error))

    def _admit(
        self, derivation: Derivation | Rejection, is_known: Callable[[str], bool]
    ) -> Architecture | Rejection:
        if isinstance(derivation, Rejection):
            return derivation
        found = self._campaign.space.admit(derivation)
        if isinstance(found, Rejection):
            return found
        if is_known(found.digest):
            return Rejection(DUPLICATE, f"{found} was tried in this campaign")
        unasked = self._campaign.budget.why_unasked(found.prefix)
        if unasked is not None:
            return Rejection("prefix", unasked)
        backend = self._campaign.budget.backend
        try:
            # Written down and not built: what the backend has no kernel for costs no worker its time.
            language_model(found, backend)
        except ValueError as error:
            return Rejection(f"backend: {backend}", str(error))
        return found

    def _enter(
        self, number: int, asked: optuna.Trial | None, derivation: Derivation, *, varied: bool
    ) -> Mapping[str, object]:
        """Put a proposal into the study, as under way; gives the sampler's notes of it."""
        if asked is None:
            self._remember(number, _choices(derivation), {})
            return {}
        notes = dict(self._trials()[asked.number].system_attrs)
        if varied:
            self._study.tell(asked, state=TrialState.FAIL)
            self._remember(number, _choices(derivation), notes)
        else:
            self._optuna_numbers[number] = asked.number
        return notes

    def _replay(self, trial: Trial) -> None:
        if trial.origin == BASELINE or not trial.choices:
            return
        self._remember(trial.number, trial.choices, trial.attributes)
        if trial.outcome is not None:
            self.tell(trial)

    def _remember(self, number: int, choices: tuple[Choice, ...], attributes: Mapping[str, object]) -> None:
        """Add a trial that is under way."""
        distributions: dict[str, BaseDistribution] = {
            each.name: CategoricalDistribution(tuple(range(each.options))) for each in choices
        }
        added = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params={each.name: each.index for each in choices},
            distributions=distributions,
            system_attrs=dict(attributes),
        )
        self._study.add_trial(added)
        self._optuna_numbers[number] = len(self._trials()) - 1

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _values(self, trial: Trial) -> list[float] | None:
        """The objectives of a finished trial; None where it has not all of them."""
        if trial.outcome is not Outcome.ok:
            return None
        names = [objective.name for objective in self._campaign.objectives]
        if any(name not in trial.figures for name in names):
            return None
        return [trial.figures[name] for name in names]


def _answers(asked: optuna.Trial) -> Choose:
    """The sampler's answers to a grammar's choices. It weighs options by what it learned, not as the grammar
    does.
    """

    def choose(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        del weights
        return int(asked.suggest_categorical(name, tuple(range(len(options)))))

    return choose


def _choices(derivation: Derivation) -> tuple[Choice, ...]:
    return tuple(
        Choice(name=each.name, index=each.index, option=each.taken, options=len(each.options))
        for each in derivation.choices
    )
