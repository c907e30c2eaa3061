"""Reading published files takes memory for blocks and one period or part of the users, not for the files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

COMMON = """
import re, sys, tempfile, pathlib
from loopfm_ray.data.config import KuaiVideoConfig
from loopfm_ray.data.datasets.behaviors import with_behaviors
from loopfm_ray.data.datasets.kuaivideo import kuaivideo_log
from loopfm_ray.data.datasets.published import PublishedFile
from loopfm_ray.data.events import iterate_periods
import numpy as np, pyarrow as pa

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

folder, scale = pathlib.Path(sys.argv[1]), int(sys.argv[2])
before = peak()
"""
IMPRESSIONS = """
config = KuaiVideoConfig(path=str(folder), span_days=10 * scale)
rows = 0
with tempfile.TemporaryDirectory() as spill:
    periods = iterate_periods(
        kuaivideo_log(config).blocks(), pathlib.Path(spill), origin_ts=config.period_origin_ts,
        period_us=config.period_us, drop_duplicates=True,
    )
    for period in periods:
        rows += len(period.rows) + period.num_dropped
print(rows, peak() - before)
"""
BEHAVIORS = """
asked = pa.table({"user": np.arange(2000), "time_stamp": np.full(2000, 10**6)})
log = PublishedFile(folder / "behavior_log.csv")
blocks = with_behaviors(iter([asked]), log, 50, None, num_parts=64, buffer_rows=50_000)
rows = sum(block.num_rows for block in blocks)
print(rows, peak() - before)
"""


def write_impressions(folder: Path, num_rows: int) -> int:
    generator = np.random.default_rng(0)
    part = {"timestamp": np.sort(generator.integers(0, 10**9, num_rows))}
    part |= {name: generator.integers(0, 10**6, num_rows) for name in ("user_id", "item_id")}
    part |= {name: generator.integers(0, 2, num_rows) for name in ("is_click", "is_like", "is_follow")}  # fmt: skip
    frame = pl.DataFrame(part).with_columns(pos_items=pl.lit("1^22^333^4444"), neg_items=pl.lit(""))
    frame.write_csv(folder / "train.csv")
    frame.tail(1000).write_csv(folder / "test.csv")
    return num_rows + 1000


def write_behaviors(folder: Path, num_rows: int) -> int:
    generator = np.random.default_rng(0)
    names = {"user": 10**5, "time_stamp": 10**6, "btag": 1, "cate": 10**4, "brand": 10**5}
    part = {name: generator.integers(0, stop, num_rows) for name, stop in names.items()}
    pl.DataFrame(part).with_columns(btag=pl.lit("pv")).write_csv(folder / "behavior_log.csv")
    return 2000


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("write", "code", "num_rows", "times"),
    [
        (write_impressions, IMPRESSIONS, 400_000, 4),
        # fewer would not fill the blocks that Arrow reads ahead
        (write_behaviors, BEHAVIORS, 1_200_000, 3),
    ],
)
def test_a_longer_file_takes_no_more_memory(tmp_path, write, code, num_rows, times):
    peaks = []
    for scale in (1, times):
        folder = tmp_path / str(scale)
        folder.mkdir()
        expected = write(folder, num_rows * scale)
        result = subprocess.run(
            [sys.executable, "-c", COMMON + code, str(folder), str(scale)],
            capture_output=True,
            text=True,
            check=True,
            timeout=280,
        )
        rows, peak = (int(value) for value in result.stdout.split())
        assert rows == expected
        peaks.append(peak)
    assert peaks[1] < 1.5 * peaks[0], peaks
