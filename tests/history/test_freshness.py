import tracemalloc

import numpy as np
import pytest

from loopfm_ray.history.freshness import (
    Freshness,
    FreshnessConfig,
    Published,
    decide,
    decide_published,
    freshness,
    measure,
    published,
)
from loopfm_ray.history.join import write_joined
from tests.oracles import worlds


def test_coverage_by_age_and_quantiles_by_hand():
    parts = [(1, np.array([1_000_000])), (3, np.array([2_000_000, 9_000_000]))]
    found = measure(iter(parts), (1.0, 5.0))
    assert (found.num_requests, found.coverage) == (4, 0.75)
    assert found.coverage_by_age == ((1.0, 0.25), (5.0, 0.5))
    assert (found.p50_s, found.p90_s) == pytest.approx((2.0, 9.0), rel=0.025)
    assert found.to_tree()["coverage_by_age"] == {"1": 0.25, "5": 0.5}
    none = measure([], (1.0,))
    assert none == Freshness(0, 0.0, ((1.0, 0.0),), None, None)


def test_how_requests_are_cut_into_files_changes_nothing():
    ages = np.random.default_rng(0).integers(1, 10**12, 3000)
    whole = measure([(4000, ages)], (60.0, 3600.0))
    cut = [(1000, part) for part in np.split(ages, 4)]
    assert measure(cut, (60.0, 3600.0)) == whole
    exact = np.quantile(ages, [0.5, 0.9], method="inverted_cdf") / 1e6
    assert (whole.p50_s, whole.p90_s) == pytest.approx(tuple(exact), rel=0.025)


def test_memory_does_not_grow_with_the_requests():
    def parts(num):
        rng = np.random.default_rng(0)
        for _ in range(num):
            yield 10_000, rng.integers(1, 10**12, 10_000)

    peaks = []
    for num in (4, 40):
        tracemalloc.start()
        measure(parts(num), (60.0,))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


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
    assert {"p50": found.p50_s, "p90": found.p90_s} == manifest.meta["staleness_s"]


def test_alarms_only_beyond_the_thresholds():
    found = Freshness(10, 0.5, (), 1.0, 100.0)
    assert decide(found, FreshnessConfig(min_coverage=0.5, max_p90_s=100.0)) == ()
    alarms = decide(found, FreshnessConfig(min_coverage=0.51, max_p90_s=99.0))
    assert ["coverage" in alarms[0], "newest events" in alarms[1]] == [True, True]


def test_age_of_what_is_published_is_told_from_when():
    assert published("v", 5_000_000, 7_500_000) == Published("v", 5_000_000, 2.5)
    assert published("v", 5_000_000, 0).age_s == -5.0


def test_published_alarms_only_beyond_the_limit():
    at_limit, limit = Published("v", 0, 60.0), FreshnessConfig(max_published_age_s=60.0)
    assert decide_published(at_limit, limit) == ()
    assert decide_published(at_limit, FreshnessConfig()) == ()
    assert decide_published(None, FreshnessConfig()) == ()
    assert "nothing is published" in decide_published(None, limit)[0]
    assert "end 61 s ago" in decide_published(Published("v", 0, 61.0), limit)[0]
    assert "later than now" in decide_published(Published("v", 0, -1.0), FreshnessConfig())[0]
