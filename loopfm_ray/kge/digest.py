"""What tells whether two graphs hold the same triples, however their files are ordered and written."""

import hashlib

from loopfm_ray.kge.triples import SPLITS, Split, TripleSet

__all__ = ["graph_digest", "split_digest"]


def split_digest(graph: TripleSet, name: Split) -> str:
    r"""Return the SHA-256 (hex) of the distinct triples of a split: sorted lines `head\trelation\ttail\n` in UTF-8."""
    entities, relations = graph.entities, graph.relations
    lines = {
        f"{entities[head]}\t{relations[relation]}\t{entities[tail]}\n"
        for head, relation, tail in graph.split(name).tolist()
    }
    digest = hashlib.sha256()
    for line in sorted(lines):
        digest.update(line.encode())
    return digest.hexdigest()


def graph_digest(graph: TripleSet) -> str:
    """Return the SHA-256 (hex) of the digests of all splits, in the order train, valid, test."""
    digests = [split_digest(graph, name) for name in SPLITS]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
