"""Serve the VM of a run: for a parity check and one scored request, or until stopped."""

import json
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, JobError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs import serving
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.context import Context, splits_of
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.parity import check_parity, load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.store.filesystem import absolute
from loopfm_ray.store.manifest import find_manifest

__all__ = ["run_parity", "serve_forever"]

_TIMEOUT_S = 30.0
_SHOWN_ITEMS = 5


def serve_config(
    config: PipelineConfig, port: int | None, settings: Path | None = None
) -> serving.ServeConfig:
    """Return how the run's VM is served, on loopback if nothing else is set.

    Args:
        config: of the run.
        port: of HTTP; None takes that of `settings`, or the default.
        settings: file of other keys of `ServeConfig`; what is served comes from the run.

    Raises:
        StoreError: nothing was published yet.
        ConfigError: the file is no part of a serve config.
    """
    if find_manifest(config.paths.bundle) is None:
        raise StoreError(f"{config.paths.bundle} is not there; run `loopfm publish` first")
    tree: dict[str, Any] = {
        "log_level": "WARNING",
        **(_read_settings(settings) if settings else {}),
    }
    tree |= {
        "bundle": str(absolute(config.paths.bundle)),
        "cache_dir": config.cache_dir,
        "cache_bytes": config.cache_bytes,
        "online": config.online_target,
    }
    if port is not None:
        tree["port"] = port
    try:
        return serving.ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{settings or 'the serve config'}: {error}; correct the file") from error


def _read_settings(path: Path) -> dict[str, Any]:
    """Read a part of a serve config; files that it names are taken from the folder that we are in."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can not be read: {error}; give a YAML file") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path} holds no mapping; write keys of the serve config, such as api_keys"
        )
    served = sorted({"bundle", "rollouts", "models", "online"} & set(tree))
    if served:
        raise ConfigError(
            f"{path} names {served}, which come from the run here; leave them out, or use serve/app.py"
        )
    if tree.get("api_keys"):
        tree["api_keys"] = str(Path(tree["api_keys"]).absolute())
    if isinstance(tree.get("tls"), dict):
        tree["tls"] = {name: str(Path(value).absolute()) for name, value in tree["tls"].items()}
    return tree


def _load(config: PipelineConfig) -> Predictor:
    serve_config(config, 0)  # says what was not published
    return load_predictor(absolute(config.paths.bundle), config.online_target)


@contextmanager
def serving_run(settings: serving.ServeConfig) -> Iterator[str]:
    """Serve on the connected cluster inside the block; gives the URL."""
    try:
        yield serving.start(settings)
    finally:
        serving.stop()


def run_parity(context: Context) -> dict[str, Any]:
    """Replay test requests through the service over HTTP, compare with offline scores, and score one request.

    Raises:
        JobError: a served score differs from the offline one.
    """
    config = context.config
    context.progress("parity", 0, 2)
    predictor = _load(config)
    offline = load_offline(
        predictor.bundle,
        PreparedData.open(config.paths.prepared),
        config.paths.joined(config.seeds[0]),
        splits_of(config).test,
        config.online.parity_requests,
    )
    with serving_run(serve_config(config, config.online.port)) as url:
        context.progress("parity", 1, 2)
        report = check_parity(predictor, offline, tolerance=config.online.parity_tolerance, url=url)
        name = predictor.bundle.spec.name
        scored = _score_one(url, name, offline.replays[-1].query)
    context.progress("parity", 2, 2)
    if not report.is_ok:
        shown = "\n  ".join(report.mismatches)
        raise JobError(
            f"parity: {report.num_mismatches} of {report.num_rows} served scores differ by more than"
            f" {report.tolerance} from the offline score of the same row, the most by {report.max_abs_diff}:\n  {shown}\n"
            "check that offline and serving run the same code, and that the audit of the joined version passes"
        )
    return {**asdict(report), "scored_request": scored}


def _score_one(url: str, name: str, query: ScoreQuery) -> dict[str, Any]:
    items = list(query.items)[:_SHOWN_ITEMS]
    body = {
        "user": query.user,
        "request_ts": query.request_ts,
        # a list holds one value for each item
        "context": {
            name: value[: len(items)] if isinstance(value, list) else value
            for name, value in query.context.items()
        },
        "items": items,
    }
    request = urllib.request.Request(  # our own loopback address
        f"{url}/v1/models/{name}:score",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        return {"request": body, "response": json.loads(answer.read())}


def serve_forever(
    config: PipelineConfig,
    port: int | None,
    announce: Callable[[str, serving.ServeConfig], None],
    settings: Path | None = None,
) -> None:
    """Serve the run's VM until the process is told to stop.

    Args:
        config: of the run.
        port: of HTTP; None takes that of `settings`, or the default.
        announce: is called with the URL and the config when a replica is ready.
        settings: file of other keys of `ServeConfig`; without it the service is on loopback.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    chosen = serve_config(config, port, settings)
    _load(config)  # what can not be loaded is said here, not by a dying replica
    with connect(config.ray), serving_run(chosen) as url:
        announce(url, chosen)
        stop.wait()
