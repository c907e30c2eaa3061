import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READERS = {"lmdb", "parquet", "parquet_large", "lance", "lance_take"}


@pytest.mark.slow
def test_all_stores_give_the_codes_that_were_written(tmp_path):
    pytest.importorskip("lance")
    options = ["--users=500", "--events-per-user=9", "--max-len=7", "--buckets=3", "--reads=300"]
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "random_reads.py"),
            "--json",
            "--repeats=1",
            "--budget-s=0.5",
            f"--work-dir={tmp_path}",
            *options,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    # the script stops when a store gives other codes than were written
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for label in ("one", "batch"):
        assert set(found["reads"][label]) == READERS
        assert found["ratio_to_lmdb"][label]["lmdb"] == 1
        assert all(record["reads_per_s"] > 0 for record in found["reads"][label].values())
    assert set(found["scan_rows_per_s"]) == {"parquet", "parquet_small_groups", "lance"}
    assert min(found["bytes_on_disk"].values()) > 16 * found["sizes"]["events"]
    assert not list(tmp_path.iterdir())
