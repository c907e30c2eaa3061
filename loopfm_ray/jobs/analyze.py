"""Decompose the gain of a finished run; needs no Ray."""

import json
from collections.abc import Mapping
from typing import Any

from loopfm_ray.analysis.run import (
    Predictions,
    analyze_ladder,
    analyze_predictions,
    choose_models,
)
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiment_grid import ExperimentConfig, cell_name
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.evaluate import read_predictions
from loopfm_ray.jobs.stages import predictions_path
from loopfm_ray.store.tables import write_text

__all__ = ["run_analysis", "run_ladder"]


def run_analysis(
    config: PipelineConfig, chosen: Mapping[str, str | None], prefix: str = ""
) -> dict[str, Any]:
    """Write `analysis.json` of a run and return it.

    Args:
        config: of the run.
        chosen: a VM by input of the decomposition, where there are several.
        prefix: only VMs whose name begins so are looked at.

    Raises:
        MetricError: the run lacks one of the four models.
        StoreError: the run was not evaluated.
    """
    chosen_models = choose_models(_histories(config, prefix), chosen)
    result = analyze_predictions(
        chosen_models, config.seeds, lambda seed, name: _read(config, seed, name)
    )
    write_text(config.paths.root / "analysis.json", json.dumps(result, indent=1))
    return result


def run_ladder(
    config: ExperimentConfig, model: str, chosen: Mapping[str, str | None]
) -> dict[str, Any]:
    """Write `ladder.json` of an experiment and return it: what each step of the channel loses.

    Args:
        config: of the experiment, with its `ladder`.
        model: whose arms are compared.
        chosen: as for `run_analysis`.

    Raises:
        ConfigError: the experiment names no ladder.
        MetricError: an arm is missing.
        StoreError: a variant was not evaluated.
    """
    if config.ladder is None:
        raise ConfigError(
            f"experiment {config.name!r} has no part `ladder`, which names the variants for code, latent and embedding;"
            " see configs/pipeline/loopfm_ladder.yaml"
        )
    variants = config.ladder.model_dump()
    pipelines = {step: config.pipeline(variant) for step, variant in variants.items()}
    prefix = cell_name(model, "")
    models = choose_models(_histories(pipelines["code"], prefix), chosen)
    places = {
        **{step: f"{step}/{models['xs']}" for step in variants},
        "code_raw": f"code/{models['xhs']}",
        "embedding_raw": f"embedding/{models['xhs']}",
    }

    def read(seed: int, place: str) -> Predictions:
        step, _, name = place.partition("/")
        return _read(pipelines[step], seed, name)

    result = analyze_ladder(places, config.seeds, read)
    write_text(config.root / "ladder.json", json.dumps(result, indent=1))
    return result


def _histories(config: PipelineConfig, prefix: str) -> dict[str, str]:
    """Return of every VM that learns from labels alone what its history is made of."""
    return {
        name: stage.model.history.kind
        for name, stage in config.vms.items()
        if name.startswith(prefix) and not stage.follows_fm and not stage.needs_teacher_latent
    }


def _read(config: PipelineConfig, seed: int, name: str) -> Predictions:
    path = predictions_path(config, seed, name)
    if not path.is_file():
        raise StoreError(f"{path} is not there; run `loopfm demo` or `loopfm experiment` first")
    return read_predictions(path)
