"""A made-up summary of a sweep in the shape that the job writes: round numbers to test the page with, measured nowhere."""

import copy
import math
from functools import cache
from typing import Any

from loopfm_ray.analysis.scaling import scaling_record

__all__ = ["LR", "example_sweep"]

LR = "vm.learning.optim.lr"
_KIND, _LEN, _WIDTH = "vm.model.kind", "vm.model.history.user.max_len", "fm.model.embed_dim"
_SPACE = {
    LR: {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
    _KIND: {"kind": "choice", "values": ["dnn", "dcnv2", "masknet"]},
    _LEN: {"kind": "int", "low": 5, "high": 100, "log": True},
    "vm.model.hidden": {"kind": "choice", "values": [[64], [128, 64], [256, 128, 64]]},
    "vm.learning.dropout": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
    _WIDTH: {"kind": "choice", "values": [16, 32, 64, 128]},
}
_STATES = {4: "pruned", 7: "pruned", 11: "pruned", 13: "failed", 18: "pruned", 20: "pruned"}
_INFEASIBLE = (9, 16)


def example_sweep(num_objectives: int = 1) -> dict[str, Any]:
    """Return a whole summary with one objective or two, of which the second is a latency."""
    return copy.deepcopy(_summary(num_objectives))


@cache
def _summary(num_objectives: int) -> dict[str, Any]:
    objectives = [
        {"metric": "ne", "direction": "minimize"},
        {"metric": "serving_p99_ms", "direction": "minimize"},
    ][:num_objectives]
    trials = [_trial(number, num_objectives) for number in range(24)]
    good = [trial for trial in trials if trial["state"] == "complete" and trial["is_feasible"]]
    sane = [trial for trial in good if trial["metrics"]["ne"] < 1]
    return {
        "name": "vm-sweep",
        "objectives": objectives,
        "constraints": [{"metric": "serving_p99_ms", "at_most": 2.0, "at_least": None}],
        "parameters": _SPACE,
        "num_trials": {
            state: sum(trial["state"] == state for trial in trials)
            for state in ("complete", "pruned", "failed")
        },
        "trials": trials,
        "best": _best(good),
        "importance": {
            item["metric"]: {LR: 0.62, _LEN: 0.21, _KIND: 0.11, "vm.learning.dropout": 0.06}
            for item in objectives
        },
        "scaling": [
            scaling_record(
                "fm_num_parameters",
                metric,
                [(trial["metrics"]["fm_num_parameters"], trial["metrics"][metric]) for trial in sane],
            )
            for metric in ("ne", "transfer_ratio")
        ]
        + [scaling_record("fm_num_parameters", "auc", [(1e6, 0.7), (2e6, 0.71)])],
        "confirmed": _confirmed(_best(good)[:2]),
        "seconds": 5_520.0,
        "code_versions": ["0.1.0+abc1234"],
        "config": {"name": "vm-sweep", "space": {LR: {"low": 1e-4, "high": 1e-2}}},
    }  # fmt: skip


def _trial(number: int, num_objectives: int) -> dict[str, Any]:
    state = _STATES.get(number, "complete")
    u, v, w = (math.modf(number * step)[0] for step in (0.618034, 0.754878, 0.569840))
    width = _SPACE[_WIDTH]["values"][number % 4]
    params: dict[str, Any] = {
        LR: 10 ** (-4 + 2 * u),
        _KIND: _SPACE[_KIND]["values"][number % 3],
        _LEN: round(5 * 20**v),
        "vm.model.hidden": _SPACE["vm.model.hidden"]["values"][int(3 * w)],
        "vm.learning.dropout": 0.5 * w,
        _WIDTH: width,
    }
    if params[_KIND] == "masknet":
        del params["vm.learning.dropout"]
    ne = 0.82 + 0.05 * (u - 0.6) ** 2 + 0.006 * (1 - v) + 0.5 * width**-0.5 + 0.003 * w
    ne += 0.9 if number == 2 else 0.05 if state == "pruned" else 0.0
    latency = (2.3 if number in _INFEASIBLE else 0.6) + 1.1 * v * (0.8 + 0.2 * w)
    rungs = {"pruned": 2, "failed": 0}.get(state, 6)
    done = state == "complete"
    return {
        "number": number,
        "state": state,
        "params": params,
        "values": [ne, latency][:num_objectives] if done else None,
        "metrics": {
            "ne": ne,
            "auc": 1.55 - 0.95 * ne,
            "fm_num_parameters": 40_000 * width,
            "transfer_ratio": (0.95 - ne) / 0.15,
            "serving_p99_ms": latency,
        }
        if done
        else {},
        "is_feasible": number not in _INFEASIBLE,
        "seconds": 20.0 + 60 * v if done else 12.0,
        "curve": [[rung, ne + 0.05 * math.exp(-rung / 2)] for rung in range(1, rungs + 1)],
        "reason": "ShapeError: vm.model.hidden does not fit,\nfound [256, 128, 64]; see the log"
        if state == "failed"
        else None,
    }


def _best(good: list[dict[str, Any]]) -> list[int]:
    """Return the trials that no other one beats."""
    values = {trial["number"]: trial["values"] for trial in good}
    return [
        number
        for number, mine in values.items()
        if not any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in values.values()
        )
    ]


def _confirmed(numbers: list[int]) -> dict[str, Any]:
    base = {"name": "base", "trial": None, "file": None, "gain": None, "p": None}
    trials = [
        {
            "name": f"trial {number}",
            "trial": number,
            "file": f"best/trial-{number}.yaml",
            "gain": 0.0123 - 0.02 * place,
            "p": 0.004 + 0.2 * place,
        }
        for place, number in enumerate(numbers)
    ]
    return {
        "seeds": [10, 11, 12],
        "split": "test",
        "configs": [
            {
                **config,
                "mean": {"ne": 0.8891 - 0.01 * place, "auc": 0.7168 + 0.009 * place},
                "sd": {"ne": 0.0011, "auc": 0.0009},
            }
            for place, config in enumerate([base, *trials])
        ],
    }
