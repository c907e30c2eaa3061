"""HSTU: self-attention without softmax among a user's events, gated, placed by order and time; for long histories.

One layer, with X [L, D] the events and phi the SiLU:

    U, V, Q, K = phi(X W1 + b1)
    A_ij = phi(Q_i K_j + p(i - j) + t(|ts_i - ts_j|)) / n    for j <= i, of n events in all
    X <- X + (Norm(A V) * U) W2 + b2

The weights of an event's past do not sum to 1, so that how often the user did something stays visible. p and t are learnt numbers for
each head, one for each power of two of a distance in events and in seconds.

Source: HSTU, arXiv 2402.17152, equations 1 to 3. There the candidates are elements of the sequence; here they attend to the finished
sequence, so that the layers run once for all candidates of a request.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from loopfm_ray.data.collate import History
from loopfm_ray.models.ages import NUM_AGE_FEATURES, age_features
from loopfm_ray.models.layers import TargetAttention

__all__ = ["HstuBody"]

_NUM_BUCKETS = 32
"""2^31 events, or seconds: 68 years."""
_CHUNK = 256
"""Events whose weights are in memory at a time; longer histories are computed piece by piece, once more in the backward pass."""


class HstuBody(nn.Module):
    """HSTU layers over the events, read out by the candidate."""

    def __init__(
        self,
        query_dim: int,
        value_dim: int,
        width: int,
        num_heads: int,
        num_layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.event = nn.Linear(value_dim, width)
        self.layers = nn.ModuleList(_Layer(width, num_heads, dropout) for _ in range(num_layers))
        self.read = TargetAttention(query_dim, width, NUM_AGE_FEATURES, num_heads, 2 * width)
        self.out_dim = self.read.out_dim

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`."""
        x = self.event(values)
        for layer in self.layers:
            x = layer(x, history.age_s, history.mask)
        found: Tensor = self.read(query, x, age_features(history.age_s), history.mask, history.row)
        return found


class _Layer(nn.Module):
    """One layer; see the module."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.mix, self.out = nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.by_order = nn.Parameter(torch.zeros(_NUM_BUCKETS, num_heads))
        self.by_time = nn.Parameter(torch.zeros(_NUM_BUCKETS, num_heads))

    def forward(self, x: Tensor, age_s: Tensor, mask: Tensor) -> Tensor:
        """Return [G, L, width] from events x [G, L, width], oldest first, their ages [G, L] and which are real [G, L]."""
        gate, value, query, key = functional.silu(self.mix(x)).chunk(4, -1)
        value, query, key = (
            part.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for part in (value, query, key)
        )
        length = x.shape[1]
        if torch.compiler.is_exporting() or length <= _CHUNK:
            found = self._attend(query, key, value, age_s, age_s, mask, 0)
        else:
            pieces = []
            for begin in range(0, length, _CHUNK):
                end = min(begin + _CHUNK, length)  # later events are not read
                inputs = (
                    query[:, :, begin:end],
                    key[:, :, :end],
                    value[:, :, :end],
                    age_s[:, begin:end],
                    age_s[:, :end],
                    mask[:, :end],
                    begin,
                )
                piece = checkpoint(self._attend, *inputs, use_reentrant=False)
                pieces.append(piece)
            found = torch.cat(pieces, 2)
        count = mask.sum(1).clamp_min(1)[:, None, None].to(x.dtype)
        attended = self.norm(found.transpose(1, 2).flatten(2) / count)
        changed: Tensor = self.out(attended * gate)
        return x + functional.dropout(changed, self.dropout, self.training)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_age_s: Tensor,
        key_age_s: Tensor,
        mask: Tensor,
        begin: int,
    ) -> Tensor:
        """Return [G, H, Q, d] the weighted sums of value [G, H, K, d], for queries that begin at event `begin`."""
        place = torch.arange(query.shape[2], device=query.device) + begin
        distance = place[:, None] - torch.arange(key.shape[2], device=query.device)
        gap_s = (query_age_s[:, :, None] - key_age_s[:, None]).abs()
        by_order = self.by_order[_bucket(distance.clamp_min(0).to(gap_s.dtype))].permute(2, 0, 1)
        by_time = self.by_time[_bucket(gap_s)].permute(0, 3, 1, 2)
        weight = functional.silu(query @ key.transpose(2, 3) + by_order + by_time)
        is_seen = (distance >= 0) & mask[:, None, None]
        return torch.where(is_seen, weight, 0.0) @ value


def _bucket(distance: Tensor) -> Tensor:
    """Return int64 the place of a distance among powers of two: 0; 1 and 2; 3 to 6; ... Whole numbers lie off the edges."""
    return torch.log2(distance + 1.5).long().clamp_max(_NUM_BUCKETS - 1)
