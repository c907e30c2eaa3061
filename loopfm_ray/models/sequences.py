"""History encoders that look at order, or at pairs of candidate and event: DIN, GRU, AUGRU and transformer.

What does not depend on the candidate is computed on the [G, L] distinct histories of a batch, once for all candidates of a
request; only the rest is computed on the [B, L] pairs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.data.collate import History
from loopfm_ray.models.activations import Activation, build_activation
from loopfm_ray.models.ages import NUM_AGE_FEATURES, age_features
from loopfm_ray.models.layers import TargetAttention

__all__ = ["AugruBody", "DinBody", "GruBody", "TransformerBody"]

_MASKED = -1e4
"""Added to the score of padding: nothing is left of it after a softmax, and no row gives NaN."""


class DinBody(nn.Module):
    """DIN's activation unit: weighted sum of the events, each weight an MLP of [q, s, q - s, q * s].

    q is the query mapped to the width of an event s: latents share no space with the candidate's embedding. The
    first layer is linear in its four parts, so the parts of q and of s alone are computed once for each row and
    once for each event, and only q * s for each pair.

    Source: DIN, arXiv 1706.06978, section 4.3 and figure 2. The weights are not normalised unless `has_softmax`.
    """

    def __init__(
        self,
        query_dim: int,
        value_dim: int,
        hidden: Sequence[int],
        activation: Activation,
        has_softmax: bool,
    ) -> None:
        super().__init__()
        self.query = nn.Linear(query_dim, value_dim)
        dims = [4 * value_dim, *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(dims[index], dims[index + 1]) for index in range(len(hidden))
        )
        self.activations = nn.ModuleList(build_activation(activation, width) for width in hidden)
        self.score = nn.Linear(dims[-1], 1)
        self.has_softmax = has_softmax
        self.out_dim = value_dim

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`."""
        asked, row = self.query(query), history.row
        mask = history.mask.index_select(0, row)
        events = values.index_select(0, row)
        x = self._first(asked, values, events, row)
        for index, activation in enumerate(self.activations):
            x = activation(x if index == 0 else self.layers[index](x), mask)
        weight = self.score(x)[..., 0]
        if self.has_softmax:
            weight = torch.softmax(weight + torch.where(mask, 0.0, _MASKED), -1)
        weight = weight * mask
        return torch.bmm(weight[:, None], events)[:, 0]

    def _first(self, asked: Tensor, values: Tensor, events: Tensor, row: Tensor) -> Tensor:
        """Return [B, L, hidden[0]], the first layer on [q, s, q - s, q * s]."""
        first = self.layers[0]
        of_query, of_event, of_gap, of_product = first.weight.chunk(4, 1)  # type: ignore[operator]  # a Linear
        by_event = functional.linear(values, of_event - of_gap).index_select(0, row)
        by_query = functional.linear(asked, of_query + of_gap, first.bias)  # type: ignore[arg-type]  # a Linear
        by_pair = torch.bmm(events, asked[:, :, None] * of_product.t())
        return by_event + by_query[:, None] + by_pair


class GruBody(nn.Module):
    """The last state of a GRU that reads the events from oldest to newest; blind to the candidate."""

    def __init__(self, value_dim: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(value_dim, hidden, batch_first=True)
        self.out_dim = hidden

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`; `query` is not read."""
        del query
        states, _ = self.gru(values)
        newest = (history.mask.sum(1) - 1).clamp_min(0)
        last: Tensor = states[torch.arange(states.shape[0], device=states.device), newest]
        return last.index_select(0, history.row)


class AugruBody(nn.Module):
    """DIEN's interest evolution: a GRU finds interests, a second one follows those that the candidate attends to.

    The update gate of the second GRU is multiplied by the attention `a_t = softmax_t(h_t W q)`:
    `u = a_t sigmoid(.)`, `h_t = (1 - u) h_{t-1} + u tanh(W i_t + r * U h_{t-1} + b)`. Padding has attention 0, so
    the state passes through it.

    Source: DIEN, arXiv 1809.03672, equations 2 to 5, 8 and 14 to 16; without its auxiliary loss, which needs sampled
    negative events.
    """

    def __init__(self, query_dim: int, value_dim: int, hidden: int) -> None:
        super().__init__()
        self.interests = nn.GRU(value_dim, hidden, batch_first=True)
        self.query = nn.Linear(query_dim, hidden, bias=False)
        self.inputs = nn.Linear(hidden, 3 * hidden)
        self.states = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out_dim = hidden

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`."""
        row = history.row
        interests, _ = self.interests(values)
        mask = history.mask.index_select(0, row)
        score = torch.bmm(interests.index_select(0, row), self.query(query)[..., None])[..., 0]
        attention = torch.softmax(score + torch.where(mask, 0.0, _MASKED), -1) * mask
        state = attention.new_zeros(row.shape[0], self.out_dim)
        steps = zip(self.inputs(interests).unbind(1), attention.unbind(1), strict=True)
        for given, weight in steps:
            by_input = given.index_select(0, row).chunk(3, -1)
            by_state = self.states(state).chunk(3, -1)
            update = weight[:, None] * torch.sigmoid(by_input[0] + by_state[0])
            reset = torch.sigmoid(by_input[1] + by_state[1])
            proposal = torch.tanh(by_input[2] + reset * by_state[2])
            state = torch.lerp(state, proposal, update)
        return state


class TransformerBody(nn.Module):
    """Self-attention among the events, placed in time by their ages, read out by the candidate.

    Each block: `s = LN(x + MultiHead(x))`, `x = LN(s + FFN(s))` with a leaky ReLU.

    Source: BST, arXiv 1905.06874, section 2.2; positions are ages, as there. There the candidate is one more element of
    the sequence; here it attends to the finished sequence, so that the blocks run once for all candidates of a request.
    """

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
        self.age = nn.Linear(NUM_AGE_FEATURES, width, bias=False)
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout) for _ in range(num_layers))
        self.read = TargetAttention(query_dim, width, NUM_AGE_FEATURES, num_heads, 2 * width)
        self.out_dim = self.read.out_dim

    def forward(self, query: Tensor, values: Tensor, history: History) -> Tensor:
        """See `HistoryBody`."""
        ages = age_features(history.age_s)
        x = self.event(values) + self.age(ages)
        bias = torch.where(history.mask, 0.0, _MASKED)[:, None, None]
        for block in self.blocks:
            x = block(x, bias)
        found: Tensor = self.read(query, x, ages, history.mask, history.row)
        return found


class _Block(nn.Module):
    """One encoder layer; see `TransformerBody`."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Return [G, L, width] from x [G, L, width] and what is added to each key's score, [G, 1, 1, L]."""
        num, length, width = x.shape
        mixed = self.mix(x).view(num, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(mixed[0], mixed[1], mixed[2], bias)
        attended = self.out(found.transpose(1, 2).reshape(num, length, width))
        x = self.norms[0](x + functional.dropout(attended, self.dropout, self.training))
        changed = self.down(functional.leaky_relu(self.up(x)))
        out: Tensor = self.norms[1](x + functional.dropout(changed, self.dropout, self.training))
        return out
