"""The Config base class: closed, frozen pydantic models, read from YAML with dotted overrides.

Order: defaults, the file, then `--set a.b=value`. There is no other source. A section that names a YAML file
(`--set data=configs/pipeline/online_retail.yaml`, or `data: online_retail.yaml` in a file beside it) stands for the section of
the same name in that file, or for the whole file when it has no such section.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from loopfm_ray.errors import ConfigError

__all__ = [
    "Config",
    "apply_overrides",
    "config_hash",
    "dump_yaml",
    "find_config",
    "load_config",
    "merge",
    "read_sections",
    "read_yaml",
    "validate",
]

ConfigT = TypeVar("ConfigT", bound="Config")
# Any: YAML holds whatever the user wrote, pydantic gives it its type.
Tree = dict[str, Any]


class Config(BaseModel):
    """Base of every config: immutable, closed to unknown keys; the string under a field is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def find_config(name: str, kind: str = "pipeline") -> Path:
    """Return the path of a config: a file, or the name of one that comes with the package in the folder `kind` of its configs.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    here = Path(__file__).parent
    # sweeps lie at the top of the repository, beside configs
    for folder in (here / "_configs", here.parent / "configs", here.parent):
        candidate = folder / kind / f"{name}.yaml"
        if candidate.is_file():
            return candidate
    if kind != "pipeline":
        raise ConfigError(
            f"there is no config {name!r}; give the path of a YAML file, or the name of one in the package's folder {kind}"
        )
    raise ConfigError(
        f"there is no config {name!r}; give the path of a YAML file, or one of complete_journey, movielens, online_retail,"
        " synthetic and the others under configs/pipeline"
    )


def load_config(cls: type[ConfigT], path: Path | None, overrides: Sequence[str] = ()) -> ConfigT:
    """Build `cls` from the YAML file at `path` (or defaults alone) and `overrides` like `a.b=value`.

    Raises:
        ConfigError: the file is missing or no mapping, or a key or value is not accepted.
    """
    tree = read_sections(cls, path) if path is not None else {}
    source = str(path) if path is not None else "the defaults"
    return validate(cls, apply_overrides(tree, overrides), source)


def validate(cls: type[ConfigT], tree: Mapping[str, Any], source: str) -> ConfigT:
    """Build `cls` from `tree`; `source` names where the values came from in the error."""
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        lines = [f"config from {source} is not valid:"]
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"]) or "(top level)"
            lines.append(f"  {where}: {item['msg']}, found {_short(item['input'])}")
        lines.append("correct the file or use --set KEY=VALUE; `loopfm config` lists every key")
        raise ConfigError("\n".join(lines)) from error


def read_yaml(path: Path) -> Tree:
    """Read one YAML mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config file {path} can not be read ({error.strerror}); give the path of a YAML file"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {path} must hold a mapping, found {type(tree).__name__}; see configs/ for examples"
        )
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    """Return a copy of `tree` with every `a.b=value` of `overrides` set, in order; values are YAML.

    Raises:
        ConfigError: an override has no `=`, or its path runs through a value that is no mapping.
    """
    result: Tree = json.loads(json.dumps(dict(tree), default=str))
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"--set takes KEY=VALUE with a dotted key, found {override!r}")
        node = result
        for part in parts[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(
                    f"--set {override!r}: {part} holds {_short(child)}, not a section; set it whole"
                )
            node = child
        node[parts[-1]] = _override_value(parts[-1], text)
    return result


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """Return `base` with the values of `changes`; sections are merged, anything else is replaced.

    A section whose `kind` changes is replaced as well: the keys of one kind mean nothing to another.
    """
    result = dict(base)
    for name, value in changes.items():
        before = result.get(name)
        same_kind = (
            isinstance(before, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", before.get("kind")) == before.get("kind")
        )
        result[name] = merge(before, value) if same_kind else value  # type: ignore[arg-type]
    return result


def dump_yaml(config: Config) -> str:
    """Return the resolved config as YAML; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(*parts: object) -> str:
    """Return 16 hex digits that depend on every value in `parts` (configs, mappings, scalars)."""
    plain = [part.model_dump(mode="json") if isinstance(part, Config) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _override_value(name: str, text: str) -> object:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}={text}: the value is not valid YAML: {error}") from error
    return _section(name, Path(value)) if _is_yaml(value) else value


def read_sections(cls: type[Config], path: Path) -> Tree:
    """Return the tree of a file; sections that name a file, seen from its folder, are read from there."""
    tree = read_yaml(path)
    for name, value in tree.items():
        field = cls.model_fields.get(name)
        if _is_yaml(value) and field is not None and field.annotation not in (str, str | None):
            tree[name] = _section(name, path.parent / value)
    return tree


def _is_yaml(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _section(name: str, path: Path) -> object:
    tree = read_yaml(path)
    return tree.get(name, tree)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
