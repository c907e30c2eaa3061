"""The best scores of each row are those of `topk`, whatever their distribution."""

import pytest
import torch

from loopfm_ray.kge.best import best_columns


@pytest.mark.parametrize("width", [40, 700, 1501])
@pytest.mark.parametrize("num", [1, 4, 16, 33])
@pytest.mark.parametrize("kind", ["normal", "rising", "falling", "periodic", "ties", "alike"])
def test_the_best_are_those_of_topk(width, num, kind):
    torch.manual_seed(0)
    scores = {
        "normal": torch.randn(9, width),
        "rising": torch.arange(9.0 * width).view(9, width),
        "falling": -torch.arange(9.0 * width).view(9, width),
        # what the sample sees is the worst, or the best: too few or too many reach the bound
        "periodic": torch.randn(9, width) + 9.0 * (torch.arange(width) % max(1, num // 4) == 0),
        "ties": torch.randint(0, 4, (9, width)).float(),
        "alike": torch.zeros(9, width),
    }[kind]
    found = best_columns(scores, num)
    assert all(len(set(row)) == num for row in found.tolist())
    torch.testing.assert_close(scores.gather(1, found), scores.topk(num).values, rtol=0, atol=0)
