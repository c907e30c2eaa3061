"""The files under infra/ as trees, and the commands in them."""

import functools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
LAUNCHERS = sorted((INFRA / "ray").glob("*.yaml"))
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


@dataclass(frozen=True)
class Container:
    """One container of a manifest, with the pod template it is in."""

    kind: str
    spec: dict[str, Any]
    pod: dict[str, Any]

    @property
    def words(self) -> list[str]:
        return [*self.spec.get("command", []), *self.spec.get("args", [])]

    @property
    def is_ray(self) -> bool:
        return self.spec["name"] in ("ray-head", "ray-worker")


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@functools.cache
def manifests() -> list[dict[str, Any]]:
    return [
        tree
        for path in sorted(KUBERNETES.glob("*.yaml"))
        for tree in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [tree for tree in manifests() if tree["kind"] == kind]


def one(kind: str) -> dict[str, Any]:
    (tree,) = of_kind(kind)
    return tree


def ray_cluster_spec(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the RayClusterSpec of a RayCluster, RayJob or RayService."""
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(tree["kind"])
    return tree["spec"] if key is None else tree["spec"][key]


def pod_templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the kind of a manifest and each pod template in it."""
    for tree in manifests():
        yield from ((tree["kind"], found) for found in _templates(tree))


def containers() -> list[Container]:
    return [
        Container(kind, spec, template)
        for kind, template in pod_templates()
        for key in ("initContainers", "containers")
        for spec in template["spec"].get(key, [])
    ]


def _templates(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if "containers" in tree.get("spec", {}):
            yield tree
        for value in tree.values():
            yield from _templates(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _templates(value)


@functools.cache
def compose(**environ: str) -> dict[str, Any]:
    """Return compose.yaml with its variables replaced as compose does; those without a default are `NAME-value`."""

    def replace(match: re.Match[str]) -> str:
        name, operator, text = match.groups()
        return environ.get(name, text if operator == "-" else f"{name}-value")

    def walk(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: walk(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [walk(value) for value in tree]
        return _VARIABLE.sub(replace, tree) if isinstance(tree, str) else tree

    return walk(load(INFRA / "compose.yaml"))


def compose_variables() -> set[str]:
    text = (INFRA / "compose.yaml").read_text(encoding="utf-8")
    return {match[1] for match in _VARIABLE.finditer(text)}


def words_of(command: str | list[str] | None) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else list(command or [])


def schema(name: str, *others: str) -> dict[str, Any]:
    """Return a schema with the definitions of `others` beside its own."""
    tree = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    for other in others:
        more = json.loads((SCHEMAS / other).read_text(encoding="utf-8"))
        tree["definitions"] = {**more["definitions"], **tree["definitions"]}
    return tree


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, lines put together."""
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, argument) for name, argument in found]


def simple_commands(words: list[str]) -> Iterator[list[str]]:
    """Give the programs that a command runs: those of `bash -c` and what `ray job submit` runs on the cluster too."""
    if words[:2] == ["bash", "-c"]:
        yield from shell_commands(words[2])
        return
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        cut = words.index("--")
        yield words[: cut + 1]
        yield from simple_commands(words[cut + 1 :])
        return
    if words:
        yield words


def shell_commands(text: str) -> Iterator[list[str]]:
    """Give the programs of a line of shell, which are separated by `&&` and `;`."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&;")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= {"&", ";"}:
            yield from simple_commands(words)
            words = []
        else:
            words.append(word)


def commands() -> list[tuple[str, list[str]]]:
    """Return where each command stands, and its words."""
    found: list[tuple[str, list[str]]] = []
    for name, service in compose()["services"].items():
        found += [
            (f"compose.yaml {name}", words)
            for words in simple_commands(words_of(service.get("command")))
        ]
    for container in containers():
        where = f"{container.kind} {container.spec['name']}"
        found += [(where, words) for words in simple_commands(container.words)]
    found += [
        ("train.yaml", words) for words in shell_commands(one("RayJob")["spec"]["entrypoint"])
    ]
    for path in LAUNCHERS:
        tree = load(path)
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            found += [(path.name, words) for line in tree[key] for words in shell_commands(line)]
    found += [("Dockerfile", json.loads(text)) for name, text in dockerfile() if name == "CMD"]
    found += documented()
    return found


def documented() -> list[tuple[str, list[str]]]:
    """Return the `loopfm` and `ray` commands in the code blocks of docs/deploy.md."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [words for line in lines for words in shell_commands(line.split("  #")[0])]
    return [
        ("docs/deploy.md", words[: words.index(">")] if ">" in words else words)
        for words in found
        if words[0] in ("loopfm", "ray")
    ]
