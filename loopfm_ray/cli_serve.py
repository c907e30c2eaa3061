"""The verbs of serving: serve a run, check its scores, and change what serves under a name without a restart."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopfm_ray.cli_options import (
    ConfigArgument,
    FreshOption,
    JsonOption,
    SetOption,
    VerboseOption,
    load_pipeline,
    print_result,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.terminal import show_progress

if TYPE_CHECKING:
    from loopfm_ray.serving.rollout import Rollouts, Served

__all__ = ["add_verbs"]

FileArgument = Annotated[
    Path, typer.Argument(help="The rollout file that the replicas follow (`rollouts` of serving).")
]
NameArgument = Annotated[str, typer.Argument(help="Name of the model.")]


def add_verbs(app: typer.Typer) -> None:
    """Give `app` these verbs."""
    app.command()(serve)
    app.command()(parity)
    app.command()(promote)
    app.command()(rollback)
    app.command()(key)


def serve(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port of HTTP; 8000 if nothing else is set.", min=1, max=65535),
    ] = None,
    with_settings: Annotated[
        Path | None,
        typer.Option(
            "--with",
            metavar="FILE",
            help="YAML with other keys of the serve config: host, api_keys, tls, grpc_port, ui, num_replicas, ...",
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Serve the run's VM with its published histories over HTTP, on loopback if nothing else is set, until Ctrl-C."""
    settings = load_pipeline(config, overrides, verbose)
    from loopfm_ray.jobs.scoring import serve_forever
    from loopfm_ray.serving.config import ServeConfig

    def announce(url: str, served: ServeConfig) -> None:
        page = f", a page to look at at {url}/ui" if served.has_ui else ""
        typer.echo(f"models at {url}/v1/models, docs at {url}/docs{page}")

    serve_forever(settings, port, announce, with_settings)


def parity(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="A parity log (file or folder) to replay offline, instead of test requests."
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="With --requests: share of the scores that may differ.")
    ] = 0.0,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Replay test requests through the served path, or logged ones offline; exit 1 if a score differs."""
    settings = load_pipeline(config, overrides, verbose)
    if requests is not None:
        from loopfm_ray.jobs.replaying import replay_requests

        print_result(replay_requests(settings, requests, threshold), as_json)
        return
    if threshold:
        raise ConfigError("--threshold is of logged requests; name them with --requests")
    from loopfm_ray.jobs.pipeline import run_stages

    with show_progress() as progress:
        result = run_stages(settings, "parity", fresh=fresh, progress=progress)
    print_result(result, as_json)


def promote(
    file: FileArgument,
    name: NameArgument,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle to serve; the canary if not given.")
    ] = None,
    online: Annotated[str | None, typer.Option(help="Online store of the bundle.")] = None,
    canary: Annotated[
        float | None,
        typer.Option(help="Let the bundle answer for this share of the users first."),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Let the bundle score along without answering.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Serve a bundle under a name: at once, as a canary, as a shadow; or make the canary stable."""
    from loopfm_ray.serving import rollout
    from loopfm_ray.serving.predictor import load_predictor
    from loopfm_ray.store.filesystem import absolute, locate

    if bundle is None and (canary is not None or shadow or online is not None):
        raise ConfigError("--canary, --shadow and --online are of a bundle; name it with --bundle")
    if canary is not None and shadow:
        raise ConfigError("a bundle begins as --canary or as --shadow, not as both")
    served: Served | None = None
    if bundle is not None:
        where = absolute(locate(bundle))
        # what no replica could load is refused here, and nothing changes
        version = load_predictor(where, online).bundle.version
        target = online if online is None or "://" in online else str(Path(online).absolute())
        served = rollout.Served(bundle=str(where), online=target, version=version)
    with rollout.editing(file) as now:
        if served is not None and canary is not None:
            after = rollout.start_canary(now, name, served, canary)
        elif served is not None and shadow:
            after = rollout.start_shadow(now, name, served)
        else:
            after = rollout.promote(now, name, served)
        rollout.write_rollouts(file, after)
    _print(after, name, as_json)


def rollback(file: FileArgument, name: NameArgument, as_json: JsonOption = False) -> None:
    """Take the canary of a name away, or else serve what was stable before."""
    from loopfm_ray.serving import rollout

    with rollout.editing(file) as now:
        after = rollout.rollback(now, name)
        rollout.write_rollouts(file, after)
    _print(after, name, as_json)


def key(
    file: Annotated[Path, typer.Argument(help="The key file (`api_keys` of serving).")],
    name: Annotated[str, typer.Argument(help="Of the caller.")],
    rate: Annotated[
        float | None, typer.Option(help="Requests a second that a replica lets through.")
    ] = None,
    burst: Annotated[float, typer.Option(help="Requests that may come at once.")] = 20.0,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the key of this name away.")
    ] = False,
) -> None:
    """Make a key for a caller and print it; the file holds its hash alone. Replicas read the file when they start."""
    from loopfm_ray.serving.keys import ApiKeys, add_key, read_keys, write_keys

    keys = read_keys(file) if file.exists() else ApiKeys()
    if remove:
        left = tuple(one for one in keys.keys if one.name != name)
        if len(left) == len(keys.keys):
            raise ConfigError(f"{file} has no key {name!r}, it has {[k.name for k in keys.keys]}")
        write_keys(file, ApiKeys(keys=left))
        return
    keys, secret = add_key(keys, name, rate, burst)
    write_keys(file, keys)
    typer.echo(secret)


def _print(rollouts: "Rollouts", name: str, as_json: bool) -> None:
    now = rollouts.of(name)
    if as_json:
        tree = {"revision": rollouts.revision, "name": name, **now.model_dump(mode="json")}
        typer.echo(json.dumps(tree, indent=1))
        return
    typer.echo(f"revision {rollouts.revision}, {name}: stable {_text(now.stable)}")
    if now.canary is not None:
        typer.echo(f"canary for {now.canary_share:.1%} of the users: {_text(now.canary)}")
    if now.shadow is not None:
        typer.echo(f"shadow: {_text(now.shadow)}")


def _text(served: "Served") -> str:
    return f"{served.bundle} ({served.version or 'what lies there'})"
