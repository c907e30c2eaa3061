"""How a run's VM is served: what comes from the run, and what a file may add."""

import pytest
import yaml

from loopfm_ray.config import load_config
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs import scoring
from loopfm_ray.jobs.security import examine_security


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "find_manifest", lambda _: object())
    return load_config(PipelineConfig, None, [f"run_dir={tmp_path / 'run'}", "name=one"])


def write(folder, tree):
    path = folder / "doors.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_without_a_file_a_run_is_served_on_loopback(config):
    served = scoring.serve_config(config, None)
    assert (served.host, served.port, served.grpc_port) == ("127.0.0.1", 8000, None)
    assert served.bundle == str(scoring.absolute(config.paths.bundle))
    assert served.online == config.online_target
    assert scoring.serve_config(config, 8123).port == 8123


def test_a_file_adds_doors_and_the_port_of_the_command_wins(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    doors = {"host": "0.0.0.0", "port": 8443, "api_keys": "keys.json"}
    path = write(tmp_path, {**doors, "tls": {"cert": "c.pem", "key": "k.pem"}, "ui": True})
    served = scoring.serve_config(config, None, path)
    assert (served.host, served.port, served.has_ui) == ("0.0.0.0", 8443, True)
    # a replica has another working directory
    assert served.api_keys == str(tmp_path / "keys.json")
    assert (served.tls.cert, served.tls.key) == (str(tmp_path / "c.pem"), str(tmp_path / "k.pem"))
    assert scoring.serve_config(config, 9999, path).port == 9999
    # the same file may be shown to doctor
    (found, *_) = examine_security([path], tmp_path / "no proc", tmp_path, {})
    assert (found.is_ok, found.found) == (True, "listens on 0.0.0.0, with keys")


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"host": "0.0.0.0"}, "loopfm key"),
        ({"bundle": "other"}, "come from the run"),
        ({"no_such": 1}, "no_such"),
        (["x"], "no mapping"),
    ],
)
def test_a_wrong_file_is_refused(config, tmp_path, tree, why):
    with pytest.raises(ConfigError, match=why):
        scoring.serve_config(config, None, write(tmp_path, tree))


def test_a_missing_file_and_a_missing_bundle_are_told(config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="can not be read"):
        scoring.serve_config(config, None, tmp_path / "none.yaml")
    monkeypatch.setattr(scoring, "find_manifest", lambda _: None)
    with pytest.raises(StoreError, match="loopfm publish"):
        scoring.serve_config(config, None)
