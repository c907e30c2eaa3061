"""What a benchmark ran on."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_machine(libraries: Sequence[str]) -> dict[str, Any]:  # Any: JSON
    """Return processor, cores, load and the versions of Python and of `libraries`."""
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
    }


def print_found(found: dict[str, Any], as_json: bool) -> None:  # Any: JSON
    """Print all keys as JSON, or a line for each number."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if isinstance(value, int | float):
            print(f"{name:42} {value}")
