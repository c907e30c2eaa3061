"""Where files of a latents version wait until all are there, each with a marker once it is whole.

`data/` has the files as the version will have them. `markers/` has a JSON file for each, written after it, with its size
and the stats of its shards: a file without one, or of another size, counts for nothing.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location, is_remote, read_bytes
from loopfm_ray.store.manifest import MANIFEST, disk_errors
from loopfm_ray.store.shards import Place, ShardFile, ShardStats, parse_stats
from loopfm_ray.store.tables import write_atomically

__all__ = ["WorkFolder", "bring"]


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one version under way; any process may add files."""

    root: Path

    @property
    def data(self) -> Path:
        """Where the files wait."""
        return self.root / "data"

    def file(self, path: str) -> Path:
        """Return where the file with this path inside the version waits."""
        return self.data / path

    def mark(self, stats: Sequence[ShardStats]) -> None:
        """Say that the file of these shards, all that it has, is whole.

        Raises:
            StoreError: the disk is full.
        """
        tree = {
            "num_bytes": self.file(stats[0].path).stat().st_size,
            "shards": [asdict(item) for item in stats],
        }
        text = json.dumps(tree, sort_keys=True)
        write_atomically(
            self._marker(ShardFile.parse(stats[0].path)),
            lambda staged: staged.write_text(text, encoding="utf-8"),
        )

    def find(self, period: int, bucket: int) -> ShardStats | None:
        """Return the stats of a shard whose file is whole, else None."""
        own = self._marker(ShardFile(period, period, bucket))
        markers = [own] if own.is_file() else self._compacted(period, bucket)
        for marker in markers:
            for item in self._read(marker):
                if item.period == period:
                    return item
        return None

    def forget(self, places: Sequence[Place]) -> None:
        """Count no file as whole that holds other shards than these, such as those of a longer time range."""
        wanted = set(places)
        for marker in self.root.glob("markers/*/[0-9]*"):
            if not {item.place for item in self._read(marker)} <= wanted:
                marker.unlink()

    def drop_strays(self, stats: Sequence[ShardStats]) -> None:
        """Remove all files but those of these shards, which shall be all that the files hold.

        Raises:
            StoreError: a file holds other rows too.
        """
        rows: dict[str, int] = {}
        for item in stats:
            rows[item.path] = rows.get(item.path, 0) + item.num_rows
        for path in self.data.rglob("*.parquet"):
            name = path.relative_to(self.data).as_posix()
            if name not in rows:
                path.unlink()
            elif (found := pq.read_metadata(path).num_rows) != rows[name]:
                raise StoreError(
                    f"{path} has {found} rows, its shards have {rows[name]}; remove {self.root} and run materialize again"
                )
        (self.data / MANIFEST).unlink(missing_ok=True)

    def _marker(self, file: ShardFile) -> Path:
        return self.root / "markers" / f"{file.bucket:03d}" / f"{file.first:04d}-{file.last:04d}"

    def _compacted(self, period: int, bucket: int) -> list[Path]:
        """Return the markers of files with several periods that may hold this one."""
        folder = self._marker(ShardFile(period, period, bucket)).parent
        found = []
        for path in sorted(folder.glob("[0-9]*-*")):
            first, last = (int(part) for part in path.name.split("-"))
            if first <= period <= last and first != last:
                found.append(path)
        return found

    def _read(self, marker: Path) -> list[ShardStats]:
        """Return the stats of the shards of one file, none unless it is whole."""
        tree: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        stats = [parse_stats(item) for item in tree["shards"]]
        try:
            num_bytes = self.file(stats[0].path).stat().st_size
        except FileNotFoundError:
            return []
        return stats if num_bytes == tree["num_bytes"] else []


def bring(source: Location, path: Path) -> None:
    """Make the file at `source` appear at `path`: linked where it is on this disk, else copied.

    Raises:
        StoreError: the disk is full.
        OSError: the source can not be read.
    """
    if is_remote(source):
        data = read_bytes(source)
        write_atomically(path, lambda staged: staged.write_bytes(data))
        return
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.link(str(source), path)
