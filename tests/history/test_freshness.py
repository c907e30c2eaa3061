import numpy as np
import pytest

from loopfm_ray.history.freshness import Freshness, FreshnessConfig, decide, freshness, measure
from loopfm_ray.history.join import write_joined
from tests.oracles import worlds


def test_coverage_by_age_and_quantiles_by_hand():
    found = measure(4, np.array([1_000_000, 2_000_000, 9_000_000]), (1.0, 5.0))
    assert found == Freshness(4, 0.75, ((1.0, 0.25), (5.0, 0.5)), 2.0, 9.0)
    none = measure(0, np.array([], dtype=np.int64), (1.0,))
    assert none == Freshness(0, 0.0, ((1.0, 0.0),), None, None)


def test_a_joined_version_agrees_with_the_meta_of_its_join(tmp_path):
    examples = worlds.make_examples()
    worlds.write_prepared(tmp_path / "prepared", examples)
    worlds.write_latents(tmp_path / "latents", examples)
    manifest = write_joined(
        tmp_path / "prepared",
        tmp_path / "latents",
        tmp_path / "joined",
        worlds.REQUESTS,
        worlds.SETTINGS,
    )
    found = freshness(tmp_path / "joined", FreshnessConfig())
    assert found.num_requests == manifest.num_rows
    assert found.coverage == pytest.approx(manifest.meta["coverage"])
    for name in ("p50", "p90"):
        assert getattr(found, f"{name}_s") == pytest.approx(
            manifest.meta["staleness_s"][name], rel=0.05
        )


def test_alarms_only_beyond_the_thresholds():
    found = Freshness(10, 0.5, (), 1.0, 100.0)
    assert decide(found, FreshnessConfig(min_coverage=0.5, max_p90_s=100.0)) == ()
    alarms = decide(found, FreshnessConfig(min_coverage=0.51, max_p90_s=99.0))
    assert ["coverage" in alarms[0], "newest events" in alarms[1]] == [True, True]
