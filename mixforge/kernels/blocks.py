"""Block sizes of the Triton kernels: a plain table by device generation, dims and dtype.

The first row that fits is taken. A row never depends on a length: a new length compiles nothing. What
`mixforge doctor --tune` found for a device goes before the table.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch
import triton

ANY = 1 << 30
# Where each warp multiplies by itself, as on an A100; consumer parts of the Blackwell generation do.
AMPERE = ("sm_8", "sm_12")
# Consumer parts, with 99 KiB of shared memory for a program, where the A100 has 163 and the H100 227.
CONSUMER = ("sm_86", "sm_89", "sm_12")


@dataclass(frozen=True, slots=True)
class Config:
    """How one kernel is launched."""

    blocks: Mapping[str, int] = field(default_factory=dict)
    """Its constexpr block sizes by name."""
    warps: int = 4
    stages: int = 2
    registers: int = 0
    """Of a thread, at most, so that more programs run side by side: NVIDIA's alone. 0 leaves it to the compiler."""

    @property
    def options(self) -> dict[str, int]:
        """What Triton is told beside the blocks."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}

    @property
    def text(self) -> str:
        """As people read it."""
        blocks = [f"{name} {size}" for name, size in self.blocks.items()]
        limit = [f"{self.registers} registers"] if self.registers else []
        return ", ".join([*blocks, f"{self.warps} warps", f"{self.stages} stages", *limit])


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration, and what it is for."""

    kernel: str
    config: Config
    generation: str | tuple[str, ...] = ""
    """The beginning of the generations that it is for, such as `sm_9` or `gfx`, or several; empty for all."""
    itemsize: int = 8
    """Bytes of the operands' dtype, at most."""
    key: int = ANY
    """The key dim, or the only dim, at most."""
    value: int = ANY
    """The value dim, at most."""
    variant: str = ""
    """The beginning of the variants of the kernel that it is for; empty for all."""


# Those for the interpreter cut few columns into several blocks; more of them take the blocks of a device.
TABLE: tuple[Row, ...] = (
    # chunked_linear; float32 operands, as three products of TF32, take twice the room
    # One turn or few: what a turn holds fills the registers, and Triton 3.6 cannot overlap two of them on Blackwell.
    *(
        Row(
            "linear_gram",
            Config({"BK": channels}, warps=warps, stages=1),
            generation="sm_9",
            itemsize=2,
            key=key,
            variant=f"channel, {rule}",
        )
        for rule, key, channels, warps in (
            ("add", 32, 32, 4),
            ("add", 64, 64, 8),
            ("add", ANY, 32, 8),
            ("delta", 32, 32, 8),
            ("delta", 64, 64, 16),
            ("delta", 128, 128, 16),
            ("delta", ANY, 64, 16),
        )
    ),
    Row(
        "linear_gram",
        Config({"BK": 32}, warps=8, stages=1),
        generation="sm_10",
        itemsize=2,
        variant="channel",
    ),
    Row("linear_gram", Config({"BK": 32}, stages=1), generation="gfx", itemsize=2, variant="channel"),
    Row("linear_gram", Config({"BK": 16}, warps=8, stages=1), variant="channel"),
    Row("linear_gram", Config({"BK": 64}), itemsize=2),
    Row("linear_gram", Config({"BK": 32}, warps=8)),
    # Both in one, where keys are so narrow that all is work for one warp.
    Row("linear_gram_solve", Config(), generation="cpu", key=16),
    Row(
        "linear_gram_solve",
        Config(warps=1, stages=1),
        generation=("sm_9", "gfx"),
        itemsize=2,
        key=64,
    ),
    Row("linear_gram_solve", Config(warps=2, stages=1), generation="sm_", itemsize=2, key=64),
    Row("linear_solve", Config(warps=2, stages=1), generation="sm_1"),
    Row("linear_solve", Config(warps=1, stages=1)),
    # With the output; where there is no such row, a kernel of its own makes that.
    Row("linear_scan", Config({"BV": 16}), generation="cpu", variant="output"),
    Row(
        "linear_scan",
        Config({"BV": 32}, stages=3),
        generation="sm_9",
        itemsize=2,
        key=32,
        value=32,
        variant="output",
    ),
    Row("linear_scan", Config({"BV": 64}), generation="sm_9", itemsize=2, key=64, variant="output"),
    # Decays of wider keys gain nothing: a chunk's three operands of keys fill the shared memory of a multiprocessor.
    *(
        Row(
            "linear_scan",
            Config({"BV": 64}, stages=3 if rule == "delta" else 2),
            generation="sm_9",
            itemsize=2,
            key=128,
            variant=f"output, {decay}, {rule}",
        )
        for decay in ("none", "head", "scalar")
        for rule in ("add", "delta")
    ),
    Row("linear_scan", Config({"BV": 32}), generation=AMPERE, itemsize=2, key=128, variant="channel"),
    Row("linear_scan", Config({"BV": 32}, warps=8), generation="sm_10", itemsize=2, key=64),
    Row("linear_scan", Config({"BV": 32}), generation="sm_10", itemsize=2, key=128),
    Row("linear_scan", Config({"BV": 64}), itemsize=2, key=128),
    Row("linear_scan", Config({"BV": 16}, stages=1), generation="gfx", itemsize=2),
    Row("linear_scan", Config({"BV": 16}, warps=8), itemsize=2),
    Row("linear_scan", Config({"BV": 16}, stages=1), generation="gfx"),
    # Of Hopper's TF32, more warps multiply eight columns at a time and read beyond their operands (triton 10629).
    Row("linear_scan", Config({"BV": 16}, stages=1), generation="sm_9"),
    Row("linear_scan", Config({"BV": 16}, warps=8, stages=1), generation=CONSUMER),
    Row("linear_scan", Config({"BV": 16}, warps=8)),
    Row("linear_output", Config({"BK": 64, "BV": 64}), itemsize=2, value=64),
    # Eight warps over 32 key channels and 128 of the values, with P made beside, were wrong there (Triton 3.6).
    Row("linear_output", Config({"BK": 64, "BV": 64}), generation="sm_9", itemsize=2, key=64),
    Row("linear_output", Config({"BK": 64, "BV": 128}, warps=8), generation="sm_9", itemsize=2),
    Row("linear_output", Config({"BK": 64, "BV": 64}), itemsize=2),
    Row("linear_output", Config({"BK": 32, "BV": 32}), generation="sm_9"),
    Row("linear_output", Config({"BK": 32, "BV": 32}, warps=8)),
    Row("linear_scan_backward", Config({"BV": 32}, stages=1), generation="gfx", itemsize=2, key=128),
    Row("linear_scan_backward", Config({"BV": 16}, stages=1), generation="gfx"),
    Row("linear_scan_backward", Config({"BV": 16}), generation=AMPERE, itemsize=2, key=128),
    Row("linear_scan_backward", Config({"BV": 32}, warps=8), generation="sm_10", itemsize=2, key=64),
    Row("linear_scan_backward", Config({"BV": 32}), itemsize=2, key=128),
    Row("linear_scan_backward", Config({"BV": 16}, warps=8, stages=1), itemsize=2),
    Row("linear_scan_backward", Config({"BV": 16}, stages=1), generation="sm_9"),
    Row("linear_scan_backward", Config({"BV": 16}, warps=8, stages=1), generation=CONSUMER),
    Row("linear_scan_backward", Config({"BV": 16}, warps=8)),
    # In the loops of the next two, products and sums share operands. Triton gives these one buffer, and in two stages
    # fills it again on Hopper while a product still reads it.
    Row("linear_pairs_backward", Config({"BV": 64}, stages=1), itemsize=2),
    Row("linear_pairs_backward", Config({"BV": 16}, warps=8, stages=1)),
    # With dP made within, where one block of keys is all of them, and the values are few.
    *(
        Row(
            "linear_gradients",
            config,
            generation=on,
            itemsize=size,
            key=dims,
            value=dims,
            variant=f"pairs, {decay}, add",
        )
        for on, size, dims, config in (
            ("cpu", 8, 16, Config({"BK": 16, "BV": 16})),
            (AMPERE, 2, 32, Config({"BK": 32, "BV": 64}, stages=1)),
            (("sm_9", "sm_10", "gfx"), 2, 64, Config({"BK": 64, "BV": 64}, stages=1)),
        )
        for decay in ("none", "head", "scalar")
    ),
    Row("linear_gradients", Config({"BK": 32, "BV": 64}), generation="gfx", itemsize=2, variant="channel"),
    Row("linear_gradients", Config({"BK": 16, "BV": 64}, stages=1), itemsize=2, key=16, variant="channel"),
    Row(
        "linear_gradients",
        Config({"BK": 64, "BV": 64}, warps=8, stages=1),
        generation="sm_9",
        itemsize=2,
        variant="channel, delta",
    ),
    Row("linear_gradients", Config({"BK": 32, "BV": 64}, warps=8, stages=1), itemsize=2, variant="channel"),
    Row("linear_gradients", Config({"BK": 32, "BV": 64}, stages=1), generation=AMPERE, itemsize=2),
    Row(
        "linear_gradients",
        Config({"BK": 64, "BV": 128}, stages=1),
        generation="sm_9",
        itemsize=2,
        key=128,
        value=128,
    ),
    Row("linear_gradients", Config({"BK": 64, "BV": 64}, stages=1), itemsize=2),
    Row("linear_gradients", Config({"BK": 16, "BV": 16}, warps=4), generation="gfx"),
    Row("linear_gradients", Config({"BK": 16, "BV": 32}, stages=1), generation="sm_9"),
    Row("linear_gradients", Config({"BK": 16, "BV": 32}, warps=8, stages=1)),
    Row("linear_scan_wide", Config({"BK": 64, "BV": 16}), generation="cpu"),
    Row("linear_scan_wide", Config({"BK": 32, "BV": 64}), generation="sm_10", itemsize=2),
    Row("linear_scan_wide", Config({"BK": 64, "BV": 64}), itemsize=2),
    Row("linear_scan_wide", Config({"BK": 16, "BV": 32}), generation="sm_9"),
    Row("linear_scan_wide", Config({"BK": 16, "BV": 32}, warps=8)),
    Row("linear_scan_backward_wide", Config({"BK": 64, "BV": 16}), generation="cpu"),
    Row("linear_scan_backward_wide", Config({"BK": 32, "BV": 64}), generation=AMPERE, itemsize=2),
    Row("linear_scan_backward_wide", Config({"BK": 64, "BV": 64}), itemsize=2),
    Row("linear_scan_backward_wide", Config({"BK": 16, "BV": 32}), generation="sm_9"),
    Row("linear_scan_backward_wide", Config({"BK": 16, "BV": 32}, warps=8)),
    Row("linear_step_wide", Config({"BK": 128, "BV": 16})),
    Row("linear_step", Config({"BV": 32}), key=128),
    Row("linear_step", Config({"BV": 16})),
    # A state that is smaller than the threads would be held by several of them.
    Row("linear_decode", Config(warps=1), key=32, value=32),
    Row("linear_decode", Config(warps=4), key=64, value=64),
    Row("linear_decode", Config(warps=8)),
    Row("log_linear_step", Config({"BV": 16})),
    # dplr and twofold_linear
    # Chunks of 16 rows are work for one warp, which waits for no other.
    Row("dplr_pairs", Config({"BK": 32}, warps=1, stages=1), itemsize=2),
    Row("dplr_pairs", Config({"BK": 16}, warps=1, stages=1)),
    # A product of 64 rows on Hopper, whose left operand, the state or its gradient, stays in registers.
    Row("dplr_scan", Config({"BV": 32}), generation="cpu"),
    Row("dplr_scan", Config({"BV": 64}, stages=3), itemsize=2, key=64),
    Row("dplr_scan", Config({"BV": 64}), generation="sm_9", itemsize=2, key=128),
    Row("dplr_scan", Config({"BV": 32}), itemsize=2, key=128),
    Row("dplr_scan", Config({"BV": 16})),
    Row("dplr_scan_backward", Config({"BV": 32}), generation="cpu"),
    Row("dplr_scan_backward", Config({"BV": 64}, stages=3), itemsize=2, key=64),
    Row("dplr_scan_backward", Config({"BV": 32}), generation=AMPERE, itemsize=2, key=128),
    Row("dplr_scan_backward", Config({"BV": 64}), itemsize=2, key=128),
    Row("dplr_scan_backward", Config({"BV": 16})),
    Row("dplr_pairs_backward", Config({"BK": 16, "BV": 32}), generation="cpu", key=32),
    # Fewer blocks of values, whose powers are made for each of keys.
    Row("dplr_pairs_backward", Config({"BK": 128, "BV": 32}, stages=1), itemsize=2, variant="value decays"),
    Row("dplr_pairs_backward", Config({"BK": 64, "BV": 64}, stages=1), itemsize=2),
    Row("dplr_pairs_backward", Config({"BK": 32, "BV": 32}, stages=1)),
    Row("dplr_gradients", Config({"BK": 16}, warps=1, stages=1), itemsize=2),
    Row("dplr_gradients", Config({"BK": 32})),
    Row("dplr_step", Config({"BV": 32}), key=128),
    Row("dplr_step", Config({"BV": 16})),
    # gated_scan
    # One warp, a channel of its own for each lane. The more rows a tile has, the more is on its way from memory at once;
    # they fill the registers.
    Row("scan_forward", Config({"BLOCK_T": 16, "BLOCK_D": 4}), generation="cpu", key=16),
    Row("scan_forward", Config({"BLOCK_T": 16, "BLOCK_D": 64}), generation="cpu"),
    Row(
        "scan_forward",
        Config({"BLOCK_T": 16, "BLOCK_D": 64}, warps=1),
        generation="gfx",
        value=1,
        variant="packed",
    ),
    Row("scan_forward", Config({"BLOCK_T": 40, "BLOCK_D": 64}, warps=1), generation="gfx", value=1),
    Row("scan_forward", Config({"BLOCK_T": 16, "BLOCK_D": 64}, warps=1), generation="gfx"),
    Row("scan_forward", Config({"BLOCK_T": 24, "BLOCK_D": 32}, warps=1), value=1, variant="packed"),
    Row("scan_forward", Config({"BLOCK_T": 40, "BLOCK_D": 32}, warps=1), value=1),
    Row("scan_forward", Config({"BLOCK_T": 10, "BLOCK_D": 32}, warps=1), variant="packed"),
    Row("scan_forward", Config({"BLOCK_T": 16, "BLOCK_D": 32}, warps=1)),
    Row("scan_backward", Config({"BLOCK_T": 16, "BLOCK_D": 4}), generation="cpu", key=16),
    Row("scan_backward", Config({"BLOCK_T": 16, "BLOCK_D": 64}), generation="cpu"),
    Row("scan_backward", Config({"BLOCK_T": 24, "BLOCK_D": 64}, warps=1), generation="gfx", value=1),
    Row("scan_backward", Config({"BLOCK_T": 10, "BLOCK_D": 64}, warps=1), generation="gfx"),
    Row("scan_backward", Config({"BLOCK_T": 16, "BLOCK_D": 32}, warps=1), value=1, variant="packed"),
    Row("scan_backward", Config({"BLOCK_T": 24, "BLOCK_D": 32}, warps=1), value=1),
    Row("scan_backward", Config({"BLOCK_T": 10, "BLOCK_D": 32}, warps=1)),
    Row("scan_step", Config({"BLOCK_D": 256}, warps=2)),
    # diagonal_ssm: the key dim is the poles of a channel; softmax_scan: that of the values
    Row("diagonal_step", Config({"BLOCK_D": 4, "BLOCK_P": 16}), generation="cpu"),
    Row("diagonal_step", Config({"BLOCK_D": 32, "BLOCK_P": 16}), key=16),
    Row("diagonal_step", Config({"BLOCK_D": 8, "BLOCK_P": 64})),
    Row("softmax_step", Config({"BLOCK_R": 2, "BLOCK_V": 16}), generation="cpu"),
    Row("softmax_step", Config({"BLOCK_R": 4, "BLOCK_V": 128})),
    # norm
    Row("norm_forward", Config({"BLOCK_R": 4}), generation="cpu"),
    Row("norm_forward", Config({"BLOCK_R": 16}), key=128),
    Row("norm_forward", Config({"BLOCK_R": 4}), key=1024),
    Row("norm_forward", Config({"BLOCK_R": 1}), key=4096),
    Row("norm_forward", Config({"BLOCK_R": 1}, warps=16)),
    Row("norm_backward", Config({"BLOCK_R": 4}), generation="cpu"),
    Row("norm_backward", Config({"BLOCK_R": 16}), key=128),
    Row("norm_backward", Config({"BLOCK_R": 2}), key=1024),
    Row("norm_backward", Config({"BLOCK_R": 1}, warps=8), key=4096),
    Row("norm_backward", Config({"BLOCK_R": 1}, warps=16)),
    # short_conv
    Row("conv_forward", Config({"BLOCK_T": 16, "BLOCK_D": 8}), generation="cpu", key=16),
    Row("conv_forward", Config({"BLOCK_T": 16, "BLOCK_D": 64})),
    Row("conv_weight_gradient", Config({"BLOCK_T": 16, "BLOCK_D": 8}), generation="cpu", key=16),
    Row("conv_weight_gradient", Config({"BLOCK_T": 16, "BLOCK_D": 64}, warps=8)),
    Row("conv_input_gradient", Config({"BLOCK_T": 16, "BLOCK_D": 8}), generation="cpu", key=16),
    Row("conv_input_gradient", Config({"BLOCK_T": 32, "BLOCK_D": 64})),
    Row("conv_step", Config({"BLOCK_D": 256}, warps=2)),
    # selective_scan: the key dim is the states of a channel, the value dim the channels
    Row("selective_scan", Config({"BLOCK_T": 6, "BLOCK_D": 4}), generation="cpu", value=16),
    # One warp, whose sums need no other. A tile's states stay in registers, so that it has few rows: any number. Few
    # channels are many programs; backward, sums over channels are fewer for more of them.
    Row("selective_scan", Config({"BLOCK_T": 6, "BLOCK_D": 8}, warps=1), generation=AMPERE, key=16),
    Row("selective_scan", Config({"BLOCK_T": 8, "BLOCK_D": 8}, warps=1), key=16),
    Row("selective_scan", Config({"BLOCK_T": 8, "BLOCK_D": 4}, warps=1), key=32),
    Row("selective_scan", Config({"BLOCK_T": 8, "BLOCK_D": 2}, warps=1), key=64),
    Row("selective_backward", Config({"BLOCK_D": 4}), generation="cpu", value=16),
    Row("selective_backward", Config({"BLOCK_D": 16}, warps=1), key=16),
    Row("selective_backward", Config({"BLOCK_D": 4}, warps=1), key=32),
    Row("selective_backward", Config({"BLOCK_D": 2}, warps=1), key=64),
    Row("selective_step", Config({"BLOCK_D": 32}), key=16),
    Row("selective_step", Config({"BLOCK_D": 8})),
    # recurrent_cells: a wave of AMD's holds 16 columns
    Row("cell_forward", Config({"BLOCK_B": 16}, warps=2), generation="gfx", key=32),
    Row("cell_forward", Config({"BLOCK_B": 16}, warps=4), generation="gfx", key=64),
    Row("cell_forward", Config({"BLOCK_B": 16}, warps=4), key=32),
    Row("cell_forward", Config({"BLOCK_B": 16}, warps=8)),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=2), generation="gfx", key=32),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=4), generation="gfx", key=64),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=4), key=32),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=8), itemsize=2, key=64),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=8, stages=1), generation=AMPERE),
    Row("cell_backward", Config({"BLOCK_B": 16}, warps=8)),
    Row("cell_forward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 16}), generation="cpu", key=64),
    Row("cell_forward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 64}), generation="gfx", itemsize=2),
    Row("cell_forward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 32}), generation="gfx"),
    Row("cell_forward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 64}, warps=8, stages=3), itemsize=2),
    Row("cell_forward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 32}, stages=3)),
    Row("cell_backward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 16}), generation="cpu", key=64),
    Row("cell_backward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 64}), generation="gfx", itemsize=2),
    Row("cell_backward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 32}), generation="gfx"),
    Row("cell_backward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 64}, warps=8, stages=3), itemsize=2),
    Row("cell_backward_wide", Config({"BLOCK_B": 16, "BLOCK_K": 32}, stages=3)),
)


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """What a configuration is chosen for. No length is part of it."""

    kernel: str
    dtype: torch.dtype
    key: int = 0
    value: int = 0
    variant: str = ""

    @property
    def name(self) -> str:
        """As it stands in the cache's file."""
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(
            part for part in (self.kernel, self.variant, dtype, f"{self.key}x{self.value}") if part
        )


def choose(
    kernel: str, generation: str, dtype: torch.dtype, key: int = 0, value: int = 0, variant: str = ""
) -> Config:
    """The configuration of a kernel for operands of a dtype and dims, on a device generation."""
    wanted = ShapeClass(kernel, dtype, key, value, variant)
    if _trial is not None:
        config = _trial.configs.get(wanted) or from_table(wanted, generation)
        _trial.asked[wanted] = config
        return config
    # Interpreted kernels run on the CPU of a machine that may have a tuned GPU.
    if generation != "cpu" and not _table_only.get() and torch.cuda.is_available():
        tuned = _tuned(torch.cuda.current_device()).get(wanted.name)
        if tuned is not None:
            return tuned
    return from_table(wanted, generation)


def from_table(wanted: ShapeClass, generation: str) -> Config:
    """The first row of the table that fits."""
    fitting = rows_for(wanted, generation)
    if not fitting:
        raise LookupError(f"no block sizes for kernel {wanted.name} on {generation}")
    return fitting[0].config


@cache
def rows_for(wanted: ShapeClass, generation: str) -> tuple[Row, ...]:
    """The rows of the table that fit, the one to take first."""
    return tuple(
        row
        for row in TABLE
        if row.kernel == wanted.kernel
        and generation.startswith(row.generation)
        and wanted.dtype.itemsize <= row.itemsize
        and wanted.key <= row.key
        and wanted.value <= row.value
        and wanted.variant.startswith(row.variant)
    )


@dataclass(slots=True)
class Trial:
    """Configurations that are tried in place of those of the table, and what was asked for meanwhile."""

    configs: Mapping[ShapeClass, Config]
    asked: dict[ShapeClass, Config] = field(default_factory=dict)


# Not of a context, for autograd asks from a thread of its own.
_trial: Trial | None = None
_table_only: ContextVar[bool] = ContextVar("table_only", default=False)


@contextmanager
def trying(configs: Mapping[ShapeClass, Config]) -> Generator[Trial]:
    """Take these configurations, and those of the table for all else."""
    global _trial
    before, _trial = _trial, Trial(configs)
    try:
        yield _trial
    finally:
        _trial = before


@contextmanager
def table_only() -> Generator[None]:
    """Take no notice of what was tuned for the device at hand."""
    token = _table_only.set(True)
    try:
        yield
    finally:
        _table_only.reset(token)


def cache_file() -> Path:
    """Where tuned configurations are kept: in $MIXFORGE_CACHE, or ~/.cache/mixforge."""
    return Path(os.environ.get("MIXFORGE_CACHE") or Path.home() / ".cache" / "mixforge") / "tuned.json"


def cache_key(device: str) -> str:
    """Whose configurations they are: a device by its name, under one version of Triton."""
    return f"{device}, Triton {triton.__version__}"


def read_tuned(device: str) -> dict[str, Config]:
    """Tuned configurations of a device by the names of their shape classes. None where there is no file.

    A file that cannot be read is warned of and left as it is.
    """
    file = cache_file()
    try:
        stored = json.loads(file.read_text()).get(cache_key(device), {})
        return {name: _config(**config) for name, config in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{file} holds no tuned configurations ({type(error).__name__}: {error}), so the table's are used; "
            "delete it, or write it anew with: mixforge doctor --tune",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _config(blocks: Mapping[str, int], warps: int, stages: int, registers: int = 0) -> Config:
    numbers = (*blocks.values(), warps, stages)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"blocks, warps and stages must be whole numbers above 0, got {numbers}")
    if not isinstance(registers, int) or registers < 0:
        raise ValueError(f"registers must be a whole number, 0 for as many as it takes, got {registers}")
    return Config(dict(blocks), warps, stages, registers)


def write_tuned(device: str, found: Mapping[str, Config]) -> Path:
    """Add configurations of a device to the file, or replace those of the same shape classes."""
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        stored = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        stored = {}
    stored = stored if isinstance(stored, dict) else {}
    with warnings.catch_warnings():
        # What cannot be read is written anew.
        warnings.simplefilter("ignore")
        known = read_tuned(device)
    stored[cache_key(device)] = {name: asdict(config) for name, config in {**known, **found}.items()}
    # Renamed into place, so that a reader finds the old file or the new one and never half of it.
    half = file.with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
    half.replace(file)
    _tuned.cache_clear()
    return file


@cache
def _tuned(device: int) -> dict[str, Config]:
    return read_tuned(torch.cuda.get_device_name(device))
