"""What a new FM snapshot would do to the VMs that serve, before anything is published; needs no Ray.

The new run stands beside the served one, over the same log. The spaces are compared on events that both embedded. Then the
served VMs score their own test rows with the new run's histories, as those are and mapped into the old space: a mapped
history is stored in the codes of the old snapshot, as serving would read it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.analysis.alignment import Alignment, AlignmentKind
from loopfm_ray.analysis.decompose import bootstrap_means, estimate_difference, row_logloss
from loopfm_ray.analysis.drift import fit_alignments, measure_drift
from loopfm_ray.data.batch import Batch
from loopfm_ray.data.examples import Rows, iterate_rows
from loopfm_ray.data.prepared import read_histories
from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import splits_of
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.stages import vm_jobs
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.store.codes import CodeSpec, decode, encode
from loopfm_ray.store.manifest import find_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.tables import code_bytes, code_column, write_text
from loopfm_ray.train.evaluate import Predictions, binary_metrics, predict
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.trained import TrainedVm, load_trained_vm
from loopfm_ray.types import TimeRange

__all__ = ["measure_run_drift"]

_MAX_EVENTS = 200_000
_HELD_OUT = 5  # every fifth user's events measure the maps
_EVAL_ROWS = 4096

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class _Pairs:
    """Events that both snapshots embedded."""

    user: NDArray[np.int64]
    event_ts: NDArray[np.int64]
    new: NDArray[np.float32]
    old: NDArray[np.float32]

    def where(self, mask: NDArray[np.bool_]) -> "_Pairs":
        return _Pairs(self.user[mask], self.event_ts[mask], self.new[mask], self.old[mask])


def measure_run_drift(
    new: PipelineConfig, old: PipelineConfig, *, progress: Progress = silent
) -> Json:
    """Write `drift.json` of the run `new` and return it.

    Args:
        new: prepared, with materialised latents; joined for the loss of the VMs, which is left out otherwise. Its VMs, where
            they are trained, tell what retraining would give.
        old: the run that serves: its VMs are trained.
        progress: told of each VM.

    Raises:
        StoreError: a run lacks what is compared.
        ConfigError: the runs are not over the same log in the same buckets, or have one snapshot.
        DataError: the snapshots embedded no events in common.
    """
    set_up_process()
    splits, seed = splits_of(old), old.seeds[0]
    readers = [LatentsReader(one.paths.latents(one.seeds[0])) for one in (new, old)]
    ids = [reader.manifest.meta["snapshot_id"] for reader in readers]
    if ids[0] == ids[1]:
        raise ConfigError(
            f"both runs have the snapshot {ids[0]}: nothing drifts; give the run of another FM"
        )
    pairs = _common_events(*readers)
    known = pairs.where(pairs.event_ts < splits.test.start_ts)
    if len(known.user) < 2 * _HELD_OUT:
        raise DataError(
            f"the snapshots have {len(known.user)} events before the test window in common, at least {2 * _HELD_OUT} are"
            " needed to compare spaces; train the new FM until an earlier time, or test later"
        )
    is_held_out = known.user % _HELD_OUT == 0
    if is_held_out.all() or not is_held_out.any():
        is_held_out = np.arange(len(known.user)) % _HELD_OUT == 0
    maps = fit_alignments(
        np.asarray(known.new, np.float64), np.asarray(known.old, np.float64), is_held_out
    )
    middle = np.median(pairs.event_ts)
    same_width = pairs.new.shape[1] == pairs.old.shape[1]
    result: Json = {
        "old": {"name": old.name, "snapshot_id": ids[1], "trained_until_ts": _until(readers[1])},
        "new": {"name": new.name, "snapshot_id": ids[0], "trained_until_ts": _until(readers[0])},
        "num_events": len(pairs.user),
        "space": asdict(measure_drift(pairs.new, pairs.old)) if same_width else None,
        "over_time": asdict(
            measure_drift(
                pairs.old[pairs.event_ts >= middle],
                pairs.old[pairs.event_ts < middle],
                same_events=False,
            )
        ),
        "explained": {kind: share for kind, (_, share) in maps.items()},
        "vms": {},
    }
    joined = new.paths.joined(new.seeds[0])
    jobs = [job for job in vm_jobs(old) if job.seed == seed and job.name in old.latent_vms]
    if find_manifest(joined) is not None:
        retrained = {job.name: job for job in vm_jobs(new) if job.seed == new.seeds[0]}
        swap = _Swap(new, readers[0], readers[1].spec, {k: one for k, (one, _) in maps.items()})
        for number, job in enumerate(jobs):
            progress("drift", number, len(jobs))
            result["vms"][job.name] = swap.measure(job, retrained.get(job.name))
        progress("drift", len(jobs), len(jobs))
    write_text(new.paths.root / "drift.json", json.dumps(result, indent=1))
    return result


def _until(reader: LatentsReader) -> int:
    return int(reader.manifest.meta["trained_until_ts"])


def _common_events(new: LatentsReader, old: LatentsReader) -> _Pairs:
    parts = []
    for bucket in sorted({*new.buckets} & {*old.buckets}):
        mine, theirs = _events(new, bucket), _events(old, bucket)
        _, left, right = np.intersect1d(
            mine["example_id"], theirs["example_id"], assume_unique=True, return_indices=True
        )
        for name in ("user", "event_ts"):
            if not np.array_equal(mine[name][left], theirs[name][right]):
                raise ConfigError(
                    f"the runs differ in {name!r} of the same example_id: they are not over one log; prepare both from"
                    " the same data section, but for the split"
                )
        every = max(1, -(-len(left) * max(1, len(old.buckets)) // _MAX_EVENTS))
        left, right = left[::every], right[::every]
        parts.append(
            _Pairs(
                mine["user"][left].astype(np.int64),
                mine["event_ts"][left],
                decode(mine["code"][left], new.spec),
                decode(theirs["code"][right], old.spec),
            )
        )
    if not sum(len(part.user) for part in parts):
        raise DataError(
            "the snapshots embedded no events in common; the runs must be over one log in the same number of buckets"
        )
    user, event_ts, x, y = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("user", "event_ts", "new", "old")
    )
    return _Pairs(user, event_ts, x, y)


def _events(reader: LatentsReader, bucket: int) -> dict[str, NDArray[Any]]:
    names = ["example_id", "user", "event_ts", "code"]
    table = reader.read_bucket(bucket, columns=names, events_only=True)
    found = {name: table.column(name).to_numpy() for name in names[:-1]}
    return {**found, "code": code_bytes(table.column("code"))}


@dataclass(frozen=True)
class _Recoded:
    """Codes of one space as codes of another."""

    source: CodeSpec
    spec: CodeSpec
    align: Alignment

    def __call__(self, table: Any) -> Any:  # Any: pyarrow ships no types
        """Return a history table with its codes mapped."""
        latents = self.align(decode(code_bytes(table.column("code")), self.source))
        column = code_column(encode(latents, self.spec))
        return table.set_column(table.schema.get_field_index("code"), "code", column)


class _Swap:
    """Scores a served VM with histories of another space."""

    def __init__(
        self,
        new: PipelineConfig,
        latents: LatentsReader,
        spec: CodeSpec,
        maps: Mapping[AlignmentKind, Alignment],
    ) -> None:
        self._new, self._maps = new, maps
        self._source, self._spec, self._until = latents.spec, spec, _until(latents)

    def measure(self, job: VmJob, retrained: VmJob | None) -> Json:
        """Return the metrics of a VM by what it reads, all on the rows that both joined sets hold."""
        trained = load_trained_vm(job.out_dir)
        other = replace(
            job,
            prepared=self._new.paths.prepared,
            joined=self._new.paths.joined(self._new.seeds[0]),
        )
        window = job.splits.test
        own = _open(job, trained)
        ways: dict[str, tuple[VmData, TrainedVm, int | None]] = {
            "own": (own, trained, None),
            "own_later_events": (own, trained, self._until),
        }
        for kind, align in self._maps.items():
            recoded = _Recoded(self._source, self._spec, align)
            ways[kind] = (replace(_open(other, trained), recode=recoded), trained, None)
        if retrained is not None and find_manifest(retrained.out_dir) is not None:
            anew = load_trained_vm(retrained.out_dir)
            ways["retrained"] = (_open(retrained, anew), anew, None)
        scored = {
            name: _score(data, model, window, after) for name, (data, model, after) in ways.items()
        }
        shared = _shared_rows(scored)
        return _compare({name: one.of(shared) for name, one in scored.items()})


@dataclass(frozen=True)
class _Scored:
    example_id: NDArray[np.int64]
    length: NDArray[np.int64]
    predictions: Predictions

    def of(self, example_id: NDArray[np.int64]) -> "_Scored":
        """Return the rows of these examples, in their order."""
        order = np.argsort(self.example_id)
        rows = order[np.searchsorted(self.example_id, example_id, sorter=order)]
        found = self.predictions
        kept = Predictions(found.logit[rows], found.label[rows], found.user[rows])
        return _Scored(example_id, self.length[rows], kept)


def _open(job: VmJob, trained: TrainedVm) -> VmData:
    """Open the data of a job for a VM that knows the ids of its own training only."""
    return replace(VmData.open(job), schema=trained.schema)


def _score(data: VmData, trained: TrainedVm, window: TimeRange, after: int | None) -> _Scored:
    buckets = range(data.prepared.num_buckets)
    collate = data.collator(buckets)
    cut = _Later(data, after) if after is not None else None
    columns = [*collate.columns, "example_id", "user", "latent_start", "latent_len"]
    ids: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []

    def batches() -> Iterator[tuple[Any, Batch]]:
        files = data.requests.files(window)
        wanted = list(dict.fromkeys(columns))
        for block in iterate_rows(files, window, columns=wanted, batch_rows=_EVAL_ROWS):
            rows = block if cut is None else cut(block)
            ids.append(rows["example_id"])
            lengths.append(rows["latent_len"].astype(np.int64))
            yield rows["user"], collate(rows)

    found = predict(trained.model, batches())
    calibrated = Predictions(trained.calibration.apply(found.logit), found.label, found.user)
    return _Scored(np.concatenate(ids), np.concatenate(lengths), calibrated)


class _Later:
    """Leaves events up to a time out of the users' histories, by moving where each begins."""

    def __init__(self, data: VmData, after: int) -> None:
        tables = read_histories(data.joined, "history", range(data.prepared.num_buckets))
        # how many of a bucket's first n rows are left out
        self._counts = {
            bucket: np.concatenate(
                [[0], np.cumsum(table.column("event_ts").to_numpy() <= after)]
            ).astype(np.int64)
            for bucket, table in tables.items()
        }

    def __call__(self, rows: Rows) -> Rows:
        start, length = rows["latent_start"].copy(), rows["latent_len"].copy()
        for bucket in np.unique(rows["bucket"]):
            mine = np.flatnonzero((rows["bucket"] == bucket) & (length > 0))
            counts = self._counts[int(bucket)]
            gone = counts[start[mine] + length[mine]] - counts[start[mine]]
            start[mine] += gone.astype(start.dtype)
            length[mine] -= gone.astype(length.dtype)
        return {**rows, "latent_start": start, "latent_len": length}


def _shared_rows(scored: Mapping[str, _Scored]) -> NDArray[np.int64]:
    shared: NDArray[np.int64] | None = None
    for one in scored.values():
        shared = one.example_id if shared is None else np.intersect1d(shared, one.example_id)
    if shared is None or not len(shared):
        raise DataError(
            "the runs have no test rows in common; give the new run a split that ends where the old one's does"
        )
    return np.sort(shared)


def _compare(scored: Mapping[str, _Scored]) -> Json:
    own = scored["own"].predictions
    losses = {
        name: row_logloss(one.predictions.label, one.predictions.prob)
        for name, one in scored.items()
    }
    stacked = np.stack(list(losses.values()), axis=1)
    whole, drawn = stacked.mean(0), bootstrap_means(stacked, np.asarray(own.user))
    names = list(losses)
    out: Json = {}
    for place, name in enumerate(names):
        metrics = binary_metrics(scored[name].predictions)
        out[name] = {
            **{key: metrics[key] for key in ("ne", "auc", "logloss", "calibration")},
            "mean_history_len": float(scored[name].length.mean()),
            "loss_against_own": asdict(
                estimate_difference(whole, drawn, place, names.index("own"))
            ),
            "num_rows": len(own.user),
        }
    return out
