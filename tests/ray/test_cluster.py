"""A local cluster is open to nobody but this process."""

import subprocess
import sys

import pytest

from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import worker_environment

CODE = """
import os, pathlib
import ray.data  # before the settings are made, as the jobs do
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect

def listening():
    hosts = set()
    for name in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                hosts.add((fields[1], fields[9]))
    return hosts

before = listening()
with connect(RayConfig(object_store_bytes=200 * 2**20)):
    import ray
    @ray.remote
    def look():
        return os.environ["RAY_AUTH_MODE"], os.environ["OMP_NUM_THREADS"]
    print(*ray.get(look.remote()), ray.util.get_node_ip_address(), ray.data.DataContext.get_current().use_datasource_v2)
    opened = {address.rsplit(":", 1)[0] for address, inode in listening() - before}
    print(",".join(sorted(opened)))
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net")
def test_a_local_cluster_listens_on_loopback_alone(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    result = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=150
    )
    *_, facts, opened = result.stdout.strip().splitlines()
    assert facts.split() == ["disabled", "1", "127.0.0.1", "False"]
    assert set(opened.split(",")) <= LOOPBACK


def test_the_environment_wins_over_the_defaults(monkeypatch):
    monkeypatch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "0")
    assert worker_environment()["RAY_DATA_DISABLE_PROGRESS_BARS"] == "0"
    assert worker_environment()["OMP_NUM_THREADS"] == "1"
    assert RayConfig().num_cpus >= 6
