import re
import subprocess
from pathlib import Path

import pytest

from loopfm_ray.report import build_report
from tests.report.example import example_summary

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--window-size=1280,3600",
)


def load(chromium: str, page: Path, tmp_path: Path, *flags: str) -> tuple[str, list[str]]:
    """Return the DOM after scripts ran and what the page wrote to its console."""
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r"^.*CONSOLE.*$", done.stderr, re.MULTILINE)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
def test_charts_are_drawn_without_console_messages(chromium, tmp_path, scheme):
    page = build_report(example_summary(), tmp_path / "report.html")
    flag = f"--blink-settings=preferredColorScheme={scheme}"
    dom, console = load(chromium, page, tmp_path, flag, "--dump-dom")
    assert console == []
    for figure in ("ratio", "calibration", "curve-train", "curve-valid"):
        part = dom.split(f'id="plot-{figure}"')[1].split("</figure>")[0]
        assert part.count('class="main-svg"') >= 1
        assert part.count('class="point') + part.count('class="js-line"') >= 4
    page_ink = {0: "rgb(232, 237, 243)", 1: "rgb(22, 32, 44)"}[scheme]
    assert page_ink in dom


@pytest.mark.timeout(180)
def test_hostile_names_run_nothing(chromium, tmp_path):
    summary = example_summary(seeds=(0,))
    hostile = "<img src=x onerror=console.log(666)><script>console.log(666)</script>"
    summary["name"] = hostile
    summary["models"][hostile] = summary["models"]["vm"]
    summary["transfer_ratio"][hostile] = 0.2
    page = build_report(summary, tmp_path / "report.html")
    dom, console = load(chromium, page, tmp_path, "--dump-dom")
    assert console == []
    assert "<img" not in dom
    assert 'class="main-svg"' in dom


@pytest.mark.timeout(180)
def test_screenshot_is_a_picture(chromium, tmp_path):
    page = build_report(example_summary(), tmp_path / "report.html")
    picture = tmp_path / "report.png"
    load(chromium, page, tmp_path, f"--screenshot={picture}")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 50_000
