"""The dashboard and the alarms ask for metrics, labels and words that the code has."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from loopfm_ray.serving.metrics import STAGES
from loopfm_ray.serving.watch import Watch

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARD = json.loads((INFRA / "grafana" / "serving.json").read_text())
PROMETHEUS = yaml.safe_load((INFRA / "prometheus.yml").read_text())
MODEL = ("vm", "stable", "v")


class OneModel:
    """A service with everything that metrics tell of."""

    def summary(self):
        return {"revision": 1, "models": [{"name": "vm"}]}

    def describe(self, name):
        drift = dict.fromkeys(
            (
                "num_rows", "psi_scores", "expected_psi", "psi_history_len", "coverage_difference",
                "unknown_users_difference", "unknown_items_difference",
            ),
            0.0,
        )  # fmt: skip
        variant = {
            "model": {"version": "v"},
            "features": {"version": "l", "space": "s", "watermark_ts": 1},
            "counters": {"reloads": 1, "reload_failures": 1},
            "reference": {},
            "drift": drift,
        }
        shadow = dict.fromkeys(("requests", "rows", "dropped", "failed", "sum_abs_diff"), 1)
        return {
            "name": name,
            "variants": {"stable": variant},
            "shadow": {"version": "v2", "max_abs_diff": 0.1, **shadow},
            "problem": None,
        }


def known():
    """Every sample that a replica can give, with the names of its labels."""

    class Logs:
        class lines:  # noqa: N801 - stands for an attribute
            written = dropped = 0

    watch = Watch(Logs(), Logs(), "me")
    watch.follow(OneModel())
    metrics = watch.metrics
    metrics.count_request(MODEL, ("score", "http"), 200)
    metrics.observe_stages("vm", dict.fromkeys(STAGES, 0.1))
    series = metrics.of(MODEL)
    series.count(1, 2)
    series.count_history("hit", 1.0)
    series.count_unknown("item", 1)
    series.count_scores(np.asarray([0.5]))
    found = {}
    for family in text_string_to_metric_families(watch.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


KNOWN = known()
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for file in PROMETHEUS["rule_files"]
    for group in yaml.safe_load((INFRA / file).read_text())["groups"]
    for rule in group["rules"]
]
EXPRESSIONS = [t["expr"] for panel in PANELS for t in panel["targets"]] + [
    rule["expr"] for rule in RULES
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_what_the_code_gives(expression):
    names = re.findall(r"\b(?:loopfm|process)_[a-z_]+\b", expression)
    assert names or "up{" in expression
    for name in names:
        assert name in KNOWN, f"{name} is no metric of the service"
    allowed = {label for name in names for label in KNOWN[name]} | {"instance", "job", "le"}
    selectors = re.findall(r"([a-z_]+)\s*(?:=~|!=|!~|=(?!=))", expression)
    grouped = re.findall(r"(?:by|on|group_left)\s*\(([^)]*)\)", expression)
    used = {*selectors, *(label.strip() for part in grouped for label in part.split(","))} - {""}
    assert used <= allowed, used - allowed
    for stage in re.findall(r'stage!?="([^"]*)"', expression):
        assert stage in STAGES
    assert expression.count("(") == expression.count(")")


def test_every_metric_of_ours_is_on_the_dashboard():
    ours = {name for name in KNOWN if name.startswith("loopfm_")}
    shown = {name for text in EXPRESSIONS for name in re.findall(r"loopfm_[a-z_]+", text)}
    asked = {name for name in ours if not name.endswith(("_sum", "_count", "_bucket", "_created"))}
    assert asked - shown == {"loopfm_shadow_requests_total"}  # rows tell it


def test_the_dashboard_can_be_imported():
    assert {"title", "uid", "schemaVersion", "panels", "templating"} <= set(DASHBOARD)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & mine, panel["title"]
        cells |= mine
    names = {one["name"] for one in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    assert {name for name in re.findall(r"\$\{?(\w+)", text) if not name.startswith("__")} == names
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_prometheus_finds_the_replicas_by_the_files_that_they_write():
    (job,) = PROMETHEUS["scrape_configs"]
    (where,) = job["file_sd_configs"]
    assert where["files"][0].endswith("/replica-*.json")
    assert all({"alert", "expr", "annotations"} <= set(rule) for rule in RULES)
