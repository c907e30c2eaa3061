"""What histories a new space can give beside an old one: the price of an upgrade, before anyone pays it.

A snapshot embeds only what is later than all it learned from. So right after an upgrade the histories of the new space
begin where its snapshot's training ended, and grow from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loopfm_ray.errors import StoreError
from loopfm_ray.store.online import OnlineStore, UserHistory, visible_slice
from loopfm_ray.types import MICROS_PER_S

__all__ = ["Coverage", "compare_coverage"]

_CHUNK = 1000


@dataclass(frozen=True)
class Coverage:
    """What one request of every user at `request_ts` would read in the old space and in the new one.

    Attributes:
        request_ts: just after the last event that both spaces have.
        num_users: users with a visible history in the old space.
        num_covered: of them, those with one in the new space.
        mean_len_old: visible events of these users in the old space, cut to the longest history.
        mean_len_new: in the new space.
        lost_s: length of time that a history reaches back to in the old space and can not in the new one, because the
            new snapshot was trained on it.
        full_at_ts: when that time will have left the retention, so that nothing is lost any more; None without a retention.
    """

    request_ts: int
    num_users: int
    num_covered: int
    mean_len_old: float
    mean_len_new: float
    lost_s: float
    full_at_ts: int | None


def compare_coverage(
    old: OnlineStore,
    new: OnlineStore,
    keys: Sequence[str],
    max_len: int,
    retention_us: int | None,
) -> Coverage:
    """Ask both stores for the histories of all `keys` at one moment and compare how long they are.

    Args:
        old: the space that is served.
        new: the space that is to follow it.
        keys: users.
        max_len: the longest history.
        retention_us: events older than this are left out; None keeps all.

    Raises:
        StoreError: a store can not be read, or one has nothing later than the other's training.
    """
    request_ts = 1 + min(int(store.meta["watermark_ts"]) for store in (old, new))
    if request_ts <= 1 + int(new.meta["trained_until_ts"]):
        raise StoreError(
            f"the old space ends at {request_ts - 1}, before the first event that the new snapshot embeds (after"
            f" {new.meta['trained_until_ts']}): there is nothing to compare; publish newer latents in the old space first"
        )

    def length(history: UserHistory | None) -> int:
        if history is None:
            return 0
        return len(visible_slice(history, request_ts, max_len, retention_us))

    num_users = num_covered = sum_old = sum_new = 0
    for begin in range(0, len(keys), _CHUNK):
        chunk = keys[begin : begin + _CHUNK]
        for before, after in zip(old.get_many(chunk), new.get_many(chunk), strict=True):
            size = length(before)
            if size:
                left = length(after)
                num_users += 1
                num_covered += left > 0
                sum_old += size
                sum_new += left
    begins = [int(store.meta["trained_until_ts"]) + 1 for store in (old, new)]
    if retention_us is not None:
        begins = [max(ts, request_ts - retention_us) for ts in begins]
    return Coverage(
        request_ts=request_ts,
        num_users=num_users,
        num_covered=num_covered,
        mean_len_old=sum_old / max(num_users, 1),
        mean_len_new=sum_new / max(num_users, 1),
        lost_s=max(begins[1] - begins[0], 0) / MICROS_PER_S,
        full_at_ts=None
        if retention_us is None
        else int(new.meta["trained_until_ts"]) + 1 + retention_us,
    )
