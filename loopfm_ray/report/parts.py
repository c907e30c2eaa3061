"""Parts that the pages and tables of experiments share."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["bars", "css_colour", "figure", "markdown_row", "variant_line"]

Json = dict[str, Any]  # Any: JSON of the summary


def figure(name: str, title: str, caption: str, data: list[Json], layout: Json) -> Json:
    """Return a figure of the page of an experiment."""
    return {
        "id": name,
        "title": title,
        "caption": caption,
        "spec": {"data": data, "layout": layout},
    }


def bars(
    cells: Sequence[Json], metric: str, colours: Mapping[str, str], shown: Callable[[str], str]
) -> tuple[list[Json], tuple[float, float]]:
    """Return bars of a mean metric by model and arm, with its deviation over seeds, and the range of the axis.

    Args:
        cells: of one table: `model`, `arm`, `mean` and `sd`.
        metric: the name in `mean` and `sd`.
        colours: by arm, in the order of the bars.
        shown: from the name of an arm to what is shown.
    """
    data = []
    for arm, colour in colours.items():
        mine = [cell for cell in cells if cell["arm"] == arm]
        data.append(
            {
                "type": "bar",
                "name": html.escape(shown(arm)),
                "x": [html.escape(cell["model"]) for cell in mine],
                "y": [cell["mean"][metric] for cell in mine],
                "error_y": {
                    "type": "data",
                    "array": [cell["sd"].get(metric) or 0.0 for cell in mine],
                    "color": "--ink",
                    "thickness": 1,
                    "width": 2,
                },
                "marker": {"color": colour},
                "hovertemplate": "%{x}: %{y:.4f}",
            }
        )
    values = [cell["mean"][metric] for cell in cells]
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or 0.01
    return data, (low - pad, high + pad)


def css_colour(colour: str) -> str:
    """Return a colour of a figure as CSS: the name of a variable stands for its value."""
    return f"var({colour})" if colour.startswith("--") else colour


def markdown_row(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    safe = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(safe)} |"


def variant_line(
    name: str,
    points: Mapping[str, float],
    colour: str,
    *,
    spreads: Sequence[float] | None = None,
    hover: str = "%{x}: %{y:.4f}",
) -> Json:
    """Return the line of one arm over the variants of an experiment.

    Args:
        name: of the arm, as it is shown.
        points: by variant.
        colour: a CSS variable or colour.
        spreads: of the points, drawn both ways; None draws none.
        hover: what is shown of a point.
    """
    bars_of = {} if spreads is None else {"error_y": {"type": "data", "array": list(spreads)}}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(name),
        "x": [html.escape(variant) for variant in points],
        "y": list(points.values()),
        **bars_of,
        "line": {"color": colour, "width": 1.5},
        "marker": {"color": colour, "size": 7},
        "hovertemplate": hover,
    }
