"""Workers that a cluster has no room for are refused where it can not grow."""

import pytest

from loopfm_ray.errors import ConfigError
from loopfm_ray.jobs.training import scaling_config


@pytest.fixture
def cluster(monkeypatch):
    """Make a cluster with these resources, on machines of these addresses."""

    def make(resources, *addresses):
        nodes = [{"NodeManagerAddress": address} for address in addresses]
        monkeypatch.setattr("ray.cluster_resources", lambda: resources)
        monkeypatch.setattr("ray.nodes", lambda: nodes)

    return make


def test_as_many_workers_as_cpus_find_room(cluster):
    cluster({"CPU": 3.0, "memory": 1.0}, "127.0.0.1")
    asked = scaling_config("fm.learning.num_workers", 3)
    assert (asked.num_workers, asked.use_gpu) == (3, False)
    assert asked.resources_per_worker == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("resources", "use_gpu", "found"),
    [
        ({"CPU": 2.0}, False, r"x\.num_workers is 3 and the cluster has 2 CPUs.*raise ray\.num_cpus"),
        ({"CPU": 8.0}, True, r"the cluster has 0 GPUs.*needs; take fewer workers"),
        ({"CPU": 8.0, "GPU": 2.0}, True, r"the cluster has 2 GPUs"),
    ],
)  # fmt: skip
def test_more_workers_than_this_machine_has_room_for_are_refused(
    cluster, resources, use_gpu, found
):
    cluster(resources, "127.0.0.1")
    with pytest.raises(ConfigError, match=found):
        scaling_config("x.num_workers", 3, use_gpu=use_gpu)


def test_a_cluster_of_several_machines_may_grow(cluster):
    cluster({"CPU": 2.0}, "10.0.0.4", "10.0.0.5")
    assert scaling_config("x", 64, use_gpu=True).resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
