from dataclasses import replace

import pytest

from loopfm_ray.errors import StoreError
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.space import Space, check_space_id
from tests.oracles import worlds

SPACE = Space("snap", CodeSpec(4, 2, (0.5, 1.0)), 10, True)
CHANGES = {
    "snapshot_id": "other",
    "code_spec": CodeSpec(4, 2, (0.5, 1.25)),
    "delay_us": 11,
    "waits_for_label": False,
}


def test_the_id_is_stable():
    """Written into manifests and paths: it must not change from one version of the code to the next."""
    assert SPACE.id == "a4123da43284885c"
    check_space_id(SPACE.id)


@pytest.mark.parametrize("name", CHANGES)
def test_every_part_makes_another_space_and_is_named(name):
    other = replace(SPACE, **{name: CHANGES[name]})
    assert other.id != SPACE.id
    assert SPACE.difference(other).startswith(f"{name} is ")
    assert SPACE.difference(SPACE) is None


def test_a_space_reads_back_from_the_meta_of_a_manifest():
    meta = SPACE.to_meta()
    assert meta["space"] == SPACE.id
    assert Space.of_meta({**meta, "watermark_ts": 3, "num_events": 2}) == SPACE


@pytest.mark.parametrize("name", CHANGES)
def test_a_part_that_is_missing_or_does_not_fit_the_id_is_refused(name):
    meta = SPACE.to_meta()
    with pytest.raises(StoreError, match="does not tell its embedding space"):
        Space.of_meta({key: value for key, value in meta.items() if key != name})
    other = replace(SPACE, **{name: CHANGES[name]})
    with pytest.raises(StoreError, match="its parts are those of"):
        Space.of_meta({**other.to_meta(), "space": SPACE.id})


@pytest.mark.parametrize("text", ["", "..", "../x", "0" * 15, "0" * 17, "G" * 16, "0" * 16 + "\n"])
def test_what_is_no_id_never_becomes_a_path(text):
    with pytest.raises(StoreError, match="16 hex digits"):
        check_space_id(text)


def test_versions_of_a_snapshot_share_the_space_and_a_delay_makes_another(tmp_path):
    examples = worlds.make_examples(num_rows=80)
    fewer = {name: values[:60] for name, values in examples.items()}
    worlds.write_latents(tmp_path / "day", fewer)
    worlds.write_latents(tmp_path / "next", examples)
    worlds.write_latents(tmp_path / "slower", examples, delay_us=11)
    day, following, slower = (read_manifest(tmp_path / n) for n in ("day", "next", "slower"))
    assert day.content != following.content
    assert day.meta["space"] == following.meta["space"] != slower.meta["space"]
    assert Space.of_meta(day.meta).code_spec == LatentsReader(tmp_path / "day").spec
