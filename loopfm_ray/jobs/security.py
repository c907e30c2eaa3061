"""Who else could reach or read what serves here: open ports, authentication, files of keys, serve configs."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loopfm_ray.errors import ConfigError
from loopfm_ray.jobs.finding import Finding
from loopfm_ray.jobs.listening import Listener, listeners
from loopfm_ray.serving.exposure import HA_PROXY, is_ha_proxy, is_loopback
from loopfm_ray.serving.keys import is_private

__all__ = ["examine_security"]

_TRAINING = "a training worker"
_PROGRAMS = (
    ("ray::ProxyActor", "the proxy of Ray Serve"),
    ("haproxy", "HAProxy of Ray Serve"),
    ("ray::ServeReplica", "a replica of Ray Serve"),
    ("ray::RayTrainWorker", _TRAINING),
    ("gcs_server", "the Ray head"),
    ("dashboard", "the Ray dashboard"),
    ("redis-server", "Redis"),
    ("raylet", "a Ray node"),
    ("ray::", "a Ray node"),
    ("/ray/", "a Ray node"),
)
"""Part of a command line and what that program is; the first that fits."""
_PORTS = {
    6379: "Redis or the Ray head",
    8000: "the scoring service",
    8265: "the Ray dashboard",
    10001: "the Ray client server",
}
"""What a port usually is, for programs of another user."""
_DOORS = ("the proxy of Ray Serve", "HAProxy of Ray Serve", "the scoring service")
_SERVE_HOST = "0.0.0.0"


@dataclass(frozen=True)
class _Service:
    """One service as a file describes it."""

    name: str
    host: str
    has_grpc: bool
    ports: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `ServeConfig`; Any: what a YAML file holds."""
    tls_key: str | None = None

    @property
    def is_guarded(self) -> bool:
        """Whether it asks for keys, or says that it needs none."""
        return bool(self.settings.get("api_keys") or self.settings.get("trusted_network"))


def examine_security(
    serve_files: Sequence[Path] = (),
    proc: Path = Path("/proc"),
    home: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> list[Finding]:
    """Return what was found.

    Args:
        serve_files: serve configs, or deployment files of Ray Serve.
        proc: where the kernel tells of programs.
        home: of the user, where Ray keeps its token.
        environ: of this process.
    """
    findings: list[Finding] = []
    services: list[_Service] = []
    for path in serve_files:
        try:
            services += _services(path)
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            findings.append(
                Finding(
                    str(path), f"can not be read: {error}", False, "restore it, or name another"
                )
            )
    for service in services:
        findings += [_exposure(service), *_files(service)]
    findings += _token_file((home or Path.home()) / ".ray" / "auth_token")
    findings += _ha_proxy(environ, services)
    findings += _ports(listeners(proc), proc, services)
    return findings


def _services(path: Path) -> Iterator[_Service]:
    """Give the services of a file, each checked as its replicas would check it."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "applications" not in tree:
        port, grpc_port = tree.get("port", 8000), tree.get("grpc_port")
        ports = (port,) if grpc_port is None else (port, grpc_port)
        key = (tree.get("tls") or {}).get("key")
        host = tree.get("host", "127.0.0.1")
        yield _Service(str(path), host, grpc_port is not None, ports, tree, key)
        return
    http, grpc = tree.get("http_options") or {}, tree.get("grpc_options") or {}
    has_grpc = bool(grpc.get("grpc_servicer_functions"))
    ports = (http.get("port", 8000), *((grpc.get("port", 9000),) if has_grpc else ()))
    for app in tree["applications"]:
        name = f"{path} ({app.get('name', 'an application')})"
        host = http.get("host", _SERVE_HOST)
        key = http.get("ssl_keyfile")
        yield _Service(name, host, has_grpc, ports, app.get("args") or {}, key)


def _exposure(service: _Service) -> Finding:
    from loopfm_ray.serving.config import ServeConfig

    settings = dict(service.settings)
    if not any(settings.get(name) for name in ("bundle", "rollouts", "models")):
        settings["bundle"] = "that of the run"  # a file for `loopfm serve --with`
    try:
        config = ServeConfig.model_validate(settings)
        config.check_doors(service.host)
    except (ConfigError, ValueError) as error:
        return Finding(
            service.name, str(error), False, "no replica starts with this; change the file"
        )
    if service.has_grpc and config.grpc_port is not None and config.tls is None and service.tls_key:
        found = f"HTTPS on {service.host}, and gRPC without TLS on every interface"
        return Finding(
            service.name,
            found,
            False,
            "leave grpc_options out, or put a proxy with TLS in front of both",
        )
    reach = "loopback alone" if is_loopback(service.host) else service.host
    guard = "with keys" if config.api_keys else "without keys"
    grpc = ", gRPC on every interface" if service.has_grpc else ""
    return Finding(service.name, f"listens on {reach}{grpc}, {guard}", True)


def _files(service: _Service) -> Iterator[Finding]:
    """Check who may read or write the files that a service names."""
    tls = service.settings.get("tls") or {}
    keys = (service.settings.get("api_keys"), tls.get("key"), service.tls_key)
    for name in dict.fromkeys(one for one in keys if one):
        yield _private(Path(name))
    rollouts = service.settings.get("rollouts")
    if rollouts:
        yield _unwritable(Path(rollouts))


def _private(path: Path) -> Finding:
    if not path.is_file():
        return Finding(
            str(path), "is not there", False, "restore it; replicas do not start without"
        )
    if is_private(path):
        return Finding(str(path), "its owner's alone", True)
    mode = stat.S_IMODE(path.stat().st_mode)
    return Finding(
        str(path),
        f"others can read or write it (mode {mode:o})",
        False,
        f"run `chmod 600 {path}`, and make new keys if others have an account here",
    )


def _unwritable(path: Path) -> Finding:
    """Check that nobody else decides what is served: neither by the file nor by another one in its place."""
    if not path.is_file():
        return Finding(
            str(path), "is not there", False, "`loopfm promote` with a bundle begins one"
        )
    for one in (path, path.absolute().parent):
        mode = one.stat().st_mode
        is_sticky = one.is_dir() and bool(mode & stat.S_ISVTX)
        if mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
            found = f"others can write {one}, and so decide what is served"
            return Finding(str(path), found, False, f"run `chmod go-w {one}`")
    return Finding(str(path), "its owner alone may change it", True)


def _token_file(path: Path) -> Iterator[Finding]:
    if path.is_file():
        yield _private(path)


def _ha_proxy(environ: Mapping[str, str], services: Sequence[_Service]) -> Iterator[Finding]:
    if not is_ha_proxy(environ):
        return
    is_guarded = bool(services) and all(service.is_guarded for service in services)
    found = f"{HA_PROXY}=1: parts of it listen on every interface, whatever host says"
    advice = f"set api_keys of the serve config and name it with --serve; or unset {HA_PROXY}"
    yield Finding("HAProxy mode", found, is_guarded, "" if is_guarded else advice)


def _ports(
    found: Sequence[Listener], proc: Path, services: Sequence[_Service]
) -> Iterator[Finding]:
    """Tell what of Ray, Serve and Redis other machines can reach."""
    guarded = {port for one in services if one.is_guarded for port in one.ports}
    open_to_all: dict[tuple[str, str], list[Listener]] = {}
    for one in found:
        what = _what(one)
        if what is not None and not one.is_loopback:
            mode = _auth_mode(proc, one.pid)
            open_to_all.setdefault((what, mode), []).append(one)
    for (what, mode), group in open_to_all.items():
        ports = sorted({one.port for one in group})
        hosts = sorted({one.host for one in group})
        text = f"{what} listens on {', '.join(hosts)}, port {', '.join(map(str, ports))}"
        if what in _DOORS:
            is_ok = set(ports) <= guarded
            yield Finding("open port", text, is_ok, "" if is_ok else _DOOR_ADVICE)
        elif what == _TRAINING:
            yield Finding("open port", text, True, _TRAINING_ADVICE)
        elif what == "Redis":
            yield Finding("open port", text, False, _REDIS_ADVICE)
        else:
            is_ok = mode == "token"
            state = f"{text}; RAY_AUTH_MODE is {mode or 'not set'}"
            yield Finding("open port", state, is_ok, "" if is_ok else _RAY_ADVICE)
    if not open_to_all:
        yield Finding("open ports", "none of Ray, Ray Serve or Redis beyond loopback", True)


_DOOR_ADVICE = (
    "set `host: 127.0.0.1`, or api_keys; name its serve config with --serve if it has keys"
)
_REDIS_ADVICE = "set `bind 127.0.0.1` in redis.conf, or a password (requirepass) and a firewall; whoever writes it changes scores"
_TRAINING_ADVICE = (
    "torch opens it for its process group while it trains, and has no setting for the interface: use a firewall if others"
    " reach this machine"
)
_RAY_ADVICE = (
    "whoever reaches it runs code here: export RAY_AUTH_MODE=token for head, nodes and clients and start them again, or"
    " start with --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1"
)


def _what(one: Listener) -> str | None:
    """Return what of our service a listener is, None for anything else."""
    if one.pid is None:
        return _PORTS.get(one.port)
    return next((what for part, what in _PROGRAMS if part in one.command), None)


def _auth_mode(proc: Path, pid: int | None) -> str:
    """Return `RAY_AUTH_MODE` of a program; empty where it has none or may not be looked into."""
    try:
        data = (proc / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    for entry in data.split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name == b"RAY_AUTH_MODE":
            return value.decode(errors="replace")
    return ""
