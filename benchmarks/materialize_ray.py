"""The whole materialise job on a local Ray cluster, with one worker and with two, taking turns; run by `materialize.py`.

A worker counts its attempts at a shard in a file before it begins, and the shard's marker is its last file: their times say
when the first shard began and when the last was done, without the start of Ray's actors.
"""

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path

from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.materialize import materialize


class Watch:
    """Follows one run through its progress calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.span_s = 0.0
        self.worker_peak_rss_gib = 0.0

    def __call__(self, _stage: str, done: int, total: int) -> None:
        """At the last step, before the work folder goes, read the times and the memory of the workers."""
        if done == total:
            (work,) = self._folder.glob(".out.work-*")
            began = min(path.stat().st_mtime for path in (work / "attempts").iterdir())
            ended = max(path.stat().st_mtime for path in (work / "markers").glob("*/[0-9]*"))
            self.span_s = ended - began
            self.worker_peak_rss_gib = max(worker_peaks(), default=0.0)


def worker_peaks() -> list[float]:
    """Return the peak memory of every actor that maps shards, in GiB."""
    peaks = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if command.startswith(b"ray::") and b"Map" in command:
                found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text("utf-8"))
                peaks.append(int(found[1]) / 2**20 if found else 0.0)
        except OSError:  # it ended meanwhile
            continue
    return peaks


def run(folder: Path, num_workers: int) -> dict[str, float]:
    """Materialise once and return rows and times."""
    out, watch = folder / "out", Watch(folder)
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    manifest = materialize(
        folder / "prepared",
        folder / "snapshot",
        out,
        delay_us=0,
        num_workers=num_workers,
        progress=watch,
    )
    found = {
        "num_rows": manifest.num_rows,
        "num_shards": len(manifest.files) - 1,
        "whole_s": time.perf_counter() - began,
        "span_s": watch.span_s,
        "worker_peak_rss_gib": watch.worker_peak_rss_gib,
        "version": manifest.version,
    }
    print(f"{num_workers} workers {json.dumps(found)}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    began = time.perf_counter()
    records: dict[int, list[dict[str, float]]] = {count: [] for count in args.workers}
    with connect(RayConfig()):
        start_s = time.perf_counter() - began
        for turn in range(args.repeats):
            for count in args.workers if turn % 2 == 0 else args.workers[::-1]:
                records[count].append(run(args.folder, count))
    json.dump({"records": records, "ray_start_s": start_s}, sys.stdout)


if __name__ == "__main__":
    main()
