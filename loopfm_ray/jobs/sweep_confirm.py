"""Train the best trials of a sweep and its base config anew under fresh seeds, and look at the test window, once.

The best of many trials is partly luck; this tells how much of it is left.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from loopfm_ray.analysis.significance import paired_test
from loopfm_ray.config import dump_yaml
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.evaluate import read_record
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.stages import STAGES, evaluation_path
from loopfm_ray.metrics.transfer import relative_gain
from loopfm_ray.store.pool import Pool
from loopfm_ray.store.tables import write_text
from loopfm_ray.sweep.config import ConfirmConfig, SweepConfig
from loopfm_ray.sweep.study import SweepStudy
from loopfm_ray.sweep.summary import write_trial_config

__all__ = ["confirm"]

_STAGES = (
    "prepare",
    "train-fm",
    "compress",
    "materialize",
    "join",
    "audit",
    "train-vm",
    "evaluate",
)
_BASE = "base"
_SHOWN = ("ne", "auc", "gauc", "logloss", "calibration")

Json = dict[str, Any]  # Any: JSON


def confirm(config: SweepConfig, study: SweepStudy, progress: Progress) -> Json | None:
    """Return what the best trials and the base reach on the test window; None if it is not asked for.

    What was found once stays: a larger budget later does not look again.

    Raises:
        LoopFMError: a stage failed; running the same command again goes on there.
    """
    asked, path = config.confirm, config.root / "confirmed.json"
    if asked is None:
        return None
    if path.is_file():
        found: Json = json.loads(path.read_text(encoding="utf-8"))
        return found
    rows = {row.number: row for row in study.rows()}
    chosen = {f"trial {number}": number for number in _chosen(config, study, asked)}
    configs = {
        _BASE: config.pipeline({}),
        **{name: config.pipeline(rows[number].params) for name, number in chosen.items()},
    }
    tests = {}
    for done, (name, pipeline) in enumerate(configs.items()):
        progress("confirm", done, len(configs))
        tests[name] = _test_metrics(config, asked, name, pipeline)
    progress("confirm", len(configs), len(configs))
    result: Json = {
        "seeds": list(asked.seeds),
        "split": "test",
        "after_trials": len(rows),
        "configs": [
            {
                "name": name,
                "trial": chosen.get(name),
                "file": None if name == _BASE else f"best/trial-{chosen[name]}.yaml",
                **_compared(tests[name], tests[_BASE], is_base=name == _BASE),
            }
            for name in configs
        ],
    }
    for number in chosen.values():
        write_trial_config(config, rows[number])
    write_text(path, json.dumps(result, indent=1))
    return result


def _chosen(config: SweepConfig, study: SweepStudy, asked: ConfirmConfig) -> list[int]:
    front = set(study.best())
    ranked = study.ranked()
    if len(config.objectives) > 1:
        ranked = [number for number in ranked if number in front]
    return ranked[: asked.top]


def _test_metrics(
    config: SweepConfig, asked: ConfirmConfig, name: str, pipeline: PipelineConfig
) -> list[dict[str, float]]:
    """Return the test metrics of the tuned VM under each seed."""
    own = pipeline.model_copy(
        update={
            "name": name.replace(" ", "-"),
            "run_dir": str(config.work / "confirm"),
            "seeds": asked.seeds,
            "vms": {item: pipeline.vms[item] for item in pipeline.vms if item == config.vm},
            "baseline": config.vm,
            "kd": config.vm,
        }
    )
    own.paths.records.mkdir(parents=True, exist_ok=True)
    write_text(own.paths.config, dump_yaml(own))
    context = Context(own, silent, pool=Pool(config.pool_dir), any_code=True)
    for stage in _STAGES:
        STAGES[stage](context)
    found = []
    for seed in asked.seeds:
        record = read_record(evaluation_path(own, seed, config.vm))
        assert record is not None
        found.append(record.test)
    return found


def _compared(
    mine: Sequence[dict[str, float]], base: Sequence[dict[str, float]], *, is_base: bool
) -> Json:
    names = [name for name in _SHOWN if all(name in one for one in mine)]
    auc, base_auc = ([one["auc"] for one in tests] for tests in (mine, base))
    test = None if is_base else paired_test(auc, base_auc)
    return {
        "mean": {name: float(np.mean([one[name] for one in mine])) for name in names},
        "sd": {name: float(np.std([one[name] for one in mine], ddof=1)) for name in names},
        "gain": None
        if is_base
        else relative_gain(float(np.mean(base_auc)), float(np.mean(auc)), is_lower_better=False),
        "p": None if test is None else test.p,
    }
