import errno
import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopfm_ray import __version__
from loopfm_ray.errors import StoreError
from loopfm_ray.store import manifest as manifests
from loopfm_ray.store import provenance
from loopfm_ray.store.manifest import (
    commit,
    install,
    read_manifest,
    recover,
    stage,
    verify,
)
from loopfm_ray.store.tables import write_ipc, write_parquet
from tests.oracles.worlds import tree_bytes


def write_version(final, rows=3, replace_other=False, kind="run", meta=None):
    with stage(final) as staged:
        write_parquet(pa.table({"x": list(range(rows))}), staged / "part" / "a.parquet")
        write_ipc(pa.table({"x": list(range(rows + 1))}), staged / "b.arrow")
        (staged / "c.json").write_text("{}")
        return commit(
            staged,
            kind=kind,
            config_hash="h",
            inputs={"prepared": "p"},
            meta={"pair": (1, 2)} if meta is None else meta,
            num_rows=rows,
            replace_other=replace_other,
        )


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_committed_version_reads_back_as_it_was(tmp_path):
    manifest = write_version(tmp_path / "v")
    assert read_manifest(tmp_path / "v") == manifest
    assert [(f.path, f.num_rows) for f in manifest.files] == [
        ("b.arrow", 4),
        ("c.json", 0),
        ("part/a.parquet", 3),
    ]
    assert manifest.num_bytes == sum(
        (tmp_path / "v" / f.path).stat().st_size for f in manifest.files
    )
    assert manifest.meta == {"pair": [1, 2]}
    assert manifest.code_version.startswith(__version__)
    assert manifest.seconds >= 0
    assert hidden(tmp_path) == []
    verify(tmp_path / "v")


def test_same_content_has_the_same_version_and_other_content_another(tmp_path):
    first = write_version(tmp_path / "a")
    assert write_version(tmp_path / "b").version == first.version
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")
    assert write_version(tmp_path / "c", rows=4).version != first.version
    assert write_version(tmp_path / "d", meta={}).version != first.version
    assert len(first.version) == 16


def test_an_equal_version_stays(tmp_path):
    first = write_version(tmp_path / "v")
    inode = (tmp_path / "v").stat().st_ino
    assert write_version(tmp_path / "v") == first
    assert (tmp_path / "v").stat().st_ino == inode
    assert hidden(tmp_path) == []


def test_another_version_gives_way_only_when_asked(tmp_path):
    first = write_version(tmp_path / "v")
    with pytest.raises(StoreError, match=f"holds version {first.version}"):
        write_version(tmp_path / "v", rows=5)
    assert read_manifest(tmp_path / "v") == first
    second = write_version(tmp_path / "v", rows=5, replace_other=True)
    assert read_manifest(tmp_path / "v") == second != first
    assert hidden(tmp_path) == []


def test_a_directory_that_is_no_version_is_left_alone(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "mine.txt").write_text("keep")
    with pytest.raises(StoreError, match="is no dataset version"):
        write_version(tmp_path / "v", replace_other=True)
    assert (tmp_path / "v" / "mine.txt").read_text() == "keep"
    assert hidden(tmp_path) == []


def fail_while_staging(final, error):
    with stage(final) as staged:
        (staged / "x").write_text("x")
        raise error


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="mine"):
        fail_while_staging(tmp_path / "v", RuntimeError("mine"))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_runs_are_cleared(tmp_path):
    write_version(tmp_path / "v")
    for name in (".v.tmp-1-dead", ".other.tmp-1-dead", ".v.old-dead"):
        (tmp_path / name).mkdir()
    write_version(tmp_path / "v")
    assert hidden(tmp_path) == [".other.tmp-1-dead"]


def test_a_kill_between_the_renames_of_a_replacement_is_undone(tmp_path):
    first = write_version(tmp_path / "v")
    (tmp_path / "v").rename(tmp_path / ".v.old-1234")
    recover(tmp_path / "v")
    assert read_manifest(tmp_path / "v") == first
    (tmp_path / ".v.old-5678").mkdir()
    recover(tmp_path / "v")
    assert hidden(tmp_path) == []


def test_half_written_files_of_killed_tasks_do_not_enter_the_version(tmp_path):
    with stage(tmp_path / "v") as staged:
        (staged / "a").write_text("a")
        (staged / ".a.tmp-123").write_text("half")
        manifest = commit(staged, kind="run", config_hash="", inputs={}, meta={}, num_rows=0)
    assert [entry.path for entry in manifest.files] == ["a"]
    assert not (tmp_path / "v" / ".a.tmp-123").exists()


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(StoreError, match="kind of a version"):
        write_version(tmp_path / "v", kind="thing")


def test_missing_manifest_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match=r"no manifest\.json; run the step"):
        read_manifest(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="no dataset version"):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "\xff"])
def test_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match="damaged"):
        read_manifest(tmp_path)


def test_unknown_format_version_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(StoreError, match="format_version 99, this code reads 1"):
        read_manifest(tmp_path)


def test_changed_manifest_is_refused(tmp_path):
    write_version(tmp_path / "v")
    path = tmp_path / "v" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["num_rows"] += 1
    path.write_text(json.dumps(tree))
    with pytest.raises(StoreError, match="was changed"):
        read_manifest(tmp_path / "v")


def test_unreadable_manifest_is_told_apart_from_none(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(StoreError, match="can not be read"):
        read_manifest(tmp_path)


def test_verify_finds_changed_and_missing_files(tmp_path):
    write_version(tmp_path / "v")
    path = tmp_path / "v" / "c.json"
    path.write_text("[]")
    with pytest.raises(StoreError, match="is damaged"):
        verify(tmp_path / "v")
    path.unlink()
    with pytest.raises(StoreError, match="can not be read"):
        verify(tmp_path / "v")


def test_install_needs_a_manifest(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(StoreError, match="no dataset version"):
        install(tmp_path / "x", tmp_path / "y", replace_other=False)


def fill_disk(final):
    with stage(final) as staged:
        (staged / "full.parquet").symlink_to("/dev/full")
        pq.write_table(pa.table({"x": list(range(100_000))}), str(staged / "full.parquet"))


def test_full_disk_leaves_nothing_and_names_path_and_space(tmp_path):
    with pytest.raises(StoreError, match=r"no space left, \d+ MiB free") as caught:
        fill_disk(tmp_path / "v")
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_at_the_manifest_leaves_nothing(tmp_path, monkeypatch, number):
    def full(self, *args, **kwargs):
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="no space left"):
        write_empty_version(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def write_empty_version(final):
    with stage(final) as staged:
        return commit(staged, kind="run", config_hash="", inputs={}, meta={}, num_rows=0)


def test_other_io_errors_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError):
        fail_while_staging(tmp_path / "v", PermissionError(errno.EACCES, "no"))


def test_code_version_names_the_commit_only_inside_a_checkout(tmp_path):
    assert provenance.describe(tmp_path) == __version__
    (tmp_path / ".git").mkdir()  # not a repository that git can read
    assert provenance.describe(tmp_path) == __version__
    (tmp_path / ".git").rmdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.describe(tmp_path) == __version__
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert provenance.describe(tmp_path) == f"{__version__}+g{head.stdout[:12]}"


def test_every_public_name_exists():
    assert all(hasattr(manifests, name) for name in manifests.__all__)
