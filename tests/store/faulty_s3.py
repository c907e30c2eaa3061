"""An HTTP proxy in front of an S3 server that fails as networks and stores do, by a seeded schedule."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BEFORE = ("slow_down", "internal", "reset_before")
"""The request never reaches the server."""
AFTER = ("reset_after", "internal_after", "truncate")
"""The server did what was asked; the answer is lost, wrong or cut short."""
FAULTS = (*BEFORE, *AFTER, "latency")
_LATENCY_S = 0.05

Schedule = Callable[[str, str], str | None]
"""Method and path of a request -> the fault that it meets, None for none."""


def no_faults(method: str, path: str) -> str | None:
    return None


def random_faults(seed: int, share: float, kinds: tuple[str, ...] = FAULTS) -> Schedule:
    """Let a `share` of all requests meet a fault of `kinds`."""
    generator, lock = random.Random(seed), threading.Lock()

    def choose(method: str, path: str) -> str | None:
        with lock:
            return generator.choice(kinds) if generator.random() < share else None

    return choose


class FaultyS3:
    """Listens on a free loopback port and passes requests on to the server at `target`.

    `schedule` may be replaced at any time; `met` counts the faults that were done and `num_requests` all requests.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = (parts.hostname, parts.port)
        self.schedule: Schedule = no_faults
        self.met: Counter[str] = Counter()
        self.num_requests = 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyS3

    def log_message(self, *_):
        """Stay silent."""

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the client is gone, or `reset` closed the connection
            self.close_connection = True

    def serve(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        owner = self.owner
        fault = owner.schedule(self.command, self.path)
        with owner.lock:
            owner.num_requests += 1
            if fault:
                owner.met[fault] += 1
        if fault == "latency":
            time.sleep(_LATENCY_S)
        if fault == "slow_down":
            return self.refuse(503, "SlowDown")
        if fault == "internal":
            return self.refuse(500, "InternalError")
        if fault == "reset_before":
            return self.reset()
        answer = self.forward(body)
        if fault == "reset_after":
            return self.reset()
        if fault == "internal_after":
            return self.refuse(500, "InternalError")
        return self.answer(*answer, is_cut=fault == "truncate")

    def answer(self, status, headers, body, is_cut):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        lengths = [value for name, value in headers if name.lower() == "content-length"]
        is_head = self.command == "HEAD"
        self.send_header("Content-Length", (lengths or ["0"])[0] if is_head else str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if is_cut else body)
        if is_cut and body:
            self.wfile.flush()
            self.reset()

    # http.server finds them by these names
    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve  # noqa: N815

    def forward(self, body):
        connection = http.client.HTTPConnection(*self.owner.target, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def refuse(self, status, code):
        text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def reset(self):
        """Break the connection off, so that the client sees a reset and no end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.close()
        self.rfile.close()
        self.connection.close()
