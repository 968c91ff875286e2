"""common.token_logprobs against the naive way: all logits, log_softmax, gather."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import common
from common import Row, token_logprobs, uses_packing
from tiny import ARCHITECTURES, model_of

LENGTHS = [(1, 3), (4, 10), (6, 1), (5, 5)]  # of prompt and completion


def naive(model, input_ids, completion_mask, temperature=1.0):
    """Right padding needs no mask: nothing that is read looks at what comes after it."""
    logits = model(input_ids=input_ids).logits / temperature
    all_logps = logits.float().log_softmax(-1)[:, :-1]
    logps = torch.zeros(input_ids.shape)
    logps[:, 1:] = all_logps.gather(2, input_ids[:, 1:, None]).squeeze(2)
    return logps * completion_mask


def batch():
    """Four rows of different length -> input_ids, completion_mask, is_token [4, 14]."""
    input_ids = torch.randint(4, 61, (4, 14))
    at = torch.arange(14)
    prompts, completions = torch.tensor(LENGTHS)[:, :, None].unbind(1)
    is_token = at < prompts + completions
    return input_ids, (is_token & (at >= prompts)).long(), is_token


def shared_prompts():
    """Five rows; the second and third share a start with the first, the last two are equal."""
    torch.manual_seed(0)  # no others are equal by chance
    input_ids = torch.randint(4, 61, (5, 6))
    input_ids[1, :3] = input_ids[0, :3]
    input_ids[2, :2] = input_ids[0, :2]
    input_ids[4] = input_ids[3]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1],
                         [0, 0, 0, 1, 1, 0],
                         [0, 0, 0, 0, 1, 1],
                         [0, 1, 1, 0, 1, 0],
                         [0, 1, 1, 0, 1, 0]])
    return input_ids, mask


def values_and_gradients(model, logps, weights):
    model.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def assert_equal(model, ours, expected):
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    names = [name for name, _ in model.named_parameters()]
    for name, gradient, wanted in zip(names, ours[1], expected[1]):
        torch.testing.assert_close(gradient, wanted, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients(name):
    """At a temperature; the padding of a row is another row's completion, and changes nothing."""
    model = model_of(name)
    input_ids, mask, _ = batch()
    weights = torch.randn(4, 14)
    expected = values_and_gradients(model, naive(model, input_ids, mask, 0.7), weights)
    ours = values_and_gradients(model, token_logprobs(model, input_ids, mask, 0.7), weights)
    assert_equal(model, ours, expected)


def alone(model, input_ids, mask):
    rows = [naive(model, input_ids[i:i + 1], mask[i:i + 1]) for i in range(len(input_ids))]
    return torch.cat(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packing_changes_nothing(name, checkpointing):
    """Values and gradients are those of the rows one by one, activations kept or recomputed.

    Gemma 2 caps its attention's scores, which the fast kernel cannot: it keeps its rows.
    """
    model = model_of(name)
    input_ids, mask = shared_prompts()
    weights = torch.randn(5, 6)
    expected = values_and_gradients(model, alone(model, input_ids, mask), weights)
    packs = name != "gemma2"
    assert uses_packing(model) == packs
    if checkpointing:
        args = SimpleNamespace(lora_rank=0, gradient_checkpointing=True)
        model = common.prepare_for_training(model, args)
    embedded, layers = [], []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embedded.append(inputs[0].shape))
    mlp = next(module for module in model.modules() if type(module).__name__.endswith("MLP"))
    mlp.register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0].shape))
    ours = values_and_gradients(model, token_logprobs(model, input_ids, mask), weights)
    # No padding, no token after the last one that predicts, no start twice.
    assert embedded == [(1, 5 + 1 + 3 + 4) if packs else (5, 6)]
    assert len(layers) == 1 + checkpointing  # recomputed in the backward pass
    assert_equal(model, ours, expected)


CANNOT_BE_PACKED = {
    "mamba": transformers.MambaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4),
    "bloom": transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
        attention_types=[[["global", "local"], 1]]),
    "gpt_oss": transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=16, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.mark.parametrize("name", CANNOT_BE_PACKED)
def test_architectures_that_cannot_be_packed_keep_their_rows(name):
    """Mamba mixes tokens without attention, BLOOM and GPT-Neo have attention of their own, gpt-oss
    has sinks: packed, some of them would be wrong without an error."""
    model = transformers.AutoModelForCausalLM.from_config(CANNOT_BE_PACKED[name]).eval()
    assert not uses_packing(model)
    input_ids, mask, is_token = batch()
    with torch.no_grad():
        logps = token_logprobs(model, input_ids, mask)
        for i, length in enumerate(is_token.sum(1).tolist()):
            expected = naive(model, input_ids[i:i + 1, :length], mask[i:i + 1, :length])[0]
            torch.testing.assert_close(logps[i, :length], expected, atol=1e-5, rtol=1e-5)
            assert logps[i, length:].abs().sum() == 0


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # packed and in rows
def test_what_fills_the_padding_is_never_read(name):
    model = model_of(name)
    input_ids, mask, is_token = batch()
    other_ids = torch.where(is_token, input_ids, torch.randint(0, 61, (4, 14)))
    with torch.no_grad():
        ours = token_logprobs(model, input_ids, mask)
        assert torch.equal(ours, token_logprobs(model, other_ids, mask))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma2"])
def test_logits_exist_only_where_they_predict_a_completion(name):
    """The head sees 3 + 10 + 1 + 5 positions of 4 x 14, by whatever name the model calls it."""
    model = model_of(name)
    input_ids, mask, _ = batch()
    input_ids, mask = input_ids[:, :6], mask[:, :6]  # inside the sliding windows: rows are packed
    seen = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape))
    uses_packing(model)
    token_logprobs(model, input_ids, mask).sum().backward()
    assert seen == [(1, int(mask.sum()), 61)]


def test_dropout_is_off(tmp_path):
    """Also in training mode, which gradient checkpointing needs: a policy with dropout is not the
    policy that sampled."""
    transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path)
    model = common.load_model(str(tmp_path)).train()
    input_ids, mask, _ = batch()
    first, again = (token_logprobs(model, input_ids, mask) for _ in range(2))
    assert torch.equal(first, again)


def test_a_mask_that_begins_at_the_first_token():
    """Nothing predicts it: 0, and no gradient."""
    model = model_of("llama")
    input_ids = torch.randint(4, 61, (2, 5))
    logps = token_logprobs(model, input_ids, torch.ones(2, 5, dtype=torch.long))
    assert logps[:, 0].abs().sum() == 0 and (logps[:, 1:] < 0).all()


def test_sequence_logprobs_and_micro_batches():
    model = model_of("qwen2")
    lengths = [(2, 3), (9, 4), (1, 1), (4, 8), (3, 3)]
    rows = [Row([5] * p + list(range(4, 4 + c)), [0] * p + [1] * c) for p, c in lengths]
    one_by_one = torch.cat([common.sequence_logprobs(model, [row]) for row in rows])
    for size in (1, 2, 5, None):
        together = common.sequence_logprobs(model, rows, size)
        torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-5)
    assert common.micro_batches([7, 1, 5, 3], None, tokens=10) == [[1, 3], [2], [0]]
    assert common.micro_batches([7, 1, 5, 3], 3) == [[1, 3, 2], [0]]


def test_logits_of_a_large_vocabulary_fit_into_a_gigabyte():
    model = model_of("llama")
    assert common.token_budget(model) == 4096
    model.resize_token_embeddings(262_144)
    assert common.token_budget(model) * 262_144 * 4 == 2**30
