import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("transe", "rotate", "complex", "distmult")


def figures(script, *options):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / script),
            "--json",
            "--synthetic=300,5,2000,60",
            "--dimension=8",
            "--threads=1",
            "--repeats=1",
            *options,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_contender_trains_all_triples():
    found = figures("kge_train.py", "--triples=512", "--batch=128", "--negatives=8", "--epochs=1")
    assert found["ratio_vs_pykeen"] == min(found[f"ratio_vs_pykeen_{kind}"] for kind in MODELS)
    for kind in MODELS:
        nums = {name: records[0]["num"] for name, records in found["records"][kind].items()}
        assert nums == {"ours_triples": 512, "ours_questions": 1024, "pykeen": 512}


@pytest.mark.slow
def test_ranks_are_those_of_pykeen():
    found = figures("kge_eval.py", "--triples=0", "--peer-batches=16")
    assert found["equal_ranks"]
    assert found["differing_ranks"] == dict.fromkeys(MODELS, 0)
    assert all(record[0]["num"] == 60 for of in found["records"].values() for record in of.values())


@pytest.mark.slow
def test_plain_and_distilled_epochs_take_turns():
    found = figures("kge_csd_cost.py", "--batch=256", "--negatives=8", "--models=complex,rotate")
    ratios = [found[f"ratio_epoch_csd_vs_plain_{kind}"] for kind in ("complex", "rotate")]
    assert found["ratio_epoch_csd_vs_plain"] == max(ratios) > 0
    assert 1.0 < found["memory_copies"] < 1.5  # of so small a model the semantic module is a part
    for record in found["records"].values():
        assert len(record["seconds"]["plain"]) == len(record["seconds"]["csd"]) == 1
