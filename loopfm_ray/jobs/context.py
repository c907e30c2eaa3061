"""What the stages of a run share: the config, where progress goes, and which versions are up to date.

Up to date means: made by the same code, from the same settings and the same input versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopfm_ray.config import config_hash
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.mapping import Progress, RayMapper
from loopfm_ray.store.manifest import MANIFEST, Manifest, code_version, read_manifest
from loopfm_ray.store.pool import Pool

__all__ = ["Context", "needed", "splits_of"]


@dataclass(frozen=True)
class Context:
    """What every stage gets."""

    config: PipelineConfig
    progress: Progress
    fresh: bool = False
    pool: Pool | None = None
    """Versions that other runs made, which this one takes over instead of making them again."""
    any_code: bool = False
    """Whether a version that other code made counts as up to date."""

    def mapper(self, stage: str) -> RayMapper:
        """Return a mapper over the cluster that reports as `stage`."""
        return RayMapper(self.config.ray.parallel_tasks, stage, self.progress)

    def find(self, path: Path, settings_hash: str, inputs: Mapping[str, str]) -> Manifest | None:
        """Return the version at `path` if it is what would be written again, taking it from the pool if it is there."""
        if self.fresh:
            return None
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            same_code = self.any_code or manifest.code_version == code_version()
            if same_code and manifest.config_hash == settings_hash and manifest.inputs == inputs:
                return manifest
        return self.pool.take(self._key(path, settings_hash, inputs), path) if self.pool else None

    def share(self, path: Path) -> Manifest:
        """Put the version at `path` into the pool, if there is one, and return its manifest."""
        manifest = read_manifest(path)
        if self.pool is not None:
            self.pool.put(self._key(path, manifest.config_hash, manifest.inputs), path)
        return manifest

    def _key(self, path: Path, settings_hash: str, inputs: Mapping[str, str]) -> str:
        code = "" if self.any_code else code_version()
        return f"{path.name}-{config_hash(settings_hash, dict(inputs), code)}"


def splits_of(config: PipelineConfig) -> Splits:
    """Return the windows of the prepared data of a run."""
    return config.data.split.ranges(*PreparedData.open(config.paths.prepared).log_range)


def needed(path: Path, stage: str) -> Manifest:
    """Return the manifest of what an earlier stage wrote.

    Raises:
        StoreError: it is not there; the message names the stage to run.
    """
    try:
        return read_manifest(path)
    except StoreError as error:
        raise StoreError(
            f"{path} is not there; run `loopfm {stage}` with the same config first"
        ) from error
