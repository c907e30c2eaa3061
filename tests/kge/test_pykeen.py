"""Ranks, metrics, scores and the sampled loss equal those of PyKEEN 1.11, an implementation that shares no code with ours.

Weights of the ranked models are small integers, so that scores are exact in both and most candidates tie. Where definitions
differ, PyKEEN is asked for ours:

- TransE: the norms are plain roots in both; its `power_norm` is not ours.
- RotatE: the paper's code sums the moduli of the differences, and so do we. PyKEEN's takes their L2 norm, whatever its `p` says: the
  two are equal for one complex number.
- SimplE: both average the two directions. PyKEEN's interaction multiplies the first vectors of both entities, then the second ones,
  so its *model*, which gives head and tail in the same order, is two DistMults and symmetric in the entities where relations are.
  With the tail's vectors the other way round it is SimplE. Neither clamps scores, unless its `clamp_score` says so.
- TuckER: its core has the axes head, relation, tail; ours relation, head, tail. It drops out the same three places, but with
  other defaults.
- ConvE: the same layers in the same order; biases of tails go into its interaction.
- Self-adversarial loss: it halves the sum, as the authors' code does.
"""

import numpy as np
import pytest
import torch
from pykeen.evaluation import RankBasedEvaluator
from pykeen.losses import MarginRankingLoss, NSSALoss
from pykeen.metrics.ranking import rank_based_metric_resolver
from pykeen.models import ComplEx, DistMult, TransE
from pykeen.nn import modules
from pykeen.triples import CoreTriplesFactory

from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.losses import margin_ranking, self_adversarial
from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.ranking import rank_triples, summarize_ranks
from tests.kge.graphs import random_triples

E, R, UNSEEN = 30, 3, 4
PEERS = {
    "transe": lambda **sizes: TransE(
        embedding_dim=4, scoring_fct_norm=1, entity_constrainer=None, **sizes
    ),
    "distmult": lambda **sizes: DistMult(
        embedding_dim=4, entity_constrainer=None, regularizer=None, **sizes
    ),
    "complex": lambda **sizes: ComplEx(embedding_dim=2, regularizer=None, **sizes),
}
METRICS = {
    "mrr": ("inverse_harmonic_mean_rank", {}),
    "hits_at_1": ("hits_at_k", {"k": 1}),
    "hits_at_3": ("hits_at_k", {"k": 3}),
    "hits_at_10": ("hits_at_k", {"k": 10}),
    "mean_rank": ("arithmetic_mean_rank", {}),
    "adjusted_mean_rank": ("adjusted_arithmetic_mean_rank", {}),
}


def graph(seed):
    """Training triples with repeats, and test triples with repeats, known ones, and entities that training does not have."""
    train = random_triples(seed, 150, E - UNSEEN, R)
    fresh = random_triples(seed + 1, 60, E, R)
    return train, np.concatenate([fresh, fresh[:7], train[:5], train[:5]])


def coarse(kind, is_reciprocal):
    """A backbone of integers from -2 to 2."""
    config = read_kge_config({"kind": kind, "dimension": 4, "is_reciprocal": is_reciprocal})
    model = build_kge(config, E, R)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return model


def interleaved(vectors):
    """Complex numbers as pairs, the order of torch and PyKEEN, from all real parts first."""
    return torch.stack(vectors.chunk(2, -1), -1).flatten(-2)


def as_complex(vectors):
    return torch.complex(*vectors.chunk(2, -1))


def peer_of(model, kind, train):
    """PyKEEN's model with the same weights; it numbers the reciprocal of relation r 2 r + 1, and r itself 2 r."""
    factory = CoreTriplesFactory(
        torch.from_numpy(train),
        num_entities=E,
        num_relations=R,
        create_inverse_triples=model.size.is_reciprocal,
    )
    peer = PEERS[kind](triples_factory=factory, random_seed=0)
    relation = model.relations.weight.detach()
    if model.size.is_reciprocal:
        relation = torch.stack(relation.split(R), 1).flatten(0, 1)
    weights = [model.entity.detach(), relation]
    if kind == "complex":
        weights = [interleaved(weight) for weight in weights]
    with torch.no_grad():
        for parts, weight in zip(
            (peer.entity_representations, peer.relation_representations), weights, strict=True
        ):
            parts[0]._embeddings.weight.copy_(weight)
    return peer


def evaluated(peer, train, test):
    evaluator = RankBasedEvaluator(clear_on_finalize=False)
    result = evaluator.evaluate(
        peer,
        torch.from_numpy(test),
        batch_size=16,
        use_tqdm=False,
        additional_filter_triples=torch.from_numpy(train),
    )
    return evaluator, result


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("is_reciprocal", [False, True])
@pytest.mark.parametrize("kind", PEERS)
def test_filtered_ranks_are_pykeens_rank_by_rank(kind, is_reciprocal, seed):
    torch.manual_seed(seed)
    train, test = graph(seed)
    assert len(np.unique(train, axis=0)) < len(train)  # else there are no repeats
    assert (test[:, [0, 2]] >= E - UNSEEN).any()
    model = coarse(kind, is_reciprocal)
    found = rank_triples(model, test, index_facts(np.concatenate([train, test]), E, R))
    evaluator, result = evaluated(peer_of(model, kind, train), train, test)
    for side, ranks, candidates in (
        ("tail", found.tail, found.num_tails),
        ("head", found.head, found.num_heads),
    ):
        of = {
            name: np.concatenate(evaluator.ranks[side, name])
            for name in ("optimistic", "realistic", "pessimistic")
        }
        np.testing.assert_array_equal(ranks, of["realistic"])
        np.testing.assert_array_equal(ranks, (of["optimistic"] + of["pessimistic"]) / 2)
        assert (of["optimistic"] < of["pessimistic"]).mean() > 0.3  # else ties are rare
        np.testing.assert_array_equal(candidates, np.concatenate(evaluator.num_candidates[side]))
    metrics = summarize_ranks(found)
    both = {"ranks": np.concatenate([found.tail, found.head])}
    both["num_candidates"] = np.concatenate([found.num_tails, found.num_heads])
    for name, (key, options) in METRICS.items():
        ours = getattr(metrics, name)
        metric = rank_based_metric_resolver.make(key, options)
        assert ours == pytest.approx(metric(**both), rel=1e-12), name
        # the evaluator keeps ranks in single precision
        assert ours == pytest.approx(result.get_metric(f"both.realistic.{metric.key}"), rel=1e-6)


INTERACTIONS = {
    "transe_l1": (
        {"kind": "transe", "norm": "l1", "dimension": 6},
        lambda model: modules.TransEInteraction(p=1),
    ),
    "transe_l2": (
        {"kind": "transe", "norm": "l2", "dimension": 6},
        lambda model: modules.TransEInteraction(p=2),
    ),
    "rotate": (
        {"kind": "rotate", "dimension": 2},
        lambda model: modules.RotatEInteraction(),
    ),
    "distmult": (
        {"kind": "distmult", "dimension": 6},
        lambda model: modules.DistMultInteraction(),
    ),
    "complex": ({"kind": "complex", "dimension": 6}, lambda model: modules.ComplExInteraction()),
    "simple": ({"kind": "simple", "dimension": 6}, lambda model: modules.SimplEInteraction()),
    "tucker": (
        {"kind": "tucker", "dimension": 6, "relation_dimension": 4, "has_batch_norm": False},
        lambda model: tucker(model, has_batch_norm=False),
    ),
    "tucker_normalized": (
        {"kind": "tucker", "dimension": 6, "relation_dimension": 4},
        lambda model: tucker(model, has_batch_norm=True),
    ),
    "conve": (
        {"kind": "conve", "dimension": 12, "num_filters": 5},
        lambda model: conve(model),
    ),
}


def tucker(model, has_batch_norm):
    ours = model.relations
    peer = modules.TuckERInteraction(
        embedding_dim=6, relation_dim=4, apply_batch_normalization=has_batch_norm
    ).double()
    with torch.no_grad():
        peer.core_tensor = torch.nn.Parameter(ours.core.detach().transpose(0, 1).contiguous())
    if has_batch_norm:
        peer.head_batch_norm.load_state_dict(ours.norm_in.state_dict())
        peer.head_relation_batch_norm.load_state_dict(ours.norm_out.state_dict())
    return peer


def conve(model):
    ours = model.relations
    peer = modules.ConvEInteraction(
        input_channels=1,
        output_channels=5,
        embedding_height=ours.rows,
        embedding_dim=12,
    ).double()
    for place, layer in ((0, ours.norm_in), (2, ours.filters), (3, ours.norm_maps)):
        peer.hr2d[place].load_state_dict(layer.state_dict())
    for place, layer in ((0, ours.dense), (2, ours.norm_out)):
        peer.hr1d[place].load_state_dict(layer.state_dict())
    return peer


def turned(model, relation):
    """RotatE's relations as complex numbers of length 1."""
    phase = model.relations.weight[relation] * model.relations.radians
    return torch.polar(torch.ones_like(phase), phase)


def representations(name, model, head, relation, tail):
    """What PyKEEN's interaction takes for each of h, r, t."""
    entity = model.entity
    if name == "rotate":
        return as_complex(entity[head]), turned(model, relation), as_complex(entity[tail])
    vectors = entity[head], model.relations.weight[relation], entity[tail]
    if name == "complex":
        return tuple(as_complex(part) for part in vectors)
    if name == "simple":
        head, relation, tail = (part.chunk(2, -1) for part in vectors)
        return head, relation, tail[::-1]
    if name == "conve":
        return vectors[0], vectors[1], (vectors[2], model.tail_bias[tail])
    return vectors


def randomized(config):
    """A backbone in double precision whose weights, biases and running statistics are all random."""
    model = build_kge(read_kge_config(config), E, R).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


@pytest.mark.parametrize("name", INTERACTIONS)
def test_scores_are_pykeens(name):
    torch.manual_seed(0)
    model = randomized(INTERACTIONS[name][0])
    peer = INTERACTIONS[name][1](model).eval()
    head, relation, tail = (
        torch.from_numpy(part.copy()) for part in random_triples(0, 40, E, 2 * R).T
    )
    expected = peer(*representations(name, model, head, relation, tail)).detach()
    assert expected.std() > 0.1  # else anything is near
    torch.testing.assert_close(model.score(head, relation, tail).detach(), expected)
    rows = model.score_tails(head, relation).detach()
    torch.testing.assert_close(rows.gather(1, tail[:, None])[:, 0], expected)


def test_pykeens_rotate_is_the_root_of_the_squares_of_our_terms():
    torch.manual_seed(0)
    model = randomized({"kind": "rotate", "dimension": 6})
    head, relation, tail = torch.tensor([0, 5]), torch.tensor([1, 4]), torch.tensor([7, 2])
    parts = representations("rotate", model, head, relation, tail)
    term = modules.RotatEInteraction()
    terms = torch.stack([term(*(x[:, k : k + 1] for x in parts)) for k in range(3)])
    torch.testing.assert_close(model.score(head, relation, tail), terms.sum(0))
    for p in (1, 2):
        found = modules.RotatEInteraction(p=p)(*parts)
        torch.testing.assert_close(found, -terms.square().sum(0).sqrt())


@pytest.mark.parametrize("power_norm", [False, True])
def test_transe_is_not_the_power_norm(power_norm):
    """The L2 norm of ours is the root; PyKEEN's power norm is its square."""
    torch.manual_seed(0)
    model = randomized(INTERACTIONS["transe_l2"][0])
    head, relation, tail = torch.tensor([0, 5]), torch.tensor([1, 4]), torch.tensor([7, 2])
    peer = modules.TransEInteraction(p=2, power_norm=power_norm)
    found = peer(*representations("transe_l2", model, head, relation, tail))
    score = model.score(head, relation, tail)
    torch.testing.assert_close(found, -score.square() if power_norm else score)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_self_adversarial_loss_is_twice_pykeens(temperature):
    torch.manual_seed(0)
    positive, negative = torch.randn(7, 1).double(), torch.randn(7, 5).double()
    peer = NSSALoss(margin=3.0, adversarial_temperature=temperature)
    expected = peer.process_slcwa_scores(positive, negative)
    found = self_adversarial(positive[:, 0], negative, margin=3.0, temperature=temperature)
    torch.testing.assert_close(found, 2 * expected)


def test_the_margin_loss_is_pykeens():
    torch.manual_seed(0)
    positive, negative = torch.randn(7, 1).double(), torch.randn(7, 5).double()
    expected = MarginRankingLoss(margin=1.5).process_slcwa_scores(positive, negative)
    torch.testing.assert_close(margin_ranking(positive[:, 0], negative, 1.5), expected)
