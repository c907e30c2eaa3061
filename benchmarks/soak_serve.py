"""Minutes of load on Ray Serve with everything that happens to a service in it, every answer compared with what it has to be.

At `--share` of saturation, in turn: another bundle is promoted, other histories are published, a replica is killed, Redis is
killed and started again. Each answer names its bundle and its histories; its scores have to be those that this bundle gives on
these histories, or without histories where the answer says that the store did not answer. `README.md` explains the keys.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from serve_load import Connection, closed_loop, free_port, http_request
from serve_world import (
    CANDIDATES,
    LIBRARIES,
    VERSION,
    World,
    score_bodies,
    space,
    write_bundle,
    write_histories,
    write_world,
)

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.serving.contract import ScoreRequest
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.rollout import Served, editing, promote, write_rollouts
from loopfm_ray.store.online import MemoryStore
from loopfm_ray.store.target import open_current

PATH = "/v1/models/vm:score"
TOLERANCE = 1e-5
DEADLINE_MS = 1000
"""Of every request: one that can not be scored in time is answered with 504 and costs the replica next to nothing."""
OTHER = "benchmark-2"
Record = dict[str, Any]  # Any: JSON


class Redis:
    """A Redis server that can be killed and comes back with what it had."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise SystemExit("redis-server is not installed; the soak needs it")
        self._program, self._folder, self._port = program, folder, free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = subprocess.Popen(
            [
                self._program, "--port", str(self._port), "--bind", "127.0.0.1", "--dir",
                str(self._folder), "--appendonly", "yes", "--save", "",
            ],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not self._answers():
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=1) as link:
                link.sendall(b"PING\r\n")
                return link.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


@dataclass
class Expected:
    """What each request has to get, by bundle and by the histories that were read."""

    scores: dict[tuple[str, str | None], list[list[float]]] = field(default_factory=dict)

    def add(self, predictor: Predictor, histories: str | None, bodies: list[Record]) -> None:
        """Score every request."""
        queries = [ScoreRequest.model_validate(body).to_query(0) for body in bodies]
        found = predictor.score_many(queries)
        self.scores[predictor.bundle.version, histories] = [one.probs.tolist() for one in found]

    def gap(self, n: int, answer: Record) -> float:
        """Return how far an answer is from what it has to be; infinite when it names what there is not."""
        features = answer["features"]
        is_without = features["reason"] in ("store_failed", "store_paused")
        key = answer["model"]["version"], None if is_without else features["version"]
        if key not in self.scores or len(answer["scores"]) != CANDIDATES:
            return float("inf")
        return float(np.abs(np.asarray(answer["scores"]) - self.scores[key][n]).max())


@dataclass
class Seen:
    """What the load met."""

    sent: int = 0
    took: list[float] = field(default_factory=list)
    wrong: list[Record] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    """When, in seconds from the start, and what."""
    bodies: list[tuple[int, float, bytes]] = field(default_factory=list)
    """Of every answer: which request it was to, when it came, and what it said."""
    answered: Counter[str] = field(default_factory=Counter)
    """By bundle, histories and reason."""
    max_gap: float = 0.0

    def check(self, expected: Expected) -> None:
        """Compare every answer with what it has to be; afterwards, so that the service has the cores while it answers."""
        for n, at_s, body in self.bodies:
            answer = json.loads(body)
            gap = expected.gap(n, answer)
            self.max_gap = max(self.max_gap, gap)
            features = answer["features"]
            self.answered[
                f"{answer['model']['version'][:8]}/{features['version']}/{features['reason']}"
            ] += 1
            if not gap <= TOLERANCE:
                self.wrong.append({"request": n, "gap": gap, "at_s": at_s})


def dated(request: bytes) -> bytes:
    """Return a request that says when it was sent and how long its caller waits, as callers with a deadline do."""
    head, _, rest = request.partition(b"\r\n")
    sent = b"x-request-start: t=%d\r\nx-timeout-ms: %d\r\n" % (time.time_ns() // 1000, DEADLINE_MS)
    return head + b"\r\n" + sent + rest


async def load(port: int, requests: list[bytes], rate: float, seconds: float, seen: Seen) -> None:
    """Send at a rate, whatever is answered, and keep every answer."""
    idle: list[Connection] = []
    began = time.perf_counter()
    gaps = np.random.default_rng(0).exponential(1 / rate, int(rate * seconds))

    async def one(n: int, due: float) -> None:
        connection = idle.pop() if idle else Connection("127.0.0.1", port)
        try:
            async with asyncio.timeout(10):
                status, body = await connection.ask(dated(requests[n]))
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            connection.close()
            seen.failures.append((time.perf_counter() - began, type(error).__name__))
            return
        now = time.perf_counter()
        idle.append(connection)
        if status != 200:
            seen.failures.append((now - began, str(status)))
            return
        seen.took.append(now - due)
        seen.bodies.append((n, now - began, body))

    tasks: set[asyncio.Task[None]] = set()
    for number, due in enumerate(began + np.cumsum(gaps)):
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        seen.sent += 1
        task = asyncio.create_task(one(number % len(requests), due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def happen(
    events: list[tuple[float, str, Callable[[], None]]], told: list[tuple[float, float, str]]
) -> None:
    """Let each event happen at its second, in a thread; tell when it began and ended."""
    began = time.perf_counter()
    for at_s, name, act in events:
        await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
        start = time.perf_counter() - began
        await asyncio.to_thread(act)
        told.append((start, time.perf_counter() - began, name))
        print(f"{start:6.1f} s  {name}", file=sys.stderr)


def kill_replica() -> None:
    """Kill one replica process of this machine's Serve."""
    for entry in Path("/proc").iterdir():
        try:
            if b"ServeReplica" in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                return
        except (OSError, ValueError):
            continue
    raise SystemExit("no replica runs")


def explain(
    failures: list[tuple[float, str]], told: list[tuple[float, float, str]], within_s: float
) -> Counter[str]:
    """Return how many failures there were, by what they were and the event that they followed."""
    found: Counter[str] = Counter()
    for at, what in failures:
        near = [name for start, stop, name in told if start - 0.5 <= at <= stop + within_s]
        found[f"{what} after {near[-1] if near else 'nothing'}"] += 1
    return found


@dataclass
class Stage:
    """What the service runs on."""

    world: World
    other: Path
    """A second bundle."""
    redis: Redis
    rollouts: Path
    users: int

    def serve(self, bundle: Path) -> Callable[[], None]:
        """Return an act that promotes a bundle."""

        def act() -> None:
            served = Served(bundle=str(bundle), online=self.redis.url)
            with editing(self.rollouts) as now:
                write_rollouts(self.rollouts, promote(now, "vm", served))

        return act

    def publish(self) -> None:
        """Publish other histories."""
        write_histories(self.redis.url, self.users, self.world.request_ts, OTHER, seed=4)

    def restart_redis(self) -> None:
        """Kill Redis, leave it dead for three seconds, and start it with what it had."""
        self.redis.kill()
        time.sleep(3)
        self.redis.start()

    def acts(self) -> list[tuple[str, Callable[[], None]]]:
        """Return what happens, in order."""
        return [
            ("promote", self.serve(self.other)),
            ("publish", self.publish),
            ("kill a replica", kill_replica),
            ("restart Redis", self.restart_redis),
            ("promote back", self.serve(self.world.bundle)),
        ]


def set_up(folder: Path, users: int) -> Stage:
    """Write the bundles and publish the first histories."""
    world, other = write_world(folder, users), folder / "bundle-2"
    if not other.exists():
        write_bundle(other, PreparedData.open(folder / "prepared"), ("torch",), seed=1)
    data = folder / "redis"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    stage = Stage(world, other, Redis(data), folder / "rollouts.json", users)
    write_histories(stage.redis.url, users, world.request_ts)
    stage.rollouts.unlink(missing_ok=True)
    stage.serve(world.bundle)()
    return stage


def soak(args: argparse.Namespace, folder: Path) -> Record:
    """Run the service and the load, and return what came of it."""
    from loopfm_ray.experiments import RayConfig
    from loopfm_ray.jobs import serving
    from loopfm_ray.jobs.cluster import connect

    stage = set_up(folder, args.users)
    bodies = score_bodies(stage.world, 500)
    expected = expectations(folder, stage, bodies)
    requests = [http_request(PATH, json.dumps(b).encode(), "127.0.0.1", {}) for b in bodies]
    seconds, seen, told = args.minutes * 60, Seen(), list[tuple[float, float, str]]()
    step = seconds / (len(stage.acts()) + 1)
    events = [(step * (n + 0.5), *act) for n, act in enumerate(stage.acts())]
    port = free_port()
    config = serving.ServeConfig(
        rollouts=str(stage.rollouts), port=port, num_replicas=2, num_cpus=0.5, reload_s=1.0,
        max_queued_requests=args.max_queued, log_level="ERROR",
        trusted_network=args.mode == "haproxy",  # HAProxy listens on every interface; the load comes from here
    )  # fmt: skip

    async def run(rate: float) -> None:
        await asyncio.gather(load(port, requests, rate, seconds, seen), happen(events, told))

    with connect(RayConfig()):
        serving.start(config)
        asyncio.run(closed_loop("127.0.0.1", port, requests, 16, 3))
        full = asyncio.run(closed_loop("127.0.0.1", port, requests, 16, 8))
        rate = args.share * full["requests_per_s"]
        print(f"{full['requests_per_s']:.0f}/s at saturation, {rate:.0f}/s now", file=sys.stderr)
        asyncio.run(run(rate))
        serving.stop()
    stage.redis.kill()
    seen.check(expected)
    return result(args, full, rate, seen, told)


def expectations(folder: Path, stage: Stage, bodies: list[Record]) -> Expected:
    """Score every request with each bundle, on each version of the histories, and without."""
    later, world = folder / "online-2", stage.world
    if not later.exists():
        write_histories(later, stage.users, world.request_ts, OTHER, seed=4)
    expected = Expected()
    for bundle in (world.bundle, stage.other):
        for store, version in ((world.online, VERSION), (later, OTHER)):
            expected.add(load_predictor(bundle, store), version, bodies)
        loaded = load_predictor(bundle, world.online).bundle
        meta = open_current(world.online, space().id).meta
        expected.add(Predictor(loaded, MemoryStore({}, VERSION, meta)), None, bodies)
    return expected


def result(
    args: argparse.Namespace,
    full: Record,
    rate: float,
    seen: Seen,
    told: list[tuple[float, float, str]],
) -> Record:
    """Return the keys that `README.md` explains."""
    explained = explain(seen.failures, told, args.within_s)
    ms = np.asarray(seen.took) * 1e3
    return {
        "wrong_scores": len(seen.wrong),
        "max_abs_diff": seen.max_gap,
        "failed_requests": len(seen.failures),
        "unexplained_failures": sum(n for what, n in explained.items() if what.endswith("nothing")),
        "failures": dict(explained),
        "failures_by_10_s": dict(Counter(10 * int(at // 10) for at, _ in seen.failures)),
        "requests": seen.sent,
        "answered": dict(seen.answered),
        "wrong": seen.wrong[:10],
        "events": [{"name": name, "from_s": start, "to_s": stop} for start, stop, name in told],
        "saturation_requests_per_s": full["requests_per_s"],
        "rate": rate,
        **{f"p{p}_ms": float(np.percentile(ms, p)) for p in (50, 99, 99.9)},
        "sizes": {"minutes": args.minutes, "users": args.users, "candidates": CANDIDATES},
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only the first")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the rate at saturation")
    parser.add_argument("--mode", choices=("haproxy", "serve"), default="haproxy")
    parser.add_argument(
        "--max-queued", type=int, default=500, help="requests that may wait in Serve"
    )
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument(
        "--within-s",
        type=float,
        default=30.0,
        help="a failure so long after an event is explained by it; a replica that was killed takes half of it to be replaced",
    )
    parser.add_argument("--work-dir", type=Path, help="kept, and used again if it is there")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    if args.mode == "haproxy":
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(args, folder)
    shown = (
        found if args.json else {k: v for k, v in found.items() if not isinstance(v, dict | list)}
    )
    print(json.dumps(shown, indent=1))
    if found["wrong_scores"] or found["unexplained_failures"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
