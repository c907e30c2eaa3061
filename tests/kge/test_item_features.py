"""Features of items: who has which vector is counted by a slow twin, and a pipeline's data reads them as fields."""

import random

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.config import EventsConfig, SplitConfig
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import DataError
from loopfm_ray.kge.export import KgeEmbeddings, load_kge
from loopfm_ray.kge.item_features import ITEMS_FILE, write_item_features
from tests.kge.test_export import GRAPH, export

# é0 and é1 are trained, `late` is not, `gone` is not in the graph; 5 has no link, 9 is no item
LINKS = {"1": "é0", "2": "é1", "3": "late", "4": "gone", "9": "é2"}
ITEMS = ["5", "1", "2", "3", "4"]


def embeddings_of(vectors, num_trained):
    entities = tuple(f"e{at}" for at in range(len(vectors)))
    fields = dict.fromkeys(KgeEmbeddings.__dataclass_fields__)
    known = {"version": "v", "entities": entities, "vectors": vectors}
    return KgeEmbeddings(**{**fields, **known, "num_train_entities": num_trained})


@pytest.mark.parametrize("unlinked", ["mean", "zeros"])
def test_unlinked_items_take_the_stated_default_and_are_counted(unlinked, tmp_path):
    export(tmp_path / "embeddings")
    found = load_kge(tmp_path / "embeddings")
    manifest = write_item_features(found, LINKS, ITEMS, tmp_path / "items", unlinked)
    table = pq.read_table(tmp_path / "items" / ITEMS_FILE)
    assert table.schema.names == ["item", "kge_linked", *(f"kge_{at}" for at in range(16))]
    assert sum(column.null_count for column in table.columns) == 0
    assert table["item"].to_pylist() == ITEMS
    assert table["kge_linked"].to_pylist() == [0.0, 1.0, 1.0, 0.0, 0.0]
    rows = np.column_stack([table[f"kge_{at}"].to_numpy() for at in range(16)])
    first, second = (found.vectors[GRAPH.entities.index(name)] for name in ("é0", "é1"))
    default = (first + second) / 2 if unlinked == "mean" else np.zeros(16)
    np.testing.assert_allclose(rows, [default, first, second, default, default], atol=1e-7)
    assert manifest.meta == {
        "dimension": 16,
        "unlinked": unlinked,
        "num_items": 5,
        "num_linked": 2,
        "num_without_link": 1,
        "num_without_entity": 1,
        "num_untrained": 1,
        "num_links_without_item": 1,
    }
    assert manifest.inputs == {"embeddings": found.version}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_table_is_that_of_a_plain_loop(seed, tmp_path_factory):
    draw = random.Random(seed)
    num, trained = draw.randint(1, 8), draw.randint(1, 8)
    vectors = np.random.default_rng(seed).normal(size=(num, 3)).astype(np.float32)
    embeddings = embeddings_of(vectors, min(trained, num))
    items = [str(at) for at in range(draw.randint(1, 6))]
    links = {str(at): f"e{draw.randrange(num + 2)}" for at in range(8) if draw.random() < 0.7}
    expected = []
    for item in items:
        name = links.get(item)
        is_known = name in embeddings.entities[: min(trained, num)]
        expected.append(vectors[embeddings.entities.index(name)] if is_known else None)
    linked = [row for row in expected if row is not None]
    path = tmp_path_factory.mktemp("items") / "out"
    if not linked:
        with pytest.raises(DataError, match="none of the"):
            write_item_features(embeddings, links, items, path)
        assert not path.exists()
        return
    manifest = write_item_features(embeddings, links, items, path)
    mean = np.mean(linked, axis=0)
    table = pl.read_parquet(path / ITEMS_FILE)
    rows = table.select("kge_0", "kge_1", "kge_2").to_numpy()
    np.testing.assert_allclose(rows, [mean if row is None else row for row in expected], atol=1e-6)
    names = ("num_linked", "num_without_link", "num_without_entity", "num_untrained")
    assert sum(manifest.meta[name] for name in names) == len(items)
    assert manifest.meta["num_linked"] == len(linked)


def test_items_that_come_twice_are_refused(tmp_path):
    embeddings = embeddings_of(np.ones((2, 3), np.float32), 2)
    with pytest.raises(DataError, match="not distinct: 2 of which 1 differ"):
        write_item_features(embeddings, {"a": "e0"}, ["a", "a"], tmp_path / "out")


def test_links_of_another_graph_are_told_with_both_names(tmp_path):
    embeddings = embeddings_of(np.ones((2, 3), np.float32), 2)
    with pytest.raises(DataError, match=r"such as \['a'\], and to this graph.*'e0'"):
        write_item_features(embeddings, {"a": "x"}, ["a"], tmp_path / "out")


def test_a_pipelines_data_joins_them_as_features_of_the_item(tmp_path):
    """By the `data.items` section as it is: mean and deviation are those of the items met before the FM's window ends."""
    export(tmp_path / "embeddings")
    found = load_kge(tmp_path / "embeddings")
    write_item_features(found, LINKS, ITEMS, tmp_path / "items")
    day = 86_400_000_000
    rows = {
        "user": ["u", "v"] * 5,
        "item": [1, 2, 3, 5, 1, 2, 3, 5, 4, 1],
        "at": [(10 + at) * day for at in range(10)],
    }
    pq.write_table(pa.table(rows), tmp_path / "log.parquet")
    names = ["kge_linked", *(f"kge_{at}" for at in range(16))]
    config = EventsConfig.model_validate(
        {
            "path": str(tmp_path / "log.parquet"),
            "columns": {"user": "user", "item": "item", "event_ts": "at"},
            "items": {
                "path": str(tmp_path / "items" / ITEMS_FILE),
                "key": "item",
                "numeric": names,
            },
            "split": SplitConfig(fm_stop=16 * day, vm_stop=18 * day, valid_s=86_400.0),
            "num_buckets": 2,
        }
    )
    manifest = prepare(config, tmp_path / "out")
    assert manifest.meta["counts"]["items_without_row"] == 0
    data = PreparedData.open(tmp_path / "out")
    fields = {field.name: field for field in data.schema.numeric}
    assert set(names) <= {field.name for field in config.vm_schema(data.schema).numeric}
    table = pl.read_parquet(tmp_path / "items" / ITEMS_FILE)
    raw = {row["item"]: row for row in table.to_dicts()}
    for name in names:
        read = data.items.numeric[name] * fields[name].std + fields[name].mean
        expected = [raw[key][name] for key in data.items.keys[1:]]
        np.testing.assert_allclose(read[1:], expected, atol=1e-5)
    seen = [raw[key]["kge_3"] for key in ("1", "2", "3", "5")]  # 4 comes after the FM's window
    assert fields["kge_3"].mean == pytest.approx(np.mean(seen), abs=1e-6)
