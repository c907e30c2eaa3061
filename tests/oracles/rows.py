"""Slow twin of sharded tables: one dense table, dense gradients, and an optimizer that visits row after row."""

import torch
from torch import nn

from loopfm_ray.models.sharded.optim import RowAdagradConfig


class DenseTables:
    """The same rows in `nn.Embedding`, trained on the batches of all ranks at once."""

    def __init__(self, weight, config):
        self.table = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        self.config = config
        self.sums = [getattr(config, "initial", 0.0)] * len(weight)
        self.means = torch.zeros_like(weight)
        self.squares = torch.zeros_like(weight)
        self.steps = [0] * len(weight)

    def step(self, touched, factor=1.0):
        gradient, config = self.table.weight.grad, self.config
        with torch.no_grad():
            for row in sorted(touched):
                g, w = gradient[row], self.table.weight[row]
                if isinstance(config, RowAdagradConfig):
                    self.sums[row] += float((g * g).sum()) / len(g)
                    w -= config.lr * factor * g / (self.sums[row] ** 0.5 + config.eps)
                    continue
                self.steps[row] += 1
                self.means[row] = config.beta1 * self.means[row] + (1 - config.beta1) * g
                self.squares[row] = config.beta2 * self.squares[row] + (1 - config.beta2) * g * g
                mean = self.means[row] / (1 - config.beta1 ** self.steps[row])
                square = self.squares[row] / (1 - config.beta2 ** self.steps[row])
                w -= config.lr * factor * mean / (square.sqrt() + config.eps)
        self.table.weight.grad = None
