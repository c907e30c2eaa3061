"""Which VMs one Ray Train run trains, one after another.

A run of Ray Train starts a controller and three more actors beside its workers: some 20 s of processor time before the first
step, as much as a small VM takes to train. So a few runs, one for each place on the cluster or two, share all VMs, and each
holds about as much work as the others. What is in progress has its checkpoint in the run that it belongs to, so who trains
what is written down and stays when a killed stage is run again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopfm_ray.config import config_hash
from loopfm_ray.store.tables import write_text

__all__ = ["Program", "Waiting", "plan_programs"]

_PER_PLACE = 2
"""Runs for each place: the second ones even out what the estimates of cost did not tell."""


@dataclass(frozen=True)
class Program:
    """The VMs of one Ray Train run."""

    name: str
    """The same for as long as any of its VMs waits."""
    keys: tuple[str, ...]
    """The VMs that wait, by key, in the order in which they are trained."""


@dataclass(frozen=True)
class Waiting:
    """A VM that is to be trained."""

    cost: float
    """An estimate, in any unit."""
    workers: tuple[int, bool]
    """How many workers it needs, and whether with GPUs: a run has one kind."""


def plan_programs(waiting: Mapping[str, Waiting], places: int, file: Path) -> list[Program]:
    """Share VMs among Ray Train runs, the most expensive run first.

    Args:
        waiting: the VMs by key.
        places: how many runs there is room for at a time.
        file: where the plan is kept. What an earlier plan says of VMs that wait still holds.
    """
    programs = []
    for name, keys in _read(file).items():
        left = tuple(key for key in keys if key in waiting)
        if left:
            programs.append(Program(name, left))
    planned = {key for program in programs for key in program.keys}
    new: dict[tuple[int, bool], dict[str, float]] = {}
    for key, one in waiting.items():
        if key not in planned:
            new.setdefault(one.workers, {})[key] = one.cost
    for costs in new.values():
        programs += [Program(config_hash(keys), tuple(keys)) for keys in _share(costs, places)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({one.name: one.keys for one in programs}, indent=1))
    return sorted(programs, key=lambda one: -sum(waiting[key].cost for key in one.keys))


def _read(file: Path) -> dict[str, list[str]]:
    if not file.is_file():
        return {}
    plan: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return plan


def _share(costs: Mapping[str, float], places: int) -> list[list[str]]:
    """Spread VMs over runs: each in turn, from the most expensive one on, to the run with the least to do."""
    few = len(costs) < 2 * _PER_PLACE * places
    num_programs = min(len(costs), places if few else _PER_PLACE * places)
    shares: list[list[str]] = [[] for _ in range(num_programs)]
    loads = [0.0] * num_programs
    for key in sorted(costs, key=lambda one: (-costs[one], one)):
        lightest = loads.index(min(loads))
        shares[lightest].append(key)
        loads[lightest] += costs[key]
    return shares
