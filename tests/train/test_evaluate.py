import numpy as np
import pytest
import torch

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import auc, normalized_entropy
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.train.evaluate import Predictions, binary_metrics, predict
from tests.model_inputs import SCHEMA, make_batch


def test_predictions_are_in_row_order_and_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = build_vm(DnnConfig(dropout=0.5), SCHEMA).train()
    pairs = [(np.full(12, user), make_batch(seed=user)) for user in range(3)]
    result = predict(model, pairs)
    assert model.training
    model.eval()
    expected = torch.cat([model(batch)[:, 0] for _, batch in pairs])
    np.testing.assert_array_equal(result.logit, expected.detach().numpy())
    assert result.user.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert len(result.label) == 36
    np.testing.assert_allclose(result.prob, torch.sigmoid(expected).detach(), rtol=1e-6)


def test_metrics_have_the_keys_of_a_summary():
    rng = np.random.default_rng(0)
    p = Predictions(rng.normal(size=200), rng.integers(0, 2, 200), rng.integers(0, 9, 200))
    metrics = binary_metrics(p)
    assert set(metrics) == {"ne", "auc", "gauc", "gauc_share", "logloss", "calibration"}
    assert metrics["auc"] == auc(p.label, p.logit)
    assert metrics["ne"] == pytest.approx(normalized_entropy(p.label, p.prob))
    assert metrics["gauc_share"] == 1.0


def test_no_user_with_both_labels_leaves_gauc_out():
    p = Predictions(np.array([1.0, 0.0]), np.array([1, 0]), np.array([0, 1]))
    metrics = binary_metrics(p)
    assert "gauc" not in metrics
    assert metrics["gauc_share"] == 0.0


def test_no_rows_or_one_class_is_an_error():
    model = build_vm(DnnConfig(), SCHEMA)
    with pytest.raises(MetricError, match="no rows"):
        predict(model, [])
    with pytest.raises(MetricError):
        binary_metrics(Predictions(np.zeros(2), np.ones(2), np.zeros(2, int)))
