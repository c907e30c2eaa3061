import json

import pytest

from loopfm_ray.report import sweep_figures as figures
from tests.report.sweep_example import LR, example_sweep


def traces(figure):
    return {trace["name"]: trace for trace in figure["spec"]["data"] if "name" in trace}


def by_number(summary):
    return {trial["number"]: trial for trial in summary["trials"]}


def test_history_holds_every_trial_with_a_value_and_the_best_so_far():
    summary = example_sweep()
    (figure,) = figures.history_figures(summary)
    trials, shown = by_number(summary), traces(figure)
    assert shown["best"]["x"] == [19]
    assert shown["infeasible"]["x"] == [9, 16]
    assert shown["pruned"]["y"] == [trials[number]["curve"][-1][1] for number in (4, 7, 11, 18, 20)]
    assert sum(len(trace["x"]) for trace in shown.values()) == 23
    line = figure["spec"]["data"][0]
    best, expected = 9.0, []
    for trial in summary["trials"]:
        if trial["state"] == "complete" and trial["is_feasible"]:
            best = min(best, trial["values"][0])
            expected.append((trial["number"], best))
    assert list(zip(line["x"], line["y"], strict=True)) == expected
    assert line["line"]["shape"] == "hv"


def test_best_so_far_rises_when_higher_is_better_and_reaches_the_last_trial():
    summary = example_sweep()
    summary["objectives"][0]["direction"] = "maximize"
    summary["trials"].append({**summary["trials"][13], "number": 24})
    line = figures.history_figures(summary)[0]["spec"]["data"][0]
    assert line["y"] == sorted(line["y"])
    assert line["y"][0] < line["y"][-1] == line["y"][-2]
    assert line["x"][-1] == 24


def test_a_trial_far_worse_than_the_others_is_left_out_of_the_frame_and_said_to_be():
    summary = example_sweep()
    (figure,) = figures.history_figures(summary)
    low, high = figure["spec"]["layout"]["yaxis"]["range"]
    values = [y for trace in traces(figure).values() for y in trace["y"]]
    assert sum(not low <= value <= high for value in values) == 1
    assert max(values) > 1.7 > high
    assert "1 point lies outside of the frame; double-click to see it" in figure["caption"]
    summary["trials"][2]["values"] = [0.9]
    (figure,) = figures.history_figures(summary)
    assert "range" not in figure["spec"]["layout"]["yaxis"]
    assert "frame" not in figure["caption"]


def test_the_frame_leaves_out_low_values_when_higher_is_better():
    summary = example_sweep()
    summary["objectives"] = [{"metric": "auc", "direction": "maximize"}]
    for trial in summary["trials"]:
        trial["values"] = trial["values"] and [trial["metrics"]["auc"]]
        trial["curve"] = []
    low, high = figures.history_figures(summary)[0]["spec"]["layout"]["yaxis"]["range"]
    values = sorted(trial["values"][0] for trial in summary["trials"] if trial["values"])
    assert values[0] < low < values[1]
    assert high > values[-1]


def test_the_front_is_joined_in_order_and_infeasible_trials_are_marked():
    summary = example_sweep(2)
    (figure,) = figures.front_figures(summary)
    trials, shown = by_number(summary), traces(figure)
    line = figure["spec"]["data"][0]
    points = sorted(tuple(trials[number]["values"]) for number in summary["best"])
    assert list(zip(line["x"], line["y"], strict=True)) == points
    assert line["y"] == sorted(line["y"], reverse=True)
    assert shown["infeasible"]["marker"]["symbol"] == "x"
    assert len(shown["infeasible"]["x"]) == 2
    assert "pruned" not in shown
    assert figure["spec"]["layout"]["xaxis"]["range"][1] < 1.7
    assert figure["spec"]["layout"]["yaxis"]["range"][1] < 3
    assert figure["caption"].count("outside of the frame") == 1
    assert figures.front_figures(example_sweep()) == []


def test_three_objectives_are_seen_from_two_and_not_joined():
    summary = example_sweep(2)
    summary["objectives"].append({"metric": "auc", "direction": "maximize"})
    for trial in summary["trials"]:
        trial["values"] = trial["values"] and [*trial["values"], trial["metrics"]["auc"]]
    (figure,) = figures.front_figures(summary)
    assert all(trace["mode"] == "markers" for trace in figure["spec"]["data"])
    assert "seen from two of them" in figure["caption"]
    assert len(figures.history_figures(summary)) == 3


def test_slices_have_the_axis_of_their_parameter():
    summary = example_sweep()
    found = {figure["title"]: figure for figure in figures.slice_figures(summary)}
    assert list(found) == [
        "optim.lr",
        "model.kind",
        "user.max_len",
        "model.hidden",
        "learning.dropout",
        "model.embed_dim",
    ]
    axes = {name: figure["spec"]["layout"]["xaxis"] for name, figure in found.items()}
    assert axes["optim.lr"]["type"] == "log"
    assert "type" not in axes["learning.dropout"]
    assert axes["model.hidden"]["categoryarray"] == ["[64]", "[128, 64]", "[256, 128, 64]"]
    assert axes["model.embed_dim"]["type"] == "category"
    best = by_number(summary)[19]["params"]
    assert traces(found["optim.lr"])["best"]["x"] == [best[LR]]
    dropout = sum(len(trace["x"]) for trace in traces(found["learning.dropout"]).values())
    assert dropout == sum(
        "vm.learning.dropout" in trial["params"] and trial["state"] != "failed"
        for trial in summary["trials"]
    )
    assert dropout < 23


def test_a_parameter_with_a_single_value_has_no_slice():
    summary = example_sweep()
    for trial in summary["trials"]:
        trial["params"]["vm.model.kind"] = "dnn"
    assert "model.kind" not in [figure["title"] for figure in figures.slice_figures(summary)]


def test_curves_are_one_trace_for_each_kind_with_gaps_between_trials():
    summary = example_sweep()
    (figure,) = figures.curve_figures(summary)
    shown = traces(figure)
    assert shown["best"]["x"] == [1, 2, 3, 4, 5, 6, None]
    assert shown["pruned"]["x"] == [1, 2, None] * 5
    assert shown["pruned"]["opacity"] < 1 == shown["best"]["opacity"]
    trace = shown["pruned"]
    assert len(trace["x"]) == len(trace["y"]) == len(trace["text"])
    for trial in summary["trials"]:
        trial["curve"] = trial["curve"][:1]
    assert figures.curve_figures(summary) == []


def test_scaling_is_drawn_from_the_summary_alone():
    summary = example_sweep()
    entry = summary["scaling"][0]
    entry["fit"]["curve"] = [[1e6, 0.9, 0.8, 1.0], [2e6, 0.85, 0.8, 0.9]]
    figure, _, poor = figures.scaling_figures(summary)
    band, line, points = figure["spec"]["data"]
    assert (line["x"], line["y"]) == ([1e6, 2e6], [0.9, 0.85])
    assert (band["x"], band["y"]) == ([1e6, 2e6, 2e6, 1e6], [1.0, 0.9, 0.8, 0.8])
    assert [list(point) for point in zip(points["x"], points["y"], strict=True)] == entry["points"]
    assert len(poor["spec"]["data"]) == 1
    assert poor["caption"].startswith("No fit: a power law needs at least 4 points")


def test_the_text_of_a_fit_holds_the_law_the_interval_and_both_errors():
    fit = {
        "form": "saturating", "offset": 0.8, "scale": -2000.0, "exponent": 0.5, "exponent_interval": [0.4, 0.65],
        "level": 0.9, "r2": 0.987, "pure_error": None, "saturating_error": 0.0054, "num_points": 15, "num_sizes": 5,
        "is_at_limit": True,
    }  # fmt: skip
    text = figures.fit_text({"fit": fit, "reason": None})
    assert text.startswith("0.8000 − 2.0 × 10³ × x^(−0.500); exponent 0.500, 90 % interval 0.400 to 0.650")  # fmt: skip
    assert "Error on sizes left out: saturating 0.0054." in text
    assert "do not tell it" in text
    pure = {**fit, "form": "pure", "offset": 0.0, "scale": 1.25, "pure_error": 0.01, "is_at_limit": False}  # fmt: skip
    text = figures.fit_text({"fit": pure, "reason": None})
    assert text.startswith("1.25 × x^(−0.500);")
    assert "The pure law. Error on sizes left out: pure 0.01, saturating 0.0054." in text
    assert "do not tell it" not in text


@pytest.mark.parametrize("num_objectives", [1, 2])
def test_figures_are_json_without_nan(num_objectives):
    summary = example_sweep(num_objectives)
    summary["trials"][1]["values"][0] = float("nan")
    summary["trials"][4]["curve"] = [[1, 0.9], [2, float("inf")]]
    summary["trials"][3]["params"][LR] = None
    for build in (
        figures.history_figures,
        figures.front_figures,
        figures.slice_figures,
        figures.curve_figures,
        figures.scaling_figures,
    ):
        json.dumps(build(summary), allow_nan=False)
