"""How a scoring service is set up: what it serves, who may ask, how much it takes on, and what it tells of itself."""

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import BundleError, ConfigError
from loopfm_ray.serving.contract import Backend
from loopfm_ray.serving.exporter import MetricsConfig
from loopfm_ray.serving.exposure import (
    TlsConfig,
    check_doors,
    is_ha_proxy,
    is_loopback,
    open_doors,
)
from loopfm_ray.serving.keys import Gate, read_keys
from loopfm_ray.serving.logs import ParityLog, ParityLogConfig, RequestLog, RequestLogConfig
from loopfm_ray.serving.rollout import ModelName, Rollout, Served
from loopfm_ray.serving.spans import Spans, SpansConfig, make_provider
from loopfm_ray.store.filesystem import CACHE_BYTES, CACHE_DIR, locate

if TYPE_CHECKING:
    from loopfm_ray.serving.predictor import Predictor
    from loopfm_ray.serving.watch import Watch

__all__ = ["AutoscaleConfig", "ServeConfig"]


class AutoscaleConfig(Config):
    """How many replicas serve, by the requests under way."""

    min_replicas: PositiveInt = 1
    """Replicas without load."""
    max_replicas: PositiveInt = 4
    """The most there may be."""
    target_ongoing_requests: PositiveFloat = 4.0
    """Requests under way in a replica that the number is steered to; well below `max_ongoing_requests`."""
    upscale_delay_s: NonNegativeFloat = 10.0
    """How long the load has to be higher before replicas are added."""
    downscale_delay_s: NonNegativeFloat = 300.0
    """How long it has to be lower before some are taken away."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ConfigError(
                f"min_replicas must be at most max_replicas, found {self.min_replicas} and {self.max_replicas}"
            )
        return self


class ServeConfig(Config):
    """Which bundle is served, with which online store, and how much it takes on."""

    bundle: str | None = None
    """Folder or `s3://` address of the one VM bundle that is served; or give `rollouts` or `models`."""
    rollouts: str | None = None
    """File of the models by name, which `loopfm promote` and `loopfm rollback` write and every replica follows."""
    models: dict[ModelName, Rollout] = Field(default_factory=dict)
    """The models by name, as a deployment file gives them; deployed again with others they change without a restart."""
    cache_dir: str = CACHE_DIR
    """Folder for what is read from S3."""
    cache_bytes: PositiveInt = CACHE_BYTES
    """What that folder may hold before versions that nobody reads are removed."""
    online: str | None = None
    """Directory or `redis://` address of the online store of `bundle`; none for a VM without history."""
    host: str = "127.0.0.1"
    """Interface of the HTTP proxy; another than loopback takes `api_keys`. A deployment file says it in `http_options`."""
    api_keys: str | None = None
    """Key file, which `loopfm key` writes: every path but the probes then asks for a key. null asks for none."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP proxy; 0 lets `start` take a free one."""
    tls: TlsConfig | None = None
    """HTTPS with this certificate; null speaks HTTP. Ray Serve has no TLS for gRPC and in HAProxy mode, so those are refused beside it."""
    grpc_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the gRPC proxy; null starts none. It listens on every interface whatever `host` says, so it takes `api_keys`."""
    trusted_network: bool = False
    """Lets the service listen beyond loopback without `api_keys`. Whoever reaches its ports may then score, read users and versions, and
    use up the machine: set it only where a firewall, or the network of a container, keeps everybody else out."""
    ui: bool | None = None
    """The page at `/ui`, which shows the histories of users; null serves it where HTTP is on loopback alone."""
    num_replicas: PositiveInt = 1
    """Processes that score."""
    num_cpus: NonNegativeFloat = 1.0
    """Logical CPUs that each replica reserves."""
    max_ongoing_requests: PositiveInt = 16
    """Requests that one replica takes at a time."""
    max_queued_requests: int = Field(default=64, ge=-1)
    """Requests that wait at a proxy before it answers 503; -1 is without limit."""
    retry_after_s: NonNegativeFloat = 1.0
    """What `Retry-After` of that answer says."""
    request_timeout_s: PositiveFloat = 10.0
    """After so long the proxy answers 408, whatever becomes of the request."""
    drain_s: NonNegativeFloat = 10.0
    """How long a replica that is stopped may take to finish what it began; it takes nothing new meanwhile."""
    autoscale: AutoscaleConfig | None = None
    """Lets the number of replicas follow the load; null keeps `num_replicas`."""
    backend: Backend = "torch"
    """What runs the models; `onnx` and `onnx_int8` take bundles that hold these (`online.backends` of the pipeline)."""
    history_timeout_s: PositiveFloat = 0.05
    """Deadline of one look-up in a store behind a network, after which the request is scored without history."""
    reload_s: PositiveFloat = 5.0
    """Seconds between looks for a newer version of the bundle's space in the online store."""
    metrics: MetricsConfig | None = None
    """A port of each replica for Prometheus; null leaves `GET /metrics` of the service alone, which meets one replica."""
    request_log: RequestLogConfig | None = None
    """One JSON line for each request, without what was in it; null writes none."""
    parity_log: ParityLogConfig | None = None
    """A share of the requests whole, with users in clear, for `loopfm parity --requests`; null keeps none."""
    spans: SpansConfig | None = None
    """A share of the requests as OpenTelemetry traces (`loopfm-ray[otel]`); null sends none."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of the package's log records."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("bundle", "rollouts", "models") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(f"give one of bundle, rollouts and models, found {given or 'none'}")
        if self.tls is not None and self.grpc_port is not None:
            raise ConfigError(
                "Ray Serve's gRPC proxy has no TLS, so tls beside grpc_port would protect half of the service: leave one out, or put"
                " a proxy with TLS in front of both"
            )
        if (
            self.metrics is not None
            and self.api_keys is None
            and not is_loopback(self.metrics.host)
        ):
            raise ConfigError(
                f"metrics.host {self.metrics.host} lets others read: set api_keys to a file that `loopfm key` wrote, or take 127.0.0.1"
            )
        self.check_doors()
        return self

    def check_doors(self, host: str | None = None) -> None:
        """Check that nobody else can ask without a key, as things stand in this environment.

        Args:
            host: that the HTTP proxy does listen on; None takes it from here.

        Raises:
            ConfigError: others can; or HAProxy, which has no TLS, would speak for a service with TLS.
        """
        if self.tls is not None and is_ha_proxy():
            raise ConfigError("HAProxy mode of Ray Serve has no TLS: leave tls out, or the mode")
        doors = open_doors(host or self.host, self.grpc_port is not None, is_ha_proxy())
        check_doors(doors, self.api_keys is not None, self.trusted_network)

    @property
    def is_local(self) -> bool:
        """Whether HTTP is on loopback alone."""
        return is_loopback(self.host) and not is_ha_proxy()

    @property
    def has_ui(self) -> bool:
        """Whether the page is served."""
        return self.is_local if self.ui is None else self.ui

    def watch(self) -> "Watch":
        """Return what watches a replica, with its logs open.

        Raises:
            StoreError: a log can not be written.
            ConfigError: what sends spans is not installed.
        """
        from loopfm_ray.serving.watch import Watch

        replica = f"{socket.gethostname()}-{os.getpid()}"
        return Watch(
            None if self.request_log is None else RequestLog(self.request_log),
            None if self.parity_log is None else ParityLog(self.parity_log),
            replica,
            None if self.spans is None else Spans(make_provider(self.spans, replica)),
        )

    def gate(self) -> Gate | None:
        """Return what knows the keys; None where none is asked for.

        Raises:
            StoreError: the key file is missing, damaged, or open to others.
        """
        if self.api_keys is None:
            return None
        return Gate(read_keys(Path(self.api_keys)).keys, time.monotonic)

    def open(self, served: Served) -> "Predictor":
        """Load a bundle and open its store.

        Raises:
            BundleError: the bundle is damaged or of another version, or the store is not of the space that it was trained in.
            StoreError: there is no such store, or it does not hold that space.
        """
        from loopfm_ray.serving.predictor import load_predictor

        where = locate(served.bundle, self.cache_dir, self.cache_bytes)
        predictor = load_predictor(where, served.online, self.history_timeout_s, self.backend)
        found = predictor.bundle.version
        if served.version not in (None, found):
            raise BundleError(
                f"{served.bundle} holds the bundle {found}, expected {served.version}: it was written over; promote what is"
                " there now, or put the bundle back"
            )
        return predictor
