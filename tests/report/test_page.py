import html
import json
import math
import re
from html.parser import HTMLParser

import pytest

from loopfm_ray.errors import DataError
from loopfm_ray.report import build_report, render_report
from tests.report.example import example_summary

OPTIONAL = (
    "code_version",
    "seeds",
    "transfer_ratio",
    "transfer_ratio_kind",
    "gain",
    "relative_auc_gain_over_kd",
    "per_seed",
    "curves",
    "calibration_bins",
    "channel",
    "history",
    "audit",
    "parity",
    "scored_request",
    "sizes",
    "seconds",
    "config",
)
HOSTILE = "</script><img src=x onerror=alert(1)>\"'{{7*7}}<b>"


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: list[str] = []
        self.rows: dict[str, list[float | None]] = {}
        self.values: list[float] = []
        self.titles: list[str] = []
        self._row: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "section":
            self.sections.append(found["id"])
        elif tag == "tr":
            self._row = found.get("data-model")
        elif tag == "data":
            value = float(found["value"]) if found["value"] else None
            if value is not None:
                self.values.append(value)
            if self._row is not None:
                self.rows.setdefault(self._row, []).append(value)
        elif tag == "abbr":
            self.titles.append(found["title"])

    def handle_endtag(self, tag):
        if tag == "tr":
            self._row = None


def figures_of(text: str) -> dict:
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL
    )
    return json.loads(found.group(1))


@pytest.fixture(scope="module")
def text() -> str:
    return render_report(example_summary())


def test_table_shows_the_numbers_of_the_summary(text):
    summary, page = example_summary(), Page(text)
    assert list(page.rows) == ["fm", "vm", "vm_kd", "vm_loopfm", "vm_kd_loopfm", "vm_raw"]
    for name, record in summary["models"].items():
        gain = summary["gain"].get(name, {}).get("ne")
        assert page.rows[name] == [
            record["test"]["ne"],
            gain,
            record["test"]["auc"],
            record["test"]["gauc"],
            record["test"]["calibration"],
            summary["transfer_ratio"].get(name),
            record["num_parameters"],
            record["seconds"],
        ]


def test_page_holds_every_single_number(text):
    summary, values = example_summary(), Page(text).values
    expected = [
        *summary["data"].values(),
        *summary["seconds"].values(),
        *summary["sizes"].values(),
        *(summary["audit"][name] for name in ("num_checked", "num_leaks", "num_entries")),
        *summary["audit"]["margin_s"].values(),
        *summary["history"]["coverage_by_age"].values(),
        *summary["parity"].values(),
        *summary["channel"]["variance_explained"].values(),
        *summary["history"]["staleness_s"].values(),
        summary["history"]["coverage"],
        summary["relative_auc_gain_over_kd"],
    ]
    for value in expected:
        assert isinstance(value, str) or value in values


def test_headline_says_what_the_transfer_gave(text):
    summary = example_summary()
    whole, kd = (summary["transfer_ratio"][name] for name in ("vm_kd_loopfm", "vm_kd"))
    found = html.unescape(re.search(r"<h1>(.*?)</h1>", text).group(1))
    assert found.startswith(f"{100 * whole:.1f} % of the foundation model")
    assert found.endswith(f"with distillation alone it is {100 * kd:.1f} %.")


def test_headline_admits_that_nothing_was_transferred():
    summary = example_summary()
    summary["transfer_ratio"]["vm_kd_loopfm"] = -0.031
    found = re.search(r"<h1>(.*?)</h1>", render_report(summary)).group(1)
    assert found.startswith("Nothing reached the small model")
    assert "−3.1 %" in found


def test_figures_hold_the_numbers_and_the_baseline(text):
    summary, figures = example_summary(), figures_of(text)
    assert set(figures) == {"ratio", "calibration", "curve-train", "curve-valid"}
    assert figures["ratio"]["data"][0]["x"] == list(summary["transfer_ratio"].values())
    assert "first launch, baseline vm" in text
    calibration = figures["calibration"]["data"]
    assert calibration[0]["x"] == [b["mean_prediction"] for b in summary["calibration_bins"]["fm"]]
    valid = figures["curve-valid"]["data"]
    assert len(valid) == 6 * 3
    assert valid[0]["y"] == [
        p["value"]
        for p in summary["curves"]
        if (p["run"], p["seed"], p["split"]) == ("fm", 0, "valid")
    ]


def test_long_curve_is_thinned_and_keeps_its_last_point():
    summary = example_summary()
    point = {"run": "vm", "seed": 0, "split": "train", "name": "logloss"}
    summary["curves"] = [{**point, "step": step, "value": 1 / (1 + step)} for step in range(5000)]
    trace = figures_of(render_report(summary))["curve-train"]["data"][0]
    assert len(trace["x"]) <= 400
    assert trace["x"][-1] == 4999


def test_every_column_is_defined_on_hover(text):
    page = Page(text)
    headers = re.findall(r'<th scope="col"><abbr title="[^"]+">([^<]+)</abbr>', text)
    assert headers[:8] == [
        "NE", "NE gain", "AUC", "gAUC", "Calibration", "Transfer ratio", "Parameters", "Time",
    ]  # fmt: skip
    assert all(page.titles)


def test_page_loads_nothing_and_is_small(tmp_path):
    out = build_report(example_summary(), tmp_path / "deep" / "report.html")
    assert out.stat().st_size < 5_000_000
    text = out.read_text(encoding="utf-8")
    for tag, attributes in Page(text).tags:
        assert tag not in ("iframe", "object", "embed", "form", "base")
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_same_summary_gives_the_same_bytes(text):
    assert render_report(example_summary()) == text


def test_hostile_strings_are_escaped():
    summary = example_summary()
    summary.update(name=HOSTILE, code_version=HOSTILE, transfer_ratio_kind=HOSTILE)
    summary["data"]["kind"] = HOSTILE
    summary["models"][HOSTILE] = summary["models"]["vm_kd"]
    summary["transfer_ratio"][HOSTILE] = 0.3
    summary["calibration_bins"][HOSTILE] = summary["calibration_bins"]["vm"]
    summary["curves"].append(
        {"run": HOSTILE, "seed": 0, "split": "valid", "name": "ne", "step": 1, "value": 0.9}
    )
    summary["seconds"][HOSTILE] = 1.0
    summary["history"]["staleness_s"][HOSTILE] = 1.0
    summary["config"] = {HOSTILE: HOSTILE}
    summary["scored_request"] = {"request": {HOSTILE: HOSTILE}, "response": [HOSTILE]}
    text = render_report(summary)
    assert "<img" not in text
    assert "49" not in re.search(r"<title>(.*?)</title>", text).group(1)
    assert text.count("</script>") == 3
    assert not [attributes for _, attributes in Page(text).tags if "onerror" in attributes]
    labels = figures_of(text)["ratio"]["data"][0]["y"]
    assert not [label for label in labels if "<" in label]


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_missing_part_is_left_out(part):
    summary = example_summary()
    del summary[part]
    text = render_report(summary)
    assert "models" in Page(text).sections
    assert "None" not in text.split('id="plotly"')[0]


@pytest.mark.parametrize("part", OPTIONAL)
def test_a_null_part_counts_as_missing(part):
    missing, null = example_summary(), {**example_summary(), part: None}
    del missing[part]
    assert render_report(null) == render_report(missing)


def test_smallest_summary_gives_a_page_without_charts():
    summary = {
        "name": "small",
        "data": {"kind": "events"},
        "models": {"vm": {"test": {"ne": 0.9, "auc": 0.7}}},
    }
    text = render_report(summary)
    assert Page(text).sections == ["models", "data"]
    assert figures_of(text) == {}
    assert len(text) < 100_000


def test_values_that_are_not_finite_are_shown_as_missing():
    summary = example_summary()
    summary["models"]["vm"]["test"]["gauc"] = None
    summary["transfer_ratio"]["vm_kd"] = math.nan
    summary["curves"][0]["value"] = math.nan
    summary["calibration_bins"]["vm"][0]["mean_label"] = math.nan
    summary["calibration_bins"]["fm"] = [
        {"mean_prediction": math.nan, "mean_label": math.nan, "count": 0}
    ]
    text = render_report(summary)
    assert "NaN" not in text.split('id="plotly"')[0]
    assert 'value=""' in text


def test_parts_of_the_channel_may_be_unknown():
    summary = example_summary()
    summary["channel"] = {"latent_dim": 32, "variance_explained": {"code": 0.5}}
    summary["history"] = {"coverage": 0.5}
    summary["parity"] = {"max_abs_diff": 0.0}
    text = render_report(summary)
    assert "32 values" in text
    assert 'at most <b><data value="0.0">0</data></b>.' in text


def test_leak_is_shown_in_the_colour_of_failure():
    summary = example_summary()
    summary["audit"] = {"num_checked": 10, "num_leaks": 1}
    assert 'class="bad">✗ <data value="1">1</data> leak</b>' in render_report(summary)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("name",), "name: missing"),
        (("data",), "data: missing"),
        (("data", "kind"), "data.kind: missing"),
        (("models",), "models: missing"),
        (("models", "vm", "test"), "models.vm.test: missing"),
        (("models", "vm", "test", "ne"), "models.vm.test.ne: missing"),
        (("curves", 3, "step"), "curves.3.step: missing"),
        (("audit", "num_leaks"), "audit.num_leaks: missing"),
    ],
)
def test_wrong_summary_names_the_missing_key(path, named):
    summary = example_summary()
    node = summary
    for part in path[:-1]:
        node = node[part]
    del node[path[-1]]
    with pytest.raises(DataError, match=re.escape(named)):
        render_report(summary)


def test_summary_without_models_is_refused():
    with pytest.raises(DataError, match="models: empty"):
        render_report({**example_summary(), "models": {}})


def test_data_that_its_publisher_simulated_is_said_to_be(text):
    assert "its publisher calls the data simulated" in text
    assert "they were sampled by popularity" in text


def test_data_with_impressions_has_no_note_on_sampling():
    summary = example_summary()
    summary["data"]["kind"] = "new"
    summary["config"] = {"data": {"kind": "new"}}
    text = render_report(summary)
    assert "they were sampled" not in text
    assert "simulated" not in text


def test_alarms_of_freshness_are_shown(text):
    alarm = example_summary()["history"]["alarms"][0]
    assert alarm in html.unescape(text)
    assert "newest event at most 7.0 d old" in text
