"""The durable study of a sweep: an Optuna study that outlives its drivers, and that several drivers may share.

A trial belongs to the driver that asked for it. When that driver is gone, the trial is closed and its params are queued again, so none is
lost; what is finished is never asked for again. Optuna samples; when a trial is done is decided here.

Optuna: Akiba et al., KDD 2019, arXiv 1907.10902.
"""

import json
import logging
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from loopfm_ray.config import config_hash
from loopfm_ray.errors import ConfigError
from loopfm_ray.store.locks import is_locked, take_lock
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.sampling import excess_of, grid_of, make_sampler
from loopfm_ray.sweep.space import Params, suggest_params
from loopfm_ray.sweep.storage import open_storage, without_secret

__all__ = ["Asked", "Outcome", "SweepStudy", "TrialRow", "open_study"]

_LOGGER = logging.getLogger(__name__)
_SETTINGS, _DRIVER, _SECONDS = "settings", "driver:", "seconds:"
_LOST_S = 120.0
"""A driver on another machine that was not heard of for so long is gone."""
_NAMING_S = 30.0
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_RETRIES = 3

Json = Any  # Any: JSON, as Optuna keeps attributes


@dataclass(frozen=True)
class Asked:
    """A trial to run."""

    number: int
    params: Params


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    state: Literal["complete", "pruned", "failed"]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str | None = None
    """Of one that failed."""


@dataclass(frozen=True)
class TrialRow:
    """A trial that has ended, as the summary shows it."""

    number: int
    state: str
    params: Params
    values: tuple[float, ...] | None
    metrics: dict[str, float | None]
    is_feasible: bool
    seconds: float
    curve: tuple[tuple[int, float], ...]
    reason: str | None


def open_study(config: SweepConfig) -> "SweepStudy":
    """Open the study of a sweep, or make it; closes what drivers that are gone left behind.

    Raises:
        ConfigError: the study was made with another base, space, objectives or seeds.
        StoreError: its storage can not be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes")
    config.root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(config)
    directions = [
        StudyDirection.MAXIMIZE if one.is_maximized else StudyDirection.MINIMIZE
        for one in config.objectives
    ]
    study = optuna.create_study(
        storage=storage, study_name=config.name, directions=directions, load_if_exists=True
    )
    _check_settings(study, config)
    opened = SweepStudy(config, study)
    opened.reclaim()
    return opened


def _check_settings(study: optuna.Study, config: SweepConfig) -> None:
    mine = config.study_settings
    found = study.user_attrs.get(_SETTINGS)
    if found is None:
        study.set_user_attr(_SETTINGS, json.loads(json.dumps(mine)))
        study.set_metric_names([one.metric for one in config.objectives])
        return
    differs = sorted(name for name in mine if config_hash(mine[name]) != config_hash(found[name]))
    if differs:
        where = without_secret(str(config.storage or config.root / "study.log"))
        raise ConfigError(
            f"the study {config.name} in {where} was begun with other {', '.join(differs)}: its trials can not be compared with"
            " those of this config. Take back the change, or set another `name` and begin a new study; only budget, sampler,"
            " scheduler, confirm, scaling, record and ray may change"
        )


class SweepStudy:
    """One driver's hold on the study. Close it."""

    def __init__(self, config: SweepConfig, study: optuna.Study) -> None:
        self.config = config
        self._study = study
        self._id = uuid.uuid4().hex
        self._began_s = time.monotonic()
        self._before_s = sum(
            float(value) for key, value in study.user_attrs.items() if key.startswith(_SECONDS)
        )
        self._lock = take_lock(self._lock_path(self._id))
        self._open: dict[int, optuna.Trial] = {}
        drivers = sum(key.startswith(_DRIVER) for key in study.user_attrs)
        study.sampler = make_sampler(config, seed=1009 * config.sampler.seed + drivers)
        self.seen()

    def close(self) -> None:
        """Give the study back: trials that this driver has not ended are queued again by the next one."""
        self.seen()
        self._lock.close()
        self._lock_path(self._id).unlink(missing_ok=True)

    def seen(self) -> None:
        """Tell other drivers that this one lives, and how long it has worked; call it every half minute."""
        self._study.set_user_attr(_DRIVER + self._id, time.time())
        self._study.set_user_attr(_SECONDS + self._id, time.monotonic() - self._began_s)

    @property
    def is_maximized(self) -> bool:
        """Whether a larger first objective is better."""
        return self.config.objectives[0].is_maximized

    @property
    def used_s(self) -> float:
        """Wall time of all commands so far, this one included."""
        return self._before_s + time.monotonic() - self._began_s

    def reclaim(self) -> int:
        """Close the trials of drivers that are gone and queue their params again; return how many.

        Params that were lost three times are given up.
        """
        alive = {self._id, *self._alive()}
        lost = [
            trial
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if trial.user_attrs.get("driver") not in alive and not _is_new(trial)
        ]
        for trial in lost:
            retries = int(trial.user_attrs.get("retries", 0))
            gave_up = retries >= _RETRIES
            reason = "its driver was stopped" + (f" {retries + 1} times" if gave_up else "")
            self._close_lost(trial, reason, is_counted=gave_up)
            if not gave_up and trial.params:
                self._study.enqueue_trial(dict(trial.params), user_attrs={"retries": retries + 1})
        return len(lost)

    def _close_lost(self, trial: FrozenTrial, reason: str, *, is_counted: bool) -> None:
        storage, key = self._study._storage, trial._trial_id
        storage.set_trial_user_attr(key, "reason", reason)
        storage.set_trial_user_attr(key, "is_counted", is_counted)
        try:
            self._study.tell(trial.number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            _LOGGER.info("trial %d was closed by another driver", trial.number)

    def _alive(self) -> Iterator[str]:
        for key, seen_s in self._study.user_attrs.items():
            if not key.startswith(_DRIVER):
                continue
            driver = key.removeprefix(_DRIVER)
            path = self._lock_path(driver)
            is_heard = self._is_elsewhere() and time.time() - float(seen_s) < _LOST_S
            if is_locked(path) if path.exists() else is_heard:
                yield driver

    @property
    def is_alone(self) -> bool:
        """Whether no other driver works on the study, so that nobody else reads what its trials share."""
        return all(driver == self._id for driver in self._alive())

    def _is_elsewhere(self) -> bool:
        """Return whether drivers may work on other machines, whose locks are not seen here."""
        return "://" in (self.config.storage or "") and "sqlite" not in str(self.config.storage)

    def _lock_path(self, driver: str) -> Path:
        return self.config.root / "drivers" / f"{driver}.lock"

    def ask(self) -> Asked | None:
        """Return the next trial; None when the budget is used up."""
        if self.is_over:
            return None
        for params in self._first():
            self._study.enqueue_trial(params, skip_if_exists=True)
        trial = self._study.ask()
        trial.set_user_attr("driver", self._id)
        params = suggest_params(self.config.space, trial)
        self._open[trial.number] = trial
        return Asked(trial.number, params)

    def _first(self) -> Iterator[Params]:
        if self._study.get_trials(deepcopy=False):
            return
        yield from (dict(params) for params in self.config.first)
        if self._is_grid:
            grid = grid_of(self.config)
            yield from (dict(zip(grid, values, strict=True)) for values in product(*grid.values()))

    @property
    def is_over(self) -> bool:
        """Whether no further trial may begin."""
        budget = self.config.budget
        if budget.time_s is not None and self.used_s >= budget.time_s:
            return True
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if len(self._ended()) + len(running) >= budget.num_trials:
            return True
        has_begun = bool(self._study.get_trials(deepcopy=False))
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return self._is_grid and has_begun and not waiting

    @property
    def _is_grid(self) -> bool:
        """Whether what waits is all that there is."""
        return self.config.sampler.kind == "grid"

    def report(self, number: int, rung: int, value: float) -> None:
        """Keep a validation of a trial that goes on."""
        trial = self._open[number]
        curve = [*trial.user_attrs.get("curve", []), [rung, value]]
        trial.set_user_attr("curve", curve)
        if len(self.config.objectives) == 1:
            trial.report(value, rung)

    def tell(self, number: int, outcome: Outcome) -> None:
        """End a trial.

        A metric that is an objective and could not be measured makes it a failed one.
        """
        trial = self._open.pop(number)
        values = [outcome.metrics.get(one.metric) for one in self.config.objectives]
        state, reason = outcome.state, outcome.reason
        missing = [
            one.metric
            for one, value in zip(self.config.objectives, values, strict=True)
            if value is None
        ]
        if state == "complete" and missing:
            state, reason = "failed", f"{missing} could not be measured"
        trial.set_user_attr("metrics", dict(outcome.metrics))
        trial.set_user_attr("seconds", outcome.seconds)
        trial.set_user_attr("ended_at", time.time())
        if reason is not None:
            trial.set_user_attr("reason", reason)
        if state == "complete":
            self._study.tell(trial, [float(value) for value in values if value is not None])
        else:
            ended = TrialState.PRUNED if state == "pruned" else TrialState.FAIL
            self._study.tell(trial, state=ended)

    def curves(self) -> list[tuple[int, list[tuple[int, float]]]]:
        """Return the validations of every trial so far, by number of the trial, for a scheduler that begins anew."""
        trials = self._study.get_trials(deepcopy=False)
        return [
            (trial.number, [(int(rung), float(value)) for rung, value in trial.user_attrs["curve"]])
            for trial in trials
            if trial.user_attrs.get("curve") and trial.number not in self._open
        ]

    def _ended(self) -> list[FrozenTrial]:
        found = self._study.get_trials(deepcopy=False, states=_FINISHED)
        return [trial for trial in found if trial.user_attrs.get("is_counted", True)]

    def rows(self) -> list[TrialRow]:
        """Return the trials that have ended, by number."""
        return [self._row(trial) for trial in self._ended()]

    def _row(self, trial: FrozenTrial) -> TrialRow:
        attrs = trial.user_attrs
        metrics = attrs.get("metrics", {})
        is_complete = trial.state == TrialState.COMPLETE
        return TrialRow(
            number=trial.number,
            state={TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(
                trial.state, "failed"
            ),
            params=dict(trial.params),
            values=tuple(trial.values) if is_complete else None,
            metrics=dict(metrics),
            is_feasible=is_complete and max(excess_of(self.config, metrics), default=0.0) <= 0,
            seconds=float(attrs.get("seconds", 0.0)),
            curve=tuple((int(rung), float(value)) for rung, value in attrs.get("curve", ())),
            reason=attrs.get("reason"),
        )

    def best(self) -> list[int]:
        """Return the best trial by number, or the Pareto front of several objectives, among those that keep to the constraints."""
        rows = {row.number for row in self.rows() if row.is_feasible}
        if len(self.config.objectives) > 1:
            return [trial.number for trial in self._study.best_trials if trial.number in rows]
        ranked = self.ranked()
        return ranked[:1]

    def ranked(self) -> list[int]:
        """Return the feasible trials by number, the best first objective first; the same params once."""
        sign = -1.0 if self.is_maximized else 1.0
        rows = [row for row in self.rows() if row.is_feasible and row.values is not None]
        found: dict[str, TrialRow] = {}
        for row in sorted(rows, key=lambda row: (sign * (row.values or (0.0,))[0], row.number)):
            found.setdefault(config_hash(row.params), row)
        return [row.number for row in found.values()]

    def importance(self) -> dict[str, dict[str, float]]:
        """Return by objective the share of each parameter in what makes good trials good (PED-ANOVA); {} of too few trials.

        Source: Watanabe et al., IJCAI 2023, arXiv 2304.10255. Only parameters that every trial has are compared.
        """
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(complete) < 4 * len(self.config.space):
            return {}
        found = {}
        for place, one in enumerate(self.config.objectives):
            shares = optuna.importance.get_param_importances(
                self._study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=partial(_loss_of, place, -1.0 if one.is_maximized else 1.0),
            )
            found[one.metric] = {name: float(share) for name, share in shares.items()}
        return found


def _is_new(trial: FrozenTrial) -> bool:
    """Return whether another driver may just be about to write its name to a trial."""
    if "driver" in trial.user_attrs or trial.datetime_start is None:
        return False
    return time.time() - trial.datetime_start.timestamp() < _NAMING_S


def _loss_of(place: int, sign: float, trial: FrozenTrial) -> float:
    return sign * float(trial.values[place])
