import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from loopfm_ray import __version__
from loopfm_ray.cli import app
from loopfm_ray.config import find_config
from loopfm_ray.errors import ConfigError
from loopfm_ray.terminal import show_progress

VERBS = [
    "demo",
    "prepare",
    "train-fm",
    "compress",
    "materialize",
    "join",
    "analyze",
    "audit",
    "freshness",
    "train-vm",
    "evaluate",
    "stream",
    "publish",
    "parity",
    "report",
    "promote",
    "rollback",
    "key",
    "compact",
    "upgrade",
    "spaces",
    "retire",
    "experiment",
    "sweep",
    "serve",
    "config",
    "doctor",
    "drift",
    "download-kg",
    "export-kge",
]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "loopfm_ray.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_verbs_are_as_documented():
    assert sorted(
        command.name or command.callback.__name__ for command in app.registered_commands
    ) == sorted(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == __version__


def test_config_prints_what_would_run():
    result = CliRunner().invoke(app, ["config", "synthetic", "--set", "seeds=[3]"])
    assert result.exit_code == 0
    assert "name: synthetic" in result.output
    assert "seeds:\n- 3\n" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["config", "--set", "nmae=x"], "nmae: Extra inputs are not permitted"),
        (["config", "nowhere.yaml"], "nowhere.yaml"),
        (["config", "nothing"], "there is no config 'nothing'"),
        (["config", "--set", "novalue"], "--set takes KEY=VALUE"),
    ],
)
def test_a_users_mistake_prints_one_message_and_exits_with_2(arguments, expected):
    result = run(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_stage_before_its_turn_says_which_one_to_run(tmp_path):
    result = run("report", "synthetic", "--set", f"run_dir={tmp_path}")
    assert result.returncode == 1
    assert "loopfm" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_says_what_it_looked_at():
    result = run("doctor", "--json")
    names = [finding["name"] for finding in json.loads(result.stdout)]
    assert {"python", "ray", "torch", "shared memory", "RAY_AUTH_MODE"} <= set(names)


def test_a_config_is_found_by_name_and_by_path():
    path = find_config("synthetic")
    assert find_config(str(path)) == path
    with pytest.raises(ConfigError, match="online_retail"):
        find_config("nothing")
    assert find_config("movielens", "kge").parts[-2:] == ("kge", "movielens.yaml")
    with pytest.raises(ConfigError, match="folder kge"):
        find_config("synthetic", "kge")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--from", "2024-02-12"], "belong together"),
        (["--to", "2024-02-12"], "belong together"),
        (["--from", "2024-02-12", "--to", "2024-02-12"], "must be earlier"),
        (["--from", "2024-02-12", "--to", "2024-02-11T23:00+01:00"], "must be earlier"),
        (["--from", "soon", "--to", "2024-02-12"], "ISO date"),
        (["--fresh", "--from", "2024-02-12", "--to", "2024-02-13"], "one of them"),
    ],
)
def test_a_wrong_range_of_materialize_is_a_mistake_in_the_command(options, words):
    result = CliRunner().invoke(app, ["materialize", "synthetic", *options])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


def test_what_is_printed_while_a_job_runs_leaves_stdout_to_the_summary(capsys):
    with show_progress() as progress:
        sys.stdout.write("(raylet) a worker says something\n")
        progress("join", 0, 1)
    sys.stdout.write("{}\n")
    out, err = capsys.readouterr()
    assert out == "{}\n"
    assert "a worker says something" in err
    assert "join ..." in err
