import pytest
import torch

from loopfm_ray.errors import ConfigError
from loopfm_ray.models.embeddings import FieldEmbeddings


def test_each_field_reads_its_own_table():
    module = FieldEmbeddings({"a": 3, "b": 2}, 4)
    out = module(torch.tensor([[2, 1], [0, 1]]), module.offsets(["a", "b"]))
    assert out.shape == (2, 8)
    assert torch.equal(out[0], torch.cat([module.table("a")[2], module.table("b")[1]]))
    swapped = module(torch.tensor([[1, 2]]), module.offsets(["b", "a"]))
    assert torch.equal(swapped[0], torch.cat([module.table("b")[1], module.table("a")[2]]))


def test_the_unknown_id_starts_at_zero_and_is_learnt_per_field():
    module = FieldEmbeddings({"a": 3, "b": 2}, 4)
    assert not bool(module.table("a")[0].any() or module.table("b")[0].any())
    assert bool(module.table("a")[1:].all())
    module(torch.tensor([[0]]), module.offsets(["b"])).sum().backward()
    assert module.weight.grad.sum(1).tolist() == [0, 0, 0, 4, 0]


def test_a_field_without_table_is_an_error():
    with pytest.raises(ConfigError, match="'c'"):
        FieldEmbeddings({"a": 3}, 4).offsets(["c"])


def test_no_fields_is_allowed():
    module = FieldEmbeddings({}, 4)
    assert module.weight.shape == (0, 4)
    assert module.offsets([]).shape == (0,)
