"""Where a figure was measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import mixforge
from mixforge.evaluator.environment import environment


def test_environment_of_this_machine_is_whole_and_stays() -> None:
    here = environment()
    assert here == environment("cpu")
    assert here.device_kind == "cpu"
    assert here.device
    assert here.device_count >= 1
    assert here.threads == torch.get_num_threads()
    assert here.torch == torch.__version__
    assert here.mixforge == mixforge.__version__
    assert len(here.host) == 16
    json.dumps(dataclasses.asdict(here))


def test_triton_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9.9"))
    assert environment().triton == "9.9.9"
    monkeypatch.delitem(sys.modules, "triton")
    assert environment().triton != "9.9.9"


@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_absent_device_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="there is cpu"):
        environment(device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_environment_of_a_cuda_device() -> None:
    here = environment("cuda")
    assert here.device_kind == "cuda"
    assert here.device == torch.cuda.get_device_name()
