"""How long one architecture takes from its text, and its derivation from one search step to the next.

    python benchmarks/grammar.py [--json FILE]

Forty-eight layers, 24 blocks drawn independently, so that hardly two layers are alike. `text` parses the canonical
text, checks, canonicalises, costs and digests an architecture of which no layer has been met: what is remembered of
layers is cleared before each, what is remembered of the catalogue is not. `text_spelled_out` is the text as it was
drawn, which says every gene of every layer; `text_in_campaign` is `text` where other architectures of the space came
before. Mutation, crossover and distance take derivations. Processor milliseconds of
one thread, each over 200 different inputs: the median, the quartiles and the extremes. Goals: 2 ms for a text, a
mutation and a crossing of two (both children), 5 ms for a distance.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from mixforge.evaluator.environment import environment
from mixforge.search_space.derivation import Derivation
from mixforge.search_space.diff import diff
from mixforge.search_space.distance import distance
from mixforge.search_space.grammar import Space, weighted
from mixforge.search_space.mutation import cross, mutate
from mixforge.search_space.notation import parse

INPUTS = 200
GOALS_MS = {"text": 2.0, "mutate": 2.0, "cross": 2.0, "distance": 5.0}
SPACE = {
    "start": "lm(any(20, 24, 28) ** block, width=any(256, 512))",
    "rules": {
        "block": "mixer + channel",
        "mixer": "any({linear(rule=any(add, delta), decay=any(none, head, scalar, channel), conv=any(none, 4),"
        " out_gate=any(silu, sigmoid), heads=any(2, 4, 8)): 3, attn(window=any(none, 64, 128, 256, 512),"
        " kv=any(mha, mqa, gqa(2)), pos=any(rope, none), qk_norm=any(none, rms), heads=any(4, 8)): 3,"
        " mamba2: 1, rglru(heads=any(2, 4, 8)): 1, conv(size=any(3, 4)): 1})",
        "channel": "any(swiglu(expand=any(1, 2, 3, 4)), geglu(expand=any(1, 2, 3, 4)), mlp(expand=any(2, 3, 4)))",
    },
}
# What is remembered of the catalogue and the notation, and not of a layer.
KEPT = {
    "genes_of",
    "gene_defaults",
    "names_of",
    "vocabulary",
    "known_words",
    "legal_names",
    "default_heads",
    "_reader",
    "_defaults",
}

Input = TypeVar("Input")


def remembered() -> list[functools._lru_cache_wrapper[object]]:
    """Every memory of layers that the package has."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("mixforge.search_space"):
            for word, value in vars(module).items():
                if isinstance(value, functools._lru_cache_wrapper) and word not in KEPT:
                    found[id(value)] = value
    return list(found.values())


def timed(
    inputs: Sequence[Input], work: Callable[[Input], object], before: Callable[[], None]
) -> list[float]:
    """Processor milliseconds of each input."""
    taken = []
    for each in inputs:
        before()
        start = time.process_time_ns()
        work(each)
        taken.append((time.process_time_ns() - start) / 1e6)
    return taken


def from_text(text: str) -> str:
    """Parsed, checked, canonicalised, costed and digested."""
    architecture = parse(text)
    if architecture.illegality() is not None:
        sys.exit(f"{text} is illegal; nothing is timed")
    architecture.cost(2048)
    return architecture.digest


def check(space: Space, derivations: Sequence[Derivation], rng: random.Random) -> None:
    """Refuse to time operators that leave the space."""
    for first, second in zip(derivations[:10], derivations[10:20], strict=True):
        children = cross(space, first, second, rng) or ()
        for child in (mutate(space, first, rng), *children):
            again = space.replay(child.derivation.picks, weighted(rng))
            if again != child.derivation or distance(first, second) != distance(second, first):
                sys.exit("an operator does not hold its word; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    space, rng = Space.from_table(SPACE), random.Random(0)

    def forty_eight(name: str, options: tuple[str, ...], weights: tuple[float, ...]) -> int:
        return options.index("24") if name == "times" else weighted(rng)(name, options, weights)

    derivations = [space.derive(forty_eight) for _ in range(2 * INPUTS)]
    check(space, derivations, rng)
    texts = [str(each.architecture) for each in derivations]
    pairs = list(zip(derivations[:INPUTS], derivations[INPUTS:], strict=True))
    caches = remembered()
    # The inputs themselves would be searched for garbage again and again.
    gc.collect()
    gc.freeze()

    def forget() -> None:
        for cache in caches:
            cache.cache_clear()

    def nothing() -> None:
        pass

    taken = {
        "text": timed(texts[:INPUTS], from_text, forget),
        "text_spelled_out": timed([str(each.expression) for each, _ in pairs], from_text, forget),
        "text_in_campaign": timed(texts[INPUTS:], from_text, nothing),
        "draw": timed(range(INPUTS), lambda _: space.draw(rng), nothing),
        "draw_uniform": timed(range(INPUTS), lambda _: space.draw_uniform(rng), nothing),
        "mutate": timed(derivations[:INPUTS], lambda each: mutate(space, each, rng), nothing),
        "cross": timed(pairs, lambda pair: cross(space, *pair, rng), nothing),
        "distance": timed(pairs, lambda pair: distance(*pair), nothing),
        "diff": timed(pairs, lambda pair: diff(*pair), nothing),
    }
    here = environment("cpu")
    print(f"48 layers, one core of {here.device}, Python {here.python}, load {os.getloadavg()[0]:.1f}")
    figures = {}
    for name, ms in taken.items():
        low, median, high = statistics.quantiles(ms, n=4)
        goal = GOALS_MS.get(name)
        figures[name] = {
            "median_ms": median,
            "quartiles_ms": [low, high],
            "fastest_ms": min(ms),
            "slowest_ms": max(ms),
            "goal_ms": goal,
        }
        verdict = "" if goal is None else f"  goal {goal:g}: {'met' if median <= goal else 'NOT MET'}"
        print(
            f"  {name:17} {median:6.2f} ms  ({low:.2f} to {high:.2f}; {min(ms):.2f} to {max(ms):.2f}){verdict}"
        )
    if given.json:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "environment": asdict(here),
            "load_average": os.getloadavg()[0],
            "inputs": INPUTS,
            "choices": statistics.median(len(each.choices) for each in derivations),
            "operations": figures,
        }
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
