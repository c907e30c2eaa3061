"""Slow twins of the history encoders: one row and one event at a time, straight from the papers' equations."""

import math

import torch


def events_of(values, history, index):
    group = int(history.row[index])
    return [values[group, i] for i in range(values.shape[1]) if history.mask[group, i]]


def din(module, query, values, history):
    """The unit MLP on [q, s, q - s, q * s], event by event."""
    asked, out = module.query(query), []
    for index in range(len(query)):
        q, weights = asked[index], []
        events = events_of(values, history, index)
        for s in events:
            x = torch.cat([q, s, q - s, q * s])
            for layer, activation in zip(module.layers, module.activations, strict=True):
                x = activation(layer(x))
            weights.append(module.score(x)[0])
        if events and module.has_softmax:
            weights = list(torch.softmax(torch.stack(weights), 0))
        zero = torch.zeros(values.shape[-1])
        out.append(sum((w * s for w, s in zip(weights, events, strict=True)), zero))
    return torch.stack(out)


def gru_states(gru, events):
    """The states of a GRU, gate by gate, in torch's convention."""
    w_i, w_h = gru.weight_ih_l0.chunk(3), gru.weight_hh_l0.chunk(3)
    b_i, b_h = gru.bias_ih_l0.chunk(3), gru.bias_hh_l0.chunk(3)
    state, out = torch.zeros(gru.hidden_size), []
    for x in events:
        reset = torch.sigmoid(w_i[0] @ x + b_i[0] + w_h[0] @ state + b_h[0])
        keep = torch.sigmoid(w_i[1] @ x + b_i[1] + w_h[1] @ state + b_h[1])
        new = torch.tanh(w_i[2] @ x + b_i[2] + reset * (w_h[2] @ state + b_h[2]))
        state = (1 - keep) * new + keep * state
        out.append(state)
    return out


def gru(module, query, values, history):
    out = []
    for index in range(len(query)):
        states = gru_states(module.gru, events_of(values, history, index))
        out.append(states[-1] if states else torch.zeros(module.out_dim))
    return torch.stack(out)


def augru(module, query, values, history):
    """DIEN, equations 8 and 14 to 16, one step at a time."""
    asked, out, size = module.query(query), [], module.out_dim
    for index in range(len(query)):
        interests = gru_states(module.interests, events_of(values, history, index))
        state = torch.zeros(size)
        if interests:
            attention = torch.softmax(torch.stack([asked[index] @ h for h in interests]), 0)
        for step, h in enumerate(interests):
            x, past = module.inputs(h), module.states.weight @ state
            update = torch.sigmoid(x[:size] + past[:size]) * attention[step]
            reset = torch.sigmoid(x[size : 2 * size] + past[size : 2 * size])
            new = torch.tanh(x[2 * size :] + reset * past[2 * size :])
            state = (1 - update) * state + update * new
        out.append(state)
    return torch.stack(out)


def self_attention(block, events):
    """One transformer block on a list of event vectors."""
    heads = block.num_heads
    mixed = [block.mix(x).view(3, heads, -1) for x in events]
    out = []
    for x, (query, _, _) in zip(events, mixed, strict=True):
        found = []
        for head in range(heads):
            scores = torch.stack([query[head] @ m[1, head] for m in mixed])
            weight = torch.softmax(scores / query.shape[-1] ** 0.5, 0)
            found.append(sum(w * m[2, head] for w, m in zip(weight, mixed, strict=True)))
        x = block.norms[0](x + block.out(torch.cat(found)))
        hidden = torch.nn.functional.leaky_relu(block.up(x))
        out.append(block.norms[1](x + block.down(hidden)))
    return out


def hstu(layer, events, ages):
    """One HSTU layer on a list of event vectors, oldest first: equations 1 to 3, pair by pair."""
    silu, heads = torch.nn.functional.silu, layer.num_heads
    mixed = [silu(layer.mix(x)).view(4, heads, -1) for x in events]  # U, V, Q, K
    out = []
    for i, x in enumerate(events):
        found = []
        for head in range(heads):
            total = 0.0
            for j in range(i + 1):
                order = int(math.log2(i - j + 1.5))
                time = int(math.log2(abs(ages[i] - ages[j]) + 1.5))
                score = mixed[i][2, head] @ mixed[j][3, head]
                score = score + layer.by_order[order, head] + layer.by_time[time, head]
                total = total + silu(score) / len(events) * mixed[j][1, head]
            found.append(total)
        attended = torch.cat(found)
        normed = (attended - attended.mean()) / (attended.var(unbiased=False) + 1e-6).sqrt()
        normed = normed * layer.norm.weight + layer.norm.bias
        out.append(x + layer.out(normed * mixed[i][0].flatten()))
    return out
