"""Tree-structured Parzen estimator: proposes where good trials are denser than bad ones, choice by choice.

Source: Bergstra, Bardenet, Bengio and Kégl 2011, "Algorithms for hyper-parameter optimization", NeurIPS 24;
for several objectives Ozaki et al. 2022, "Multiobjective tree-structured Parzen estimator", JAIR 73. The
implementation is Optuna's.
"""

from __future__ import annotations

from optuna.samplers import BaseSampler, TPESampler

ABOUT = "best below some 500 trials; a proposal costs 65 ms and more past 1,000"


def build(*, seed: int, trials: int | None, before: BaseSampler) -> BaseSampler:
    """TPE; its first tenth of the trials, at most ten and at least four, are random.

    Each choice has its own estimator (not the multivariate form): in a grammar most choices exist only where
    another one was taken, and the multivariate form sees only those that every trial has.
    """
    startup = 10 if trials is None else max(4, min(10, trials // 10))
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=False, constant_liar=True)
