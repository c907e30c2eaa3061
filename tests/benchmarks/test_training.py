import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--data=synthetic", "--log-rows=30000", "--users=1000", "--rows=6000", "--epochs=1")


def figures(script, *options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--json", *SMALL, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_contender_trains_the_same_rows_with_about_as_many_parameters():
    pytest.importorskip("fuxictr")
    options = ("--test-rows=3000", "--batch=256", "--seeds", "0", "--loaders=npz", "--models=din")
    found = figures("train_vm.py", *options)
    nums = {name: turns[0]["num"] for name, turns in found["records"]["din"].items()}
    assert len(nums) == 4
    assert set(nums.values()) == {found["sizes"]["train_rows"]}
    parameters = found["num_parameters"]["din"].values()
    assert max(parameters) < 1.1 * min(parameters)
    assert found["ratio_vs_fuxictr"] == found["ratio_vs_fuxictr_din"] > 0
    assert found["ratio_vs_bare_loop_vm"] == found["ratio_vs_bare_loop_vm_din"] > 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_contender_trains_the_fm_on_the_same_examples():
    found = figures("train_fm.py", "--batch=512", "--repeats=1")
    nums = {name: turns[0]["num"] for name, turns in found["records"].items()}
    whole = found["sizes"]["examples"]
    assert nums.pop("two_bare_loops") == 2 * whole
    assert set(nums.values()) == {whole}
    assert set(found["until_first_rows_s"]) == set(nums) - {"bare"}
