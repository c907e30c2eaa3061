"""Put the small files of a run's latents together; needs no cluster."""

from typing import Any

from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.store.compact import compact
from loopfm_ray.store.manifest import find_manifest
from loopfm_ray.store.sizes import measure_sizes

__all__ = ["compact_latents"]


def compact_latents(config: PipelineConfig, progress: Progress = silent) -> dict[str, Any]:
    """Compact the latents of each seed and drop what `history.keep_s` lets go; return what lies there now.

    Raises:
        StoreError: a seed has no latents, or the disk is full.
    """
    result: dict[str, Any] = {}
    for done, seed in enumerate(config.seeds):
        path = config.paths.latents(seed)
        if find_manifest(path) is None:
            raise StoreError(
                f"{path} is not there; run `loopfm materialize` with the same config first"
            )
        progress("compact", done, len(config.seeds))
        before = measure_sizes(path)
        manifest = compact(
            path, target_rows=config.history.compact_rows, retention_us=config.history.keep_us
        )
        after = measure_sizes(path)
        result[f"seed={seed}"] = {
            "content": manifest.content,
            "rows": manifest.num_rows,
            "files_before": before.num_files,
            "files": after.num_files,
            "disk_bytes_before": before.disk_bytes,
            "disk_bytes": after.disk_bytes,
        }
    progress("compact", len(config.seeds), len(config.seeds))
    return result
