import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_materialise_is_measured_against_the_bare_loop(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "materialize.py"),
            "--json",
            "--rows=6000",
            "--users=200",
            "--repeats=1",
            "--ray-repeats=1",
            f"--work-dir={tmp_path}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    rows = {record["num_rows"] for name in ("ours", "bare") for record in found["records"][name]}
    assert rows == {found["sizes"]["num_rows"]} == {5250}
    for key in (
        "ratio_vs_bare_loop",
        "cpu_ratio_vs_bare_loop",
        "ratio_two_workers",
        "ratio_two_workers_whole",
        "ratio_two_bare_loops",
        "ratio_ray_vs_bare_loop",
        "ratio_ray_vs_bare_loop_whole",
        "peak_rss_gib",
        "peak_rss_gib_of_ray_worker",
    ):
        assert found[key] > 0, key
    assert found["code_bytes_per_event"] >= 8
    assert found["bytes_per_event"] > found["code_bytes_per_event"]
    assert found["encoded_bytes_per_event"] > found["code_bytes_per_event"]
    for records in found["records"]["ray"].values():
        assert all(record["span_s"] < record["whole_s"] for record in records)
    assert not list(tmp_path.iterdir())
