"""Decompose the gain of a finished run; needs no Ray."""

import json
from collections.abc import Mapping
from typing import Any

from loopfm_ray.analysis.run import Predictions, analyze_predictions, choose_models
from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.evaluate import read_predictions
from loopfm_ray.jobs.stages import predictions_path
from loopfm_ray.store.tables import write_text

__all__ = ["run_analysis"]


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
    histories = {
        name: stage.model.history.kind
        for name, stage in config.vms.items()
        if name.startswith(prefix) and not stage.kd_weight and not stage.needs_teacher_latent
    }

    def read(seed: int, name: str) -> Predictions:
        path = predictions_path(config, seed, name)
        if not path.is_file():
            raise StoreError(f"{path} is not there; run `loopfm demo` or `loopfm experiment` first")
        return read_predictions(path)

    result = analyze_predictions(choose_models(histories, chosen), config.seeds, read)
    text = json.dumps(result, indent=1)
    path = config.paths.root / "analysis.json"
    write_text(path, text)
    return result
