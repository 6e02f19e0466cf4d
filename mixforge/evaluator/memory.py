"""Memory: whether a training can fit at all, and the highest that a piece of work takes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# float32 weights, their gradients and AdamW's two moments.
_TRAINING_BYTES = 16


def check_room(params: int, device: str) -> None:
    """Raises MemoryError where weights, gradients and optimizer state alone exceed the memory that is free.

    On a CPU the system would grant the memory and then kill the process; elsewhere the allocator says no by
    itself.
    """
    free = _free_bytes() if torch.device(device).type == "cpu" else None
    if free is not None and params * _TRAINING_BYTES > free:
        raise MemoryError(
            f"predicted: training {params:,} weights takes {params * _TRAINING_BYTES:,} bytes before any "
            f"activation, and {free:,} are free"
        )


def _free_bytes() -> int | None:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """The most memory that tensors made during `work` held at one time. `work` runs once.

    On CUDA it is what torch's allocator says, workspaces of operations included. On a CPU every tensor that
    an operation returns is entered in a ledger until it is released; what an operation takes and gives back
    inside is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        most: int = torch.cuda.max_memory_allocated(device)
        return most - before
    ledger = _Ledger()
    with ledger:
        work()
    return ledger.peak


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations make, and the most there were at one time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        self.peak = 0
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, given))}
        result = operation(*args, **given)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._known:
                self._enter(storage)
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._known[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._release(key))
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)

    def _release(self, key: int) -> None:
        self.held -= self._known.pop(key)[0]


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]
