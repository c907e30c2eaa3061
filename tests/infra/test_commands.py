"""Every `loopfm` command in image, compose file, manifests and docs/deploy.md is one that the command line takes."""

from pathlib import Path

import pytest
import typer

from loopfm_ray.cli import app
from loopfm_ray.config import find_config, load_config
from loopfm_ray.experiments import PipelineConfig
from tests.infra.deployments import (
    ROOT,
    commands,
    compose,
    one,
    shell_commands,
    simple_commands,
    words_of,
)

LOOPFM = [(where, words) for where, words in commands() if words[0] == "loopfm"]
RUN_VERBS = {"prepare", "materialize", "join", "audit", "publish", "freshness", "serve", "demo"}


def parse(words):
    """Return the parsed call, as a context of its verb; nothing is run."""
    group = typer.main.get_command(app)
    context = group.make_context("loopfm", [], resilient_parsing=True)
    context.resilient_parsing = False
    name, command, rest = group.resolve_command(context, list(words[1:]))
    return command.make_context(name, rest, parent=context)


def trained_config():
    """Return the config of the run that train.yaml makes."""
    (words,) = shell_commands(one("RayJob")["spec"]["entrypoint"])
    parameters = parse(words).params
    return load_config(PipelineConfig, find_config(parameters["config"]), parameters["overrides"])


@pytest.mark.parametrize(("where", "words"), LOOPFM, ids=lambda value: str(value)[:60])
def test_loopfm_command_is_one_of_ours(where, words):
    if words == ["loopfm", "--help"]:
        return
    context = parse(words)
    parameters = context.params
    if context.info_name in RUN_VERBS and parameters["overrides"]:
        config = parameters["config"]
        if Path(config).suffix and not (ROOT / config).exists():
            config = "synthetic"  # the reader's own; its overrides are still checked
        load_config(PipelineConfig, find_config(config), parameters["overrides"])


def test_a_command_that_is_not_there_is_found():
    with pytest.raises(Exception, match="No such command"):
        parse(["loopfm", "materialise", "x"])
    with pytest.raises(Exception, match="No such option"):
        parse(["loopfm", "demo", "x", "--sett", "a=1"])


def test_commands_are_found_where_they_are():
    places = {where for where, _ in LOOPFM}
    assert places >= {
        "Dockerfile", "compose.yaml train", "compose.yaml serve", "train.yaml", "CronJob submit", "docs/deploy.md",
    }  # fmt: skip
    programs = {words[0] for _, words in commands() if not words[0].startswith("--")}
    assert programs == {"loopfm", "ray", "python", "install", "ulimit", "redis-server", "server"}


def test_what_shell_lines_run_is_told_apart():
    line = "ulimit -n 1; ray job submit --address=a -- bash -c 'loopfm prepare x && loopfm join x'"
    assert list(shell_commands(line)) == [
        ["ulimit", "-n", "1"],
        ["ray", "job", "submit", "--address=a", "--"],
        ["loopfm", "prepare", "x"],
        ["loopfm", "join", "x"],
    ]


def test_the_night_runs_what_operations_tell_for_a_log_that_grows():
    (container,) = one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    run = [
        words
        for words in simple_commands([*container["command"], *container["args"]])
        if words[0] == "loopfm"
    ]
    assert [words[1] for words in run] == [
        "prepare", "materialize", "join", "audit", "publish", "freshness",
    ]  # fmt: skip
    assert {words[2] for words in run} == {str(trained_config().paths.config)}


def test_compose_serves_the_run_that_it_trains():
    services = compose()["services"]
    *_, trained = simple_commands(words_of(services["train"]["command"]))
    parameters = parse(trained).params
    config = load_config(PipelineConfig, find_config(parameters["config"]), parameters["overrides"])
    served = parse(words_of(services["serve"]["command"])).params
    assert served["config"] == str(config.paths.config)
    mounts = dict(one.split(":")[:2] for one in services["serve"]["volumes"])
    assert str(served["with_settings"]) in mounts.values()
    for name in ("run_dir", "scratch_dir"):
        folders = [one.split(":")[1] for one in services["worker"]["volumes"]]
        assert getattr(config, name) in folders
