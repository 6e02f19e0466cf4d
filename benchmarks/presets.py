"""Models of transformers' classes against ours with the same weights, and published sizes built without memory.

    .venv-transformers/bin/python benchmarks/presets.py [--json FILE] [--only NAME ...]

Each class of `tests/oracle_transformers/classes.py` is made tiny, saved, and read as `mixforge import hf` would:
both models compute the same function, and a class whose logits differ is not timed. Theirs is loaded as a person
would load it, with the attention that transformers chooses and chunks of the length that its class has by default.
Timed is a training pass: logits, cross-entropy and the gradients of every weight. float32, one thread, processor
time, interleaved; the ratio is theirs over ours. The first layer of the linear family is timed by itself as well,
forward and backward, with the inputs that it has in the model. Goals: 1/1.2 for each model, 2 for each such layer:
a model's other layers are the same products in both.

Presets whose published size is about a billion weights are built on the meta device: processor time, and how much
the peak memory of the process grew. Where transformers is missing, that is all, and the status is 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixforge.evaluator.environment import environment
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.presets import PRESETS, preset
from mixforge.search_space.stack import mixers

ROOT = Path(__file__).parent.parent
GOAL, LAYER_GOAL = 1 / 1.2, 2.0
# For each repeat of a whole model, so many of its layer, which takes a few milliseconds.
LAYER_REPEATS = 5
# transformers' layers of the linear family.
LINEAR = {
    "Mamba2Mixer",
    "KimiLinearDeltaAttention",
    "Qwen3NextGatedDeltaNet",
    "OlmoHybridGatedDeltaNet",
    "BambaMixer",
    "FalconH1Mixer",
    "GraniteMoeHybridMambaLayer",
    "NemotronHMamba2Mixer",
    "MiniMaxLightningAttention",
    "Zamba2MambaMixer",
    "xLSTMLayer",
}
BILLION = (0.7e9, 1.6e9)
BUILD_GOAL_S = 2.0
# Of the logits' RMS, in float32.
BOUND = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds of processor time."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    repeats_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One class. A ratio is the median of what theirs takes over ours, pass by pass."""

    name: str
    architecture: str
    error: float
    theirs_forward: Timing
    ours_forward: Timing
    theirs_both: Timing
    ours_both: Timing
    forward_ratio: float
    both_ratio: float
    ratio_quartiles: tuple[float, float]
    goal: float
    layer: Layer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The first layer of the linear family, by itself."""

    theirs: Timing
    ours: Timing
    ratio: float
    ratio_quartiles: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One preset on the meta device."""

    name: str
    params: int
    build_s: float
    growth_mib: float


class Differs(Exception):
    """The two models are not one function."""


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_mib() -> float:
    # Linux counts in KiB, macOS in bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def build_on_meta() -> tuple[float, list[Built]]:
    """Seconds of a first, tiny build, which loads what torch needs for it, and the presets."""
    first_s = seconds(lambda: preset("transformer_gqa").build(device="meta"))
    found = []
    for name in PRESETS:
        architecture = preset(name, "published")
        params = architecture.cost(1).params
        if not BILLION[0] <= params <= BILLION[1]:
            continue
        before = peak_mib()
        start = time.process_time()
        model = architecture.build(device="meta")
        build_s = time.process_time() - start
        if not all(each.is_meta for each in [*model.parameters(), *model.buffers()]):
            raise SystemExit(f"{name} has weights elsewhere than on meta; nothing is reported")
        found.append(Built(name=name, params=params, build_s=build_s, growth_mib=peak_mib() - before))
    return first_s, found


def timing(repeats: list[float]) -> Timing:
    low, _, high = statistics.quantiles(repeats, n=4)
    return Timing(median_ms=statistics.median(repeats), quartiles_ms=(low, high), repeats_ms=tuple(repeats))


def has_linear(architecture: Architecture) -> bool:
    return any(mixer.word() == "linear" for mixer in mixers(architecture.stack))


def passes_of(model: nn.Module, names: set[str], run: Callable[[nn.Module], object]) -> Callable[[], None]:
    """Forward and backward of the first module of a class with one of these names, on what it is given in a run."""
    module = next((each for each in model.modules() if type(each).__name__ in names), None)
    if module is None:
        raise SystemExit(
            f"{type(model).__name__} has no layer of {', '.join(sorted(names))}; nothing is timed"
        )
    given: list[tuple[tuple[object, ...], dict[str, object]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, inputs, words: given.append((inputs, words)), with_kwargs=True
    )
    with torch.no_grad():
        run(model)
    hook.remove()
    inputs, words = given[0]

    def fresh(value: object) -> object:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if is_number else value

    def both() -> None:
        for weight in module.parameters():
            weight.grad = None
        found = module(*map(fresh, inputs), **{word: fresh(value) for word, value in words.items()})
        y: Tensor = found[0] if isinstance(found, tuple) else found
        y.backward(torch.ones_like(y))

    return both


def chunks_of_default(config: object) -> None:
    """Chunks as long as their class has them, where the tests make them short."""
    for word in ("chunk_size", "mamba_chunk_size"):
        if word in vars(config):
            setattr(config, word, getattr(type(config)(), word))


def measure(name: str, batch: int, length: int, width: int, repeats: int) -> Row:
    from classes import CLASSES, Size
    from comparison import model_of
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from mixforge.checkpoints.checkpoint import read

    config = CLASSES[name](Size(width=width, window=length // 4))
    chunks_of_default(config)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model_of(config).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        found = read(Path(folder))
        ours = found.build().train()
    tokens_BT = torch.randint(0, config.vocab_size, (batch, length + 1))

    def logits_of(model: nn.Module) -> Tensor:
        if model is ours:
            logits: Tensor = model(tokens_BT[:, :-1])
            return logits
        return model(tokens_BT[:, :-1], use_cache=False).logits

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            logits_of(model)

    def both(model: nn.Module) -> None:
        for weight in model.parameters():
            weight.grad = None
        F.cross_entropy(logits_of(model).flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()

    with torch.no_grad():
        expected = logits_of(theirs)
        error = float((logits_of(ours) - expected).norm() / expected.norm())
    if not error < BOUND:
        raise Differs(f"logits differ by {error:.1e}, over {BOUND:.0e}")
    models = {"theirs": theirs, "ours": ours}
    taken: dict[tuple[str, str], list[float]] = {}

    def in_turns(works: dict[str, Callable[[nn.Module], None]], repeats: int) -> None:
        taken.update({(who, what): [] for who in models for what in works})
        for repeat in range(repeats + 1):
            # Whoever comes second finds warmer caches.
            for who in sorted(models, reverse=repeat % 2 == 0):
                for what, work in works.items():
                    ms = 1e3 * seconds(lambda work=work, who=who: work(models[who]))
                    if repeat > 0:
                        taken[who, what].append(ms)

    in_turns({"forward": forward, "both": both}, repeats)
    is_linear = has_linear(found.architecture)
    if is_linear:
        layers = {
            theirs: passes_of(theirs, LINEAR, logits_of),
            ours: passes_of(ours, {"LinearAttention"}, logits_of),
        }
        in_turns({"layer": lambda model: layers[model]()}, LAYER_REPEATS * repeats)
    times = {key: timing(values) for key, values in taken.items()}

    def ratios(what: str) -> list[float]:
        pairs = zip(taken["theirs", what], taken["ours", what], strict=True)
        return [theirs / ours for theirs, ours in pairs]

    def spread(what: str) -> tuple[float, float]:
        low, _, high = statistics.quantiles(ratios(what), n=4)
        return low, high

    return Row(
        name=name,
        architecture=str(found.architecture),
        error=error,
        theirs_forward=times["theirs", "forward"],
        ours_forward=times["ours", "forward"],
        theirs_both=times["theirs", "both"],
        ours_both=times["ours", "both"],
        forward_ratio=statistics.median(ratios("forward")),
        both_ratio=statistics.median(ratios("both")),
        ratio_quartiles=spread("both"),
        goal=GOAL,
        layer=None
        if not is_linear
        else Layer(
            theirs=times["theirs", "layer"],
            ours=times["ours", "layer"],
            ratio=statistics.median(ratios("layer")),
            ratio_quartiles=spread("layer"),
        ),
    )


def compare(asked: argparse.Namespace, names: list[str]) -> tuple[list[Row], list[str]]:
    """What was timed, and the classes that were not."""
    print(
        f"\nB={asked.batch} T={asked.length} D={asked.width}, median of {asked.repeats} interleaved repeats"
    )
    print("                    forward, ms              forward + backward, ms              linear layer, ms")
    print(
        "class             theirs    ours  ratio     theirs    ours  ratio  quartiles      theirs    ours  ratio"
    )
    rows, refused = [], []
    for name in names:
        try:
            row = measure(name, asked.batch, asked.length, asked.width, asked.repeats)
        except (Differs, ValueError, RuntimeError) as error:
            print(f"{name:16}not timed: {str(error).splitlines()[0]}", flush=True)
            refused.append(name)
            continue
        rows.append(row)
        low, high = row.ratio_quartiles
        line = (
            f"{row.name:16}{row.theirs_forward.median_ms:8.1f}{row.ours_forward.median_ms:8.1f}"
            f"{row.forward_ratio:7.2f}{row.theirs_both.median_ms:11.1f}{row.ours_both.median_ms:8.1f}"
            f"{row.both_ratio:7.2f}  ({low:.2f}-{high:.2f})"
        )
        missed = row.both_ratio < row.goal
        if row.layer is not None:
            line += f"{row.layer.theirs.median_ms:10.1f}{row.layer.ours.median_ms:8.1f}{row.layer.ratio:7.2f}"
            missed = missed or row.layer.ratio < LAYER_GOAL
        print(f"{line}  {'MISS' if missed else 'ok'}", flush=True)
    return rows, refused


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures, with every repeat, to this file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes alone")
    for name, default in (("repeats", 7), ("batch", 4), ("length", 256), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    here = environment("cpu")
    print(f"{here.device}, one thread, torch {here.torch}, load {os.getloadavg()[0]:.1f}")
    first_s, built = build_on_meta()
    slowest = max(built, key=lambda each: each.build_s)
    print(f"first build on meta {first_s:.2f} s; then {len(built)} presets of about a billion weights:")
    print(
        f"  slowest {slowest.build_s:.2f} s ({slowest.name}), median "
        f"{statistics.median(each.build_s for each in built):.2f} s, goal {BUILD_GOAL_S:g}; memory grew by "
        f"{sum(each.growth_mib for each in built):.1f} MiB in all of them"
    )
    rows: list[Row] = []
    refused: list[str] = []
    has_transformers = importlib.util.find_spec("transformers") is not None
    if has_transformers:
        sys.path.insert(0, str(ROOT / "tests" / "oracle_transformers"))
        from classes import CLASSES
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        rows, refused = compare(asked, asked.only or list(CLASSES))
    else:
        print("transformers is not here; `make oracle` makes an environment that has it", file=sys.stderr)
    if asked.json is not None:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "load_average": os.getloadavg()[0],
            "environment": asdict(here),
            "dtype": "float32",
            "shape": {"batch": asked.batch, "length": asked.length, "width": asked.width},
            "first_build_s": first_s,
            "built": [asdict(each) for each in built],
            "rows": [asdict(row) for row in rows],
            "not_timed": refused,
        }
        if has_transformers:
            record["transformers"] = importlib.metadata.version("transformers")
        asked.json.write_text(json.dumps(record, indent=1) + "\n")
    if not has_transformers:
        return 2
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
