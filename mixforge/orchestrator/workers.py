"""The workers: Ray actors that evaluate and profile, one at a time each, and are replaced when they die or
hang.

Ray restarts nothing and retries nothing here: how often an architecture is tried is the loop's to decide.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import ray
import torch

from mixforge.evaluator.budget import Budget
from mixforge.evaluator.evaluate import evaluate
from mixforge.evaluator.evaluation import Evaluation, Outcome, Profile
from mixforge.evaluator.profiling import profile
from mixforge.evaluator.train import Step
from mixforge.orchestrator.board import Board, Mark
from mixforge.search_space.architecture import Architecture

Report = Callable[[Mark], None]
# Importing torch in every worker at once takes seconds on a small machine, and longer on a cold disk.
_START_S = 180.0
_MOST_STARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One stage of one trial, as a worker gets it."""

    token: int
    """The attempt's; the board's line carries it."""
    stage: Literal["train", "profile"]
    architecture: Architecture
    budget: Budget
    weights: Path | None = None
    """The file that training keeps the weights in; None to keep none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A job that gave nothing, because its worker died, was ended or failed in a way nobody foresaw."""

    outcome: Outcome
    reason: str
    trace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a slot's job."""

    slot: int
    job: Job
    result: Evaluation | Profile | Lost
    seconds: float


class Work(Protocol):
    """What a worker does with a job; `report` takes how far it is, as often as it likes."""

    def __call__(self, job: Job, device: str, report: Report) -> Evaluation | Profile: ...


class Pool(Protocol):
    """Slots that each do one job at a time."""

    @property
    def size(self) -> int: ...

    def idle(self) -> tuple[int, ...]:
        """Slots that can take a job now."""
        ...

    def submit(self, slot: int, job: Job, limit_s: float) -> None:
        """Start a job; a worker that has it for longer than the limit is ended."""
        ...

    def wait(self, timeout_s: float) -> tuple[Ended, ...]:
        """Jobs that have ended since the last call; waits for one no longer than the timeout."""
        ...

    def mark(self, slot: int) -> Mark | None:
        """How far a slot's training is; None where it has said nothing."""
        ...


def work(job: Job, device: str, report: Report) -> Evaluation | Profile:
    """Evaluate or profile, as the job says."""
    if job.stage == "profile":
        budget = job.budget
        return profile(
            job.architecture, budget.workload, device, budget.backend, deadline_s=budget.deadline_s
        )
    steps = _Steps(job.budget, report)
    return evaluate(job.architecture, job.budget, device, weights=job.weights, progress=steps.note)


class _Steps:
    """Turns the steps of one training after the other into steps of the whole evaluation."""

    def __init__(self, budget: Budget, report: Report) -> None:
        trainings = [
            (number, task.training.steps)
            for number, task in enumerate(budget.tasks)
            for _ in task.training.lr
        ]
        self._ahead = iter(trainings)
        self._total = sum(steps for _, steps in trainings)
        self._before, self._task, self._steps = 0, 0, 0
        self._report = report

    def note(self, step: Step) -> None:
        if step.step == 1:
            # One that diverged counts as done.
            self._before += self._steps
            self._task, self._steps = next(self._ahead)
        done = self._before + step.step
        self._report(Mark(task=self._task, step=done, steps=self._total, loss=step.loss))


class _Worker:
    """The actor: one process with one thread for torch."""

    def __init__(self, do: Work, device: str, board: Path, slot: int) -> None:
        # A worker's end is the driver's to decide; the terminal's Ctrl-C reaches every process of its group.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
        self._do, self._device, self._slot = do, device, slot
        self._board = Board(board)

    def pid(self) -> int:
        return os.getpid()

    def run(self, job: Job) -> Evaluation | Profile:
        def report(mark: Mark) -> None:
            self._board.write(self._slot, job.token, mark)

        return self._do(job, self._device, report)


@dataclass(slots=True)
class _Slot:
    """One worker: starting until its pid is known, then idle or at a job."""

    actor: Any
    """Ray's handle of a `_Worker`."""
    call: ray.ObjectRef[Any]
    since: float
    starts: int = 1
    """How often in a row it has been started, this time included."""
    pid: int | None = None
    job: Job | None = None
    limit_s: float = _START_S

    @property
    def idle(self) -> bool:
        return self.pid is not None and self.job is None


class Workers:
    """As many workers as slots, in a Ray that is already started."""

    def __init__(self, size: int, *, folder: Path, device: str = "cpu", do: Work = work) -> None:
        """`folder` is for the board's file. `do` replaces what a worker does, for tests and measurements."""
        self._board_path = folder / "board"
        self._board = Board.create(self._board_path, size)
        self._device, self._do = device, do
        share = 0.0 if device == "cpu" else 1.0 / size
        options = {"num_cpus": 1, "num_gpus": share, "max_restarts": 0, "max_task_retries": 0}
        # Ray's annotations cannot say what `options` gives.
        self._actors: Any = ray.remote(_Worker).options(**options)
        self._slots = [self._start(slot) for slot in range(size)]

    @property
    def size(self) -> int:
        return len(self._slots)

    def idle(self) -> tuple[int, ...]:
        return tuple(number for number, slot in enumerate(self._slots) if slot.idle)

    def submit(self, slot: int, job: Job, limit_s: float) -> None:
        place = self._slots[slot]
        assert place.idle
        call = place.actor.run.remote(job)
        place.call, place.job, place.since, place.limit_s = call, job, time.monotonic(), limit_s

    def wait(self, timeout_s: float) -> tuple[Ended, ...]:
        """Raises RuntimeError where a worker cannot be started at all."""
        waiting = {slot.call: number for number, slot in enumerate(self._slots) if not slot.idle}
        if not waiting:
            time.sleep(timeout_s)
            return ()
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        if done:
            # Others may have ended too; they are fetched in the same round.
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        ended = [end for call in done if (end := self._fetch(waiting[call])) is not None]
        ended.extend(self._overdue(set(waiting.values()) - {waiting[call] for call in done}))
        return tuple(ended)

    def mark(self, slot: int) -> Mark | None:
        job = self._slots[slot].job
        return None if job is None else self._board.read(slot, job.token)

    def close(self) -> None:
        """End all workers, whatever they are at."""
        for slot in self._slots:
            self._end(slot)
        self._board.close()

    def _start(self, slot: int, starts: int = 1) -> _Slot:
        actor = self._actors.remote(self._do, self._device, self._board_path, slot)
        return _Slot(actor=actor, call=actor.pid.remote(), since=time.monotonic(), starts=starts)

    def _fetch(self, number: int) -> Ended | None:
        """What a slot's finished call gave; None where the call was the worker's start."""
        slot = self._slots[number]
        seconds = time.monotonic() - slot.since
        result = _result(slot.call)
        job, slot.job = slot.job, None
        if job is None:
            self._started(number, result)
            return None
        if isinstance(result, Lost):
            self._replace(number)
        assert isinstance(result, Evaluation | Profile | Lost)
        return Ended(slot=number, job=job, result=result, seconds=seconds)

    def _started(self, number: int, result: object) -> None:
        """Note a worker's pid, or start it once more."""
        slot = self._slots[number]
        if isinstance(result, int):
            slot.pid = result
            return
        assert isinstance(result, Lost)
        if slot.starts >= _MOST_STARTS:
            raise RuntimeError(f"a worker could not be started: {result.reason}\n{result.trace or ''}")
        self._replace(number, slot.starts + 1)

    def _overdue(self, numbers: set[int]) -> list[Ended]:
        """End and replace the workers that have had their job for too long."""
        ended: list[Ended] = []
        for number in sorted(numbers):
            slot = self._slots[number]
            seconds = time.monotonic() - slot.since
            if seconds <= slot.limit_s:
                continue
            reason = f"no answer within {slot.limit_s:.0f} s, so its worker was ended"
            lost = Lost(outcome=Outcome.timed_out, reason=reason)
            if slot.job is None:
                self._started(number, lost)
                continue
            ended.append(Ended(slot=number, job=slot.job, result=lost, seconds=seconds))
            self._replace(number)
        return ended

    def _replace(self, number: int, starts: int = 1) -> None:
        self._end(self._slots[number])
        self._slots[number] = self._start(number, starts)

    def _end(self, slot: _Slot) -> None:
        ray.kill(slot.actor, no_restart=True)
        if slot.pid is not None:
            # A stopped process does not hear Ray.
            try:
                os.kill(slot.pid, signal.SIGKILL)
            except ProcessLookupError:
                return


def _result(call: ray.ObjectRef[Any]) -> object:
    """What a finished call gave, or Lost with what Ray says of its end."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        return Lost(outcome=Outcome.crashed, reason=_cause(error), trace=str(error))
    except ray.exceptions.OutOfMemoryError as error:
        reason = "the machine ran out of memory"
        return Lost(outcome=Outcome.out_of_memory, reason=reason, trace=str(error))
    except ray.exceptions.RayActorError as error:
        return Lost(outcome=Outcome.crashed, reason="its worker process died", trace=str(error))


def _cause(error: ray.exceptions.RayTaskError) -> str:
    cause = error.cause
    return "".join(traceback.format_exception_only(type(cause), cause)).strip() or "failed without a message"
