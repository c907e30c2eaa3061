"""The model of a bundle for ONNX Runtime: written when the bundle is exported, scored without torch's cost per operation.

The graph takes requests of equally many items, so that the rows of a history are a block and no layout hangs on values:
R requests of C items each, with histories of L events. `OnnxModel` cuts the rows of a batch into such blocks.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopfm_ray.data.batch import Batch, History
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import BundleError
from loopfm_ray.metrics.binary import sigmoid
from loopfm_ray.models.vertical import VerticalModel

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["MAX_DIFFERENCE", "OnnxModel", "export_onnx", "quantize_onnx"]

MAX_DIFFERENCE = 1e-4
"""Most that a probability of the exported model may differ from that of the model."""

_IDS, _NUMERIC, _MASK, _AGE, _LATENTS = "ids", "numeric", "mask", "age_s", "latents"
_SHARED = (_MASK, _AGE, _LATENTS)
_ROWS_AT_ONCE = 2048
"""So that what a layer gives is still in the cache when the next reads it; a tenth faster than all rows of a large batch."""
"""Inputs of a request, not of its items."""
_PROBES = ((1, 1, 1), (1, 7, 5), (3, 2, 4), (4, 9, 2))
"""Requests, items and events of the batches that an export is checked on."""
_OPSET = 20
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]  # Any: ids, numbers and masks


class _Blocks(nn.Module):
    """The model with the inputs of the graph: everything that `R` requests of `C` items are made of."""

    def __init__(self, model: VerticalModel, sequences: Sequence[str], has_history: bool) -> None:
        super().__init__()
        self.model, self.sequences, self.has_history = model, tuple(sequences), has_history

    def forward(self, ids: Tensor, numeric: Tensor, *rest: Tensor) -> Tensor:
        """Return [R, C] logits of the first task from ids [R, C, F], numeric [R, C, F_num] and the others in order."""
        requests, items = ids.shape[:2]
        cut = len(self.sequences)
        histories = {}
        if self.has_history:
            mask, age_s, latents = rest[cut:]
            row = torch.arange(requests)[:, None].expand(requests, items).flatten(0, 1)
            histories[USER_SOURCE] = History(row, mask, age_s, latents)
        flat = numeric.flatten(0, 1)
        batch = Batch(
            ids=ids.flatten(0, 1),
            numeric=flat,
            sequences={
                name: part.flatten(0, 1)
                for name, part in zip(self.sequences, rest[:cut], strict=True)
            },
            histories=histories,
            label=torch.zeros_like(flat[:, :1]),
        )
        logit: Tensor = self.model(batch)[:, 0]
        return logit.view(requests, items)


@dataclass(frozen=True)
class _Signature:
    """The inputs of the graph, by name and in order."""

    sequences: tuple[str, ...]
    latent_dim: int | None

    @property
    def names(self) -> list[str]:
        histories = [] if self.latent_dim is None else _SHARED
        return [_IDS, _NUMERIC, *map(_sequence, self.sequences), *histories]


def _sequence(name: str) -> str:
    return f"sequence_{name}"


def export_onnx(
    model: VerticalModel, schema: FeatureSchema, latent_dim: int | None, path: Path
) -> float:
    """Write the model as ONNX and return its largest difference in probability on random batches of several shapes.

    Args:
        model: with its weights.
        schema: the VM's fields.
        latent_dim: width of the latents that it reads; None for a VM without history.
        path: of the file.

    Raises:
        BundleError: the model can not be expressed, the packages for it are missing, or it gives other scores.
    """
    signature = _Signature(tuple(field.name for field in schema.sequences), latent_dim)
    blocks = _Blocks(model, signature.sequences, latent_dim is not None).eval()
    sample = _random(schema, signature, (2, 3, 4))
    try:
        import onnxscript  # noqa: F401  # torch needs it and says so late

        with _quiet():
            program = torch.onnx.export(
                blocks,
                tuple(torch.from_numpy(sample[name]) for name in signature.names),
                dynamo=True,
                input_names=signature.names,
                output_names=["logit"],
                dynamic_shapes=_dynamic(signature),
                opset_version=_OPSET,
                verbose=False,
            )
        program.save(path)  # type: ignore[union-attr]  # a program, as it is made by dynamo
    except ImportError as error:
        raise BundleError(f"exporting to ONNX takes the extra `onnx`: {error}") from error
    except Exception as error:  # the exporter raises whatever its passes meet
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"VM of kind {model.__class__.__name__} can not be exported to ONNX: {reason}; serve it with torch"
        ) from error
    return _check(blocks, schema, signature, path)


def quantize_onnx(path: Path, target: Path) -> None:
    """Write the model at `path` with the weights of its matrix products as 8-bit integers.

    Activations are quantised as they come (dynamic). Embedding tables and what a history is multiplied with stay floats.

    Raises:
        BundleError: the packages for it are missing.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise BundleError(f"quantising takes the extra `onnx`: {error}") from error
    with _quiet():
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporter tells of itself from the user; its errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class OnnxModel:
    """Scores batches by ONNX Runtime on one thread. Threads may share it."""

    def __init__(self, path: Path, schema: FeatureSchema, latent_dim: int | None) -> None:
        """Load the graph.

        Raises:
            BundleError: it is damaged, does not fit the schema, or ONNX Runtime is not installed.
        """
        self._signature = _Signature(tuple(field.name for field in schema.sequences), latent_dim)
        self._session = _open(path, self._signature)

    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """Return [B] logits of the first task."""
        arrays = self._arrays(batch)
        history = batch.histories.get(USER_SOURCE)
        if history is None:
            return self._run(arrays, 1, len(batch)).astype(np.float64)
        row = history.row.numpy()
        sizes = np.bincount(row, minlength=len(history.mask))
        in_order = not (row[1:] < row[:-1]).any()
        if in_order and (sizes == sizes[0]).all():
            return self._run(arrays, len(sizes), int(sizes[0])).astype(np.float64)
        order = np.argsort(row, kind="stable")
        starts = np.cumsum(sizes) - sizes
        out = np.empty(len(batch))
        for group in _alike(sizes):
            places = np.arange(sizes[group[-1]])
            # a short request is filled up with its last row
            rows = order[starts[group, None] + np.minimum(places, sizes[group, None] - 1)]
            found = self._run(_part(arrays, rows.ravel(), group), *rows.shape).reshape(rows.shape)
            is_real = places < sizes[group, None]
            out[rows[is_real]] = found[is_real]
        return out

    def _arrays(self, batch: Batch) -> Arrays:
        arrays: Arrays = {_IDS: batch.ids.numpy(), _NUMERIC: batch.numeric.numpy()}
        for name in self._signature.sequences:
            arrays[_sequence(name)] = batch.sequences[name].numpy()
        if self._signature.latent_dim is not None:
            history = batch.histories[USER_SOURCE]
            assert history.latents is not None
            arrays[_MASK] = history.mask.numpy()
            arrays[_AGE] = history.age_s.numpy()
            arrays[_LATENTS] = history.latents.numpy()
        return arrays

    def _run(self, arrays: Arrays, requests: int, items: int) -> Floats:
        feed = {
            name: values if name in _SHARED else values.reshape(requests, items, values.shape[1])
            for name, values in arrays.items()
        }
        step = max(1, _ROWS_AT_ONCE // items)
        parts = [
            self._session.run(None, {n: values[b : b + step] for n, values in feed.items()})[0]
            for b in range(0, requests, step)
        ]
        flat: Floats = np.concatenate(parts, axis=None) if len(parts) > 1 else parts[0].reshape(-1)
        return flat


def _part(arrays: Arrays, rows: Ints, histories: Ints) -> Arrays:
    """Return some rows and the histories that they read."""
    return {name: values[histories if name in _SHARED else rows] for name, values in arrays.items()}


def _alike(sizes: Ints) -> list[Ints]:
    """Return groups of the histories that rows read, to be padded to the longest of each; that at most doubles the rows."""
    groups: list[list[int]] = []
    for n in np.argsort(sizes, kind="stable").tolist():
        if groups and sizes[n] <= 2 * sizes[groups[-1][0]]:
            groups[-1].append(n)
        elif sizes[n]:
            groups.append([n])
    return [np.asarray(group, dtype=np.int64) for group in groups]


def _open(path: Path, signature: _Signature) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError(f"scoring by ONNX Runtime takes the extra `onnx`: {error}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime has no base class of its own errors
        raise BundleError(
            f"{path} can not be loaded by ONNX Runtime {onnxruntime.__version__}: {error}; export the bundle again"
        ) from error
    found = [one.name for one in session.get_inputs()]
    if sorted(found) != sorted(signature.names):
        raise BundleError(
            f"{path} takes {found}, the schema gives {signature.names}; export the bundle again"
        )
    return session


def _dynamic(signature: _Signature) -> tuple[Any, ...]:  # Any: torch's description of shapes
    # one name for each, shared by the inputs: sizes that only happen to be equal would be taken for constants
    requests, items, events = map(torch.export.Dim, ("requests", "items", "events"))
    block = {0: requests, 1: items}
    history = {0: requests, 1: events}
    histories = [] if signature.latent_dim is None else [history] * 3
    sequences = [{**block, 2: torch.export.Dim(f"keys_{name}")} for name in signature.sequences]
    # the parameters of `_Blocks.forward`: two by name, the others as one tuple
    return (block, block, (*sequences, *histories))


def _random(
    schema: FeatureSchema, signature: _Signature, shape: tuple[int, int, int], seed: int = 0
) -> Arrays:
    """Return inputs of R requests, C items and L events; histories of several lengths, the last one empty."""
    rng = np.random.default_rng([seed, *shape])
    requests, items, events = shape
    ids = [rng.integers(0, field.cardinality, shape[:2]) for field in schema.categorical]
    arrays: Arrays = {
        _IDS: np.stack(ids, -1) if ids else np.zeros((requests, items, 0), np.int64),
        _NUMERIC: rng.normal(0, 1, (requests, items, len(schema.numeric))).astype(np.float32),
    }
    for field in schema.sequences:
        tokens = rng.integers(0, field.cardinality, (requests, items, events))
        arrays[_sequence(field.name)] = np.sort(tokens, -1)[..., ::-1].copy()  # padding at the end
    if signature.latent_dim is not None:
        length = rng.integers(1, events + 1, requests)
        length[-1] = 0 if requests > 1 else length[-1]
        mask = np.arange(events) < length[:, None]
        latents = rng.normal(0, 0.5, (requests, events, signature.latent_dim)) * mask[..., None]
        arrays[_MASK] = mask
        arrays[_AGE] = (rng.exponential(86_400, mask.shape) * mask).astype(np.float32)
        arrays[_LATENTS] = latents.astype(np.float32)
    return arrays


def _check(blocks: _Blocks, schema: FeatureSchema, signature: _Signature, path: Path) -> float:
    session = _open(path, signature)
    largest = 0.0
    for seed, shape in enumerate(_PROBES):
        arrays = _random(schema, signature, shape, seed)
        try:
            (found,) = session.run(None, arrays)
        except Exception as error:  # the runtime has no base class of its own errors
            raise BundleError(
                f"the model exported to ONNX takes one number of requests, items or events only: {error}; serve it with"
                " torch"
            ) from error
        with torch.inference_mode():
            expected = blocks(*(torch.from_numpy(arrays[name]) for name in signature.names))
        gap = np.abs(sigmoid(found) - sigmoid(expected.numpy()))
        largest = max(largest, float(gap.max()))
    if not largest <= MAX_DIFFERENCE:
        raise BundleError(
            f"the model exported to ONNX differs by {largest:.2g} in probability, at most {MAX_DIFFERENCE:g} may be; serve"
            " it with torch"
        )
    return largest
