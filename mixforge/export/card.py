"""CARD.md of an exported folder: what the model is, what was measured of it, where and how it was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixforge.evaluator.evaluation import FIGURES, PHASES, SCORES, Environment, Evaluation, Profile
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.count import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What is known of a model beside its architecture. Everything may be missing, and is then said to be."""

    campaign: str | None = None
    trial: int | None = None
    budget: str | None = None
    """Digest of the budget it was evaluated under."""
    training: str | None = None
    """How it was trained, as text: the tables of the campaign file, for example."""
    evaluation: Evaluation | None = None
    profiles: Sequence[Profile] = ()


def write_card(
    architecture: Architecture, card: Card, *, digest_of_weights: str, differences: Mapping[str, float]
) -> str:
    """The card as Markdown. `differences` are the results of the check at export, by their names."""
    blocks = [
        f"# {architecture}",
        "A sequence model found by architecture search. This folder, torch and safetensors are all it needs.",
        '    python model.py --prompt "def " --tokens 200',
        "## Architecture",
        _table(
            ("", ""),
            [
                ("text", f"`{architecture}`"),
                ("digest", f"`{architecture.digest}`"),
                ("weights, sha256", f"`{digest_of_weights}`"),
                ("tokens", "bytes" if architecture.vocab == 256 else f"{architecture.vocab} ids"),
                *_prefix(architecture.prefix),
            ],
        ),
        _layers(architecture, card.evaluation.context if card.evaluation else 2048),
        "## Figures",
        *_figures(architecture, card),
        "## Where it comes from",
        *_provenance(card),
        "## Check at export",
        "In a process of its own that could not import the search's package, in float32 on random tokens.",
        _table(
            ("largest difference of a logit", ""),
            [(_CHECKS[name], f"{v:.1e}") for name, v in differences.items()],
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _prefix(tokens: int) -> list[tuple[str, str]]:
    said = f"the first {tokens} tokens of a prompt are read together; no prediction of them counts"
    return [("prefix", said)] if tokens else []


_CHECKS = {
    "searched": "this folder against the searched model",
    "step": "token by token against one pass",
    "resumed": "half a prompt, then token by token, against one pass",
    "future": "the first half, when the second half's tokens change",
}


def _layers(architecture: Architecture, context: int) -> str:
    rows = []
    for entry in architecture.layers:
        cost = entry.cost(context)
        times = "" if entry.times == 1 else f"{entry.times} times"
        beside = "" if entry.beside == 1 else f"beside {entry.beside - 1}"
        note = ", ".join(text for text in (times, beside) if text)
        row = (
            entry.number,
            f"`{entry.text}`",
            entry.kind,
            note,
            *(_whole(n) for n in (cost.params, cost.state_bytes)),
        )
        rows.append(tuple(map(str, row)))
    return _table(
        ("layer", "mixer", "mixes along", "", "weights", f"state at {_whole(context)} tokens, bytes"), rows
    )


def _figures(architecture: Architecture, card: Card) -> Iterator[str]:
    seen = card.evaluation
    context = seen.context if seen else 2048
    cost = architecture.cost(context)
    rows = [
        (f"{FIGURES[name].label}", _whole(getattr(cost, name)), FIGURES[name].unit, "exact")
        for name in ("params", "flops", "state_bytes", "decode_bytes")
    ]
    if seen is not None:
        for name in SCORES:
            for suffix, split in (("", "selection split"), ("_test", "test split")):
                value = getattr(seen, name + suffix)
                if value is not None:
                    rows.append((FIGURES[name].label, f"{value:.4f}", FIGURES[name].unit, split))
    yield _table(("figure", "value", "unit", ""), rows)
    yield f"FLOPs, state and decode bytes are those of one sequence of {_whole(context)} tokens in float32."
    for profile in card.profiles:
        load = profile.workload
        yield (
            f"Measured with batch {load.batch}, {_whole(load.context)} tokens of context, {load.dtype}, "
            f"backend `{profile.backend}`, on {_environment(profile.environment)}."
        )
        timings = [timing for phase in PHASES if (timing := profile.timing(phase)) is not None]
        yield _table(
            ("phase", "median, ms", "interquartile range, ms", "repeats"),
            [(t.phase, f"{t.median_ms:.3f}", f"{t.spread_ms:.3f}", str(len(t.raw_ms))) for t in timings],
        )
        if profile.peak_bytes is not None:
            yield f"Peak memory of a train step: {_whole(profile.peak_bytes)} bytes."
    if not card.profiles:
        yield "No latency was measured."


def _provenance(card: Card) -> Iterator[str]:
    rows = []
    if card.campaign is not None:
        trial = "" if card.trial is None else f", trial {card.trial}"
        rows.append(("campaign", f"{card.campaign}{trial}"))
    if card.budget is not None:
        rows.append(("budget", f"`{card.budget}`"))
    seen = card.evaluation
    if seen is not None:
        where = seen.environment
        rows += [
            ("trained on", f"{_whole(seen.train_tokens)} tokens in {seen.train_s:.1f} s, seed {seen.seed}"),
            ("device", _environment(where)),
            (
                "versions",
                f"mixforge {where.mixforge}, torch {where.torch}, python {where.python}, {where.system}",
            ),
            ("commit", f"`{where.commit}`" if where.commit else "an installed package, no checkout"),
        ]
    yield _table(("", ""), rows) if rows else "The weights were drawn at random: this model was not trained."
    if card.training is not None:
        yield "How it was trained:"
        yield "\n".join(f"    {line}".rstrip() for line in card.training.strip().splitlines())


def _environment(where: Environment) -> str:
    count = counted(where.device_count, "core" if where.device_kind == "cpu" else "device")
    driver = f", driver {where.driver}" if where.driver else ""
    return f"{where.device} ({count}, {counted(where.threads, 'thread')}{driver})"


def _whole(number: int) -> str:
    return f"{number:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # A bar ends a cell, also inside code.
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
