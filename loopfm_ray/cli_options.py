"""What the verbs of the command line share: arguments, how a result is printed."""

import json
from typing import Annotated, Any

import typer

from loopfm_ray import log
from loopfm_ray.config import find_config, load_config
from loopfm_ray.experiments import PipelineConfig

__all__ = [
    "DEFAULT_CONFIG",
    "ConfigArgument",
    "FreshOption",
    "JsonOption",
    "SeedOption",
    "SetOption",
    "VerboseOption",
    "load_pipeline",
    "print_result",
]

DEFAULT_CONFIG = "complete_journey"

ConfigArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[CONFIG]",
        help="A YAML file, or the name of one that comes with the package: complete_journey (default), "
        "movielens, online_retail, synthetic, ...",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one value of the config, such as seeds=[0,1,2] or data=my_log.yaml. May be repeated.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Do every stage again, also those that are up to date.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")]
SeedOption = Annotated[int | None, typer.Option(help="The seed; the config's first if not given.")]


def load_pipeline(config: str | None, overrides: list[str] | None, verbose: bool) -> PipelineConfig:
    """Return the config that a verb was given, with logging set up."""
    log.setup("INFO" if verbose else "WARNING")
    return load_config(PipelineConfig, find_config(config or DEFAULT_CONFIG), overrides or ())


def print_result(result: dict[str, Any], as_json: bool) -> None:  # Any: JSON
    """Print what a job gave: a line for each key, or JSON."""
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value if isinstance(value, str | int | float) else json.dumps(value)}")
