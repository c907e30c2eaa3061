"""What the stages of a run share: the config, where progress goes, and which versions are up to date.

Up to date means: made by the same code, from the same settings and the same input versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loopfm_ray.config import config_hash, load_config
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.mapping import Progress, RayMapper
from loopfm_ray.jobs.materialize import Scope
from loopfm_ray.store.filesystem import Location, is_remote
from loopfm_ray.store.manifest import Manifest, code_version, find_manifest, read_manifest
from loopfm_ray.store.pool import Pool
from loopfm_ray.types import TimeRange

__all__ = ["Context", "needed", "read_run", "splits_of"]


@dataclass(frozen=True)
class Context:
    """What every stage gets."""

    config: PipelineConfig
    progress: Progress
    fresh: bool = False
    redo: TimeRange | None = None
    """Of materialize: the time that is made again, while all other must be as before."""
    pool: Pool | None = None
    """Versions that other runs made, which this one takes over instead of making them again."""
    any_code: bool = False
    """Whether a version that other code made counts as up to date."""

    def __post_init__(self) -> None:
        if self.pool is not None and is_remote(self.config.paths.versions):
            raise ConfigError(
                f"versions at {self.config.paths.versions} can not be linked into a pool; leave `store` out"
            )

    def mapper(self, stage: str, *, writes: bool = False) -> RayMapper:
        """Return a mapper over the cluster that reports as `stage`.

        Tasks of one that `writes` files of a version run on this machine if the version waits for its upload here.
        """
        is_here = writes and is_remote(self.config.paths.versions)
        tasks = self.config.ray.parallel_tasks
        return RayMapper(tasks, stage, self.progress, is_here=is_here)

    def scope(
        self, seed: int, *, redo: TimeRange | None = None, only: TimeRange | None = None
    ) -> Scope:
        """Return what of a seed's latents is made, and where shards wait for their upload; see `Scope`."""
        config = self.config
        return Scope(
            redo=redo,
            keep_us=config.history.keep_us,
            is_fresh=self.fresh,
            scratch=config.scratch(seed),
            is_scratch_shared=config.scratch_dir is not None,
            only=only,
        )

    def find(
        self, location: Location, settings_hash: str, inputs: Mapping[str, str]
    ) -> Manifest | None:
        """Return the version at `location` if it is what would be written again, taking it from the pool if it is there."""
        found = self.current(location, settings_hash, inputs)
        return self.take(location, settings_hash, inputs) if found is None else found

    def current(
        self, location: Location, settings_hash: str, inputs: Mapping[str, str]
    ) -> Manifest | None:
        """Return the version at `location` if it is what would be written again, else None."""
        manifest = None if self.fresh else find_manifest(location)
        if manifest is None:
            return None
        same_code = self.any_code or manifest.code_version == code_version()
        same = manifest.config_hash == settings_hash and manifest.inputs == inputs
        return manifest if same_code and same else None

    def take(
        self, location: Location, settings_hash: str, made_of: Mapping[str, str]
    ) -> Manifest | None:
        """Put the version of these settings and inputs from the pool at `location`; None if there is none."""
        if self.fresh or self.pool is None:
            return None
        return self.pool.take(self._key(location, settings_hash, made_of), Path(str(location)))

    def share(self, location: Location, made_of: Mapping[str, str] | None = None) -> Manifest:
        """Put the version at `location` into the pool, if there is one, and return its manifest.

        Args:
            location: of the version.
            made_of: what it depends on; the inputs of its manifest if not given.
        """
        manifest = read_manifest(location)
        if self.pool is not None:
            inputs = manifest.inputs if made_of is None else made_of
            key = self._key(location, manifest.config_hash, inputs)
            self.pool.put(key, Path(str(location)))
        return manifest

    def _key(self, location: Location, settings_hash: str, made_of: Mapping[str, str]) -> str:
        code = "" if self.any_code else code_version()
        name = Path(str(location)).name
        return f"{name}-{config_hash(settings_hash, dict(made_of), code)}"


def splits_of(config: PipelineConfig) -> Splits:
    """Return the windows of the prepared data of a run."""
    return config.data.split.ranges(*PreparedData.open(config.paths.prepared).log_range)


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


def read_run(folder: Path) -> PipelineConfig:
    """Return the config of the run in `folder`, which may have moved, or been named from another working directory.

    Raises:
        StoreError: it is no run.
    """
    if not (folder / "config.yaml").is_file():
        raise StoreError(f"{folder} is no run: it has no config.yaml; give the folder of a run")
    config, root = load_config(PipelineConfig, folder / "config.yaml"), folder.absolute()
    return config.model_copy(update={"run_dir": str(root.parent), "name": root.name})
