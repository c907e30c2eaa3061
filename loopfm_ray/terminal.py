"""What a person at a terminal sees of a job while it runs."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["show_progress"]


@contextmanager
def show_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that shows stages as bars on a terminal, and as one line each elsewhere.

    Until it ends, whatever is printed goes to stderr: Ray prints what its workers say to stdout, which is the summary's alone.
    """
    with redirect_stdout(sys.stderr), _stages(Console(stderr=True)) as update:
        yield update


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    if not console.is_terminal:
        seen: set[str] = set()

        def line(stage: str, _done: int, _total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                console.print(f"{stage} ...", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=max(total, 1))

        yield update
