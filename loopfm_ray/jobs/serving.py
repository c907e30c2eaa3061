"""Serve bundles on Ray Serve: a single deployment that holds router, features, models and HTTP together.

One deployment and no handle between its parts: a hop costs several times what scoring does. The same replicas answer
HTTP, by an ASGI application, and gRPC, by methods that have the names of those of `scoring.proto`.
"""

import logging
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve import Application

from loopfm_ray import log
from loopfm_ray.errors import BundleError, ConfigError
from loopfm_ray.jobs.replica_port import keep_on_loopback
from loopfm_ray.serving.api import Scorer, create_api, now_ts
from loopfm_ray.serving.config import ServeConfig
from loopfm_ray.serving.exporter import Exporter
from loopfm_ray.serving.exposure import (
    check_tls,
)
from loopfm_ray.serving.page import Page
from loopfm_ray.serving.rollout import Rollout, Rollouts, Served, read_rollouts
from loopfm_ray.serving.rpc import ScoringServicer
from loopfm_ray.serving.service import Service

if TYPE_CHECKING:
    from loopfm_ray.serving.watch import Watch

__all__ = [
    "APP_NAME",
    "DEPLOYMENT_NAME",
    "Loader",
    "ServeConfig",
    "begin",
    "build_app",
    "load",
    "start",
    "start_proxies",
    "stop",
]

_LOGGER = logging.getLogger(__name__)

SERVICERS = ["loopfm_ray.serving.rpc.add_scoring", "loopfm_ray.serving.rpc.add_health"]
"""What Serve's gRPC proxy takes its methods from."""
APP_NAME = "loopfm"
DEPLOYMENT_NAME = "vm"


Loader = Callable[[ServeConfig], Scorer]


def load(config: ServeConfig) -> Service:
    """Load what `config` names; models of a deployment file come by `_Replica.reconfigure`.

    Raises:
        BundleError: a bundle is damaged, or its store is not of the space that it was trained in.
        StoreError: there is no such store, or it does not hold that space; or no rollout file.
    """
    import torch  # in the replica alone

    torch.set_num_threads(1)
    if config.rollouts is not None:
        path = Path(config.rollouts)
        service = Service(config.open, partial(read_rollouts, path), config.watch())
        begin(service, read_rollouts(path))
        return service
    if config.bundle is None:
        return Service(config.open, watch=config.watch())
    served = Served(bundle=config.bundle, online=config.online)
    predictor = config.open(served)  # once: its own name is the model's
    service = Service(lambda _: predictor, watch=config.watch())
    begin(service, Rollouts(models={predictor.bundle.spec.name: Rollout(stable=served)}))
    return service


def begin(service: Service, rollouts: Rollouts) -> None:
    """Serve the first models; unlike later ones they all have to load.

    Raises:
        BundleError: one can not be served.
    """
    refused = service.apply(rollouts)
    if refused:
        raise BundleError("; ".join(f"model {name}: {why}" for name, why in refused.items()))


def build_app(config: ServeConfig, loader: Loader = load) -> Application:
    """Return the Serve application; nothing is loaded before a replica starts.

    Args:
        config: checked arguments.
        loader: makes the scorer inside the replica; it has to be picklable.
    """
    models = Rollouts(models=config.models).model_dump(mode="json") if config.models else None
    scaling: dict[str, Any] = {"num_replicas": config.num_replicas}
    if config.autoscale is not None:
        scaling = {"autoscaling_config": config.autoscale.model_dump()}
    deployment = serve.deployment(
        name=DEPLOYMENT_NAME,
        user_config=models,
        **scaling,
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config={"retry_after_s": config.retry_after_s},
        graceful_shutdown_timeout_s=config.drain_s,
        ray_actor_options={"num_cpus": config.num_cpus, "runtime_env": {"env_vars": _THREADS}},
    )(serve.ingress()(_Replica))
    return deployment.bind(config, loader)


def start(config: ServeConfig, loader: Loader = load) -> str:
    """Serve on the connected Ray cluster, wait until a replica is ready, and return the base URL.

    Raises:
        ConfigError: others could ask without a key.
        StoreError: the key file, or a file of TLS, is missing, damaged or open to others.
        RuntimeError: the replica could not load; Ray's message holds the reason.
    """
    url = start_proxies(config)
    serve.run(build_app(config, loader), name=APP_NAME, route_prefix="/")
    _LOGGER.info("serving %s at %s", config.bundle or config.rollouts or [*config.models], url)
    if config.grpc_port is not None:
        _LOGGER.info("gRPC at port %d of every interface", config.grpc_port)
    return url


def start_proxies(config: ServeConfig) -> str:
    """Start Serve with its proxies and nothing behind them yet, and return the base URL.

    Raises:
        ConfigError: others could ask without a key.
        StoreError: the key file, or a file of TLS, is missing, damaged or open to others.
    """
    config.check_doors()  # the environment may have changed since it was made
    config.gate()
    port = config.port or _free_port(config.host)
    http: dict[str, str | int | float] = {"host": config.host, "port": port}
    http["request_timeout_s"] = config.request_timeout_s
    if config.tls is not None:
        check_tls(config.tls)
        http |= {"ssl_certfile": config.tls.cert, "ssl_keyfile": config.tls.key}
    serve.start(http_options=http, grpc_options=grpc_options(config.grpc_port))
    return f"http{'s' if config.tls else ''}://{config.host}:{port}"


def grpc_options(port: int | None) -> dict[str, Any] | None:  # Any: options of Serve
    """Return how Serve's gRPC proxy is started; None starts none. A deployment file says the same."""
    if port is None:
        return None
    # reflection would answer without a key
    return {"port": port, "grpc_servicer_functions": SERVICERS, "enable_reflection": False}


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


def _http_host() -> str | None:
    """Return where Serve's HTTP proxy listens, which a deployment file says beside our config; None before there is one."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


class _Replica:
    """Runs in a replica process: loads in the constructor, so no request comes before the model is there."""

    def __init__(self, config: ServeConfig, loader: Loader) -> None:
        self._watch: Watch | None = None
        self._exporter: Exporter | None = None
        log.setup(config.log_level)
        keep_on_loopback(ray.util.get_node_ip_address())
        config.check_doors(_http_host())
        self._config, self._gate = config, config.gate()
        self._scorer = loader(config)
        # without grpc_port Serve's gRPC proxy may run for another application, and then has nothing to ask here
        is_offered = config.grpc_port is not None
        self._watch = self._scorer.watch if isinstance(self._scorer, Service) else None
        self._rpc = ScoringServicer(self._scorer, now_ts, self._gate, is_offered, self._watch)
        if config.metrics is not None and self._watch is not None:
            self._exporter = Exporter(self._watch, config.metrics, self._gate)
        follower = threading.Thread(
            target=follow, args=(self._scorer, config.reload_s), daemon=True
        )
        follower.start()

    def reconfigure(self, user_config: dict[str, Any]) -> None:  # Any: JSON of `Rollouts`
        """Serve the models of a deployment file; Serve calls it at the start, and when they alone have changed."""
        rollouts = Rollouts.model_validate(user_config)
        if not isinstance(self._scorer, Service):
            raise ConfigError("models of a deployment file need the loader that this module has")
        if self._scorer.revision < 0:
            begin(self._scorer, rollouts)
        else:
            self._scorer.apply(rollouts)

    # Any: an ASGI application, as Serve asks for it once the constructor is done.
    async def __serve_build_asgi_app__(self) -> Any:
        page = None
        if self._config.has_ui and isinstance(self._scorer, Service):
            asks_loopback = self._config.is_local and self._gate is None
            page = Page(self._scorer, asks_loopback)
        return create_api(self._scorer, gate=self._gate, page=page, watch=self._watch)

    # What follows Serve's gRPC proxy calls; on the event loop, as HTTP does.
    async def Score(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._rpc.Score(request, grpc_context)

    async def Batch(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._rpc.Batch(request, grpc_context)

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._rpc.ListModels(request, grpc_context)

    async def GetModel(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._rpc.GetModel(request, grpc_context)

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return self._rpc.Check(request, grpc_context)

    def __del__(self) -> None:
        """Write what waits for the logs and take the address back; Serve calls it when a replica stops."""
        exporter, watch = self._exporter, self._watch
        self._exporter = self._watch = None
        if exporter is not None:
            exporter.close()
        if watch is not None:
            watch.close()
