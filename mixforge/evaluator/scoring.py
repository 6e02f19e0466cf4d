"""The score of the synthetic tasks: which fraction of what is asked is answered right."""

from __future__ import annotations

from collections.abc import Iterable

from mixforge.evaluator.candidate import Candidate
from mixforge.evaluator.deadline import Deadline
from mixforge.evaluator.task import Batch


def fraction_right(candidate: Candidate, batches: Iterable[Batch], deadline: Deadline, doing: str) -> float:
    """Fraction of the targets that are the likeliest token, over the whole vocabulary.

    doing: what to say where the time is up. Raises TimedOut.
    """
    right = asked = 0
    device = next(candidate.parameters()).device
    for batch in batches:
        deadline.check(doing)
        logits_NX, targets_N = candidate.answer(batch.inputs_BT.to(device), batch.targets_BT.to(device))
        right += int((logits_NX.argmax(1) == targets_N).sum())
        asked += len(targets_N)
    return right / asked
