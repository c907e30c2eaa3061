import json

from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.jobs.programs import Waiting, plan_programs

ONE, FOUR = (1, False), (4, True)


def waiting(costs, workers=ONE):
    return {key: Waiting(cost, workers) for key, cost in costs.items()}


def members(programs):
    return [key for program in programs for key in program.keys]


def test_few_vms_take_one_run_for_each_place_with_even_loads(tmp_path):
    costs = {"none": 1, "kd": 1, "loopfm": 3, "kd_loopfm": 3, "raw": 5}
    programs = plan_programs(waiting(costs), 2, tmp_path / "plan.json")
    loads = [sum(costs[key] for key in program.keys) for program in programs]
    assert sorted(members(programs)) == sorted(costs)
    assert loads == [7, 6]


def test_a_place_for_each_vm_gives_each_its_own_run(tmp_path):
    programs = plan_programs(waiting({"a": 1, "b": 2}), 8, tmp_path / "plan.json")
    assert [program.keys for program in programs] == [("b",), ("a",)]


def test_vms_with_other_workers_are_in_other_runs(tmp_path):
    costs = waiting({"a": 1, "b": 1}) | waiting({"c": 9, "d": 9}, FOUR)
    programs = plan_programs(costs, 1, tmp_path / "plan.json")
    assert [program.keys for program in programs] == [("c", "d"), ("a", "b")]


def test_what_an_earlier_plan_says_holds_for_those_that_still_wait(tmp_path):
    """A run keeps its name, and with it its checkpoint, whatever has been finished or come new since."""
    file = tmp_path / "plan.json"
    before = plan_programs(waiting(dict.fromkeys("abcdefgh", 1)), 2, file)
    left = before[0].keys[1:]
    after = plan_programs(waiting({**dict.fromkeys(left, 1), "new": 5}), 2, file)
    assert {program.name: program.keys for program in after}[before[0].name] == left
    assert sorted(members(after)) == sorted([*left, "new"])
    assert json.loads(file.read_text()) == {one.name: list(one.keys) for one in after}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.floats(0.5, 9), min_size=1),
    st.integers(1, 5),
)
def test_each_vm_is_in_one_run_and_no_run_is_much_longer_than_it_has_to_be(
    tmp_path_factory, costs, places
):
    programs = plan_programs(waiting(costs), places, tmp_path_factory.mktemp("plan") / "p.json")
    assert sorted(members(programs)) == sorted(costs)
    loads = [sum(costs[key] for key in program.keys) for program in programs]
    mean = sum(costs.values()) / len(programs)
    # Graham: no list schedule is above the mean and one more task
    assert max(loads) <= mean + max(costs.values()) + 1e-9
    assert loads == sorted(loads, reverse=True)
