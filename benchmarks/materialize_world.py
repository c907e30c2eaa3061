"""The prepared log and the snapshot that `materialize.py` embeds with, made by the library's own steps.

The FM has the default config and random weights: what they are changes no cost. The bottleneck is fitted on embeddings of the
FM's window, as in training, so that codes are spread as real ones are.
"""

import itertools
from pathlib import Path

import torch

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.config import CompleteJourneyConfig, DataConfig, SplitConfig, SyntheticConfig
from loopfm_ray.data.examples import iterate_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Kind, Side
from loopfm_ray.experiments import FmStageConfig
from loopfm_ray.models.bottleneck import build_bottleneck
from loopfm_ray.models.fitting import calibrate, fit_bottleneck
from loopfm_ray.models.foundation import build_fm
from loopfm_ray.train.embed import embedding_chunks
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, save_snapshot

KINDS = ("synthetic", "complete_journey")
_SAMPLE_BATCHES = 8


def data_config(kind: str, num_rows: int, num_users: int) -> DataConfig:
    """Return the log to embed: eight weeks of generated clicks, all but the first after the FM's window, or the real one."""
    if kind == "complete_journey":
        return CompleteJourneyConfig()
    return SyntheticConfig(
        split=SplitConfig(fm_stop="2024-01-08", vm_stop="2024-02-12", valid_s=86_400.0),
        num_rows=num_rows,
        num_users=num_users,
        num_items=max(100, num_users // 4),
        num_topics=20,
        history_events="all",
    )


def write_world(folder: Path, kind: str, num_rows: int, num_users: int) -> tuple[Path, Path]:
    """Write the prepared version and the snapshot; return their paths."""
    config = data_config(kind, num_rows, num_users)
    prepare(config, folder / "prepared")
    data = PreparedData.open(folder / "prepared")
    window = config.split.ranges(*data.log_range).fm
    stage = FmStageConfig()
    torch.manual_seed(0)
    schema = data.schema_as_of(window.stop_ts)
    items = tuple(field.name for field in schema.of(Kind.CATEGORICAL, Side.ITEM))
    fm = build_fm(stage.model, schema, items).eval()
    max_len = int(data.manifest.meta["raw_max_len"])
    source = RawHistorySource(data.all_events(), data.items, items, max_len)
    collate = Collator(schema, data.items, data.users, {"raw": source})
    rows = iterate_rows(data.examples.files(window), window, batch_rows=4096)
    sample = list(
        embedding_chunks(
            fm, stage.embedding_layers, map(collate, itertools.islice(rows, _SAMPLE_BATCHES))
        )
    )
    bottleneck = build_bottleneck(stage.bottleneck, fm.embedding_dim(stage.embedding_layers))
    fit_bottleneck(bottleneck, sample, bits=stage.bits)
    embedding = torch.cat([chunk.embedding for chunk in sample])
    spec = SnapshotSpec(
        trained_until_ts=window.stop_ts - 1,
        schema=schema,
        item_fields=items,
        max_len=max_len,
        fm=stage.model,
        bottleneck=stage.bottleneck,
        embedding_layers=stage.embedding_layers,
        code_spec=calibrate(bottleneck, embedding, stage.bits),
    )
    save_snapshot(Snapshot(fm, bottleneck, spec), folder / "snapshot", inputs={})
    return folder / "prepared", folder / "snapshot"
