"""How trials are chosen: the samplers of Optuna by config, and the constraints that they mind."""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.space import ChoiceParameter, IntParameter

__all__ = ["excess_of", "grid_of", "make_sampler"]


def excess_of(config: SweepConfig, metrics: Mapping[str, Any]) -> list[float]:
    """Return for each constraint by how much it is broken; one that was not measured is."""
    found = []
    for one in config.constraints:
        value = metrics.get(one.metric)
        found.append(1.0 if value is None else one.excess(float(value)))
    return found


def make_sampler(config: SweepConfig, seed: int) -> BaseSampler:
    """Return the sampler that a config names; a grid is queued by the study, so it samples what is beyond."""
    settings = config.sampler

    def constraints(trial: FrozenTrial) -> Sequence[float]:
        if trial.state == TrialState.PRUNED or "metrics" not in trial.user_attrs:
            return [0.0] * len(config.constraints)
        return excess_of(config, trial.user_attrs["metrics"])

    limits = constraints if config.constraints else None
    if settings.kind == "tpe":
        return optuna.samplers.TPESampler(
            n_startup_trials=settings.num_startup_trials,
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=True,
            constraints_func=limits,
        )
    if settings.kind == "gp":
        return optuna.samplers.GPSampler(
            n_startup_trials=settings.num_startup_trials, seed=seed, constraints_func=limits
        )
    if settings.kind == "nsga2":
        return optuna.samplers.NSGAIISampler(
            population_size=settings.population_size, seed=seed, constraints_func=limits
        )
    return optuna.samplers.RandomSampler(seed=seed)


def grid_of(config: SweepConfig) -> dict[str, list[Any]]:
    """Return by path the values of a grid, choices by their labels."""
    grid: dict[str, list[Any]] = {}
    for name, item in config.space.items():
        if isinstance(item, ChoiceParameter):
            grid[name] = list(item.labels)
        elif isinstance(item, IntParameter):
            grid[name] = list(range(item.low, item.high + 1, item.step))
    return grid
