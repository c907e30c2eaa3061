"""The graph of the benchmarks of knowledge graph embedding: a published one, or a random one of given sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from loopfm_ray.kge.triples import TripleSet, read_triples


def load_graph(root: Path | None, synthetic: str | None) -> TripleSet:
    """Read the graph in `root`, or make one of `synthetic`, "entities,relations,train,test"."""
    if synthetic:
        return make_graph(*map(int, synthetic.split(",")))
    if root is None or not root.is_dir():
        raise SystemExit(
            f"{root} is no directory; give --root, or --synthetic 14541,237,272115,20466"
        )
    return read_triples(root)


def make_graph(num_entities: int, num_relations: int, num_train: int, num_test: int) -> TripleSet:
    """Draw triples whose entities are as uneven as in published graphs: the k-th has a share of about 1 / sqrt(k)."""
    rng = np.random.default_rng(0)
    sizes = (num_train, num_test, num_test)
    entities = (num_entities * rng.random((sum(sizes), 2)) ** 2).astype(np.int64)
    relations = rng.integers(0, num_relations, sum(sizes))
    triples = np.stack([entities[:, 0], relations, entities[:, 1]], axis=1)
    train, valid, test = np.split(triples, np.cumsum(sizes)[:-1])
    return TripleSet(
        entities=tuple(str(number) for number in range(num_entities)),
        relations=tuple(str(number) for number in range(num_relations)),
        train=train,
        valid=valid,
        test=test,
        num_train_entities=num_entities,
        num_train_relations=num_relations,
    )


def cut(graph: TripleSet, num_train: int, num_test: int) -> TripleSet:
    """Keep random triples of training and test, as many as said or all; the sizes of the tables stay."""
    rng = np.random.default_rng(0)
    train, test = (
        part[np.sort(rng.permutation(len(part))[: num or None])]
        for part, num in ((graph.train, num_train), (graph.test, num_test))
    )
    return replace(graph, train=train, test=test)
