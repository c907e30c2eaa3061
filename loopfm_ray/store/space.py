"""The embedding space of latents: what a vertical model depends on, whatever day the latents were made.

Two latents versions of one space can stand in for each other: their codes decode alike, mean the same, and become
readable by the same rule. Why these parts and no others: docs/adr/0012-embedding-spaces.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopfm_ray.config import config_hash
from loopfm_ray.errors import LoopFMError, StoreError
from loopfm_ray.store.codes import CodeSpec

__all__ = ["Space", "check_space_id"]

_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Space:
    """What decides how a code is read and when it may be.

    Attributes:
        snapshot_id: names the weights of the FM and its bottleneck, and with them layer and input schema.
        code_spec: how a code becomes a latent.
        delay_us: from an event to its readers.
        waits_for_label: whether an event is not readable before its label, which is so where only positives are events.
    """

    snapshot_id: str
    code_spec: CodeSpec
    delay_us: int
    waits_for_label: bool

    @property
    def id(self) -> str:
        """16 hex digits that depend on every part."""
        parts = self._parts()
        return config_hash(*(parts[name] for name in sorted(parts)))

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> "Space":  # Any: JSON, checked here
        """Return the space of a version from the meta of its manifest (latents, joined or online).

        Raises:
            StoreError: a part is missing, or the id that stands there is not that of the parts.
        """
        try:
            space = cls(
                str(meta["snapshot_id"]),
                CodeSpec.from_tree(meta["code_spec"]),
                int(meta["delay_us"]),
                bool(meta["waits_for_label"]),
            )
        except (KeyError, TypeError, ValueError, LoopFMError) as error:
            raise StoreError(
                f"the version does not tell its embedding space: {error}; materialize and publish it again"
            ) from error
        named = meta.get("space", space.id)
        if named != space.id:
            raise StoreError(
                f"the version says space {named}, but its parts are those of {space.id}; materialize and publish it again"
            )
        return space

    def to_meta(self) -> dict[str, Any]:  # Any: JSON
        """Return the entries of a manifest's meta that `of_meta` reads, with the id as `space`."""
        return {"space": self.id, **self._parts()}

    def difference(self, other: "Space") -> str | None:
        """Return the first part in which `other` differs, with both values, None when they are equal."""
        mine, theirs = self._parts(), other._parts()
        for name, value in mine.items():
            if value != theirs[name]:
                return f"{name} is {theirs[name]}, expected {value}"
        return None

    def _parts(self) -> dict[str, Any]:  # Any: JSON
        return {
            "snapshot_id": self.snapshot_id,
            "code_spec": self.code_spec.to_tree(),
            "delay_us": self.delay_us,
            "waits_for_label": self.waits_for_label,
        }


def check_space_id(space: str) -> None:
    """Check that `space` looks like the id of a space; it becomes part of a path.

    Raises:
        StoreError: it does not.
    """
    if not _ID.fullmatch(space):
        raise StoreError(
            f"a space is named by 16 hex digits, found {space!r}; `loopfm spaces` lists those that are live"
        )
