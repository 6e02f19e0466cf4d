"""Random search: every choice of the grammar drawn with its weights, knowing nothing of what was found.

Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization", JMLR 13.
"""

from __future__ import annotations

from optuna.samplers import BaseSampler, RandomSampler

ABOUT = "draws from the grammar, with its weights, and learns nothing"


def build(*, seed: int, trials: int | None, before: BaseSampler) -> BaseSampler:
    """For the study's bookkeeping alone: the random arm's architectures are drawn by the grammar itself."""
    return RandomSampler(seed=seed)
