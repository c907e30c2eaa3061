"""Each architecture against its published equation, written out in loops."""

import pytest
import torch

from loopfm_ray.errors import ConfigError
from loopfm_ray.models.activations import Dice, build_activation
from loopfm_ray.models.autoint import AutoIntConfig, FieldAttention
from loopfm_ray.models.dcnv2 import CrossExperts, DcnV2Config, FullCrossNet
from loopfm_ray.models.deepfm import DeepFmConfig, pairwise_products
from loopfm_ray.models.din import DinConfig
from loopfm_ray.models.dlrm import DlrmConfig
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.finalmlp import BilinearFusion, FinalMlpConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import FieldTokens, VmInputs, VmWidths
from tests.model_inputs import (
    BARE_SCHEMA,
    ITEM_FIELDS,
    LATENT_DIM,
    NUMERIC_SCHEMA,
    SCHEMA,
    histories,
    make_batch,
)


def build(config):
    torch.manual_seed(0)
    model = build_vm(config, SCHEMA, ITEM_FIELDS, LATENT_DIM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def inputs_of(model, batch):
    parts = model.features.split(batch)
    history = model.histories(parts.flat(), batch, model.features.embeddings)
    return VmInputs(batch, parts.embedded, parts.numeric, history)


def first_order(model, batch):
    """[B, T]: one weight for each id, the mean over a sequence, and one for each number."""
    linear, numbers = model.tower.linear, model.tower.numbers
    out = batch.numeric @ numbers
    for column, field in enumerate(SCHEMA.categorical):
        out = out + linear.embeddings.table(field.name)[batch.ids[:, column]]
    for row in range(len(batch)):
        known = [i for i in batch.sequences["tags"][row].tolist() if i]
        if known:
            out[row] = out[row] + linear.embeddings.table("tags")[known].mean(0)
    return out


def test_deepfm_is_first_order_plus_pairs_plus_mlp():
    model = build(DeepFmConfig(embed_dim=3, hidden=(5,), history=histories("latent")))
    batch = make_batch()
    tokens = model.tower.tokens(inputs_of(model, batch))
    # 4 ids, 1 sequence, 1 number, 1 field of history
    assert tokens.shape == (12, 7, 3)
    pairs = sum((tokens[:, i] * tokens[:, j]).sum(-1) for i in range(7) for j in range(i + 1, 7))
    deep = model.tower.head(tokens.flatten(1)).logit
    expected = first_order(model, batch) + pairs[:, None] + deep
    torch.testing.assert_close(model(batch), expected)
    torch.testing.assert_close(pairwise_products(tokens)[:, 0], pairs)


def test_numbers_and_histories_become_fields():
    widths = VmWidths(SCHEMA, 3, ("a", "b"), 4)
    tokens = FieldTokens(widths, 2)
    embedded, history = torch.randn(5, 2, 3), torch.randn(5, 4)
    found = tokens(VmInputs(make_batch(5), embedded, torch.full((5, 1), 2.0), history))
    assert found.shape == (5, tokens.num_fields, 3) == (5, 5, 3)
    assert torch.equal(found[:, :2], embedded)
    torch.testing.assert_close(found[:, 2], 2 * tokens.numbers.expand(5, 3))
    torch.testing.assert_close(found[:, 3:].flatten(1), tokens.history(history))


def test_full_cross_layers_equal_their_equation():
    net, x = FullCrossNet(4, 2), torch.randn(6, 4)
    expected = x
    for layer in net.layers:
        expected = x * (expected @ layer.weight.T + layer.bias) + expected
    torch.testing.assert_close(net(x), expected)


def test_cross_experts_equal_their_equation():
    torch.manual_seed(0)
    net, x0 = CrossExperts(4, 2, rank=3, num_experts=2), torch.randn(6, 4)
    for bias in net.bias:
        bias.data.normal_()
    x = x0
    for layer in range(2):
        gate = torch.softmax(x @ net.gate[layer].weight.T, -1)
        total = torch.zeros_like(x)
        for expert in range(2):
            columns = slice(3 * expert, 3 * expert + 3)
            inner = torch.tanh(x @ net.down[layer].weight[columns].T)
            inner = torch.tanh(inner @ net.mix[layer][expert])
            found = x0 * (inner @ net.up[layer].weight[:, columns].T + net.bias[layer])
            total = total + gate[:, expert : expert + 1] * found
        x = total + x
    torch.testing.assert_close(net(x0), x)


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
@pytest.mark.parametrize(("rank", "experts"), [(None, 1), (3, 1), (3, 2)])
def test_dcnv2_puts_the_cross_layers_where_it_says(structure, rank, experts):
    model = build(
        DcnV2Config(structure=structure, cross_rank=rank, num_experts=experts, hidden=(5,))
    )
    x = inputs_of(model, make_batch()).flat()
    crossed = model.tower.cross(x)
    deep = model.tower.head(crossed if structure == "stacked" else x).logit
    extra = 0 if structure == "stacked" else crossed @ model.tower.of_cross.weight.T
    torch.testing.assert_close(model(make_batch()), deep + extra)


def test_dlrm_multiplies_all_pairs():
    model = build(
        DlrmConfig(
            embed_dim=3, bottom=(4,), hidden=(5,), history_fields=2, history=histories("raw")
        )
    )
    inputs = inputs_of(model, make_batch())
    dense = model.tower.bottom(inputs.numeric)
    assert dense.shape == (12, 3)
    of_history = model.tower.history(inputs.history).view(12, 2, 3)
    fields = [*inputs.embedded.unbind(1), dense, *of_history.unbind(1)]
    dots = [
        (fields[i] * fields[j]).sum(-1)
        for i in range(len(fields))
        for j in range(i + 1, len(fields))
    ]
    x = torch.cat([dense, torch.stack(dots, -1)], -1)
    torch.testing.assert_close(model(make_batch()), model.tower.head(x).logit)


def test_dlrm_without_anything_to_multiply_is_refused():
    with pytest.raises(ConfigError, match="two fields"):
        build_vm(DlrmConfig(), BARE_SCHEMA)
    assert build_vm(DlrmConfig(), NUMERIC_SCHEMA)(make_batch(schema=NUMERIC_SCHEMA)).shape == (
        12,
        1,
    )


def test_field_attention_equals_its_equation():
    torch.manual_seed(0)
    layer, x = FieldAttention(3, num_heads=2, head_dim=4), torch.randn(5, 6, 3)
    w_q, w_k, w_v, w_r = layer.mix.weight.chunk(4)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        query, key, value = x @ w_q[part].T, x @ w_k[part].T, x @ w_v[part].T
        found = torch.empty(5, 6, 4)
        for row in range(5):
            for m in range(6):
                weight = torch.softmax(torch.stack([query[row, m] @ k for k in key[row]]), 0)
                found[row, m] = weight @ value[row]
        heads.append(found)
    torch.testing.assert_close(layer(x), torch.relu(torch.cat(heads, -1) + x @ w_r.T))


def test_autoint_adds_attention_and_mlp():
    model = build(AutoIntConfig(embed_dim=3, head_dim=4, hidden=(5,), history=histories("both")))
    tower = model.tower
    tokens = tower.tokens(inputs_of(model, make_batch()))
    x = tower.layers[1](tower.layers[0](tokens)).flatten(1)
    expected = x @ tower.of_attention.weight.T + tower.head(tokens.flatten(1)).logit
    torch.testing.assert_close(model(make_batch()), expected)


@pytest.mark.parametrize("heads", [1, 2])
def test_bilinear_fusion_equals_its_equation(heads):
    torch.manual_seed(0)
    fusion, x, y = BilinearFusion(4, 6, 2, heads), torch.randn(5, 4), torch.randn(5, 6)
    expected = fusion.first(x) + fusion.second(y)
    for head in range(heads):
        a, b = x.chunk(heads, 1)[head], y.chunk(heads, 1)[head]
        for task in range(2):
            crossed = ((a @ fusion.weight[task, head]) * b).sum(-1)
            expected[:, task] = expected[:, task] + crossed
    torch.testing.assert_close(fusion(x, y), expected)


def test_finalmlp_gates_follow_the_fields_that_are_named():
    config = FinalMlpConfig(
        hidden=(6, 4), hidden_2=(4,), gate_hidden=3, gate_fields=("user",), num_heads=2
    )
    model, batch = build(config), make_batch()
    inputs = inputs_of(model, batch)
    gate = model.tower.gate_1
    user = inputs.embedded[:, model.features.names.index("user")]
    by_hand = 2 * torch.sigmoid(gate.out(torch.relu(gate.mlp.layers[0](user)))) * inputs.flat()
    torch.testing.assert_close(gate(inputs, inputs.flat()), by_hand)
    learnt = model.tower.gate_2(inputs, torch.ones_like(inputs.flat()))
    assert torch.equal(learnt[0], learnt[5])
    one = model.tower.stream_1(by_hand)
    other = model.tower.stream_2(model.tower.gate_2(inputs, inputs.flat()))
    torch.testing.assert_close(model(batch), model.tower.fusion(one, other))


def test_unfit_configs_are_refused():
    with pytest.raises(ValueError, match="cross_rank"):
        DcnV2Config(num_experts=2)
    with pytest.raises(ValueError, match="multiples of num_heads 3"):
        FinalMlpConfig(num_heads=3)
    with pytest.raises(ConfigError, match="gate fields"):
        build_vm(FinalMlpConfig(gate_fields=("nothing",)), SCHEMA)


def test_din_bends_with_the_data():
    model = build(DinConfig(hidden=(5,)))
    batch, other = make_batch(), make_batch(seed=3)
    whole = torch.cat([batch.ids, other.ids])
    assert whole.shape == (24, 4)
    before = model.eval()(batch)
    model.train()(other)
    # what it saw while training moved its averages
    assert not torch.allclose(model.eval()(batch), before)
    still = build(DinConfig(hidden=(5,), activation="prelu"))
    before = still.eval()(batch)
    still.train()(other)
    assert torch.equal(still.eval()(batch), before)


def test_dice_equals_its_equation_and_leaves_padding_out():
    dice = Dice(2, momentum=0.25)
    dice.slope.data = torch.tensor([0.5, -1.0])
    x = torch.tensor([[1.0, 2.0], [3.0, -2.0], [5.0, 0.0], [100.0, -100.0]])
    mask = torch.tensor([True, True, True, False])
    found = dice(x, mask)
    mean, var = x[:3].mean(0), x[:3].var(0, unbiased=False)
    share = torch.sigmoid((x - mean) / var.sqrt())
    expected = share * x + (1 - share) * dice.slope * x
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dice.running_mean, 0.25 * mean)
    torch.testing.assert_close(dice.running_var, 0.75 + 0.25 * var)
    share = torch.sigmoid((x - dice.running_mean) / dice.running_var.sqrt())
    torch.testing.assert_close(dice.eval()(x), share * x + (1 - share) * dice.slope * x)


def test_dice_without_rows_falls_back_to_its_averages():
    dice = Dice(2)
    x = torch.randn(3, 2)
    found = dice(x, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(found, dice.eval()(x))
    assert torch.equal(dice.running_mean, torch.zeros(2))


def test_prelu_and_relu():
    x = torch.tensor([[-2.0, 4.0]])
    assert build_activation("prelu", 2)(x).tolist() == [[-0.5, 4.0]]
    assert build_activation("relu", 2)(x).tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize(
    "config", [DnnConfig(hidden=(5, 4)), FinalMlpConfig(hidden=(5, 4)), DlrmConfig(hidden=(5, 4))]
)
def test_hidden_layers_have_names(config):
    model = build(config)
    out = model.forward_all(make_batch())
    assert {name: layer.shape for name, layer in out.layers.items()} == {
        "hidden_0": (12, 5),
        "hidden_1": (12, 4),
    }
    assert model.layer_dim("hidden_1") == 4
    with pytest.raises(ConfigError, match="no layer 'hidden_9'"):
        model.layer_dim("hidden_9")
