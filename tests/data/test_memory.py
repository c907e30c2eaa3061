"""Reading takes memory for blocks and one period, not for the log."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CODE = """
import re, sys, tempfile, pathlib
from loopfm_ray.data.config import ColumnsConfig
from loopfm_ray.data.events import iterate_periods, read_blocks

def peak():
    # not ru_maxrss: that begins at what the process that started this one had
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

before = peak()
columns = ColumnsConfig(user="user", item="item", event_ts="ts")
blocks = read_blocks(sys.argv[1], columns, block_rows=50_000, label_delay_us=0)
rows = 0
with tempfile.TemporaryDirectory() as folder:
    periods = iterate_periods(
        blocks, pathlib.Path(folder), origin_ts=0, period_us=3_600_000_000, drop_duplicates=False
    )
    for period in periods:
        rows += len(period.rows)
print(rows, peak() - before)
"""
ROWS_AN_HOUR = 100_000


def write_log(path, hours):
    generator = np.random.default_rng(0)
    with pq.ParquetWriter(
        path, pa.schema([("user", pa.int64()), ("item", pa.int64()), ("ts", pa.int64())])
    ) as out:
        for hour in range(hours):
            ts = np.sort(generator.integers(0, 3_600_000_000, ROWS_AN_HOUR)) + hour * 3_600_000_000
            columns = [
                generator.integers(0, 10**9, ROWS_AN_HOUR),
                generator.integers(0, 10**9, ROWS_AN_HOUR),
                ts,
            ]
            out.write_table(
                pa.Table.from_arrays([pa.array(column) for column in columns], schema=out.schema)
            )


@pytest.mark.timeout(240)
def test_a_log_four_times_as_long_takes_no_more_memory(tmp_path):
    peaks = []
    for hours in (8, 32):
        path = tmp_path / f"{hours}.parquet"
        write_log(path, hours)
        result = subprocess.run(
            [sys.executable, "-c", CODE, str(path)],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        rows, peak = (int(value) for value in result.stdout.split())
        assert rows == hours * ROWS_AN_HOUR
        peaks.append(peak)
    assert peaks[1] < 1.5 * peaks[0], peaks
