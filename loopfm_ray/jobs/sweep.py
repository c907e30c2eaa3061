"""Run a sweep: trials by Ray Tune, asked of and told to a durable study, then the best ones anew under fresh seeds.

The study is the only memory: Tune begins anew with every driver, and the scheduler is told what the study knows.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from loopfm_ray import log
from loopfm_ray.config import dump_yaml
from loopfm_ray.errors import JobError
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.sweep_confirm import confirm
from loopfm_ray.jobs.sweep_trial import run_trial
from loopfm_ray.report.sweep import build_sweep_report
from loopfm_ray.store.filesystem import remove_tree
from loopfm_ray.store.manifest import code_version
from loopfm_ray.store.tables import write_text
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.study import Outcome, SweepStudy, open_study
from loopfm_ray.sweep.summary import summarise_sweep, write_trial_config

__all__ = ["StudySearch", "make_scheduler", "run_sweep"]

_LOGGER = logging.getLogger(__name__)
_SEEN_S = 20.0
_ENOUGH_FAILURES = 5
"""Failures in a row from the first trial on, after which no further trial is tried."""
_RUNG, _VALUE, _ENDED = "rung", "value", "ended"
_MANY_RUNGS = 1_000_000

Json = dict[str, Any]  # Any: JSON, and what Tune passes through


def run_sweep(config: SweepConfig, *, progress: Progress = silent) -> Json:
    """Run trials until the budget is used up, write `summary.json`, `report.html`, `results.md` and `best/`; return the summary.

    The same command goes on where a killed one stopped; a larger budget goes on with the same study. Several drivers may share it.

    Raises:
        ConfigError: the study was begun with another base, space, objectives or seeds.
        StoreError: its storage can not be opened.
        JobError: no trial can be finished.
        LoopFMError: the confirmation failed; running the same command again goes on there.
    """
    study = open_study(config)
    write_text(config.root / "config.yaml", dump_yaml(config))
    try:
        with _heard(study), connect(config.ray):
            if not study.is_over:
                _search(config, study, progress)
            _check_finished(config, study)
            rows = {row.number: row for row in study.rows()}
            for number in study.best():
                write_trial_config(config, rows[number])
            confirmed = confirm(config, study, progress)
        summary = {**summarise_sweep(config, study, confirmed), "code_versions": [code_version()]}
        is_alone = study.is_alone
    finally:
        study.close()
    write_text(config.root / "summary.json", json.dumps(summary, indent=1))
    build_sweep_report(summary, config.root)
    if is_alone and not config.keep_data:
        _clean(config)
    return summary


@contextmanager
def _heard(study: SweepStudy) -> Iterator[None]:
    """Tell other drivers from time to time that this one lives."""
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(_SEEN_S):
            study.seen()

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _search(config: SweepConfig, study: SweepStudy, progress: Progress) -> None:
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # it warns of metrics files that nobody asked it to write
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints tables whatever `verbose` says
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    search = StudySearch(study, progress)
    is_gpu = not config.is_of_graphs and _uses_gpu(config)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, sweep=config), {"cpu": 1, **({"gpu": 1} if is_gpu else {})}
    )
    folder = config.work / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=make_scheduler(config, study, search),
            num_samples=-1,
            max_concurrent_trials=config.budget.cores,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=config.name,
            storage_path=str(folder.absolute()),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    tuner.fit()
    shutil.rmtree(folder, ignore_errors=True)


def _uses_gpu(config: SweepConfig) -> bool:
    return config.pipeline({}).vms[config.vm].learning.use_gpu


def _trial(config: Json, sweep: SweepConfig) -> None:
    """What runs in a trial's process; a failure is a result like any other, so that the sweep goes on."""
    log.setup("WARNING")
    began = time.perf_counter()

    def report(number: int, value: float) -> None:
        tune.report({_RUNG: number, _VALUE: value})

    try:
        metrics = run_trial(sweep, config["params"], report)
        outcome = Outcome("complete", metrics, time.perf_counter() - began)
    except Exception as error:  # the edge of the process: whatever it was, the trial failed
        _LOGGER.warning("trial %s failed", config["number"], exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        outcome = Outcome("failed", {}, time.perf_counter() - began, reason)
    # as text, for Tune flattens what is nested; it asks for the scheduler's metric in every report
    tune.report({_ENDED: json.dumps(asdict(outcome)), _VALUE: float("nan")})


class StudySearch(Searcher):
    """Asks the study for what Tune runs, and tells it what came of it."""

    def __init__(self, study: SweepStudy, progress: Progress) -> None:
        super().__init__(metric=_VALUE, mode="max" if study.is_maximized else "min")
        self._study, self._progress = study, progress
        self._numbers: dict[str, int] = {}
        self._began: dict[int, float] = {}
        self.pruned: set[str] = set()
        """Trials of Tune that the scheduler has ended."""

    def suggest(self, trial_id: str) -> Json | None:
        """Return the next trial for Tune, or that there is none."""
        self._study.reclaim()
        rows = self._study.rows()
        self._progress("trials", len(rows), self._study.config.budget.num_trials)
        is_hopeless = len(rows) >= _ENOUGH_FAILURES and all(row.state == "failed" for row in rows)
        asked = None if is_hopeless else self._study.ask()
        if asked is None:
            finished: Any = Searcher.FINISHED  # Tune's sentinel is a string
            return finished  # type: ignore[no-any-return]
        self._numbers[trial_id] = asked.number
        self._began[asked.number] = time.perf_counter()
        return {"number": asked.number, "params": asked.params}

    def on_trial_result(self, trial_id: str, result: Json) -> None:
        """Keep a validation."""
        if _RUNG in result and _ENDED not in result:
            self._study.report(self._numbers[trial_id], result[_RUNG], result[_VALUE])

    def on_trial_complete(
        self, trial_id: str, result: Json | None = None, error: bool = False
    ) -> None:
        """Tell the study how a trial ended."""
        number = self._numbers[trial_id]
        seconds = time.perf_counter() - self._began[number]
        ended = (result or {}).get(_ENDED)
        if ended is not None and not error:
            outcome = Outcome(**json.loads(ended))
        elif trial_id in self.pruned:
            outcome = Outcome("pruned", {}, seconds)
        else:
            reason = "its process died: out of memory, or killed from outside; the log of the worker in Ray's session folder has more"
            outcome = Outcome("failed", {}, seconds, reason)
        self._study.tell(number, outcome)
        done = len(self._study.rows())
        self._progress("trials", done, self._study.config.budget.num_trials)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the study is durable by itself."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: the study is durable by itself."""

    def __getstate__(self) -> Json:
        """Tune copies searchers into its snapshots, from which nothing is ever restored."""
        return {"_metric": self._metric, "_mode": self._mode}


def make_scheduler(config: SweepConfig, study: SweepStudy, search: StudySearch) -> TrialScheduler:
    """Return what ends trials early: nothing, or ASHA that knows all trials of the study so far.

    Args:
        config: of the sweep.
        study: of the sweep.
        search: is told which trials are ended.
    """
    if config.scheduler is None:
        return FIFOScheduler()
    settings = config.scheduler
    scheduler = _Asha(
        search,
        time_attr=_RUNG,
        metric=_VALUE,
        mode="max" if study.is_maximized else "min",
        max_t=_MANY_RUNGS,
        grace_period=settings.grace,
        reduction_factor=settings.reduction_factor,
    )
    for number, curve in study.curves():
        scheduler.learn(f"before-{number}", curve)
    return scheduler


class _Asha(ASHAScheduler):
    """ASHA that knows the trials of earlier drivers, and notes which ones it ends."""

    def __init__(self, search: StudySearch, **settings: Any) -> None:  # Any: of ASHAScheduler
        super().__init__(**settings)
        self._search = search

    def learn(self, name: str, curve: list[tuple[int, float]]) -> None:
        """Take over the validations of a trial that ran before."""
        trial = SimpleNamespace(trial_id=name)
        self.on_trial_add(None, trial)
        for rung, value in curve:
            super().on_trial_result(None, trial, {_RUNG: rung, _VALUE: value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Json) -> str:
        """Return whether a trial goes on."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if action == TrialScheduler.STOP:
            self._search.pruned.add(trial.trial_id)
        return action

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the study is durable by itself."""

    def __getstate__(self) -> Json:
        """Tune copies schedulers into its snapshots, from which nothing is ever restored."""
        return {}


def _check_finished(config: SweepConfig, study: SweepStudy) -> None:
    rows = study.rows()
    if any(row.state == "complete" for row in rows):
        return
    reasons = sorted({str(row.reason) for row in rows if row.reason})
    why = f"; {len(rows)} failed, the first by: {reasons[0]}" if reasons else ""
    budget = config.budget
    raise JobError(
        f"sweep {config.name} has no finished trial after {study.used_s:.0f} s and {len(rows)} trials (budget: {budget.num_trials}"
        f" trials, {budget.time_s} s){why}; mend the space or raise the budget and run the same command again"
    )


def _clean(config: SweepConfig) -> None:
    """Remove what is large and quickly made again: latents, joined sets, and the trials' VMs."""
    for folder in (config.work / "upstream").glob("*/seed=*/*"):
        if folder.name in ("latents", "joined"):
            remove_tree(folder)
    for name in ("vms", "checkpoints", "bundles"):
        shutil.rmtree(config.work / name, ignore_errors=True)
    if config.pool is None:
        for folder in config.pool_dir.glob("joined-*"):
            shutil.rmtree(folder)
