import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import ConfigError
from loopfm_ray.sweep.space import (
    ChoiceParameter,
    FloatParameter,
    IntParameter,
    apply_params,
    check_space,
    corner_params,
    parameter_order,
    put_values,
    suggest_params,
)

SPACE = {
    "train.weight": FloatParameter(low=0.1, high=10.0, log=True, when={"train.kind": ("on",)}),
    "train.kind": ChoiceParameter(values=("on", "off")),
    "size": ChoiceParameter(values={"small": {"a": 1, "b": [1]}, "large": {"a": 2, "b": [2, 2]}}),
    "steps": IntParameter(low=1, high=10, step=4),
}


class First:
    """Suggests the first value of everything, but for what it was told."""

    def __init__(self, **chosen):
        self.chosen, self.asked = chosen, []

    def _pick(self, name, value):
        self.asked.append(name)
        return self.chosen.get(name, value)

    def suggest_float(self, name, low, high, *, log=False):
        return self._pick(name, low)

    def suggest_int(self, name, low, high, *, step=1, log=False):
        return self._pick(name, low)

    def suggest_categorical(self, name, choices):
        return self._pick(name, choices[0])


def test_a_parameter_comes_after_those_of_its_condition():
    order = parameter_order(SPACE)

    assert order.index("train.kind") < order.index("train.weight")
    assert sorted(order) == sorted(SPACE)


def test_a_parameter_whose_condition_fails_is_not_suggested():
    on, off = First(), First(**{"train.kind": "off"})

    assert suggest_params(SPACE, on)["train.weight"] == 0.1
    assert "train.weight" not in suggest_params(SPACE, off)
    assert "train.weight" not in off.asked


def test_a_condition_on_a_parameter_that_is_off_fails_as_well():
    space = {
        "a": ChoiceParameter(values=(1, 2)),
        "b": ChoiceParameter(values=(1, 2), when={"a": (2,)}),
        "c": ChoiceParameter(values=(1, 2), when={"b": (1,)}),
    }

    assert suggest_params(space, First()) == {"a": 1}
    assert suggest_params(space, First(a=2)) == {"a": 2, "b": 1, "c": 1}


def test_params_are_put_into_the_tree_at_their_paths():
    tree = {"train": {"kind": "off", "lr": 1.0}, "size": {"a": 0, "c": 3}}

    found = apply_params(
        tree, SPACE, {"train.kind": "on", "train.weight": 2.0, "size": "large", "steps": 5}
    )

    assert found == {
        "train": {"kind": "on", "lr": 1.0, "weight": 2.0},
        "size": {"a": 2, "b": [2, 2], "c": 3},
        "steps": 5,
    }
    assert tree == {"train": {"kind": "off", "lr": 1.0}, "size": {"a": 0, "c": 3}}


def test_a_section_that_is_null_in_the_base_can_be_filled():
    assert put_values({"a": None}, {"a.b": 1}) == {"a": {"b": 1}}


def test_a_path_through_a_plain_value_is_refused():
    with pytest.raises(ConfigError, match=r"a\.b\.c: b holds 3, not a section"):
        put_values({"a": {"b": 3}}, {"a.b.c": 1})


def test_choices_of_lists_are_kept_as_text_and_come_back_as_lists():
    item = ChoiceParameter(values=([1, 2], [3]))

    assert item.labels == ("[1, 2]", "[3]")
    assert item.value("[3]") == [3]


def test_the_last_value_of_steps_that_do_not_reach_the_end_is_a_corner():
    assert IntParameter(low=1, high=10, step=4).corners == (1, 9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FloatParameter(low=2.0, high=1.0), "low must be under high"),
        (lambda: FloatParameter(low=0.0, high=1.0, log=True), "low must be over 0 with log"),
        (lambda: IntParameter(low=1, high=9, step=2, log=True), "step must be 1 with log"),
        (lambda: ChoiceParameter(values=(1,)), "at least two"),
        (lambda: ChoiceParameter(values=(1, 1)), "values must differ"),
    ],
)
def test_contradictory_bounds_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_space_is_refused():
    with pytest.raises(ConfigError, match="space is empty"):
        check_space({}, lambda params: params)


def test_a_condition_on_what_is_not_there_is_refused():
    space = {"a": ChoiceParameter(values=(1, 2), when={"b": (1,)})}

    with pytest.raises(ConfigError, match=r"space\.a\.when names \['b'\]"):
        check_space(space, lambda params: params)


def test_a_condition_on_a_value_that_never_comes_is_refused():
    space = {
        "a": ChoiceParameter(values=(1, 2)),
        "b": ChoiceParameter(values=(1, 2), when={"a": (3,)}),
    }

    with pytest.raises(
        ConfigError, match=r"space\.b\.when\.a has \[3\], expected some of \[1, 2\]"
    ):
        check_space(space, lambda params: params)


def test_conditions_in_a_circle_are_refused():
    space = {
        "a": ChoiceParameter(values=(1, 2), when={"b": (1,)}),
        "b": ChoiceParameter(values=(1, 2), when={"a": (1,)}),
    }

    with pytest.raises(ConfigError, match="runs in a circle"):
        parameter_order(space)


def test_every_corner_is_tried_with_its_condition_met():
    tried = []

    check_space(SPACE, tried.append)

    weights = [params["train.weight"] for params in tried if params["train.kind"] == "on"]
    assert {0.1, 10.0} <= set(weights)
    assert {params["size"] for params in tried} == {"small", "large"}
    assert {params["steps"] for params in tried} == {1, 9}


def test_a_value_that_does_not_fit_is_named():
    def build(params):
        if params["steps"] == 9:
            raise ConfigError("too many")

    with pytest.raises(ConfigError, match=r"space\.steps does not fit at 9: too many"):
        check_space(SPACE, build)


@given(st.sampled_from(sorted(SPACE)), st.integers(0, 1))
def test_a_corner_holds_its_value_and_no_parameter_that_is_off(name, place):
    value = SPACE[name].corners[place]

    params = corner_params(SPACE, name, value)

    assert params[name] == value
    assert ("train.weight" in params) == (params["train.kind"] == "on")
