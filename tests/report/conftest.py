"""Campaigns made up for reports: their figures have the shape of real ones, noise and failures included."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest

from mixforge.db.values import Count, State, Status, StoredCampaign, Trial
from mixforge.evaluator.evaluation import Curve, Environment, Evaluation, Outcome
from mixforge.report.findings import Findings, findings
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import preset

OBJECTIVES = ("bits_per_byte", "recall", "decode_ms")
BUDGET = "b" * 64
BASELINES = ("gdn", "griffin", "hybrid_3to1", "mamba2", "parallel_hybrid", "transformer", "yoco")
PLACE = Environment(
    device="Test CPU <8 cores>", device_kind="cpu", device_count=2, driver=None, clock_mhz=None, threads=1,
    python="3.11.7", torch="2.13.0", triton=None, mixforge="0.1.0", commit="0123456789abcdef", host="h", system="Linux",
)  # fmt: skip


@dataclass(frozen=True)
class MadeUp:
    """What a database would give of one campaign."""

    status: Status
    trials: tuple[Trial, ...]
    evaluations: Mapping[str, Evaluation]
    names: Mapping[str, str]

    def findings(self, objectives: tuple[str, ...] = OBJECTIVES) -> Findings:
        return findings(self.status, self.trials, objectives, names=self.names, evaluations=self.evaluations)


def _text(draw: random.Random, number: int) -> str:
    recurrent = draw.choice(["gdn", "mamba2", "retnet", "rglru", "conv", "linear(rule=delta, decay=channel)"])
    channel = draw.choice(["swiglu", "geglu", "mlp"])
    attention = draw.choice(["attn", "attn(window=64)", "attn(kv=mqa)", f"attn(window={number + 65})"])
    shape = draw.choice(
        [
            f"{draw.randint(1, 3)} * ({draw.randint(1, 3)} * ({recurrent} + {channel}) + {attention} + {channel})",
            f"{draw.randint(2, 4)} * ({recurrent} + {channel}) + {attention}",
            f"{draw.randint(1, 4)} * (({attention} | {recurrent}) + {channel})",
            f"{draw.randint(2, 5)} @ ({attention} + {channel})",
        ]
    )
    return f"lm({shape}, width={draw.choice([64, 128])})"


def _trial(number: int, text: str, digest: str, origin: str, draw: random.Random, skill: float) -> Trial:
    cost = parse(text).cost(512)
    failed = origin != "baseline" and draw.random() < 0.06
    size = math.log10(cost.params)
    attention = 1.0 if "attn" in text else 0.2
    noise = draw.gauss(0, 0.12) + (1 - skill) * abs(draw.gauss(0, 0.5))
    decode = 0.08 * cost.params**0.25 * math.exp(draw.gauss(0, 0.25))
    figures = {
        "bits_per_byte": 6.2 - 0.6 * size + noise - 0.1 * math.log(decode),
        "recall": min(1.0, max(0.02, 0.75 * attention + draw.gauss(0.05, 0.2) + 0.1 * skill)),
        "decode_ms": decode,
        "prefill_ms": 8 * decode,
        "train_ms": 30 * decode,
        "peak_bytes": 40.0 * cost.params,
        "params": float(cost.params),
        "flops": float(cost.flops),
        "state_bytes": float(cost.state_bytes),
        "decode_bytes": float(cost.decode_bytes),
    }
    return Trial(
        id=number + 1, campaign=1, number=number, digest=digest, text=text, budget=BUDGET, origin=origin, parents=(),
        operator=None, state=State.finished, outcome=Outcome.diverged if failed else Outcome.ok,
        reason="the loss is not finite" if failed else None, reused=False, choices=(), attributes={}, rejected={},
        proposed_at=datetime(2026, 11, 1, tzinfo=UTC), finished_at=datetime(2026, 11, 1, 1, tzinfo=UTC),
        figures={} if failed else figures,
        spreads={} if failed else {"decode_ms": 0.06 * decode, "prefill_ms": 0.2 * decode, "train_ms": decode},
    )  # fmt: skip


def _evaluation(trial: Trial, draw: random.Random) -> Evaluation:
    end = trial.figures["bits_per_byte"] * math.log(2)
    steps = tuple(range(0, 401, 10))
    losses = tuple(end + (5.5 - end) * math.exp(-step / 60) + draw.gauss(0, 0.03) for step in steps)
    recall = tuple(4.8 * (1 - trial.figures["recall"] / (1 + math.exp((200 - step) / 30))) for step in steps)
    return Evaluation(
        outcome=Outcome.ok, context=512, params=1, flops=1, state_bytes=1, decode_bytes=1, train_tokens=409600,
        train_s=20.0, backend="torch", seed=0, environment=PLACE, bits_per_byte=trial.figures["bits_per_byte"],
        curves=(Curve(task="text", steps=steps, loss=losses), Curve(task="mqar", steps=steps, loss=recall)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def made_up() -> Callable[[int], MadeUp]:
    """A campaign of so many trials: baselines first, then one in ten at random."""

    def make(count: int) -> MadeUp:
        draw = random.Random(count)
        baselines = {name: preset(name, "tiny") for name in BASELINES}
        names = {architecture.digest: name for name, architecture in baselines.items()}
        trials = []
        for number in range(count):
            if number < len(baselines):
                architecture = list(baselines.values())[number]
                text, digest, origin = str(architecture), architecture.digest, "baseline"
            else:
                text, digest = _text(draw, number), f"{draw.getrandbits(256):064x}"
                origin = "random" if number % 10 == 0 else "tpe"
            skill = 0.0 if origin != "tpe" else min(1.0, number / 60)
            trials.append(_trial(number, text, digest, origin, draw, skill))
        campaign = StoredCampaign(
            id=1,
            name="laptop <&>",
            digest="c" * 64,
            text="",
            seed=0,
            created_at=datetime(2026, 11, 1, tzinfo=UTC),
        )
        status = Status(
            campaign=campaign, spent_s=812.0, train_s=700.0, profile_s=90.0, lost_attempts=0, open_attempts=0,
            rejected={"params": 41, "genes": 7}, best=(),
            counts=(Count(origin="tpe", state=State.finished, outcome=Outcome.ok, trials=count, reused=3),),
        )  # fmt: skip
        ok = [trial for trial in trials if trial.outcome is Outcome.ok]
        evaluations = {trial.digest: _evaluation(trial, draw) for trial in ok}
        return MadeUp(status, tuple(trials), evaluations, names)

    return make
