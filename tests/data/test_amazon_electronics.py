"""AmazonElectronics_x1 in its published form; the values are worked out by hand."""

from pathlib import Path

import polars as pl
import pytest

from loopfm_ray.data.config import AmazonElectronicsConfig
from loopfm_ray.data.datasets.amazon_electronics import LAST_TS, amazon_electronics_log
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, DataError
from tests.oracles.logs import DAY_US, readable_examples

HEADER = "label,user_id,item_id,cate_id,item_history,cate_history"
CATE = {"1": "7", "2": "8", "3": "7", "4": "9", "5": "8", "6": "9"}


def row(label: int, user: str, item: str, *history: str) -> str:
    cates = "^".join(CATE[key] for key in history)
    return f"{label},{user},{item},{CATE[item]},{'^'.join(history)},{cates}"


# user 0 reviews 1 2 3 4 5 6, user 1 reviews 2 6 1; the negatives are shuffled among the positives
TRAIN = [
    row(1, "0", "3", "1", "2"),
    row(0, "0", "6", "1"),
    row(1, "1", "6", "2"),
    row(0, "1", "3", "2"),
    row(1, "0", "2", "1"),
    row(0, "0", "5", "1", "2"),
    row(1, "0", "4", "1", "2", "3"),
    row(0, "0", "2", "1", "2", "3"),
    row(1, "0", "5", "1", "2", "3", "4"),
    row(0, "0", "1", "1", "2", "3", "4"),
]
TEST = [
    row(1, "0", "6", "1", "2", "3", "4", "5"),
    row(0, "0", "3", "1", "2", "3", "4", "5"),
    row(1, "1", "1", "2", "6"),
    row(0, "1", "4", "2", "6"),
]


def write(folder: Path, train: list[str] = TRAIN, test: list[str] = TEST) -> Path:
    (folder / "train.csv").write_text("\n".join([HEADER, *train]) + "\n")
    (folder / "test.csv").write_text("\n".join([HEADER, *test]) + "\n")
    return folder


def config_for(folder: Path) -> AmazonElectronicsConfig:
    return AmazonElectronicsConfig(path=str(folder), num_buckets=2)


def test_reviews_are_laid_out_back_from_the_last_of_each_user(tmp_path: Path) -> None:
    config = config_for(write(tmp_path))
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    found = [
        (r["user"], r["item"], int(r["label"]), (LAST_TS - r["event_ts"]) // DAY_US)
        for r in rows.iter_rows(named=True)
    ]
    assert sorted(found, key=lambda f: (-f[3], f)) == [
        ("0", "2", 1, 4),
        ("0", "6", 0, 4),
        ("0", "3", 1, 3),
        ("0", "5", 0, 3),
        ("0", "2", 0, 2),
        ("0", "4", 1, 2),
        ("0", "1", 0, 1),
        ("0", "5", 1, 1),
        ("1", "3", 0, 1),
        ("1", "6", 1, 1),
        ("0", "3", 0, 0),
        ("0", "6", 1, 0),
        ("1", "1", 1, 0),
        ("1", "4", 0, 0),
    ]
    items = {r["example_id"]: r["item"] for r in rows.iter_rows(named=True)}
    histories = {
        (r["user"], r["item"]): [items[i] for i in r["history"]]
        for r in rows.filter(pl.col("event_ts") == LAST_TS).iter_rows(named=True)
    }
    # the first review of a user is no row; negatives never happened
    assert histories == {
        ("0", "6"): ["2", "3", "4", "5"],
        ("0", "3"): ["2", "3", "4", "5"],
        ("1", "1"): ["6"],
        ("1", "4"): ["6"],
    }
    words = ["", *data.vocabulary("item_history").keys]
    shown = {
        (r["user"], r["item"]): [words[i] for i in r["item_history"] if i]
        for r in rows.iter_rows(named=True)
    }
    assert shown[("0", "6")] == ["1", "2", "3", "4", "5"]
    assert shown[("1", "6")] == ["2"]
    table = pl.read_parquet(tmp_path / "out/items.parquet")
    cates = ["", *data.vocabulary("cate_id").keys]
    keys = ["", *data.vocabulary("item").keys]
    by_item = {key: cates[cate] for key, cate in zip(keys, table["cate_id"], strict=True) if key}
    assert by_item == CATE


def test_the_test_window_is_the_published_test_set(tmp_path: Path) -> None:
    config = config_for(write(tmp_path))
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    splits = config.split.ranges(*data.log_range)
    spans = (splits.fm, splits.vm_train, splits.vm_valid, splits.test)
    sizes = [data.examples.num_rows(span) for span in spans]
    assert sizes == [4, 2, 4, len(TEST)]
    test = read_rows(data.examples.files(splits.test), splits.test)
    assert test["label"].tolist().count(1) == 2


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            [*TRAIN, row(1, "2", "1", "2")],
            TEST,
            r"train\.csv, line 12, column 'item_history'.*None",
        ),
        ([*TRAIN, row(1, "1", "1", "2", "6")], TEST, r"train\.csv, line 12.*history of 2 items"),
        (TRAIN, [*TEST, row(1, "1", "3", "2")], "user 1 has test rows with histories of different"),
        (TRAIN, [*TEST, "1,1,3,9,2^6,8^9"], r"item_id '3' comes with different values"),
    ],
)
def test_rows_that_do_not_fit_together_are_errors(
    tmp_path: Path, train: list[str], test: list[str], words: str
) -> None:
    config = config_for(write(tmp_path, train, test))
    with pytest.raises(DataError, match=words):
        prepare(config, tmp_path / "out")


def test_missing_files_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test.csv").unlink()
    with pytest.raises(ConfigError, match=r"lacks test\.csv; get .*AmazonElectronics_x1"):
        amazon_electronics_log(config_for(tmp_path))
