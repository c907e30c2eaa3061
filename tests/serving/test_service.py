"""Many VMs in one process: names, canaries, shadows, and changes under load."""

import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, StoreError
from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.contract import RequestError, ScoreQuery, UnknownModelError
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.rollout import (
    Rollout,
    Rollouts,
    Served,
    is_canary_user,
    promote,
    rollback,
    start_canary,
    start_shadow,
)
from loopfm_ray.serving.service import Service
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.world import STOP

TS = STOP - MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 0.5}
USERS = [f"u{n}" for n in range(40)]


def query(user="u1", items=("i1", "i2", "i3"), **context):
    return ScoreQuery(user, TS, tuple(items), {**PAST, **context})


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """Two bundles that score differently, and their store."""
    folder = tmp_path_factory.mktemp("bundles")
    loaded = load_bundle(world.bundle)
    spec = replace(loaded.spec, calibration=PlattScaling(0.4, 0.9))
    save_bundle(folder / "b", spec, loaded.model, PreparedData.open(world.prepared), {"of": "b"})
    online = str(world.online)
    return (
        Served(bundle=str(world.bundle), online=online),
        Served(bundle=str(folder / "b"), online=online),
    )


class Opener:
    """Loads bundles, and counts how often."""

    def __init__(self):
        self.opened = []

    def __call__(self, one):
        self.opened.append(one)
        return load_predictor(one.bundle, one.online)


@pytest.fixture
def opener():
    torch.set_num_threads(1)
    return Opener()


@pytest.fixture
def service(opener, served):
    service = Service(opener)
    assert service.apply(promote(Rollouts(), "vm", served[0])) == {}
    yield service
    service.close()


def answers(service, name="vm"):
    return {user: service.respond(name, query(user), "r") for user in USERS}


def direct(one):
    predictor = load_predictor(one.bundle, one.online)
    return {user: predictor.score(query(user)).probs.tolist() for user in USERS}


def test_each_name_has_its_own_bundle(service, served):
    service.apply(promote(promote(Rollouts(), "vm", served[0]), "other", served[1]))
    assert service.names == ["other", "vm"]
    for name, one in (("vm", served[0]), ("other", served[1])):
        found = answers(service, name)
        assert {user: answer.scores for user, answer in found.items()} == direct(one)
        assert {answer.model.name for answer in found.values()} == {name}
    assert [item["name"] for item in service.summary()["models"]] == ["other", "vm"]
    with pytest.raises(UnknownModelError, match=r"there are \['other', 'vm'\]"):
        service.respond("third", query(), "r")


def test_a_canary_answers_for_its_users_alone_and_in_batches_too(service, opener, served):
    state = start_canary(promote(Rollouts(), "vm", served[0]), "vm", served[1], 0.3)
    service.apply(state)
    assert opener.opened == [served[0], served[1]]  # what was loaded is kept
    stable, canary = direct(served[0]), direct(served[1])
    single = answers(service)
    batch = service.respond_many("vm", [query(user) for user in USERS], "r").results
    chosen = {user for user in USERS if is_canary_user("vm", user, 0.3)}
    assert 3 < len(chosen) < 25
    for user, among_many in zip(USERS, batch, strict=True):
        want = canary if user in chosen else stable
        assert single[user].scores == want[user]
        np.testing.assert_allclose(among_many.scores, want[user], atol=1e-6)
        variant = "canary" if user in chosen else "stable"
        assert single[user].model.variant == among_many.model.variant == variant
        assert single[user].model == among_many.model
    service.apply(promote(state, "vm"))
    assert {user: answer.scores for user, answer in answers(service).items()} == canary
    service.apply(rollback(promote(state, "vm"), "vm"))
    assert {user: answer.scores for user, answer in answers(service).items()} == stable


def test_a_wrong_query_of_a_batch_is_named_by_its_place_whatever_its_variant(service, served):
    service.apply(start_canary(promote(Rollouts(), "vm", served[0]), "vm", served[1], 0.5))
    queries = [query(user) for user in USERS]
    for place in (0, 7, 20, 39):
        wrong = [*queries]
        wrong[place] = query(USERS[place], colour="red")
        with pytest.raises(RequestError, match="colour") as caught:
            service.respond_many("vm", wrong, "r")
        assert caught.value.index == place


def settled(service, num_requests):
    deadline = time.monotonic() + 20
    while True:
        report = service.describe("vm")["shadow"]
        if report["requests"] + report["dropped"] + report["failed"] >= num_requests:
            return report
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shadow_is_compared_and_never_heard(service, served):
    service.apply(start_shadow(promote(Rollouts(), "vm", served[0]), "vm", served[1]))
    queries = [query(user) for user in USERS]
    service.respond_many("vm", queries, "r")
    found = service.respond("vm", query(), "r")
    assert found.scores == direct(served[0])["u1"]
    report = settled(service, 41)
    gaps = np.concatenate(
        [np.abs(np.subtract(direct(served[0])[u], direct(served[1])[u])) for u in [*USERS, "u1"]]
    )
    assert (report["requests"], report["rows"], report["failed"]) == (41, 123, 0)
    assert report["sum_abs_diff"] == pytest.approx(gaps.sum(), abs=1e-4)
    assert report["max_abs_diff"] == pytest.approx(gaps.max(), abs=1e-5)
    assert report["max_abs_diff"] > 0.05
    # a change elsewhere begins no new report
    service.apply(start_shadow(promote(Rollouts(), "vm", served[0]), "vm", served[1]))
    assert settled(service, 41) == report


class Broken:
    """A predictor that can not score."""

    def __init__(self, like, gate=None):
        self.bundle, self.gate = like.bundle, gate

    def score_many(self, queries):
        if self.gate is not None:
            self.gate.wait()
        raise RuntimeError("no")


def test_a_shadow_that_fails_or_is_slow_harms_nobody(served, world):
    good, gate = load_predictor(served[0].bundle, served[0].online), threading.Event()
    service = Service(lambda one: good if one == served[0] else Broken(good, gate))
    service.apply(start_shadow(promote(Rollouts(), "vm", served[0]), "vm", served[1]))
    for _ in range(100):
        assert service.respond("vm", query(), "r").scores == direct(served[0])["u1"]
    gate.set()
    report = settled(service, 100)
    assert report["dropped"] > 30
    assert report["failed"] == 100 - report["dropped"] > 50
    service.close()


def test_a_bundle_that_can_not_be_served_leaves_the_old_one_and_says_why(service, served, tmp_path):
    before = answers(service)
    wrong = Served(bundle=str(tmp_path / "nowhere"), online=served[0].online)
    state = promote(promote(promote(Rollouts(), "vm", served[0]), "vm", wrong), "new", served[1])
    refused = service.apply(state)
    assert list(refused) == ["vm"]
    assert "nowhere" in refused["vm"]
    assert answers(service) == before
    assert "nowhere" in service.describe("vm")["problem"]
    assert service.names == ["new", "vm"]
    assert service.revision == state.revision
    # a canary that can not be loaded changes nothing either
    assert service.apply(start_canary(promote(Rollouts(), "vm", served[0]), "vm", wrong, 0.5))
    assert answers(service) == before
    assert service.apply(promote(Rollouts(), "vm", served[0])) == {}
    assert service.describe("vm")["problem"] is None


def test_a_folder_that_was_written_over_is_noticed(served, tmp_path):
    """Promoting it again serves what is there now; going back to what was there before is refused."""
    folder = tmp_path / "bundle"
    service = Service(ServeConfig(bundle="unused").open)

    def put(one):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(one.bundle, folder)
        return Served(bundle=str(folder), online=one.online, version=load_bundle(folder).version)

    first = promote(Rollouts(), "vm", put(served[0]))
    assert service.apply(first) == {}
    second = promote(first, "vm", put(served[1]))
    assert service.apply(second) == {}
    assert {user: answer.scores for user, answer in answers(service).items()} == direct(served[1])
    assert "written over" in service.apply(rollback(second, "vm"))["vm"]
    assert {user: answer.scores for user, answer in answers(service).items()} == direct(served[1])
    service.close()


def test_a_bundle_of_another_space_is_refused(service, served, world):
    loaded = load_predictor(served[0].bundle, served[0].online)

    def opener(one):
        raise BundleError("the online store does not match VM 'vm'")

    service._open = opener
    assert "does not match" in service.apply(promote(Rollouts(), "vm", served[1]))["vm"]
    assert service.respond("vm", query(), "r").model.version == loaded.bundle.version


def test_the_file_that_is_followed_may_change_vanish_and_come_back(opener, served):
    state = {"now": promote(Rollouts(), "vm", served[0])}

    def source():
        if state["now"] is None:
            raise StoreError("rollouts.json is not there")
        return state["now"]

    service = Service(opener, source)
    service.apply(source())
    assert not service.reload()
    state["now"] = promote(state["now"], "vm", served[1])
    assert service.reload()
    assert {user: answer.scores for user, answer in answers(service).items()} == direct(served[1])
    state["now"] = None
    assert not service.reload()
    assert service.names == ["vm"]
    service.close()


def test_changes_under_load_answer_every_request_by_one_bundle_or_the_other(service, served):
    allowed = {load_predictor(one.bundle, one.online).bundle.version: direct(one) for one in served}
    stop, wrong, counts = threading.Event(), [], dict.fromkeys(allowed, 0)

    def ask(offset):
        number = offset
        while not stop.is_set():
            user = USERS[number % len(USERS)]
            answer = service.respond("vm", query(user), "r")
            counts[answer.model.version] += 1
            if answer.scores != allowed[answer.model.version][user]:
                wrong.append((user, answer))
            number += 3

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    state = promote(Rollouts(), "vm", served[0])
    for number in range(12):
        state = promote(state, "vm", served[(number + 1) % 2])
        assert service.apply(state) == {}
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert min(counts.values()) > 0


def test_a_predictor_answers_under_the_name_of_its_bundle(served):
    predictor = load_predictor(served[0].bundle, served[0].online)
    answer = predictor.respond(query(), "r")
    assert isinstance(predictor, Predictor)
    assert (answer.model.name, answer.model.variant) == ("vm_loopfm", "stable")
    assert Rollout(stable=served[0]).canary is None
