from dataclasses import replace

import pytest
import torch

from loopfm_ray.errors import StoreError
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.sharded.config import ShardedConfig, table_factory
from loopfm_ray.models.sharded.group import SoloGroup
from loopfm_ray.train.shards import gather_tables
from loopfm_ray.train.weights import adopt_weights
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch


def build(known, tables_of=FieldEmbeddings, **changed):
    """An FM that knows so many items."""
    fields = [
        replace(field, cardinality=known) if field.name == "item" else field
        for field in SCHEMA.fields
    ]
    schema = replace(SCHEMA, fields=tuple(fields))
    config = FmConfig(embed_dim=4, history_dim=6, hidden=(8, 5)).model_copy(update=changed)
    return build_fm(config, schema, ITEM_FIELDS, tables_of).eval()


def test_an_fm_begins_with_the_weights_of_one_that_knew_fewer_items():
    torch.manual_seed(0)
    parent, model = build(11), build(15)
    fresh = model.state_dict()
    fresh = {name: value.clone() for name, value in fresh.items()}
    batch = make_batch()  # its items are all below 11
    assert not torch.equal(model(batch).logit, parent(batch).logit)
    adopt_weights(model, parent)
    assert torch.equal(model(batch).logit, parent(batch).logit)
    table = next(m for m in model.modules() if isinstance(m, FieldEmbeddings))
    (name,) = [key for key, value in fresh.items() if value.shape == table.weight.shape]
    new_rows = table.table("item")[11:]
    start = table.offsets(["item"])[0] + 11
    assert torch.equal(new_rows, fresh[name][start : start + 4])


def test_an_fm_with_sharded_tables_begins_with_those_of_a_written_one():
    parent = build(11)
    model = build(15, table_factory(ShardedConfig(), SoloGroup(), 0))
    batch = make_batch()
    adopt_weights(model, parent)
    torch.testing.assert_close(model(batch).logit, parent(batch).logit, atol=1e-6, rtol=0)
    gather_tables(model)
    torch.testing.assert_close(model(batch).logit, parent(batch).logit, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("parent", "message"),
    [({"known": 20}, "more ids"), ({"known": 9, "hidden": (8, 6)}, r"expected \[5, 8\]")],
)
def test_an_fm_of_another_shape_is_no_beginning(parent, message):
    with pytest.raises(StoreError, match=message):
        adopt_weights(build(15), build(**parent))
