"""Names of what a joined set holds beside the examples: the join writes them, vertical models read them."""

from collections.abc import Sequence

__all__ = ["EVENT_TYPE", "LABEL", "SIDE_COLUMNS", "TEACHER_CODE", "USER_SOURCE", "source_of"]

TEACHER_CODE = "teacher_code"
"""Column of a request's own latent as a code: uint8 [B, bytes]."""
LABEL, EVENT_TYPE = "label", "event_type"
"""Side information that a history table may hold beside its events."""
SIDE_COLUMNS = {LABEL: ("label", "label_ts"), EVENT_TYPE: ("event_type",)}
"""The columns of a history table that each side information is read from."""
USER_SOURCE = "latent"
"""The source of the users' histories; its columns in the requests are latent_start and latent_len."""


def source_of(key: Sequence[str]) -> str:
    """Return the name of the source whose histories are those of a key: `latent`, `latent_by_item`, ..."""
    return USER_SOURCE if tuple(key) == ("user",) else "_".join(("latent_by", *key))
