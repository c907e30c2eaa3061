from dataclasses import replace

import pytest
import torch

from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.histories import AttentionConfig, PoolConfig
from loopfm_ray.models.registry import build_vm
from tests.model_inputs import ITEM_FIELDS, LATENT_DIM, SCHEMA, histories, make_batch, take_rows


def build(seed=0, **history):
    torch.manual_seed(seed)
    config = DnnConfig(embed_dim=3, hidden=(6, 5), history=histories(**history))
    model = build_vm(config, SCHEMA, ITEM_FIELDS, LATENT_DIM)
    for name in model.histories.names:
        model.histories.encoder(name).missing.data.normal_()
    return model


def with_history(batch, name, **changes):
    history = replace(batch.histories[name], **changes)
    return replace(batch, histories={**batch.histories, name: history})


@pytest.mark.parametrize("kind", ["none", "latent", "raw", "both"])
def test_only_the_chosen_history_is_read(kind):
    model, batch = build(kind=kind), make_batch()
    out = model(batch)
    assert out.shape == (12, 2)
    for name, parts in {"latent": ("latent", "both"), "raw": ("raw", "both")}.items():
        history = batch.histories[name]
        changed = with_history(batch, name, age_s=history.age_s + 1e6)
        assert torch.equal(model(changed), out) == (kind not in parts)


@pytest.mark.parametrize("kind", ["latent", "raw"])
def test_rows_without_history_get_the_learnt_default(kind):
    model, batch = build(kind=kind), make_batch()
    is_missing = ~batch.histories[kind].mask.any(1)[batch.histories[kind].row]
    assert 0 < int(is_missing.sum()) < 12
    before = model(batch)
    model.histories.encoder(kind).missing.data.add_(1.0)
    is_same = torch.isclose(model(batch), before).all(1)
    assert torch.equal(is_same, ~is_missing)


def test_a_batch_in_which_nobody_has_a_history_trains():
    model, batch = build(kind="latent"), make_batch(lengths=(0, 0, 0))
    model(batch).sum().backward()
    assert bool(model.histories.encoder("latent").missing.grad.any())
    for parameter in model.parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def test_latents_take_a_prefix():
    model, batch = build(kind="latent", latent_dim=2), make_batch()
    history = batch.histories["latent"]
    changed = history.latents.clone()
    changed[..., 2:] += 1.0
    assert torch.equal(model(batch), model(with_history(batch, "latent", latents=changed)))
    changed[..., :2] += 1.0
    assert not torch.equal(model(batch), model(with_history(batch, "latent", latents=changed)))


@pytest.mark.parametrize("kind", ["latent", "raw"])
@pytest.mark.parametrize("encoder", [AttentionConfig(has_mean=False), PoolConfig(kind="sum")])
def test_row_order_changes_nothing(kind, encoder):
    model, batch = build(kind=kind, encoder=encoder), make_batch()
    order = torch.randperm(12)
    torch.testing.assert_close(model(take_rows(batch, order)), model(batch)[order])


def test_the_label_and_the_teacher_are_not_read():
    batch = make_batch()
    other = replace(batch, label=1 - batch.label, teacher_prob=None)
    for kind in ("none", "latent", "raw", "both"):
        model = build(kind=kind)
        assert torch.equal(model(batch), model(other))


def test_raw_history_uses_the_tables_of_the_candidate():
    model, batch = build(kind="raw"), make_batch()
    model(batch).sum().backward()
    table = model.features.embeddings
    start = int(table.offsets(["item"])[0])
    raw = batch.histories["raw"]
    read = raw.row.unique()
    seen = set(raw.item_ids[read, :, 0][raw.mask[read]].tolist())
    assert all(bool(table.weight.grad[start + i].any()) for i in seen)
    assert build(kind="raw", event_dim=7).histories.inputs[0].events.out_dim == 7
    assert build(kind="raw", fields=("category",)).histories.inputs[0].events.out_dim == 3


def test_unfit_configs_are_errors():
    with pytest.raises(ConfigError, match="raw history"):
        build_vm(DnnConfig(history=histories("raw")), SCHEMA)
    with pytest.raises(ConfigError, match="reads_teacher_latent needs"):
        build_vm(DnnConfig(reads_teacher_latent=True), SCHEMA)
    batch = make_batch()
    short = with_history(batch, "latent", latents=batch.histories["latent"].latents[..., :3])
    model = build(kind="latent")
    with pytest.raises(ShapeError, match="6 numbers"):
        model(short)


def test_the_rows_own_latent_is_read_where_it_is_asked_for():
    config = DnnConfig(reads_teacher_latent=True)
    model, batch = build_vm(config, SCHEMA, (), LATENT_DIM), make_batch()
    batch.teacher_latent.requires_grad_()
    out = model(batch)
    out.sum().backward()
    assert batch.teacher_latent.grad is None
    other = replace(batch, teacher_latent=batch.teacher_latent.detach() + 1)
    assert not torch.equal(model(other), out)
    plain = build(kind="both")
    assert torch.equal(plain(other), plain(batch))
    for latent in (None, batch.teacher_latent[:, :3]):
        with pytest.raises(ShapeError, match="live FM"):
            model(replace(batch, teacher_latent=latent))
