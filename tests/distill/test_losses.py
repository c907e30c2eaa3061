import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from loopfm_ray.distill.losses import bce, kd_bce, normalise, weighted_bce_sum
from loopfm_ray.errors import ShapeError


def test_known_values():
    logit, weight = torch.tensor([0.0, 0.0]), torch.ones(2)
    assert bce(logit, torch.tensor([1.0, 0.0]), weight).item() == pytest.approx(math.log(2))
    # sigmoid(log 3) = 3/4, against a teacher of 1/2
    loss = kd_bce(torch.tensor([math.log(3)]), torch.tensor([0.5]), torch.ones(1))
    assert loss.item() == pytest.approx(-0.5 * math.log(0.75) - 0.5 * math.log(0.25))


def test_equals_torch_with_unit_weights():
    torch.manual_seed(0)
    logit, label = torch.randn(50) * 5, torch.rand(50)
    expected = binary_cross_entropy_with_logits(logit, label)
    torch.testing.assert_close(bce(logit, label, torch.ones(50)), expected)


def test_a_row_of_weight_zero_is_as_if_absent():
    logit = torch.tensor([0.3, math.nan, -1.0], requires_grad=True)
    label, weight = torch.tensor([1.0, math.nan, 0.0]), torch.tensor([2.0, 0.0, 1.0])
    loss = bce(logit, label, weight)
    kept = torch.tensor([0.3, -1.0])
    torch.testing.assert_close(loss, bce(kept, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0])))
    loss.backward()
    assert logit.grad[1] == 0
    assert bool(torch.isfinite(logit.grad).all())


def test_no_weight_gives_zero():
    logit = torch.tensor([1.0], requires_grad=True)
    loss = kd_bce(logit, torch.tensor([0.5]), torch.zeros(1))
    loss.backward()
    assert loss.item() == 0
    assert logit.grad.item() == 0


def test_the_teacher_takes_no_gradient():
    teacher = torch.tensor([0.5], requires_grad=True)
    kd_bce(torch.tensor([1.0], requires_grad=True), teacher, torch.ones(1)).backward()
    assert teacher.grad is None


def test_the_gradient_is_probability_minus_target():
    logit = torch.tensor([0.7, -0.2], requires_grad=True)
    bce(logit, torch.tensor([1.0, 0.0]), torch.ones(2)).backward()
    expected = (torch.sigmoid(logit.detach()) - torch.tensor([1.0, 0.0])) / 2
    torch.testing.assert_close(logit.grad, expected)


def test_uneven_shards_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    x, label = torch.randn(10, 3), torch.randint(0, 2, (10,)).float()

    def gradient(rows, global_rows, world_size):
        w = torch.ones(3, requires_grad=True)
        total, _ = weighted_bce_sum(x[rows] @ w, label[rows], torch.ones(len(rows)))
        normalise(total, global_rows, world_size).backward()
        return w.grad

    whole = gradient(range(10), 10, 1)
    shards = [range(0), range(3), range(3, 10)]
    mean = sum(gradient(list(rows), 10, 3) for rows in shards) / 3
    torch.testing.assert_close(mean, whole)


def test_lengths_must_match():
    with pytest.raises(ShapeError):
        bce(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ShapeError):
        bce(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))
