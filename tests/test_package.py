"""What holds for the whole package: imports, names, errors."""

import importlib
import pickle
import pkgutil
import subprocess
import sys

import pytest

import loopfm_ray
from loopfm_ray import errors

MODULES = sorted(
    module.name for module in pkgutil.walk_packages(loopfm_ray.__path__, "loopfm_ray.")
)
PLAIN = [name for name in MODULES if not name.startswith("loopfm_ray.jobs")]


def test_importing_everything_but_the_jobs_imports_no_ray():
    code = f"import sys, importlib; [importlib.import_module(n) for n in {PLAIN!r}]; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", PLAIN)
def test_every_name_in_all_is_there(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert all(hasattr(module, item) for item in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_survives_pickling(name):
    error = getattr(errors, name)("what failed; what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == "what failed; what to do"
    assert isinstance(copy, errors.LoopFMError)


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert loopfm_ray.__version__ == version("loopfm-ray")


def test_nothing_served_can_unpickle():
    """No module of the package loads a pickle; optimizer state is read with weights_only."""
    import ast
    from pathlib import Path

    found = []
    for path in Path(loopfm_ray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                found += [
                    f"{path}: {name}"
                    for name in names
                    if name.split(".")[0] in ("pickle", "dill", "shelve")
                ]
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                found += [] if keywords.get("weights_only") == "True" else [f"{path}: torch.load"]
    assert found == []
