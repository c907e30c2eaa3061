import numpy as np
import pytest
import torch
from pydantic import ValidationError

from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.channel import ChannelRows, channel_report, probe_logloss
from loopfm_ray.models.fitting import EmbeddingChunk, calibrate, fit_bottleneck
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.store.codes import CodeSpec, decode, encode
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch

SMALL = BottleneckConfig(latent_dim=4, prefixes=(1, 2, 4), metric="spread", init_rows=1000)


def low_rank_embeddings(num_rows=2000, seed=0):
    """[N, 10] embeddings that live on 3 directions, plus a constant dimension."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, 10, generator=torch.Generator().manual_seed(99))
    x = torch.randn(num_rows, 3, generator=generator) @ mixing * 3 + 1
    x = x + 0.05 * torch.randn(num_rows, 10, generator=generator)
    x[:, 4] = 2.0
    return x


def fitted(config=SMALL, epochs=2):
    torch.manual_seed(0)
    bottleneck = build_bottleneck(config, 10)
    x = low_rank_embeddings()
    target = (x[:, 0] > 1).float()
    chunks = [EmbeddingChunk(x[i : i + 250], target[i : i + 250]) for i in range(0, len(x), 250)]
    losses = fit_bottleneck(bottleneck, chunks * epochs)
    return bottleneck, losses


def test_latents_are_in_range_and_prefixes_grow_better():
    bottleneck, losses = fitted(epochs=8)
    x = low_rank_embeddings(seed=1)
    latent = bottleneck.encode(x)
    assert latent.shape == (2000, 4)
    assert bool((latent.abs() <= 1).all())
    report = channel_report(bottleneck, ChannelRows(x), calibrate(bottleneck, x, 4))
    explained = report.variance_explained
    assert explained["prefix_1"] < explained["prefix_2"] < explained["prefix_4"]
    assert explained["latent"] == explained["prefix_4"] > 0.9
    assert explained["code"] == pytest.approx(explained["latent"], abs=0.03)
    assert (report.embedding_dim, report.latent_dim, report.bits) == (10, 4, 4)
    assert losses[-1] < losses[0]


def test_starts_as_principal_components():
    torch.manual_seed(0)
    bottleneck = build_bottleneck(SMALL, 10)
    x = low_rank_embeddings()
    bottleneck.initialise(x)
    normal = bottleneck.standardise(x)
    assert normal.mean(0).abs().max() < 1e-3
    assert not bool(normal[:, 4].any())
    before_tanh = torch.atanh(bottleneck.encode(x).double().clamp(-0.9999999, 0.9999999))
    _, _, vectors = torch.linalg.svd(normal, full_matrices=False)
    components = normal @ vectors[:3].T
    whitened = components / components.std(0) / bottleneck.config.spread
    np.testing.assert_allclose(
        before_tanh[:, :3].abs().detach(), whitened.abs(), rtol=0.02, atol=2e-3
    )


def test_calibrated_codes_use_their_range():
    bottleneck, _ = fitted()
    x = low_rank_embeddings(seed=1)
    spec = calibrate(bottleneck, x, 4)
    assert (spec.bits, spec.dim) == (4, 4)
    report = channel_report(bottleneck, ChannelRows(x), spec)
    assert report.share_zero_codes < 0.3
    assert 0 < report.share_clipped_codes < 0.3
    assert report.probe_logloss == {}
    latent = bottleneck.encode(x).detach().numpy()
    error = np.abs(decode(encode(latent, spec), spec) - latent)
    assert error.mean() < 0.1
    half = calibrate(bottleneck, x, 16)
    assert (half.bits, half.scale) == (16, None)


def test_the_bottleneck_never_trains_the_fm():
    torch.manual_seed(0)
    fm = build_fm(FmConfig(embed_dim=3, history_dim=4, hidden=(6,)), SCHEMA, ITEM_FIELDS)
    bottleneck = build_bottleneck(BottleneckConfig(latent_dim=2, prefixes=(2,), hidden=3), 6)
    out = fm(make_batch())
    loss = bottleneck.loss(out.layers["hidden_0"])
    loss.backward()
    assert all(parameter.grad is None for parameter in fm.parameters())
    assert all(parameter.grad is not None for parameter in bottleneck.parameters())
    assert not bottleneck.encode(out.layers["hidden_0"].detach()).isnan().any()


def test_the_prediction_term_needs_and_uses_the_target():
    config = SMALL.model_copy(update={"predict_weight": 5.0, "hidden": 8})
    bottleneck, losses = fitted(config, epochs=15)
    assert losses[-1] < losses[0]
    x = low_rank_embeddings(seed=1)
    logit = bottleneck.predictors["4"](bottleneck.encode(x))[:, 0]
    assert float(((logit > 0) == (x[:, 0] > 1)).float().mean()) > 0.85
    with pytest.raises(DataError, match="predictions"):
        bottleneck.loss(x)


def test_the_gradient_metric_gives_the_room_to_what_the_logit_uses():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 10, generator=generator)
    slopes = torch.zeros(10)
    slopes[[2, 7]] = torch.tensor([1.0, 4.0])  # mean squares
    config = BottleneckConfig(latent_dim=2, prefixes=(1, 2))
    bottleneck = build_bottleneck(config, 10)
    chunks = [EmbeddingChunk(x[:500], None, slopes), EmbeddingChunk(x[500:], None, slopes)]
    fit_bottleneck(bottleneck, chunks)
    weight = bottleneck.weight
    assert weight.nonzero().flatten().tolist() == [2, 7]
    assert (weight[7] / weight[2]).item() == pytest.approx(2.0, rel=0.1)
    first = bottleneck.encode(x)[:, 0].detach()
    assert abs(np.corrcoef(first, x[:, 7])[0, 1]) > 0.95
    with pytest.raises(DataError, match="sensitivity"):
        fit_bottleneck(bottleneck, [EmbeddingChunk(x)])
    with pytest.raises(DataError, match="does not depend"):
        fit_bottleneck(bottleneck, [EmbeddingChunk(x, None, torch.zeros(10))])


def test_same_seed_same_bits():
    first, second = fitted()[0].state_dict(), fitted()[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unfit_input_is_an_error():
    with pytest.raises(ValidationError, match="end in latent_dim"):
        BottleneckConfig(latent_dim=8, prefixes=(2, 4))
    with pytest.raises(ValidationError):
        BottleneckConfig(latent_dim=4, prefixes=(4, 2, 4))
    with pytest.raises(ConfigError, match="at most the embedding's 3"):
        build_bottleneck(SMALL, 3)
    bottleneck = build_bottleneck(SMALL, 10)
    with pytest.raises(DataError, match="at least 2"):
        bottleneck.initialise(torch.zeros(1, 10))
    with pytest.raises(DataError, match="found none"):
        fit_bottleneck(bottleneck, [])


def test_a_bottleneck_of_prediction_alone_keeps_what_predicts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 10, generator=generator) * torch.tensor([5.0] * 9 + [0.5])
    target = torch.sigmoid(6 * x[:, 9])
    chunks = [EmbeddingChunk(x[i : i + 250], target[i : i + 250]) for i in range(0, len(x), 250)]
    base = {"latent_dim": 2, "prefixes": (1, 2), "metric": "spread", "epochs": 30, "lr": 1e-2}
    found = {}
    for name, weights in {
        "reconstruct": {"reconstruct_weight": 1.0},
        "predict": {"reconstruct_weight": 0.0, "predict_weight": 1.0},
    }.items():
        torch.manual_seed(0)
        bottleneck = build_bottleneck(BottleneckConfig(**base, **weights), 10)
        fit_bottleneck(bottleneck, chunks)
        label = (torch.rand(4000, generator=generator) < target).float()
        rows = ChannelRows(x, label, target)
        found[name] = channel_report(bottleneck, rows, calibrate(bottleneck, x, 4)).probe_logloss
    assert found["predict"]["latent"] < found["reconstruct"]["latent"] - 0.1
    assert found["predict"]["latent"] == pytest.approx(found["predict"]["embedding"], abs=0.05)
    with pytest.raises(ValidationError, match="must be positive"):
        BottleneckConfig(reconstruct_weight=0.0)


@pytest.mark.parametrize("rounding", ["noise", "straight_through"])
def test_training_for_rounding_meets_codes_of_the_stored_step(rounding):
    config = SMALL.model_copy(update={"rounding": rounding})
    bottleneck, _ = fitted(config, epochs=2)
    x = low_rank_embeddings(seed=1)
    spec = calibrate(bottleneck, low_rank_embeddings()[:1000], 4)
    np.testing.assert_allclose(bottleneck.step * 8, spec.scale, rtol=1e-5)
    bottleneck.train()
    met, latent = bottleneck._rounded(bottleneck.encode(x)), bottleneck.encode(x)
    away = (met - latent).abs() / bottleneck.step
    assert 0.4 < float(away.max().detach()) <= 0.5 + 1e-4
    if rounding == "straight_through":
        met.sum().backward()
        assert bool(bottleneck.encoder.weight.grad.any())
        np.testing.assert_allclose(
            (met / bottleneck.step).detach(), (met / bottleneck.step).round().detach(), atol=1e-3
        )
    bottleneck.eval()
    assert torch.equal(bottleneck._rounded(latent), latent)


def test_a_rotation_spreads_the_variance_and_mixes_no_prefixes():
    torch.manual_seed(0)
    x = low_rank_embeddings()
    plain = build_bottleneck(SMALL, 10)
    turned = build_bottleneck(SMALL.model_copy(update={"rotation": "random"}), 10)
    plain.initialise(x)
    turned.initialise(x)
    before, after = (
        torch.atanh(b.encode(x).double().clamp(-0.9999999, 0.9999999)) for b in (plain, turned)
    )
    # a prefix spans what it spanned: the rotated one is a linear map of the plain one, and back
    for prefix in SMALL.prefixes:
        fit = torch.linalg.lstsq(before[:, :prefix], after[:, :prefix])
        moved = before[:, :prefix] @ fit.solution
        np.testing.assert_allclose(moved.detach(), after[:, :prefix].detach(), atol=0.02)
    assert not torch.allclose(before[:, 2:], after[:, 2:], atol=1e-3)


def test_a_probe_finds_the_logloss_of_the_truth():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, 3, generator=generator)
    prob = torch.sigmoid(x @ torch.tensor([1.0, -2.0, 0.0]) + 0.5)
    label = (torch.rand(40_000, generator=generator) < prob).float()
    best = float(torch.nn.functional.binary_cross_entropy(prob[20_000:], label[20_000:]))
    found = probe_logloss((x[:20_000], label[:20_000]), (x[20_000:], label[20_000:]))
    assert found == pytest.approx(best, abs=2e-3)
    with pytest.raises(DataError, match="a probe needs rows"):
        probe_logloss((x[:0], label[:0]), (x, label))


def test_probes_do_not_depend_on_positives_and_negatives_taking_turns():
    x = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0))
    label = torch.arange(4000).float() % 2
    bottleneck = build_bottleneck(SMALL, 10)
    bottleneck.initialise(x)
    rows = ChannelRows(x, label)
    found = channel_report(bottleneck, rows, calibrate(bottleneck, x, 4)).probe_logloss
    assert found["none"] == pytest.approx(0.6931, abs=1e-3)
    assert found["embedding"] == pytest.approx(0.6931, abs=0.01)


def test_the_report_shows_a_bad_link_in_the_channel():
    generator = torch.Generator().manual_seed(0)
    x = low_rank_embeddings(4000)
    prob = torch.sigmoid(2 * (x[:, 0] - x[:, 0].mean()))
    label = (torch.rand(4000, generator=generator) < prob).float()
    bottleneck, _ = fitted(epochs=4)
    rows = ChannelRows(x, label, prob)
    good = channel_report(bottleneck, rows, calibrate(bottleneck, x, 8)).probe_logloss
    assert list(good) == ["none", "embedding", "latent", "code", "fm"]
    assert good["fm"] < good["none"]
    assert good["latent"] == pytest.approx(good["embedding"], abs=0.02)
    assert good["code"] == pytest.approx(good["latent"], abs=0.005)
    far_too_wide = CodeSpec(4, 4, (16.0,) * 4)
    bad = channel_report(bottleneck, rows, far_too_wide)
    assert bad.probe_logloss["code"] > good["code"] + 0.1
    assert bad.share_zero_codes > 0.9


def test_as_wide_as_the_embedding_nothing_is_lost():
    whole = BottleneckConfig(latent_dim=None, prefixes=(), metric="spread", init_rows=1000)
    bottleneck, _ = fitted(whole)
    assert (bottleneck.latent_dim, bottleneck.prefixes) == (10, (10,))
    x = low_rank_embeddings(seed=2)
    report = channel_report(bottleneck, ChannelRows(x), CodeSpec(16, 10))
    assert report.variance_explained["code"] > 0.98  # of a linear decoder
    # and what went in can be had back from what came out
    latent = torch.from_numpy(
        decode(encode(bottleneck.encode(x).detach(), CodeSpec(16, 10)), CodeSpec(16, 10))
    )
    code = torch.atanh(latent.clamp(-0.9999, 0.9999)) - bottleneck.encoder.bias
    normal = torch.linalg.lstsq(bottleneck.encoder.weight, code.T).solution.T
    back = (normal / bottleneck.weight * bottleneck.std + bottleneck.mean).detach()
    kept = 1 - (back - x).square().sum() / (x - x.mean(0)).square().sum()
    assert kept > 0.99
    with pytest.raises(ValidationError, match="be empty: latent_dim is null"):
        BottleneckConfig(latent_dim=None)
