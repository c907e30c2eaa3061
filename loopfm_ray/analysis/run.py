"""The gain decomposition of a finished run, from the predictions that its evaluation kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.analysis.decompose import FM, INPUTS, decompose, ladder, row_logloss
from loopfm_ray.errors import MetricError

__all__ = ["HISTORIES", "analyze_ladder", "analyze_predictions", "choose_models"]

HISTORIES = {"x": "none", "xh": "raw", "xs": "latent", "xhs": "both"}
"""What the history of each of the four models is made of."""

Predictions = Mapping[str, NDArray[Any]]
Losses = dict[str, NDArray[np.float64]]
Json = dict[str, Any]  # Any: JSON


def choose_models(histories: Mapping[str, str], chosen: Mapping[str, str | None]) -> dict[str, str]:
    """Return which VM stands for each of `INPUTS`.

    Args:
        histories: of every VM that learns from labels alone, what its history is made of: none, raw, latent or both.
        chosen: a VM by input, where the caller names one; None leaves it open.

    Raises:
        MetricError: there is none, or several, for an input that is open; or a named one does not fit.
    """
    found = {}
    for place in INPUTS:
        wanted, named = HISTORIES[place], chosen.get(place)
        fitting = sorted(name for name, kind in histories.items() if kind == wanted)
        if named is not None and named not in fitting:
            raise MetricError(
                f"the model for {place!r} must learn from labels alone and read a history of kind {wanted!r};"
                f" {named!r} does not, {fitting or 'none'} do"
            )
        if named is None and len(fitting) != 1:
            raise MetricError(
                f"the decomposition needs one VM without distillation whose history is of kind {wanted!r}, the run has"
                f" {fitting or 'none'}; {'name one with an option' if fitting else 'add one to vms and run the loop again'}"
            )
        found[place] = named or fitting[0]
    return found


def analyze_predictions(
    models: Mapping[str, str], seeds: Sequence[int], read: Callable[[int, str], Predictions]
) -> Json:
    """Return the decomposition of the mean loss over all seeds, and that of each seed.

    The loss of a row is its mean over seeds, so the intervals are over users, not over trainings.

    Args:
        models: VM for each of `INPUTS`.
        seeds: of the run.
        read: seed and model, `fm` among them, to its kept predictions: example_id, user, label, logit.

    Raises:
        MetricError: models, or seeds, were evaluated on different rows.
    """
    per_seed, mean, user = _all_losses({**models, FM: FM}, seeds, read)
    trees = {str(seed): _tree(losses, user) for seed, losses in per_seed.items()}
    return {"models": dict(models), "mean": _tree(mean, user), "per_seed": trees}


def analyze_ladder(
    models: Mapping[str, str], seeds: Sequence[int], read: Callable[[int, str], Predictions]
) -> Json:
    """Return what each step of the channel loses, of the mean loss over all seeds and of each seed.

    Args:
        models: VM for each of `LADDER`.
        seeds: of the run.
        read: seed and model to its kept predictions.

    Raises:
        MetricError: models, or seeds, were evaluated on different rows.
    """
    per_seed, mean, user = _all_losses(models, seeds, read)
    trees = {str(seed): asdict(ladder(losses, user)) for seed, losses in per_seed.items()}
    logloss = {place: float(loss.mean()) for place, loss in mean.items()}
    found = {**asdict(ladder(mean, user)), "logloss": logloss}
    return {"models": dict(models), "mean": found, "per_seed": trees}


def _all_losses(
    models: Mapping[str, str], seeds: Sequence[int], read: Callable[[int, str], Predictions]
) -> tuple[dict[int, Losses], Losses, NDArray[np.integer]]:
    """Return the row losses of each seed by place, their means over seeds, and the users of the rows."""
    per_seed: dict[int, Losses] = {}
    first: Predictions | None = None
    for seed in seeds:
        per_seed[seed] = {}
        for place, name in models.items():
            rows = read(seed, name)
            first = rows if first is None else first
            _check_same_rows(rows, first, f"{name} of seed {seed}")
            per_seed[seed][place] = _row_losses(rows)
    if first is None:
        raise MetricError("an analysis needs at least one seed and one model, found none")
    mean = {
        place: np.mean([losses[place] for losses in per_seed.values()], axis=0) for place in models
    }
    return per_seed, mean, first["user"]


def _row_losses(rows: Predictions) -> NDArray[np.float64]:
    return row_logloss(rows["label"], 1.0 / (1.0 + np.exp(-rows["logit"])))


def _tree(losses: Mapping[str, NDArray[np.float64]], user: NDArray[np.integer]) -> Json:
    logloss = {place: float(loss.mean()) for place, loss in losses.items()}
    return {
        **asdict(decompose(losses, user)),
        "logloss": logloss,
        "teacher_gain": logloss["x"] - logloss[FM],
    }


def _check_same_rows(rows: Predictions, first: Predictions, name: str) -> None:
    wrong = [
        column
        for column in ("example_id", "user", "label")
        if not np.array_equal(rows[column], first[column])
    ]
    if wrong:
        raise MetricError(
            f"the predictions of {name} are of other test rows than the first: {wrong} differ; evaluate the whole run again"
        )
