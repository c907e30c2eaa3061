"""Run a `loopfm` command as a job on a running Ray cluster, shipping code and configs but never data.

    python infra/submit.py --address http://127.0.0.1:8265 -- demo configs/pipeline/synthetic.yaml --set seed=1

Everything after `--` is given to `python -m loopfm_ray.cli` on the cluster. The job's logs are shown as they come and
its exit code is this program's. A job's working directory is thrown away with it: name an output path that outlives
the job (a mounted path or `s3://`).

Passed on in the job's environment, where Ray's dashboard shows them to who may open it: `RAY_AUTH_MODE`, `PYTHONPATH`
and `AWS_*`.
"""

import argparse
import asyncio
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loopfm_ray import log
from loopfm_ray.errors import ConfigError, JobError

__all__ = ["DEFAULT_ADDRESS", "JobResult", "collect_files", "job_environment", "main", "submit"]

logger = logging.getLogger("loopfm_ray.submit")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ROOT = Path(__file__).resolve().parent.parent
PARTS = ("loopfm_ray", "configs", "serve", "sweeps", "pyproject.toml", "README.md")
"""What a job needs of the project; nothing else is shipped."""
MAX_SHIPPED_BYTES = 20 * 2**20
DEFAULT_AUTH_MODE = "disabled"
"""Left unset, Ray's client and head may decide differently, by whether a token file happens to exist."""

_SKIPPED_DIRS = {"__pycache__", "data", "runs", "build", "dist", "node_modules"}
_CODE_DIRS = {"loopfm_ray/data"}
"""Folders of the package whose name would otherwise mark them as data."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended; `exit_code` is the entry point's, 1 when Ray gives none."""

    job_id: str
    status: str
    exit_code: int
    message: str


def collect_files(root: Path, max_bytes: int = MAX_SHIPPED_BYTES) -> list[Path]:
    """Return the files of `PARTS` under `root`, relative and sorted.

    Hidden files, links, caches and folders of data or runs are left out.

    Raises:
        ConfigError: there is no package, or the files together are over `max_bytes`.
    """
    found: list[Path] = []
    for part in PARTS:
        top = root / part
        if top.is_file():
            found.append(Path(part))
        elif top.is_dir():
            found.extend(_walk(top, root))
    if not any(path.parts[0] == "loopfm_ray" for path in found):
        raise ConfigError(
            f"no package loopfm_ray under {root}; submit from a checkout of the project"
        )
    sizes = {path: (root / path).stat().st_size for path in found}
    total = sum(sizes.values())
    if total > max_bytes:
        biggest = sorted(sizes, key=lambda path: (-sizes[path], path))[:5]
        names = ", ".join(f"{path} ({sizes[path]} bytes)" for path in biggest)
        raise ConfigError(
            f"a job ships at most {max_bytes} bytes of code, found {total}; the biggest files are {names};"
            " move data out of the package and configs"
        )
    return sorted(found)


def job_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what of the caller's environment the job gets; `RAY_AUTH_MODE` is always set."""
    passed = {
        key: value
        for key, value in environ.items()
        if key.startswith("AWS_") or key == "PYTHONPATH"
    }
    return {
        "RAY_AUTH_MODE": environ.get("RAY_AUTH_MODE", DEFAULT_AUTH_MODE),
        # the command names the same settings for its workers when it connects; Ray refuses that unless told to merge
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
        **passed,
    }


def submit(
    arguments: Sequence[str],
    address: str = DEFAULT_ADDRESS,
    *,
    entrypoint: Sequence[str] = ("python", "-m", "loopfm_ray.cli"),
    root: Path = ROOT,
    on_log: Callable[[str], None] | None = None,
) -> JobResult:
    """Submit `entrypoint` with `arguments`, follow its logs to the end and return how it ended.

    An interrupt stops the job before it is raised again.

    Args:
        arguments: words after the entry point.
        address: the head's dashboard, `http://host:port`.
        entrypoint: words of the program, run in the shipped copy.
        root: checkout whose `PARTS` are shipped.
        on_log: takes each piece of the job's output; standard error by default.

    Raises:
        ConfigError: what would be shipped is not acceptable.
        JobError: no head answers at `address`, or it refuses.
    """
    os.environ.setdefault("RAY_AUTH_MODE", DEFAULT_AUTH_MODE)
    from ray.exceptions import AuthenticationError  # after the setting: read when imported
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory(prefix="loopfm-submit-") as folder:
        _copy(collect_files(root), root, Path(folder))
        runtime_env = {"working_dir": folder, "env_vars": job_environment(os.environ)}
        try:
            client = JobSubmissionClient(address)
            job_id = client.submit_job(
                entrypoint=shlex.join([*entrypoint, *arguments]), runtime_env=runtime_env
            )
        except AuthenticationError as error:
            raise JobError(
                f"no job could be submitted to {address}, which asks for another token: {error.message}; set RAY_AUTH_MODE=token"
                " and the token of the head in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise JobError(
                f"no job could be submitted to {address}: {error}; start a head with `ray start --head`"
                " and the same RAY_AUTH_MODE, or give --address"
            ) from error
        logger.info("submitted %s to %s", job_id, address)
        try:
            asyncio.run(_follow(client, job_id, on_log or _to_stderr))
            return asyncio.run(_ended(client, job_id))
        except KeyboardInterrupt:
            client.stop_job(job_id)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run the job and return its exit code; 2 for a mistake in the call."""
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__.splitlines()[0])
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="the head's dashboard address")
    parser.add_argument("command", nargs="+", help="a loopfm command, after `--`")
    options = parser.parse_args(argv)
    log.setup()
    try:
        result = submit(options.command, options.address)
    except ConfigError as error:
        logger.error("%s", error)
        return 2
    except JobError as error:
        logger.error("%s", error)
        return 1
    logger.info("%s %s: %s", result.job_id, result.status, result.message)
    return result.exit_code


def _walk(top: Path, root: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(top.iterdir()):
        relative = path.relative_to(root)
        is_left_out = path.name.startswith(".") or path.is_symlink()
        if path.name in _SKIPPED_DIRS and relative.as_posix() not in _CODE_DIRS:
            is_left_out = True
        if is_left_out:
            continue
        if path.is_dir():
            found.extend(_walk(path, root))
        elif path.is_file():
            found.append(relative)
    return found


def _copy(files: Sequence[Path], root: Path, target: Path) -> None:
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, target / path)


# Any below: Ray ships its client without types that mypy could follow here.
async def _follow(client: "object", job_id: str, on_log: Callable[[str], None]) -> None:
    async for piece in client.tail_job_logs(job_id):  # type: ignore[attr-defined] # untyped client
        on_log(piece)


async def _ended(client: "object", job_id: str) -> JobResult:
    """Wait for the status that follows the end of the logs."""
    while True:
        info = client.get_job_info(job_id)  # type: ignore[attr-defined] # untyped client
        if info.status.is_terminal():
            break
        await asyncio.sleep(0.2)
    status = str(info.status.value)
    exit_code = info.driver_exit_code
    if exit_code is None or (exit_code == 0 and status != "SUCCEEDED"):
        exit_code = 0 if status == "SUCCEEDED" else 1
    return JobResult(job_id, status, int(exit_code), str(info.message))


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
