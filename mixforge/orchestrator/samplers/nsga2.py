"""NSGA-II: generations of parents chosen by non-dominated rank and crowding, crossed and mutated choice by
choice.

Source: Deb, Pratap, Agarwal and Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-
II", IEEE Transactions on Evolutionary Computation 6(2). The implementation is Optuna's.
"""

from __future__ import annotations

from optuna.samplers import BaseSampler, NSGAIISampler

ABOUT = "a millisecond a proposal however many trials; no better than random before some 150"


def build(*, seed: int, trials: int | None, before: BaseSampler) -> BaseSampler:
    """NSGA-II with a population of a tenth of the trials, between 10 and 50, so that small budgets see
    generations.
    """
    population = 50 if trials is None else max(10, min(50, trials // 10))
    sampler = NSGAIISampler(seed=seed, population_size=population)
    if isinstance(before, NSGAIISampler):
        # Which choices all trials have in common is worked out from the new trials alone where it is carried
        # over; otherwise a proposal costs a time that grows with the trials.
        sampler._search_space = before._search_space
    return sampler
