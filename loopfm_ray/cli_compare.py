"""The verbs that compare runs: experiments over many cells, and the analysis of where a gain comes from."""

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopfm_ray import log
from loopfm_ray.cli_options import (
    DEFAULT_CONFIG,
    ConfigArgument,
    JsonOption,
    SetOption,
    VerboseOption,
)
from loopfm_ray.config import find_config, load_config, read_yaml
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.terminal import show_progress

if TYPE_CHECKING:
    from loopfm_ray.experiment_grid import ExperimentConfig

__all__ = ["add_verbs"]


def add_verbs(app: typer.Typer) -> None:
    """Give `app` these verbs."""
    app.command()(experiment)
    app.command()(analyze)
    app.command()(drift)


def experiment(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="An experiment on a pipeline or on graphs: a YAML file, or the name of one in the package.",
        ),
    ],
    overrides: SetOption = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="SUMMARY",
            help="Summary of the same experiment with other seeds, from another machine; may be given several times.",
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run models and arms under several seeds and compare them; goes on where it stopped."""
    log.setup("INFO" if verbose else "WARNING")
    path = _find_experiment(config)
    if read_yaml(path).get("kind") == "kge_experiment":
        _run_on_graphs(path, overrides or (), merge or (), as_json=as_json)
        return
    from loopfm_ray.experiment_grid import ExperimentConfig

    settings = load_config(ExperimentConfig, path, overrides or ())
    from loopfm_ray.jobs.experiment import run_experiment

    with show_progress() as progress:
        summary = run_experiment(settings, merge=merge or (), progress=progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from loopfm_ray.report.table import write_cells

    write_cells(summary, sys.stdout)
    typer.echo(f"summary: {settings.root / 'summary.json'}")
    typer.echo(f"report: {settings.root / 'report.html'}")


def _find_experiment(name: str) -> Path:
    """Return the path of an experiment on a pipeline, or else on graphs."""
    try:
        return find_config(name)
    except ConfigError:
        return find_config(name, "kge")


def _run_on_graphs(
    path: Path, overrides: Sequence[str], merge: Sequence[Path], *, as_json: bool
) -> None:
    from loopfm_ray.kge.experiment import KgeExperimentConfig

    settings = load_config(KgeExperimentConfig, path, overrides)
    from loopfm_ray.jobs.kge_experiment import run_kge_experiment

    with show_progress() as progress:
        summary = run_kge_experiment(settings, merge=merge, progress=progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from loopfm_ray.report.table import write_kge_cells

    write_kge_cells(summary, sys.stdout)
    typer.echo(f"summary: {settings.root / 'summary.json'}")
    typer.echo(f"report: {settings.root / 'report.html'}")


def analyze(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    variant: Annotated[
        str | None,
        typer.Option(help="Of an experiment, which variant; its first one if not given."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of an experiment, which model; its first one if not given.")
    ] = None,
    plain: Annotated[str | None, typer.Option(help="The VM without history.")] = None,
    raw: Annotated[str | None, typer.Option(help="The VM with its raw history.")] = None,
    latent: Annotated[str | None, typer.Option(help="The VM with the FM's latents.")] = None,
    both: Annotated[str | None, typer.Option(help="The VM with both histories.")] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Of an experiment whose variants are steps of the channel: what each step loses.",
        ),
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tell where the gain of the FM's history comes from, in nats, with intervals over users (after evaluate)."""
    log.setup("INFO" if verbose else "WARNING")
    from loopfm_ray.jobs.analyze import run_analysis, run_ladder
    from loopfm_ray.report.table import write_analysis, write_ladder

    chosen = {"x": plain, "xh": raw, "xs": latent, "xhs": both}
    if ladder:
        experiment, first = _finished_experiment(config or DEFAULT_CONFIG, overrides or [], model)
        steps = run_ladder(experiment, first, chosen)
        if as_json:
            typer.echo(json.dumps(steps, indent=1))
            return
        write_ladder(steps, sys.stdout)
        typer.echo(f"ladder: {experiment.root / 'ladder.json'}")
        return
    settings, prefix = _finished_run(config or DEFAULT_CONFIG, overrides or [], variant, model)
    result = run_analysis(settings, chosen, prefix)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    write_analysis(result, sys.stdout)
    typer.echo(f"analysis: {settings.paths.root / 'analysis.json'}")


def drift(
    beside: Annotated[Path, typer.Option(help="Folder of the run whose VMs serve now.")],
    config: ConfigArgument = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Tell what the FM snapshot of a new run would do to the served VMs (after materialize, or join, of the new run)."""
    log.setup("INFO" if verbose else "WARNING")
    settings = load_config(PipelineConfig, find_config(config or DEFAULT_CONFIG), overrides or ())
    from loopfm_ray.jobs.context import read_run
    from loopfm_ray.jobs.drift import measure_run_drift

    with show_progress() as progress:
        result = measure_run_drift(settings, read_run(beside), progress=progress)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    from loopfm_ray.report.table import write_drift

    write_drift(result, sys.stdout)
    typer.echo(f"drift: {settings.paths.root / 'drift.json'}")


def _finished_run(
    name: str, overrides: list[str], variant: str | None, model: str | None
) -> tuple[PipelineConfig, str]:
    """Return the pipeline of a run, and what the names of the VMs in question begin with."""
    path = find_config(name)
    if read_yaml(path).get("kind") != "experiment":
        wrong: dict[str, Any] = {"--variant": variant, "--model": model}
        given = [option for option, value in wrong.items() if value is not None]
        if given:
            raise ConfigError(f"{given} are of an experiment, {path} is a pipeline; leave them out")
        return load_config(PipelineConfig, path, overrides), ""
    from loopfm_ray.experiment_grid import cell_name

    experiment, model = _finished_experiment(name, overrides, model)
    variant = variant or next(iter(experiment.variants))
    _check_known("variant", variant, experiment.variants)
    return experiment.pipeline(variant), cell_name(model, "")


def _finished_experiment(
    name: str, overrides: list[str], model: str | None
) -> "tuple[ExperimentConfig, str]":
    """Return an experiment, and the model of it that is meant.

    Raises:
        ConfigError: `name` is no experiment, or has no such model.
    """
    from loopfm_ray.experiment_grid import ExperimentConfig

    path = find_config(name)
    if read_yaml(path).get("kind") != "experiment":
        raise ConfigError(f"--ladder is of an experiment, {path} is a pipeline; leave it out")
    experiment = load_config(ExperimentConfig, path, overrides)
    model = model or next(iter(experiment.models))
    _check_known("model", model, experiment.models)
    return experiment, model


def _check_known(what: str, found: str, known: Collection[str]) -> None:
    if found not in known:
        raise ConfigError(f"the experiment has no {what} {found!r}, it has {sorted(known)}")
