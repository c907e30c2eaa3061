"""Sharded tables on disk: a file a rank with its manifest, read by any number of ranks.

A checkpoint is a directory with `shard-00000-of-00002.safetensors` and, beside it, a JSON file of the same name for each rank. It
may be written whole, in one rename, or rank by rank into folders that something else puts together, as Ray Train does.
"""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loopfm_ray.errors import LoopFMError, StoreError
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.sharded.dynamic import DynamicEmbeddings
from loopfm_ray.models.sharded.embeddings import ShardedEmbeddings
from loopfm_ray.models.sharded.exchange import agree
from loopfm_ray.models.sharded.group import Group
from loopfm_ray.models.sharded.id_map import IdEntries
from loopfm_ray.models.sharded.shard import Shard
from loopfm_ray.store.format import digest
from loopfm_ray.store.manifest import disk_errors, recover, sync

__all__ = ["gather_tables", "load_tables", "save_shard", "save_tables", "sharded_tables"]

_FORMAT_VERSION = 1
_STATE = "state."
Tables = ShardedEmbeddings | DynamicEmbeddings


@dataclass(frozen=True)
class _ShardFile:
    """What the JSON beside a shard says."""

    format_version: int
    world_size: int
    rank: int
    num_steps: int
    tables: dict[str, Any]  # Any: JSON
    num_rows: int
    num_bytes: int
    sha256: str


def sharded_tables(model: nn.Module) -> list[Tables]:
    """Return the sharded tables of a model."""
    kinds = (ShardedEmbeddings, DynamicEmbeddings)
    return [module for module in model.modules() if isinstance(module, kinds)]


def gather_tables(model: nn.Module) -> None:
    """Put local tables in the place of a model's sharded ones; every rank has to call it, and gets all rows."""
    for parent in list(model.modules()):
        for name, tables in list(parent.named_children()):
            if isinstance(tables, ShardedEmbeddings):
                local = FieldEmbeddings(
                    dict(zip(tables.names, tables.layout.sizes, strict=True)), tables.dim
                )
                with torch.no_grad():
                    for field in tables.names:
                        local.table(field).copy_(tables.table(field))
                setattr(parent, name, local)


def save_tables(tables: Tables, directory: Path) -> None:
    """Write all shards as a directory that appears at once, in place of an earlier one; every rank has to call it.

    The ranks have to see one file system.

    Raises:
        StoreError: on all ranks, one of them could not write.
    """
    directory, group, device = Path(directory), tables.group, tables.shard.table.device
    staged = directory.parent / f".{directory.name}.tmp-shards"
    with _together(group, device):
        if group.rank == 0:
            staged.parent.mkdir(parents=True, exist_ok=True)
            recover(directory)
            staged.mkdir()
    with _together(group, device):
        save_shard(tables, staged)
    with _together(group, device):
        if group.rank == 0:
            old = directory.parent / f".{directory.name}.old-{secrets.token_hex(4)}"
            if directory.exists():
                directory.rename(old)
            staged.rename(directory)
            sync(directory.parent)
            shutil.rmtree(old, ignore_errors=True)


def save_shard(tables: Tables, directory: Path) -> None:
    """Write the shard of this rank and its manifest into a directory.

    Raises:
        StoreError: the disk is full.
    """
    group = tables.group
    path = directory / f"{_name(group.rank, group.size)}.safetensors"
    tensors = _tensors(tables)
    with disk_errors(directory):
        save_file({name: value.detach().cpu() for name, value in tensors.items()}, path)
        with path.open("rb") as stream:
            num_bytes, sha256 = digest(stream)
        described = _ShardFile(
            format_version=_FORMAT_VERSION,
            world_size=group.size,
            rank=group.rank,
            num_steps=tables.num_steps,
            tables=_describe(tables),
            num_rows=len(tensors["table"]),
            num_bytes=num_bytes,
            sha256=sha256,
        )
        text = json.dumps(asdict(described), indent=1, sort_keys=True)
        path.with_suffix(".json").write_text(text, encoding="utf-8")
        sync(path)
        sync(path.with_suffix(".json"))


def load_tables(tables: Tables, directory: Path) -> None:
    """Bring tables to what any number of ranks wrote; every rank has to call it.

    Raises:
        StoreError: on all ranks, a shard is missing, damaged, of another moment, or of other tables.
    """
    with _together(tables.group, tables.shard.table.device):
        files = _read_manifests(Path(directory), _describe(tables))
        is_same = len(files) == tables.group.size
        read = [file for file in files if not is_same or file.rank == tables.group.rank]
        if isinstance(tables, DynamicEmbeddings):
            _load_dynamic(tables, [_read(file, directory) for file in read])
        else:
            for file in read:
                _load_rows(tables, file, _read(file, directory))
        tables.num_steps = files[0].num_steps
        tables.shard.forget()


def _name(rank: int, size: int) -> str:
    return f"shard-{rank:05d}-of-{size:05d}"


def _describe(tables: Tables) -> dict[str, Any]:  # Any: JSON
    state = tables.shard.optimizer.state(1, 1)
    sizes = [] if isinstance(tables, DynamicEmbeddings) else list(tables.layout.sizes)
    return {
        "kind": "dynamic" if isinstance(tables, DynamicEmbeddings) else "fixed",
        "fields": list(tables.names),
        "sizes": sizes,
        "dim": tables.dim,
        "state": sorted(state),
    }


def _tensors(tables: Tables) -> dict[str, Tensor]:
    shard = tables.shard
    values = {"table": shard.table, **{_STATE + name: value for name, value in shard.state.items()}}
    if isinstance(tables, ShardedEmbeddings):
        return values
    members, places = tables.ids.members()
    rows = torch.from_numpy(places)
    values = {name: value[rows.to(value.device)] for name, value in values.items()}
    entries = {"members": members, "waiting": tables.ids.waiting()}
    for name, value in entries.items():
        for part, numbers in asdict(value).items():
            values[f"{name}.{part}"] = torch.from_numpy(numbers)
    return values


def _read_manifests(directory: Path, expected: dict[str, Any]) -> list[_ShardFile]:  # Any: JSON
    if not directory.exists():
        recover(directory)
    files = []
    for path in sorted(directory.glob("shard-*-of-*.json")):
        try:
            files.append(_ShardFile(**json.loads(path.read_text(encoding="utf-8"))))
        except (TypeError, ValueError) as error:
            raise StoreError(f"{path} is no manifest of a shard: {error}; train again") from error
    size = files[0].world_size if files else 0
    if not files or [file.rank for file in files] != list(range(size)):
        raise StoreError(
            f"{directory} has the shards {[file.rank for file in files]}, expected 0 to"
            f" {max(size, 1) - 1}; give a directory that `save_tables` wrote"
        )
    common = {(file.format_version, file.world_size, file.num_steps) for file in files}
    if common != {(_FORMAT_VERSION, size, files[0].num_steps)}:
        raise StoreError(
            f"the shards of {directory} do not belong together: (format, ranks, steps) are"
            f" {sorted(common)}, expected one of format {_FORMAT_VERSION}; train again"
        )
    for file in files:
        if file.tables != expected:
            raise StoreError(
                f"{directory} is of other tables: {file.tables}, expected {expected}; load it with the"
                " config it was trained with"
            )
    return files


def _read(file: _ShardFile, directory: Path) -> dict[str, Tensor]:
    path = Path(directory) / f"{_name(file.rank, file.world_size)}.safetensors"
    with path.open("rb") as stream:
        if digest(stream) != (file.num_bytes, file.sha256):
            raise StoreError(
                f"{path} is damaged: its checksum is not that of its manifest; take another checkpoint"
            )
    return load_file(path)


def _load_rows(tables: ShardedEmbeddings, file: _ShardFile, values: dict[str, Tensor]) -> None:
    """Take over the rows of this rank from one shard of fixed tables."""
    group, shard = tables.group, tables.shard
    keys = torch.arange(file.num_rows) * file.world_size + file.rank
    own = (keys % group.size == group.rank).nonzero().flatten()
    shard.restore(keys[own] // group.size, *_taken(shard, values, own))


def _load_dynamic(tables: DynamicEmbeddings, parts: list[dict[str, Tensor]]) -> None:
    """Take over the ids of this rank, and their rows, from shards of a dynamic table."""
    shard = tables.shard
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    entries = {}
    for kind in ("members", "waiting"):
        keys = values[f"{kind}.keys"]
        own = (tables.owner(keys) == tables.group.rank).nonzero().flatten()
        own = own[keys[own].argsort()]
        taken = [values[f"{kind}.{part}"][own].numpy() for part in ("keys", "counts", "last_steps")]
        entries[kind] = (IdEntries(*taken), own)
    places = tables.restore(entries["members"][0], entries["waiting"][0])
    own = entries["members"][1][places >= 0]
    shard.restore(places[places >= 0], *_taken(shard, values, own))


def _taken(
    shard: Shard, values: dict[str, Tensor], own: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the rows `own` of a written shard, and their state."""
    return values["table"][own], {name: values[_STATE + name][own] for name in shard.state}


@contextmanager
def _together(group: Group, device: torch.device) -> Iterator[None]:
    """Let all ranks fail where one fails inside the block."""
    failure: LoopFMError | None = None
    try:
        yield
    except LoopFMError as error:
        failure = error
    except (OSError, KeyError, RuntimeError) as error:
        failure = StoreError(f"a shard can not be written or read: {error}; check the path")
    agree(group, failure, device)
