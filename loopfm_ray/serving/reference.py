"""How a VM's scores and histories were distributed when it was trained, and how far those of today are from that.

A bundle carries a `Reference`: counts over the rows of its validation window. A service counts the rows that it scores in
the same bins (`DriftWindow`) and compares. Rows are weighted alike on both sides: one candidate is one row.

The reference is of rows that were logged, so of candidates that somebody chose to show. A service that scores many more
candidates than are shown differs from it on its first day; what then counts is whether the distance grows.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import BundleError

__all__ = [
    "Binned",
    "Drift",
    "DriftWindow",
    "Reference",
    "history_edges",
    "make_reference",
    "psi",
    "score_edges",
]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

FORMAT_VERSION = 1
NUM_BINS = 10
"""Score bins, about equally full in the reference."""
WINDOW_ROWS = 50_000
"""Rows that a window holds at most, before it lets go of the older half."""
_MIN_GAP = 1e-6
"""Between two scores that a bin edge may part: a served score may differ from its offline twin by less."""
_FOLD = 64
"""Requests that wait to be counted together."""


@dataclass(frozen=True)
class Binned:
    """Counts of rows: bin k holds values from `edges[k - 1]` (inside) to `edges[k]` (outside); the ends are open."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        is_rising = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if len(self.counts) != len(self.edges) + 1 or not is_rising or min(self.counts) < 0:
            raise BundleError(
                f"a reference needs rising edges and one count more than edges, found {self.edges} and {self.counts};"
                " export the bundle again"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each bin."""
        total = max(sum(self.counts), 1)
        return tuple(count / total for count in self.counts)


@dataclass(frozen=True)
class Reference:
    """Counts over the rows of a window before serving.

    `history_len` is None for a VM without history. `start_ts` and `stop_ts` are the window.
    """

    start_ts: int
    stop_ts: int
    num_rows: int
    scores: Binned
    history_len: Binned | None
    unknown_users: float
    """Share of the rows whose user the VM does not know."""
    unknown_items: float

    @property
    def coverage(self) -> float | None:
        """Share of the rows with a history; None for a VM without."""
        return None if self.history_len is None else 1 - self.history_len.shares[0]

    def to_tree(self) -> dict[str, Any]:  # Any: JSON
        """Return it as a JSON tree."""
        history = self.history_len
        return {
            "format_version": FORMAT_VERSION,
            "start_ts": self.start_ts,
            "stop_ts": self.stop_ts,
            "num_rows": self.num_rows,
            "scores": _tree(self.scores),
            "history_len": None if history is None else _tree(history),
            "unknown_users": self.unknown_users,
            "unknown_items": self.unknown_items,
        }

    @classmethod
    def of_tree(cls, tree: Mapping[str, Any]) -> "Reference":  # Any: JSON
        """Return what `to_tree` gave.

        Raises:
            BundleError: another format version, or counts that do not fit their edges.
            KeyError, TypeError, ValueError: it is no reference.
        """
        if tree["format_version"] != FORMAT_VERSION:
            raise BundleError(
                f"reference.json has format_version {tree['format_version']}, this code reads {FORMAT_VERSION}; export"
                " the bundle again with this code"
            )
        history = tree["history_len"]
        return cls(
            start_ts=int(tree["start_ts"]),
            stop_ts=int(tree["stop_ts"]),
            num_rows=int(tree["num_rows"]),
            scores=_binned(tree["scores"]),
            history_len=None if history is None else _binned(history),
            unknown_users=float(tree["unknown_users"]),
            unknown_items=float(tree["unknown_items"]),
        )


def _tree(binned: Binned) -> dict[str, list[float] | list[int]]:
    return {"edges": list(binned.edges), "counts": list(binned.counts)}


def _binned(tree: Mapping[str, Any]) -> Binned:  # Any: JSON
    return Binned(tuple(map(float, tree["edges"])), tuple(map(int, tree["counts"])))


def psi(reference: Sequence[int] | Ints, found: Sequence[int] | Ints) -> float:
    """Return the population stability index of two histograms over the same K bins.

    With shares `p = (n + 1/2) / (N + K/2)` of each side, `sum((p_found - p_reference) * ln(p_found / p_reference))`: zero for equal
    shares, symmetric, the sum of both Kullback-Leibler divergences. The half row keeps an empty bin finite (Jeffreys' prior).
    Two samples of N and M independent rows of one distribution differ by about `(K - 1) * (1/N + 1/M)`.

    Args:
        reference: [K] counts.
        found: [K] counts.

    Source: Siddiqi, Credit Risk Scorecards (2006), chapter 9, which calls 0.1 a small shift and 0.25 a large one; the
    smoothing is ours. Its mean without a shift: Yurdakul, Statistical Properties of the PSI (2018).
    """
    shares = [
        (np.asarray(counts, np.float64) + 0.5) / (np.sum(counts) + 0.5 * len(counts))
        for counts in (found, reference)
    ]
    return float(np.sum((shares[0] - shares[1]) * np.log(shares[0] / shares[1])))


def score_edges(scores: Floats, num_bins: int = NUM_BINS) -> tuple[float, ...]:
    """Return edges that part `scores` into up to `num_bins` about equally full bins, none of them through equal scores.

    An edge lies in the middle of the widest gap between neighbours near its quantile: within a fifth of a bin, or further
    until a gap is wider than what a served score may be off. Many rows of one score (all unknown users, say) would
    otherwise fall on either side of an edge by the last digit. Edges that have no gap of their own are left out.

    Args:
        scores: [N] at least one.
        num_bins: at least 2.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    gaps = np.diff(ordered)
    found = set[float]()
    for k in range(1, num_bins):
        place, reach = k * len(ordered) // num_bins, max(len(ordered) // (5 * num_bins), 1)
        while True:
            begin, stop = max(place - reach, 0), min(place + reach, len(gaps))
            best = begin + int(np.argmax(gaps[begin:stop])) if begin < stop else None
            is_whole = begin == 0 and stop == len(gaps)
            if best is not None and gaps[best] > _MIN_GAP:
                found.add(float((ordered[best] + ordered[best + 1]) / 2))
                break
            if is_whole:
                break
            reach *= 2
    return tuple(sorted(found))


def history_edges(max_len: int) -> tuple[float, ...]:
    """Return edges of lengths: 0, 1, 2, 3 to 4, 5 to 8 and so on up to `max_len`."""
    edges, edge = [1.0], 1
    while edge < max_len:
        edges.append(float(edge + 1))
        edge *= 2
    return tuple(edges)


def make_reference(
    window: tuple[int, int],
    scores: Floats,
    history_len: tuple[Ints, int] | None,
    unknown_users: float,
    unknown_items: float,
) -> Reference:
    """Count rows.

    Args:
        window: start and stop, microseconds.
        scores: [N] calibrated probabilities, at least one.
        history_len: [N] lengths, and the longest that the VM reads; None for a VM without history.
        unknown_users: share of the rows.
        unknown_items: share of the rows.
    """
    history = None
    if history_len is not None:
        lengths, max_len = history_len
        history = _count(np.asarray(lengths, np.float64), history_edges(max_len))
    binned = _count(scores, score_edges(scores))
    return Reference(*window, len(scores), binned, history, unknown_users, unknown_items)


def _count(values: Floats, edges: tuple[float, ...]) -> Binned:
    return Binned(edges, tuple(_bins(values, edges).tolist()))


def _bins(values: Floats, edges: Sequence[float]) -> NDArray[np.int64]:
    places = np.searchsorted(edges, values, side="right")
    return np.bincount(places, minlength=len(edges) + 1).astype(np.int64)


@dataclass(frozen=True)
class Drift:
    """How the rows of a window differ from the reference; differences are shares of rows, found minus reference.

    `expected_psi` is what the index of the scores would be about without a shift, were rows independent; candidates of
    one request are not, so expect somewhat more. What is about histories is None for a VM without.
    """

    num_rows: int
    psi_scores: float
    expected_psi: float
    psi_history_len: float | None
    coverage_difference: float | None
    unknown_users_difference: float
    unknown_items_difference: float


class DriftWindow:
    """Counts the newest rows that one bundle scored, in the bins of its reference. Threads may share it.

    Rows are counted in two halves. When the newer is full it becomes the older, which is forgotten: the window holds
    between half of `max_rows` and all of it, once as many were scored.
    """

    def __init__(self, reference: Reference, max_rows: int = WINDOW_ROWS) -> None:
        self.reference = reference
        self._half = max(max_rows // 2, 1)
        self._waiting: list[tuple[Floats, int, bool, int]] = []
        self._lock = threading.Lock()
        self._older, self._newer = self._nothing(), self._nothing()

    def _nothing(self) -> NDArray[np.int64]:
        history = self.reference.history_len
        num_lengths = 0 if history is None else len(history.counts)
        return np.zeros(3 + len(self.reference.scores.counts) + num_lengths, dtype=np.int64)

    def add(
        self, probs: Floats, history_len: int, is_unknown_user: bool, unknown_items: int
    ) -> None:
        """Count the rows of one request, which share a user and a history.

        Args:
            probs: [B] calibrated; kept until it is counted, so it must not change.
            history_len: of its history.
            is_unknown_user: whether the VM does not know the user.
            unknown_items: candidates that the VM does not know.
        """
        with self._lock:
            self._waiting.append((probs, history_len, is_unknown_user, unknown_items))
            if len(self._waiting) >= _FOLD:
                self._fold()

    def _fold(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        sizes = np.asarray([len(probs) for probs, *_ in waiting])
        lengths, strange, items = (np.asarray([one[n] for one in waiting]) for n in (1, 2, 3))
        scores = np.concatenate([probs for probs, *_ in waiting])
        parts = [
            np.asarray([sizes.sum(), (sizes * strange).sum(), items.sum()]),
            _bins(scores, self.reference.scores.edges),
        ]
        history = self.reference.history_len
        if history is not None:
            places = np.searchsorted(history.edges, lengths, side="right")
            counts = np.bincount(places, weights=sizes, minlength=len(history.counts))
            parts.append(counts.astype(np.int64))
        self._newer += np.concatenate(parts).astype(np.int64)
        if self._newer[0] >= self._half:
            self._older, self._newer = self._newer, self._nothing()

    def drift(self) -> Drift | None:
        """Compare what the window holds with the reference; None while it holds nothing."""
        with self._lock:
            self._fold()
            counts = self._older + self._newer
        rows, strange, items = (int(count) for count in counts[:3])
        if rows == 0:
            return None
        reference, width = self.reference, len(self.reference.scores.counts)
        scores, lengths = counts[3 : 3 + width], counts[3 + width :]
        history = reference.history_len
        coverage = None
        if reference.coverage is not None:
            coverage = 1 - float(lengths[0]) / rows - reference.coverage
        return Drift(
            num_rows=rows,
            psi_scores=psi(reference.scores.counts, scores),
            expected_psi=(width - 1) * (1 / rows + 1 / reference.num_rows),
            psi_history_len=None if history is None else psi(history.counts, lengths),
            coverage_difference=coverage,
            unknown_users_difference=strange / rows - reference.unknown_users,
            unknown_items_difference=items / rows - reference.unknown_items,
        )
