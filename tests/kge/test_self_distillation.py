"""Self-distillation: its loss equals a slow twin, its memories are what they say, and it changes nothing where it is not asked for."""

import copy
import math

import numpy as np
import pytest
import torch

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.confidence import (
    SemanticModule,
    Views,
    gate_confidence,
    gate_loss,
    standardized,
)
from loopfm_ray.kge.memory import make_memory
from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.objectives import (
    KVsAllConfig,
    OneVsAllConfig,
    SelfAdversarialConfig,
    make_objective,
    score_answers,
)
from loopfm_ray.kge.self_distillation import SelfDistillation, SelfDistillationConfig
from tests.kge.test_objectives import random_graph
from tests.kge.test_training import fit, same_bits

LOSSES = {
    "one_vs_all": OneVsAllConfig(),
    "k_vs_all": KVsAllConfig(),
    "drawn": SelfAdversarialConfig(num_negatives=5, margin=1.0),
}
MEMORIES = {
    "average": {"kind": "average", "decay": 0.9},
    "snapshot": {"kind": "snapshot", "every": 2},
    "last_visit": {"kind": "last_visit", "num_kept": 4},
    "visits": {"kind": "last_visit", "num_kept": 4, "decay": 0.6},
}


def config_of(**tree):
    return validate(SelfDistillationConfig, {"begin_epoch": 0, "ramp_epochs": 1, **tree}, "test")


def model_of(graph, seed=0, dimension=4):
    torch.manual_seed(seed)
    tree = {"kind": "complex", "dimension": dimension, "init_scale": 1.0}
    return build_kge(read_kge_config(tree), graph.num_entities, graph.num_relations)


def begun(loss="one_vs_all", **tree):
    """A distillation from another model's weights, and a batch that the present model was asked."""
    graph = random_graph()
    model, earlier = model_of(graph), model_of(graph, seed=1)
    objective = make_objective(graph, LOSSES[loss])
    past = SelfDistillation(
        config_of(memory={"kind": "snapshot"}, **tree), copy.deepcopy(model), objective
    )
    past.after_epoch(earlier, 1)
    batch = np.random.default_rng(0).permutation(objective.num_rows)[:7]
    asked, _ = objective.ask(model, batch, np.random.default_rng(1))
    return graph, model, earlier, past, asked


def known_answers(graph, asked, row):
    """The answers of a question in the training triples, by looking at all of them."""
    entity, relation = int(asked.entity[row]), int(asked.relation[row])
    found = set()
    for head, name, tail in graph.train.tolist():
        if (head, name) == (entity, relation):
            found.add(tail)
        if (tail, name + graph.num_relations) == (entity, relation):
            found.add(head)
    return found


def z(values):
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return [(value - mean) / spread for value in values]


def softmax(values, temperature=1.0):
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def penalty_by_hand(graph, earlier, asked, tree, num_candidates, gate=None):
    """The formulas of the module, question by question and candidate by candidate."""
    before = score_answers(earlier, asked.entity, asked.relation, asked.candidates).tolist()
    total = 0.0
    for row, (old, new) in enumerate(zip(before, asked.scores.tolist(), strict=True)):
        order = sorted(range(len(old)), key=lambda place: -old[place])[:num_candidates]
        answer = None if asked.answer is None else int(asked.answer[row])
        if answer is not None and answer not in order:
            order[-1] = answer
        entities = range(len(old)) if asked.candidates is None else asked.candidates[row].tolist()
        true = [entities[place] in known_answers(graph, asked, row) for place in order]
        old, new = [old[place] for place in order], [new[place] for place in order]
        trusted, each = 1.0, [1.0] * len(order)
        kind = tree.get("confidence", {"kind": "even"})["kind"]
        if kind == "probability":
            trusted = sum(p for p, is_true in zip(softmax(old), true, strict=True) if is_true)
        elif kind == "rank":
            best = max((o for o, is_true in zip(old, true, strict=True) if is_true), default=None)
            trusted = 0.0 if best is None else 1.0 / (1 + sum(o > best for o in old))
        elif kind == "semantic":
            views = Views(torch.tensor([old]), torch.tensor([new]), torch.tensor([true]))
            told = torch.sigmoid(gate(views))[0].tolist()
            of_true = [g for g, is_true in zip(told, true, strict=True) if is_true]
            trusted = sum(of_true) / len(of_true) if of_true else 0.0
            each = [abs(2 * g - 1) ** 2.0 for g in told]
        divergence = tree.get("divergence", {"kind": "huber", "threshold": 1.0})
        if divergence["kind"] == "huber":
            d = divergence["threshold"]
            gaps = [abs(a - b) for a, b in zip(z(new), z(old), strict=True)]
            huber = [a * a / 2 if a <= d else d * (a - d / 2) for a in gaps]
            distance = sum(c * h for c, h in zip(each, huber, strict=True)) / len(order)
        else:
            t = divergence["temperature"]
            pairs = zip(softmax(old, t), softmax(new, t), strict=True)
            distance = t * t * sum(p * (math.log(p) - math.log(q)) for p, q in pairs)
        total += trusted * distance
    return total / len(before)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_candidates", [4, None])
@pytest.mark.parametrize(
    "tree",
    [
        {"confidence": {"kind": "even"}},
        {"confidence": {"kind": "even"}, "divergence": {"kind": "huber", "threshold": 0.3}},
        {"confidence": {"kind": "probability"}},
        {"confidence": {"kind": "rank"}, "divergence": {"kind": "kl", "temperature": 2.0}},
        {"confidence": {"kind": "semantic", "sharpness": 2.0}},
    ],
    ids=["even", "threshold", "probability", "rank_kl", "semantic"],
)
def test_the_loss_is_that_of_the_formulas(loss, num_candidates, tree):
    graph, _, earlier, past, asked = begun(loss, num_candidates=num_candidates, weight=3.0, **tree)
    expected = penalty_by_hand(graph, earlier, asked, tree, num_candidates, past.gate)
    assert float(past.penalty(asked, 0).detach()) == pytest.approx(3.0 * expected, rel=1e-4)
    assert expected > 0


def test_gradients_reach_the_present_scores_alone():
    _, model, _, past, asked = begun(confidence={"kind": "semantic"})
    past.penalty(asked, 0).backward()
    assert model.entity.grad.abs().sum() > 0
    assert all(value.grad is None for value in past.gate.parameters())
    assert all(value.grad is None for value in past.memory.model.parameters())


def test_the_weight_waits_and_then_grows_in_equal_steps():
    _, _, _, past, asked = begun(begin_epoch=2, ramp_epochs=4, weight=8.0)
    assert [past.weight_at(epoch) for epoch in range(8)] == [0, 0, 2, 4, 6, 8, 8, 8]
    assert past.penalty(asked, 1) == 0.0
    first, last = float(past.penalty(asked, 2).detach()), float(past.penalty(asked, 6).detach())
    assert last == pytest.approx(4 * first)


def test_the_average_is_the_recurrence_and_starts_after_the_first_epoch():
    graph = random_graph()
    model, objective = model_of(graph), make_objective(graph, LOSSES["one_vs_all"])
    memory = make_memory(config_of(memory=MEMORIES["average"]).memory, model, objective, None)
    asked, _ = objective.ask(model, np.arange(3), np.random.default_rng(0))
    memory.after_step(model, asked)
    assert memory.recall(asked) is None
    memory.after_epoch(model, 1)
    expected = model.entity.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.entity.add_(step)
        memory.after_step(model, asked)
        expected = 0.9 * expected + 0.1 * model.entity.detach()
    torch.testing.assert_close(memory.model.entity.data, expected)
    memory.after_epoch(model, 2)
    torch.testing.assert_close(memory.model.entity.data, expected)


def test_a_snapshot_is_the_model_of_every_other_epoch():
    graph = random_graph()
    model, objective = model_of(graph), make_objective(graph, LOSSES["drawn"])
    memory = make_memory(config_of(memory=MEMORIES["snapshot"]).memory, model, objective, None)
    asked, _ = objective.ask(model, np.arange(3), np.random.default_rng(0))
    seen = []
    for epoch in range(1, 6):
        with torch.no_grad():
            model.entity.fill_(epoch)
        memory.after_epoch(model, epoch)
        known = memory.recall(asked)
        seen.append(None if known is None else int(memory.model.entity[0, 0]))
    assert seen == [None, 2, 2, 4, 4]


@pytest.mark.parametrize("loss", ["one_vs_all", "k_vs_all"])
def test_the_last_visit_is_remembered_by_question(loss):
    graph = random_graph()
    model, objective = model_of(graph), make_objective(graph, LOSSES[loss])
    memory = make_memory(config_of(memory=MEMORIES["last_visit"]).memory, model, objective, None)
    rows, generator = np.arange(objective.num_rows), np.random.default_rng(0)
    halves = np.array_split(rows, 2)
    asked = [objective.ask(model, half, generator)[0] for half in halves]
    memory.after_step(model, asked[0])
    if loss == "k_vs_all":
        assert memory.recall(asked[1]) is None
    memory.after_step(model, asked[1])
    before = [one.scores.detach().clone() for one in asked]
    with torch.no_grad():
        model.entity.mul_(-1.5)
    again = objective.ask(model, halves[0], generator)[0]
    known = memory.recall(again)
    best = before[0].topk(4, dim=1).values
    torch.testing.assert_close(known.scores, best)
    torch.testing.assert_close(before[0].gather(1, known.columns), best)
    memory.after_step(model, again)
    torch.testing.assert_close(memory.recall(again).scores, again.scores.detach().topk(4).values)


@pytest.mark.parametrize("loss", ["one_vs_all", "k_vs_all"])
def test_visits_are_averaged_question_by_question(loss):
    """A twin in dictionaries: what was kept is averaged, what was not counts as it is now, the best of both are kept."""
    graph = random_graph()
    model, objective = model_of(graph), make_objective(graph, LOSSES[loss])
    memory = make_memory(config_of(memory=MEMORIES["visits"]).memory, model, objective, None)
    generator, kept = np.random.default_rng(0), {}
    for _ in range(6):
        rows = generator.permutation(objective.num_rows)
        for batch in np.array_split(rows, 3):
            asked, _ = objective.ask(model, batch, generator)
            memory.after_step(model, asked)
            questions = objective.question_of_rows()[asked.rows].tolist()
            for row, question in enumerate(questions):
                if question in questions[:row]:
                    continue
                scores, before = asked.scores[row].tolist(), kept.get(question, {})
                best = sorted(range(len(scores)), key=lambda place: -scores[place])[:4]
                found = {place: scores[place] for place in best}
                found |= {place: 0.6 * old + 0.4 * scores[place] for place, old in before.items()}
                chosen = sorted(found, key=lambda place: -found[place])[:4]
                kept[question] = {place: found[place] for place in chosen}
        with torch.no_grad():
            model.entity.add_(0.3 * torch.randn_like(model.entity))
    asked, _ = objective.ask(model, np.arange(objective.num_rows), generator)
    known = memory.recall(asked)
    for row, question in enumerate(objective.question_of_rows().tolist()):
        mine = dict(zip(known.columns[row].tolist(), known.scores[row].tolist(), strict=True))
        assert mine.keys() == kept[question].keys()
        assert mine == pytest.approx(kept[question], abs=1e-5)


@pytest.mark.parametrize("name", ["complex", "tucker"])
def test_the_average_is_served_where_that_is_asked_for(name, tmp_path):
    tree = {"memory": MEMORIES["average"], "weight": 0.0, "serves": "average"}
    plain = fit(name)
    seen = []

    def watch(epoch, loss):
        seen.append(epoch)
        if epoch == 3 and len(seen) == 3:
            raise KeyboardInterrupt

    served = fit(name, distillation=tree)
    assert not same_bits(plain, served)
    assert [point.loss for point in served.curve] == [point.loss for point in plain.curve]
    assert not served.model.training
    # whatever is served, the same is learnt
    still = {**tree, "memory": {"kind": "average", "decay": 0.0}}
    assert same_bits(plain, fit(name, distillation=still))
    with pytest.raises(KeyboardInterrupt):
        fit(name, tmp_path / "state.pt", watch, distillation=tree)
    rest = fit(name, tmp_path / "state.pt", distillation=tree)
    assert same_bits(served, rest)
    assert served.curve == rest.curve


@pytest.mark.parametrize("memory", ["average", "snapshot"])
def test_a_memory_is_one_copy_of_the_weights(memory):
    graph = random_graph()
    model, objective = model_of(graph), make_objective(graph, LOSSES["drawn"])
    kept = make_memory(config_of(memory=MEMORIES[memory]).memory, model, objective, None)
    assert kept.state_dict() == {}
    kept.after_epoch(model, 2)
    sizes = [sum(value.numel() for value in one.state_dict().values()) for one in (kept, model)]
    assert sizes[0] == sizes[1]


def test_the_gate_learns_to_tell_what_the_earlier_self_knew():
    """Answers lie where the earlier scores are high; between the two, chance decides, and the gate is in doubt."""
    torch.manual_seed(0)
    gate = SemanticModule(16)
    adam = torch.optim.Adam(gate.parameters(), lr=0.01)

    def draw():
        earlier = torch.randn(64, 16)
        likely = torch.sigmoid(8.0 * (standardized(earlier) - 0.5))
        return Views(earlier, torch.randn(64, 16), torch.rand(64, 16) < likely)

    for _ in range(300):
        adam.zero_grad()
        views = draw()
        gate_loss(gate(views), views.is_answer).backward()
        adam.step()
    views = draw()
    place = standardized(views.earlier)
    of_question, of_candidate = gate_confidence(gate(views), views.is_answer, sharpness=1.0)
    assert of_candidate[place > 1.2].mean() > 0.9
    assert of_candidate[place < -0.2].mean() > 0.9
    assert of_candidate[(place - 0.5).abs() < 0.1].mean() < 0.5
    assert of_question.mean() > 0.7
    passed = gate_confidence(gate(views), views.is_answer, sharpness=0.0)[1]
    torch.testing.assert_close(passed, torch.ones_like(passed))


def test_with_no_weight_the_model_is_the_plain_one():
    plain = fit("complex")
    for memory in MEMORIES.values():
        assert same_bits(plain, fit("complex", distillation={"weight": 0.0, "memory": memory}))
    changed = fit("complex", distillation={"begin_epoch": 1, "ramp_epochs": 1})
    assert not same_bits(plain, changed)


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("complex", "last_visit"),
        ("complex", "average"),
        ("complex", "visits"),
        ("tucker", "average"),  # batch norm and dropout
        ("simple", "last_visit"),
        ("rotate", "snapshot"),
        ("transe", "average"),
    ],
)
def test_a_training_that_is_cut_remembers_to_the_same_bits(name, memory, tmp_path):
    tree = {
        "memory": MEMORIES[memory],
        "begin_epoch": 1,
        "ramp_epochs": 3,
        "num_candidates": 5,
    }
    whole = fit(name, distillation=tree)

    def cut(epoch, loss):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(name, tmp_path / "state.pt", cut, distillation=tree)
    rest = fit(name, tmp_path / "state.pt", distillation=tree)
    assert same_bits(whole, rest)
    assert whole.curve == rest.curve
    assert not same_bits(whole, fit(name))


def test_a_student_follows_its_teacher():
    """From two starts, with no weight on anything but the teacher's scores in effect, students come to rank as it does."""
    teacher = fit("complex", seed=5, epochs=40, eval_every=20).model

    def distance(model):
        entity, relation = torch.arange(20), torch.arange(20) % 6
        with torch.no_grad():
            both = [standardized(score_answers(one, entity, relation)) for one in (model, teacher)]
        return float((both[0] - both[1]).square().mean())

    tree = {
        "memory": {"kind": "teacher"},
        "confidence": {"kind": "even"},
        "begin_epoch": 0,
        "ramp_epochs": 1,
        "num_candidates": None,
        "weight": 50.0,
    }
    alone = fit("complex", epochs=40, eval_every=40).model
    taught = fit("complex", epochs=40, eval_every=40, distillation=tree, teacher=teacher).model
    assert distance(taught) < 0.5 * distance(alone)


def test_memories_that_do_not_fit_are_refused():
    teacher = fit("complex").model
    with pytest.raises(ConfigError, match="take average or snapshot"):
        fit("transe", distillation={"memory": {"kind": "last_visit"}})
    with pytest.raises(ConfigError, match="none was given as teacher"):
        fit("complex", distillation={"memory": {"kind": "teacher"}})
    with pytest.raises(ConfigError, match="one was given as teacher"):
        fit("complex", distillation={}, teacher=teacher)
    with pytest.raises(ConfigError, match=r"train\.distillation is null"):
        fit("complex", teacher=teacher)
    with pytest.raises(ConfigError, match=r"serves is average and memory\.kind last_visit"):
        fit("complex", distillation={"memory": MEMORIES["visits"], "serves": "average"})
    other = model_of(random_graph())
    with pytest.raises(ConfigError, match="train the teacher on the same graph"):
        fit("complex", distillation={"memory": {"kind": "teacher"}}, teacher=other)
