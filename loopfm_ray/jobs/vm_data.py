"""One VM training as its workers get it, and the joined set as that VM reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow.parquet as pq

from loopfm_ray.config import config_hash
from loopfm_ray.data.collate import (
    Collator,
    HistorySource,
    LatentHistorySource,
    RawHistorySource,
)
from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.joined import TEACHER_CODE, USER_SOURCE, teacher_prob_of
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import VmStageConfig
from loopfm_ray.models.history_inputs import HistoryInputs
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import code_version

__all__ = ["Recode", "VmData", "VmJob"]


@dataclass(frozen=True)
class VmJob:
    """One VM training, as its workers get it."""

    name: str
    prepared: Location
    joined: Location
    out_dir: Location
    config: VmStageConfig
    splits: Splits
    fields: tuple[str, ...]
    raw_max_len: int
    seed: int
    config_hash: str
    inputs: Mapping[str, str]
    """Versions that it depends on, by name."""

    @property
    def key(self) -> str:
        """What names this training and no other: VM, seed, settings, inputs and code."""
        made_of = config_hash(self.config_hash, dict(self.inputs), code_version())
        return f"{self.name}-{self.seed}-{made_of}"


class Recode(Protocol):
    """Maps the codes of history tables into another space."""

    @property
    def spec(self) -> CodeSpec:
        """How the codes that it gives are made."""
        ...

    def __call__(self, table: Any) -> Any:  # Any: pyarrow ships no types
        """Return a history table with its codes mapped."""
        ...


@dataclass(frozen=True)
class VmData:
    """The joined set as one kind of VM reads it."""

    prepared: PreparedData
    joined: Version
    schema: FeatureSchema
    history: HistoryInputs
    needs_teacher_latent: bool
    raw_max_len: int
    recode: Recode | None = None
    """How codes of the histories are turned into codes of another space; None reads them as they are."""

    @classmethod
    def open(cls, job: VmJob) -> "VmData":
        """Open the data of `job`."""
        data = PreparedData.open(job.prepared)
        schema = data.schema_as_of(job.splits.vm.stop_ts).select(job.fields)
        joined, config = open_version(job.joined, "joined"), job.config
        return cls(
            data,
            joined,
            schema,
            config.model.history,
            config.needs_teacher_latent,
            job.raw_max_len,
        )

    @property
    def requests(self) -> ExampleSet:
        """The requests of the joined set."""
        return ExampleSet.of(self.joined, "requests")

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Columns of the raw history, if it is read."""
        if "raw" not in self.history.sources:
            return ()
        return tuple(field.name for field in self.schema.of(Kind.CATEGORICAL, Side.ITEM))

    @property
    def latent_dim(self) -> int | None:
        """Width of the stored latents, if they are read."""
        is_read = self.history.kind in ("latent", "both") or self.needs_teacher_latent
        return self.spec.dim if is_read else None

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """The columns of the FM's predictions: of the first task, and of the others if it has them of all."""
        told, further = self.joined.manifest.meta.get("tasks", ()), self.schema.tasks[1:]
        more = further if set(further) <= set(told) else ()
        return ("teacher_prob", *map(teacher_prob_of, more))

    @property
    def spec(self) -> CodeSpec:
        """How the latents were stored."""
        return CodeSpec.from_tree(self.joined.manifest.meta["code_spec"])

    def collator(self, buckets: Sequence[int]) -> Collator:
        """Return what turns rows of `buckets` into batches.

        Raises:
            ConfigError: the joined set lacks a history, or the rows' own latents.
        """
        return self.collator_of(self.sources(buckets), self.schema)

    def sources(self, buckets: Sequence[int]) -> dict[str, HistorySource]:
        """Return what the histories of rows of `buckets` are read from.

        Raises:
            ConfigError: the joined set lacks a history, or the rows' own latents.
        """
        if self.needs_teacher_latent:
            self._check_teacher_code()
        return {
            name: self._source(name, side, buckets) for name, side in self.history.sources.items()
        }

    def collator_of(self, sources: Mapping[str, HistorySource], schema: FeatureSchema) -> Collator:
        """Return what makes batches from `sources`, with ids that `schema` does not know as unknown."""
        teacher = self.spec if self.needs_teacher_latent else None
        return Collator(schema, self.prepared.items, self.prepared.users, sources, teacher)

    def _source(self, name: str, side: Sequence[str], buckets: Sequence[int]) -> HistorySource:
        if name == "raw":
            events = {bucket: self.prepared.events(bucket) for bucket in buckets}
            return RawHistorySource(
                events, self.prepared.items, self.item_fields, self.raw_max_len, side
            )
        meta = self.joined.manifest.meta
        if name == USER_SOURCE:
            return self._latents("history", buckets, int(meta["max_len"]), side)
        others = meta.get("histories", {})
        if name not in others:
            raise ConfigError(
                f"a VM reads the history {name!r}, the joined set {self.joined.location} has"
                f" {[USER_SOURCE, *sorted(others)]}; join with that key in history.keys, or take the history out of the VM's config"
            )
        # the candidates of a user may lie in any bucket of their own key
        max_len = int(others[name]["max_len"])
        return self._latents(f"history/{name}", self._buckets_of(name), max_len, side)

    def _latents(
        self, folder: str, buckets: Sequence[int], max_len: int, side: Sequence[str]
    ) -> LatentHistorySource:
        tables, spec = read_histories(self.joined, folder, buckets), self.spec
        if self.recode is not None:
            spec = self.recode.spec
            tables = {bucket: self.recode(table) for bucket, table in tables.items()}
        return LatentHistorySource(tables, spec, max_len, side)

    def _buckets_of(self, name: str) -> list[int]:
        start, end = f"history/{name}/bucket=", ".arrow"
        paths = [entry.path for entry in self.joined.manifest.files]
        return [
            int(path.removeprefix(start).removesuffix(end))
            for path in paths
            if path.startswith(start) and path.endswith(end)
        ]

    def _check_teacher_code(self) -> None:
        names = pq.read_schema(self.requests.files()[0].path).names
        if TEACHER_CODE not in names:
            raise ConfigError(
                f"fitnets and reads_teacher_latent need the column {TEACHER_CODE!r} in {self.joined.location}, found {names};"
                " join with history.with_own_latent, or leave them out of the VM's config"
            )
