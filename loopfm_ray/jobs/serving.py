"""Serve one bundle on Ray Serve: a single deployment that holds features, model and HTTP together.

One deployment and no handle between features and model: a hop costs several times what scoring does. Ray's HAProxy
ingress is faster but listens on every interface, so it is left to whoever sets `RAY_SERVE_ENABLE_HA_PROXY` knowingly.
"""

import logging
import socket
import threading
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from ray import serve
from ray.serve import Application

from loopfm_ray import log
from loopfm_ray.config import Config
from loopfm_ray.serving.api import Scorer, create_api
from loopfm_ray.store.filesystem import CACHE_BYTES, CACHE_DIR, Location, locate

__all__ = [
    "APP_NAME",
    "DEPLOYMENT_NAME",
    "Loader",
    "ServeConfig",
    "build_app",
    "load",
    "start",
    "stop",
]

_LOGGER = logging.getLogger(__name__)

APP_NAME = "loopfm"
DEPLOYMENT_NAME = "vm"


class ServeConfig(Config):
    """Which bundle is served, with which online store, and how much it takes on."""

    bundle: str
    """Folder or `s3://` address of the VM bundle."""
    cache_dir: str = CACHE_DIR
    """Folder for what is read from S3."""
    cache_bytes: PositiveInt = CACHE_BYTES
    """What that folder may hold before versions that nobody reads are removed."""
    online: str | None = None
    """Directory or `redis://` address of the online store; none for a VM without history."""
    host: str = "127.0.0.1"
    """Interface of the HTTP proxy. Loopback alone: the service asks for no credentials."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP proxy; 0 lets `start` take a free one."""
    num_replicas: PositiveInt = 1
    """Processes that score."""
    num_cpus: NonNegativeFloat = 1.0
    """Logical CPUs that each replica reserves."""
    max_ongoing_requests: PositiveInt = 16
    """Requests that one replica takes at a time."""
    max_queued_requests: int = Field(default=64, ge=-1)
    """Requests that wait at a proxy before it answers 503; -1 is without limit."""
    history_timeout_s: PositiveFloat = 0.05
    """Deadline of one look-up in a store behind a network, after which the request is scored without history."""
    reload_s: PositiveFloat = 5.0
    """Seconds between looks for a newer version of the bundle's space in the online store."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of the package's log records."""

    @property
    def location(self) -> Location:
        """Where the bundle lies."""
        return locate(self.bundle, self.cache_dir, self.cache_bytes)


Loader = Callable[[ServeConfig], Scorer]


def load(config: ServeConfig) -> Scorer:
    """Load the bundle and the store that `config` names and check that they belong together.

    Raises:
        BundleError: the bundle is damaged, or the store is not of the space that the bundle was trained in.
        StoreError: there is no such store, or it does not hold that space.
    """
    import torch  # in the replica alone

    from loopfm_ray.serving.predictor import load_predictor

    torch.set_num_threads(1)
    return load_predictor(config.location, config.online, config.history_timeout_s)


def build_app(config: ServeConfig, loader: Loader = load) -> Application:
    """Return the Serve application; nothing is loaded before a replica starts.

    Args:
        config: checked arguments.
        loader: makes the scorer inside the replica; it has to be picklable.
    """
    deployment = serve.deployment(
        name=DEPLOYMENT_NAME,
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        ray_actor_options={"num_cpus": config.num_cpus, "runtime_env": {"env_vars": _THREADS}},
    )(serve.ingress()(_Replica))
    return deployment.bind(config, loader)


def start(config: ServeConfig, loader: Loader = load) -> str:
    """Serve on the connected Ray cluster, wait until a replica is ready, and return the base URL.

    Raises:
        RuntimeError: the replica could not load; Ray's message holds the reason.
    """
    port = config.port or _free_port(config.host)
    serve.start(http_options={"host": config.host, "port": port})
    serve.run(build_app(config, loader), name=APP_NAME, route_prefix="/")
    url = f"http://{config.host}:{port}"
    _LOGGER.info("serving %s at %s", config.bundle, url)
    return url


def stop() -> None:
    """Take the application down and end Serve on the connected cluster."""
    serve.shutdown()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def follow(scorer: Scorer, every_s: float, stopped: Callable[[float], bool] | None = None) -> None:
    """Let `scorer` look for newer histories every `every_s` seconds, beside its requests.

    Args:
        scorer: to reload.
        every_s: how long to wait before each look.
        stopped: waits so many seconds and tells whether to end; None waits by the clock and never ends.
    """
    wait = stopped or threading.Event().wait
    while not wait(every_s):
        try:
            scorer.reload()
        except Exception:  # the edge of the thread: scoring goes on with what it has
            _LOGGER.exception("looking for newer histories failed")


_THREADS = {"OMP_NUM_THREADS": "1"}


class _Replica:
    """Runs in a replica process: loads in the constructor, so no request comes before the model is there."""

    def __init__(self, config: ServeConfig, loader: Loader) -> None:
        log.setup(config.log_level)
        self._scorer = loader(config)
        follower = threading.Thread(
            target=follow, args=(self._scorer, config.reload_s), daemon=True
        )
        follower.start()

    # Any: an ASGI application, as Serve asks for it once the constructor is done.
    async def __serve_build_asgi_app__(self) -> Any:
        return create_api(self._scorer)
