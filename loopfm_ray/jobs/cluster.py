"""Connect to Ray: a local cluster on loopback by default, or a running one by address."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from loopfm_ray.errors import JobError
from loopfm_ray.experiments import RayConfig

__all__ = ["connect", "worker_environment"]

_LOGGER = logging.getLogger(__name__)

_SETTINGS = {
    # left unset, head and clients may decide differently, by whether a token file happens to exist
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # the second version of the file reader starts dozens of processes for a few files: 100 s instead of 7 on two cores
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Serve's gRPC proxy would read messages of 2 GiB before our own limit of 4 MiB is asked
    "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(8 * 2**20),
}
_WORKER_SETTINGS = {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
_START_ATTEMPTS = 3
_LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def worker_environment() -> dict[str, str]:
    """Return the environment of worker processes on a cluster that others started: one thread each."""
    settings = {key: os.environ.get(key, value) for key, value in _SETTINGS.items()}
    return {**settings, **_WORKER_SETTINGS}


def _stay_on_loopback() -> None:
    """Keep a local cluster off every interface but loopback; nobody else's machine can reach it, so it asks no token.

    Left alone, Ray listens on all interfaces. It has one switch for loopback, meant for other systems, and reads it when
    it is imported, so it is set for this process and, in the environment, for those that Ray starts.
    """
    from ray._private import ray_constants

    os.environ.setdefault(_LOOPBACK_SWITCH, "0")
    if os.environ[_LOOPBACK_SWITCH] == "0":
        ray_constants.ENABLE_RAY_CLUSTER = False


def _start_local(config: RayConfig) -> None:
    """Start a local cluster; on a busy machine Ray's own limit of 30 s is too short, so it is tried again.

    Raises:
        JobError: it did not start.
    """
    import ray

    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                include_dashboard=False,
                object_store_memory=config.object_store_bytes or None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            return
        except Exception as error:  # Ray raises a bare Exception here
            ray.shutdown()
            if "timed out during startup" not in str(error) or attempt == _START_ATTEMPTS:
                raise JobError(
                    f"a local Ray cluster did not start in {attempt} attempts: {error}; stop other work on this machine,"
                    " or name a running cluster with ray.address"
                ) from error
            _LOGGER.warning("Ray was too slow to start, attempt %d of %d", attempt, _START_ATTEMPTS)


@contextmanager
def connect(config: RayConfig) -> Iterator[None]:
    """Connect to the cluster of `config`; shut down afterwards what was started or connected here.

    Inside a job or a test that has connected already, that connection is used and kept.
    """
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    import ray  # after the settings: Ray reads some of them when it is imported
    import ray.data

    # Ray Data was perhaps imported before the settings were made, and then holds its defaults
    context = ray.data.DataContext.get_current()
    context.use_datasource_v2 = False
    context.enable_progress_bars = False
    if _LOGGER.getEffectiveLevel() > logging.DEBUG:
        for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
            logging.getLogger(name).setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    in_job = "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ
    if config.address or in_job:
        ray.init(
            address=config.address or "auto",
            runtime_env={"env_vars": worker_environment()},
            log_to_driver=False,
        )
    else:
        _stay_on_loopback()
        _start_local(config)
    _LOGGER.info("connected to Ray with %s logical CPUs", ray.cluster_resources().get("CPU", 0))
    try:
        yield
    finally:
        ray.shutdown()
