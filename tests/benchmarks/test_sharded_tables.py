import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RATIOS = (
    "ratio_50m_vs_1m",
    "ratio_vs_dense",
    "ratio_vs_sparse_torch",
    "ratio_vs_sparse_adam",
    "ratio_vs_dtensor",
)


@pytest.mark.slow
def test_every_contender_is_measured():
    sizes = {"rows": 3000, "small-rows": 2000, "ids": 64, "steps": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "sharded_tables.py"), "--json", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert all(found[name] > 0 and found[f"cpu_{name}"] > 0 for name in RATIOS)
    assert set(found["seconds"]["ranks"]) == {"ours", "dtensor"}
