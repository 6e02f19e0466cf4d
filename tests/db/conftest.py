"""A store to write into, and values to write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mixforge.db.store import Store
from mixforge.db.values import Choice, Proposal, StoredArchitecture, Trial
from mixforge.evaluator.evaluation import (
    PHASES,
    Curve,
    Environment,
    Evaluation,
    Outcome,
    Profile,
    Timing,
    Workload,
)

ENVIRONMENT = Environment(
    device="Test CPU",
    device_kind="cpu",
    device_count=2,
    driver=None,
    clock_mhz=2400.0,
    threads=1,
    python="3.11.7",
    torch="2.13.0",
    triton=None,
    mixforge="0.1.0",
    commit="0123abc",
    host="0f0f",
    system="Linux",
)


@dataclass(frozen=True)
class Samples:
    """Values for tests; each depends on its arguments only."""

    environment: Environment = ENVIRONMENT

    def architecture(self, n: int, mixers: tuple[str, ...] = ("attn", "swiglu")) -> StoredArchitecture:
        return StoredArchitecture(
            digest=hashlib.sha256(f"{n} {mixers}".encode()).hexdigest(),
            text=f"lm({n} * ({' + '.join(mixers)}), width={16 * (n + 1)})",
            canonical=f'{{"n":{n}}}',
            width=16 * (n + 1),
            depth=len(mixers) * n,
            mixers=mixers,
        )

    def proposal(self, number: int, n: int | None = None, **changes: object) -> Proposal:
        proposal = Proposal(
            number=number,
            architecture=self.architecture(number if n is None else n),
            budget="b" * 64,
            origin="random",
            choices=(Choice(name="stack[0]", index=number % 2, option="gdn", options=2),),
            attributes={"generation": number, "of": [1, 2.5, None, "x"]},
            rejected={"too large": number % 3},
        )
        return replace(proposal, **changes)  # type: ignore[arg-type]

    def evaluation(self, score: float | None = 2.0, **changes: object) -> Evaluation:
        evaluation = Evaluation(
            outcome=Outcome.ok,
            context=512,
            params=123_456_789_012,
            flops=2**60,
            state_bytes=4096,
            decode_bytes=8192,
            bits_per_byte=score,
            bits_per_byte_test=None if score is None else score + 0.1,
            recall=0.25,
            copying=0.5,
            copying_test=0.625,
            tracking=0.75,
            tracking_test=0.875,
            selectivity=0.375,
            selectivity_test=0.125,
            train_tokens=1000,
            train_s=1.5,
            curves=(Curve(task="text", steps=(1, 10), loss=(5.5, 1.0 / 3.0)),),
            backend="torch",
            seed=2**40,
            environment=self.environment,
        )
        return replace(evaluation, **changes)  # type: ignore[arg-type]

    def profile(self, decode_ms: float = 1.0, **changes: object) -> Profile:
        profile = Profile(
            outcome=Outcome.ok,
            workload=Workload(batch=2, context=64),
            timings=tuple(
                Timing(phase=phase, raw_ms=(decode_ms, decode_ms + 0.1, decode_ms + 0.3)) for phase in PHASES
            ),
            peak_bytes=10**7,
            backend="torch",
            environment=self.environment,
        )
        return replace(profile, **changes)  # type: ignore[arg-type]

    def finish(self, store: Store, campaign: int, number: int, score: float, decode_ms: float) -> Trial:
        """Proposes a trial and takes it through both stages."""
        trial = store.propose(campaign, self.proposal(number))
        store.record_evaluation(store.claim(trial, "train", "w"), self.evaluation(score), seconds=1.0)
        return store.record_profile(store.claim(trial, "profile", "w"), self.profile(decode_ms), seconds=0.5)


@pytest.fixture(scope="session")
def samples() -> Samples:
    return Samples()


@pytest.fixture(scope="session")
def empty_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the newest schema and nothing in it, to copy: migrating takes a tenth of a second."""
    path = tmp_path_factory.mktemp("empty") / "empty.db"
    Store.open(path, "create").close()
    return path


@pytest.fixture
def path(tmp_path: Path, empty_file: Path) -> Path:
    path = tmp_path / "mixforge.db"
    path.write_bytes(empty_file.read_bytes())
    return path


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path) as store:
        yield store


@pytest.fixture
def campaign(store: Store) -> int:
    return store.add_campaign("laptop", "d" * 64, "[campaign]\nname = 'laptop'\n", 7)
