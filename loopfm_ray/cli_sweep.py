"""The verb that searches: a sweep over a config's values."""

import json
import sys
from typing import Annotated

import typer

from loopfm_ray import log
from loopfm_ray.cli_options import JsonOption, SetOption, VerboseOption
from loopfm_ray.config import find_config
from loopfm_ray.terminal import show_progress

__all__ = ["add_verbs"]


def add_verbs(app: typer.Typer) -> None:
    """Give `app` this verb."""
    app.command()(sweep)


def sweep(
    config: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A YAML file, or the name of one that comes with the package: vm_variants, fm_scale, cost_budget, kge_csd.",
        ),
    ],
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Search the values of a config by Ray Tune and Optuna, within a budget; goes on where it stopped."""
    log.setup("INFO" if verbose else "WARNING")
    from loopfm_ray.sweep.config import load_sweep

    settings = load_sweep(find_config(config, "sweeps"), overrides or ())
    from loopfm_ray.jobs.sweep import run_sweep
    from loopfm_ray.report.table import write_sweep

    with show_progress() as progress:
        summary = run_sweep(settings, progress=progress)
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    write_sweep(summary, sys.stdout)
    typer.echo(f"summary: {settings.root / 'summary.json'}")
    typer.echo(f"report: {settings.root / 'report.html'}")
