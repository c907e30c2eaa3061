"""What serves under a name, and how one bundle takes over from another."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from loopfm_ray.cli import app
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.rollout import (
    Rollout,
    Rollouts,
    Served,
    editing,
    is_canary_user,
    promote,
    read_rollouts,
    rollback,
    start_canary,
    start_shadow,
    write_rollouts,
)

A, B, C = (Served(bundle=f"/bundles/{name}") for name in "abc")


def begin():
    return promote(Rollouts(), "vm", A)


def test_a_canary_is_promoted_and_every_step_can_be_taken_back():
    first = begin()
    assert (first.revision, first.of("vm")) == (1, Rollout(stable=A))
    trial = start_canary(start_shadow(first, "vm", C), "vm", B, 0.1)
    assert trial.of("vm") == Rollout(stable=A, canary=B, canary_share=0.1, shadow=C)
    assert rollback(trial, "vm").of("vm") == Rollout(stable=A, shadow=C)
    done = promote(trial, "vm")
    assert done.of("vm") == Rollout(stable=B, previous=(A,))
    at_once = promote(done, "vm", C)
    assert at_once.of("vm") == Rollout(stable=C, previous=(A, B))
    back = rollback(rollback(at_once, "vm"), "vm")
    assert back.of("vm") == Rollout(stable=A)
    assert back.revision == 7


def test_what_makes_no_sense_is_named():
    with pytest.raises(ConfigError, match=r"no model 'other' is served, there are \['vm'\]"):
        promote(begin(), "other")
    with pytest.raises(ConfigError, match="has no canary to promote"):
        promote(begin(), "vm")
    with pytest.raises(ConfigError, match="nothing to go back to"):
        rollback(begin(), "vm")
    for share in (0, 1, -0.1):
        with pytest.raises(ConfigError, match="share between 0 and 1"):
            start_canary(begin(), "vm", B, share)
    with pytest.raises(ValueError, match="canary_share above 0"):
        Rollout(stable=A, canary=B)
    with pytest.raises(ValueError, match="should match pattern"):
        promote(Rollouts(), "v/m", A)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.text(max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_the_users_of_a_smaller_one(user, one, other):
    small, large = sorted((one, other))
    assert not is_canary_user("vm", user, small) or is_canary_user("vm", user, large)
    assert not is_canary_user("vm", user, 0.0)
    assert is_canary_user("vm", user, 1.0)


def test_the_share_of_the_users_is_the_one_asked_for_and_differs_between_models():
    users = [f"user-{n}" for n in range(20_000)]
    chosen = {name: {u for u in users if is_canary_user(name, u, 0.1)} for name in ("vm", "other")}
    for found in chosen.values():
        assert len(found) / len(users) == pytest.approx(0.1, abs=0.01)
    both = len(chosen["vm"] & chosen["other"]) / len(users)
    assert both == pytest.approx(0.01, abs=0.004)
    # a promise to those who keep logs: the same users on every machine, in every release
    assert [n for n in range(60) if is_canary_user("vm", f"user-{n}", 0.1)] == [
        4,
        9,
        22,
        26,
        30,
        49,
    ]


def test_edits_of_several_people_are_all_kept(tmp_path):
    file = tmp_path / "rollouts.json"

    def add(number):
        with editing(file) as now:
            write_rollouts(file, promote(now, f"vm{number}", A))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert read_rollouts(file).revision == 24
    assert len(read_rollouts(file).models) == 24


def test_a_file_that_is_none_is_told(tmp_path):
    with pytest.raises(StoreError, match="loopfm promote"):
        read_rollouts(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"models": {"vm": {}}}')
    with pytest.raises(StoreError, match="is no rollout file"):
        read_rollouts(tmp_path / "bad.json")


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_verbs_write_what_can_be_served_and_refuse_what_can_not(world, tmp_path):
    file = tmp_path / "live" / "rollouts.json"
    where = ("--bundle", world.bundle, "--online", world.online)
    done = run("promote", file, "vm", *where)
    assert done.exit_code == 0, done.output
    assert f"revision 1, vm: stable {world.bundle} (" in done.output
    assert read_rollouts(file).of("vm").stable.version == load_bundle(world.bundle).version
    done = run("promote", file, "vm", *where, "--canary", 0.05, "--json")
    assert json.loads(done.stdout)["canary_share"] == 0.05
    assert "canary for 5.0%" in run("promote", file, "vm", *where, "--shadow").output
    before = file.read_text()
    for args, message in (
        (("--bundle", tmp_path / "nowhere"), "nowhere"),
        (("--bundle", world.bundle), "give the online store"),
        (("--shadow",), "name it with --bundle"),
        ((*where, "--shadow", "--canary", 0.5), "not as both"),
    ):
        refused = run("promote", file, "vm", *args)
        assert refused.exit_code != 0
        assert message in str(refused.exception) + refused.output
    assert file.read_text() == before
    assert run("rollback", file, "vm").exit_code == 0
    assert read_rollouts(file).of("vm").canary is None
