"""One contender of `serve.py` in a process of its own: the service behind bare uvicorn, or on Ray Serve.

Prints one line of JSON when the first request can be answered, and ends when its standard input does.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

MODES = ("uvicorn", "serve", "haproxy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--online", required=True)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--keys", help="key file; the mode haproxy takes one")
    args = parser.parse_args()
    if args.mode == "haproxy":
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    run_uvicorn(args) if args.mode == "uvicorn" else run_serve(args)


def run_uvicorn(args: argparse.Namespace) -> None:
    """Serve by one uvicorn process: the limit of what one process can do."""
    began = time.perf_counter()
    import uvicorn

    from loopfm_ray.jobs.serving import ServeConfig, load
    from loopfm_ray.serving.api import create_api

    config = ServeConfig(
        bundle=args.bundle, online=args.online, backend=args.backend, api_keys=args.keys
    )
    app = create_api(load(config), gate=config.gate())
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=args.port, log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    ready(time.perf_counter() - began, os.getpid())
    sys.stdin.read()
    server.should_exit = True
    thread.join(10)


def run_serve(args: argparse.Namespace) -> None:
    """Serve by Ray Serve on a local cluster; the times of its own processes and of the deployment are told apart."""
    from loopfm_ray.experiments import RayConfig
    from loopfm_ray.jobs import serving
    from loopfm_ray.jobs.cluster import connect

    with connect(RayConfig()):
        began = time.perf_counter()
        config = serving.ServeConfig(
            bundle=args.bundle,
            online=args.online,
            backend=args.backend,
            port=args.port,
            api_keys=args.keys,
            max_queued_requests=-1,
            log_level="WARNING",
        )
        serving.start_proxies(config)
        proxies_s = time.perf_counter() - began
        serving.start(config)  # Serve is there by now, so this deploys alone
        ready(time.perf_counter() - began - proxies_s, replica_pid(), proxies_s)
        sys.stdin.read()
        serving.stop()


def replica_pid() -> int:
    """Return the process of the one replica: the youngest, if others run on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if b"ServeReplica" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return max(found)


def ready(start_s: float, pid: int, proxies_s: float = 0.0) -> None:
    found = {"start_s": start_s, "proxies_s": proxies_s, "pid": pid}
    print("READY " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
