import os

import pytest

from loopfm_ray.errors import StoreError
from loopfm_ray.store.manifest import commit, read_manifest, stage, verify
from loopfm_ray.store.pool import Pool


def write(path, text):
    with stage(path) as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "file.txt").write_text(text)
        return commit(
            staged,
            kind="vm",
            config_hash="c",
            inputs={},
            meta={"text": text},
            num_rows=1,
            replace_other=True,
        )


def test_a_version_is_taken_over_without_a_copy(tmp_path):
    pool, made = Pool(tmp_path / "pool"), write(tmp_path / "one", "a")
    assert pool.take("key", tmp_path / "two") is None
    pool.put("key", tmp_path / "one")
    assert pool.take("key", tmp_path / "two") == made
    verify(tmp_path / "two")
    files = [tmp_path / name / "deep/file.txt" for name in ("one", "two", "pool/key")]
    assert len({file.stat().st_ino for file in files}) == 1
    assert pool.take("key", tmp_path / "two") == made


def test_another_version_gives_way_and_what_shares_its_files_stays_whole(tmp_path):
    pool = Pool(tmp_path / "pool")
    write(tmp_path / "one", "a")
    pool.put("key", tmp_path / "one")
    write(tmp_path / "two", "b")
    pool.take("key", tmp_path / "two")
    write(tmp_path / "one", "c")
    verify(tmp_path / "pool/key")
    assert read_manifest(tmp_path / "two").meta["text"] == "a"


def test_a_killed_link_leaves_nothing_and_goes_on(tmp_path, monkeypatch):
    pool = Pool(tmp_path / "pool")
    write(tmp_path / "one", "a")
    real, calls = os.link, []

    def fail(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(18, "Invalid cross-device link")
        real(*arguments, **more)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(StoreError, match="one file system"):
        pool.put("key", tmp_path / "one")
    assert pool.take("key", tmp_path / "two") is None
    assert not list((tmp_path / "pool").iterdir())
    pool.put("key", tmp_path / "one")
    assert pool.take("key", tmp_path / "two") is not None
