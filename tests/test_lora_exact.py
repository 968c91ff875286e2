"""LoRA of full rank on a language whose 31 completions are listed: DPO, GRPO and PPO land on pi* = pi_ref exp(r/beta)/Z,
by the scripts' own losses on their population objectives. Adapters off, the model still is the reference, bit for bit."""

import math

import pytest
import torch

from common import adapters_off, load_model, make_row, pad_rows, prepare_for_training, token_logprobs
from dpo import dpo_loss
from grpo import grpo_loss
from ppo_rlhf import kl_rewards, policy_loss
from test_saving import flags
from tiny import saved_language

BETA = 0.5


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """-> the reference's directory, ids and mask of all completions of one prompt, log pi_ref [31, T], rewards [31]"""
    directory = tmp_path_factory.mktemp("language")
    completions = saved_language(directory, 1, std=0.6)
    input_ids, mask = pad_rows([make_row([0, 2], completion) for completion in completions])
    with torch.no_grad():
        ref_logps = token_logprobs(load_model(str(directory)), input_ids, mask)
    torch.manual_seed(0)
    rewards = 0.5 * torch.randn(31)
    assert ref_logps.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    return str(directory), input_ids, mask, ref_logps, rewards


def dpo_step(logps, ref_logps, mask, rewards):
    """Every pair of completions, drawn from pi_ref, labelled by Bradley-Terry."""
    i, j = torch.triu_indices(31, 31, 1)
    logps, ref = logps.sum(1), ref_logps.sum(1)
    weight, p = ref[i].exp() * ref[j].exp(), torch.sigmoid(rewards[i] - rewards[j])
    won, _, _ = dpo_loss(logps[i], logps[j], ref[i], ref[j], BETA)
    lost, _, _ = dpo_loss(logps[j], logps[i], ref[j], ref[i], BETA)
    return (weight * (p * won + (1 - p) * lost)).sum() * 10


def grpo_step(logps, ref_logps, mask, rewards):
    """A group of infinite size; the KL's exact gradient."""
    p = logps.detach().sum(1).exp()
    advantages = rewards - p @ rewards

    def one(logps, old_logps, ref_logps, advantage, mask):
        return grpo_loss(logps[None], old_logps[None], ref_logps[None], advantage[None], mask[None], beta=BETA,
                         clip_low=0.2, clip_high=0.2, ratio="sequence", kl_correction=True, total=1)

    return p @ torch.vmap(one)(logps, logps.detach(), ref_logps, advantages, mask.float())


def ppo_step(logps, ref_logps, mask, rewards):
    """The KL in the reward; a critic that knows each state's value; lambda 1."""
    p, old_logps = logps.detach().sum(1).exp(), logps.detach()
    token_rewards = kl_rewards(rewards, old_logps, ref_logps, mask, BETA)
    returns = token_rewards.flip(1).cumsum(1).flip(1)
    first = torch.where(mask.sum(1) == 2, old_logps[:, 2], -1.0)  # equal for completions with the same first token
    same = (first[:, None] == first) & (mask.sum(1) == 2)
    value_1 = p @ returns[:, 2]  # before the first token
    value_2 = (same * p) @ returns[:, 3] / (same * p).sum(1).clamp(min=1e-9)
    advantages = (returns - torch.stack([0 * p, 0 * p, value_1.expand(31), value_2], 1)) * mask
    return policy_loss(logps, old_logps, advantages * p[:, None], mask, 0.2, 1)


@pytest.mark.parametrize("step", [dpo_step, grpo_step, ppo_step])
def test_full_rank_adapters_reach_the_optimum(step, language):
    directory, input_ids, mask, ref_logps, rewards = language
    model = prepare_for_training(load_model(directory), flags(lora_rank=16))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for t in range(steps := 500):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - t / steps)
        step(token_logprobs(model, input_ids, mask), ref_logps, mask, rewards).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimum = (ref_logps.sum(1) + rewards / BETA).softmax(0)
    with torch.no_grad():
        policy = token_logprobs(model, input_ids, mask).sum(1).exp()
        assert 0.5 * (ref_logps.sum(1).exp() - optimum).abs().sum() > 0.2  # there was something to learn
        assert 0.5 * (policy - optimum).abs().sum() < 0.02
        with adapters_off(model):
            assert torch.equal(token_logprobs(model, input_ids, mask), ref_logps)


def test_before_any_update_the_losses_are_exactly_the_bases(language):
    directory, input_ids, mask, ref_logps, rewards = language
    model = prepare_for_training(load_model(directory), flags(lora_rank=2))
    logps = token_logprobs(model, input_ids, mask)
    assert torch.equal(logps, ref_logps)
    losses, _, _ = dpo_loss(logps.sum(1), logps.sum(1).flip(0), ref_logps.sum(1), ref_logps.sum(1).flip(0), BETA)
    assert (losses - math.log(2)).abs().max() < 1e-7
