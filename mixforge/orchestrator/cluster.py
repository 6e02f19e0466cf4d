"""Ray on this machine alone: started for one search, quiet, on the loopback address, and gone afterwards."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
import ray._private.ray_constants
import ray._private.utils
import ray._private.worker
import ray._raylet

# Sockets lie under this folder, and their paths may have 107 bytes, of which Ray's own part is some 70.
_LONGEST_FOLDER = 24
# The smallest object store that Ray takes is 75 MB; architectures and figures are small.
_OBJECT_STORE_BYTES = 80 << 20
_PREFIX = "mixf"
# A file with the driver's process number.
_OWNER = "driver"


@contextmanager
def local_cluster(cores: int, gpus: int = 0) -> Iterator[Path]:
    """A Ray of so many cores; gives a folder for the search's short-lived files, which goes with it.

    Its ports are open to this machine's processes alone, and only with a token that is drawn here and handed
    down in the environment, so no file in the home directory is read or written. Raises RuntimeError where
    Ray is already started in this process.
    """
    if ray.is_initialized():
        raise RuntimeError("Ray is already started in this process; a search starts and ends its own")
    _sweep(_short_folder())
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_short_folder()))
    (folder / _OWNER).write_text(str(os.getpid()))
    try:
        with _environment(_settings()), _tamed():
            try:
                ray.init(
                    num_cpus=cores,
                    num_gpus=gpus,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                    _temp_dir=str(folder),
                )
                yield folder
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _settings() -> dict[str, str]:
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Otherwise Ray would rebuild the environment of a driver that `uv run` started, for every worker.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        # Workers train with one thread each, on as many cores as there are workers.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


@contextmanager
def _tamed() -> Iterator[None]:
    """What Ray has no public setting for."""
    # Its settings are read when it is imported, and a token once; both are read again here.
    ray._raylet.Config.initialize("")  # type: ignore[attr-defined]
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]
    changes: tuple[tuple[object, str, object], ...] = (
        # Paragraphs on dead workers go to standard output, whatever Ray is told of logging. The search
        # reports such ends itself, and standard output belongs to the caller.
        (ray._private.worker, "print_to_stdstream", _drop),
        # A Ray that other machines cannot join listens on the loopback address only; otherwise it listens on
        # every address, also when it is given 127.0.0.1.
        (ray._private.ray_constants, "ENABLE_RAY_CLUSTER", False),
        # What SIGTERM means is the caller's to say.
        (ray._private.utils, "set_sigterm_handler", _drop),
    )
    before = [getattr(place, name) for place, name, _ in changes]
    for place, name, value in changes:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(changes, before, strict=True):
            setattr(place, name, value)


def _drop(*given: object, **named: object) -> None:
    del given, named


def _sweep(folder: Path) -> None:
    """Remove the folders of drivers that were killed."""
    for left in folder.glob(f"{_PREFIX}*/{_OWNER}"):
        try:
            if left.stat().st_uid == os.getuid() and not Path("/proc", left.read_text()).exists():
                shutil.rmtree(left.parent, ignore_errors=True)
        except OSError:
            # Another driver removes it, too.
            continue


def _short_folder() -> Path:
    """The system's folder for temporary files, or /tmp where that one's path is too long for sockets."""
    folder = tempfile.gettempdir()
    return Path(folder if len(os.fsencode(folder)) <= _LONGEST_FOLDER else "/tmp")


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
