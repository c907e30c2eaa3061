"""The library's materialise and a bare loop over the same shards, in one process that takes turns; run by `materialize.py`.

The bare loop is what one would write by hand for one job: read, collate, FM, bottleneck, codes, one Parquet file per shard
with the compression of the store. It has no checks, checksums, markers, manifest or statistics, does not sort, and flushes
nothing to disk. Both read, order and collate rows with the same functions, take the same batches and use one thread.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.jobs import materialize as job
from loopfm_ray.jobs.embedding import MaterializeTask, ShardEmbedder
from loopfm_ray.models.bottleneck import build_bottleneck
from loopfm_ray.models.foundation import build_fm
from loopfm_ray.store.codes import pack, quantize
from loopfm_ray.train.embed import length_order
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec
from loopfm_ray.types import TimeRange

BATCH_ROWS = MaterializeTask.batch_rows
COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")


def serial(
    tasks: Sequence[MaterializeTask],
    items: Sequence[Mapping[str, Any]],
    *_: object,
    **__: object,
) -> None:
    """Do the shards of a job in this process, in place of its Ray Data program."""
    [task] = tasks
    worker = ShardEmbedder(task)
    for item in items:
        worker(item)


def ours(prepared: Path, snapshot: Path, out: Path) -> int:
    """Materialise without Ray, everything else as the job does it; return the rows."""
    job._run = serial  # type: ignore[assignment]
    manifest = job.materialize(prepared, snapshot, out, delay_us=0, num_workers=1)
    return manifest.num_rows


def load(folder: Path) -> Snapshot:
    """Read a snapshot without checking it."""
    spec = SnapshotSpec.from_tree(json.loads((folder / "snapshot.json").read_text("utf-8")))
    fm = build_fm(spec.fm, spec.schema, spec.item_fields)
    bottleneck = build_bottleneck(spec.bottleneck, fm.embedding_dim(spec.embedding_layers))
    fm.load_state_dict(load_file(folder / "fm.safetensors"))
    bottleneck.load_state_dict(load_file(folder / "bottleneck.safetensors"))
    return Snapshot(fm.eval(), bottleneck.eval(), spec, "bare")


def bare(prepared: Path, snapshot_dir: Path, out: Path) -> int:
    """Embed every shard with a plain loop; return the rows."""
    data, snapshot = PreparedData.open(prepared), load(snapshot_dir)
    spec = snapshot.spec
    after = TimeRange(spec.trained_until_ts + 1, data.log_range[1] + 1)
    files = sorted(data.examples.files(after), key=lambda file: (file.bucket, file.period))
    num_rows, bucket = 0, None
    for file in files:
        if file.bucket != bucket:
            bucket = file.bucket
            source = RawHistorySource(
                {bucket: data.events(bucket)}, data.items, spec.item_fields, spec.max_len
            )
            collate = Collator(spec.schema, data.items, data.users, {"raw": source})
        rows = read_rows([file], after, columns=list({*collate.columns, *COLUMNS}))
        order = length_order(rows, spec.max_len)
        rows = {name: values[order] for name, values in rows.items()}
        embedded = list(embed(snapshot, collate, rows))
        columns = {name: pa.array(rows[name]) for name in COLUMNS}
        columns["available_ts"] = columns["event_ts"]
        columns["fm_prob"] = pa.array(np.concatenate([prob for _, prob in embedded]))
        codes = pack(
            quantize(np.concatenate([z for z, _ in embedded]), spec.code_spec), spec.code_spec
        )
        columns["code"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(codes.shape[1]), len(codes), [None, pa.py_buffer(codes)]
        )
        path = out / f"period={file.period:04d}" / f"bucket={file.bucket:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, compression="zstd")
        num_rows += len(codes)
    return num_rows


@torch.inference_mode()
def embed(
    snapshot: Snapshot, collate: Collator, rows: Mapping[str, np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield latents and predictions of one batch after another."""
    for begin in range(0, len(rows["item"]), BATCH_ROWS):
        batch = collate({name: v[begin : begin + BATCH_ROWS] for name, v in rows.items()})
        output = snapshot.fm(batch)
        latent = snapshot.bottleneck.encode(output.embedding(snapshot.spec.embedding_layers))
        yield latent.numpy(), torch.sigmoid(output.logit[:, 0]).numpy()


CONTENDERS: dict[str, Callable[[Path, Path, Path], int]] = {"ours": ours, "bare": bare}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Run one contender once and return its rows, wall and processor seconds."""
    out = folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    began, used = time.perf_counter(), time.process_time()
    num_rows = CONTENDERS[name](folder / "prepared", folder / "snapshot", out)
    found = {
        "num_rows": num_rows,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
    }
    print(f"{name:5} {json.dumps(found)}", file=sys.stderr)
    shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--contenders", nargs="+", choices=sorted(CONTENDERS), default=["ours", "bare"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    records: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    for turn in range(args.repeats + 1):
        names = args.contenders if turn % 2 else args.contenders[::-1]
        for name in names:
            found = measure(name, args.folder)
            if turn:  # the first round warms up
                records[name].append(found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    json.dump({"records": records, "peak_rss_gib": peak}, sys.stdout)


if __name__ == "__main__":
    main()
