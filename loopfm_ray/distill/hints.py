"""FitNets: while it trains, a VM's hidden layer is pulled to the FM's latent of the same row."""

from dataclasses import dataclass

from torch import Tensor, nn

from loopfm_ray.data.batch import Batch
from loopfm_ray.models.vertical import VerticalModel

__all__ = ["HintedOutput", "HintedVm"]


@dataclass(frozen=True)
class HintedOutput:
    """What a VM gives while it is pulled."""

    logit: Tensor
    """[B, T]"""
    hint: Tensor
    """[B, D] the hidden layer, mapped to the FM's latent."""


class HintedVm(nn.Module):
    """A VM and the map from one of its hidden layers to the FM's latent, which is thrown away after training.

    Source: FitNets, arXiv 1412.6550, section 2.2: the VM's layer is the guided one, the map its regressor.
    """

    def __init__(self, vm: VerticalModel, layer: str, latent_dim: int) -> None:
        """Guide `layer` of `vm` to latents of width `latent_dim`.

        Raises:
            ConfigError: the VM has no such layer.
        """
        super().__init__()
        self.vm, self.layer = vm, layer
        self.regressor = nn.Linear(vm.layer_dim(layer), latent_dim)

    def forward(self, batch: Batch) -> HintedOutput:
        """Score a batch and map its hidden layer."""
        found = self.vm.forward_all(batch)
        return HintedOutput(found.logit, self.regressor(found.layers[self.layer]))
