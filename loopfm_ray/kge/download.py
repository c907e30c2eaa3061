"""Get a published graph: into a hidden directory, verified there, and then at once under its own name."""

import gzip
import http.client
import logging
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopfm_ray.errors import DataError, StoreError, UnreachableError
from loopfm_ray.kge.digest import split_digest
from loopfm_ray.kge.published import PublishedGraph, Source
from loopfm_ray.kge.triples import SPLITS, Split, read_triples
from loopfm_ray.store.manifest import disk_errors, stage, sync

__all__ = ["FetchLimits", "check_graph", "download_graph"]

_LOGGER = logging.getLogger(__name__)
_BLOCK_BYTES = 1 << 16
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers of a server that may be others a little later."""


@dataclass(frozen=True)
class FetchLimits:
    """How long and how much is tried."""

    num_tries: int = 4
    """For each file."""
    pause_s: float = 1.0
    """Before the second try; twice as long before each further one."""
    timeout_s: float = 30.0
    """Without a byte, before a try has failed."""
    max_bytes: int = 1 << 30
    """Of each file, and of each member of an archive once unpacked."""


def download_graph(
    graph: PublishedGraph, root: Path, limits: FetchLimits | None = None
) -> dict[str, Any]:  # Any: JSON
    """Get the files of a graph into `root / graph.folder`, or verify those that are there.

    Args:
        graph: which.
        root: the directory that the graph's own one is made in.
        limits: of the network; None takes the defaults.

    Returns:
        `graph`, `path`, the number of triples by split, `verified` (`content` or `counts`) and `downloaded`.

    Raises:
        UnreachableError: a server does not answer.
        StoreError: a server does not have a file, a file is too large, or the disk is full.
        DataError: what came, or what is there, is not the published graph.
    """
    final = Path(root) / graph.folder
    advice = _by_hand(graph, final)
    is_there = final.exists()
    if is_there:
        counts = _verified(graph, final, f"Remove or move {final} and run again. {advice}")
    else:
        limits = FetchLimits() if limits is None else limits
        with stage(final) as staged:
            for source in graph.sources:
                _take(source, staged, limits, advice)
            counts = _verified(graph, staged, f"Nothing was kept of what was sent. {advice}")
            for path in staged.iterdir():
                sync(path)
            sync(staged)
            staged.rename(final)
            sync(final.parent)
    return {
        "graph": graph.name,
        "path": str(final),
        **{str(name): num for name, num in counts.items()},
        "verified": "counts" if graph.digests is None else "content",
        "downloaded": not is_there,
    }


def check_graph(graph: PublishedGraph, root: Path) -> dict[Split, int]:
    """Return the number of triples of each split of the files in `root`.

    Raises:
        DataError: they are not the published graph, by their numbers or by their content.
    """
    try:
        found = read_triples(root)
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{root} does not hold {graph.name} as published: {error}") from error
    counts = {name: len(found.split(name)) for name in SPLITS}
    if counts != dict(graph.num_triples):
        raise DataError(
            f"{root} does not hold {graph.name} as published: found {counts} triples, expected {dict(graph.num_triples)}"
        )
    for name, expected in (graph.digests or {}).items():
        digest = split_digest(found, name)
        if digest != expected:
            raise DataError(
                f"{root} does not hold {graph.name} as published: the digest of {name} is {digest[:16]}, expected"
                f" {expected[:16]}"
            )
    return counts


def _verified(graph: PublishedGraph, root: Path, advice: str) -> dict[Split, int]:
    try:
        return check_graph(graph, root)
    except DataError as error:
        raise DataError(f"{error}. {advice}") from error


def _by_hand(graph: PublishedGraph, final: Path) -> str:
    """Return what to do where the network does not help."""
    lines = [f"  {source.url} -> {', '.join(source.files)}" for source in graph.sources]
    return (
        f"Check the network and the variable https_proxy; or get the files on another machine, put {', '.join(graph.files)}"
        f" into {final} and run the same command, which verifies them:\n" + "\n".join(lines)
    )


def _take(source: Source, folder: Path, limits: FetchLimits, advice: str) -> None:
    if not source.is_archive:
        _fetch(source.url, folder / source.files[0], limits, advice)
        return
    archive = folder / "archive.tar.gz"
    _fetch(source.url, archive, limits, advice)
    try:
        _unpack(archive, source, folder, limits)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{source.url} sent what is no readable .tar.gz ({error}); run again. {advice}"
        ) from error
    archive.unlink()


def _unpack(archive: Path, source: Source, folder: Path, limits: FetchLimits) -> None:
    """Copy the wanted members out by their last name: no path, link or mode of the archive reaches the disk."""
    with tarfile.open(archive, "r:gz") as packed:
        members = packed.getmembers()
        for name in source.files:
            matches = [one for one in members if one.name.rpartition("/")[2] == name]
            if len(matches) != 1 or not matches[0].isreg():
                raise DataError(
                    f"{source.url}: expected one plain file {name} in the archive, found"
                    f" {[one.name for one in matches] or [one.name for one in members[:8]]}; the publisher changed it"
                )
            if matches[0].size > limits.max_bytes:
                raise _too_large(f"{name} of {source.url}", limits)
            content = packed.extractfile(matches[0])
            assert content is not None  # of a regular file
            with content, (folder / name).open("wb") as out, disk_errors(folder):
                shutil.copyfileobj(content, out)


def _fetch(url: str, path: Path, limits: FetchLimits, advice: str) -> None:
    """Get one file, trying again after what may pass."""
    for number in range(1, limits.num_tries + 1):
        try:
            _fetch_once(url, path, limits)
        except urllib.error.HTTPError as error:
            if error.code not in _PASSING:
                raise StoreError(
                    f"{url} can not be had: the server answers {error.code} {error.reason}. {advice}"
                ) from error
            failure: Exception = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        else:
            return
        _LOGGER.info(f"try {number} of {limits.num_tries} to get {url} failed: {failure}")
        if number < limits.num_tries:
            time.sleep(limits.pause_s * 2 ** (number - 1))
    raise UnreachableError(
        f"{url} can not be had after {limits.num_tries} tries: {failure}. {advice}"
    ) from failure


def _fetch_once(url: str, path: Path, limits: FetchLimits) -> None:
    with urllib.request.urlopen(url, timeout=limits.timeout_s) as answer:
        expected = answer.headers.get("Content-Length")
        num_bytes = 0
        with path.open("wb") as out:
            while block := answer.read(_BLOCK_BYTES):
                num_bytes += len(block)
                if num_bytes > limits.max_bytes:
                    raise _too_large(url, limits)
                with disk_errors(path):
                    out.write(block)
    if expected is not None and num_bytes != int(expected):
        raise ConnectionError(f"the answer broke off after {num_bytes} of {expected} bytes")


def _too_large(what: str, limits: FetchLimits) -> StoreError:
    return StoreError(
        f"{what} is larger than {limits.max_bytes} bytes, which no published graph is; is a proxy answering in its place?"
    )
