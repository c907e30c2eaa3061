"""Who may ask, and how often."""

import json
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loopfm_ray.cli import app
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.keys import ApiKeys, Gate, Verdict, add_key, read_keys, write_keys
from tests.serving.test_api import SCORE, FakeScorer, assert_problem


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def world(clock):
    """A service with a key without limit and one of two requests a second, three at once."""
    keys, free = add_key(ApiKeys(), "free")
    keys, slow = add_key(keys, "slow", rate_per_s=2.0, burst=3)
    client = TestClient(create_api(FakeScorer(), gate=Gate(keys.keys, clock)))
    return client, {"free": free, "slow": slow}


def ask(client, secret=None, scheme="Bearer"):
    headers = {} if secret is None else {"authorization": f"{scheme} {secret}"}
    return client.post(SCORE, json={"user": "u", "items": ["1"]}, headers=headers)


def test_every_path_but_the_probes_asks_for_a_key(world):
    client, secrets = world
    assert ask(client, secrets["free"]).status_code == 200
    assert ask(client, secrets["free"], "bearer").status_code == 200
    for secret, scheme in (
        (None, ""),
        ("", "Bearer"),
        ("no", "Bearer"),
        (secrets["free"], "Basic"),
    ):
        response = ask(client, secret, scheme)
        assert_problem(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/v1/models/vm", "/docs", "/openapi.json", "/nowhere"):
        assert client.get(path).status_code == 401
    for path in ("/healthz", "/readyz"):
        assert client.get(path).status_code == 200


def test_a_key_that_asks_too_often_is_told_when_to_come_back(world, clock):
    client, secrets = world
    assert [ask(client, secrets["slow"]).status_code for _ in range(4)] == [200, 200, 200, 429]
    response = ask(client, secrets["slow"])
    assert "'slow'" in assert_problem(response, 429)["detail"]
    assert response.headers["retry-after"] == "1"
    assert ask(client, secrets["free"]).status_code == 200
    clock.now_s += 1.0
    assert [ask(client, secrets["slow"]).status_code for _ in range(3)] == [200, 200, 429]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0.2, 20), st.integers(1, 8))
def test_no_more_than_rate_and_burst_get_through_and_waiting_as_told_helps(gaps, rate, burst):
    clock = Clock()
    keys, secret = add_key(ApiKeys(), "one", rate_per_s=rate, burst=burst)
    gate = Gate(keys.keys, clock)
    passed = 0
    for gap in gaps:
        clock.now_s += gap
        verdict = gate.check(secret)
        assert verdict.name == "one"
        passed += verdict.retry_after_s == 0
        if verdict.retry_after_s:
            clock.now_s += verdict.retry_after_s + 1e-9
            assert gate.check(secret).retry_after_s == 0
            passed += 1
    assert passed <= burst + (clock.now_s - 100.0) * rate + 1e-6


def test_threads_share_one_count(clock):
    keys, secret = add_key(ApiKeys(), "one", rate_per_s=1.0, burst=50)
    gate = Gate(keys.keys, clock)
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda _: gate.check(secret), range(400)))
    assert sum(verdict.retry_after_s == 0 for verdict in verdicts) == 50


def test_what_is_only_like_a_key_is_none():
    keys, secret = add_key(ApiKeys(), "one")
    gate = Gate(keys.keys, time.monotonic)
    assert gate.check(secret) == Verdict("one")
    for wrong in (secret[:-1], f"{secret}x", secret.swapcase(), "", "ä"):
        assert gate.check(wrong) == Verdict(None)


def test_the_file_holds_no_key_and_is_the_owners_alone(tmp_path):
    file = tmp_path / "keys.json"
    done = CliRunner().invoke(app, ["key", str(file), "ranking", "--rate", "50"])
    assert done.exit_code == 0, done.output
    secret = done.stdout.strip()
    assert len(secret) >= 43
    assert secret not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Gate(read_keys(file).keys, time.monotonic).check(secret) == Verdict("ranking")
    again = CliRunner().invoke(app, ["key", str(file), "ranking"])
    assert isinstance(again.exception, ConfigError)
    other = CliRunner().invoke(app, ["key", str(file), "ads"]).stdout.strip()
    assert other != secret
    assert CliRunner().invoke(app, ["key", str(file), "ranking", "--remove"]).exit_code == 0
    gate = Gate(read_keys(file).keys, time.monotonic)
    assert (gate.check(secret), gate.check(other)) == (Verdict(None), Verdict("ads"))
    gone = CliRunner().invoke(app, ["key", str(file), "ranking", "--remove"])
    assert "has no key 'ranking'" in str(gone.exception)


def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    file = tmp_path / "keys.json"
    write_keys(file, add_key(ApiKeys(), "one")[0])
    for mode in (0o640, 0o604, 0o620):
        os.chmod(file, mode)  # noqa: PTH101
        with pytest.raises(StoreError, match="chmod 600"):
            read_keys(file)
    os.chmod(file, 0o600)  # noqa: PTH101
    file.write_text(json.dumps({"keys": [{"name": "a", "sha256": "short"}]}))
    with pytest.raises(StoreError, match="is no key file"):
        read_keys(file)
    with pytest.raises(StoreError, match="loopfm key"):
        read_keys(tmp_path / "none.json")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.3", "ranker.example"])
def test_another_interface_than_loopback_takes_keys(host):
    with pytest.raises(ValueError, match="loopfm key"):
        ServeConfig(bundle="b", host=host)
    assert ServeConfig(bundle="b", host=host, api_keys="keys.json").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_loopback_may_go_without(host):
    assert ServeConfig(bundle="b", host=host).gate() is None
