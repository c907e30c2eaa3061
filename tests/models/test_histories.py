"""History encoders: what holds for all, and each against its slow twin."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import ConfigError, ShapeError
from loopfm_ray.models.ages import age_features
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.histories import (
    AttentionConfig,
    DinUnitConfig,
    GruConfig,
    HstuConfig,
    PoolConfig,
    TransformerConfig,
    build_encoder,
)
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    LatentHistoryConfig,
    RawHistoryConfig,
    SideConfig,
    StoredWidths,
    build_history_reader,
    newest_events,
)
from loopfm_ray.models.hstu import _bucket
from tests.model_inputs import LATENT_DIM, make_batch, make_history
from tests.oracles import sequences

QUERY_DIM = 5
ENCODERS = {
    "attention": AttentionConfig(num_heads=2, query_hidden=4),
    "attention_alone": AttentionConfig(num_heads=2, query_hidden=4, has_mean=False),
    "mean": PoolConfig(kind="mean"),
    "sum": PoolConfig(kind="sum", hidden=7),
    "din": DinUnitConfig(hidden=(8, 6)),
    "din_softmax": DinUnitConfig(hidden=(8,), has_softmax=True),
    "din_dice": DinUnitConfig(hidden=(8,), activation="dice"),
    "gru": GruConfig(kind="gru", hidden=4),
    "augru": GruConfig(kind="augru", hidden=4),
    "transformer": TransformerConfig(width=8, num_heads=2, num_layers=2),
    "hstu": HstuConfig(width=8, num_heads=2, num_layers=2),
}
ORDERED = ("gru", "augru", "hstu")


def make(name, value_dim=LATENT_DIM):
    torch.manual_seed(0)
    encoder = build_encoder(ENCODERS[name], QUERY_DIM, value_dim)
    encoder.missing.data.normal_()
    for key, parameter in encoder.named_parameters():
        if key.endswith(("by_order", "by_time")):  # they begin at 0
            parameter.data.normal_()
    return encoder


def case(row, lengths, seed=0):
    history = make_history(row, lengths, seed)
    query = torch.randn(len(row), QUERY_DIM, generator=torch.Generator().manual_seed(seed))
    return query, history.latents, history


def run(encoder, query, values, history):
    return encoder(query, values, history)


def padded(history, values, extra=3):
    """The same events with more padding, whose values are anything finite."""
    num = len(values)
    wide = torch.cat([values, torch.full((num, extra, values.shape[-1]), 7.0)], 1)
    mask = torch.cat([history.mask, torch.zeros(num, extra, dtype=torch.bool)], 1)
    age_s = torch.cat([history.age_s, torch.full((num, extra), 1e5)], 1)
    return replace(history, mask=mask, age_s=age_s), wide


cases = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 1000),
).map(
    lambda drawn: (
        torch.randint(
            0, len(drawn[0]), (drawn[1],), generator=torch.Generator().manual_seed(drawn[2])
        ).tolist(),
        drawn[0],
        drawn[2],
    )
)


@pytest.mark.parametrize("name", ENCODERS)
@settings(deadline=None, max_examples=25)
@given(drawn=cases)
def test_padding_changes_nothing(name, drawn):
    encoder, (query, values, history) = make(name), case(*drawn)
    wide_history, wide = padded(history, values)
    torch.testing.assert_close(
        run(encoder, query, wide, wide_history),
        run(encoder, query, values, history),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ORDERED])
@settings(deadline=None, max_examples=15)
@given(drawn=cases)
def test_the_order_of_events_with_their_ages_changes_nothing(name, drawn):
    encoder, (query, values, history) = make(name), case(*drawn)
    turned, aged = values.clone(), history.age_s.clone()
    for group, length in enumerate(drawn[1]):
        turned[group, :length] = values[group, :length].flip(0)
        aged[group, :length] = history.age_s[group, :length].flip(0)
    torch.testing.assert_close(
        run(encoder, query, turned, replace(history, age_s=aged)),
        run(encoder, query, values, history),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ORDERED)
def test_recurrent_encoders_follow_the_order(name):
    encoder, (query, values, history) = make(name), case([0, 0], [4])
    assert not torch.allclose(
        run(encoder, query, values.flip(1), history), run(encoder, query, values, history)
    )


@pytest.mark.parametrize("name", ENCODERS)
@settings(deadline=None, max_examples=15)
@given(drawn=cases)
def test_shared_histories_equal_histories_of_ones_own(name, drawn):
    encoder, (query, values, history) = make(name), case(*drawn)
    own = replace(
        history,
        row=torch.arange(len(query)),
        mask=history.mask[history.row],
        age_s=history.age_s[history.row],
    )
    torch.testing.assert_close(
        run(encoder, query, values[history.row], own),
        run(encoder, query, values, history),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_an_empty_history_gives_the_learnt_default_and_finite_gradients(name):
    encoder, (query, values, history) = make(name), case([0, 1, 1, 2], [0, 3, 0])
    out = run(encoder, query, values, history)
    for index in (0, 3):
        assert torch.equal(out[index, :-1], encoder.missing)
        assert out[index, -1] == 0
    out.square().sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key
    assert bool(encoder.missing.grad.any())
    nobody = run(encoder, query, *case([0, 1, 1, 2], [0, 0, 0])[1:])
    assert torch.equal(nobody[:, :-1], encoder.missing.expand(4, -1))


TWINS = {
    "din": sequences.din,
    "din_softmax": sequences.din,
    "gru": sequences.gru,
    "augru": sequences.augru,
}


@pytest.mark.parametrize("name", TWINS)
@settings(deadline=None, max_examples=15)
@given(drawn=cases)
def test_encoders_equal_their_slow_twins(name, drawn):
    body, (query, values, history) = make(name).body, case(*drawn)
    has_events = history.mask.any(1)[history.row]
    found = body(query, values, history)[has_events]
    expected = TWINS[name](body, query, values, history)[has_events]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_transformer_block_equals_its_slow_twin():
    body = make("transformer").body
    history = make_history([0], [4], length=6)
    x = torch.randn(1, 6, 8)
    bias = torch.where(history.mask, 0.0, -1e4)[:, None, None]
    found = body.blocks[0](x, bias)[0, :4]
    expected = torch.stack(sequences.self_attention(body.blocks[0], list(x[0, :4])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("length", "chunk"), [(6, None), (11, 4)])
def test_an_hstu_layer_equals_its_slow_twin(monkeypatch, length, chunk):
    if chunk is not None:
        monkeypatch.setattr("loopfm_ray.models.hstu._CHUNK", chunk)
    layer = make("hstu").body.layers[1]
    lengths = [length - 2, 3, 0, length]
    history = make_history([0], lengths, length=length)
    x = torch.randn(len(lengths), length, 8, requires_grad=True)
    found = layer(x, history.age_s, history.mask)
    for group, num in enumerate(lengths):
        if num:
            events, ages = list(x[group, :num]), history.age_s[group, :num].tolist()
            expected = torch.stack(sequences.hstu(layer, events, ages))
            torch.testing.assert_close(found[group, :num], expected, rtol=1e-4, atol=1e-5)
            of_found = torch.autograd.grad(found[group, :num].sum(), x, retain_graph=True)
            of_expected = torch.autograd.grad(expected.sum(), x)
            torch.testing.assert_close(of_found, of_expected, rtol=1e-3, atol=1e-5)


def test_an_event_of_an_hstu_layer_does_not_see_those_after_it():
    layer, history = make("hstu").body.layers[0], make_history([0], [7])
    x = torch.randn(1, 7, 8)
    later = x.clone()
    later[0, 4:] = torch.randn(3, 8)
    before, after = (layer(one, history.age_s, history.mask) for one in (x, later))
    assert torch.equal(before[0, :4], after[0, :4])
    assert not torch.isclose(before[0, 4:], after[0, 4:]).all(-1).any()


def test_distances_fall_into_powers_of_two():
    distance = torch.tensor([0.0, 1.0, 2.0, 3.0, 6.0, 7.0, 14.0, 15.0, 86_400.0, 1e12])
    assert _bucket(distance).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 16, 31]


@pytest.mark.parametrize("name", ["mean", "sum", "gru"])
def test_blind_encoders_do_not_read_the_query(name):
    encoder, (query, values, history) = make(name), case([0, 1], [2, 3])
    assert torch.equal(
        run(encoder, query + 1, values, history), run(encoder, query, values, history)
    )


def reader(embeddings=None, **histories):
    torch.manual_seed(0)
    embeddings = embeddings or FieldEmbeddings({"item": 11, "category": 4}, 3)
    stored = StoredWidths(("item", "category"), LATENT_DIM)
    built = build_history_reader(HistoryInputs.of(**histories), embeddings, QUERY_DIM, stored)
    return built, embeddings


def read(built, batch, query=None):
    module, embeddings = built
    query = torch.ones(len(batch), QUERY_DIM) if query is None else query
    return module(query, batch, embeddings)


@pytest.mark.parametrize("name", ENCODERS)
def test_events_older_than_max_len_change_nothing(name):
    encoder = ENCODERS[name]
    built = reader(user=LatentHistoryConfig(encoder=encoder, max_len=2, side=SideConfig(age=True)))
    batch = make_batch(lengths=(3, 0, 5, 1))
    before = read(built, batch)
    history = batch.histories["latent"]
    latents, age_s = history.latents.clone(), history.age_s.clone()
    latents[0, :1], latents[2, :3] = 9.0, 9.0
    age_s[0, :1], age_s[2, :3] = 9e9, 9e9
    batch.histories["latent"] = replace(history, latents=latents, age_s=age_s)
    assert torch.equal(read(built, batch), before)


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), max_len=st.integers(1, 7))
def test_cutting_keeps_the_newest(lengths, max_len):
    history = make_history(list(range(len(lengths))), lengths)
    cut = newest_events(history, max_len)
    for group, length in enumerate(lengths):
        kept = slice(max(length - max_len, 0), length)
        mask = cut.mask[group]
        assert int(mask.sum()) == min(length, max_len)
        for name in ("age_s", "latents", "item_ids", "label", "event_type"):
            whole, part = getattr(history, name)[group], getattr(cut, name)[group]
            assert torch.equal(part[mask], whole[kept])


def test_no_gradient_reaches_stored_latents():
    for name in ENCODERS:
        built = reader(user=LatentHistoryConfig(encoder=ENCODERS[name]))
        batch = make_batch()
        batch.histories["latent"].latents.requires_grad_()
        read(built, batch).sum().backward()
        assert batch.histories["latent"].latents.grad is None


def test_side_information_is_read_where_it_is_asked_for():
    side = {
        "age": SideConfig(age=True),
        "label": SideConfig(label=True),
        "event_type": SideConfig(num_event_types=3),
    }
    changes = {"age": "age_s", "label": "label", "event_type": "event_type"}
    pool = PoolConfig()
    for asked, config in side.items():
        built = reader(user=LatentHistoryConfig(encoder=pool, side=config))
        assert built[0].encoder("user").out_dim == LATENT_DIM + config.width + 1
        for name, part in changes.items():
            batch = make_batch()
            before = read(built, batch)
            history = batch.histories["latent"]
            values = getattr(history, part)
            changed = values + 1e6 if name == "age" else (values + 1) % 3
            batch.histories["latent"] = replace(history, **{part: changed})
            assert torch.equal(read(built, batch), before) == (name != asked)


def test_event_types_that_are_not_known_are_id_0():
    built = reader(user=LatentHistoryConfig(side=SideConfig(num_event_types=2)))
    batch = make_batch()
    history = batch.histories["latent"]
    late = replace(history, event_type=torch.full_like(history.event_type, 99))
    none = replace(history, event_type=torch.zeros_like(history.event_type))
    batch.histories["latent"] = late
    first = read(built, batch)
    batch.histories["latent"] = none
    assert torch.equal(read(built, batch), first)


def test_side_information_that_is_not_there_is_an_error():
    built = reader(user=LatentHistoryConfig(side=SideConfig(label=True)))
    batch = make_batch()
    batch.histories["latent"] = replace(batch.histories["latent"], label=None)
    with pytest.raises(ShapeError, match="no 'label'"):
        read(built, batch)


def test_several_histories_are_read_together_whatever_their_order_in_the_file():
    configs = {
        "user": LatentHistoryConfig(),
        "item": LatentHistoryConfig(key=("item",), encoder=PoolConfig(), in_query=True),
        "own": RawHistoryConfig(event_dim=4),
    }
    batch = make_batch()
    built = reader(**configs)
    turned = reader(**dict(reversed(configs.items())))
    out = read(built, batch)
    assert torch.equal(read(turned, batch), out)
    assert built[0].names == ("item", "own", "user")
    widths = [built[0].encoder(name).out_dim for name in built[0].names]
    assert out.shape == (12, sum(widths))
    # the item's history is part of what the others are asked with, and of nothing else
    of_item = batch.histories["latent_by_item"]
    batch.histories["latent_by_item"] = replace(of_item, latents=of_item.latents * -2)
    parts = zip(read(built, batch).split(widths, 1), out.split(widths, 1), strict=True)
    assert [torch.equal(a, b) for a, b in parts] == [False, False, False]
    apart = {**configs, "item": LatentHistoryConfig(key=("item",), encoder=PoolConfig())}
    built = reader(**apart)
    changed = read(built, batch)
    batch.histories["latent_by_item"] = of_item
    parts = zip(changed.split(widths, 1), read(built, batch).split(widths, 1), strict=True)
    assert [torch.equal(a, b) for a, b in parts] == [False, True, True]


def test_names_of_sources_follow_the_key():
    assert LatentHistoryConfig().source == "latent"
    assert LatentHistoryConfig(key=("item",)).source == "latent_by_item"
    assert LatentHistoryConfig(key=("user", "category")).source == "latent_by_user_category"
    made = HistoryInputs.of(
        a=LatentHistoryConfig(side=SideConfig(label=True)),
        b=LatentHistoryConfig(side=SideConfig(num_event_types=4)),
        c=RawHistoryConfig(),
    )
    assert made.sources == {"latent": ("event_type", "label"), "raw": ()}
    assert (made.kind, HistoryInputs().kind) == ("both", "none")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"user": {"kind": "latent", "encoder": {"kind": "transformer", "width": 5}}}, "multiple"),
        ({"user": {"kind": "raw", "key": ["item"]}}, "key"),
        ({"The user": {"kind": "latent"}}, "pattern"),
        ({"kind": "latent"}, "dictionary"),
        (
            {
                "a": {"kind": "latent", "side": {"num_event_types": 3}},
                "b": {"kind": "latent", "side": {"num_event_types": 4}},
            },
            "must agree",
        ),
    ],
)
def test_unfit_histories_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        HistoryInputs.model_validate(tree)


def test_a_latent_history_needs_stored_latents_that_are_wide_enough():
    embeddings = FieldEmbeddings({"item": 3}, 2)
    for config, stored, message in [
        (LatentHistoryConfig(), None, "width of the stored latents"),
        (LatentHistoryConfig(latent_dim=5), 4, "at most the stored 4"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_history_reader(
                HistoryInputs.of(user=config), embeddings, 2, StoredWidths((), stored)
            )


def test_age_features_fall_with_age():
    features = age_features(torch.tensor([[0.0, 86_400.0 * 7]]))
    assert features.shape == (1, 2, 5)
    assert features[0, 0].tolist() == [1, 0, 1, 1, 1]
    assert features[0, 1, 2].item() == pytest.approx(0.367879, abs=1e-5)
