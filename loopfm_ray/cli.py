"""The `loopfm` command: parse, load a config, call one job, print one summary."""

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loopfm_ray import __version__, cli_compare, cli_kge, cli_serve, cli_sweep
from loopfm_ray.cli_options import (
    ConfigArgument,
    FreshOption,
    JsonOption,
    SetOption,
    VerboseOption,
    load_pipeline,
    print_result,
)
from loopfm_ray.config import dump_yaml
from loopfm_ray.data.config import to_ts
from loopfm_ray.errors import ConfigError, LoopFMError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.terminal import show_progress
from loopfm_ray.types import TimeRange

__all__ = ["app", "main"]

_LOGGER = logging.getLogger(__name__)
_REDIRECTED = Console(stderr=True)

app = typer.Typer(
    name="loopfm",
    help="Give the knowledge of one large recommendation model to many small ones.\n\n"
    "Start with [bold]loopfm demo[/bold]: it trains a foundation model, logs its embeddings, trains small models with "
    "and without them, serves one and writes a report.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


cli_compare.add_verbs(app)
cli_kge.add_verbs(app)
cli_serve.add_verbs(app)
cli_sweep.add_verbs(app)


def main() -> None:
    """Run the command; a user's mistake prints one message and no traceback."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        _fail(error, 2)
    except LoopFMError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _REDIRECTED.print("stopped; the same command goes on where it stopped", style="yellow")
        sys.exit(130)


def _fail(error: LoopFMError, code: int) -> None:
    _LOGGER.debug("the command failed", exc_info=error)
    _REDIRECTED.print("error:", style="bold red", end=" ")
    _REDIRECTED.print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the whole loop: prepare, train-fm, compress, materialize, join, audit, train-vm, evaluate, publish, parity, report."""
    settings = load_pipeline(config, overrides, verbose)
    from loopfm_ray.jobs.pipeline import run_pipeline

    with show_progress() as progress:
        summary = run_pipeline(settings, fresh=fresh, progress=progress)
    _show(summary, settings, as_json)


def _stage_command(
    name: str, text: str, show: Callable[[dict[str, Any]], None] | None = None
) -> None:
    def command(
        config: ConfigArgument = None,
        overrides: SetOption = None,
        fresh: FreshOption = False,
        as_json: JsonOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        settings = load_pipeline(config, overrides, verbose)
        from loopfm_ray.jobs.pipeline import run_stages

        with show_progress() as progress:
            result = run_stages(settings, name, fresh=fresh, progress=progress)
        if as_json or show is None:
            print_result(result, as_json)
        else:
            show(result)

    command.__doc__ = text
    app.command(name)(command)


for _name, _text in {
    "prepare": "Read the log, check it, draw negatives and write training examples.",
    "train-fm": "Train the foundation model (after prepare).",
    "compress": "Fit the bottleneck that shortens its embeddings, and measure what they lose (after train-fm).",
    "join": "Give each request the history that was visible to it (after materialize).",
    "train-vm": "Train the vertical models (after join).",
    "evaluate": "Measure all models on the test window (after train-vm).",
    "publish": "Copy the histories into the online store and switch to them.",
    "report": "Write summary.json and the HTML page from the run's records.",
}.items():
    _stage_command(_name, _text)


def _show_stream(result: dict[str, Any]) -> None:
    from loopfm_ray.report.table import write_stream

    write_stream(result, sys.stdout)


_stage_command(
    "stream",
    "Train VMs day by day, each day predicted before it is learnt from; for every vertical (after join).",
    _show_stream,
)


@app.command()
def compact(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Put the small files of the latents together and drop what is too old; the rows stay the same."""
    settings = load_pipeline(config, overrides, verbose)
    from loopfm_ray.jobs.compaction import compact_latents

    with show_progress() as progress:
        result = compact_latents(settings, progress)
    print_result(result, as_json)


@app.command()
def upgrade(
    beside: Annotated[Path, typer.Option(help="Folder of the run that is served now.")],
    config: ConfigArgument = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Bring the histories of a new FM online beside the served ones (after prepare, train-fm and compress of the new run)."""
    settings = load_pipeline(config, overrides, verbose)
    from loopfm_ray.jobs.cluster import connect
    from loopfm_ray.jobs.upgrade import upgrade as run_upgrade

    with show_progress() as progress, connect(settings.ray):
        result = run_upgrade(settings, beside, progress=progress)
    print_result(result, as_json)


@app.command()
def materialize(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TIME",
            help="With --to: make the periods of this time again and take over all others, which must not have "
            "changed. An ISO date or time (UTC) or integer microseconds.",
        ),
    ] = None,
    stop: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="End of that time, not part of it.")
    ] = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Embed and score every event later than the FM, once (after compress); only what changed is made again."""
    settings = load_pipeline(config, overrides, verbose)
    redo = _time_range(start, stop, fresh)
    from loopfm_ray.jobs.pipeline import run_stages

    with show_progress() as progress:
        result = run_stages(settings, "materialize", fresh=fresh, progress=progress, redo=redo)
    print_result(result, as_json)


@app.command()
def spaces(
    config: ConfigArgument = None, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """List the embedding spaces that are live in the run's online store, with what each holds."""
    settings = load_pipeline(config, overrides, verbose=False)
    from loopfm_ray.store.target import live_spaces

    found = {item.space: asdict(item) for item in live_spaces(settings.online_target)}
    print_result(found, as_json)


@app.command()
def retire(
    space: Annotated[str, typer.Option(help="The space, as `loopfm spaces` names it.")],
    config: ConfigArgument = None,
    overrides: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also if it is the last one.")] = False,
) -> None:
    """Remove one embedding space from the run's online store, once no VM reads it any more."""
    settings = load_pipeline(config, overrides, verbose=False)
    from loopfm_ray.store.target import retire as retire_space

    retire_space(settings.online_target, space, force=force)
    typer.echo(f"retired: {space}")


@app.command()
def audit(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    check_all: Annotated[
        bool, typer.Option("--all", help="Check every row, not a sample (audit.sample).")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove by recomputation that the joined set has no leak; exit 1 if it has."""
    chosen = [*(overrides or []), *(["audit.sample=null"] if check_all else [])]
    settings = load_pipeline(config, chosen, verbose)
    from loopfm_ray.jobs.pipeline import run_stages

    with show_progress() as progress:
        result = run_stages(settings, "audit", progress=progress)
    print_result(result, as_json)


@app.command()
def freshness(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    now: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="The time to compare with; the clock's if not given.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how fresh joined and published histories are; exit 1 beyond the limits of the config (after join)."""
    settings = load_pipeline(config, overrides, verbose)
    from loopfm_ray.jobs.freshness import check_freshness

    now_ts = time.time_ns() // 1000 if now is None else _moment(now)
    result = check_freshness(settings, now_ts)
    print_result(result, as_json)
    if result["alarms"]:
        raise typer.Exit(1)


@app.command()
def config(
    config: ConfigArgument = None,
    overrides: SetOption = None,
) -> None:
    """Print the resolved config with every key; save it and edit it."""
    typer.echo(dump_yaml(load_pipeline(config, overrides, verbose=False)), nl=False)


@app.command()
def doctor(
    serve_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--serve",
            metavar="FILE",
            help="A serve config or deployment file, whose doors and key files are looked at; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine: packages, memory, disk, Ray settings, open ports, key files; each line says what to do."""
    from loopfm_ray.jobs.doctor import examine

    findings = examine(serve_files or ())
    if as_json:
        typer.echo(json.dumps([vars(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = "ok  " if finding.is_ok else "look"
            typer.echo(
                f"{mark}  {finding.name}: {finding.found}"
                + (f"; {finding.advice}" if finding.advice else "")
            )
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


def _time_range(start: str | None, stop: str | None, fresh: bool) -> TimeRange | None:
    """Return the range of `--from` and `--to`, None when neither is given."""
    if start is None and stop is None:
        return None
    if start is None or stop is None:
        raise ConfigError(
            "--from and --to belong together; give both, such as --from 2026-03-01 --to 2026-03-08"
        )
    if fresh:
        raise ConfigError(
            "--fresh makes everything again, --from and --to a part; give one of them"
        )
    start_ts, stop_ts = _moment(start), _moment(stop)
    if start_ts >= stop_ts:
        raise ConfigError(f"--from must be earlier than --to, found {start} and {stop}")
    return TimeRange(start_ts, stop_ts)


def _moment(text: str) -> int:
    return to_ts(int(text) if text.lstrip("-").isdigit() else text)


def _show(summary: dict[str, Any], settings: PipelineConfig, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from loopfm_ray.report.table import write_table

    write_table(summary, sys.stdout)
    scored = summary["scored_request"]
    typer.echo(f"scored request: {json.dumps(scored['request'])}")
    typer.echo(f"        answer: {json.dumps(scored['response'])}")
    typer.echo(f"summary: {settings.paths.summary}")
    typer.echo(f"report: {settings.paths.report}")


if __name__ == "__main__":
    main()
