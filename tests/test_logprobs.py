"""common.token_logprobs against the naive way: all logits, log_softmax, gather."""

import pytest
import torch
import transformers

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
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packing_changes_nothing(name):
    """Rows that share their start, of a length each, one of them twice: values and gradients as of the rows one by one.
    Gemma 2 caps its attention's scores, which the fast kernel cannot: where that is honoured, it keeps its rows."""
    model = model_of(name)
    torch.manual_seed(0)
    input_ids = torch.randint(4, 61, (5, 6))
    input_ids[1, :3], input_ids[2, :2], input_ids[4] = input_ids[0, :3], input_ids[0, :2], input_ids[3]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 1, 0],
                         [0, 1, 1, 0, 1, 0]])
    weights = torch.randn(5, 6)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert common.can_pack(model) or name == "gemma2"
    seen.clear()
    logps = common.token_logprobs(model, input_ids, None, mask)
    assert seen == [(1, 5 + 1 + 3 + 4) if model.packs else (5, 6)]  # no padding, no last token, no start twice
    (logps * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    ones = torch.ones(1, 6, dtype=torch.long)
    alone = torch.cat([naive(model, input_ids[i:i + 1], ones, mask[i:i + 1]) for i in range(5)])
    (alone * weights).sum().backward()
    torch.testing.assert_close(logps, alone, atol=1e-5, rtol=1e-5)
    for ours, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "bloom", "gpt_neo", "gpt_oss"])
def test_architectures_that_cannot_be_packed_keep_their_rows(name):
    """Mamba mixes tokens without attention, BLOOM and GPT-Neo have attention of their own, gpt-oss has sinks: packed,
    some of them would be wrong without an error."""
    sizes = dict(vocab_size=61, hidden_size=32)
    config = {
        "mamba": lambda: transformers.MambaConfig(**sizes, num_hidden_layers=2, state_size=4),
        "bloom": lambda: transformers.BloomConfig(**sizes, n_layer=2, n_head=4),
        "gpt_neo": lambda: transformers.GPTNeoConfig(**sizes, num_layers=2, num_heads=4, window_size=4,
                                                     attention_types=[[["global", "local"], 1]]),
        "gpt_oss": lambda: transformers.GptOssConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                                                     num_key_value_heads=2, intermediate_size=16, num_local_experts=2,
                                                     num_experts_per_tok=1)}[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not common.can_pack(model)
    input_ids, attention_mask, completion_mask = batch()
    with torch.no_grad():
        logps = common.token_logprobs(model, input_ids, None, completion_mask)
        alone = [naive(model, input_ids[i:i + 1, :n], attention_mask[i:i + 1, :n], completion_mask[i:i + 1, :n])
                 for i, n in enumerate(attention_mask.sum(1).tolist())]
    for row, expected in zip(logps, alone):
        torch.testing.assert_close(row[:expected.shape[1]], expected[0], atol=1e-5, rtol=1e-5)


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
