"""The logic of benchmarks/kernels.py, on a device that is made up: counts, bytes, order, table and refusals."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def _path() -> None:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))


@pytest.fixture
def kernels(_path: None) -> ModuleType:
    return importlib.import_module("kernels")


@pytest.fixture
def measuring(_path: None) -> ModuleType:
    return importlib.import_module("on_gpu.measuring")


@pytest.fixture
def cases(_path: None) -> ModuleType:
    return importlib.import_module("on_gpu.cases")


class Made:
    """A device on which every span takes 6 ms, and whose graphs are the work itself."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.l2_bytes = 1000
        self.captures = True

    def span_ms(self, work: Callable[[], object]) -> float:
        work()
        return 6.0

    def warm(self, work: Callable[[], object]) -> None:
        work()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        if not self.captures:
            raise RuntimeError("a stream is waited for\nsecond line")
        work()
        return work

    def copy_gb_s(self) -> float:
        return 2.0


def toy(cases: ModuleType, **forms: Callable[..., Tensor]) -> object:
    """y = 2 x for 4 x 25 values of x."""

    def draw(size: object, device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.randn(4, 25, device=device).to(dtype).requires_grad_(),)

    return cases.Case(
        op="double",
        variant="toy",
        size=cases.Size(4, 25, 1, 1),
        phases=("forward", "both"),
        draw=draw,
        reference=lambda x: 2 * x,
        forms=forms,
    )


def test_copies_go_beyond_the_cache(measuring: ModuleType) -> None:
    for call_bytes in (1, 999, 50_000, 3_000_000, 60_000_000):
        number = measuring.copies(call_bytes, 50_000_000)
        # Between two uses of one copy, all the others have gone by.
        assert (number - 1) * call_bytes >= 100_000_000 or number == measuring.MOST_COPIES
        assert number >= 2
    assert measuring.copies(10**9, 50_000_000) == 2


def test_calls_of_a_span_take_each_copy_equally_often(measuring: ModuleType) -> None:
    for count in (2, 9, 128):
        for call_ms in (1e-9, 0.003, 0.7, 400.0):
            number = measuring.calls(count, call_ms)
            assert number % count == 0
            assert count <= number <= max(count, measuring.MOST_CALLS)
    assert measuring.calls(4, 0.1) == 100


def test_floor_bytes(measuring: ModuleType) -> None:
    # q, k, v and o of one size: 4 forward; backward reads q, k, v and do, and writes three gradients.
    assert measuring.floor_bytes("forward", 3, 3, 1, 0) == 4
    assert measuring.floor_bytes("both", 3, 3, 1, 0) == 4 + 7
    assert measuring.floor_bytes("step", 3 + 100, 0, 1, 100) == 4 + 200


def test_spans_are_interleaved_and_slow_ones_are_few(measuring: ModuleType) -> None:
    order: list[str] = []

    def span(name: str, ms: float) -> Callable[[], float]:
        return lambda: (order.append(name), ms)[1]

    found = measuring.interleaved({"a": span("a", 1.0), "b": span("b", 2.0), "slow": span("slow", 900.0)}, 5)
    assert order == ["a", "b", "slow"] * 3 + ["a", "b"] * 2
    assert found == {"a": [1.0] * 5, "b": [2.0] * 5, "slow": [900.0] * 3}


def test_spread(measuring: ModuleType) -> None:
    found = measuring.spread([3.0, 1.0, 2.0, 4.0, 100.0])
    assert found.median_ms == 3.0
    assert found.quartiles_ms[0] <= 2.0 <= 4.0 <= found.quartiles_ms[1]
    assert measuring.spread([7.0]).quartiles_ms == (7.0, 7.0)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (lambda x: 2 * x, None),
        (lambda x: (2 * x, x), None),
        (lambda x: 2.2 * x, "output is off"),
        (lambda x: 2 * x + 0 * x / 0, "output is off by nan"),
        (lambda x: x + x.detach(), "gradient of input 0 is off"),
    ],
)
def test_what_is_wrong(
    measuring: ModuleType, cases: ModuleType, operation: Callable[..., Tensor], said: str | None
) -> None:
    found = measuring.wrong(toy(cases, mine=operation), operation, torch.bfloat16, torch.device("cpu"))
    assert found is None if said is None else found is not None and said in found


def test_a_step_is_held_to_its_state(measuring: ModuleType, cases: ModuleType) -> None:
    case = next(case for case in cases.steps(cases.Size(2, 1, 2, 8)) if case.variant == "scalar, delta")
    device = torch.device("cpu")
    assert measuring.wrong(case, case.forms["torch"], torch.float32, device) is None

    def forgets(*given: Tensor) -> tuple[Tensor, Tensor]:
        o, _ = case.forms["torch"](*given[:-1], given[-1].clone())
        return o, given[-1]

    said = measuring.wrong(case, forgets, torch.float32, device)
    assert said is not None
    assert said.startswith("state is off")


def test_every_torch_form_is_right(
    measuring: ModuleType, cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases draw what their forms take, and the references are those of the forms."""
    monkeypatch.setattr(measuring, "CHECKED_LENGTH", 70)
    monkeypatch.setattr(measuring, "MATRIX_LENGTH", 70)
    made = [*cases.sequences(cases.Size(1, 128, 1, 8)), *cases.steps(cases.Size(1, 1, 1, 8))]
    assert {case.variant for case in made if case.op == "linear"} == {
        f"{decay}, {rule}" for decay in cases.DECAYS for rule in cases.RULES
    }
    for case in made:
        if "torch" in case.forms:
            said = measuring.wrong(case, case.forms["torch"], torch.float32, torch.device("cpu"))
            assert said is None, case.label


def in_this_process(kernels: ModuleType, case: object) -> Callable[..., list[str | None]]:
    """Checks of forms that were made up, which no other process knows."""
    return lambda asked: [kernels.look(case, name, torch.device("cpu")) for _, name in asked]


def checked(kernels: ModuleType, case: object) -> tuple[dict[tuple[str, str], str], list[object]]:
    found: tuple[dict[tuple[str, str], str], list[object]] = kernels.check(
        [case], in_this_process(kernels, case)
    )
    return found


def test_a_form_that_is_not_ours_is_left_out_where_it_is_wrong(
    kernels: ModuleType, cases: ModuleType
) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    forms = {"triton": lambda x: 2 * x, "fla off": lambda x: 3 * x, "fla broken": broken}
    bad, dropped = checked(kernels, toy(cases, **forms))
    label = "double (toy) B4 T25 H1 D1"
    assert set(bad) == {(label, "fla off"), (label, "fla broken")}
    assert bad[label, "fla broken"] == "RuntimeError: no such kernel"
    assert kernels.red(dropped) == []
    bad, dropped = checked(kernels, toy(cases, triton=lambda x: 3 * x))
    assert [each.form for each in kernels.red(dropped)] == ["triton"]


def test_in_a_process_of_its_own_a_form_also_runs_at_its_size(
    kernels: ModuleType, cases: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def mine(x: Tensor) -> Tensor:
        seen.append(x.numel())
        return 2 * x

    case = toy(cases, triton=mine, torch=lambda x: 3 * x)
    monkeypatch.setattr(kernels, "choose", lambda *chosen: [case])
    ask = partial(kernels.look_and_run, torch.device("cpu"), True, "", "")
    assert ask((0, "triton")) is None
    # Once checked; then forward, and forward and backward, each also for the shape of the output's gradient.
    assert seen == [100] * 5
    assert str(ask((0, "torch"))).startswith("output is off")


def test_a_rival_that_refuses_its_backward_pass_is_timed_forward(
    kernels: ModuleType, cases: ModuleType
) -> None:
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            raise RuntimeError("not under this Triton")

    gpu = Made()
    case = toy(cases, **{"fla off": Refuses.apply})
    bad, dropped = checked(kernels, case)
    assert (bad, dropped) == ({}, [])
    rows, dropped = kernels.time_size([case], gpu, bad, 3, 2.0)
    assert [row.phase for row in rows] == ["forward"]
    assert [each.reason for each in dropped] == ["RuntimeError: not under this Triton"]
    assert checked(kernels, toy(cases, triton=Refuses.apply))[1] != []


def test_a_tuner_that_only_compiles_runs_each_choice_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = importlib.import_module("on_gpu.rivals")
    testing = importlib.import_module("triton.testing")
    monkeypatch.setattr(testing, "do_bench", testing.do_bench)
    monkeypatch.setenv("FLA_CACHE_RESULTS", "1")
    rivals.compile_only()
    runs: list[int] = []
    assert len(testing.do_bench(lambda: runs.append(1), quantiles=(0.5, 0.2, 0.8))) == 3
    assert runs == [1]
    assert os.environ["FLA_CACHE_RESULTS"] == "0"


def test_figures_of_one_size(kernels: ModuleType, cases: ModuleType) -> None:
    gpu = Made()
    case = toy(cases, triton=lambda x: 2 * x, other=lambda x: x + x)
    rows, dropped = kernels.time_size([case], gpu, {(case.label, "other"): "wrong"}, 4, gpu.copy_gb_s())
    assert dropped == []
    assert [(row.phase, row.form) for row in rows] == [("forward", "triton"), ("both", "triton")]
    forward, both = rows
    # 100 values of bfloat16 are read and as many written.
    assert forward.floor_bytes == 400
    assert both.floor_bytes == 1000
    assert forward.floor_ms == pytest.approx(400 / 2e6)
    assert len(forward.eager.repeats_ms) == 4
    # A span of 6 ms is one of 11 copies of 200 bytes, taken 18 times, of a cache of 1,000 bytes.
    assert forward.eager.median_ms == pytest.approx(6 / (11 * 2))


def test_what_cannot_be_captured_is_timed_without(kernels: ModuleType, cases: ModuleType) -> None:
    gpu = Made()
    gpu.captures = False
    rows, _ = kernels.time_size([toy(cases, triton=lambda x: 2 * x)], gpu, {}, 3, 2.0)
    assert rows[0].captured is None
    assert rows[0].not_captured == "RuntimeError: a stream is waited for"
    assert rows[0].best is rows[0].eager


def row(kernels: ModuleType, measuring: ModuleType, form: str, ms: float, **changed: object) -> object:
    given = {"op": "linear", "variant": "scalar, delta", "size": "B8 T4096 H16 D128", "phase": "forward"}
    timed = measuring.spread([ms] * 4)
    rest = {"floor_bytes": 10, "floor_ms": 0.5, "eager": timed, "captured": timed, "not_captured": None}
    return kernels.Row(form=form, **{**given, **rest, **changed})


def test_table_and_verdicts(kernels: ModuleType, measuring: ModuleType) -> None:
    rows = [
        row(kernels, measuring, "triton", 1.0),
        row(kernels, measuring, "fla chunk_gated_delta_rule", 1.1),
        row(kernels, measuring, "triton", 1.2, variant="head, delta"),
        row(kernels, measuring, "triton", 0.6, phase="step", size="B64 H16 D128"),
        row(kernels, measuring, "fla fused", 0.5, phase="step", size="B64 H16 D128"),
    ]
    lines = kernels.table(rows).splitlines()
    assert len(lines) == 6
    assert "50.0%" in lines[1]
    assert lines[2].endswith("1.10")
    found = kernels.verdicts(rows)
    assert [line[:4] for line in found] == ["MISS", "MISS", "MISS", "ok  "]
    assert "fla chunk_gated_delta_rule / ours 1.10, at least 1.2" in found[0]
    assert "ours / scalar, delta 1.20, at most 1.1" in found[1]
    assert "fla fused / ours 0.83, at least 1.0" in found[2]
    assert "of the copy bandwidth 0.83, at least 0.7" in found[3]


def test_without_a_gpu_nothing_is_timed(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main() == 2
    assert "nothing is timed" in capsys.readouterr().err


def run(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, case: object, words: list[str]) -> int:
    environment = importlib.import_module("mixforge.evaluator.environment").environment
    monkeypatch.setattr(sys, "argv", ["kernels.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kernels, "Gpu", Made)
    monkeypatch.setattr(kernels, "cases", lambda quick: iter([case]))
    monkeypatch.setattr(kernels, "environment", lambda device: environment("cpu"))
    monkeypatch.setattr(kernels, "in_processes", lambda *_: in_this_process(kernels, case))
    status: int = kernels.main()
    return status


def test_red_tests_are_not_timed(
    kernels: ModuleType,
    cases: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    case = toy(cases, triton=lambda x: 3 * x)
    assert run(kernels, monkeypatch, case, ["--json", str(tmp_path / "figures.json")]) == 1
    said = capsys.readouterr()
    assert "WRONG double (toy) B4 T25 H1 D1, triton: output is off" in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_is_written_down(
    kernels: ModuleType,
    cases: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    case = toy(cases, triton=lambda x: 2 * x, other=lambda x: 5 * x)
    file = tmp_path / "figures.json"
    assert run(kernels, monkeypatch, case, ["--json", str(file), "--repeats", "3"]) == 0
    record = json.loads(file.read_text())
    assert record["copy_gb_s"] == 2.0
    assert [row["phase"] for row in record["rows"]] == ["forward", "both"]
    assert [each["form"] for each in record["dropped"]] == ["other"]
    assert {"environment", "fla_core", "command", "l2_bytes"} <= record.keys()
    assert "not timed: double (toy) B4 T25 H1 D1, other: output is off" in capsys.readouterr().out
    assert run(kernels, monkeypatch, case, ["--only", "nothing of that name"]) == 1
    assert run(kernels, monkeypatch, case, ["--json", str(file), "--without", "other"]) == 0
    assert json.loads(file.read_text())["dropped"] == []
