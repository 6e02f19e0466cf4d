"""Commands about architectures before any search: draw, profile, mixers, doctor."""

from __future__ import annotations

import platform
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mixforge.cli.database import open_store
from mixforge.cli.output import (
    DEFAULT_DATABASE,
    Database,
    Json,
    RunFailed,
    figure_text,
    narrate,
    print_json,
    show_table,
    table,
)
from mixforge.evaluator.evaluation import PHASES
from mixforge.search_space.count import counted
from mixforge.search_space.mixer import Backend

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from mixforge.evaluator.evaluation import Profile
    from mixforge.search_space.architecture import Architecture
    from mixforge.search_space.genes import GeneValue
    from mixforge.search_space.grammar import Space
    from mixforge.search_space.mixer import Mixer

DataType = Literal["float32", "bfloat16", "float16"]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: mixforge draw examples/laptop.toml -n 5")(draw)
    app.command(epilog="Example: mixforge profile griffin --context 1024")(profile)
    app.command(epilog="Example: mixforge mixers attn")(mixers)
    app.command(epilog="Example: mixforge doctor\n\nExample: mixforge doctor --tune")(doctor)


def draw(
    space: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="A campaign's TOML file, or a published space.")
    ],
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=100_000, help="How many to draw.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same architectures.")] = 0,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Bring refused sentences inside by small changes, not by drawing anew."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw architectures from a space, within its limits, and say how many were refused and why."""
    import random

    from mixforge.cli.naming import space_of
    from mixforge.search_space.grammar import spell_size, write_size

    read = space_of(space)
    count = read.count()
    generator = random.Random(seed)
    drawn, refused, changes = (_drawn_or_repaired if repair else _drawn)(read, generator, number)
    if as_json:
        print_json(
            {
                "sentences": write_size(count),
                "rejected": dict(refused),
                "repaired": len(changes),
                "architectures": [
                    {"digest": each.digest, "architecture": str(each), "params": each.cost(1).params}
                    for each in drawn
                ],
            }
        )
        return
    made = table("digest", "params >", "architecture")
    for each in drawn:
        made.add_row(each.digest[:12], figure_text("params", each.cost(1).params), str(each))
    show_table(made)
    total = number + refused.total()
    reasons = ", ".join(f"{reason} {count}" for reason, count in refused.most_common())
    narrate(
        f"{space} has {counted(count, 'sentence', spell_size(count))}; "
        f"{refused.total()} of {counted(total, 'draw')} refused" + (f": {reasons}" if reasons else "")
    )
    if changes:
        least, most = min(changes), max(changes)
        edits = counted(most, "edit", str(most) if least == most else f"{least} to {most}")
        narrate(f"{len(changes)} of the {number} shown repaired, by {edits}")


def _drawn(
    space: Space, generator: random.Random, number: int
) -> tuple[list[Architecture], Counter[str], list[int]]:
    """Architectures drawn until legal, and why sentences before them were refused."""
    drawn, refused = [], Counter[str]()
    for _ in range(number):
        found = space.draw_legal(generator)
        refused.update(found.rejected)
        drawn.append(found.architecture)
    return drawn, refused, []


def _drawn_or_repaired(
    space: Space, generator: random.Random, number: int
) -> tuple[list[Architecture], Counter[str], list[int]]:
    """Architectures drawn or repaired, why sentences could not be, and how many edits each repair took."""
    from mixforge.search_space.repair import Repaired, draw_or_repair

    drawn: list[Architecture] = []
    changes: list[int] = []
    refused = Counter[str]()
    while len(drawn) < number:
        found = draw_or_repair(space, generator)
        if isinstance(found, Repaired):
            drawn.append(found.architecture)
            changes += [found.changes] if found.changes else []
            continue
        refused[found.kind] += 1
        if refused.total() > 100 + 10 * len(drawn):
            raise ValueError(
                f"{refused.total()} sentences could not be repaired, the last as {found.reason}; loosen a limit"
            )
    return drawn, refused, changes


def profile(
    which: Annotated[str, typer.Argument(metavar="EXPR|PRESET|DIGEST", help="What to measure.")],
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option("--context", help="Tokens of the prompt.")] = 512,
    dtype: Annotated[
        DataType, typer.Option("--dtype", help="Numbers of weights and activations.")
    ] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    backend: Annotated[Backend, typer.Option("--backend", help="The kernels' form.")] = "torch",
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="CPU threads.")] = 1,
    db: Database = DEFAULT_DATABASE,
    keep: Annotated[bool, typer.Option("--keep", help="Store the measurement in the database.")] = False,
    as_json: Json = False,
) -> None:
    """Measure prefill, decode and train-step latency and peak memory on the device that is there."""
    import torch

    from mixforge.cli.naming import architecture_of
    from mixforge.db.values import describe
    from mixforge.evaluator.environment import environment
    from mixforge.evaluator.evaluation import Workload
    from mixforge.evaluator.profiling import profile as measure
    from mixforge.kernels.backend import check_backend
    from mixforge.search_space.model import language_model

    architecture = architecture_of(which, db)
    # Written down and not built: what the backend has no kernel for is told as a wrong request.
    language_model(architecture, backend)
    check_backend(backend, device)
    torch.set_num_threads(threads)
    workload = Workload(batch=batch, context=context, dtype=dtype)
    # Before a file is made for a device that is not here.
    environment(device)
    # The database is opened first, for one that cannot be had should cost nobody a measurement.
    with open_store(db, "create") if keep else nullcontext() as store:
        measured = measure(architecture, workload, device=device, backend=backend)
        if store is not None:
            store.add_profile(describe(architecture), measured)
    if as_json:
        print_json(
            {"digest": architecture.digest, "architecture": str(architecture), **_profile_json(measured)}
        )
    else:
        print(architecture)
        _show_profile(measured)
    if measured.outcome != "ok":
        raise RunFailed(f"{measured.outcome}: {measured.reason}")


def _profile_json(measured: Profile) -> dict[str, Any]:
    from dataclasses import asdict

    phases = {
        timing.phase: {"median_ms": timing.median_ms, "spread_ms": timing.spread_ms}
        for timing in measured.timings
    }
    return {**asdict(measured), "phases": phases}


def _show_profile(measured: Profile) -> None:
    made = table("phase", "median ms >", "spread ms >", "tokens/s >", "repeats >")
    load = measured.workload
    for phase in PHASES:
        timing = measured.timing(phase)
        if timing is not None:
            tokens = load.batch * (1 if phase == "decode" else load.context)
            made.add_row(
                phase,
                f"{timing.median_ms:.4g}",
                f"{timing.spread_ms:.2g}",
                f"{tokens / timing.median_ms * 1e3:.3g}",
                str(len(timing.raw_ms)),
            )
    show_table(made)
    environment = measured.environment
    if measured.peak_bytes is not None:
        print(f"peak memory of a train step: {figure_text('peak_bytes', measured.peak_bytes)}B")
    print(
        f"batch {load.batch}, context {load.context}, {load.dtype}, backend {measured.backend}, on {environment.device} "
        f"({counted(environment.threads, 'thread')}), torch {environment.torch}"
    )


def mixers(
    name: Annotated[str | None, typer.Argument(help="A mixer or an alias; all if left out.")] = None,
    as_json: Json = False,
) -> None:
    """The catalogue: every mixer with its genes and their legal values, and its famous points."""
    from mixforge.search_space.mixers import CATALOGUE
    from mixforge.search_space.vocabulary import mixer_named

    chosen = {name: CATALOGUE[name] for name in CATALOGUE}
    if name is not None:
        owner = mixer_named(name)
        chosen = {owner: CATALOGUE[owner]}
    if as_json:
        print_json(
            {
                "mixers": {
                    each: {
                        "kind": kind.kind,
                        "summary": _summary(kind),
                        "genes": {gene: {"default": default, "legal": legal} for gene, default, legal in _genes(kind)},
                        "aliases": {alias: _texts(genes) for alias, genes in kind.aliases.items()},
                    }
                    for each, kind in chosen.items()
                }
            }
        )  # fmt: skip
        return
    for each, kind in chosen.items():
        print(f"{each} ({kind.kind} mixer): {_summary(kind)}")
        genes = table("gene", "default", "legal values")
        for gene, default, legal in _genes(kind):
            genes.add_row(gene, default, legal)
        show_table(genes)
        for alias, values in kind.aliases.items():
            print(
                f"  {alias} = {each}({', '.join(f'{key}={value}' for key, value in _texts(values).items())})"
            )
        print()


def _genes(kind: type[Mixer]) -> list[tuple[str, str, str]]:
    """Each gene's name, default and legal values, as texts."""
    from mixforge.search_space.genes import genes_of

    return [
        (name, "auto" if gene.default is None else str(gene.default), str(gene))
        for name, gene in genes_of(kind).items()
    ]


def _texts(genes: Mapping[str, GeneValue]) -> dict[str, str]:
    return {name: str(value) for name, value in genes.items()}


def _summary(kind: type) -> str:
    import sys

    document = sys.modules[kind.__module__].__doc__ or ""
    return document.strip().splitlines()[0]


def doctor(
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Find the fastest block sizes of the kernels on this GPU and keep them."),
    ] = False,
    only: Annotated[
        str, typer.Option("--only", metavar="TEXT", help="Tune only kernels whose shape class contains this.")
    ] = "",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            max=256,
            help="Configurations compiled and checked at once; one a core, at most 8, if left out.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine has, and whether Mixforge can use it: versions, devices, threads, memory, disk."""
    if tune:
        _tune(only, jobs or min(8, _cores()), as_json)
        return
    from mixforge.evaluator.environment import environment

    try:
        import torch

        cuda = torch.cuda.is_available()
    except ImportError as error:
        raise RunFailed(f"torch does not import: {error}") from None
    found = environment("cuda" if cuda else "cpu")
    checks = [*_versions(), *_room()]
    checks.append(("device", found.device, True, ""))
    checks.append(
        ("GPU", "yes" if cuda else "none", True, "" if cuda else "training and profiling run on the CPU")
    )
    checks.append(("cores", str(_cores()), True, "one training worker each"))
    if as_json:
        print_json(
            [{"check": name, "found": value, "ok": ok, "note": note} for name, value, ok, note in checks]
        )
    else:
        made = table("check", "found", "", "note")
        for name, value, ok, note in checks:
            made.add_row(name, value, "ok" if ok else "NOT OK", note)
        show_table(made)
    wrong = [name for name, _, ok, _ in checks if not ok]
    if wrong:
        raise RunFailed(f"not fit to search: {', '.join(wrong)}")


def _tune(only: str, jobs: int, as_json: bool) -> None:
    import torch

    # Asked here as well, for without a GPU there may be no triton to import the tuner with.
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU to tune kernels for; run doctor --tune on a machine that has one")
    from dataclasses import asdict

    from mixforge.kernels.blocks import cache_file
    from mixforge.kernels.tuning import tune

    found = tune(narrate, only, jobs)
    if as_json:
        print_json(
            [
                {**asdict(one), "shape": one.shape.name, "ratio": one.ratio, "file": str(cache_file())}
                for one in found
            ]
        )
    else:
        made = table("shape class", "default ms >", "best ms >", "ratio >", "best", "dropped >")
        for one in found:
            times = ("-" if ms is None else f"{ms:.3g}" for ms in (one.default_ms, one.best_ms))
            ratio = "-" if one.ratio is None else f"{one.ratio:.2f}"
            best = "none is right" if one.best is None else one.best.text
            made.add_row(one.shape.name, *times, ratio, best, str(len(one.dropped)))
        show_table(made)
        narrate(f"kept in {cache_file()}")
    broken = [one.shape.name for one in found if one.best is None]
    if broken:
        raise RunFailed(f"no configuration is right for {', '.join(broken)}")


Check = tuple[str, str, bool, str]


def _versions() -> list[Check]:
    from importlib import metadata

    checks: list[Check] = [("python", platform.python_version(), True, "")]
    for package in ("torch", "ray", "optuna", "sqlalchemy", "triton"):
        try:
            checks.append((package, metadata.version(package), True, ""))
        except metadata.PackageNotFoundError:
            needed = package != "triton"
            note = "install it: pip install mixforge" if needed else "only needed for GPU kernels"
            checks.append((package, "none", not needed, note))
    return checks


def _room() -> list[Check]:
    import os
    import shutil

    free = shutil.disk_usage(Path.cwd()).free
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        (
            "memory",
            f"{memory / 2**30:.1f} GiB",
            memory > 2 * 2**30,
            "" if memory > 2 * 2**30 else "needs 2 GiB",
        ),
        ("disk free here", f"{free / 2**30:.1f} GiB", free > 2**30, "" if free > 2**30 else "needs 1 GiB"),
        ("writable here", str(Path.cwd()), os.access(Path.cwd(), os.W_OK), ""),
    ]


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
