"""Who can reach a service: which of its doors listen beyond loopback, what that asks for, and the files of TLS."""

import ipaddress
import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.serving.keys import is_private

__all__ = [
    "HA_PROXY",
    "TlsConfig",
    "check_doors",
    "check_tls",
    "is_ha_proxy",
    "is_loopback",
    "open_doors",
]

HA_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Environment variable that replaces Ray Serve's own proxy by HAProxy."""


class TlsConfig(Config):
    """Certificate and key, as PEM files on the machine that runs Serve's proxy."""

    cert: str
    """Certificate, followed by those of its issuers."""
    key: str
    """Private key without a pass phrase; its owner alone may read it."""


def is_loopback(host: str) -> bool:
    """Return whether nobody but this machine reaches an interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_ha_proxy(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether Ray Serve runs HAProxy in this environment; it compares as Ray does."""
    return environ.get(HA_PROXY, "0") == "1"


def open_doors(host: str, has_grpc: bool, has_ha_proxy: bool) -> list[str]:
    """Return what of a service listens beyond loopback, in words for a message."""
    doors = []
    if not is_loopback(host):
        doors.append(f"host {host}")
    if has_grpc:
        doors.append("grpc_port (Ray Serve's gRPC proxy listens on every interface)")
    if has_ha_proxy:
        doors.append(f"{HA_PROXY}=1 (parts of HAProxy listen on every interface)")
    return doors


def check_doors(doors: Sequence[str], has_keys: bool, is_trusted: bool) -> None:
    """Check that what listens beyond loopback asks for keys, or that the network is trusted.

    Args:
        doors: what `open_doors` gave.
        has_keys: `api_keys` is set.
        is_trusted: `trusted_network` is set.

    Raises:
        ConfigError: others could ask without a key.
    """
    if doors and not has_keys and not is_trusted:
        raise ConfigError(
            f"{' and '.join(doors)} lets others ask: set api_keys to a file that `loopfm key` wrote; or serve on 127.0.0.1"
            f" without grpc_port and {HA_PROXY}; or, where a firewall keeps all others out, set trusted_network: true"
        )


def check_tls(tls: TlsConfig) -> None:
    """Check that the files are there, belong together, and that the key is its owner's alone.

    Raises:
        StoreError: they do not.
    """
    for name in (tls.cert, tls.key):
        if not Path(name).is_file():
            raise StoreError(f"{name} of tls is not there; give the path of a PEM file")
    if not is_private(Path(tls.key)):
        raise StoreError(f"{tls.key} can be read or written by others; run `chmod 600 {tls.key}`")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # without a password it would ask at the terminal
        context.load_cert_chain(tls.cert, tls.key, password=lambda: "")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise StoreError(
            f"{tls.cert} and {tls.key} are no certificate with its key without pass phrase: {error}; give PEM files that belong"
            " together"
        ) from error
