"""The ahead-of-time gate: what it compiles is what the JIT would, and what may not be launched fails it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from mixforge import kernels  # noqa: E402
from mixforge.kernels.ahead_of_time import budgets  # noqa: E402
from mixforge.kernels.ahead_of_time.__main__ import main  # noqa: E402
from mixforge.kernels.ahead_of_time.budgets import Figures, StackBudget, over_budget  # noqa: E402
from mixforge.kernels.ahead_of_time.cases import CASES, ONCE  # noqa: E402
from mixforge.kernels.ahead_of_time.compiling import TARGETS, Unit, compile_units, unit  # noqa: E402
from mixforge.kernels.ahead_of_time.judging import Wanted, distinct, judge  # noqa: E402
from mixforge.kernels.ahead_of_time.recording import record  # noqa: E402
from mixforge.kernels.ahead_of_time.tables import figures_page, terminal, write_between  # noqa: E402
from mixforge.kernels.blocks import Config  # noqa: E402
from mixforge.kernels.launch import launch, recording  # noqa: E402
from mixforge.kernels.recurrent_cells_triton import is_held  # noqa: E402

FINE = Figures(
    registers=128,
    stack_bytes=0,
    spills=0,
    shared_bytes=49152,
    tensor_columns=0,
    instructions=800,
    matrix_instructions=16,
    least_instructions=12,
    wants_matrix=True,
    compile_s=1.0,
)


@triton.jit(do_not_specialize=["length"])
def product(x, y, o, bias, length, one, even, scale, B: tl.constexpr, PRECISION: tl.constexpr):
    place = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    total = tl.zeros([B, B], tl.float32)
    for step in range(length):
        left, right = tl.load(x + step * B * B + place), tl.load(y + step * B * B + place)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + place)
    tl.store(o + place, (scale * total + one + even).to(o.dtype.element_ty))


@triton.jit
def summed(x, y, o, sums, length, B: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    """A loop whose product and whose sum share an operand."""
    row, column = tl.arange(0, B), tl.arange(0, N)
    total = tl.zeros([B, N], tl.float32)
    along = tl.zeros([N], tl.float32)
    for step in range(length):
        left = tl.load(x + step * B * B + row[:, None] * B + row[None, :])
        right = tl.load(y + step * B * N + row[:, None] * N + column[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
        along += tl.sum(right.to(tl.float32), 0)
    tl.store(o + row[:, None] * N + column[None, :], total)
    tl.store(sums + column, along)


@triton.jit
def nothing(x):
    return


def arguments() -> tuple[object, ...]:
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    return x, x, x.float(), None, 64, 1, 32, 0.5


def test_every_kernel_is_among_those_compiled_once() -> None:
    def launched(cases):
        made = [record(case, "sm_90") for case in cases]
        return {
            launch.name
            for one in made
            for part in (one.forward, one.backward)
            if part
            for launch in part.launches
        }

    assert launched(ONCE) == launched(CASES)


def written(target: str, kernel, *args: object, config: Config, **constants: object):
    with recording(target) as made:
        launch(kernel, (1,), *args, config=config, **constants)
    return made.launches[0]


@pytest.mark.parametrize(
    ("target", "figures", "said"),
    [
        ("sm_80", {"shared_bytes": 166_913}, "uses 166913 bytes of shared memory, and its budget is 166912"),
        ("sm_89", {"shared_bytes": 101_377}, "uses 101377 bytes of shared memory, and its budget is 101376"),
        ("sm_90", {"shared_bytes": 232_449}, "uses 232449 bytes of shared memory, and its budget is 232448"),
        ("gfx942", {"shared_bytes": 65_537}, "uses 65537 bytes of shared memory, and its budget is 65536"),
        ("sm_100", {"tensor_columns": 513}, "uses 513 columns of tensor memory, and its budget is 512"),
        ("sm_90", {"registers": 256}, "uses 256 registers, and its budget is 255"),
        ("sm_90", {"stack_bytes": 8}, "uses 8 stack bytes, and its budget is 0"),
        ("sm_100", {"instructions": 16}, "has 16 instructions, and can do its work in no fewer than 20"),
        ("sm_100", {"instructions": 25, "least_instructions": 26}, "in no fewer than 26"),
        ("sm_80", {"matrix_instructions": 0}, "has 0 matrix instructions"),
    ],
)
def test_a_figure_over_its_budget_is_named(target: str, figures: dict[str, int], said: str) -> None:
    (failure,) = over_budget("product", target, replace(FINE, **figures))
    assert failure.startswith(f"product on {target} ")
    assert said in failure


def test_what_is_inside_its_budget_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(over_budget("product", target, FINE) == [] for target in TARGETS)
    assert over_budget("product", "sm_80", replace(FINE, wants_matrix=False, matrix_instructions=0)) == []
    spilling = replace(FINE, stack_bytes=96)
    monkeypatch.setattr(budgets, "STACK_BUDGETS", (StackBudget("product", "sm_", 96, "a test"),))
    assert over_budget("product", "sm_90", spilling) == []
    assert over_budget("product", "gfx942", spilling) != []
    assert over_budget("other", "sm_90", spilling) != []


@pytest.mark.parametrize("target", TARGETS)
def test_real_kernels_are_compiled_and_judged(target: str) -> None:
    fits = written(target, product, *arguments(), config=Config({"B": 64}), PRECISION="tf32")
    empty = written(target, nothing, arguments()[0], config=Config())
    wide = written(target, product, *arguments(), config=Config({"B": 128}, 8, 6), PRECISION="tf32")
    found, stub, large = compile_units([unit(each, target) for each in (fits, empty, wide)])
    assert found.wants_matrix
    assert found.matrix_instructions > 0
    assert found.registers > 16
    assert found.shared_bytes > 0
    assert (found.tensor_columns > 0) == (target == "sm_100")
    assert over_budget("product", target, found) == []
    assert [said for said in over_budget("nothing", target, stub) if "the compiler dropped it" in said]
    assert stub.matrix_instructions == 0
    said = " ".join(over_budget("product", target, large))
    assert re.search(r"product on \w+ uses \d+ bytes of shared memory", said)


class Driver:
    """As much of a driver as a launch needs to decide what to compile."""

    def __init__(self, target: object) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> object:
        return self.target


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_compiled_is_what_a_launch_would_compile(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(product, "_do_compile", lambda *args, **words: asked.append(args))
    product.device_caches.clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(TARGETS[target]))
    launch(product, (1,), *arguments(), config=Config({"B": 64}, 8, 3), PRECISION="tf32")
    product.device_caches.clear()
    _, signature, _, constants, options, attributes, _ = asked[0]
    ours = unit(
        written(target, product, *arguments(), config=Config({"B": 64}, 8, 3), PRECISION="tf32"), target
    )
    assert ours.signature == signature
    assert ours.constants == constants
    assert ours.attributes == attributes
    backend = triton.compiler.make_backend(TARGETS[target])
    assert vars(backend.parse_options(dict(ours.options))) == vars(options)
    # And both are these: None and 1 are constants, an aligned number is known as such unless it is a length.
    assert signature["bias"] == signature["one"] == "constexpr"
    assert signature["x"] == "*bf16"
    assert signature["length"] == signature["even"] == "i32"
    assert constants[(3,)] is None
    assert constants[(5,)] == 1
    assert ["tt.divisibility", 16] in attributes[(0,)]
    assert ["tt.divisibility", 16] in attributes[(6,)]
    assert not attributes.get((4,))


def test_meta_tensors_ask_for_the_same_as_real_ones() -> None:
    real = arguments()
    meta = tuple(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in real)
    units = [
        unit(written("gfx942", product, *args, config=Config({"B": 64}), PRECISION="tf32"), "gfx942")
        for args in (real, meta)
    ]
    assert units[0].key == units[1].key


def test_what_does_not_compile_is_named_and_takes_nothing_along() -> None:
    missing = Unit(
        "mixforge.kernels.nowhere", "product", "sm_90", {}, {}, {}, {"num_warps": 4, "num_stages": 2}
    )
    fine = distinct([record(CASES[-1], "sm_90")])[0]
    told: list[str] = []
    judged, other = judge([Wanted(missing, "a case"), fine], told.append, workers=1)
    (failure,) = judged.failures
    assert failure.startswith("product on sm_90 does not compile (a case): ModuleNotFoundError: ")
    assert judged.figures is None
    assert told[0] == "1/2 product sm_90 failed"
    assert "product" in terminal([judged])
    assert "does not compile" in figures_page([judged], ["sm_90"])
    assert other.kernel == "norm_forward"
    assert other.figures is not None
    assert other.failures == ()


def test_every_kernel_is_compiled() -> None:
    """What has a program's number and stores is a kernel; what the others call is not."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        names = vars(importlib.import_module(module.name)) if module.name.endswith("_triton") else {}
        for name, value in names.items():
            text = inspect.getsource(value.fn) if isinstance(value, triton.runtime.JITFunction) else ""
            if "tl.program_id" in text and "tl.store" in text:
                found.add(name)
    recorded = [
        made for case in CASES for one in [record(case, "sm_90")] for made in (one.forward, one.backward)
    ]
    assert found - {launch.name for made in recorded if made is not None for launch in made.launches} == set()
    assert len(found) > 30


def test_every_case_launches_and_no_length_is_compiled_for() -> None:
    recorded = [record(case, "sm_90") for case in CASES]
    for one in recorded:
        assert one.forward.launches, one.case.label
        assert one.backward is None or one.backward.launches, one.case.label
        for made in (one.forward, one.backward):
            # What is read and written cannot be less than what must be.
            assert made is None or made.traffic_bytes >= 0.99 * made.least_bytes, one.case.label
    longer = [
        record(replace(case, sizes={**case.sizes, "T": 3 * case.sizes["T"] + 1}), "sm_90")
        for case in CASES
        if "T" in case.sizes
    ]
    known = {wanted.unit.key for wanted in distinct(recorded)}
    new = [one.unit.kernel for one in distinct(longer) if one.unit.key not in known]
    assert not new


@pytest.mark.parametrize(
    ("target", "most"), [("sm_80", 128), ("sm_86", 64), ("sm_89", 64), ("sm_90", 128), ("sm_121", 64)]
)
def test_a_cell_is_held_where_shared_memory_has_room(target: str, most: int) -> None:
    with recording(target):
        assert is_held(torch.bfloat16, most)
        assert not is_held(torch.bfloat16, most + 1)


def test_the_tables_stand_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    write_between(page, {"figures": "new"})
    assert page.read_text() == "before\n<!-- figures: begin -->\nnew\n<!-- figures: end -->\nafter\n"
    with pytest.raises(ValueError, match="traffic: begin"):
        write_between(page, {"traffic": "new"})


def test_a_wrong_request_is_told_what_is_legal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--targets", "sm_90,sm_9"])
    assert end.value.code == 2
    assert "sm_9; legal targets: sm_80, sm_89, sm_90, sm_100, sm_120, gfx942" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "columns", "warps", "stages", "said"),
    [
        (torch.bfloat16, 64, 4, 2, ["fills a buffer again while a product that reads it is under way"]),
        (torch.bfloat16, 64, 4, 1, []),
        (
            torch.float32,
            16,
            8,
            1,
            ["multiplies TF32 eight columns at a time, which reads beyond its operands"],
        ),
        (torch.float32, 16, 4, 1, []),
    ],
)
def test_what_gave_wrong_numbers_on_a_device_is_found(
    dtype: torch.dtype, columns: int, warps: int, stages: int, said: list[str]
) -> None:
    x, o = torch.empty(64, 64, dtype=dtype), torch.empty(64, 64)
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    config = Config({"B": 64, "N": columns}, warps, stages)
    with recording("sm_90") as made:
        launch(summed, (1,), x, x, o, o, 64, config=config, PRECISION=precision)
    (found,) = compile_units([unit(made.launches[0], "sm_90")])
    assert list(found.hazards) == said
    assert over_budget("summed", "sm_90", found) == [f"summed on sm_90 {hazard}" for hazard in said]
