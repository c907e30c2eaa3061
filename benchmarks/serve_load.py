"""A lean HTTP client that loads a scoring service: closed loop for saturation, open loop for latency at a given rate.

Requests are bytes made beforehand, connections are kept, and nothing of an answer is parsed but its status and length, so that on
a machine with few cores the client takes little of them. `python serve_load.py` is run in a process of its own by `serve.py`.
"""

import argparse
import asyncio
import json
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]  # Any: JSON


class Connection:
    """One kept connection; one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a request and return status and body."""
        # a server ends a connection that has been idle for long: that is no failure of the next request
        if self._writer is None or self._reader is None or self._reader.at_eof():
            self.close()
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        lower = head.lower()
        at = lower.find(b"content-length:")
        if at >= 0:
            body = await self._reader.readexactly(int(lower[at + 15 : lower.index(b"\r\n", at)]))
        else:
            body = await self._chunks()
        if b"connection: close" in lower:
            self.close()
        return status, body

    async def _chunks(self) -> bytes:
        assert self._reader is not None
        body = bytearray()
        while True:
            size = int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16)
            body += (await self._reader.readexactly(size + 2))[:-2]
            if not size:
                return bytes(body)

    def close(self) -> None:
        """Close it; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._writer = self._reader = None


def free_port() -> int:
    """Return a port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def http_request(path: str, body: bytes, host: str, headers: dict[str, str]) -> bytes:
    """Return the bytes of one POST."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def summarize(took: Sequence[float], statuses: dict[int, int], seconds: float) -> Record:
    ms = np.asarray(took) * 1e3
    return {
        "requests_per_s": len(took) / seconds,
        "num_requests": len(took),
        "seconds": seconds,
        "statuses": {str(code): count for code, count in sorted(statuses.items())},
        **{f"p{p}_ms": float(np.percentile(ms, p)) for p in (50, 90, 99)},
    }


async def closed_loop(
    host: str, port: int, requests: Sequence[bytes], concurrency: int, seconds: float
) -> Record:
    """Keep `concurrency` requests under way for so many seconds."""
    took: list[float] = []
    statuses: dict[int, int] = {}
    end = time.perf_counter() + seconds

    async def worker(first: int) -> None:
        connection, n = Connection(host, port), first
        while time.perf_counter() < end:
            began = time.perf_counter()
            status, _ = await connection.ask(requests[n % len(requests)])
            took.append(time.perf_counter() - began)
            statuses[status] = statuses.get(status, 0) + 1
            n += concurrency
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(worker(n) for n in range(concurrency)))
    return summarize(took, statuses, time.perf_counter() - began)


async def open_loop(
    host: str, port: int, requests: Sequence[bytes], rate: float, seconds: float
) -> Record:
    """Send at a rate, whatever has been answered; a latency counts from when the request was due (no coordinated omission)."""
    took: list[float] = []
    statuses: dict[int, int] = {}
    idle: list[Connection] = []
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))
    due = time.perf_counter() + 0.1 + np.cumsum(gaps)

    async def one(n: int) -> None:
        connection = idle.pop() if idle else Connection(host, port)
        status, _ = await connection.ask(requests[n % len(requests)])
        took.append(time.perf_counter() - due[n])
        statuses[status] = statuses.get(status, 0) + 1
        idle.append(connection)

    began, tasks = time.perf_counter(), []
    for n, moment in enumerate(due):
        wait = moment - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(one(n)))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return summarize(took, statuses, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--requests", type=Path, required=True, help="JSON list of bodies")
    parser.add_argument("--path", required=True)
    parser.add_argument("--headers", default="{}", help="JSON object")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rate", type=float, help="requests a second; open loop")
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    host, headers = "127.0.0.1", json.loads(args.headers)
    bodies = json.loads(args.requests.read_text())
    requests = [http_request(args.path, body.encode(), host, headers) for body in bodies]
    if args.rate:
        found = asyncio.run(open_loop(host, args.port, requests, args.rate, args.seconds))
    else:
        found = asyncio.run(closed_loop(host, args.port, requests, args.concurrency, args.seconds))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
