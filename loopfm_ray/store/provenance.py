"""Which code wrote a version."""

import subprocess
from functools import cache
from pathlib import Path

import loopfm_ray

__all__ = ["code_version"]


@cache
def code_version() -> str:
    """Return the package version, and the commit when the package runs from its own git checkout."""
    return describe(Path(loopfm_ray.__file__).parent.parent)


def describe(root: Path) -> str:
    """Return the package version, with the commit of the checkout at `root` if there is one."""
    version = loopfm_ray.__version__
    if not (root / ".git").exists():
        return version
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        # an unborn branch, a damaged checkout or no git at all: the package version stands alone
        return version
    return f"{version}+g{answer.stdout.strip()[:12]}"
