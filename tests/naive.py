"""The reference for parallel thoughts: one plain forward per text and thought, nothing shared, no padding.

Used by tests and benchmarks only.
"""

import torch


def row_text(input_ids, attention_mask, row, position):
    """Return the tokens up to and with ``position`` and those after it, padding dropped."""
    real = torch.ones_like(input_ids[row]) if attention_mask is None else attention_mask[row]
    real = real.bool()
    place = int(real[: position + 1].sum())
    text = input_ids[row][real]
    return text[:place], text[place:]


def plain(model, tokens):
    """Return logits (L, V) and final hidden states (L, hidden) of one plain forward with the model's own attention."""
    result = model(tokens.unsqueeze(0), output_hidden_states=True, use_cache=False)
    return result.logits[0], result.hidden_states[-1][0]


def log_softmax(logits, forbid=(), temperature=1.0):
    logits = logits.clone() / temperature
    if len(forbid):
        logits[..., list(forbid)] = -torch.inf
    return logits.log_softmax(-1)


def rescore(model, input_ids, thoughts, attention_mask=None, n_true=4, forbid_true=()):
    """Return the fields of ``Rescored`` by one forward per text and one per text + thought + true tokens."""
    batch, count, number, length = thoughts.tokens.shape
    temperature = thoughts.temperature or 1.0
    size = model.config.get_text_config().vocab_size
    zero = torch.zeros((), dtype=model.dtype)
    full = torch.zeros(batch, count, number, n_true, size, dtype=model.dtype)
    base_full = torch.zeros(batch, count, n_true, size, dtype=model.dtype)
    valid = torch.zeros(batch, count, n_true, dtype=torch.bool)
    logprob = [[zero] * length for _ in range(batch * count * number)]
    entropy = [[zero] * length for _ in range(batch * count * number)]
    true = [[zero] * n_true for _ in range(batch * count * number)]
    base = [[zero] * n_true for _ in range(batch * count)]
    width = model.get_output_embeddings().weight.shape[1]
    hidden = torch.zeros(batch, count, number, n_true, width, dtype=model.dtype)
    base_hidden = hidden[:, :, 0].clone()
    for row in range(batch):
        for slot in range(count):
            position = int(thoughts.positions[row, slot])
            if position < 0:
                continue
            before, after = row_text(input_ids, attention_mask, row, position)
            after = after[:n_true]
            valid[row, slot, : len(after)] = True
            logits, states = plain(model, torch.cat([before, after]))
            for j in range(max(1, len(after))):
                base_hidden[row, slot, j] = states[len(before) - 1 + j]
                base_full[row, slot, j] = log_softmax(logits[len(before) - 1 + j], forbid_true)
            for j in range(len(after)):
                base[row * count + slot][j] = base_full[row, slot, j, after[j]]
            for n in range(number):
                stream = (row * count + slot) * number + n
                thought = thoughts.tokens[row, slot, n, : int(thoughts.lengths[row, slot, n])]
                logits, states = plain(model, torch.cat([before, thought, after]))
                end = len(before) + len(thought)
                for t in thoughts.sampled[row, slot, n].nonzero().flatten().tolist():
                    prediction = log_softmax(logits[len(before) + t - 1], thoughts.forbid, temperature)
                    logprob[stream][t] = prediction[thought[t]]
                    possible = prediction > -torch.inf
                    entropy[stream][t] = -(prediction[possible].exp() * prediction[possible]).sum()
                for j in range(max(1, len(after))):
                    hidden[row, slot, n, j] = states[end - 1 + j]
                    full[row, slot, n, j] = log_softmax(logits[end - 1 + j], forbid_true)
                for j in range(len(after)):
                    true[stream][j] = full[row, slot, n, j, after[j]]

    def stack(lists, *shape):
        return torch.stack([torch.stack(values) for values in lists]).view(*shape)

    return {
        "thought_logprobs": stack(logprob, batch, count, number, length),
        "thought_entropy": stack(entropy, batch, count, number, length),
        "true_logprobs": stack(true, batch, count, number, n_true),
        "base_logprobs": stack(base, batch, count, n_true),
        "valid": valid,
        "base_hidden": base_hidden,
        "thought_hidden": hidden,
        "true_full": full,
        "base_full": base_full,
    }
