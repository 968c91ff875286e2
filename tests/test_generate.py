"""common.generate: the tokens of model.generate, log-probabilities of a teacher-forced pass, and every way to stop."""

import pytest
import torch

import common
from common import generate, sample_token, stop_ids, token_logprobs
from tiny import ARCHITECTURES, Ids, model_of

PROMPTS = [[5, 9, 11], [7, 8, 20, 33, 6, 41, 9, 12], [30], [5, 9, 11, 12, 40]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_model_generate(name):
    """Prompts of unequal length in one batch, against model.generate on each alone; sliding windows are exceeded."""
    model = model_of(name)
    rollout = generate(model, Ids(), PROMPTS, 1, 12, temperature=0)
    for prompt, (ids, _) in zip(PROMPTS, rollout.rows):
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
                                  max_new_tokens=12, pad_token_id=0)[0].tolist()
        assert ids == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_teacher_forcing(name):
    """At a temperature, several samples a prompt, rows that stop early and are dropped on the way."""
    model = model_of(name)
    model.generation_config.eos_token_id = list(range(2, 12))  # most rows stop soon
    rollout = generate(model, Ids(), PROMPTS, 6, 20, temperature=1.3)
    forced = token_logprobs(model, rollout.input_ids, None, rollout.completion_mask, 1.3)
    torch.testing.assert_close(rollout.logps, forced.detach(), atol=1e-4, rtol=1e-4)
    assert 3 < rollout.ended.sum() <= 24 and len(set(rollout.completion_mask.sum(1).tolist())) > 3
    for i, (ids, mask) in enumerate(rollout.rows):
        prompt = PROMPTS[i // 6]
        completion = ids[len(prompt):]
        assert ids[:len(prompt)] == prompt and mask == [0] * len(prompt) + [1] * len(completion)
        assert not any(token in range(2, 12) for token in completion[:-1])
        assert rollout.ended[i] == (completion[-1] in range(2, 12)) and (rollout.ended[i] or len(completion) == 20)
        assert rollout.input_ids[i, :len(ids)].tolist() == ids
        told = completion[:len(completion) - bool(rollout.ended[i])]
        assert rollout.completions[i].split() == [str(token) for token in told]


def test_every_stop_token_counts():
    model, tokenizer = model_of("llama"), Ids()
    assert stop_ids(model, tokenizer) == [2]
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [2]


def test_batches_do_not_matter():
    model = model_of("gpt2")
    rollouts = []
    for rows_at_once in (512, 3):  # a sample's draws are its own, whatever is sampled beside it
        torch.manual_seed(3)
        rollouts.append(generate(model, Ids(), PROMPTS, 2, 9, 1.0, rows_at_once=rows_at_once))
    whole, parts = rollouts
    assert whole.rows == parts.rows
    torch.testing.assert_close(whole.logps, parts.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_steps_on_fixed_memory_sample_the_same(name, monkeypatch):
    """What a CUDA graph records, without the graph: where an architecture cannot, or would be wrong, plain steps."""
    model = model_of(name)
    model.generation_config.eos_token_id = list(range(2, 8))
    torch.manual_seed(1)
    plain = generate(model, Ids(), PROMPTS, 6, 20, temperature=1.3)
    monkeypatch.setattr(common, "GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr(common.StaticStep, "capture", lambda self: None)
    torch.manual_seed(1)
    static = generate(model, Ids(), PROMPTS, 6, 20, temperature=1.3)
    assert static.rows == plain.rows and (plain.ended.sum() > 14)
    torch.testing.assert_close(static.logps, plain.logps, atol=1e-5, rtol=1e-4)
    assert getattr(model, "decodes_statically", False) == (name not in ("mistral", "gemma2", "gemma3"))


def test_where_a_graph_cannot_be_recorded_steps_are_plain(monkeypatch):
    model = model_of("llama")
    torch.manual_seed(1)
    plain = generate(model, Ids(), PROMPTS, 2, 9)

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(common, "GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr(common.StaticStep, "capture", refuse)
    torch.manual_seed(1)
    assert generate(model, Ids(), PROMPTS, 2, 9).rows == plain.rows and model.decodes_statically is False


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature):
    """Chi-squared over 40,000 draws, one token impossible: its 99.9% quantile at 5 degrees of freedom is 20.5."""
    logits = torch.tensor([0.3, -1.0, -torch.inf, 2.0, 0.0, 1.0, -torch.inf])
    token, logps = sample_token(logits.expand(40_000, -1), temperature, torch.rand(40_000))
    expected = (logits / temperature).softmax(0)
    counts = token.bincount(minlength=7)
    assert counts[2] == counts[6] == 0
    possible = expected > 0
    assert (((counts - 40_000 * expected) ** 2)[possible] / (40_000 * expected)[possible]).sum() < 20.5
    torch.testing.assert_close(logps, expected.log()[token])


def test_draws_at_both_ends_stay_on_possible_tokens():
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, -torch.inf]])
    for draw, token in ((0.0, 1), (1 - 2**-24, 2)):
        assert sample_token(logits, 1.0, torch.tensor([draw]))[0].item() == token
