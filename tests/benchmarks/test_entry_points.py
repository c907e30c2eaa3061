"""`make bench` runs every script that can be asked for its figures, and no helper."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_makefile_lists_exactly_the_benchmarks_that_print_json():
    line = re.search(r"^BENCHMARKS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line is not None
    entry_points = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if 'add_argument("--json"' in path.read_text()
    }
    assert set(line[1].split()) == entry_points
    readme = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"## {name}.py" in readme for name in entry_points)
