"""A made-up summary in the shape that the pipeline writes: round numbers to test the page with, measured nowhere."""

import math
from typing import Any

__all__ = ["example_summary"]

_NE = {
    "fm": 0.8421,
    "vm": 0.9012,
    "vm_kd": 0.8891,
    "vm_loopfm": 0.8765,
    "vm_kd_loopfm": 0.8723,
    "vm_raw": 0.8842,
}
_AUC = {
    "fm": 0.7712,
    "vm": 0.7043,
    "vm_kd": 0.7168,
    "vm_loopfm": 0.7321,
    "vm_kd_loopfm": 0.7374,
    "vm_raw": 0.7237,
}
_PARAMETERS = {"fm": 6_214_337, "vm_raw": 1_214_849}
_SECONDS = {"fm": 212.4, "vm": 31.2, "vm_kd": 33.9, "vm_loopfm": 48.1, "vm_kd_loopfm": 50.6}


def example_summary(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Return a whole summary; with one seed there is no spread."""
    models = {name: _model(name, seeds) for name in _NE}
    ratio = {name: _ratio(name) for name in _NE if name not in ("fm", "vm")}
    return {
        "name": "example",
        "code_version": "0.1.0+abc1234",
        "data": {
            "kind": "complete_journey",
            "num_events": 1_469_307,
            "num_examples": 7_346_535,
            "num_users": 2_469,
            "num_items": 68_509,
        },
        "seeds": list(seeds),
        "models": models,
        "transfer_ratio": ratio,
        "transfer_ratio_kind": "first launch, baseline vm",
        "gain": {
            name: {
                "ne": _NE["vm"] - _NE[name],
                "auc": _AUC[name] - _AUC["vm"],
                "auc_relative": _AUC[name] / _AUC["vm"] - 1,
            }
            for name in _NE
            if name != "vm"
        },
        "relative_auc_gain_over_kd": _AUC["vm_kd_loopfm"] / _AUC["vm_kd"] - 1,
        "per_seed": {
            str(seed): {
                "models": {
                    name: {"test": {"ne": _NE[name] + _wave(seed, name), "auc": _AUC[name]}}
                    for name in _NE
                },
                "transfer_ratio": {name: ratio[name] + 8 * _wave(seed, name) for name in ratio},
            }
            for seed in seeds
        },
        "curves": [point for name in _NE for seed in seeds for point in _curve(name, seed)],
        "calibration_bins": {name: _bins(name) for name in _NE},
        "channel": {
            "embedding_dim": 128,
            "latent_dim": 32,
            "bits": 4,
            "variance_explained": {"latent": 0.914, "code": 0.886},
            "share_zero_codes": 0.142,
            "probe_logloss": {
                "none": 0.6931,
                "embedding": 0.5412,
                "latent": 0.5498,
                "code": 0.5503,
                "fm": 0.5307,
            },
        },
        "history": {
            "coverage": 0.963,
            "mean_length": 87.4,
            "staleness_s": {"p50": 194_400.0, "p90": 1_123_200.0},
            "coverage_by_age": {"86400": 0.317, "604800": 0.842},
            "alarms": [
                "90 % of the newest events are up to 1123200 s old, expected at most 604800 s"
            ],
        },
        "audit": {
            "num_checked": 20_000,
            "num_leaks": 0,
            "num_entries": 1_731_204,
            "margin_s": {"min": 7.0, "p1": 5_040.0, "p50": 3_456_000.0, "max": 9_590_400.0},
        },
        "parity": {"max_abs_diff": 2.4e-7, "num_requests": 200, "num_rows": 4_000},
        "scored_request": {
            "request": {
                "user": "2375",
                "items": ["845", "9911", "1029743"],
                "request_ts": "2017-12-01T00:00:00Z",
                "context": {"weekday": "4"},
            },
            "response": {
                "scores": [0.412, 0.137, 0.058],
                "model": {"name": "vm_kd_loopfm", "version": "9f2c1d7a55b0e831"},
                "features": {
                    "version": "51b7d80c1a9e2f46",
                    "snapshot_id": "c0ffee0123456789",
                    "age_s": 194_400.0,
                    "history_len": 50,
                    "degraded": False,
                    "reason": None,
                    "unknown_user": False,
                    "unknown_fields": [],
                    "default_fields": [],
                },
                "unknown_items": 0,
                "request_id": "r-1",
            },
        },
        "sizes": {
            "latents_bytes": 41_200_000,
            "bytes_per_event": 28.0,
            "online_bytes": 5_900_000,
            "joined_bytes": 152_000_000,
        },
        "seconds": {
            "prepare": 41.0,
            "train_fm": 212.4,
            "materialize": 63.1,
            "join": 22.0,
            "train_vm": 205.8,
            "publish": 3.2,
            "parity": 6.4,
        },
        "config": {
            "name": "example",
            "seeds": list(seeds),
            "data": {"kind": "complete_journey", "negatives": {"kind": "popularity"}},
            "vm": {"kind": "vm", "embed_dim": 16},
        },
    }


def _model(name: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    test = {
        "ne": _NE[name],
        "auc": _AUC[name],
        "gauc": _AUC[name] - 0.021,
        "gauc_share": 0.981,
        "logloss": 0.5 * _NE[name],
        "calibration": 1.004 if name == "fm" else 0.993,
    }
    sd = {"ne": 0.0011, "auc": 0.0009, "gauc": 0.0012, "calibration": 0.006}
    return {
        "test": test,
        "test_sd": sd if len(seeds) > 1 else {},
        "valid": test,
        "num_parameters": _PARAMETERS.get(name, 1_198_465),
        "num_bytes": 4 * _PARAMETERS.get(name, 1_198_465),
        "train_rows_per_s": 51_000.0,
        "seconds": _SECONDS.get(name, 47.7),
    }


def _ratio(name: str) -> float:
    return (_NE["vm"] - _NE[name]) / (_NE["vm"] - _NE["fm"])


def _wave(seed: int, name: str) -> float:
    return 0.0015 * math.sin(3 * seed + len(name))


def _curve(name: str, seed: int) -> list[dict[str, Any]]:
    points = []
    for step in range(0, 2001, 20):
        settled = _NE[name] + 0.11 * math.exp(-step / 350) + _wave(seed, name)
        noise = 0.004 * math.sin(step * 1.7 + seed)
        first = 0.6 * math.exp(-step / 25)
        values = {"train": settled - 0.006 + noise + first}
        if step % 200 == 0 and step:
            values["valid"] = settled + 0.004
        points += [
            {"run": name, "seed": seed, "split": split, "name": "ne", "step": step, "value": value}
            for split, value in values.items()
        ]
    return points


def _bins(name: str) -> list[dict[str, float]]:
    tilt = 0.15 * (len(name) % 4)
    return [
        {
            "mean_prediction": p,
            "mean_label": p * (1 + tilt * (0.7 - p)),
            "count": 9000 * (1 - p) ** 2,
        }
        for p in (0.04, 0.09, 0.15, 0.22, 0.31, 0.42, 0.55, 0.68)
    ]
