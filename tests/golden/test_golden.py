"""Numbers that must not move without a reason; `make golden` rewrites them, and the diff is reviewed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from loopfm_ray.data.config import SyntheticConfig
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.windows import plan_steps, shuffle_requests
from loopfm_ray.distill.losses import bce, kd_bce
from loopfm_ray.metrics.binary import auc, logloss, normalized_entropy
from loopfm_ray.metrics.calibration import calibration, fit_platt
from loopfm_ray.metrics.grouped import grouped_auc
from loopfm_ray.metrics.transfer import transfer_ratio_first_launch
from loopfm_ray.store.codes import CodeSpec, calibrate_scale, encode

FILE = Path(__file__).with_name("golden.json")


def losses(_):
    generator = torch.Generator().manual_seed(0)
    logit, other = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    label, weight = (other > 0).float(), torch.rand(50, generator=generator)
    return {
        "bce": float(bce(logit, label, weight)),
        "kd_bce": float(kd_bce(logit, torch.sigmoid(other), weight)),
    }


def metrics(_):
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 500).astype(float)
    logit = np.round(label + generator.normal(size=500), 1)
    prob, user = 1 / (1 + np.exp(-logit)), generator.integers(0, 40, 500)
    grouped, scaling = grouped_auc(label, logit, user), fit_platt(label, logit)
    return {
        "logloss": logloss(label, prob),
        "ne": normalized_entropy(label, prob),
        "auc": auc(label, logit),
        "gauc": grouped.value,
        "gauc_share": grouped.share,
        "calibration": calibration(label, prob),
        "platt_slope": scaling.slope,
        "platt_bias": scaling.bias,
        "transfer_ratio": transfer_ratio_first_launch(ne_vm=0.97, ne_vm_transfer=0.88, ne_fm=0.75),
    }


def codes(_):
    latents = np.tanh(np.random.default_rng(0).normal(size=(3, 6))).astype(np.float32)
    scale = calibrate_scale(latents, 4)
    return {
        "scale": [float(value) for value in scale],
        **{f"int{bits}": encode(latents, CodeSpec(bits, 6)).tobytes().hex() for bits in (2, 4, 8)},
        "int4_scaled": encode(latents, CodeSpec(4, 6, scale)).tobytes().hex(),
    }


def prepared(folder):
    manifest = prepare(SyntheticConfig(num_rows=2000, num_users=30, num_items=20), folder / "p")
    data = PreparedData.open(folder / "p")
    rows = read_rows(data.examples.files())
    weight = np.arange(1, len(rows["user"]) + 1)
    numbers = {
        name: float((values * weight).sum() / weight.sum())
        for name, values in sorted(rows.items())
        if values.ndim == 1 and name not in ("event_ts", "label_ts")
    }
    return {
        **numbers,
        "num_rows": manifest.num_rows,
        "num_events": data.manifest.meta["num_events"],
    }


def order(_):
    rows = {
        "user": np.repeat([3, 1, 2], 20),
        "event_ts": np.repeat([5, 5, 6], 20),
        "example_id": np.arange(60),
    }
    shuffled = shuffle_requests(rows, np.random.default_rng([1, 2, 3]))
    return {"first": shuffled[:20].tolist(), "steps": plan_steps((70, 64), 20).sizes(0).tolist()}


PARTS = {function.__name__: function for function in (losses, metrics, codes, prepared, order)}


@pytest.mark.parametrize("name", PARTS)
def test_numbers_did_not_move(name, tmp_path, request):
    found = PARTS[name](tmp_path)
    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if request.config.getoption("--golden-rewrite"):
        golden[name] = found
        FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    assert set(found) == set(golden[name])
    for key, value in golden[name].items():
        assert found[key] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-7)
        ), key
