"""Slow twin of the target attention: one row, one head, one event at a time."""

import torch


def target_attention(module, query, values, side, mask, row):
    heads, dim = module.num_heads, module.value_dim
    asked = module.query(query).view(len(query), heads, dim + module.side_dim)
    out = []
    for index in range(len(query)):
        group = int(row[index])
        entries = [i for i in range(mask.shape[1]) if mask[group, i]]
        found, strength, count = [], [], []
        for head in range(heads):
            by_value, by_side = asked[index, head, :dim], asked[index, head, dim:]
            keys = [values[group, i] * module.gain for i in entries]
            scores = torch.stack(
                [
                    by_value @ key + by_side @ side[group, i]
                    for key, i in zip(keys, entries, strict=True)
                ]
            )
            weights = torch.softmax(scores, 0)
            found.append(sum(w * key for w, key in zip(weights, keys, strict=True)))
            strength.append(torch.logsumexp(scores, 0) / 4)
            count.append(torch.log1p(torch.sigmoid(scores - module.threshold[head]).sum()))
        out.append(torch.cat([*found, torch.stack(strength), torch.stack(count)]))
    return torch.stack(out)
