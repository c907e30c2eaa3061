"""Two processes on gloo that train one model: what they learn is what one learns, and a killed training goes on to the same bits."""

import numpy as np
import pytest
import torch
import torch.distributed

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.models import read_kge_config
from loopfm_ray.kge.processes import Peer, part_of
from loopfm_ray.kge.training import check_workers
from tests.kge.test_training import config_of, fit
from tests.ranks import run_ranks

CSD = {"begin_epoch": 1, "ramp_epochs": 2, "num_candidates": 5}
NUM = 2
CASES = {
    "one_vs_all": ("complex", {}),
    "k_vs_all": ("simple", {"regularizer": {"weight": 0.01}}),
    "drawn": ("rotate", {}),
    "filtered": ("transe_l2", {}),
    "average": ("complex", {"distillation": CSD}),
    "average_drawn": ("rotate", {"distillation": CSD}),
    "last_visit": (
        "complex",
        {"distillation": {**CSD, "memory": {"kind": "last_visit", "num_kept": 4}}},
    ),
    "visits": (
        "complex",
        {"distillation": {**CSD, "memory": {"kind": "last_visit", "num_kept": 4, "decay": 0.5}}},
    ),
    "last_visit_from_the_start": (
        "simple",
        {"distillation": {**CSD, "begin_epoch": 0, "memory": {"kind": "last_visit"}}},
    ),
    "fewer_rows_than_processes": ("complex", {"batch_size": 1, "epochs": 2}),
    "taught": (
        "complex",
        {"distillation": {**CSD, "memory": {"kind": "teacher"}}, "teacher": True},
    ),
}
CUT = {"distillation": CSD}


def trained(case, **others):
    """Train a case in double precision; return its weights, the losses of its epochs, and its curve."""
    name, changes = CASES[case]
    torch.set_default_dtype(torch.float64)
    try:
        if changes.get("teacher"):
            changes = {**changes, "teacher": fit("complex", seed=5, epochs=2).model}
        losses = []
        found = fit(name, on_epoch=lambda _, loss: losses.append(loss), **changes, **others)
    finally:
        torch.set_default_dtype(torch.float32)
    curve = [(point.loss, point.valid_mrr) for point in found.curve]
    return {"weights": found.model.state_dict(), "losses": losses, "curve": curve}


def cut(epoch, loss):
    if epoch == 3:
        raise KeyboardInterrupt


def peer(rank, folder):
    """Train every case in one of the processes, and one that is cut and goes on."""
    process = Peer(rank, NUM)
    found = {case: trained(case, process=process) for case in CASES}
    found["single"] = fit("complex", process=process, **CUT).model.state_dict()
    with pytest.raises(KeyboardInterrupt):
        fit("complex", folder / "state.pt", cut, process=process, **CUT)
    torch.distributed.barrier()
    epochs = []
    rest = fit(
        "complex",
        folder / "state.pt",
        lambda epoch, _: epochs.append(epoch),
        process=process,
        **CUT,
    )
    found["rest"], found["epochs"] = rest.model.state_dict(), epochs
    rows = torch.arange(3 * rank + 1)
    found["gathered"] = [process.gather(rows), process.gather(rows[: 3 * rank])]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes found, by rank."""
    folder = tmp_path_factory.mktemp("peers")
    return run_ranks(NUM, peer, folder, folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(case, found):
    alone, together = trained(case), found[0][case]
    assert together["losses"] == pytest.approx(alone["losses"], abs=1e-9)
    np.testing.assert_allclose(together["curve"], alone["curve"], atol=1e-9)
    for name, value in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], value, rtol=0, atol=1e-7)
    assert alone["losses"][0] != alone["losses"][-1]


def test_in_single_precision_as_well(found):
    alone = fit("complex", **CUT).model.state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(found[0]["single"][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_all_processes_end_with_the_same_bits(case, found):
    for name, value in found[0][case]["weights"].items():
        assert torch.equal(value, found[1][case]["weights"][name])


def test_a_training_that_is_cut_goes_on_to_the_same_bits(found):
    for one in found:
        assert one["epochs"] == [3, 4, 5, 6]
        assert all(torch.equal(value, one["rest"][name]) for name, value in one["single"].items())


def test_rows_of_different_number_are_gathered_in_order(found):
    for one in found:
        assert one["gathered"][0].tolist() == [0, 0, 1, 2, 3]
        assert one["gathered"][1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 11])
def test_parts_are_the_batch_and_their_weights_are_one(num_rows):
    parts = [part_of(num_rows, Peer(rank, 4)) for rank in range(4)]
    rows = np.concatenate([np.arange(num_rows)[part.rows] for part in parts])
    assert sorted(rows) == sorted(np.repeat(np.arange(num_rows), parts[0].copies))
    sizes = [len(range(num_rows)[part.rows]) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    weights = [part.weight(size, num_rows) for part, size in zip(parts, sizes, strict=True)]
    assert sum(weights) == pytest.approx(1.0)


def test_what_needs_the_whole_batch_is_refused():
    for tree in ({"kind": "conve"}, {"kind": "tucker"}):
        check_workers(read_kge_config(tree), config_of())
        with pytest.raises(ConfigError, match=r"num_workers is 2 and the backbone .* set num_w"):
            check_workers(read_kge_config(tree), config_of(num_workers=2))
    plain = {
        "kind": "tucker",
        "has_batch_norm": False,
        **dict.fromkeys(("input_dropout", "matrix_dropout", "output_dropout"), 0.0),
    }
    for tree in (plain, {"kind": "complex"}, {"kind": "rote"}):
        check_workers(read_kge_config(tree), config_of(num_workers=2))
