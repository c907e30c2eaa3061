"""The image is made of pinned versions, runs as a user without rights, and holds no secrets."""

import re
import tomllib

from loopfm_ray.jobs.cluster import worker_environment
from tests.infra.deployments import INFRA, ROOT, compose, containers, dockerfile, load

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def environment():
    (text,) = [text for name, text in dockerfile() if name == "ENV"]
    return dict(pair.split("=", 1) for pair in text.split())


def test_python_is_one_that_the_package_takes():
    (version,) = [
        text.split("=")[1] for name, text in dockerfile() if text.startswith("PYTHON_VERSION=")
    ]
    assert PROJECT["requires-python"] == f">={version}"
    assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]
    bases = [text for name, text in dockerfile() if name == "FROM"]
    assert all("${PYTHON_VERSION}" in base for base in bases)


def test_what_is_installed_is_pinned():
    pins = {
        line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }  # fmt: skip
    assert {"ray", "torch", "uv"} <= pins
    for name, text in dockerfile():
        if name != "RUN":
            continue
        for command in re.findall(r"(?:uv )?pip install[^&]*", text):
            assert "constraints.txt" in command or "--no-deps" in command, command


def test_extras_are_those_of_the_project():
    text = " ".join(text for name, text in dockerfile() if name == "RUN")
    extras = set(re.findall(r"--extra (\w+)", text))
    assert extras >= {"redis", "otel", "onnx"}  # the online store, traces and the faster backend
    assert extras <= set(PROJECT["optional-dependencies"])


def test_it_runs_as_a_user_without_rights():
    users = [text for name, text in dockerfile() if name == "USER"]
    assert users == ["1000:1000"]
    last = [name for name, _ in dockerfile()].index("USER")
    assert not [name for name, _ in dockerfile()[last:] if name in ("RUN", "COPY")]


def test_no_entry_point_stands_before_what_ray_up_and_kuberay_start():
    assert not [text for name, text in dockerfile() if name == "ENTRYPOINT"]


def test_its_environment_is_that_of_our_clusters():
    mine = environment()
    assert mine["RAY_AUTH_MODE"] == "token"
    assert mine["HOME"] == "/home/loopfm"
    wanted = worker_environment()
    shared = set(mine) & set(wanted) - {"RAY_AUTH_MODE"}
    assert len(shared) >= 6
    assert {name: mine[name] for name in shared} == {name: wanted[name] for name in shared}


def test_what_is_copied_is_there_and_let_in():
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert allowed[1] == "*"
    sources = [
        source
        for name, text in dockerfile()
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    ]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed
    assert {line[1:] for line in allowed if line.startswith("!")} == set(sources)


def test_one_image_with_one_version_is_named_everywhere():
    names = {service["image"] for service in compose()["services"].values()}
    names |= {one.spec["image"] for one in containers()}
    for path in (INFRA / "ray").glob("*.yaml"):
        tree = load(path)
        names.add(tree["docker"]["image"])
        for kind in tree.get("available_node_types", {}).values():
            names |= {kind["docker"]["worker_image"]} if "docker" in kind else set()
    ours = {name for name in names if "loopfm-ray" in name}
    version = PROJECT["version"]
    assert ours == {
        f"loopfm-ray:{version}-cpu",
        f"registry.example.com/loopfm-ray:{version}-cpu",
        f"registry.example.com/loopfm-ray:{version}-cuda",
    }
    for name in names - ours:
        assert re.search(r":v?\d", name), f"{name} has no version"
    built = (ROOT / "docs/deploy.md").read_text() + (INFRA / "Dockerfile").read_text()
    assert set(re.findall(r"-t (loopfm-ray:\S+)", built)) == {
        f"loopfm-ray:{version}-cpu", f"loopfm-ray:{version}-cuda",
    }  # fmt: skip


def test_the_cuda_image_runs_where_a_gpu_is():
    for container in containers():
        wants_gpu = "nvidia.com/gpu" in container.spec.get("resources", {}).get("limits", {})
        assert wants_gpu == container.spec["image"].endswith("-cuda"), container.spec["name"]
