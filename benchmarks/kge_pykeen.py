"""PyKEEN's side of the benchmarks: the same models with the same weights, its training loop, its evaluator."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pykeen.evaluation import RankBasedEvaluator
from pykeen.losses import NSSALoss
from pykeen.models import ComplEx, DistMult, Model, RotatE, TransE
from pykeen.nn.modules import RotatEInteraction
from pykeen.training import SLCWATrainingLoop
from pykeen.training.callbacks import TrainingCallback
from pykeen.triples import CoreTriplesFactory

from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.triples import TripleSet

METRICS = ("inverse_harmonic_mean_rank", "arithmetic_mean_rank", "adjusted_arithmetic_mean_rank")
Tick = Callable[[], None]


class _SumOfModuli(RotatEInteraction):
    """RotatE as its paper's code has it, and ours: PyKEEN's takes the L2 norm of the vector of differences."""

    def forward(self, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -(h * r - t).abs().sum(-1)


def make_factory(graph: TripleSet) -> CoreTriplesFactory:
    """Return the training triples as PyKEEN takes them."""
    return CoreTriplesFactory(
        torch.from_numpy(graph.train),
        num_entities=graph.num_entities,
        num_relations=graph.num_relations,
    )


def make_model(kind: str, dimension: int, factory: CoreTriplesFactory, margin: float) -> Model:
    """Return PyKEEN's model with as many real parameters, without constraints and regularisers that ours has not."""
    shared = {
        "triples_factory": factory,
        "loss": NSSALoss(margin=margin, adversarial_temperature=1.0),
        "random_seed": 0,
    }
    if kind == "transe":
        return TransE(
            embedding_dim=dimension, scoring_fct_norm=1, entity_constrainer=None, **shared
        )
    if kind == "distmult":
        return DistMult(
            embedding_dim=dimension, entity_constrainer=None, regularizer=None, **shared
        )
    if kind == "complex":
        return ComplEx(embedding_dim=dimension // 2, regularizer=None, **shared)
    return RotatE(embedding_dim=dimension // 2, **shared)


def copy_weights(model: KgeModel, kind: str, peer: Model) -> None:
    """Give a PyKEEN model the weights of ours, and RotatE our score."""
    entity, relation = model.entity.detach(), model.relations.weight.detach()
    if kind in ("complex", "rotate"):
        entity = _pairs(*entity.chunk(2, -1))
    if kind == "complex":
        relation = _pairs(*relation.chunk(2, -1))
    elif kind == "rotate":
        phase = relation * model.relations.radians
        relation = _pairs(torch.cos(phase), torch.sin(phase))
        peer.interaction = _SumOfModuli()
    peer.to(entity.dtype)
    with torch.no_grad():
        peer.entity_representations[0]._embeddings.weight.copy_(entity)
        peer.relation_representations[0]._embeddings.weight.copy_(relation)


def _pairs(real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    return torch.stack([real, imaginary], -1).flatten(-2)


class _Ticks(TrainingCallback):
    def __init__(self, tick: Tick) -> None:
        super().__init__()
        self.tick = tick

    def post_epoch(self, *_: Any, **__: Any) -> None:  # Any: PyKEEN's
        self.tick()


def train(
    model: Model,
    factory: CoreTriplesFactory,
    sizes: dict[str, Any],
    epochs: int,
    tick: Tick,
) -> None:
    """Train for some epochs; `tick` is called after each."""
    loop = SLCWATrainingLoop(
        model=model,
        triples_factory=factory,
        optimizer="adam",
        optimizer_kwargs={"lr": sizes["lr"]},
        negative_sampler="basic",
        negative_sampler_kwargs={"num_negs_per_pos": sizes["negatives"]},
    )
    loop.train(
        factory,
        num_epochs=epochs,
        batch_size=sizes["batch"],
        use_tqdm=False,
        use_tqdm_batch=False,
        callbacks=_Ticks(tick),
    )


def evaluate(model: Model, graph: TripleSet, batch: int) -> tuple[float, float, np.ndarray]:
    """Return seconds, processor seconds and realistic ranks [2, n] of the test triples, tails first."""
    evaluator = RankBasedEvaluator(
        metrics=[*METRICS, "hits_at_k", "hits_at_k", "hits_at_k"],
        metrics_kwargs=[None] * len(METRICS) + [{"k": k} for k in (1, 3, 10)],
        add_defaults=False,
        clear_on_finalize=False,
    )
    filters = [torch.from_numpy(graph.train), torch.from_numpy(graph.valid)]
    began, cpu = time.perf_counter(), time.process_time()
    evaluator.evaluate(
        model,
        torch.from_numpy(graph.test),
        batch_size=batch,
        use_tqdm=False,
        additional_filter_triples=filters,
    )
    spent = time.perf_counter() - began, time.process_time() - cpu
    sides = [np.concatenate(evaluator.ranks[side, "realistic"]) for side in ("tail", "head")]
    return *spent, np.stack(sides).astype(np.float64)
