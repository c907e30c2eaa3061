"""What every stage gets, and how a stage tells whether a version is there and up to date."""

from dataclasses import dataclass

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.mapping import Progress, RayMapper
from loopfm_ray.store.filesystem import Location, is_remote
from loopfm_ray.store.manifest import Manifest, code_version, find_manifest
from loopfm_ray.types import TimeRange

__all__ = ["Context", "current", "needed", "splits_of"]


@dataclass(frozen=True)
class Context:
    """What every stage gets."""

    config: PipelineConfig
    progress: Progress
    fresh: bool = False
    redo: TimeRange | None = None
    """Of materialize: the time that is made again, while all other must be as before."""

    def mapper(self, stage: str, *, writes: bool = False) -> RayMapper:
        """Return a mapper over the cluster that reports as `stage`.

        Tasks of one that `writes` files of a version run on this machine if the version waits for its upload here.
        """
        is_here = writes and is_remote(self.config.paths.versions)
        tasks = self.config.ray.parallel_tasks
        return RayMapper(tasks, stage, self.progress, is_here=is_here)


def splits_of(config: PipelineConfig) -> Splits:
    """Return the windows of the prepared data of a run."""
    return config.data.split.ranges(*PreparedData.open(config.paths.prepared).log_range)


def current(location: Location, settings_hash: str, inputs: dict[str, str]) -> Manifest | None:
    """Return the version at `location` if it is what would be written again, else None."""
    manifest = find_manifest(location)
    if manifest is None:
        return None
    same = manifest.config_hash == settings_hash and manifest.code_version == code_version()
    return manifest if same and manifest.inputs == inputs else None


def needed(location: Location, stage: str) -> Manifest:
    """Return the manifest of the version at `location`.

    Raises:
        StoreError: there is none; `stage` writes it.
    """
    manifest = find_manifest(location)
    if manifest is None:
        raise StoreError(
            f"{location} is not there; run `loopfm {stage}` with the same config first"
        )
    return manifest
