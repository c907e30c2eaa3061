"""A caller that no longer waits is not scored for; the time counts from where it began."""

import pytest
from fastapi.testclient import TestClient

from loopfm_ray.serving.api import create_api
from tests.serving.test_api import NOW, SCORE, FakeScorer, one


class Clock:
    """Gives one time after another."""

    def __init__(self, *times):
        self.times = list(times)

    def __call__(self):
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


def ask(clock, **headers):
    scorer = FakeScorer()
    with TestClient(create_api(scorer, clock)) as client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.post(SCORE, json=one(), headers=named), scorer


def test_in_time():
    # read at the head of the request, and again when the body is there
    response, _ = ask(Clock(NOW, NOW + 50_000), x_timeout_ms="50")
    assert response.status_code == 200


def test_too_late():
    response, scorer = ask(Clock(NOW, NOW + 50_001), x_timeout_ms="50")
    assert response.status_code == 504
    assert response.json()["title"] == "Gateway Timeout"
    assert "not" not in response.headers.get("retry-after", "")
    assert not scorer.queries


@pytest.mark.parametrize(
    "start",
    [f"t={NOW // 1_000_000}.000000", f"t={NOW // 1000}", str(NOW // 1000), f"t={NOW}", f"{NOW}"],
)
def test_time_spent_in_queues_counts_when_the_start_is_told(start):
    for waited_ms, status in ((29, 200), (31, 504)):
        now = NOW + waited_ms * 1000
        response, _ = ask(Clock(now), x_timeout_ms="30", x_request_start=start)
        assert response.status_code == status


def test_seconds_with_a_fraction():
    start = f"t={NOW // 1_000_000}.5"
    late = NOW // 1_000_000 * 1_000_000 + 531_000
    assert ask(Clock(late), x_timeout_ms="30", x_request_start=start)[0].status_code == 504
    assert ask(Clock(late), x_timeout_ms="31", x_request_start=start)[0].status_code == 200


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "9999999"])
def test_a_wrong_timeout_is_refused(value):
    response, scorer = ask(Clock(NOW), x_timeout_ms=value)
    assert response.status_code == 400
    assert "x-timeout-ms" in response.json()["detail"]
    assert not scorer.queries


@pytest.mark.parametrize("value", ["yesterday", "t=12", "t=1.2.3"])
def test_a_wrong_start_is_refused(value):
    response, _ = ask(Clock(NOW), x_timeout_ms="10", x_request_start=value)
    assert response.status_code == 400
    assert "x-request-start" in response.json()["detail"]


def test_without_a_deadline_nothing_is_checked():
    response, _ = ask(Clock(NOW, NOW + 10**12), x_request_start="whatever")
    assert response.status_code == 200
