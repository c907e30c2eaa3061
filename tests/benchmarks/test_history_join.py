import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEERS = {"duckdb_asof", "duckdb_window", "polars_asof", "polars_window", "polars_search"}


@pytest.mark.slow
def test_all_contenders_of_the_history_join_agree(tmp_path):
    pytest.importorskip("duckdb")
    sizes = {"events": 20_000, "requests": 1_000, "users": 400, "block-rows": 5_000, "repeats": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    script = ROOT / "benchmarks" / "history_join.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json", f"--work-dir={tmp_path}", "--threads=2", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["equal_to_oracle"] is True
    assert set(found["seconds"]["slices"]) == set(found["seconds"]["codes"]) == {"ours", *PEERS}
    assert found["ratio_vs_best_of_duckdb_polars"] > 0
    assert found["peak_rss_growth_at_4x"] > 0
    assert found["on_disk"]["1x"]["num_history_rows"] == 20_000
    assert found["on_disk"]["4x"]["num_history_rows"] == 80_000
    assert found["on_disk"]["4x"]["num_buckets"] == found["on_disk"]["1x"]["num_buckets"]
    assert found["skew_on_disk"]["seconds_ratio"] > 0
    assert found["late_on_disk"]["peak_ratio"] > 0
    assert "ratio_vs_feast_ray" not in found
    assert not list(tmp_path.iterdir())
