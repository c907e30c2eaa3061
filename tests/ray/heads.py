"""Ray heads as `ray start` makes them, on loopback, beside whatever else runs on the machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.conftest import free_ports

_PORTS = (
    "port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port", "metrics-export-port", "node-manager-port", "object-manager-port",
)  # fmt: skip


@contextlib.contextmanager
def running_head(**environ: str) -> Iterator[dict[str, int]]:
    """Run a head with this environment inside the block; gives its ports by the names of their options."""
    folders = [tempfile.mkdtemp(prefix="lfhead-", dir="/tmp") for _ in range(4)]  # sockets: short
    try:
        for folder in folders:
            ports = start_head(folder, environ)
            if ports is not None:
                break
            end_processes(folder)
        assert ports is not None, "no head came up in four attempts"
        yield ports
    finally:
        for folder in folders:
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


def pids_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def end_processes(text: str) -> None:
    """End what has `text`, the cluster's own temporary folder, in its command line; never other clusters."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids_with(text):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 3
        while pids_with(text) and time.monotonic() < deadline:
            time.sleep(0.1)


def start_head(folder: str, environ: Mapping[str, str]) -> dict[str, int] | None:
    """Start a head in its own folder and return its ports; None if it was too slow for Ray's fixed 30 s."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    binaries = Path(sys.executable).parent
    command = [
        str(binaries / "ray"), "start", "--head", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", "--num-cpus=8", "--object-store-memory=300000000",
        "--disable-usage-stats", f"--temp-dir={folder}",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    path = os.pathsep.join([str(binaries), os.environ.get("PATH", "")])
    environ = {**os.environ, **environ, "PATH": path}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    if done.returncode:
        assert "timed out during startup" in done.stdout + done.stderr
        return None
    return ports
