"""A port of each replica for Prometheus.

Requests are spread over the replicas of a service, so a scrape through its address meets one of them, another each time. Here
each replica answers scrapes itself, and writes its address to a folder that Prometheus watches (`file_sd_configs`).
"""

import fcntl
import json
import logging
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pydantic import Field

from loopfm_ray.config import Config
from loopfm_ray.errors import StoreError
from loopfm_ray.serving.keys import Gate, Verdict
from loopfm_ray.serving.lines import take_slot
from loopfm_ray.serving.watch import CONTENT_TYPE, Watch
from loopfm_ray.store.tables import write_text

__all__ = ["Exporter", "MetricsConfig"]

_log = logging.getLogger(__name__)
_NAME = "replica"


class MetricsConfig(Config):
    """Where each replica answers scrapes."""

    host: str = "127.0.0.1"
    """Interface; another than loopback takes `api_keys`, and a scrape then a key."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one, as it must where a machine runs several replicas."""
    targets: str | None = None
    """Folder in which each replica writes `replica-N.json` with its address, for `file_sd_configs` of Prometheus."""


class Exporter:
    """Answers `GET /metrics` in threads of its own until it is closed."""

    def __init__(self, watch: Watch, config: MetricsConfig, gate: Gate | None = None) -> None:
        """Listen, and write the address down.

        Raises:
            StoreError: the port is taken, or the folder can not be written to.
        """
        self._file: Path | None = None
        self._lock_file: int | None = None
        try:
            self._server = ThreadingHTTPServer((config.host, config.port), _handler(watch, gate))
        except OSError as error:
            raise StoreError(
                f"metrics can not be served at {config.host}:{config.port}: {error}; take another port, or 0 for a free one"
            ) from error
        self._server.daemon_threads = True
        self.address = f"{config.host}:{self._server.server_address[1]}"
        thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        thread.start()
        if config.targets is not None:
            self._tell(Path(config.targets))

    def _tell(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            slot, self._lock_file = take_slot(folder, _NAME)
            self._file = folder / f"{_NAME}-{slot}.json"
            write_text(self._file, json.dumps([{"targets": [self.address]}]) + "\n")
            _forget_dead(folder)
        except OSError as error:
            raise StoreError(
                f"{folder} can not take the address of a replica: {error}; give a folder that the service may write to"
            ) from error

    def close(self) -> None:
        """Stop answering, and take the address back."""
        self._server.shutdown()
        self._server.server_close()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if self._lock_file is not None:
            os.close(self._lock_file)


def _forget_dead(folder: Path) -> None:
    """Remove the addresses of replicas that were killed: nobody holds their slots."""
    for file in folder.glob(f"{_NAME}-*.json"):
        with file.with_suffix(".lock").open("w") as lock_file:
            try:
                fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # alive
            file.unlink(missing_ok=True)


def _handler(watch: Watch, gate: Gate | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers one scrape."""

        timeout = 10.0

        def do_GET(self) -> None:
            """Answer with the metrics, or refuse."""
            if self.path != "/metrics":
                self.send_error(404)
                return
            refused = _refusal(gate, self.headers.get("authorization", ""))
            if refused is not None:
                self.send_error(refused)
                return
            body = watch.exposition()
            self.send_response(200)
            self.send_header("content-type", CONTENT_TYPE)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say it at the level of details."""
            _log.debug(format, *args)

    return Handler


def _refusal(gate: Gate | None, authorization: str) -> int | None:
    if gate is None:
        return None
    scheme, _, secret = authorization.partition(" ")
    verdict = gate.check(secret.strip()) if scheme.lower() == "bearer" else Verdict(None)
    if verdict.name is None:
        return 401
    return 429 if verdict.retry_after_s > 0 else None
