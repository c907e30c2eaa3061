import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import PositiveInt, ValidationError

from loopfm_ray.config import (
    Config,
    apply_overrides,
    config_hash,
    dump_yaml,
    load_config,
    merge,
    read_yaml,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiment_grid import ExperimentConfig
from loopfm_ray.experiments import PipelineConfig, VmStageConfig
from loopfm_ray.kge.embed import KgeRunConfig
from loopfm_ray.kge.experiment import KgeExperimentConfig
from loopfm_ray.models.costs import fm_cost
from loopfm_ray.models.registry import VMS
from tests.model_inputs import ITEM_FIELDS, SCHEMA

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted((FOLDER / "pipeline").rglob("*.yaml"))
VM_CONFIGS = sorted((FOLDER / "vm").rglob("*.yaml"))
FM_CONFIGS = [FOLDER / "fm" / f"{name}.yaml" for name in ("s", "m", "l", "xl", "xxl")]
KGE_CONFIGS = sorted((FOLDER / "kge").rglob("*.yaml"))


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


def test_a_section_of_a_file_may_lie_in_another_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ninner: {width: 3}\n")
    (tmp_path / "whole.yaml").write_text("width: 5\n")
    path = tmp_path / "a.yaml"
    path.write_text("name: kept.yaml\ninner: base.yaml\n")
    assert load_config(Outer, path) == Outer(name="kept.yaml", inner=Inner(width=3))
    path.write_text("inner: whole.yaml\n")
    assert load_config(Outer, path, ["rate=2"]) == Outer(inner=Inner(width=5), rate=2.0)
    path.write_text("inner: nothing.yaml\n")
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_config(Outer, path)


@pytest.mark.parametrize("path", [*CONFIGS, *KGE_CONFIGS], ids=lambda path: path.stem)
def test_every_yaml_loads_and_its_dump_gives_the_same_config(path, tmp_path):
    kind = read_yaml(path).get("kind", "pipeline")
    of_kind = {
        "pipeline": PipelineConfig,
        "experiment": ExperimentConfig,
        "kge": KgeRunConfig,
        "kge_experiment": KgeExperimentConfig,
    }
    cls = of_kind[kind]
    config = load_config(cls, path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config))
    assert load_config(cls, copy) == config


def test_merge_goes_into_sections_and_replaces_another_kind():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": {"kind": "one", "z": 1}}
    assert merge(base, {"a": {"y": [3]}, "c": 4}) == {
        "a": {"x": 1, "y": [3]},
        "b": {"kind": "one", "z": 1},
        "c": 4,
    }
    assert merge(base, {"b": {"kind": "two"}})["b"] == {"kind": "two"}
    assert merge(base, {"b": {"z": 2}})["b"] == {"kind": "one", "z": 2}
    assert base["b"] == {"kind": "one", "z": 1}


GRID = {
    "name": "grid",
    "models": {"deep": {"model": {"hidden": [8]}}, "wide": {"model": {"hidden": [32]}}},
    "arms": {
        "none": {},
        "kd": {"kd_weight": 1.0},
        "kd_loopfm": {"kd_weight": 1.0, "model": {"history": {"user": {"kind": "latent"}}}},
    },
    "variants": {
        "main": {},
        "short": {"history": {"max_len": 5}, "vm": {"model": {"dropout": 0.1}}},
    },
}


def test_an_experiment_is_every_model_in_every_arm_of_every_variant():
    config = ExperimentConfig.model_validate(GRID)
    main, short = (config.pipeline(name) for name in ("main", "short"))
    assert list(main.vms) == [f"{model}.{arm}" for model in GRID["models"] for arm in GRID["arms"]]
    cell = short.vms["wide.kd_loopfm"]
    assert (cell.kd_weight, cell.model.hidden, cell.model.dropout) == (1.0, (32,), 0.1)
    assert cell.model.history.kind == "latent"
    assert (main.history.max_len, short.history.max_len) == (100, 5)
    assert main.baseline == "deep.none"
    assert main.paths.root == config.root / "variants" / "main"


def test_a_model_says_how_it_reads_the_histories_that_an_arm_leaves_open():
    encoder = {"kind": "gru", "hidden": 8}
    own = {"kind": "latent", "encoder": {"kind": "mean"}}
    arms = {**GRID["arms"], "two": {"model": {"history": {"a": {"kind": "raw"}, "b": own}}}}
    models = {"deep": {**GRID["models"]["deep"], "histories": {"encoder": encoder}}, "wide": {}}
    config = ExperimentConfig.model_validate({**GRID, "arms": arms, "models": models})
    vms = config.pipeline("main").vms
    found = {name: history.encoder.kind for name, history in vms["deep.two"].model.history.sorted()}
    assert found == {"a": "gru", "b": "mean"}
    assert vms["deep.none"].model.history.kind == "none"
    assert vms["wide.two"].model.history.root["a"].encoder.kind == "attention"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"roles": {"kd": "distilled"}}, "roles.kd is 'distilled'"),
        ({"variants": {"bad": {"histroy": {}}}}, r"variants.bad has \['histroy'\]"),
        ({"variants": {"bad": {"history": {"max_len": 0}}}}, "variants.bad of experiment grid"),
        ({"models": {"a/b": {}}}, "become file names, found 'a/b'"),
    ],
)
def test_an_experiment_that_can_not_work_is_refused(change, expected):
    with pytest.raises((ConfigError, ValidationError), match=expected):
        ExperimentConfig.model_validate({**GRID, **change})


def test_the_fm_sizes_differ_in_numbers_alone_and_each_is_larger_than_the_one_before():
    assert sorted(FM_CONFIGS) == sorted((FOLDER / "fm").rglob("*.yaml"))

    def without_numbers(tree):
        if isinstance(tree, dict):
            return {name: without_numbers(value) for name, value in tree.items()}
        return tree if isinstance(tree, str) else None

    trees = [read_yaml(path) for path in FM_CONFIGS]
    assert all(without_numbers(tree) == without_numbers(trees[0]) for tree in trees)
    fms = [load_config(PipelineConfig, CONFIGS[0], [f"fm={path}"]).fm.model for path in FM_CONFIGS]
    sizes = [fm_cost(fm, SCHEMA, ITEM_FIELDS).num_dense_parameters for fm in fms]
    assert all(2 * before < after for before, after in pairwise(sizes))


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
    assert {path.parent.name for path in FOLDER.rglob("*.yaml")} == {"fm", "kge", "pipeline", "vm"}


def test_the_vectors_that_the_graph_of_movielens_gives_are_those_that_its_pipeline_reads():
    graph = load_config(KgeRunConfig, FOLDER / "kge/movielens.yaml")
    config = load_config(ExperimentConfig, FOLDER / "pipeline/kge_features_movielens.yaml")
    names = ["kge_linked", *(f"kge_{at}" for at in range(graph.backbone.dimension))]
    plain, kge, only_fm = (config.pipeline(name).data for name in ("plain", "kge", "kge_fm"))
    assert plain.items is None
    assert kge.items == only_fm.items
    assert kge.items.path == str(graph.root / "items/items.parquet")
    assert list(kge.items.numeric) == names
    assert kge.vm_fields == (*plain.vm_fields, *names)
    assert only_fm.vm_fields == plain.vm_fields
    assert graph.graph.path == plain.path


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
        ("history.keys=[[user]]", "and not [user], which is always there"),
        ("history.keys=[[item],[item]]", "different keys"),
        ("history.keys=[[item,item]]", "different parts"),
        ("history.side.shape=x", "history.side.shape"),
        ("vms.vm.fitnets={weight: 1.0}", "vms.vm .* set history.with_own_latent"),
        (
            "vms.vm.model.history={it: {kind: latent, key: [item]}}",
            r"vms.vm reads the history 'it' by \['item'], history.keys has \[]",
        ),
        (
            "vms.vm.model.history={u: {kind: latent, side: {label: true}}}",
            "set history.side.label",
        ),
    ],
)
def test_a_pipeline_that_can_not_work_is_refused(override, expected):
    path = next(path for path in CONFIGS if path.stem == "complete_journey")
    with pytest.raises(ConfigError, match=re.sub(r"(?<!\\)\[", r"\\[", expected)):
        load_config(PipelineConfig, path, [override])


def test_what_the_join_is_asked_to_write_can_be_read():
    path = next(path for path in CONFIGS if path.stem == "complete_journey")
    config = load_config(
        PipelineConfig,
        path,
        [
            "history.with_own_latent=true",
            "history.side={label: label, event_type: store}",
            "history.keys=[[item],[user,department]]",
            "vms.vm.fitnets={weight: 1.0}",
            "vms.vm.model.history={it: {kind: latent, key: [user, department], side: {label: true, num_event_types: 3}}}",
        ],
    )
    join = config.history.join
    assert join.side.origins == {"label": "label", "event_type": "store"}
    assert join.keys == (("item",), ("user", "department"))
    assert join.with_own_latent
    assert "latent_by_user_department" in config.vms["vm"].model.history.sources


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
