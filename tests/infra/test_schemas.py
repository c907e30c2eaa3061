"""Every file under infra/ is valid by the schema of who reads it."""

import copy

import jsonschema
import pytest
import yaml

from tests.infra.deployments import (
    INFRA,
    KUBERNETES,
    RAY_KINDS,
    compose,
    load,
    manifests,
    ray_cluster_spec,
    schema,
)

TREES = [
    pytest.param(tree, id=f"{tree['kind']}-{tree['metadata']['name']}") for tree in manifests()
]


def check(tree):
    definitions = schema("kuberay.json", "kubernetes.json")
    jsonschema.validate(tree, {**definitions, "$ref": f"#/definitions/{tree['kind']}"})


@pytest.mark.parametrize("tree", TREES)
def test_manifest_is_valid(tree):
    check(tree)
    assert tree["kind"] == "Namespace" or tree["metadata"]["namespace"] == "loopfm"


@pytest.mark.parametrize("tree", [tree for tree in manifests() if tree["kind"] in RAY_KINDS])
@pytest.mark.parametrize(
    ("group", "path", "value"),
    [
        ("head", ("enableAutoscaling",), True),
        ("pod", ("securityContext", "runAsNonroot"), True),
        ("container", ("readinessProbe", "httpGet", "url"), "/healthz"),
        ("container", ("resources", "limit"), {}),
        ("container", ("image",), 3),
    ],
)
def test_a_misspelt_or_wrong_field_is_found(tree, group, path, value):
    broken = copy.deepcopy(tree)
    spec = ray_cluster_spec(broken)
    pod = spec["headGroupSpec"]["template"]["spec"]
    at = {"head": spec, "pod": pod, "container": pod["containers"][0]}[group]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(broken)


def test_names_are_used_once():
    names = [(tree["kind"], tree["metadata"]["name"]) for tree in manifests()]
    assert len(names) == len(set(names))
    # the operator makes NAME-head-svc for clusters and services alike
    rays = [name for kind, name in names if kind in RAY_KINDS]
    assert len(rays) == len(set(rays))


def test_compose_file_is_valid():
    jsonschema.validate(compose(), schema("compose-spec.json"))


@pytest.mark.parametrize(
    ("service", "key", "value"),
    [("head", "port", ["8265:8265"]), ("head", "init", "yes"), ("serve", "healtcheck", {})],
)
def test_a_wrong_compose_file_is_found(service, key, value):
    tree = copy.deepcopy(compose())
    tree["services"][service][key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema("compose-spec.json"))


def test_every_yaml_file_loads():
    files = list(INFRA.rglob("*.y*ml"))
    assert len(files) >= 13
    for path in files:
        trees = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        assert all(isinstance(tree, dict) for tree in trees), path
    assert {path.parent for path in files} >= {INFRA, KUBERNETES}


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_ray_version_is_the_pinned_one(kind):
    constraints = (INFRA.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line.split("==")[1] for line in constraints if line.startswith("ray==")]
    for tree in manifests():
        if tree["kind"] == kind:
            assert ray_cluster_spec(tree)["rayVersion"] == pin


def test_grafana_is_provisioned_from_files_that_compose_mounts():
    mounts = dict(one.split(":")[:2] for one in compose()["services"]["grafana"]["volumes"])
    provider = load(INFRA / "compose/grafana-dashboards.yaml")["providers"][0]
    assert mounts["./grafana"] == provider["options"]["path"]
    assert (INFRA / "grafana/serving.json").is_file()
