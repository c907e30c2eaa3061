"""The search space of a sweep: dotted paths into a config, each with the values that it may take.

A value is put into the tree of the base config at its path. A value that is itself a section is laid over the section that is there, key
by key, so that one choice may set several values at once.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, PositiveInt, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError

__all__ = [
    "ChoiceParameter",
    "FloatParameter",
    "IntParameter",
    "Parameter",
    "Suggest",
    "apply_params",
    "check_space",
    "corner_params",
    "is_active",
    "parameter_order",
    "suggest_params",
]

# Any: the values of a config, checked when the whole is built.
Tree = dict[str, Any]
Params = dict[str, Any]


class _Range(Config):
    when: dict[str, tuple[Any, ...]] = Field(default={})
    """Other parameters by path, and their values with which this one exists; it has no value with others. Empty is always."""


class FloatParameter(_Range):
    """A number of a range."""

    kind: Literal["float"] = "float"
    low: float
    high: float
    log: bool = False
    """Whether each order of magnitude is as likely as another."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _check_range(self.low, self.high, self.log)
        return self

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values at the ends of the range."""
        return self.low, self.high

    def suggest(self, name: str, trial: "Suggest") -> float:
        """Return the value of a trial."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def value(self, suggested: Any) -> Any:
        """Return what goes into the config."""
        return suggested


class IntParameter(_Range):
    """A whole number of a range."""

    kind: Literal["int"] = "int"
    low: int
    high: int
    step: PositiveInt = 1
    """Distance of the values from `low` on; 1 with `log`."""
    log: bool = False

    @model_validator(mode="after")
    def _rises(self) -> Self:
        _check_range(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ConfigError(f"step must be 1 with log, found {self.step}; leave one of them out")
        return self

    @property
    def corners(self) -> tuple[Any, ...]:
        """The values at the ends of the range."""
        return self.low, self.high - (self.high - self.low) % self.step

    def suggest(self, name: str, trial: "Suggest") -> int:
        """Return the value of a trial."""
        return trial.suggest_int(name, self.low, self.high, step=self.step, log=self.log)

    def value(self, suggested: Any) -> Any:
        """Return what goes into the config."""
        return suggested


class ChoiceParameter(_Range):
    """One of several values, in no order."""

    kind: Literal["choice"] = "choice"
    values: tuple[Any, ...] | dict[str, Any]
    """The values; by name where they are sections or lists."""

    @model_validator(mode="after")
    def _differ(self) -> Self:
        labels = self.labels
        if len(labels) < 2:
            raise ConfigError(
                f"values must hold at least two, found {list(labels)}; write one value into the base config, or under `set`"
            )
        if len(set(map(repr, labels))) != len(labels):
            raise ConfigError(f"values must differ, found {list(labels)}")
        return self

    @property
    def labels(self) -> tuple[Any, ...]:
        """The values as a study keeps them: their names, plain values as they are, lists and sections as JSON."""
        if isinstance(self.values, dict):
            return tuple(self.values)
        return tuple(_label(value) for value in self.values)

    @property
    def corners(self) -> tuple[Any, ...]:
        """All labels."""
        return self.labels

    def suggest(self, name: str, trial: "Suggest") -> Any:
        """Return the label of a trial."""
        return trial.suggest_categorical(name, self.labels)

    def value(self, suggested: Any) -> Any:
        """Return what goes into the config for a label."""
        if isinstance(self.values, dict):
            return self.values[suggested]
        return self.values[self.labels.index(suggested)]


Parameter = Annotated[FloatParameter | IntParameter | ChoiceParameter, Field(discriminator="kind")]


class Suggest(Protocol):
    """Gives the values of one trial; an Optuna trial is one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number from `low` to `high`."""
        ...

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Return a whole number from `low` to `high`."""
        ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of `choices`."""
        ...


def check_space(space: Mapping[str, Parameter], build: Callable[[Params], object]) -> None:
    """Check that every value of a space at the ends of its range gives a config.

    Args:
        space: by path.
        build: makes a config from the params of a trial; raises ConfigError.

    Raises:
        ConfigError: there is no parameter, a condition names none or none of its values, or a value does not fit the config.
    """
    if not space:
        raise ConfigError("space is empty; give at least one path with its kind and its values")
    order = parameter_order(space)
    for name in order:
        for other, values in space[name].when.items():
            known = _known(space[other])
            strange = [value for value in values if known is not None and value not in known]
            if strange or not values:
                raise ConfigError(
                    f"space.{name}.when.{other} has {list(strange or values)}, expected some of {list(known or ())}"
                )
    for name in order:
        for corner in space[name].corners:
            params = corner_params(space, name, corner)
            try:
                build(params)
            except ConfigError as error:
                raise ConfigError(f"space.{name} does not fit at {corner!r}: {error}") from error


def _known(parameter: Parameter) -> tuple[Any, ...] | None:
    return parameter.labels if isinstance(parameter, ChoiceParameter) else None


def parameter_order(space: Mapping[str, Parameter]) -> list[str]:
    """Return the parameters so that each comes after those that its condition names.

    Raises:
        ConfigError: a condition names no other parameter of the space, or conditions run in a circle.
    """
    order: list[str] = []
    waiting = dict(space)
    while waiting:
        ready = [name for name, item in waiting.items() if set(item.when) <= set(order)]
        if not ready:
            name, item = next(iter(waiting.items()))
            missing = sorted(set(item.when) - set(space))
            why = f"names {missing}, which are not in the space" if missing else "runs in a circle"
            raise ConfigError(f"space.{name}.when {why}; the space has {sorted(space)}")
        order += ready
        waiting = {name: item for name, item in waiting.items() if name not in ready}
    return order


def is_active(parameter: Parameter, params: Mapping[str, Any]) -> bool:
    """Return whether a parameter has a value in a trial whose other values are `params`."""
    return all(
        other in params and params[other] in values for other, values in parameter.when.items()
    )


def suggest_params(space: Mapping[str, Parameter], trial: Suggest) -> Params:
    """Return the values of one trial by path; choices as their labels."""
    params: Params = {}
    for name in parameter_order(space):
        if is_active(space[name], params):
            params[name] = space[name].suggest(name, trial)
    return params


def corner_params(space: Mapping[str, Parameter], name: str, value: Any) -> Params:
    """Return params in which `name` has `value`, what its condition asks for, and every other active one its first corner."""
    wanted: Params = {name: value}
    for parent in _parents(space, name):
        wanted.setdefault(*parent)
    params: Params = {}
    for other in parameter_order(space):
        if is_active(space[other], params):
            params[other] = wanted.get(other, space[other].corners[0])
    return params


def _parents(space: Mapping[str, Parameter], name: str) -> Iterator[tuple[str, Any]]:
    for other, values in space[name].when.items():
        yield other, values[0]
        yield from _parents(space, other)


def apply_params(
    tree: Mapping[str, Any], space: Mapping[str, Parameter], params: Mapping[str, Any]
) -> Tree:
    """Return a copy of a config's tree with the values of a trial in it.

    Raises:
        ConfigError: a path runs through a value that is no section.
    """
    values = {
        name: space[name].value(params[name]) for name in parameter_order(space) if name in params
    }
    return put_values(tree, values)


def put_values(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Tree:
    """Return a copy of a config's tree with each value at its dotted path; sections are laid over what is there.

    Raises:
        ConfigError: a path runs through a value that is no section.
    """
    result: Tree = json.loads(json.dumps(dict(tree), default=str))
    for path, value in values.items():
        node, parts = result, path.split(".")
        for part in parts[:-1]:
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"{path}: {part} holds {child!r}, not a section; set it whole")
            node = child
        node[parts[-1]] = _laid_over(node.get(parts[-1]), value)
    return result


def _laid_over(before: Any, value: Any) -> Any:
    if not isinstance(before, dict) or not isinstance(value, Mapping):
        return value
    return before | {key: _laid_over(before.get(key), item) for key, item in value.items()}


def _check_range(low: float, high: float, log: bool) -> None:
    if not low < high:
        raise ConfigError(f"low must be under high, found low {low} and high {high}")
    if log and low <= 0:
        raise ConfigError(f"low must be over 0 with log, found {low}; raise it or leave log out")


def _label(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True)
