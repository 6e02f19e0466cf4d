"""What a compiled kernel may use, and how it is judged.

A kernel that asks for too much still compiles: what does not fit is refused at its launch, or comes out as a stub of a
few instructions. So every figure is held against what the device has.

Source: NVIDIA, CUDA C++ Programming Guide, table of technical specifications by compute capability; AMD, Instinct
MI300 Instruction Set Architecture, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the compiler made of one kernel for one target."""

    registers: int
    """Of a thread (lane)."""
    stack_bytes: int
    """Memory of a thread outside its registers: spills, and arrays that are indexed."""
    spills: int
    """Instructions that move a register to or from there (NVIDIA), or registers that do not fit (AMD)."""
    shared_bytes: int
    """Shared memory (LDS) of a program."""
    tensor_columns: int
    """Columns of tensor memory of a program, on a device that has it."""
    instructions: int
    matrix_instructions: int
    """How many of them multiply matrices."""
    least_instructions: int
    """No fewer can do what the kernel says: one for each load, store, product and reduction of a tile."""
    wants_matrix: bool
    """Whether it multiplies tiles in a dtype that the matrix units of the target take."""
    hazards: tuple[str, ...] = ()
    """What it does that has given wrong numbers on a device."""
    compile_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use on one target."""

    registers: int
    shared_bytes: int
    tensor_columns: int = 0


LIMITS = {
    "sm_80": Limits(255, 166_912),
    # As sm_86, whose kernels it runs.
    "sm_89": Limits(255, 101_376),
    "sm_90": Limits(255, 232_448),
    "sm_100": Limits(255, 232_448, 512),
    "sm_120": Limits(255, 101_376),
    "gfx942": Limits(512, 65_536),
}


@dataclass(frozen=True, slots=True)
class StackBudget:
    """A kernel that may use the stack on some targets, and why."""

    kernel: str
    target: str
    """The beginning of the targets' names."""
    stack_bytes: int
    reason: str
    is_wide: bool = False
    """Whether it is for operands that are all float32; otherwise for those of two bytes."""


_FEW = (
    "a handful of registers in one of its variants; smaller blocks would read more from memory than they save"
)
_TF32 = "float16 with channel decays multiplies in TF32, of twice the size"
_STATES = "states of keys that are wide are float32"
_OLDER = "Triton 3.6 holds less in registers than 3.7, as of a state of 128 by 256"
_THREE = "a product of float32 is three of TF32, whose parts are in registers too; long runs are in bfloat16"

# Every other kernel may use none.
STACK_BUDGETS: tuple[StackBudget, ...] = (
    StackBudget("linear_gram", "sm_80", 64, _TF32),
    StackBudget("linear_scan", "sm_", 64, _FEW),
    StackBudget("linear_gram", "sm_89", 40, _FEW),
    StackBudget("linear_gram", "sm_89", 32, _FEW, is_wide=True),
    StackBudget("linear_gram", "sm_120", 48, _THREE, is_wide=True),
    StackBudget("linear_scan_backward", "sm_80", 8, _OLDER),
    StackBudget("linear_scan_backward", "sm_89", 16, _FEW),
    StackBudget("linear_scan_backward", "sm_100", 8, _FEW),
    StackBudget("linear_scan_backward", "sm_120", 32, _FEW),
    StackBudget("linear_pairs_backward", "sm_80", 32, _FEW),
    StackBudget("linear_pairs_backward", "sm_120", 32, _FEW),
    StackBudget("dplr_pairs", "sm_120", 8, _OLDER),
    StackBudget("dplr_pairs_backward", "sm_89", 16, _FEW),
    StackBudget("dplr_pairs_backward", "sm_100", 8, _OLDER),
    StackBudget("dplr_gradients", "sm_", 48, _FEW),
    StackBudget("cell_forward_wide", "sm_120", 8, _OLDER),
    StackBudget("cell_backward_wide", "sm_120", 40, _OLDER),
    StackBudget("linear_gradients", "sm_80", 64, _STATES),
    StackBudget("linear_gradients", "sm_89", 80, _STATES),
    StackBudget("linear_gradients", "sm_120", 96, _STATES),
    StackBudget("linear_gradients", "sm_", 16, _FEW),
    StackBudget("linear_decode", "sm_", 96, _OLDER),
    StackBudget("selective_backward", "sm_", 32, _OLDER),
    StackBudget("linear_gram", "sm_", 16, _OLDER, is_wide=True),
    StackBudget("linear_scan", "sm_", 1536, _THREE, is_wide=True),
    StackBudget("linear_scan_backward", "sm_", 1536, _THREE, is_wide=True),
    StackBudget("linear_gradients", "sm_", 256, _THREE, is_wide=True),
    StackBudget("linear_scan_backward_wide", "sm_", 256, _THREE, is_wide=True),
    StackBudget("dplr_pairs_backward", "sm_100", 16, _THREE, is_wide=True),
    StackBudget("dplr_gradients", "sm_100", 40, _THREE, is_wide=True),
    StackBudget("dplr_gradients", "sm_120", 32, _THREE, is_wide=True),
    StackBudget("dplr_pairs", "sm_", 16, _OLDER, is_wide=True),
)

# A stub has 16; a kernel that adds one to a row has 21.
FEWEST_INSTRUCTIONS = 20


def stack_budget(kernel: str, target: str, is_wide: bool) -> int:
    """Bytes of stack that a kernel may use on a target."""
    return max(
        (
            allowed.stack_bytes
            for allowed in STACK_BUDGETS
            if allowed.kernel == kernel and target.startswith(allowed.target) and allowed.is_wide == is_wide
        ),
        default=0,
    )


def over_budget(kernel: str, target: str, found: Figures, is_wide: bool = False) -> list[str]:
    """One sentence for each figure outside its budget; none if the kernel may be launched."""
    limits = LIMITS[target]
    most = {
        "registers": (found.registers, limits.registers),
        "stack bytes": (found.stack_bytes, stack_budget(kernel, target, is_wide)),
        "bytes of shared memory": (found.shared_bytes, limits.shared_bytes),
        "columns of tensor memory": (found.tensor_columns, limits.tensor_columns),
    }
    said = [
        f"{kernel} on {target} uses {figure} {what}, and its budget is {budget}"
        for what, (figure, budget) in most.items()
        if figure > budget
    ]
    least = max(FEWEST_INSTRUCTIONS, found.least_instructions)
    if found.instructions < least:
        said.append(
            f"{kernel} on {target} has {found.instructions} instructions, and can do its work in no fewer than {least}: "
            "the compiler dropped it"
        )
    if found.wants_matrix and not found.matrix_instructions:
        said.append(
            f"{kernel} on {target} has 0 matrix instructions, and its products need at least 1: "
            "they run as single multiply-adds"
        )
    said += [f"{kernel} on {target} {hazard}" for hazard in found.hazards]
    return said
