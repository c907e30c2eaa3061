from dataclasses import replace

import pytest
import torch

from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.foundation import FmConfig, build_fm
from tests.model_inputs import BARE_SCHEMA, ITEM_FIELDS, NUMERIC_SCHEMA, SCHEMA, make_batch

SMALL = FmConfig(embed_dim=3, history_dim=4, cross_rank=2, hidden=(6, 5))


def test_layers_are_named_and_as_wide_as_said():
    torch.manual_seed(0)
    fm = build_fm(SMALL, SCHEMA, ITEM_FIELDS)
    out = fm(make_batch())
    assert out.logit.shape == (12, 2)
    assert fm.layer_names == ("embedding", "sequence", "hidden_0", "hidden_1") == tuple(out.layers)
    for name, layer in out.layers.items():
        assert layer.shape == (12, fm.embedding_dim([name]))
    chosen = ("hidden_1", "embedding")
    want = torch.cat([out.layers["hidden_1"], out.layers["embedding"]], -1)
    assert torch.equal(out.embedding(chosen), want)
    assert want.shape[1] == fm.embedding_dim(chosen)
    for names in (["hidden_9"], []):
        with pytest.raises(ConfigError, match="embedding_layers"):
            fm.embedding_dim(names)


def test_the_sequence_layer_is_the_end_of_the_embedding():
    torch.manual_seed(0)
    out = build_fm(SMALL, SCHEMA, ITEM_FIELDS)(make_batch())
    sequence = out.layers["sequence"]
    assert torch.equal(sequence, out.layers["embedding"][:, -sequence.shape[1] :])


@pytest.mark.parametrize("schema", [BARE_SCHEMA, NUMERIC_SCHEMA])
def test_schemas_without_most_fields_work(schema):
    batch = replace(make_batch(schema=schema), histories={})
    assert build_fm(SMALL, schema)(batch).logit.shape == (12, 1)


def test_a_schema_without_fields_is_an_error():
    with pytest.raises(ConfigError, match="at least one field"):
        build_fm(SMALL, replace(SCHEMA, fields=()))


def test_history_fields_choose_columns():
    torch.manual_seed(0)
    fm = build_fm(SMALL.model_copy(update={"history_fields": ("category",)}), SCHEMA, ITEM_FIELDS)
    batch = make_batch()
    raw = batch.histories["raw"]
    other_ids = raw.item_ids.clone()
    other_ids[..., 0] = 0
    other = replace(batch, histories={"raw": replace(raw, item_ids=other_ids)})
    assert torch.equal(fm(batch).logit, fm(other).logit)
    with pytest.raises(ConfigError, match="brand"):
        build_fm(SMALL.model_copy(update={"history_fields": ("brand",)}), SCHEMA, ITEM_FIELDS)


def test_a_missing_history_is_an_error():
    fm = build_fm(SMALL, SCHEMA, ITEM_FIELDS)
    with pytest.raises(ShapeError, match="'raw'"):
        fm(replace(make_batch(), histories={}))
    raw = make_batch().histories["raw"]
    with pytest.raises(ShapeError, match="no item ids"):
        fm(replace(make_batch(), histories={"raw": replace(raw, item_ids=None)}))


def test_no_cross_layers_and_no_hidden_layers():
    config = SMALL.model_copy(update={"cross_layers": 0, "hidden": ()})
    fm = build_fm(config, SCHEMA, ITEM_FIELDS)
    assert fm.layer_names == ("embedding", "sequence")
    assert fm(make_batch()).logit.shape == (12, 2)


def test_outlying_numbers_are_cut():
    fm = build_fm(SMALL, NUMERIC_SCHEMA)
    batch = make_batch(schema=NUMERIC_SCHEMA)
    far, farther = (replace(batch, numeric=torch.full((12, 1), x)) for x in (1e3, 1e6))
    assert torch.equal(fm(far).logit, fm(farther).logit)


def test_sensitivity_is_the_mean_square_slope():
    torch.manual_seed(0)
    fm, batch = build_fm(SMALL, SCHEMA, ITEM_FIELDS), make_batch()
    for layer in ("hidden_0", "hidden_1"):
        out = fm(batch)
        (slope,) = torch.autograd.grad(out.logit[:, 0].sum(), out.layers[layer])
        with torch.no_grad():  # it needs no outer graph
            torch.testing.assert_close(fm.sensitivity(batch, [layer]), slope.square().mean(0))
    assert all(parameter.grad is None for parameter in fm.parameters())
    with pytest.raises(ConfigError):
        fm.sensitivity(batch, ["hidden_9"])


def test_sensitivity_of_several_layers_is_that_of_each():
    torch.manual_seed(0)
    fm, batch = build_fm(SMALL, SCHEMA, ITEM_FIELDS), make_batch()
    layers = ("hidden_1", "embedding", "sequence")
    want = torch.cat([fm.sensitivity(batch, [layer]) for layer in layers])
    torch.testing.assert_close(fm.sensitivity(batch, layers), want)


def test_sensitivity_of_a_field_takes_its_way_through_the_query_along():
    torch.manual_seed(0)
    fm, batch = build_fm(SMALL, SCHEMA, ITEM_FIELDS), make_batch()
    found = fm.sensitivity(batch, ["embedding"])
    assert found.shape == (fm.embedding_dim(["embedding"]),)
    assert not bool(found[fm.features.numeric_columns].any())
    # By finite differences in one column of the item's embedding, shifted for the candidate alone.
    column, step = 4, 1e-3
    fields = fm.features(batch)

    def logit(shift):
        moved = fields.clone()
        moved[:, column] += shift
        history = batch.histories["raw"]
        values = fm.events(fm.features.embeddings, history.item_ids)
        return fm._score([moved, fm.encoder(moved, values, history)]).logit[:, 0]

    slope = (logit(step) - logit(-step)) / (2 * step)
    assert found[column].item() == pytest.approx(slope.square().mean().item(), rel=0.02)


def test_sensitivity_of_numbers_alone_is_zero():
    fm, batch = build_fm(SMALL, NUMERIC_SCHEMA), make_batch(schema=NUMERIC_SCHEMA)
    assert fm.sensitivity(batch, ["embedding"]).tolist() == [0.0]
    assert bool(fm.sensitivity(batch, ["hidden_0"]).any())
