"""One suite for every entry of the model registries; an entry without a row here fails."""

import copy

import pytest
import torch

from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.autoint import AutoIntConfig
from loopfm_ray.models.bottleneck import BottleneckConfig
from loopfm_ray.models.dcnv2 import DcnV2Config
from loopfm_ray.models.deepfm import DeepFmConfig
from loopfm_ray.models.din import DinConfig
from loopfm_ray.models.dlrm import DlrmConfig
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.finalmlp import FinalMlpConfig
from loopfm_ray.models.foundation import FmConfig
from loopfm_ray.models.histories import (
    AttentionConfig,
    DinUnitConfig,
    GruConfig,
    HstuConfig,
    PoolConfig,
    TransformerConfig,
)
from loopfm_ray.models.history_inputs import HistoryInputs
from loopfm_ray.models.registry import BOTTLENECKS, ENCODERS, FMS, VMS, read_vm_config
from loopfm_ray.train.trained import TrainedVm, load_trained_vm, save_trained_vm
from tests.model_inputs import BARE_SCHEMA, ITEM_FIELDS, LATENT_DIM, SCHEMA, histories, make_batch

FM_ROWS = {"fm": FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5))}
VM_ROWS = {
    "autoint": AutoIntConfig(embed_dim=3, head_dim=4, hidden=(6,), history=histories("both")),
    "dcnv2": DcnV2Config(embed_dim=3, hidden=(6,), history=histories("both")),
    "deepfm": DeepFmConfig(embed_dim=3, hidden=(6,), history=histories("both")),
    "din": DinConfig(embed_dim=3, hidden=(6,), history=histories("both")),
    "dlrm": DlrmConfig(embed_dim=3, hidden=(6,), bottom=(4,), history=histories("both")),
    "dnn": DnnConfig(embed_dim=3, hidden=(6,), history=histories("both")),
    "finalmlp": FinalMlpConfig(embed_dim=3, hidden=(6,), hidden_2=(4,), history=histories("both")),
}
BOTTLENECK_ROWS = {"matryoshka": BottleneckConfig(latent_dim=4, prefixes=(2, 4))}
ENCODER_ROWS = {
    "attention": AttentionConfig(num_heads=2, query_hidden=4),
    "augru": GruConfig(kind="augru", hidden=4),
    "din": DinUnitConfig(hidden=(6,)),
    "gru": GruConfig(kind="gru", hidden=4),
    "hstu": HstuConfig(width=6),
    "mean": PoolConfig(kind="mean"),
    "sum": PoolConfig(kind="sum"),
    "transformer": TransformerConfig(width=6),
}

MODELS = [(FMS, kind, config) for kind, config in FM_ROWS.items()] + [
    (VMS, kind, config) for kind, config in VM_ROWS.items()
]


def build(table, kind, config):
    torch.manual_seed(0)
    extra = (LATENT_DIM,) if table is VMS else ()
    return table[kind](config, SCHEMA, ITEM_FIELDS, *extra)


def logits(model, batch):
    output = model(batch)
    return output if isinstance(output, torch.Tensor) else output.logit


@pytest.mark.parametrize(
    ("table", "rows"),
    [(FMS, FM_ROWS), (VMS, VM_ROWS), (BOTTLENECKS, BOTTLENECK_ROWS), (ENCODERS, ENCODER_ROWS)],
)
def test_every_entry_has_a_row_of_its_kind(table, rows):
    assert set(table) == set(rows)
    assert all(config.kind == kind for kind, config in rows.items())
    assert all(
        type(config).model_validate(config.model_dump()) == config for config in rows.values()
    )


@pytest.mark.parametrize(("table", "kind", "config"), MODELS)
class TestModels:
    def test_gives_one_logit_per_task(self, table, kind, config):
        out = logits(build(table, kind, config), make_batch())
        assert out.shape == (12, 2)
        assert bool(torch.isfinite(out).all())

    def test_every_parameter_is_trained(self, table, kind, config):
        model = build(table, kind, config)
        logits(model, make_batch(num_rows=64)).square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert without == []

    def test_one_step_against_the_gradient_lowers_the_loss(self, table, kind, config):
        model, batch = build(table, kind, config), make_batch(num_rows=64)
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        loss = bce(logits(model, batch), batch.label)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        assert bce(logits(model, batch), batch.label) < loss

    def test_unknown_ids_are_scored(self, table, kind, config):
        batch = make_batch()
        batch.ids.zero_()
        assert bool(torch.isfinite(logits(build(table, kind, config), batch)).all())

    def test_same_seed_same_bits_and_state_round_trip(self, table, kind, config):
        model, other = build(table, kind, config), build(table, kind, config)
        batch = make_batch()
        assert torch.equal(logits(model, batch), logits(other, batch))
        for parameter in other.parameters():
            parameter.data.normal_()
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(logits(model, batch), logits(other, batch))

    def test_padding_changes_nothing(self, table, kind, config):
        model = build(table, kind, config)
        batch = make_batch()
        for name, history in batch.histories.items():
            wide = {"mask": False, "age_s": 0.0, "latents": 0.0, "item_ids": 0}
            wide |= {"label": 0, "event_type": 0}
            parts = {
                key: torch.cat(
                    [getattr(history, key), torch.full_like(getattr(history, key)[:, :2], fill)], 1
                )
                for key, fill in wide.items()
            }
            batch.histories[name] = type(history)(row=history.row, **parts)
        torch.testing.assert_close(logits(model, batch), logits(model, make_batch()))


def test_models_work_on_a_bare_schema():
    batch = make_batch(schema=BARE_SCHEMA)
    for table, kind, config in MODELS:
        if kind == "dlrm":  # has nothing to multiply
            continue
        if table is VMS:
            config = config.model_copy(update={"history": HistoryInputs()})
        assert logits(table[kind](config, BARE_SCHEMA), batch).shape == (12, 1)


@pytest.mark.parametrize("encoder", ENCODER_ROWS)
@pytest.mark.parametrize("kind", VM_ROWS)
class TestEveryVmWithEveryEncoder:
    def config(self, kind, encoder):
        update = {"history": histories("both", encoder=ENCODER_ROWS[encoder])}
        return VM_ROWS[kind].model_copy(update=update)

    def build(self, kind, encoder):
        return build(VMS, kind, self.config(kind, encoder))

    def test_a_few_steps_lower_the_loss(self, kind, encoder):
        model, batch = self.build(kind, encoder), make_batch(num_rows=64)
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
        for _ in range(30):
            optimizer.zero_grad()
            loss = bce(model(batch), batch.label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_it_comes_back_from_disk_with_the_same_bits(self, kind, encoder, tmp_path):
        config, model = self.config(kind, encoder), self.build(kind, encoder)
        model(make_batch(seed=5)).sum().backward()  # moves what has running averages
        assert read_vm_config(config.model_dump(mode="json")) == config
        trained = TrainedVm(
            model.eval(), config, SCHEMA, ITEM_FIELDS, LATENT_DIM, PlattScaling(), {}
        )
        save_trained_vm(tmp_path / "vm", trained, config_hash="c" * 16, inputs={}, num_rows=1)
        loaded = load_trained_vm(tmp_path / "vm")
        assert loaded.config == config
        assert torch.equal(loaded.model(make_batch()), model(make_batch()))

    @pytest.mark.parametrize("num_rows", [1, 7])
    def test_a_row_is_scored_alone_as_among_others(self, kind, encoder, num_rows):
        model = self.build(kind, encoder).eval()
        batch = make_batch(num_rows=num_rows)
        whole = model(batch)
        for index in range(num_rows):
            part = slice(index, index + 1)
            alone = type(batch)(
                ids=batch.ids[part],
                numeric=batch.numeric[part],
                sequences={name: ids[part] for name, ids in batch.sequences.items()},
                histories={
                    name: type(history)(
                        row=torch.zeros(1, dtype=torch.int64),
                        **{
                            key: getattr(history, key)[history.row[part]]
                            for key in ("mask", "age_s", "latents", "item_ids")
                        },
                    )
                    for name, history in batch.histories.items()
                },
                label=batch.label[part],
            )
            torch.testing.assert_close(model(alone), whole[part], rtol=1e-4, atol=1e-5)

    def test_unknown_ids_and_empty_histories_are_scored_and_trained(self, kind, encoder):
        model, batch = self.build(kind, encoder), make_batch(lengths=(0, 0))
        batch.ids.zero_()
        for ids in batch.sequences.values():
            ids.zero_()
        out = model(batch)
        out.sum().backward()
        assert bool(torch.isfinite(out).all())
        for parameter in model.parameters():
            assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("kind", ENCODER_ROWS)
def test_encoders_have_the_width_they_say(kind):
    encoder = ENCODERS[kind](ENCODER_ROWS[kind], 5, LATENT_DIM)
    history = make_batch().histories["latent"]
    assert encoder(torch.randn(12, 5), history.latents, history).shape == (12, encoder.out_dim)


@pytest.mark.parametrize("kind", BOTTLENECK_ROWS)
def test_bottlenecks_encode_into_the_range_and_back(kind):
    config = BOTTLENECK_ROWS[kind]
    bottleneck = BOTTLENECKS[kind](config, 9)
    latent = bottleneck.encode(torch.randn(20, 9) * 10)
    assert latent.shape == (20, config.latent_dim)
    assert bool((latent.abs() <= 1).all())
    for prefix in config.prefixes:
        assert bottleneck.decode(latent, prefix).shape == (20, 9)
