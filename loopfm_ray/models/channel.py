"""What survives of an FM embedding at each step of its way into a history: embedding, latent, code.

Two measures. The variance explained asks how well the embedding can be given back. The probe asks what the FM's task
needs: the logloss of a logistic regression of the label on the embedding, on the latent and on the code, each fitted
on some rows and measured on others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from loopfm_ray.errors import DataError
from loopfm_ray.models.bottleneck import Bottleneck
from loopfm_ray.store.codes import CodeSpec, dequantize, quantize

__all__ = ["ChannelReport", "ChannelRows", "channel_report", "probe_logloss"]

_L2 = 1e-3
_MAX_STEPS = 100
_MIN_STD = 1e-6
_SPLIT_SEED = 11


@dataclass(frozen=True)
class ChannelRows:
    """Rows that the channel is measured on, best not those it was fitted on."""

    embedding: Tensor
    """[N, D] FM embeddings."""
    label: Tensor | None = None
    """[N] the label of each row; none, or labels all equal, leave the probes out."""
    fm_prob: Tensor | None = None
    """[N] what the FM predicts for it."""


@dataclass(frozen=True)
class ChannelReport:
    """What the way from FM embedding to stored code keeps."""

    embedding_dim: int
    latent_dim: int
    bits: int
    variance_explained: dict[str, float]
    """Share of the standardised and weighted embedding's variance kept by `latent`, by its `code`, and by `prefix_<n>`."""
    share_zero_codes: float
    """Share of codes that are 0: near 1, the code's range is too wide for the latents."""
    share_clipped_codes: float
    """Share of codes at either end of the range: large, the range is too narrow."""
    probe_logloss: dict[str, float]
    """Logloss, in nats on rows that the probes did not see, of `none` (the mean label), linear probes on `embedding`, `latent`
    and `code`, and of the `fm` itself; empty without labels."""


def channel_report(bottleneck: Bottleneck, rows: ChannelRows, spec: CodeSpec) -> ChannelReport:
    """Measure the channel on `rows`."""
    with torch.no_grad():
        normal, latent = bottleneck.standardise(rows.embedding), bottleneck.encode(rows.embedding)
        codes = quantize(latent.cpu().numpy(), spec)
        stored = torch.from_numpy(dequantize(codes, spec)).to(latent)
        explained = {
            "latent": _explained(normal, bottleneck.decode(latent)),
            "code": _explained(normal, bottleneck.decode(stored)),
        }
        for prefix in bottleneck.prefixes:
            explained[f"prefix_{prefix}"] = _explained(normal, bottleneck.decode(latent, prefix))
    top = 2 ** (spec.bits - 1)
    return ChannelReport(
        bottleneck.in_dim,
        bottleneck.latent_dim,
        spec.bits,
        explained,
        float((codes == 0).mean()),
        0.0 if spec.bits == 16 else float(((codes == -top) | (codes == top - 1)).mean()),
        _probes(rows, {"embedding": rows.embedding, "latent": latent, "code": stored}),
    )


def probe_logloss(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Fit a logistic regression on inputs [N, D] and labels [N] and return its logloss on others.

    Inputs are standardised; the ridge is 1e-3 per weight on the mean loss.

    Raises:
        DataError: there are no rows on one side.
    """
    (x, y), (x_test, y_test) = train, test
    if not len(x) or not len(x_test):
        raise DataError(f"a probe needs rows to fit and to test, found {len(x)} and {len(x_test)}")
    mean, std = x.mean(0), x.std(0).clamp_min(_MIN_STD)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    weight = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = loss + _L2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with torch.no_grad():
        return float(functional.binary_cross_entropy_with_logits(x_test @ weight + bias, y_test))


def _probes(rows: ChannelRows, stages: dict[str, Tensor]) -> dict[str, float]:
    label = rows.label
    if label is None or bool((label == label[0]).all()):
        return {}
    label = label.float().cpu()
    # at random: in the order of the log a positive and its negative take turns
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    fit, test = order[: len(label) // 2], order[len(label) // 2 :]
    base = label[fit].mean().expand(len(label[test]))
    found = {"none": float(functional.binary_cross_entropy(base, label[test]))}
    for name, values in stages.items():
        x = values.detach().float().cpu()
        found[name] = probe_logloss((x[fit], label[fit]), (x[test], label[test]))
    if rows.fm_prob is not None:
        prob = rows.fm_prob.detach().float().cpu()[test]
        found["fm"] = float(functional.binary_cross_entropy(prob, label[test]))
    return found


def _explained(target: Tensor, decoded: Tensor) -> float:
    residual = (target - decoded).square().sum()
    total = (target - target.mean(0)).square().sum().clamp_min(1e-12)
    return float(1.0 - residual / total)
