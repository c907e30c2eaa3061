"""A small knowledge graph on disk, and the config of a training on it that takes a second."""

GRAPH = {
    "kind": "kge",
    "name": "graph",
    "backbone": {"kind": "distmult", "dimension": 8},
    "train": {"batch_size": 64, "epochs": 8, "eval_every": 1},
}


def write_graph(folder):
    folder.mkdir()
    lines = [f"e{i}\tr{i % 3}\te{(7 * i + 3) % 40}" for i in range(200)]
    (folder / "train.txt").write_text("\n".join(lines[:160]) + "\n")
    (folder / "valid.txt").write_text(
        "\n".join(f"e{i % 40}\tr0\te{(i + 1) % 40}" for i in range(20)) + "\n"
    )
    (folder / "test.txt").write_text(
        "\n".join(f"e{i % 40}\tr1\te{(i + 2) % 40}" for i in range(20)) + "\n"
    )
    return folder


def graph_base(folder):
    return {**GRAPH, "graph": {"kind": "splits", "path": str(write_graph(folder / "graph"))}}
