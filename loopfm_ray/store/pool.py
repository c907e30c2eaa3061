"""Versions by what they were made from, so that runs on one file system need not make the same one twice."""

import os
import secrets
import shutil
from pathlib import Path

from loopfm_ray.errors import StoreError
from loopfm_ray.store.manifest import MANIFEST, Manifest, install, read_manifest, recover

__all__ = ["Pool"]


class Pool:
    """A folder of versions, each under a key of its settings and inputs.

    Files are linked, not copied: a version is immutable, so its names may share them. A killed `put` or `take` leaves a
    hidden folder that the next one of that name removes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def take(self, key: str, target: Path) -> Manifest | None:
        """Make the version of `key` the one at `target`, in place of another; None if the pool has none.

        Raises:
            StoreError: pool and target do not lie on one file system, or `target` is no version.
        """
        source = self._root / key
        if not (source / MANIFEST).is_file():
            return None
        return _link(source, target)

    def put(self, key: str, source: Path) -> None:
        """Keep the version at `source` under `key`.

        Raises:
            StoreError: pool and source do not lie on one file system.
        """
        _link(source, self._root / key)


def _link(source: Path, target: Path) -> Manifest:
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    if (target / MANIFEST).is_file() and read_manifest(target) == read_manifest(source):
        return read_manifest(target)
    staged = target.parent / f".{target.name}.tmp-{secrets.token_hex(8)}"
    try:
        shutil.copytree(source, staged, copy_function=os.link)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise StoreError(
            f"{source} can not be linked to {target}: {error}; keep all runs of an experiment on one file system"
        ) from error
    return install(staged, target, replace_other=True)
