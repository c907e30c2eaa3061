"""Features of logged requests as the offline path makes them.

Keys become ids by the vocabularies of the prepared data, entities come from its tables, and histories from the offline latents
by the point-in-time join: nothing of the bundle's tables and nothing of the online store is used.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch, History, LatentHistorySource
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.history.asof import newest_visible
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.features import FeatureBuilder
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.tables import code_bytes, code_column
from loopfm_ray.types import UNKNOWN_ID

__all__ = ["OfflineFeatures"]

Ints = NDArray[np.int64]


class OfflineFeatures:
    """Makes batches of requests for one bundle from prepared data and one latents version."""

    def __init__(
        self, bundle: Bundle, prepared: PreparedData, latents: LatentsReader | None = None
    ) -> None:
        """Take what is read.

        Args:
            bundle: whose schema and history pin count.
            prepared: the data that the VM was trained on.
            latents: the version that histories are made of; None for a VM without, or to give none.
        """
        vocabularies = {name: prepared.vocabulary(name) for name in bundle.vocabularies}
        whole = replace(
            bundle, vocabularies=vocabularies, items=prepared.items, users=prepared.users
        )
        self._builder = FeatureBuilder(whole)
        self._pin = bundle.spec.history
        self._prepared, self._latents = prepared, latents

    def build(self, queries: Sequence[ScoreQuery]) -> Batch:
        """Return the rows of all queries, one after another.

        Raises:
            RequestError: a context does not fit the model.
        """
        batch, _ = self._builder.build(queries)
        if self._pin is None or self._latents is None:
            return batch
        return replace(batch, histories={USER_SOURCE: self._history(queries, self._latents)})

    def _history(self, queries: Sequence[ScoreQuery], latents: LatentsReader) -> History:
        assert self._pin is not None
        vocabulary = self._prepared.users.keys
        wanted = {query.user for query in queries}
        ids = {key: n for n, key in enumerate(vocabulary) if key in wanted and n != UNKNOWN_ID}
        user = np.asarray([ids.get(query.user, -1) for query in queries], dtype=np.int64)
        request_ts = np.asarray([query.request_ts for query in queries], dtype=np.int64)
        columns = _events(latents, np.unique(user[user >= 0]))
        owner, event_ts, available_ts, codes = columns
        index = newest_visible(
            (user, request_ts),
            (owner, event_ts, available_ts),
            self._pin.max_len,
            self._pin.retention_us,
        )
        rows = np.arange(len(event_ts)) if index.rows is None else index.rows
        table = pa.table({"event_ts": event_ts[rows], "code": code_column(codes[rows])})
        source = LatentHistorySource({0: table}, self._pin.code_spec, self._pin.max_len)
        found = source.gather(np.zeros_like(user), index.start, index.length, request_ts)
        assert found.latents is not None
        sizes = [len(query.items) for query in queries]
        return History(
            row=torch.from_numpy(np.repeat(np.arange(len(queries)), sizes)),
            mask=torch.from_numpy(found.mask),
            age_s=torch.from_numpy(found.age_s),
            latents=torch.from_numpy(found.latents),
        )


def _events(latents: LatentsReader, users: Ints) -> tuple[Ints, Ints, Ints, NDArray[np.uint8]]:
    """Return user, event_ts, available_ts and code of the events of `users`, by user and then in time order."""
    names = ["user", "event_ts", "available_ts"]
    parts: list[tuple[Ints, ...]] = []
    codes = [np.zeros((0, latents.spec.num_bytes), np.uint8)]
    for bucket in latents.buckets:
        table = latents.read_bucket(bucket, columns=[*names, "code"], events_only=True)
        mine = np.isin(table.column("user").to_numpy(), users)
        parts.append(tuple(table.column(name).to_numpy()[mine].astype(np.int64) for name in names))
        codes.append(code_bytes(table.column("code"))[mine])
    user, event_ts, available_ts = (
        np.concatenate([part[n] for part in parts]) if parts else np.zeros(0, np.int64)
        for n in range(3)
    )
    order = np.argsort(user, kind="stable")  # a user lies in one bucket, which is in order
    return user[order], event_ts[order], available_ts[order], np.concatenate(codes)[order]
