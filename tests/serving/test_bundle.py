import json
import shutil
from dataclasses import replace

import pytest
import torch

from loopfm_ray.config import config_hash
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.spec import read_spec, spec_tree
from loopfm_ray.store.manifest import commit, read_manifest, stage
from tests.model_inputs import histories
from tests.serving.world import make_model


@pytest.fixture
def copy(world, tmp_path):
    """A bundle of one's own to damage."""
    return shutil.copytree(world.bundle, tmp_path / "bundle")


def rewrite(folder, change):
    """Change `bundle.json` and commit the folder as a version again, checksums and all."""
    tree = json.loads((folder / "bundle.json").read_text())
    change(tree)
    target = folder.parent / "rewritten"
    with stage(target) as staged:
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        (staged / "manifest.json").unlink()
        (staged / "bundle.json").write_text(json.dumps(tree))
        commit(staged, kind="bundle", config_hash=config_hash(1), inputs={}, meta={}, num_rows=0)
    return target


def test_a_bundle_comes_back_as_it_was_saved(world):
    bundle = load_bundle(world.bundle)
    assert bundle.spec == world.spec
    assert bundle.version == read_manifest(world.bundle).version
    assert not bundle.model.training
    saved = world.model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in bundle.model.state_dict().items())


def test_vocabularies_are_cut_to_what_the_model_knows(world):
    bundle, prepared = load_bundle(world.bundle), PreparedData.open(world.prepared)
    sizes = {field.name: field.cardinality for field in bundle.spec.schema.fields}
    for name in ("device", "tags", "hour", "weekday"):
        keys = bundle.vocabularies[name].keys
        assert len(keys) + 1 == sizes[name]
        assert keys == prepared.vocabulary(name).keys[: len(keys)]
    assert len(bundle.vocabularies["device"]) < len(prepared.vocabulary("device"))
    # the VM reads their tables: an item that came after training still has its category
    assert bundle.items.keys == prepared.items.keys
    assert len(bundle.items) > sizes["item"]
    assert set(bundle.items.ids) == {"category"}
    assert "category" not in bundle.vocabularies


def test_the_same_bundle_has_the_same_version(world, tmp_path):
    prepared = PreparedData.open(world.prepared)
    inputs = read_manifest(world.bundle).inputs
    again = save_bundle(tmp_path / "again", world.spec, world.model, prepared, inputs)
    assert again.version == read_manifest(world.bundle).version
    other = replace(world.spec, calibration=replace(world.spec.calibration, bias=0.5))
    assert save_bundle(tmp_path / "other", other, world.model, prepared, inputs) != again


def test_spec_survives_json(world):
    assert read_spec(json.loads(json.dumps(spec_tree(world.spec)))) == world.spec


def test_nothing_in_a_bundle_is_a_pickle(world):
    suffixes = {path.suffix for path in world.bundle.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".parquet", ".safetensors"}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "bundle.json", "items.parquet", "vocab/device.parquet"]
)
def test_a_tampered_file_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "users.parquet"])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(BundleError, match="can not be loaded"):
        load_bundle(copy)


def test_a_path_without_a_bundle_is_refused(world, tmp_path):
    with pytest.raises(BundleError, match="no dataset version"):
        load_bundle(tmp_path)
    with pytest.raises(BundleError, match="kind 'prepared'"):
        load_bundle(world.prepared)


def test_a_format_of_the_future_is_refused(copy):
    target = rewrite(copy, lambda tree: tree.update(format_version=2))
    with pytest.raises(BundleError, match="format_version 2"):
        load_bundle(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("vm"), "can not be loaded"),
        (lambda tree: tree["vm"].update(hidden=[7]), "do not fit"),
        (lambda tree: tree["vm"].update(unknown=1), "can not be loaded"),
        (lambda tree: tree["schema"]["fields"].pop(5), "do not fit"),
        (lambda tree: tree["schema"]["fields"][5].update(cardinality=3), "ids in its vocabulary"),
        (lambda tree: tree.update(history=None), "history"),
        (lambda tree: tree.update(derive=["price"]), "derived fields"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(copy, change, message):
    names = [f["name"] for f in json.loads((copy / "bundle.json").read_text())["schema"]["fields"]]
    assert "device" in names
    place = names.index("device")

    def at_device(tree):
        fields = tree["schema"]["fields"]
        fields.insert(5, fields.pop(place))
        change(tree)
        if len(fields) == len(names):
            fields.insert(place, fields.pop(5))

    with pytest.raises(BundleError, match=message):
        load_bundle(rewrite(copy, at_device))


@pytest.mark.parametrize("kind", ["raw", "both"])
def test_a_vm_with_a_raw_history_can_not_be_served(world, kind):
    vm = world.spec.vm.model_copy(update={"history": histories(kind)})
    with pytest.raises(BundleError, match="holds latents only"):
        replace(world.spec, vm=vm)


def test_a_pin_is_given_exactly_for_a_latent_history(world):
    with pytest.raises(BundleError, match="pin"):
        replace(world.spec, history=None)
    with pytest.raises(BundleError, match="pin"):
        replace(world.spec, vm=DnnConfig())


def test_weights_that_do_not_fit_or_are_not_finite_are_not_saved(world, tmp_path):
    prepared = PreparedData.open(world.prepared)
    narrow = make_model(DnnConfig(hidden=(4,)), world.spec.schema)
    with pytest.raises(BundleError, match="do not fit"):
        save_bundle(tmp_path / "b", world.spec, narrow, prepared, {})
    broken = make_model(world.spec.vm, world.spec.schema, 10)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(BundleError, match="not finite"):
        save_bundle(tmp_path / "b", world.spec, broken, prepared, {})
    assert not (tmp_path / "b").exists()
