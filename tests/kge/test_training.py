"""Training: it learns, repeats with its seed, and goes on from a checkpoint to the same bits."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, MetricError, StoreError
from loopfm_ray.kge.checkpoint import CheckpointFile
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.models import read_kge_config
from loopfm_ray.kge.objectives import KVsAllConfig, make_objective
from loopfm_ray.kge.processes import ALONE
from loopfm_ray.kge.ranking import rank_triples, summarize_ranks
from loopfm_ray.kge.training import KgeTrainConfig, train_kge
from loopfm_ray.kge.triples import index_triples, read_triples
from tests.kge.graphs import shared_graph


def ring(num=20):
    """Numbers in a ring with the relations next, two further and opposite; what is held out follows from the rest."""
    triples = [
        (n, name, (n + step) % num)
        for name, step in (("next", 1), ("two", 2), ("far", num // 2))
        for n in range(num)
    ]
    order = np.random.default_rng(0).permutation(len(triples))
    splits = np.split(order, [len(triples) - 12, len(triples) - 6])
    return index_triples(
        *(
            tuple(
                pa.array([str(triples[number][column]) for number in split]) for column in range(3)
            )
            for split in splits
        )
    )


def config_of(**tree):
    return validate(KgeTrainConfig, tree, "test")


SAMPLED = {"kind": "self_adversarial", "num_negatives": 8, "margin": 3.0}
RECIPES = {
    "complex": ({"kind": "complex"}, {"regularizer": {"weight": 0.01}}),
    "distmult": (
        {"kind": "distmult", "is_reciprocal": False},
        {"regularizer": {"kind": "dura", "weight": 0.01}},
    ),
    "simple": ({"kind": "simple"}, {"loss": {"kind": "k_vs_all"}}),
    "tucker": (
        {"kind": "tucker", "dimension": 16},
        {"loss": {"kind": "k_vs_all"}, "optimizer": "adam", "lr": 0.05},
    ),
    "conve": (
        {"kind": "conve", "dimension": 16},
        {"loss": {"kind": "k_vs_all"}, "optimizer": "adam", "lr": 0.01},
    ),
    "transe": (
        {"kind": "transe", "init_margin": 3.0},
        {"loss": SAMPLED, "optimizer": "adam", "lr": 0.05},
    ),
    "transe_l2": (
        {"kind": "transe", "norm": "l2", "init_margin": 3.0, "is_reciprocal": False},
        {
            "loss": {"kind": "margin", "num_negatives": 8, "margin": 1.0, "is_filtered": True},
            "optimizer": "adam",
            "lr": 0.05,
        },
    ),
    "rotate": (
        {"kind": "rotate", "init_margin": 3.0, "is_reciprocal": False},
        {"loss": SAMPLED, "optimizer": "adam", "lr": 0.02},
    ),
    "rote": ({"kind": "rote"}, {}),
}


def fit(name, checkpoint=None, on_epoch=None, teacher=None, process=ALONE, **changes):
    backbone, config = RECIPES[name]
    tree = {"batch_size": 32, "epochs": 6, "eval_every": 2, **config, **changes}
    return train_kge(
        ring(),
        read_kge_config(backbone),
        config_of(num_workers=process.world_size, **tree),
        None if checkpoint is None else CheckpointFile(checkpoint, is_writer=process.rank == 0),
        on_epoch=on_epoch,
        teacher=teacher,
        process=process,
    )


def same_bits(first, second):
    return all(
        torch.equal(value, second.model.state_dict()[name])
        for name, value in first.model.state_dict().items()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_backbone_learns(name):
    graph, losses = ring(), []
    trained = fit(name, on_epoch=lambda epoch, loss: losses.append(loss), epochs=40, eval_every=20)
    assert losses[-1] < 0.9 * losses[0]
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    found = summarize_ranks(rank_triples(trained.model, graph.train, known))
    assert found.adjusted_mean_rank < 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_that_is_cut_goes_on_to_the_same_bits(name, tmp_path):
    """It is cut between two evaluations, so one epoch is trained again; dropout and negatives are drawn as before."""
    whole = fit(name)

    def cut(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(name, tmp_path / "state.pt", cut)
    epochs = []
    rest = fit(name, tmp_path / "state.pt", lambda epoch, loss: epochs.append(epoch))
    assert epochs == [3, 4, 5, 6]
    assert same_bits(whole, rest)
    assert rest.curve == whole.curve
    assert (rest.best_mrr, rest.best_epoch) == (whole.best_mrr, whole.best_epoch)


@pytest.mark.parametrize("name", ["conve", "tucker"])
def test_one_row_that_is_left_over_is_trained_with_others(name):
    num_rows = make_objective(ring(), KVsAllConfig()).num_rows
    losses = []
    fit(name, batch_size=num_rows - 1, on_epoch=lambda epoch, loss: losses.append(loss))
    assert np.isfinite(losses).all()


def test_a_finished_training_can_be_made_longer(tmp_path):
    fit("conve", tmp_path / "state.pt", epochs=4)
    longer = fit("conve", tmp_path / "state.pt", epochs=8)
    assert same_bits(longer, fit("conve", epochs=8))
    again = fit(
        "conve", tmp_path / "state.pt", epochs=8, on_epoch=lambda *_: pytest.fail("trained")
    )
    assert same_bits(again, longer)


def test_a_seed_decides_all_and_the_callers_random_state_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = fit("transe")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert same_bits(first, fit("transe"))
    assert not same_bits(first, fit("transe", seed=1))


def test_the_best_weights_come_back():
    trained = fit("complex", epochs=30, eval_every=1)
    best = max(trained.curve, key=lambda point: (point.valid_mrr, -point.epoch))
    assert (trained.best_epoch, trained.best_mrr) == (best.epoch, best.valid_mrr)
    assert trained.best_epoch < trained.num_epochs == 30  # else the test shows nothing
    graph = ring()
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    assert summarize_ranks(rank_triples(trained.model, graph.valid, known)).mrr == best.valid_mrr
    assert not trained.model.training


def test_training_stops_when_validation_gets_no_better():
    trained = fit("complex", epochs=200, eval_every=1, patience=3)
    assert trained.num_epochs == trained.best_epoch + 3 < 200
    assert len(trained.curve) == trained.num_epochs


def test_what_can_not_be_trained_is_refused(tmp_path):
    with pytest.raises(MetricError, match="lower lr"):
        fit("distmult", lr=1e20)
    with pytest.raises(ConfigError, match="DURA is defined"):
        fit("rotate", regularizer={"kind": "dura"})
    with pytest.raises(ConfigError, match=r"train\.num_workers is 2 and 1 process trains here"):
        train_kge(ring(), read_kge_config({"kind": "complex"}), config_of(num_workers=2))
    path = tmp_path / "state.pt"
    fit("transe", path)
    with pytest.raises(StoreError, match="the config or the graph changed"):
        fit("transe", path, seed=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError, match="can not be loaded"):
        fit("transe", path)


def test_complex_learns_umls():
    """A minute's set: published full-size models reach an MRR above .9."""
    graph = read_triples(shared_graph("umls"))
    config = config_of(regularizer={"weight": 0.01}, batch_size=512, epochs=20, eval_every=10)
    trained = train_kge(graph, read_kge_config({"kind": "complex", "dimension": 64}), config)
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    found = summarize_ranks(
        rank_triples(trained.model, graph.test, known), graph.has_unseen("test")
    )
    assert found.num_ranked == 661
    assert found.mrr > 0.85
    assert found.adjusted_mean_rank < 0.1
