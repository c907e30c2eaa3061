"""What counts as up to date: the version at its place, or the same one from a pool of other runs."""

import pytest

from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.store.manifest import commit, stage
from loopfm_ray.store.pool import Pool


def write(path, text, inputs):
    with stage(path) as staged:
        (staged / "file.txt").write_text(text)
        return commit(staged, kind="vm", config_hash="c", inputs=inputs, meta={}, num_rows=1)


def context(folder, name, **more):
    config = PipelineConfig(name=name, run_dir=str(folder))
    return Context(config, silent, pool=Pool(folder / "pool"), **more)


def test_a_version_of_another_run_is_taken_over_if_it_is_made_of_the_same(tmp_path):
    one, two = context(tmp_path, "one"), context(tmp_path, "two")
    made, inputs = write(one.config.paths.fm(0), "a", {"prepared": "1"}), {"prepared": "1"}
    assert one.find(one.config.paths.fm(0), "c", inputs) == made
    target = two.config.paths.fm(0)
    assert two.find(target, "c", inputs) is None
    one.share(one.config.paths.fm(0))
    for settings, other in (("d", inputs), ("c", {"prepared": "2"})):
        assert two.find(target, settings, other) is None
    fresh = context(tmp_path, "two", fresh=True)
    assert fresh.find(target, "c", inputs) is None
    assert not target.exists()
    assert two.find(target, "c", inputs) == made
    assert two.current(target, "c", inputs) == made
    assert fresh.find(target, "c", inputs) is None


def test_what_a_version_depends_on_beside_its_inputs_is_part_of_its_name_in_the_pool(tmp_path):
    one, two = context(tmp_path, "one"), context(tmp_path, "two")
    made = write(one.config.paths.prepared, "a", {})
    one.share(one.config.paths.prepared, {"log": "files of monday"})
    target = two.config.paths.prepared
    assert two.take(target, "c", {"log": "files of tuesday"}) is None
    assert two.take(target, "c", {"log": "files of monday"}) == made


def test_versions_on_s3_can_not_be_pooled(tmp_path):
    config = PipelineConfig(name="r", run_dir=str(tmp_path), store="s3://bucket/prefix")
    with pytest.raises(ConfigError, match="can not be linked into a pool"):
        Context(config, silent, pool=Pool(tmp_path / "pool"))
