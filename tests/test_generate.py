"""common.generate: the tokens of model.generate, the log-probabilities of a teacher-forced pass,
and every way to stop."""

from types import SimpleNamespace

import pytest
import torch

import common
from common import generate, sample_token, stop_ids, token_logprobs
from tiny import ARCHITECTURES, Ids, model_of

PROMPTS = [[5, 9, 11], [7, 8, 20, 33, 6, 41, 9, 12], [30], [5, 9, 11, 12, 40]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_model_generate(name):
    """Prompts of unequal length in one batch, against model.generate on each alone; sliding windows
    are exceeded. As in a script, the model already has its attention for packed rows."""
    model = model_of(name)
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                             do_sample=False, max_new_tokens=12, pad_token_id=0)
        expected.append(ids[0].tolist())
    common.uses_packing(model)
    rollout = generate(model, Ids(), PROMPTS, 1, 12, temperature=0)
    assert [row.ids for row in rollout.rows] == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_teacher_forcing(name):
    """At a temperature, several completions per prompt, rows that stop early and are dropped."""
    model, stops = model_of(name), list(range(2, 12))
    model.generation_config.eos_token_id = stops  # most rows stop soon
    rollout = generate(model, Ids(), PROMPTS, 6, 20, temperature=1.3)
    forced = token_logprobs(model, rollout.input_ids, rollout.completion_mask, 1.3)
    torch.testing.assert_close(rollout.logps, forced.detach(), atol=1e-4, rtol=1e-4)
    assert 3 < rollout.ended.sum() <= 24
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 3
    for i, (ids, mask) in enumerate(rollout.rows):
        prompt, ended = PROMPTS[i // 6], bool(rollout.ended[i])
        completion = ids[len(prompt):]
        assert ids[:len(prompt)] == prompt
        assert mask == [0] * len(prompt) + [1] * len(completion)
        assert not any(token in stops for token in completion[:-1])
        assert ended == (completion[-1] in stops)
        assert ended or len(completion) == 20
        assert rollout.input_ids[i, :len(ids)].tolist() == ids
        assert rollout.completion_mask[i].nonzero().flatten().tolist() == list(
            range(len(prompt), len(ids)))
        text = completion[:-1] if ended else completion
        assert rollout.completions[i].split() == [str(token) for token in text]


def test_every_stop_token_counts():
    model, tokenizer = model_of("llama"), Ids()
    assert stop_ids(model, tokenizer) == [2]
    model.generation_config.eos_token_id = [7, 9]
    assert stop_ids(model, tokenizer) == [2, 7, 9]
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [2]


@pytest.mark.parametrize("name", ["llama", "mistral"])  # a cache that stays in place, and one not
def test_batches_do_not_matter(name):
    """A completion's draws are its own, whatever is sampled beside it."""
    model = model_of(name)
    rollouts = []
    for rows_at_once in (512, 3):
        torch.manual_seed(3)
        rollouts.append(generate(model, Ids(), PROMPTS, 2, 9, 1.0, rows_at_once=rows_at_once))
    whole, parts = rollouts
    assert whole.rows == parts.rows
    torch.testing.assert_close(whole.logps, parts.logps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_mode_samples_the_same(name):
    """With gradient checkpointing, where some architectures would drop their cache."""
    model = model_of(name)
    torch.manual_seed(1)
    expected = generate(model, Ids(), PROMPTS, 2, 9)
    args = SimpleNamespace(lora_rank=0, gradient_checkpointing=True)
    model = common.prepare_for_training(model, args)
    torch.manual_seed(1)
    rollout = generate(model, Ids(), PROMPTS, 2, 9)
    assert rollout.rows == expected.rows and model.training
    torch.testing.assert_close(rollout.logps, expected.logps, atol=1e-5, rtol=1e-5)


def test_prompts_are_encoded_once_and_finished_rows_dropped():
    model = model_of("llama")
    model.generation_config.eos_token_id = list(range(2, 12))
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    rollout = generate(model, Ids(), PROMPTS, 6, 20)
    assert seen[0] == (4, 8)  # prompts, not completions
    lengths = rollout.completion_mask.sum(1)
    assert len(seen) == lengths.max()  # the last token of a completion is not read
    for step, (rows, width) in enumerate(seen[1:], 1):
        needed = int((lengths > step).sum())
        assert width == 1 and needed <= rows <= max(needed / 0.75, needed + 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cache_stays_in_place_unless_a_window_slides(name):
    decoder = common.Decoder(model_of(name), 20)
    assert decoder.in_place == (name not in ("mistral", "gemma2", "gemma3"))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_distribution(temperature):
    """Chi-squared over 40,000 draws: its 99.9% quantile at 4 degrees of freedom is 18.5. Two tokens
    are impossible."""
    logits = torch.tensor([0.3, -1.0, -torch.inf, 2.0, 0.0, 1.0, -torch.inf])
    token, logps = sample_token(logits.expand(40_000, -1), temperature, torch.rand(40_000))
    probabilities = (logits / temperature).softmax(0)
    expected = 40_000 * probabilities
    counts = token.bincount(minlength=7)
    assert counts[2] == counts[6] == 0
    deviations = (counts - expected) ** 2 / expected
    assert deviations[expected > 0].sum() < 18.5
    torch.testing.assert_close(logps, probabilities.log()[token])


def test_draws_at_both_ends_stay_on_possible_tokens():
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, -torch.inf]])
    for draw, token in ((0.0, 1), (1 - 2**-24, 2)):
        assert sample_token(logits, 1.0, torch.tensor([draw]))[0].item() == token
