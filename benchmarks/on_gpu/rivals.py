"""The operations of fla-core, where it can be imported, with the signatures of ours.

fla multiplies queries by K^-0.5 unless it gets a scale; ours multiply them by nothing.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

Operation = Callable[..., Tensor | tuple[Tensor, ...]]

# By decay and rule: names and modules of the forms in chunks, and of the form that steps.
CHUNKED = {
    ("none", "add"): [("simple_gla", "chunk_simple_gla"), ("linear_attn", "chunk_linear_attn")],
    ("head", "add"): [("simple_gla", "chunk_simple_gla"), ("retention", "chunk_retention")],
    ("scalar", "add"): [("simple_gla", "chunk_simple_gla")],
    ("channel", "add"): [("gla", "chunk_gla")],
    ("none", "delta"): [("delta_rule", "chunk_delta_rule")],
    ("scalar", "delta"): [("gated_delta_rule", "chunk_gated_delta_rule")],
    ("channel", "delta"): [("kda", "chunk_kda")],
}
RECURRENT = {
    ("none", "add"): [("linear_attn", "fused_recurrent_linear_attn")],
    ("head", "add"): [("simple_gla", "fused_recurrent_simple_gla")],
    ("scalar", "add"): [("simple_gla", "fused_recurrent_simple_gla")],
    ("channel", "add"): [("gla", "fused_recurrent_gla")],
    ("none", "delta"): [("delta_rule", "fused_recurrent_delta_rule")],
    ("scalar", "delta"): [("gated_delta_rule", "fused_recurrent_gated_delta_rule")],
    ("channel", "delta"): [("kda", "fused_recurrent_kda")],
}


def fla_version() -> str | None:
    """None where fla-core is not installed."""
    try:
        return version("fla-core")
    except PackageNotFoundError:
        return None


def compile_only() -> None:
    """Compile all that Triton's tuner would choose among, and choose at random.

    For a process that shares the GPU, where what is timed is wrong. Nothing of the choice is kept.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"
    importlib.import_module("triton.testing").do_bench = run_once


def run_once(work: Callable[[], object], *_: object, quantiles: Sequence[float], **__: object) -> list[float]:
    work()
    return [1.0] * len(quantiles)


def find(module: str, name: str) -> Operation | None:
    """A function of fla; None where this version has none of the name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Operation | None = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found


def linear_rivals(decay: str, rule: str) -> dict[str, Operation]:
    """By name, with the arguments (q, k, v, decay, beta) of `chunked_linear`."""
    found: dict[str, Operation] = {}
    for package, name in CHUNKED.get((decay, rule), []):
        operation = find(f"fla.ops.{package}", name)
        if operation is not None:
            found[f"fla {name}"] = sequence(operation, name, decay, {})
            if name == "chunk_kda":
                # Its faster way for decays that are bounded as ours are.
                found["fla chunk_kda safe"] = sequence(operation, name, decay, {"safe_gate": True})
    return found


def sequence(operation: Operation, name: str, decay: str, extra: dict[str, object]) -> Operation:
    """`operation` called as ours are, which return the last state: it is asked for without gradients, as for a prompt."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        last = {"output_final_state": not torch.is_grad_enabled()}
        return operation(q, k, v, **named(name, decay, log, beta), scale=1.0, **last, **extra)

    return run


def dplr_rivals() -> dict[str, Operation]:
    """With the arguments (q, k, v, decay, removal) of `dplr`. fla adds what ours removes."""
    operation = find("fla.ops.generalized_delta_rule.dplr", "chunk_dplr_delta_rule")
    if operation is None:
        return {}

    def run(q: Tensor, k: Tensor, v: Tensor, log: Tensor, removal: Tensor) -> Tensor | tuple[Tensor, ...]:
        a, b = removal.unbind(-2)
        return operation(q, k, v, a, -b, log, scale=1.0, output_final_state=not torch.is_grad_enabled())

    return {"fla chunk_dplr_delta_rule": run}


def linear_step_rivals(decay: str, rule: str) -> dict[str, Operation]:
    """By name, with the arguments (q, k, v, decay, beta, state) of `linear_step`, of one token."""
    found: dict[str, Operation] = {}
    for package, name in RECURRENT.get((decay, rule), []):
        operation = find(f"fla.ops.{package}", name)
        if operation is not None:
            found[f"fla {name}"] = step(operation, name, decay)
    return found


def step(operation: Operation, name: str, decay: str) -> Operation:
    """`operation` called as our steps are. It writes its state to a new place."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, log: Tensor | None, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, ...]:
        log = log[:, None] if log is not None and decay != "head" else log
        beta = None if beta is None else beta[:, None]
        q, k, v = q[:, None], k[:, None], v[:, None]
        given = named(name, decay, log, beta)
        o, after = operation(q, k, v, **given, scale=1.0, initial_state=state, output_final_state=True)
        return o[:, 0], after

    return run


def named(name: str, decay: str, log: Tensor | None, beta: Tensor | None) -> dict[str, object]:
    """Decay and beta under the names that an operation of fla has for them."""
    given: dict[str, object] = {} if beta is None else {"beta": beta}
    if name.endswith("linear_attn"):
        given["normalize"] = False
    elif log is not None and not name.endswith("retention"):
        key = "g_gamma" if decay == "head" else "gk" if name == "fused_recurrent_gla" else "g"
        given[key] = log
    return given


def scan_rivals() -> dict[str, Operation]:
    """With the arguments (log_a, b) of `gated_scan`."""
    operation = find("fla.ops.hgrn", "chunk_hgrn")
    if operation is None:
        return {}

    def run(log_a: Tensor, b: Tensor) -> Tensor | tuple[Tensor, ...]:
        return operation(b, log_a, output_final_state=not torch.is_grad_enabled())

    return {"fla chunk_hgrn": run}


def conv_rivals() -> dict[str, Operation]:
    """With the arguments (x, weight) of `short_conv`, and its SiLU."""
    operation = find("fla.modules.causal_conv1d.ops", "causal_conv1d")
    if operation is None:
        return {}
    return {"fla causal_conv1d": lambda x, weight: operation(x, weight, activation="silu")}


def norm_rivals() -> dict[str, Operation]:
    """With the arguments (x, weight) of `rms_norm`."""
    found: dict[str, Operation] = {
        "torch rms_norm": lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
    }
    operation = find("fla.modules.norm.layernorm", "rms_norm")
    if operation is not None:
        found["fla rms_norm"] = lambda x, weight: operation(x, weight, None, eps=1e-6)
    return found


def gated_norm_rivals() -> dict[str, Operation]:
    """With the arguments (x, gate, weight) of `rms_norm_gated`, the gate behind the norm."""
    operation = find("fla.modules.norm.fused_norm_gate", "rms_norm_gated")
    if operation is None:
        return {}
    return {"fla rms_norm_gated": lambda x, gate, weight: operation(x, gate, weight, None, eps=1e-6)}
