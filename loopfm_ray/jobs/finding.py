"""One line of `loopfm doctor`."""

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `advice` says what to do when it does not fit."""

    name: str
    found: str
    is_ok: bool
    advice: str = ""
