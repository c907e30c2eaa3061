"""The published score functions, one triple at a time in numpy, from the weights of a model in double precision."""

import numpy as np


def as_complex(vector):
    real, imaginary = np.split(vector, 2)
    return real + 1j * imaginary


def transe_l1(weights, h, r, t):
    return -np.sum(
        np.abs(weights["entity"][h] + weights["relations.weight"][r] - weights["entity"][t])
    )


def transe_l2(weights, h, r, t):
    moved = weights["entity"][h] + weights["relations.weight"][r] - weights["entity"][t]
    return -np.sqrt(np.sum(moved**2))


def rotate(weights, h, r, t):
    phases = weights["relations.weight"][r]
    bound = (9.0 + 2.0) / len(phases)
    turned = as_complex(weights["entity"][h]) * np.exp(1j * np.pi * phases / bound)
    return -np.sum(np.abs(turned - as_complex(weights["entity"][t])))


def rote(weights, h, r, t):
    head, cosines, moved = weights["entity"][h], [], np.empty_like(weights["entity"][h])
    half = len(head) // 2
    for k in range(half):
        pair = weights["relations.rotation"][r][[k, half + k]]
        cosine, sine = pair / np.linalg.norm(pair)
        cosines.append(cosine)
        turn = np.array([[cosine, -sine], [sine, cosine]])
        moved[[k, half + k]] = turn @ head[[k, half + k]]
    distance = moved + weights["relations.translation"][r] - weights["entity"][t]
    return -np.sum(distance**2) + weights["head_bias"][h] + weights["tail_bias"][t]


def distmult(weights, h, r, t):
    return np.sum(weights["entity"][h] * weights["relations.weight"][r] * weights["entity"][t])


def complex_(weights, h, r, t):
    head, relation, tail = (
        as_complex(row)
        for row in (weights["entity"][h], weights["relations.weight"][r], weights["entity"][t])
    )
    return np.real(np.sum(head * relation * np.conj(tail)))


def simple(weights, h, r, t):
    h_head, h_tail = np.split(weights["entity"][h], 2)
    t_head, t_tail = np.split(weights["entity"][t], 2)
    forward, inverse = np.split(weights["relations.weight"][r], 2)
    return (np.sum(h_head * forward * t_tail) + np.sum(t_head * inverse * h_tail)) / 2


def tucker(weights, h, r, t):
    head, tail = weights["entity"][h], weights["entity"][t]
    relation, core = weights["relations.weight"][r], weights["relations.core"]
    return sum(
        core[k, i, j] * relation[k] * head[i] * tail[j]
        for k in range(core.shape[0])
        for i in range(core.shape[1])
        for j in range(core.shape[2])
    )


def normalized(x, weights, name):
    """Batch norm of one row or picture [channels, ...] as it is in evaluation."""
    mean, variance, gain, shift = (
        weights[f"relations.{name}.{part}"]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    shape = (-1,) + (1,) * (x.ndim - 1)
    scaled = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + 1e-5)
    return scaled * gain.reshape(shape) + shift.reshape(shape)


def tucker_normalized(weights, h, r, t):
    head = normalized(weights["entity"][h], weights, "norm_in")
    matrix = sum(
        weight * part
        for weight, part in zip(
            weights["relations.weight"][r], weights["relations.core"], strict=True
        )
    )
    return np.sum(normalized(head @ matrix, weights, "norm_out") * weights["entity"][t])


def conve(weights, h, r, t):
    """Dimension 12 as 3 rows of 4."""
    picture = np.concatenate(
        [weights["entity"][h].reshape(3, 4), weights["relations.weight"][r].reshape(3, 4)]
    )
    picture = normalized(picture[None], weights, "norm_in")[0]
    filters = weights["relations.filters.weight"]
    maps = np.array(
        [
            [
                [np.sum(one[0] * picture[i : i + 3, j : j + 3]) + bias for j in range(2)]
                for i in range(4)
            ]
            for one, bias in zip(filters, weights["relations.filters.bias"], strict=True)
        ]
    )
    maps = np.maximum(normalized(maps, weights, "norm_maps"), 0)
    dense = weights["relations.dense.weight"] @ maps.ravel() + weights["relations.dense.bias"]
    query = np.maximum(normalized(dense, weights, "norm_out"), 0)
    return np.sum(query * weights["entity"][t]) + weights["tail_bias"][t]
