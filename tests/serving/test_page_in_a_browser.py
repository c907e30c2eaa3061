"""The page at `/ui` as a browser shows it: its numbers are those of the API, and nothing in it runs that should not."""

import json
import os
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import uvicorn

from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.keys import ApiKeys, Gate, add_key
from loopfm_ray.serving.page import Page
from loopfm_ray.serving.rollout import Rollouts, Served, promote
from loopfm_ray.serving.service import Service
from tests.browser import browsing
from tests.serving.test_page import TS
from tests.serving.world import STOP, make_world

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

HOSTILE = "<img src=x onerror=console.log(666)><script>console.log(666)</script>"
ROWS = """[...document.querySelectorAll("#candidates tbody tr")].map((row) =>
    [row.querySelector("th").textContent, ...[...row.querySelectorAll("[data-score]")].map((one) => Number(one.dataset.score))])"""
READY = (
    "!document.getElementById('ask').hidden && document.getElementById('users').children.length > 0"
)
DONE = "!document.getElementById('result').hidden"


class Running:
    """An application on a free port of loopback."""

    def __init__(self, app):
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self):
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture(scope="module")
def service(world, tmp_path_factory):
    """Two models, one of them without history."""
    plain = make_world(tmp_path_factory.mktemp("plain"), kind="none")
    made = Service(ServeConfig(bundle="unused").open)
    state = promote(
        Rollouts(), "grocery", Served(bundle=str(world.bundle), online=str(world.online))
    )
    assert made.apply(promote(state, "plain", Served(bundle=str(plain.bundle)))) == {}
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(service):
    running = Running(create_api(service, clock=lambda: TS, page=Page(service)))
    yield running.url
    running.close()


@pytest.fixture(scope="module")
def shared(chromium, tmp_path_factory):
    with browsing(chromium, tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def browser(shared):
    shared.send("Page.navigate", url="about:blank")
    shared.console.clear()
    shared.look()
    return shared


def post(url, path, body):
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def fill(name, value):
    text = json.dumps(value)
    return f"""(() => {{ const one = document.getElementById({json.dumps(name)}); one.value = {text};
        one.dispatchEvent(new Event("input")); one.dispatchEvent(new Event("change")); }})()"""


def test_the_numbers_on_the_page_are_those_of_the_api(browser, url):
    browser.open(f"{url}/ui")
    browser.wait(READY)
    assert browser.run("[...document.getElementById('model').options].map((o) => o.value)") == ["grocery", "plain"]  # fmt: skip
    browser.run("document.querySelectorAll('#users button')[2].click()")
    browser.wait(DONE)
    user = browser.run("document.getElementById('user').value")
    items = browser.run("document.getElementById('items').value").split("\n")
    body = {"user": user, "items": items, "request_ts": STOP}
    body["context"] = {"past_count_item": 0, "past_recency_item": 1.5}
    scored = post(url, "/v1/models/grocery:score", body)
    without = post(url, "/v1/models/grocery:explore", body)["without_history"]
    expected = sorted(
        ([item, *pair] for item, *pair in zip(items, scored["scores"], without["scores"], strict=True)),
        key=lambda row: -row[1],
    )  # fmt: skip
    shown = browser.run(ROWS)
    assert shown == expected[:10]
    assert any(row[1] != row[2] for row in shown)
    text = browser.run("document.getElementById('result').innerText")
    for part in (scored["features"]["version"], scored["model"]["version"], "shown, tags"):
        assert part in text
    assert f"Events read\n{scored['features']['history_len']}" in text
    assert browser.run("document.querySelectorAll('#timeline circle').length") == scored["features"]["history_len"]  # fmt: skip
    assert browser.console == []


def test_a_model_without_history_and_a_context_of_ones_own(browser, url):
    browser.open(f"{url}/ui")
    browser.wait(READY)
    browser.run(fill("model", "plain"))
    browser.wait("document.getElementById('when').options.length === 2")
    browser.run(fill("user", "nobody"))
    browser.run(fill("items", "i1\n\ni2\nnowhere"))
    browser.run("document.querySelector('#context input[name=shown]').value = '310'")
    browser.run("document.querySelector('#context input[name=tags]').value = 't1, t2'")
    browser.run("document.querySelector('#context input[name=device]').value = 'no such'")
    browser.run("document.getElementById('score').click()")
    browser.wait(DONE)
    body = {"user": "nobody", "items": ["i1", "i2", "nowhere"]}
    body["context"] = {"past_count_item": 0, "past_recency_item": 1.5, "shown": 310, "tags": ["t1", "t2"], "device": "no such"}  # fmt: skip
    scored = post(url, "/v1/models/plain:score", body)
    assert dict(browser.run(ROWS)) == dict(zip(body["items"], scored["scores"], strict=True))
    text = browser.run("document.getElementById('defaults').innerText")
    assert "not known" in text
    assert "1 of 3" in text
    assert "Fields of unknown value\ndevice" in text
    assert browser.console == []


def test_what_the_service_refuses_is_shown(browser, url):
    browser.open(f"{url}/ui")
    browser.wait(READY)
    browser.run("document.querySelector('#context input[name=past_count_item]').value = ''")
    browser.run("document.getElementById('score').click()")
    browser.wait("!document.getElementById('problem').hidden")
    assert "past_count_item" in browser.run("document.getElementById('problem').textContent")
    browser.run("document.querySelector('#context input[name=past_count_item]').value = 'x'")
    browser.run("document.getElementById('score').click()")
    browser.wait("document.getElementById('problem').textContent.includes('takes a number')")


def test_hostile_names_run_nothing(browser, url):
    browser.open(f"{url}/ui")
    browser.wait(READY)
    browser.run(fill("user", HOSTILE))
    browser.run(fill("items", f"i1\n{HOSTILE}"))
    browser.run("document.getElementById('score').click()")
    browser.wait(DONE)
    assert HOSTILE in [row[0] for row in browser.run(ROWS)]
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    # a known user of that name is a button, and no more
    browser.run(f"samples.users.push({{user: {json.dumps(HOSTILE)}, history_len: 1}}); fillUsers()")
    assert HOSTILE in browser.run("document.getElementById('users').lastChild.textContent")
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    assert browser.console == []
    # and markup that got in all the same could do nothing
    browser.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE)})")
    browser.wait("document.querySelectorAll('body > img').length === 1")
    time.sleep(0.3)
    assert not any('"666"' in line or "666" in json.loads(line).get("args", [{}])[0].get("description", "") for line in browser.console)  # fmt: skip
    assert any("Content Security Policy" in line for line in browser.console)


def test_the_page_asks_for_a_key_and_keeps_it_in_memory_alone(browser, service):
    keys, secret = add_key(ApiKeys(), "one")
    app = create_api(
        service, clock=lambda: TS, gate=Gate(keys.keys, time.monotonic), page=Page(service)
    )
    running = Running(app)
    try:
        browser.open(f"{running.url}/ui")
        asks = "!document.getElementById('key-form').hidden"
        browser.wait(asks)
        assert browser.run("document.getElementById('ask').hidden")
        submit = "document.querySelector('#key-form button').click()"
        browser.run(fill("key", "wrong"))
        browser.run(submit)
        browser.wait("!document.getElementById('problem').hidden")
        browser.run(fill("key", secret))
        browser.run(submit)
        browser.wait(READY)
        browser.run("document.getElementById('score').click()")
        browser.wait(DONE)
        assert browser.run("document.getElementById('key').value") == ""
        stored = "JSON.stringify([localStorage.length, sessionStorage.length, document.cookie, location.href])"
        assert secret not in browser.run(stored)
        assert browser.run(stored).startswith('[0,0,""')
        browser.send("Page.reload")
        browser.wait(f"document.readyState === 'complete' && {asks}")
    finally:
        browser.send("Page.navigate", url="about:blank")
        running.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_it_fits_the_window_in_light_and_dark(browser, url, tmp_path, width, scheme):
    browser.look(width, 900, scheme)
    browser.open(f"{url}/ui")
    browser.wait(READY)
    browser.run("document.querySelectorAll('#users button')[0].click()")
    browser.wait(DONE)
    ink = {"light": "rgb(22, 32, 44)", "dark": "rgb(232, 237, 243)"}[scheme]
    assert browser.run("getComputedStyle(document.body).color") == ink
    assert browser.run("document.documentElement.scrollWidth") <= width
    # every control has a name
    nameless = """[...document.querySelectorAll("input, select, textarea, button")].filter((one) =>
        !(one.labels && one.labels.length) && !one.textContent.trim()).map((one) => one.id)"""
    assert browser.run(nameless) == []
    folder = Path(os.environ.get("LOOPFM_SCREENSHOTS", tmp_path))
    picture = folder / f"ui-{width}-{scheme}.png"
    browser.screenshot(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
