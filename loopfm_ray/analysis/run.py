"""The gain decomposition of a finished run, from the predictions that its evaluation kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.analysis.decompose import INPUTS, Decomposition, decompose, row_logloss
from loopfm_ray.errors import MetricError

__all__ = ["HISTORIES", "analyze_predictions", "choose_models"]

HISTORIES = {"x": "none", "xh": "raw", "xs": "latent", "xhs": "both"}
"""What the history of each of the four models is made of."""

Predictions = Mapping[str, NDArray[Any]]
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
    """Return the decomposition over the mean loss of all seeds, that of each seed, and the bound of the transfer ratio.

    The loss of a row is its mean over seeds, so the intervals are over users, not over trainings.

    Args:
        models: VM for each of `INPUTS`.
        seeds: of the run.
        read: seed and model, `fm` among them, to its kept predictions: example_id, user, label, logit.

    Raises:
        MetricError: models were evaluated on different rows.
    """
    per_seed: Json = {}
    summed: dict[str, NDArray[np.float64]] = {}
    user = np.zeros(0, dtype=np.int64)
    for seed in seeds:
        rows = {place: read(seed, name) for place, name in {**models, "fm": "fm"}.items()}
        _check_same_rows(rows, seed)
        user = rows["x"]["user"]
        losses = {place: _losses(found) for place, found in rows.items()}
        for place, loss in losses.items():
            summed[place] = summed.get(place, np.zeros(len(loss))) + loss / len(seeds)
        per_seed[str(seed)] = _tree(losses, user)
    return {"models": dict(models), "mean": _tree(summed, user), "per_seed": per_seed}


def _losses(rows: Predictions) -> NDArray[np.float64]:
    return row_logloss(rows["label"], 1.0 / (1.0 + np.exp(-rows["logit"])))


def _tree(losses: Mapping[str, NDArray[np.float64]], user: NDArray[np.integer]) -> Json:
    terms = decompose(losses, user)
    logloss = {place: float(loss.mean()) for place, loss in losses.items()}
    teacher_gain = logloss["x"] - logloss["fm"]
    return {
        **asdict(terms),
        "logloss": logloss,
        "teacher_gain": teacher_gain,
        "transfer_ratio_bound": _bound(terms, teacher_gain),
    }


def _bound(terms: Decomposition, teacher_gain: float) -> float | None:
    """Return the bound, or None where the FM is no better than the plain VM: there is nothing to transfer."""
    return terms.transfer_ratio_bound(teacher_gain) if teacher_gain > 0 else None


def _check_same_rows(rows: Mapping[str, Predictions], seed: int) -> None:
    first = rows["x"]["example_id"]
    wrong = [
        place for place, found in rows.items() if not np.array_equal(found["example_id"], first)
    ]
    if wrong:
        raise MetricError(
            f"seed {seed}: the predictions for {wrong} are of other test rows than those of the plain VM; evaluate again"
        )
