"""Programs that tests share: an S3 store and a Redis, real ones, on free loopback ports, and a browser."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # threads of several test processes wait for each other; torch, which is not loaded yet, reads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# shared machines stall: a slow example is no failure
settings.register_profile("loopfm", deadline=None)
settings.load_profile("loopfm")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-rewrite", action="store_true", help="rewrite tests/golden/golden.json"
    )
    parser.addoption(
        "--kill-report", metavar="PATH", help="write how many kill points were tried, as JSON"
    )


ACCESS_KEY = "loopfm-test"
SECRET_KEY = "loopfm-test-secret"
BUCKET = "loopfm"
START_TIMEOUT_S = 90.0
START_ATTEMPTS = 3


@dataclass(frozen=True)
class S3Server:
    """A running S3 store; `env` is what clients read."""

    endpoint: str
    bucket: str
    env: dict[str, str]


def free_ports(count):
    """Return ports such that each and the one 10000 above (weed's gRPC) are free."""
    ports = []
    generator = random.Random(os.getpid() * 1000 + time.time_ns() % 1000)
    while len(ports) < count:
        port = generator.randrange(20000, 30000)
        if port not in ports and all(_is_free(value) for value in (port, port + 10000)):
            ports.append(port)
    return ports


def _is_free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _program(name):
    """Return the path of a program beside the interpreter or on the path; skip loudly, but fail in CI."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        message = f"{name} is not installed; docs/operations.md says how to get it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def _comes_up(is_ready, process):
    """Poll until `is_ready` returns True; return False when the server dies or does not come up in time."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if is_ready():
            return True
        try:  # give the server its turn; returns at once when it ends
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
    return False


def _wait_until(is_ready, process, log):
    """Poll until `is_ready` returns True; fail with the server's log when it does not come up."""
    if not _comes_up(is_ready, process):
        _fail_with(log)


def _fail_with(log):
    pytest.fail(f"server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _stop(process):
    process.terminate()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS S3 server with one bucket; checks signatures as real S3 does."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    weed = _program("weed")
    for attempt in range(START_ATTEMPTS):
        folder = tmp_path_factory.mktemp("s3")
        command, env = _weed_command(weed, folder)
        client = boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 0}),
        )

        def is_ready(client=client):
            try:
                client.create_bucket(Bucket=BUCKET)
                # the first write waits for a volume: only then is the store ready
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            except client.exceptions.BucketAlreadyOwnedByYou:
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            except (BotoCoreError, ClientError):
                return False
            return True

        log = folder / "log"
        with log.open("wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, cwd=folder)
        try:
            # another process may take a port between our look and the server's: then it dies and we try others
            if attempt < START_ATTEMPTS - 1 and not _comes_up(is_ready, process):
                continue
            _wait_until(is_ready, process, log)
            yield S3Server(env["AWS_ENDPOINT_URL"], BUCKET, env)
            return
        finally:
            _stop(process)


def _weed_command(weed, folder):
    """Write the settings of a SeaweedFS server into `folder`; return its command and its clients' environment."""
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = free_ports(4)
    command = [weed, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-filer", "-s3"]
    command += [f"-filer.port={filer}", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    # no reports to the makers, and no services on ports that are the same for every server of this machine
    command += ["-master.volumeSizeLimitMB=256", "-volume.max=30", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
    }
    return command, env


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path_factory):
    """The S3 server, with the environment that clients read; gives the address of an empty folder."""
    from loopfm_ray.store.s3 import connect

    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    # what is read is kept below the home
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    connect.cache_clear()
    yield f"s3://{s3_server.bucket}/{time.time_ns():x}"
    connect.cache_clear()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    """The address of an empty Redis server."""
    program = _program("redis-server")
    folder = tmp_path_factory.mktemp("redis")
    (port,) = free_ports(1)
    log = folder / "log"
    command = [
        program,
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]

    def is_ready():
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as link:
                link.sendall(b"PING\r\n")
                return link.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    try:
        _wait_until(is_ready, process, log)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        _stop(process)


CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def chromium():
    """The path of Chromium; skips loudly without, but fails in CI."""
    found = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)
    if found is None:
        names = ", ".join(CHROMIUM_NAMES)
        message = f"no Chromium on PATH (looked for {names}): the page was NOT checked"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found
