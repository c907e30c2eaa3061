"""The scoring service: bare uvicorn, Ray Serve and Ray Serve behind HAProxy in one run; and the reads of histories alone.

`README.md` beside this file says what each key means.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from machine import describe_machine
from numpy.typing import NDArray
from serve_load import free_port
from serve_world import (
    CANDIDATES,
    LIBRARIES,
    MAX_LEN,
    World,
    histories,
    score_bodies,
    space,
    write_histories,
    write_world,
)

from loopfm_ray.store.codes import decode
from loopfm_ray.store.online import OnlineStore, unpack_history, visible_slice
from loopfm_ray.store.target import open_current

HERE = Path(__file__).parent
CONCURRENCY, BATCH_USERS = 16, 128
Record = dict[str, Any]  # Any: JSON


def measure_reads(store: OnlineStore, world: World, reads: int) -> Record:
    """Time the read of one user, from key to the decoded latents that a request sees: the first time, and once all were read."""
    first = time_reads(store, world, reads, 1)
    for begin in range(0, world.num_users, 1000):  # every page of the file is mapped by then
        store.get_many([f"u{n:08d}" for n in range(begin, min(begin + 1000, world.num_users))])
    took = time_reads(store, world, reads, 2)
    return {
        "p50_us": float(np.percentile(took, 50)),
        "p99_us": float(np.percentile(took, 99)),
        "first_p50_us": float(np.percentile(first, 50)),
        "first_p99_us": float(np.percentile(first, 99)),
        "interpreter_p99_over_p50": interpreter_noise(),
    }


def time_reads(store: OnlineStore, world: World, reads: int, seed: int) -> NDArray[np.float64]:
    """Return microseconds of reads of random users."""
    rng = np.random.default_rng(seed)
    users = [f"u{n:08d}" for n in rng.integers(0, world.num_users, reads)]
    spec, took = space().code_spec, np.empty(reads)
    for n, user in enumerate(users):
        began = time.perf_counter()
        (found,) = store.get_many([user])
        rows = visible_slice(found, world.request_ts, MAX_LEN)
        latents = decode(found.codes[rows], spec)
        took[n] = time.perf_counter() - began
    assert latents.shape == (MAX_LEN, spec.dim)
    return took * 1e6


def interpreter_noise() -> float:
    """Return p99 / p50 of a loop that does nothing, of about the length of a read: what the machine itself adds."""
    took = np.empty(20_000)
    for n in range(len(took)):
        began = time.perf_counter()
        for _ in range(400):
            pass
        took[n] = time.perf_counter() - began
    return float(np.percentile(took, 99) / np.percentile(took, 50))


def measure_round_trip(url: str) -> Record:
    """Time a GET of one record by the bare client: no read over this connection can be faster."""
    import redis

    client = redis.Redis.from_url(url)
    client.set("loopfm-benchmark", bytes(1600))
    took = np.empty(5000)
    for n in range(len(took)):
        began = time.perf_counter()
        client.get("loopfm-benchmark")
        took[n] = time.perf_counter() - began
    client.delete("loopfm-benchmark")
    client.close()
    return {"get_p50_us": float(np.percentile(took * 1e6, 50))}


def measure_pipelined(store: OnlineStore, world: World, batches: int) -> Record:
    """Time reads of many users in one round trip, decoded."""
    rng = np.random.default_rng(2)
    spec = space().code_spec
    groups = [
        [f"u{n:08d}" for n in rng.integers(0, world.num_users, BATCH_USERS)] for _ in range(batches)
    ]
    store.get_many(groups[0])
    began = time.perf_counter()
    for users in groups:
        found = store.get_many(users)
        decode(np.concatenate([one.codes for one in found]), spec)
    return {"users_per_s": batches * BATCH_USERS / (time.perf_counter() - began)}


def measure_feast(args: argparse.Namespace, folder: Path, world: World) -> Record:
    """Let Feast hold the histories of some users and return its reads."""
    rows: dict[str, list[Any]] = {"user": [], "event_ts": [], "available_ts": [], "codes": []}
    for user, record in histories(args.feast_users, world.request_ts):
        found = unpack_history(record)
        rows["user"].append(user)
        rows["event_ts"].append(found.event_ts)
        rows["available_ts"].append(found.available_ts)
        rows["codes"].append(found.codes.tobytes())
    table = pa.table(rows)
    path = folder / "histories.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    command = [str(args.feast_python), str(HERE / "feast_online.py"), str(path)]
    command += ["--batch", str(BATCH_USERS)]
    if args.redis:
        command += ["--redis", args.redis.removeprefix("redis://").partition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line[7:]))
    raise SystemExit(f"Feast failed: {done.stderr[-2000:]}")


def read_ratios(reads: Record) -> Record:
    """Return our reads a second / Feast's, one user at a time and in batches, by store."""
    feast = reads.get("feast", {})
    out: Record = {}
    for ours, theirs in (("lmdb", "sqlite"), ("redis", "redis")):
        if ours in reads and theirs in feast:
            one = feast[theirs]["one"]["p50_us"] / reads[ours]["p50_us"]
            batch = reads[ours]["users_per_s"] / feast[theirs]["batch"]["users_per_s"]
            out[f"ratio_vs_feast_{theirs}_one"] = one
            out[f"ratio_vs_feast_{theirs}_batch"] = batch
    return out


@contextlib.contextmanager
def server(
    mode: str, backend: str, world: World, keys: Path | None
) -> Iterator[tuple[int, Record]]:
    """Start a contender; gives its port and what it said."""
    port = free_port()
    command = [
        sys.executable, str(HERE / "serve_server.py"), "--mode", mode, "--bundle", str(world.bundle),
        "--online", str(world.online), "--backend", backend, "--port", str(port),
    ]  # fmt: skip
    command += [] if keys is None else ["--keys", str(keys)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        for line in process.stdout:
            if line.startswith("READY "):
                yield port, json.loads(line[6:])
                return
        raise SystemExit(f"{mode} did not start, see above")
    finally:
        process.stdin.close()
        process.wait(120)


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


class Load:
    """Runs the client in a process of its own."""

    def __init__(self, folder: Path, port: int, headers: dict[str, str]) -> None:
        self._folder, self._port, self._headers = folder, port, headers

    def __call__(self, verb: str, *options: str) -> Record:
        """Send `score` or `batch` requests and return what came of it."""
        bodies = self._folder / f"{verb}.json"
        done = subprocess.run(
            [
                sys.executable, str(HERE / "serve_load.py"), "--port", str(self._port),
                "--requests", str(bodies), "--path", f"/v1/models/vm:{verb}",
                "--headers", json.dumps(self._headers), *options,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        found: Record = json.loads(done.stdout)
        if set(found["statuses"]) != {"200"}:
            print(f"not all was answered with 200: {found['statuses']}", file=sys.stderr)
        return found


def measure_server(load: Load, args: argparse.Namespace) -> Record:
    """Return the rate at saturation, the latency at half of it, one at a time, and batches."""
    load("score", "--seconds", "2")  # warm
    seconds = ("--seconds", str(args.seconds))
    full = load("score", "--concurrency", str(CONCURRENCY), *seconds)
    half = load("score", "--rate", str(full["requests_per_s"] / 2), *seconds)
    single = load("score", "--concurrency", "1", *seconds)
    batch = load("batch", "--concurrency", "1", *seconds)
    return {
        "saturation": full,
        "half_rate": half,
        "one_at_a_time": single,
        "batch": batch,
        "rows_per_s_single": single["requests_per_s"] * CANDIDATES,
        "rows_per_s_saturation": full["requests_per_s"] * CANDIDATES,
        "rows_per_s_batch": batch["requests_per_s"] * CANDIDATES * BATCH_USERS,
    }


def measure_contenders(args: argparse.Namespace, folder: Path, world: World) -> Record:
    """Start each contender in turn and load it."""
    from loopfm_ray.serving.keys import ApiKeys, add_key, write_keys

    keys, secret = add_key(ApiKeys(), "benchmark", None, 20.0)
    key_file = folder / "keys.json"
    write_keys(key_file, keys)
    bodies = score_bodies(world, 2000)
    (folder / "score.json").write_text(json.dumps([json.dumps(body) for body in bodies]))
    batches = [
        json.dumps({"requests": bodies[n : n + BATCH_USERS]}) for n in range(0, 1920, BATCH_USERS)
    ]
    (folder / "batch.json").write_text(json.dumps(batches))
    found: Record = {}
    for name in args.contenders.split(","):
        mode, _, backend = name.partition(":")
        print(f"{name} ...", file=sys.stderr)
        # all ask for the key, so that they do the same work
        with server(mode, backend or "torch", world, key_file) as (port, said):
            load = Load(folder, port, {"authorization": f"Bearer {secret}"})
            found[name] = {**measure_server(load, args), **said, "rss_mib": rss_mib(said["pid"])}
        print(f"{name}: {found[name]['saturation']['requests_per_s']:.0f}/s", file=sys.stderr)
    return found


def ratios(found: Record) -> Record:
    """Return each contender / bare uvicorn with the same back end, and batches / single calls."""
    out: Record = {}
    for name, record in found.items():
        mode, _, backend = name.partition(":")
        bare = found.get(f"uvicorn:{backend}")
        if bare is not None and mode != "uvicorn":
            out[f"ratio_vs_bare_uvicorn_{mode}_{backend}"] = (
                record["saturation"]["requests_per_s"] / bare["saturation"]["requests_per_s"]
            )
        out[f"ratio_batch_vs_single_{mode}_{backend}"] = (
            record["rows_per_s_batch"] / record["rows_per_s_single"]
        )
        out[f"p99_ms_at_half_{mode}_{backend}"] = record["half_rate"]["p99_ms"]
    best = [value for key, value in out.items() if key.startswith("ratio_vs_bare_uvicorn_haproxy")]
    if best:
        out["ratio_vs_bare_uvicorn"] = best[0]
    torch, onnx = found.get("uvicorn:torch"), found.get("uvicorn:onnx")
    if torch and onnx:
        out["ratio_onnx_vs_torch"] = (
            onnx["saturation"]["requests_per_s"] / torch["saturation"]["requests_per_s"]
        )
    return out


def report(args: argparse.Namespace, folder: Path) -> Record:
    """Write the world, measure, and return the keys that `README.md` explains."""
    world = write_world(folder, args.users)
    lmdb = open_current(world.online, space().id)
    reads: Record = {
        "lmdb": measure_reads(lmdb, world, args.reads) | measure_pipelined(lmdb, world, 200)
    }
    lmdb.close()
    if args.redis:
        write_histories(args.redis, args.redis_users, world.request_ts)
        small = World(world.bundle, world.online, args.redis_users, world.request_ts, world.items)
        redis = open_current(args.redis, space().id)
        reads["redis"] = measure_reads(redis, small, args.reads // 10)
        reads["redis"] |= measure_pipelined(redis, small, 200) | measure_round_trip(args.redis)
        redis.close()
    if args.feast_python:
        reads["feast"] = measure_feast(args, folder, world)
    found = measure_contenders(args, folder, world) if args.contenders else {}
    return {
        **ratios(found),
        **read_ratios(reads),
        "reads": reads,
        "contenders": found,
        "sizes": {
            "users": world.num_users,
            "redis_users": args.redis_users if args.redis else None,
            "candidates": CANDIDATES,
            "concurrency": CONCURRENCY,
            "batch_users": BATCH_USERS,
            "history": MAX_LEN,
        },
        "machine": describe_machine(LIBRARIES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print all keys, not only the ratios")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--redis", help="redis:// address of a server that may be written to")
    parser.add_argument("--redis-users", type=int, default=100_000)
    parser.add_argument("--feast-python", type=Path, help="of an environment with feast")
    parser.add_argument("--feast-users", type=int, default=20_000)
    parser.add_argument(
        "--contenders",
        default="uvicorn:torch,uvicorn:onnx,serve:onnx,haproxy:onnx",
        help="MODE:BACKEND, several by commas",
    )
    parser.add_argument("--work-dir", type=Path, help="kept, and used again if it is there")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = report(args, folder)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name:45} {value:.3f}")
    for name, record in found["reads"].items():
        print(name, json.dumps(record))


if __name__ == "__main__":
    main()
