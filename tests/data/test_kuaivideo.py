"""KuaiVideo_x1 in its published form; the values are worked out by hand."""

from pathlib import Path

import pytest

from loopfm_ray.data.config import KuaiVideoConfig
from loopfm_ray.data.datasets.kuaivideo import kuaivideo_log
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, DataError
from tests.oracles.logs import DAY_US, readable_examples

HEADER = "timestamp,user_id,item_id,is_click,is_like,is_follow,pos_items,neg_items"
TRAIN = [
    "1000,0,10,1,0,0,,",
    "1500.5,1,11,0,0,0,,10",
    "2000,0,12,0,0,0,10,",
    "6000,0,13,1,1,0,10,12",
]
TEST = ["8000,0,14,1,0,1,10^13,12", "11000,1,14,0,0,0,,10^11"]


def write(folder: Path, train: list[str] = TRAIN, test: list[str] = TEST) -> Path:
    (folder / "train.csv").write_text("\n".join([HEADER, *train]) + "\n")
    (folder / "test.csv").write_text("\n".join([HEADER, *test]) + "\n")
    return folder


def config_for(folder: Path, **settings: object) -> KuaiVideoConfig:
    return KuaiVideoConfig.model_validate({"path": str(folder), "num_buckets": 2, **settings})


def test_the_order_of_time_is_kept_on_a_span_of_days(tmp_path: Path) -> None:
    config = config_for(write(tmp_path), tasks=["is_like"])
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    # 10,000 units are 100 days: 100 units are a day
    days = [0, 5.005, 10, 50, 70, 100]
    assert rows["event_ts"].to_list() == [config.period_origin_ts + round(d * DAY_US) for d in days]
    assert rows["label"].to_list() == [1, 0, 0, 1, 1, 0]
    assert rows["is_like"].to_list() == [0, 0, 0, 1, 0, 0]
    assert data.schema.tasks == ("label", "is_like")
    assert rows["user"].to_list() == ["0", "1", "0", "0", "0", "1"]
    assert rows["item"].to_list() == ["10", "11", "12", "13", "14", "14"]
    assert rows["history"].to_list() == [[], [], [0], [0, 2], [0, 2, 3], [1]]
    words = ["", *data.vocabulary("pos_items").keys]
    found = [[words[i] for i in ids if i] for ids in rows["pos_items"]]
    assert found == [[], [], ["10"], ["10"], ["10", "13"], []]
    words = ["", *data.vocabulary("neg_items").keys]
    found = [[words[i] for i in ids if i] for ids in rows["neg_items"]]
    assert found == [[], ["10"], [], ["12"], ["12"], ["10", "11"]]
    splits = config.split.ranges(*data.log_range)
    sizes = [
        len(read_rows(data.examples.files(span), span)["label"])
        for span in (splits.fm, splits.vm, splits.test)
    ]
    assert sizes == [3, 2, 1]


def test_a_split_whose_files_overlap_in_time_is_read_in_time_order(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    prepare(config_for(write(tmp_path / "a")), tmp_path / "first")
    shuffled = write(tmp_path / "b", [TRAIN[3], TEST[1], TRAIN[0]], [TRAIN[1], TEST[0], TRAIN[2]])
    prepare(config_for(shuffled), tmp_path / "second")
    first, second = (PreparedData.open(tmp_path / name) for name in ("first", "second"))
    assert first.manifest.files == second.manifest.files


def test_files_and_times_that_are_not_there_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks train\.csv, test\.csv; get .*KuaiVideo_x1"):
        kuaivideo_log(config_for(tmp_path))
    write(tmp_path, TRAIN[:1], TRAIN[:1])
    with pytest.raises(DataError, match=r"all timestamps .* 1000"):
        list(kuaivideo_log(config_for(tmp_path)).blocks())
    write(tmp_path, TRAIN, ["later,0,14,1,0,1,,"])
    with pytest.raises(DataError, match=r"test\.csv, line 2, column 'timestamp': found 'later'"):
        list(kuaivideo_log(config_for(tmp_path)).blocks())
