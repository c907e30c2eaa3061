"""Backbones: fast scores equal the published formulas one triple at a time, and so do their gradients."""

import numpy as np
import pytest
import torch

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge import candidates, comparisons
from loopfm_ray.kge.models import BACKBONES, build_kge, read_kge_config
from loopfm_ray.kge.regularizers import dura, n3
from tests.kge import twins
from tests.kge.memory import Largest

E, R = 7, 2
CASES = {
    "transe_l1": ({"kind": "transe", "norm": "l1", "dimension": 6}, twins.transe_l1),
    "transe_l2": ({"kind": "transe", "norm": "l2", "dimension": 6}, twins.transe_l2),
    "rotate": ({"kind": "rotate", "dimension": 6}, twins.rotate),
    "rote": ({"kind": "rote", "dimension": 6}, twins.rote),
    "distmult": ({"kind": "distmult", "dimension": 5}, twins.distmult),
    "complex": ({"kind": "complex", "dimension": 6}, twins.complex_),
    "simple": ({"kind": "simple", "dimension": 6}, twins.simple),
    "tucker": (
        {"kind": "tucker", "dimension": 4, "relation_dimension": 3, "has_batch_norm": False},
        twins.tucker,
    ),
    "tucker_normalized": (
        {"kind": "tucker", "dimension": 4, "relation_dimension": 3},
        twins.tucker_normalized,
    ),
    "conve": ({"kind": "conve", "dimension": 12, "num_filters": 2}, twins.conve),
}
TAILS_ALONE = ("conve", "tucker_normalized")
BOTH_WAYS = [name for name in CASES if name not in TAILS_ALONE]
BIASES = {"rote": 2, "conve": 1}


def make(name, seed=0, num_entities=E, **changes):
    """A model whose weights, and running means, are all random and of size about 1."""
    torch.manual_seed(seed)
    config = read_kge_config({**CASES[name][0], **changes})
    model = build_kge(config, num_entities, R).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer))
            elif buffer_name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def weights_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def ids(*numbers):
    return torch.tensor(numbers)


def twin_of_tails(name, weights, heads, relations):
    twin = CASES[name][1]
    return np.array(
        [[twin(weights, h, r, t) for t in range(E)] for h, r in zip(heads, relations, strict=True)]
    )


def test_every_backbone_has_a_twin():
    assert {tree["kind"] for tree, _ in CASES.values()} == set(BACKBONES)


@pytest.mark.parametrize("name", CASES)
def test_scores_of_all_tails_are_those_of_the_paper(name):
    model = make(name)
    heads, relations = [0, 3, 3, 6, 1], [0, 1, 3, 2, 0]
    found = model.score_tails(ids(*heads), ids(*relations)).detach().numpy()
    expected = twin_of_tails(name, weights_of(model), heads, relations)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_rows_and_candidates_are_entries_of_all_tails(name):
    model = make(name)
    heads, relations = ids(0, 3, 3, 6), ids(0, 1, 3, 2)
    everything = model.score_tails(heads, relations)
    candidates = torch.randint(0, E, (4, 9))
    chosen = model.score_tails(heads, relations, candidates)
    torch.testing.assert_close(chosen, everything.gather(1, candidates))
    tails = ids(6, 3, 0, 1)
    rows = model.score(heads, relations, tails)
    torch.testing.assert_close(rows, everything.gather(1, tails[:, None])[:, 0])


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_without_reciprocal_relations_heads_have_the_same_scores(name):
    model = make(name, is_reciprocal=False)
    relations, tails = ids(0, 1, 1), ids(5, 5, 2)
    found = model.score_heads(relations, tails)
    for row in range(3):
        for head in range(E):
            expected = CASES[name][1](weights_of(model), head, int(relations[row]), int(tails[row]))
            assert found[row, head].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)
    candidates = torch.randint(0, E, (3, 4))
    chosen = model.score_heads(relations, tails, candidates)
    torch.testing.assert_close(chosen, found.gather(1, candidates))


@pytest.mark.parametrize("name", CASES)
def test_reciprocal_relations_score_heads_as_tails(name):
    model = make(name)
    relations, tails, candidates = ids(0, 1), ids(5, 2), ids([1, 2], [0, 6])
    expected = model.score_tails(tails, relations + R)
    assert torch.equal(model.score_heads(relations, tails), expected)
    torch.testing.assert_close(
        model.score_heads(relations, tails, candidates), expected.gather(1, candidates)
    )


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_paper(name):
    """Central differences of the twin, for every number of the entities and of each part of the relations."""
    model = make(name)
    heads, relations = [0, 3, 3], [0, 1, 3]
    slopes = torch.randn(3, E, dtype=torch.float64)
    (slopes * model.score_tails(ids(*heads), ids(*relations))).sum().backward()
    weights, step = weights_of(model), 1e-6
    for parameter_name, parameter in model.named_parameters():
        found, array = parameter.grad.numpy().ravel(), weights[parameter_name].reshape(-1)
        for place in range(0, len(array), max(1, len(array) // 40)):
            value = array[place]
            sums = []
            for moved in (value + step, value - step):
                array[place] = moved
                sums.append(np.sum(slopes.numpy() * twin_of_tails(name, weights, heads, relations)))
            array[place] = value
            expected = (sums[0] - sums[1]) / (2 * step)
            assert found[place] == pytest.approx(expected, rel=1e-5, abs=1e-6), parameter_name


@pytest.mark.parametrize("cells", [1, 20, 1 << 20])
@pytest.mark.parametrize(
    "name", [name for name in comparisons.__all__ if name != comparisons.Comparison.__name__]
)
def test_blocks_of_any_size_give_the_scores_and_slopes_of_all(name, cells, monkeypatch):
    monkeypatch.setattr(candidates, "_CELLS", cells)
    torch.manual_seed(0)
    comparison = getattr(comparisons, name)()
    query, entity = torch.randn(5, 8).double(), torch.randn(9, 8).double()
    chosen = torch.randint(0, 9, (5, 12))  # some twice
    slopes = torch.randn(5, 12).double()
    results = []
    for score in (
        lambda q, e: comparison.against_all(q, e, None).gather(1, chosen),
        lambda q, e: comparison.against(q, e, chosen),
    ):
        q, e = query.clone().requires_grad_(), entity.clone().requires_grad_()
        found = score(q, e)
        (slopes * found).sum().backward()
        results.append((found, q.grad, e.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("name", ["transe_l1", "transe_l2", "rotate", "rote"])
def test_a_distance_of_zero_has_a_gradient(name):
    model = make(name).float()
    with torch.no_grad():
        model.entity.zero_()
        for parameter in model.relations.parameters():
            parameter.zero_()
    model.score_tails(ids(0, 1), ids(0, 1)).sum().backward()
    model.score_tails(ids(0, 1), ids(0, 1), ids([2, 3], [4, 1])).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_is_larger_than_the_scores(name):
    model = make(name, num_entities=900).float()
    heads = torch.arange(50)
    with Largest() as largest:
        model.score_tails(heads, heads % 4).sum().backward()
    assert largest.numel == 50 * 900


@pytest.mark.parametrize("name", CASES)
def test_an_entity_has_as_many_parameters_as_its_dimension_says(name):
    small, large = (make(name, num_entities=num) for num in (E, E + 1))
    counts = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
    dimension = CASES[name][0]["dimension"]
    assert counts[1] - counts[0] == dimension + BIASES.get(CASES[name][0]["kind"], 0)
    assert small.dimension == dimension


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_reciprocal", [True, False])
def test_relations_are_doubled_where_they_are_reciprocal(name, is_reciprocal):
    if not is_reciprocal and name in TAILS_ALONE:
        with pytest.raises(ConfigError, match="is_reciprocal"):
            make(name, is_reciprocal=False)
        return
    model = make(name, is_reciprocal=is_reciprocal)
    rows = {
        p.shape[0]
        for n, p in model.relations.named_parameters()
        if n in ("weight", "rotation", "translation")
    }
    assert rows == {R * (1 + is_reciprocal)}
    assert model.num_relations == R


@pytest.mark.parametrize("name", CASES)
def test_first_values_repeat_with_the_seed_and_are_finite(name):
    config = read_kge_config(CASES[name][0])
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_kge(config, E, R))
    for (key, first), second in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        assert torch.equal(first, second), key
    assert torch.isfinite(models[0].eval().score_tails(ids(0), ids(1))).all()


@pytest.mark.parametrize(
    ("name", "bound"), [("transe_l1", 11 / 6), ("rotate", 11 / 3), ("simple", 6 / 3**0.5)]
)
def test_first_values_fill_the_published_range(name, bound):
    torch.manual_seed(0)
    entity = build_kge(read_kge_config(CASES[name][0]), 400, R).entity
    assert 0.98 * bound < entity.abs().max() <= bound
    assert entity.mean().abs() < 0.1 * bound


def test_n3_by_hand():
    model = make("complex")
    h, r, t = ids(0, 3), ids(1, 2), ids(5, 5)
    weights = weights_of(model)
    total = 0.0
    for head, relation, tail in zip(h.tolist(), r.tolist(), t.tolist(), strict=True):
        for row in (
            weights["entity"][head],
            weights["relations.weight"][relation],
            weights["entity"][tail],
        ):
            total += np.sum(np.abs(twins.as_complex(row)) ** 3)
    assert n3(model.factors(h, r, t)).item() == pytest.approx(total / 2)
    # a real backbone, and one whose relations have no length
    model = make("distmult")
    parts = [model.entity[h], model.relations.weight[r], model.entity[t]]
    expected = sum((part.abs() ** 3).sum() for part in parts) / 2
    torch.testing.assert_close(n3(model.factors(h, r, t)), expected)
    model = make("rotate")
    expected = sum(
        (torch.complex(*model.entity[part].chunk(2, -1)).abs() ** 3).sum() for part in (h, t)
    )
    torch.testing.assert_close(n3(model.factors(h, r, t)), expected / 2)


def test_regularisers_of_a_vector_of_zeros_have_a_gradient():
    model = make("complex").float()
    with torch.no_grad():
        model.entity.zero_()
    factors = model.factors(ids(0), ids(0), ids(1))
    (n3(factors) + dura(factors)).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["distmult", "complex"])
def test_dura_of_diagonal_matrices_is_that_of_the_authors_code(name):
    model = make(name)
    h, r, t = ids(0, 3), ids(1, 2), ids(5, 4)
    factors = model.factors(h, r, t)
    head, relation, tail = factors.head, factors.relation, factors.tail
    plain = (head**2 + tail**2).sum() / 2
    mapped = (head**2 * relation**2 + tail**2 * relation**2).sum() / 2
    torch.testing.assert_close(dura(factors), plain + mapped)
    torch.testing.assert_close(dura(factors, 0.5, 1.5), 0.5 * plain + 1.5 * mapped)


@pytest.mark.parametrize("name", ["simple", "tucker"])
def test_dura_reads_the_matrix_of_the_score(name):
    """M_r found by scoring unit vectors with the twin."""
    model = make(name)
    weights, dimension = weights_of(model), CASES[name][0]["dimension"]
    units = {**weights, "entity": np.eye(dimension)}
    h, r, t = 2, 3, 5
    matrix = np.array(
        [[CASES[name][1](units, i, r, j) for j in range(dimension)] for i in range(dimension)]
    )
    head, tail = weights["entity"][h], weights["entity"][t]
    expected = sum(np.sum(x**2) for x in (head, tail, head @ matrix, matrix @ tail))
    found = dura(model.factors(ids(h), ids(r), ids(t)))
    assert found.item() == pytest.approx(expected)


def test_dura_is_refused_where_there_is_no_matrix():
    for name in ("transe_l1", "conve", "tucker_normalized"):
        with pytest.raises(ConfigError, match="DURA is defined"):
            dura(make(name).factors(ids(0), ids(0), ids(1)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "complex", "dimension": 5}, r"complex\.dimension: .*multiple of 2"),
        ({"kind": "rescal"}, "kinds are complex, conve"),
        ({"kind": "transe", "norm": "l3"}, r"transe\.norm"),
        ({"kind": "distmult", "rank": 3}, r"distmult\.rank: Extra"),
    ],
)
def test_wrong_configs_are_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        read_kge_config(tree)


@pytest.mark.parametrize("changes", [{"rows": 5}, {"rows": 6}, {"dimension": 2}])
def test_pictures_that_no_filter_fits_are_refused(changes):
    with pytest.raises(ConfigError, match="conve lays dimension"):
        make("conve", **changes)


def test_pictures_of_the_published_dimensions():
    for dimension, rows in ((32, 4), (200, 10), (16, 4)):
        model = build_kge(read_kge_config({"kind": "conve", "dimension": dimension}), E, R)
        assert model.relations.rows == rows


def test_dropout_and_batch_norm_work_in_training_alone():
    for name in TAILS_ALONE:
        model = make(name, output_dropout=0.5)
        first, second = (model.score_tails(ids(0, 1), ids(0, 1)) for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        first, second = (model.score_tails(ids(0, 1, 2), ids(0, 1, 2)) for _ in range(2))
        assert not torch.equal(first, second)
