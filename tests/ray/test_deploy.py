"""The deployment files as Ray itself reads them, and what they count on: tokens, probes, heads without CPUs."""

import copy
import importlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from loopfm_ray.serving.config import ServeConfig
from tests.conftest import free_ports
from tests.infra.deployments import LAUNCHERS, ROOT, commands, containers, load, one
from tests.ray.heads import running_head

TOKEN = "0123456789abcdef" * 4
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch that keeps nodes of one machine off its other interfaces."""
RAY = [(where, words) for where, words in commands() if words[0] == "ray"]


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_file_is_valid_for_ray(path):
    config = prepare_config(load(path))
    validate_config(config)
    # Ray's defaults for AWS would install a Ray of theirs
    assert not config["setup_commands"]
    assert not config["head_setup_commands"]
    assert not config["worker_setup_commands"]
    num_workers = sum(kind["max_workers"] for kind in config["available_node_types"].values())
    assert num_workers >= config["max_workers"] > 0
    if "worker_ips" in config["provider"]:
        assert config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("key", ["initialisation_commands", "max_worker"])
def test_a_misspelt_key_of_a_launcher_file_is_found(path, key):
    config = copy.deepcopy(load(path))
    config[key] = []
    with pytest.raises(Exception, match=key):
        validate_config(prepare_config(config))


@pytest.mark.parametrize(("where", "words"), RAY, ids=lambda value: str(value)[:60])
def test_ray_command_is_one_of_rays(where, words):
    command, rest = ray_cli, words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    rest = [*rest, "true"] if rest[-1:] == ["--"] else rest
    command.make_context(command.name, list(rest))


def test_a_wrong_ray_command_is_found():
    with pytest.raises(Exception, match="No such option"):
        ray_cli.commands["start"].make_context("start", ["--head", "--dashboard-prt=1"])


def test_the_service_is_one_that_serve_deploys():
    tree = yaml.safe_load(one("RayService")["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(tree)
    (application,) = schema.applications
    module, name = application.import_path.split(":")
    build = getattr(importlib.import_module(module), name)
    built = build(ServeConfig.model_validate(application.args))
    assert isinstance(built, Application)
    tree["proxy_location"] = "Everywhere"
    with pytest.raises(ValueError, match="proxy_location"):
        ServeDeploySchema.model_validate(tree)


@pytest.fixture(scope="module")
def head():
    # on a busy machine a proxy is not up within Serve's 5 s, and is killed
    with running_head(**AUTH, RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S="60") as ports:
        yield ports


def status_of(port, path, token=None):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_probes_are_answered_without_a_token_and_nothing_else_is(head):
    ports = {"dashboard": head["dashboard-port"], "agent": head["dashboard-agent-listen-port"]}
    probes = {
        (probe["httpGet"]["port"], probe["httpGet"]["path"])
        for container in containers()
        if container.is_ray
        for probe in (container.spec["livenessProbe"], container.spec["readinessProbe"])
        if probe["httpGet"]["port"] in ports
    }
    assert {port for port, _ in probes} == set(ports)
    for port, path in probes:
        assert status_of(ports[port], path) == 200, path
    assert status_of(ports["dashboard"], "/api/jobs/") == 401
    assert status_of(ports["dashboard"], "/api/jobs/", "f" * 64) == 403
    assert status_of(ports["dashboard"], "/api/jobs/", TOKEN) == 200
    assert status_of(ports["dashboard"], "/api/serve/applications/") == 401


JOB = """
import os, sys, urllib.request
import ray
from ray import serve
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect

@serve.deployment
class Echo:
    def __call__(self, request):
        return "ok"

with connect(RayConfig()):
    inside = ray.get(ray.remote(lambda: (os.environ["RAY_AUTH_MODE"], os.environ["OMP_NUM_THREADS"])).remote())
    port = int(sys.argv[1])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Echo.bind())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/healthz", timeout=20) as answer:
        print("JOB", *inside, answer.status)
"""
SUBMIT = """
import sys
from infra.submit import submit
result = submit(["-c", *sys.argv[2:]], sys.argv[1], entrypoint=("python",), on_log=sys.stdout.write)
sys.exit(result.exit_code)
"""


def run_here(*words, **environ):
    """Run Python in a process of its own: Ray reads its mode of authentication once."""
    wanted = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    wanted.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, *words], env=wanted, cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_job_is_submitted_with_the_token_and_serve_answers_its_probe(head):
    address = f"http://127.0.0.1:{head['dashboard-port']}"
    done = run_here("-c", SUBMIT, address, JOB, str(free_ports(1)[0]), **AUTH)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "JOB token 1 200" in done.stdout


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_job_with_another_token_is_refused_in_one_line(head):
    address = f"http://127.0.0.1:{head['dashboard-port']}"
    other = {**AUTH, "RAY_AUTH_TOKEN": "f" * 64}
    done = run_here("infra/submit.py", "--address", address, "--", "config", "synthetic", **other)
    assert done.returncode == 1
    assert "asks for another token" in done.stderr
    assert "Traceback" not in done.stderr


CLUSTER = """
import json, os, subprocess, sys
from ray.cluster_utils import Cluster
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect

node = {"node_ip_address": "127.0.0.1", "object_store_memory": 200 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
workers = [cluster.add_node(**node, num_cpus=4) for _ in range(2)]
cluster.wait_for_nodes()
try:
    if sys.argv[1:]:
        command = [sys.executable, "-m", "loopfm_ray.cli", *sys.argv[1:], "--set", f"ray.address={cluster.address}"]
        sys.exit(subprocess.run(command).returncode)
    with connect(RayConfig(address=cluster.address)):
        @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
        def look():
            return ray.get_runtime_context().get_node_id(), os.environ["OMP_NUM_THREADS"], os.environ["RAY_AUTH_MODE"]
        found = ray.get([look.remote() for _ in range(8)])
        used = {name for name, *_ in found}
        print(json.dumps({
            "cpus": ray.cluster_resources()["CPU"],
            "nodes": len(ray.nodes()),
            "on_workers": used <= {worker.node_id for worker in workers},
            "used": len(used),
            "environment": sorted({(threads, mode) for _, threads, mode in found}),
        }))
finally:
    cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_tasks_run_on_the_workers_of_a_head_without_cpus():
    done = run_here("-c", CLUSTER, **AUTH, **LOOPBACK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == {
        "cpus": 8.0,
        "nodes": 3,
        "on_workers": True,
        "used": 2,
        "environment": [["1", "token"]],
    }


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_loop_runs_on_the_workers_of_a_head_without_cpus(tmp_path):
    done = run_here(
        "-c", CLUSTER, "demo", "synthetic", "--json",
        "--set", f"run_dir={tmp_path}", "--set", "name=nodes", "--set", "data.num_rows=4000",
        "--set", "online.parity_requests=10",
        **AUTH, **LOOPBACK,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    summary = json.loads((tmp_path / "nodes" / "summary.json").read_text())
    assert summary["audit"]["num_leaks"] == 0
    assert summary["parity"]["max_abs_diff"] < 1e-5
