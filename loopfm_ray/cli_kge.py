"""The verbs around knowledge graphs: get a published one."""

from pathlib import Path
from typing import Annotated

import typer

from loopfm_ray import log
from loopfm_ray.cli_options import JsonOption, VerboseOption, print_result

__all__ = ["add_verbs"]


def add_verbs(app: typer.Typer) -> None:
    """Give `app` these verbs."""
    app.command(name="download-kg")(download_kg)


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
