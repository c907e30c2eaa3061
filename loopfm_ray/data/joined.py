"""Names of what a joined set holds beside the examples: the join writes them, vertical models read them."""

from collections.abc import Sequence

__all__ = [
    "EVENT_TYPE",
    "LABEL",
    "SCORE_TS",
    "SIDE_COLUMNS",
    "TEACHER_CODE",
    "TEACHER_SNAPSHOT",
    "USER_SOURCE",
    "source_of",
    "teacher_prob_of",
]

TEACHER_CODE = "teacher_code"
"""Column of a request's own latent as a code: uint8 [B, bytes]."""
TEACHER_SNAPSHOT = "teacher_snapshot"
"""Column that tells which snapshot made a request's teacher prediction: its number among the manifest's `teachers`."""
SCORE_TS = "score_ts"
"""Column that tells when the teacher prediction could first be read: `history.delay_s` after the event."""
LABEL, EVENT_TYPE = "label", "event_type"
"""Side information that a history table may hold beside its events."""
SIDE_COLUMNS = {LABEL: ("label", "label_ts"), EVENT_TYPE: ("event_type",)}
"""The columns of a history table that each side information is read from."""
USER_SOURCE = "latent"
"""The source of the users' histories; its columns in the requests are latent_start and latent_len."""


def teacher_prob_of(task: str) -> str:
    """Return the column of the teacher prediction of a further task; that of the first is `teacher_prob`."""
    return f"teacher_prob_{task}"


def source_of(key: Sequence[str]) -> str:
    """Return the name of the source whose histories are those of a key: `latent`, `latent_by_item`, ..."""
    return USER_SOURCE if tuple(key) == ("user",) else "_".join(("latent_by", *key))
