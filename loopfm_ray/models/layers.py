"""Building blocks of the models: MLP, cross network, masked pooling and attention over grouped histories."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.models.activations import Activation, build_activation

__all__ = [
    "CrossNet",
    "Groups",
    "Mlp",
    "TargetAttention",
    "group_rows",
    "masked_mean",
    "masked_sum",
]

_WIDTHS = (1, 2, 4, 8, 16, 32, 64)
_HISTORY_COST = 4
"""Cost of copying one history against that of one more query row on it, measured on a CPU."""
_MASKED = -1e4


class Mlp(nn.Module):
    """Linear layers with an activation after each; `forward_all` gives every hidden layer."""

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        dropout: float = 0.0,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        dims = [in_dim, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))
        self.activations = nn.ModuleList(build_activation(activation, width) for width in hidden)
        self.dropout = dropout
        self.out_dim = dims[-1]

    def forward_all(self, x: Tensor) -> list[Tensor]:
        """Return [B, hidden[k]] for every layer k from x [B, in_dim]."""
        outputs = []
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
            if self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, out_dim] from x [B, in_dim]."""
        outputs = self.forward_all(x)
        return outputs[-1] if outputs else x


class CrossNet(nn.Module):
    """Cross layers `x <- x0 * (U V x + b) + x` with a low-rank product.

    Source: DCN V2, arXiv 2008.13535, equation 1 and section 3.2; without the mixture of experts.
    """

    def __init__(self, dim: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(dim, rank, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(rank, dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, dim] from x [B, dim]."""
        crossed = x
        for down, up in zip(self.down, self.up, strict=True):
            crossed = torch.addcmul(crossed, x, up(down(crossed)))
        return crossed


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return [G, d]: the sum over L of values [G, L, d] where mask [G, L] holds."""
    return torch.bmm(mask.to(values.dtype)[:, None, :], values)[:, 0]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return [G, d]: the mean over L of values [G, L, d] where mask [G, L] holds; 0 where it never does."""
    count = mask.sum(1, keepdim=True).clamp_min(1)
    return masked_sum(values, mask) / count


@dataclass(frozen=True)
class Groups:
    """Rows laid out as K blocks of `width` places, all rows of a block reading the same history."""

    slot: Tensor | None
    """[B] int64: the place of each row, block * width + position; None when row n is at place n and all are taken."""
    history: Tensor | None
    """[K] int64: the history of each block; None when block k reads history k."""
    num_blocks: int
    width: int


def group_rows(row: Tensor, num_histories: int) -> Groups:
    """Lay out rows that read histories row [B] so that one batched product serves a block of rows.

    A history with many rows takes several blocks, so that a crowded one does not widen all others; the width
    is the one of least estimated cost. A model that is being exported takes equal blocks of rows, one for each history
    in order, because the layout of others hangs on the values of `row`.
    """
    if num_histories == 1 or torch.compiler.is_exporting():
        return Groups(None, None, num_histories, row.shape[0] // num_histories)
    counts = torch.bincount(row, minlength=num_histories)
    width, num_blocks = _best_width(counts)
    blocks = (counts + (width - 1)) // width
    first_block = blocks.cumsum(0) - blocks
    first_row = counts.cumsum(0) - counts
    order = torch.argsort(row, stable=True)
    position = torch.empty_like(row)
    position[order] = torch.arange(len(row), device=row.device) - first_row[row[order]]
    slot = first_block[row] * width + position
    is_one_each = num_blocks == num_histories and bool((blocks == 1).all())
    history = (
        None
        if is_one_each
        else torch.repeat_interleave(torch.arange(num_histories, device=row.device), blocks)
    )
    return Groups(slot, history, num_blocks, width)


def _best_width(counts: Tensor) -> tuple[int, int]:
    widths = torch.tensor(_WIDTHS, device=counts.device)
    num_blocks = ((counts[:, None] + widths - 1) // widths).sum(0).tolist()
    is_used_once = bool((counts > 0).all())
    cost = [
        blocks * (width + (0 if is_used_once and blocks == len(counts) else _HISTORY_COST))
        for blocks, width in zip(num_blocks, _WIDTHS, strict=True)
    ]
    best = cost.index(min(cost))
    return _WIDTHS[best], int(num_blocks[best])


def _spread(rows: Tensor, groups: Groups) -> Tensor:
    """Return [K * width, D]: rows [B, D] at their places, 0 elsewhere."""
    if groups.slot is None:
        return rows
    places = rows.new_zeros(groups.num_blocks * groups.width, rows.shape[1])
    return places.index_copy(0, groups.slot, rows)


def _taken(places: Tensor, groups: Groups) -> Tensor:
    """Return [B, D]: the places [K * width, D] of the rows."""
    return places if groups.slot is None else places.index_select(0, groups.slot)


class TargetAttention(nn.Module):
    """Several heads of attention of a candidate over a history, which also tell how strongly it matched.

    A softmax forgets whether one event or a hundred matched the candidate. Here each head gives, beside the
    weighted mean of the values, two intensities of its scores s: `logsumexp(s)` and `log(1 + sum sigmoid(s - t))`
    with a learnt threshold t.

    The keys are the values themselves (scaled by a learnt gain) and the side features of each event, so nothing
    of size [G, L, d] is computed: the query is mapped to the keys' space.
    """

    NUM_INTENSITIES = 2

    def __init__(
        self, query_dim: int, value_dim: int, side_dim: int, num_heads: int, query_hidden: int
    ) -> None:
        super().__init__()
        self.value_dim, self.side_dim, self.num_heads = value_dim, side_dim, num_heads
        self.query = nn.Sequential(
            nn.Linear(query_dim, query_hidden),
            nn.ReLU(),
            nn.Linear(query_hidden, num_heads * (value_dim + side_dim)),
        )
        self.gain = nn.Parameter(torch.ones(value_dim))
        self.threshold = nn.Parameter(torch.linspace(-1.0, 1.0, num_heads))
        self.out_dim = num_heads * (value_dim + self.NUM_INTENSITIES)

    def forward(
        self, query: Tensor, values: Tensor, side: Tensor, mask: Tensor, row: Tensor
    ) -> Tensor:
        """Attend from each row to its history.

        Args:
            query: [B, query_dim] what is asked.
            values: [G, L, value_dim] the histories; entries outside the mask must be finite.
            side: [G, L, side_dim] more keys, such as ages.
            mask: [G, L] which entries are real; a history without any gives finite numbers without meaning.
            row: [B] int64, the history of each row.

        Returns:
            [B, out_dim].
        """
        groups = group_rows(row, values.shape[0])
        # Padding is masked inside the product: one more key, which every query reads with weight 1.
        side = torch.cat([side, torch.where(mask, 0.0, _MASKED)[..., None]], -1)
        if groups.history is not None:
            values = values.index_select(0, groups.history)
            side = side.index_select(0, groups.history)
        heads, width, length = self.num_heads, groups.width, values.shape[1]
        asked = self.query(query).unflatten(1, (heads, -1))
        asked = torch.cat([asked, torch.ones_like(asked[..., :1])], -1).flatten(1)
        padded = _spread(asked, groups).view(groups.num_blocks, width * heads, -1)
        by_value = padded[..., : self.value_dim] * self.gain
        by_side = padded[..., self.value_dim :]
        score = torch.baddbmm(
            torch.bmm(by_side, side.transpose(1, 2)), by_value, values.transpose(1, 2)
        )
        # Places that no row took are left out of all that costs an exponential.
        score = _taken(score.view(-1, heads * length), groups).view(-1, heads, length)
        best = score.detach().amax(-1, keepdim=True)
        weight = torch.exp(score - best)
        total = weight.sum(-1)
        spread = _spread(weight.flatten(1), groups)
        found = torch.bmm(spread.view(groups.num_blocks, width * heads, length), values)
        found = _taken(found.view(-1, heads * self.value_dim), groups)
        found = found.view(-1, heads, self.value_dim) * self.gain / total[..., None]
        strength = (best[..., 0] + torch.log(total)).clamp_min(_MASKED / 100) / 4
        count = torch.sigmoid(score - self.threshold[:, None]).sum(-1)
        return torch.cat([found.flatten(1), strength, torch.log1p(count)], -1)
