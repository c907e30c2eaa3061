"""The verbs around knowledge graphs: get a published one; embed one and export the vectors."""

from pathlib import Path
from typing import Annotated

import typer

from loopfm_ray import log
from loopfm_ray.cli_options import (
    FreshOption,
    JsonOption,
    SetOption,
    VerboseOption,
    print_result,
)
from loopfm_ray.config import find_config, load_config
from loopfm_ray.errors import ConfigError
from loopfm_ray.terminal import show_progress

__all__ = ["add_verbs"]


def add_verbs(app: typer.Typer) -> None:
    """Give `app` these verbs."""
    app.command(name="download-kg")(download_kg)
    app.command(name="export-kge")(export_kge)


def download_kg(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="FB15k-237, WN18RR, CoDEx-S, CoDEx-M, CoDEx-L, YAGO3-10, NELL-995, UMLS or Kinships.",
        ),
    ],
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder that the graph's own folder is made in.")
    ],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Get a published knowledge graph and verify it; one that is there is verified only."""
    log.setup("INFO" if verbose else "WARNING")
    from loopfm_ray.kge.download import download_graph
    from loopfm_ray.kge.published import find_graph

    print_result(download_graph(find_graph(name), to), as_json)


def export_kge(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of one that comes with the package under configs/kge, such as movielens.",
        ),
    ],
    overrides: SetOption = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Embed a knowledge graph and export its vectors, and the features of the items that are linked to it."""
    log.setup("INFO" if verbose else "WARNING")
    from loopfm_ray.kge.embed import KgeRunConfig, embed_graph
    from loopfm_ray.kge.runner import needs_cluster

    settings = load_config(KgeRunConfig, find_config(config, "kge"), overrides or ())
    with show_progress() as progress:
        if needs_cluster(settings.train):
            _check_on_cpu(settings.train.num_workers, device)
            from loopfm_ray.jobs.kge_workers import embed_on_ray

            result = embed_on_ray(settings, fresh=fresh, progress=progress)
        else:
            result = embed_graph(
                settings,
                fresh=fresh,
                device=device,
                on_epoch=lambda epoch, _: progress("embed", epoch, settings.train.epochs),
            )
    print_result(result, as_json)


def _check_on_cpu(num_workers: int, device: str) -> None:
    if device != "cpu":
        raise ConfigError(
            f"--device is {device} and workers train and rank on CPUs (train.num_workers is {num_workers}); take cpu, or set"
            " train.num_workers to 1 and train.num_ranking_workers to 0"
        )
