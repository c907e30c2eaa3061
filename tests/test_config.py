from pathlib import Path

import pytest
import yaml
from pydantic import PositiveInt

from loopfm_ray.config import (
    Config,
    apply_overrides,
    config_hash,
    dump_yaml,
    load_config,
    read_yaml,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import PipelineConfig, VmStageConfig
from loopfm_ray.models.registry import VMS

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted((FOLDER / "pipeline").rglob("*.yaml"))
VM_CONFIGS = sorted((FOLDER / "vm").rglob("*.yaml"))


class Inner(Config):
    width: PositiveInt = 8


class Outer(Config):
    name: str = "x"
    inner: Inner = Inner()
    rate: float = 1.0


def test_order_is_defaults_then_file_then_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: file\ninner: {width: 4}\n")
    config = load_config(Outer, path, ["inner.width=2"])
    assert config == Outer(name="file", inner=Inner(width=2))
    assert load_config(Outer, None) == Outer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nmae: y", "nmae: Extra inputs are not permitted"),
        ("inner: {width: 0}", "inner.width: Input should be greater than 0, found 0"),
        ("inner: {width: wide}", "inner.width"),
        ("rate: .nan", "rate"),
    ],
)
def test_a_wrong_value_names_its_path_and_the_file(tmp_path, text, expected):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(Outer, path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("override", ["inner.width", "=3", ".width=3", "name.first=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match="--set"):
        apply_overrides({"name": "x"}, [override])


def test_a_yaml_file_stands_for_its_section(tmp_path):
    path = tmp_path / "other.yaml"
    path.write_text("inner: {width: 5}\nname: other\n")
    assert apply_overrides({}, [f"inner={path}"]) == {"inner": {"width": 5}}
    path.write_text("width: 6\n")
    assert apply_overrides({}, [f"inner={path}"]) == {"inner": {"width": 6}}


@pytest.mark.parametrize("text", ["- 1\n", "a: [1\n", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml"):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        read_yaml(tmp_path / "nothing.yaml")


def test_an_empty_file_is_all_defaults(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert load_config(Outer, path) == Outer()


def test_overrides_leave_the_tree_as_it_was():
    tree = {"inner": {"width": 1}}
    apply_overrides(tree, ["inner.width=2"])
    assert tree == {"inner": {"width": 1}}


def test_the_hash_follows_every_value():
    hashes = {
        config_hash(Outer()),
        config_hash(Outer(name="y")),
        config_hash(Outer(inner=Inner(width=1))),
    }
    assert len(hashes) == 3
    assert config_hash(Outer()) == config_hash(Outer())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_yaml_loads_and_its_dump_gives_the_same_config(path, tmp_path):
    config = load_config(PipelineConfig, path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config))
    assert load_config(PipelineConfig, copy) == config


@pytest.mark.parametrize("path", VM_CONFIGS, ids=lambda path: path.stem)
def test_every_vm_takes_the_place_of_one_in_a_pipeline(path):
    tree = read_yaml(path)
    assert tree["model"]["kind"] == path.stem
    config = load_config(PipelineConfig, CONFIGS[0], [f"vms.vm_kd_loopfm={path}"])
    assert config.vms["vm_kd_loopfm"] == VmStageConfig.model_validate(tree)
    again = yaml.safe_load(dump_yaml(config.vms["vm_kd_loopfm"]))
    assert VmStageConfig.model_validate(again) == config.vms["vm_kd_loopfm"]


def test_every_vm_kind_has_a_yaml():
    assert {path.stem for path in VM_CONFIGS} == set(VMS)
    assert {path.parent.name for path in FOLDER.rglob("*.yaml")} == {"pipeline", "vm"}


def test_the_demo_config_is_the_default():
    path = next(path for path in CONFIGS if path.stem == "complete_journey")
    assert load_config(PipelineConfig, path).data.split == PipelineConfig().data.split
    assert load_config(PipelineConfig, path).data.past == PipelineConfig().data.past
    assert list(load_config(PipelineConfig, path).vms) == list(PipelineConfig().vms)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("baseline=nobody", "baseline is 'nobody'"),
        ("seeds=[1,1]", "seeds must differ"),
        ("seeds=[]", "seeds"),
        ("online.model=vm_raw", "online store holds latents only"),
        ("name=../escape", "name"),
        ("fm.bits=1", "fm.bits"),
    ],
)
def test_a_pipeline_that_can_not_work_is_refused(override, expected):
    path = next(path for path in CONFIGS if path.stem == "complete_journey")
    with pytest.raises(ConfigError, match=expected.replace("[", r"\[")):
        load_config(PipelineConfig, path, [override])


def test_the_fm_keeps_its_name():
    tree = yaml.safe_load(dump_yaml(PipelineConfig()))
    tree["vms"]["fm"] = tree["vms"]["vm"]
    with pytest.raises(Exception, match="can not be called 'fm'"):
        PipelineConfig.model_validate(tree)


def test_runs_may_share_an_online_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PipelineConfig(name="a").online_target == str(tmp_path / "runs/a/online")
    shared = {"online": {"target": "runs/a/online"}}
    assert PipelineConfig(name="b", **shared).online_target == str(tmp_path / "runs/a/online")
    redis = {"online": {"target": "redis://127.0.0.1:6379/0"}}
    assert PipelineConfig(name="b", **redis).online_target == "redis://127.0.0.1:6379/0"
