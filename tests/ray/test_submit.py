import json
from pathlib import Path

import pytest
import yaml

from infra import submit as submit_module
from infra.submit import PARTS, ROOT, collect_files, job_environment, main, submit
from loopfm_ray.errors import ConfigError, JobError
from tests.conftest import free_ports
from tests.ray.heads import running_head
from tests.small_graph import graph_base


def make_checkout(root: Path) -> Path:
    for name in (
        "loopfm_ray/__init__.py",
        "loopfm_ray/data/schema.py",
        "loopfm_ray/__pycache__/x.pyc",
        "loopfm_ray/.hidden",
        "configs/pipeline/a.yaml",
        "configs/runs/big.bin",
        "runs/demo/model.safetensors",
        "data/log.parquet",
        ".git/config",
        "notes.txt",
        "pyproject.toml",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_only_code_and_configs_are_shipped(tmp_path):
    root = make_checkout(tmp_path)
    (root / "configs/link.yaml").symlink_to("/etc/hostname")
    names = [path.as_posix() for path in collect_files(root)]
    assert names == [
        "configs/pipeline/a.yaml",
        "loopfm_ray/__init__.py",
        "loopfm_ray/data/schema.py",
        "pyproject.toml",
    ]


def test_shipping_too_much_is_refused_by_name(tmp_path):
    root = make_checkout(tmp_path)
    (root / "configs/log.parquet").write_bytes(b"0" * 5000)
    with pytest.raises(ConfigError, match=r"biggest files are configs/log.parquet \(5000 bytes\)"):
        collect_files(root, max_bytes=4999)


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no package loopfm_ray"):
        collect_files(tmp_path)


def test_this_checkout_is_small_enough_and_holds_no_data():
    files = collect_files(ROOT)
    assert {path.parts[0] for path in files} <= set(PARTS)
    assert not [path for path in files if path.suffix in (".parquet", ".arrow", ".safetensors")]


def test_environment_of_a_job_is_named_settings_only():
    environ = {"AWS_REGION": "x", "PYTHONPATH": "/p", "SECRET": "s", "HOME": "/h"}
    assert job_environment(environ) == {
        "AWS_REGION": "x",
        "PYTHONPATH": "/p",
        "RAY_AUTH_MODE": "disabled",
        "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",
    }
    assert job_environment({"RAY_AUTH_MODE": "token"})["RAY_AUTH_MODE"] == "token"


def test_a_mistake_in_the_call_exits_2(monkeypatch):
    def refuse(*_):
        raise ConfigError("too big")

    monkeypatch.setattr(submit_module, "submit", refuse)
    assert main(["--", "demo"]) == 2
    with pytest.raises(SystemExit) as usage:
        main([])
    assert usage.value.code == 2


@pytest.fixture(scope="module")
def head():
    with running_head(RAY_AUTH_MODE="disabled") as ports:
        yield f"http://127.0.0.1:{ports['dashboard-port']}"


@pytest.fixture(autouse=True)
def auth_mode(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_job_runs_the_shipped_code_and_its_result_is_read(head, tmp_path):
    result_file = tmp_path / "result.txt"
    program = (
        "import sys, pathlib, ray, loopfm_ray\n"
        "ray.init(log_to_driver=False)\n"
        "print('cpus', ray.cluster_resources()['CPU'])\n"
        "here = pathlib.Path.cwd()\n"
        "assert pathlib.Path(loopfm_ray.__file__).is_relative_to(here), loopfm_ray.__file__\n"
        "inside = ray.remote(lambda: __import__('loopfm_ray').__file__)\n"
        "assert pathlib.Path(ray.get(inside.remote())).exists()\n"
        "assert not (here / '.git').exists() and not (here / 'runs').exists()\n"
        "pathlib.Path(sys.argv[1]).write_text('done')\n"
    )
    lines: list[str] = []
    result = submit(
        ["-c", program, str(result_file)], head, entrypoint=("python",), on_log=lines.append
    )
    assert result.status == "SUCCEEDED", (result.message, lines)
    assert result.exit_code == 0
    assert result_file.read_text() == "done"
    assert "cpus 8" in "".join(lines)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_exit_code_of_a_failed_job_is_returned(head):
    result = submit(
        ["-c", "import sys; sys.exit(3)"], head, entrypoint=("python",), on_log=lambda _: None
    )
    assert (result.status, result.exit_code) == ("FAILED", 3)


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_an_address_without_a_head_is_a_job_error():
    with pytest.raises(JobError, match="ray start --head"):
        submit(["-c", "pass"], f"http://127.0.0.1:{free_ports(1)[0]}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pipeline_runs_as_a_job_and_leaves_its_summary(head, tmp_path):
    lines: list[str] = []
    arguments = [
        "demo", "configs/pipeline/synthetic.yaml", "--json",
        "--set", f"run_dir={tmp_path}", "--set", "name=job", "--set", "data.num_rows=4000",
        "--set", "fm.learning.num_workers=1", "--set", "online.parity_requests=10",
    ]  # fmt: skip
    result = submit(arguments, head, on_log=lines.append)
    assert result.exit_code == 0, "".join(lines)[-5000:]
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["audit"]["num_leaks"] == 0
    assert summary["parity"]["max_abs_diff"] < 1e-5
    assert (tmp_path / "job" / "report.html").is_file()
    assert "vm_kd_loopfm" in summary["models"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_runs_as_a_job_and_another_job_goes_on_with_it(head, tmp_path):
    sweep = {
        "name": "submitted",
        "run_dir": str(tmp_path),
        "base": graph_base(tmp_path),
        "space": {"train.lr": {"kind": "float", "low": 1e-4, "high": 0.5, "log": True}},
        "objectives": [{"metric": "mrr"}],
        "budget": {"num_trials": 2, "cores": 2},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    trials = []
    for more in ([], ["--set", "budget.num_trials=3"]):
        lines: list[str] = []
        result = submit(["sweep", str(path), *more], head, on_log=lines.append)
        assert result.exit_code == 0, "".join(lines)[-5000:]
        trials.append(json.loads((tmp_path / "submitted" / "summary.json").read_text())["trials"])
    first, second = trials
    assert [len(first), len(second)] == [2, 3]
    assert second[:2] == first
    assert (tmp_path / "submitted" / "report.html").is_file()
