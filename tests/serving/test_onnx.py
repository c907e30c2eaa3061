"""The model of a bundle in ONNX Runtime gives the scores that torch gives, whatever the sizes of the requests."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import ENCODERS, VMS
from loopfm_ray.serving import onnx as module
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.onnx import export_onnx
from loopfm_ray.serving.parity import check_parity, load_offline
from loopfm_ray.serving.predictor import load_predictor
from loopfm_ray.types import TimeRange
from tests.serving.test_every_vm import servable
from tests.serving.test_predictor import query
from tests.serving.world import CODE, STOP, VM_STOP, make_model

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    """The world's bundle with all back ends."""
    folder = tmp_path_factory.mktemp("onnx") / "bundle"
    prepared = PreparedData.open(world.prepared)
    save_bundle(
        folder, world.spec, world.model, prepared, {}, backends=("torch", "onnx", "onnx_int8")
    )
    return folder


def test_a_request_scores_as_with_torch(world, exported):
    with_torch = load_predictor(exported, world.online)
    with_onnx = load_predictor(exported, world.online, backend="onnx")
    assert with_onnx.bundle.onnx is not None
    for user in ("u1", "u7", "nobody"):
        asked = query(user=user)
        expected, found = with_torch.score(asked), with_onnx.score(asked)
        assert np.abs(found.probs - expected.probs).max() <= 1e-6
        assert found.history == expected.history


def test_requests_of_all_sizes_in_one_pass(world, exported):
    rng = np.random.default_rng(0)
    sizes = [1, 40, 3, 3, 17, 1, 8, 90, 2]
    asked = [
        query(user=f"u{n}", items=tuple(f"i{i}" for i in rng.integers(0, 60, size)))
        for n, size in enumerate(sizes)
    ]
    with_torch = load_predictor(exported, world.online).score_many(asked)
    with_onnx = load_predictor(exported, world.online, backend="onnx").score_many(asked)
    assert [len(one.probs) for one in with_onnx] == sizes
    for one, other in zip(with_torch, with_onnx, strict=True):
        np.testing.assert_allclose(other.probs, one.probs, atol=1e-6)


def test_rows_in_any_order(world, exported):
    # offline rows of a history are wherever the log has them
    offline = {}
    prepared = PreparedData.open(world.prepared)
    for backend in ("torch", "onnx"):
        bundle = load_bundle(exported, backend)
        sample = load_offline(bundle, prepared, world.joined, TimeRange(VM_STOP, STOP), 60)
        offline[backend] = sample.probs
    np.testing.assert_allclose(offline["onnx"], offline["torch"], atol=1e-6)
    predictor = load_predictor(exported, world.online, backend="onnx")
    assert check_parity(predictor, sample, tolerance=1e-5).is_ok


def test_weights_of_8_bits_change_scores_a_little(world, exported):
    asked = query(user="u1")
    exact = load_predictor(exported, world.online).score(asked).probs
    rounded = load_predictor(exported, world.online, backend="onnx_int8").score(asked).probs
    gap = np.abs(rounded - exact)
    assert 1e-6 < gap.max() < 0.2


def test_a_bundle_without_the_back_end_is_refused(world):
    with pytest.raises(BundleError, match=r"no model\.onnx .*online\.backends"):
        load_bundle(world.bundle, "onnx")


def test_a_damaged_graph_is_refused(world, exported, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match="can not be loaded by ONNX Runtime"):
        module.OnnxModel(tmp_path / "m.onnx", world.spec.schema, CODE.dim)
    with pytest.raises(BundleError, match=r"takes \[.*\], the schema gives"):
        module.OnnxModel(exported / "model.onnx", world.spec.schema, None)


def test_an_export_that_scores_otherwise_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(BundleError, match="differs by"):
        export_onnx(world.model, world.spec.schema, CODE.dim, tmp_path / "m.onnx")


def test_a_vm_without_history(world, tmp_path):
    spec = replace(world.spec, vm=DnnConfig(hidden=(8,)), history=None)
    model = make_model(spec.vm, spec.schema).eval()
    prepared = PreparedData.open(world.prepared)
    save_bundle(tmp_path / "b", spec, model, prepared, {}, backends=("onnx",))
    asked = query(user="u3")
    expected = load_predictor(tmp_path / "b").score(asked).probs
    found = load_predictor(tmp_path / "b", backend="onnx").score(asked).probs
    np.testing.assert_allclose(found, expected, atol=1e-6)


PAIRS = [(kind, "attention") for kind in VMS] + [("dnn", name) for name in ENCODERS]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "encoder"), dict.fromkeys(PAIRS))
def test_every_vm_can_be_exported(world, tmp_path, kind, encoder):
    config = servable(kind, encoder)
    model = make_model(config, world.spec.schema, CODE.dim).eval()
    if encoder == "augru":  # a loop over the events, which a graph can only unroll
        with pytest.raises(BundleError, match="serve it with torch"):
            export_onnx(model, world.spec.schema, CODE.dim, tmp_path / "m.onnx")
        return
    assert export_onnx(model, world.spec.schema, CODE.dim, tmp_path / "m.onnx") < 1e-5


def test_training_forward_is_not_changed_by_the_export_layout(world):
    # a single history takes the layout that needs no indices; the slow way gives the same
    from loopfm_ray.models.layers import group_rows

    assert group_rows(torch.zeros(5, dtype=torch.int64), 1).slot is None
    assert group_rows(torch.tensor([0, 1, 1]), 2).slot is not None
