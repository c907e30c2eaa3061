"""Every planted leak is found; honest logs, however odd, have none."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.history import audit as module
from loopfm_ray.history.audit import audit
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.tables import code_bytes, code_column
from loopfm_ray.types import TimeRange
from tests.history import planted, planting
from tests.oracles import logs, paths, worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("audited")
    planting.make_world(root)
    return root


@pytest.fixture
def case(world, tmp_path):
    return planting.Case(world, tmp_path)


@pytest.fixture(scope="module")
def found():
    """Names of the planted leaks that were found."""
    return set()


@pytest.mark.parametrize("name", planted.PLANTS)
def test_planted_leak_is_found(case, name, found):
    message = planted.find(case, name)
    assert re.search(planted.PLANTS[name][1], message), message
    assert "do not train on this version" in message
    found.add(name)


def test_all_planted_leaks_were_found(found, request):
    ran = [item.name for item in request.session.items if "test_planted_leak_is_found" in item.name]
    if len(ran) < len(planted.PLANTS):
        pytest.skip("runs with the rest of this file")
    print(f"{len(found)} of {len(planted.PLANTS)} planted leaks found")  # noqa: T201
    assert len(found) == len(planted.PLANTS) >= 20


def test_the_ways_to_plant_are_no_leaks_themselves(case):
    case.save()
    case.edit("latents", "*/bucket=*.parquet", lambda row: None)
    case.edit("prepared", "examples/*/*.parquet", lambda row: None)
    assert case.audit().leaks == ()
    case.join_again()
    report = case.audit()
    assert report.num_leaks == 0
    assert report.num_checked == read_manifest(case.joined).num_rows > 200


def test_an_honest_join_passes_and_tells_its_margins(case):
    report = case.audit()
    report.raise_if_leaking()
    margins = [
        row["event_ts"] - event["available_ts"]
        for row in case.requests
        for event in case.window(row)
    ]
    assert list(report.margin_s) == ["min", "p1", "p10", "p50", "p90", "p99", "max"]
    assert list(report.margin_s.values()) == sorted(report.margin_s.values())
    assert report.margin_s["min"] >= 0
    assert report.num_entries > len(margins) > report.num_checked / 20
    assert report.margin_s["max"] * 1e6 <= planting.RETENTION_US - planting.DELAY_US


def test_margins_are_the_exact_ones_within_the_sketch(case):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 10**10, 5000)
    margins = module._Margins()
    for part in np.split(values, 10):
        margins.add(part.tolist())
    got, ordered = margins.quantiles(), np.sort(values) / 1e6
    assert (got["min"], got["max"]) == (ordered[0], ordered[-1])
    for name, share in module._SHARES.items():
        assert got[name] == pytest.approx(ordered[int(share * 5000)], rel=0.03)


def test_a_sample_is_drawn_by_the_seed(case):
    def drawn(seed):
        return audit(case.joined, case.latents, case.prepared, sample=40, seed=seed)

    first = drawn(1)
    assert first == drawn(1)
    assert (first.num_checked, first.num_leaks) == (40, 0)
    assert first.num_entries != drawn(2).num_entries


def test_a_sample_reads_only_the_buckets_it_needs(case, monkeypatch):
    read = []
    honest = module.read_origin

    def watch(prepared, bucket, *rest):
        read.append(bucket)
        return honest(prepared, bucket, *rest)

    monkeypatch.setattr(module, "read_origin", watch)
    assert audit(case.joined, case.latents, case.prepared, sample=1).num_checked == 1
    assert len(read) == 1
    read.clear()
    audit(case.joined, case.latents, case.prepared, sample=None)
    assert read == sorted(set(read))
    assert len(read) == 2


def test_latents_may_lack_what_was_not_kept(case):
    """A version that keeps only the newest periods says so, and the audit expects no older events."""
    from_ts = paths.FM_STOP_TS + 9 * paths.DAY_US
    data = paths.PreparedData.open(case.prepared)
    periods = [f.period for f in data.examples.files() if f.period_range.start_ts >= from_ts]
    for path in case.latents.glob("period=*/*.parquet"):
        if int(path.parent.name.removeprefix("period=")) not in periods:
            path.unlink()
    meta = read_manifest(case.latents).meta
    first = min(f.period_range.start_ts for f in data.examples.files() if f.period in periods)
    span = TimeRange(first, data.log_range[1] + 1)
    for kept_from_ts, is_honest in ((first, True), (meta["kept_from_ts"], False)):
        planting.rewrite(case.latents, meta={**meta, "kept_from_ts": kept_from_ts})
        planting.shutil.rmtree(case.joined)
        write_joined(case.prepared, case.latents, case.joined, span, planting.SETTINGS)
        report = case.audit()
        assert (report.num_leaks == 0) == is_honest
        assert is_honest or "lacks visible" in report.leaks[0]


@pytest.mark.parametrize("name", ["latents", "prepared"])
def test_other_versions_than_those_joined_are_refused(case, name):
    folder = getattr(case, name)
    meta = {**read_manifest(folder).meta, "content": "1" * 16}
    planting.rewrite(folder, meta=meta)
    with pytest.raises(StoreError, match=f"was made from {name}"):
        case.audit()


def test_a_file_with_other_rows_than_its_manifest_says_is_refused(case):
    table = paths.pq.read_table(case.request_path, partitioning=None)
    paths.pq.write_table(table.slice(1), case.request_path)
    with pytest.raises(StoreError, match="its manifest says"):
        case.audit()


def test_only_the_first_leaks_are_listed_but_all_are_counted(case):
    for row in case.requests:
        row["teacher_prob"] = 2.0
    case.save()
    report = case.audit()
    assert report.num_leaks == len(case.requests) > 20
    assert len(report.leaks) == 20
    with pytest.raises(LeakError, match=f"{len(case.requests)} wrong rows"):
        report.raise_if_leaking()


@pytest.mark.s3
def test_latents_are_read_from_s3(case, s3):
    data = paths.PreparedData.open(case.prepared)
    where = {"delay_us": planting.DELAY_US, "scratch": case.root / "scratch"}
    paths.write_latents(data, f"{s3}/latents", **where)
    planting.shutil.rmtree(case.joined)
    span = TimeRange(paths.FM_STOP_TS, data.log_range[1] + 1)
    write_joined(case.prepared, f"{s3}/latents", case.joined, span, planting.SETTINGS)
    report = audit(case.joined, f"{s3}/latents", case.prepared, sample=None)
    assert (report.num_leaks, report.num_checked > 200) == (0, True)


hours = st.integers(0, 28 * 24)
cells = st.tuples(
    st.integers(0, 3),
    st.integers(0, 8),
    hours,
    st.booleans(),
    st.sampled_from([0, 0, 1, 30, 24 * 10]),
)


def log_rows(drawn):
    """Return a log of drawn cells; some rows at both ends keep the split possible."""
    drawn = [*drawn, (0, 99, 0, True, 0), (0, 99, 10 * 24, True, 0), (1, 99, 27 * 24 + 23, True, 0)]
    return [
        {
            "uid": f"u{user}",
            "sku": item,
            "at": logs.ORIGIN_TS + hour * paths.HOUR_US,
            "clicked": int(click),
            "known_at": logs.ORIGIN_TS + (hour + late) * paths.HOUR_US,
            "shop": f"s{item % 2}",
            "price": float(item),
        }
        for user, item, hour, click, late in drawn
    ]


@settings(max_examples=15)
@given(
    st.lists(cells, max_size=60),
    st.sampled_from([0, 1, 5 * paths.HOUR_US, 12 * paths.DAY_US]),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([None, 1, 2 * paths.DAY_US]),
    st.sampled_from(["positives", "all"]),
)
def test_honest_logs_have_no_leak(drawn, delay_us, max_len, retention_us, history_events):
    with tempfile.TemporaryDirectory() as folder:
        path = paths.walk(
            Path(folder),
            log_rows(drawn),
            delay_us=delay_us,
            join=JoinSettings(max_len, retention_us),
            num_buckets=2,
            history_events=history_events,
            duplicates="drop",
            period_s=7 * 86_400.0,
        )
        report = audit(path.joined, path.latents, path.prepared, sample=None)
    assert report.leaks == ()
    assert report.num_checked > 0


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 3), st.integers(1000, 3999), st.integers(-900, 900), st.booleans()
        ),
        min_size=1,
        max_size=50,
    ),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 1, 700]),
)
def test_clocks_that_go_wrong_are_no_leak(drawn, max_len, retention_us):
    """Labels known before their event, as clocks that differ tell it, and times that are all the same."""
    drawn = sorted([*drawn, (1, 3999, 0, True)], key=lambda cell: cell[1])
    user, event_ts, skew, is_event = (np.array(column) for column in zip(*drawn, strict=True))
    examples = {
        "example_id": np.arange(len(user)),
        "bucket": (user % worlds.NUM_BUCKETS).astype(np.int16),
        "user": user.astype(np.int32),
        "item": user.astype(np.int32),
        "event_ts": event_ts // 50 * 50,
        "label_ts": event_ts // 50 * 50 + skew,
        "label": is_event.astype(np.float32),
        "is_event": is_event,
    }
    shards = sorted({(int(t) // 1000, int(u) % 3) for u, t in zip(user, event_ts, strict=True)})
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        worlds.write_prepared(root / "prepared", examples)
        worlds.write_latents(root / "latents", examples, shards=shards)
        where = (root / "prepared", root / "latents", root / "joined")
        write_joined(*where, TimeRange(2000, 4000), JoinSettings(max_len, retention_us))
        report = audit(where[2], where[1], where[0], sample=None)
    assert report.leaks == ()


def test_a_join_without_events_has_no_margins(tmp_path):
    examples = worlds.make_examples(seed=5)
    examples["is_event"][:] = False
    worlds.write_prepared(tmp_path / "prepared", examples)
    worlds.write_latents(tmp_path / "latents", examples)
    where = (tmp_path / "prepared", tmp_path / "latents", tmp_path / "joined")
    write_joined(*where, worlds.REQUESTS, JoinSettings(3))
    report = audit(where[2], where[1], where[0])
    assert (report.num_leaks, report.num_entries, report.margin_s) == (0, 0, {})


def test_codes_survive_as_a_column():
    packed = np.arange(12, dtype=np.uint8).reshape(4, 3)
    column = pa.chunked_array([code_column(packed[:2]), code_column(packed[2:])])
    np.testing.assert_array_equal(code_bytes(column), packed)
    np.testing.assert_array_equal(code_bytes(code_column(packed).slice(1, 2)), packed[1:3])
    assert code_bytes(code_column(packed[:0])).shape == (0, 3)
