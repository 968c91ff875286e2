"""common.token_logprobs against the naive way: all logits, log_softmax, gather."""

import pytest
import torch

import common
from tiny import ARCHITECTURES, model_of


def naive(model, input_ids, attention_mask, completion_mask, temperature=1.0):
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits / temperature
    logps = torch.zeros(input_ids.shape)
    logps[:, 1:] = logits.float().log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2)
    return logps * completion_mask


def batch(left=False):
    """Four rows of different length, [4, 14]."""
    input_ids = torch.randint(4, 61, (4, 14))
    attention_mask, completion_mask = torch.zeros(4, 14, dtype=torch.long), torch.zeros(4, 14, dtype=torch.long)
    for row, (prompt, completion) in enumerate([(1, 3), (4, 10), (6, 1), (5, 5)]):
        start = 14 - prompt - completion if left else 0
        attention_mask[row, start:start + prompt + completion] = 1
        completion_mask[row, start + prompt:start + prompt + completion] = 1
    return input_ids, attention_mask, completion_mask


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients(name, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(common, "LOGITS_AT_ONCE", 61 * 5)
    model = model_of(name)
    input_ids, attention_mask, completion_mask = batch()
    weights = torch.randn(4, 14)
    values, gradients = [], []
    for logps in (naive(model, input_ids, attention_mask, completion_mask, 0.7),
                  common.token_logprobs(model, input_ids, None, completion_mask, 0.7)):
        model.zero_grad()
        (logps * weights).sum().backward()
        values.append(logps.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    for expected, ours in zip(*gradients):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_left_padding_changes_nothing(name):
    """With a mask, positions count from the first real token (GPT-2's are absolute), also under a sliding window."""
    model = model_of(name)
    input_ids, _, completion_mask = batch()
    left_ids, left_mask, left_completion_mask = batch(left=True)
    left_ids[left_mask.bool()] = input_ids[batch()[1].bool()]
    with torch.no_grad():
        right = common.token_logprobs(model, input_ids, None, completion_mask)
        left = common.token_logprobs(model, left_ids, left_mask, left_completion_mask)
    torch.testing.assert_close(left[left_completion_mask.bool()], right[completion_mask.bool()], atol=1e-5, rtol=1e-5)


def test_what_fills_the_padding_is_never_read():
    model = model_of("llama")
    input_ids, attention_mask, completion_mask = batch()
    other_ids = torch.where(attention_mask.bool(), input_ids, torch.randint(0, 61, (4, 14)))
    with torch.no_grad():
        assert torch.equal(common.token_logprobs(model, input_ids, None, completion_mask),
                           common.token_logprobs(model, other_ids, None, completion_mask))


@pytest.mark.parametrize("chunked", [False, True])
def test_no_logits_beyond_the_completions(chunked, monkeypatch):
    """The head sees completion positions only (and one row to check itself against), LOGITS_AT_ONCE at a time."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 61 * 5 if chunked else 2**26)
    model = model_of("llama")
    input_ids, _, completion_mask = batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel() // 61))
    common.token_logprobs(model, input_ids, None, completion_mask).sum().backward()
    assert sorted(seen) == ([1, 1, 4, 4] + [5] * 6 if chunked else [1, 1, 19])  # each chunk again in the backward pass


def test_an_unknown_logit_transformation_is_refused():
    model = model_of("llama")
    forward = model.forward

    def scaled(**kwargs):
        output = forward(**kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(common.UserError, match="logits_of"):
        common.token_logprobs(model, batch()[0], None, batch()[2])


def test_sequence_logprobs_and_micro_batches():
    model = model_of("qwen2")
    rows = [([5] * p + list(range(4, 4 + c)), [0] * p + [1] * c) for p, c in [(2, 3), (9, 4), (1, 1), (4, 8), (3, 3)]]
    one_by_one = [common.sequence_logprobs(model, [row])[0] for row in rows]
    for size in (1, 2, 5, None):
        together = common.sequence_logprobs(model, rows, size)
        torch.testing.assert_close(together, torch.stack(one_by_one), atol=1e-5, rtol=1e-5)
    groups = common.micro_batches([7, 1, 5, 3], None, tokens=10)
    assert groups == [[1, 3], [2], [0]] and common.micro_batches([7, 1, 5, 3], 3) == [[1, 3, 2], [0]]
