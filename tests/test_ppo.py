"""PPO's pure functions against other people's numbers, PPO against the optimum that it aims at, and ppo_rlhf.py as its users run it."""

import itertools
import json
import math
import signal
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import ppo_rlhf
from common import (UserError, generate, load_model, load_tokenizer, make_row, pad_rows, reward_from_model, run_script,
                    sequence_logprobs, token_logprobs)
from conftest import ROOT
from ppo_rlhf import (add_gradients, before_the_update, gae, kl_rewards, policy_loss, token_values, update, update_plan,
                      value_loss, whiten)
from test_runs import metrics_of, run, start
from tiny import ARCHITECTURES, Ids

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "ppo.json").read_text())
CLASSIC = {name: torch.tensor(value) for name, value in EXPECTED["classic"].items()}
V2 = {name: torch.tensor(value) for name, value in EXPECTED["v2"].items() if name != "settings"}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ other people's numbers


def test_golden_classic():
    """TRL 0.11.4: the score on the last token."""
    g, mask = CLASSIC, CLASSIC["mask"]
    rewards = kl_rewards(g["scores"], g["old_logprobs"], g["ref_logprobs"], mask, 0.05)
    close(rewards, g["rewards"])
    advantages, returns = gae(rewards, g["values"], mask, 1.0, 0.95)
    close(returns, g["returns"])
    advantages = whiten(advantages, mask)
    close(advantages[mask.bool()], g["advantages"][mask.bool()])
    close(policy_loss(g["new_logprobs"], g["old_logprobs"], advantages, mask, 0.2), g["pg_loss"])
    close(0.1 * value_loss(g["vpreds"], g["values"], returns, mask, 0.2), g["vf_loss_times_coef"])


def test_golden_v2():
    """TRL 1.12.0: the score on the pad after EOS, and values there too: a longer mask, and a score put in by hand."""
    g, mask, longer = V2, (~V2["padding_mask"]).long(), (~V2["padding_mask_p1"]).long()
    rewards = kl_rewards(torch.zeros(8), g["logprobs"], g["ref_logprobs"], mask, 0.05)
    close(rewards, g["non_score_reward"])
    rewards[torch.arange(8), g["actual_end"]] += g["scores"]
    close(rewards, g["rewards"])
    advantages, returns = gae(rewards, g["values"], longer, 1.0, 0.95)
    close(returns, g["returns"])
    advantages = whiten(advantages, mask)
    close(advantages, g["advantages"])
    close(policy_loss(g["new_logprobs"], g["logprobs"], advantages, mask, 0.2), g["pg_loss"])
    close(value_loss(g["vpred"], g["values"], returns, longer, 0.2), g["vf_loss"])


def test_golden_ids_to_loss_to_gradient():
    """The whole path: log-probabilities and values of right-padded rows, both losses, and every weight's gradient."""
    g, mask, longer = V2, (~V2["padding_mask"]).long(), (~V2["padding_mask_p1"]).long()
    policy = load_model(str(GOLDEN / "policy"))
    critic = load_model(str(GOLDEN / "value"), kind=AutoModelForSequenceClassification)
    rows = [make_row([i for i in query if i != 3], response[:n]) for query, response, n in
            zip(g["queries"].tolist(), g["responses"].tolist(), longer.sum(1).tolist())]
    input_ids, value_mask = pad_rows(rows)
    starts = value_mask.argmax(1)
    lengths = mask.sum(1)
    token_mask = value_mask * (value_mask.cumsum(1) <= lengths[:, None])
    logps = token_logprobs(policy, input_ids, None, token_mask)
    values = token_values(critic, input_ids, value_mask)

    def aligned(x, width=10):  # [8, T], completions somewhere -> [8, 10], completions first
        return torch.stack([torch.cat([row[s:], row.new_zeros(width)])[:width] for row, s in zip(x, starts.tolist())])

    close(aligned(logps)[mask.bool()], g["new_logprobs"][mask.bool()])
    close(aligned(values)[longer.bool()], g["vpred"][longer.bool()])
    loss = policy_loss(aligned(logps), g["logprobs"], g["advantages"], mask, 0.2)
    loss = loss + 0.1 * value_loss(aligned(values), g["values"], g["returns"], longer, 0.2)
    loss.backward()
    close(loss.detach(), g["loss"])
    gradients = {f"{prefix}.{name}": parameter.grad for prefix, network in (("policy", policy), ("value_model", critic))
                 for name, parameter in network.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert norm == pytest.approx(g["grad_norm"].item(), rel=1e-4)
    for name, expected in load_file(GOLDEN / "grads_ppo.safetensors").items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- what a line means


def ragged(seed=0, rows=6, width=9):
    """Rewards, values [6, 9] and a mask of completions that start and end anywhere."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=generator)
    start = torch.tensor([0, 2, 1, 0, 3, 5])
    end = torch.tensor([9, 7, 8, 1, 9, 6])
    at = torch.arange(width)
    return rewards, values, ((at >= start[:, None]) & (at < end[:, None])).long()


def test_kl_rewards_sum_to_score_minus_beta_log_ratio():
    logps, ref_logps, mask = ragged()
    scores = torch.randn(6)
    rewards = kl_rewards(scores, logps, ref_logps, mask, 0.3)
    close(rewards.sum(1), scores - 0.3 * ((logps - ref_logps) * mask).sum(1))
    assert (rewards[mask == 0] == 0).all()
    without = kl_rewards(torch.zeros(6), logps, ref_logps, mask, 0.3)
    assert ((rewards - without) != 0).nonzero().tolist() == [[0, 8], [1, 6], [2, 7], [3, 0], [4, 8], [5, 5]]  # the last tokens


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.95, 0.0)])
def test_gae_is_the_direct_sum(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(mask.tolist()):
        first, end = row.index(1), row.index(1) + sum(row)
        for t in range(first, end):
            deltas = [rewards[i, s] + (gamma * values[i, s + 1] if s + 1 < end else 0.0) - values[i, s] for s in range(t, end)]
            direct = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas))
            assert advantages[i, t].item() == pytest.approx(direct.item(), abs=1e-5)
            assert returns[i, t].item() == pytest.approx(direct.item() + values[i, t].item(), abs=1e-5)
            if gamma == lam == 1:
                assert returns[i, t].item() == pytest.approx(rewards[i, t:end].sum().item(), abs=1e-5)


def test_what_lies_outside_the_mask_is_never_read():
    """A completion's numbers are those that it has alone; garbage before its start and after its end changes nothing."""
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    garbage = torch.where(mask.bool(), 0.0, torch.tensor(float("nan")))
    for x, y in zip(gae(rewards + garbage, values + garbage, mask, 1.0, 0.95), (advantages, returns)):
        assert torch.equal(x[mask.bool()], y[mask.bool()]) and (x[mask == 0] == 0).all()
    for i, row in enumerate(mask.bool()):
        alone, _ = gae(rewards[i, row][None], values[i, row][None], torch.ones(1, int(row.sum())), 1.0, 0.95)
        torch.testing.assert_close(alone[0], advantages[i, row], rtol=0, atol=1e-6)
    scores = torch.randn(6)
    assert kl_rewards(scores, rewards + garbage, values, mask, 0.1).isfinite().all()
    close(policy_loss(rewards + 50 * (1 - mask), values, advantages, mask, 0.2), policy_loss(rewards, values, advantages, mask, 0.2))


def test_losses_by_hand():
    """One token each: the pessimistic one of the clipped and the unclipped, equation (4) and (5)."""
    one = torch.ones(1, 1)
    for ratio, advantage, objective in ((1.5, 1.0, 1.2), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8)):
        assert policy_loss(one * math.log(ratio), one * 0, one * advantage, one, 0.2).item() == pytest.approx(-objective)
    assert value_loss(one * 3, one * 1, one * 3, one, 0.2).item() == pytest.approx(0.5 * 1.8**2)  # right, but too fast
    assert value_loss(one * 3, one * 1, one * 3, one, math.inf).item() == 0
    assert value_loss(one * 0, one * 1, one * 3, one, 0.2).item() == pytest.approx(0.5 * 3**2)


def test_adaptive_beta():
    assert ppo_rlhf.adapted_beta(0.5, 100.0, None) == 0.5
    assert ppo_rlhf.adapted_beta(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)
    assert ppo_rlhf.adapted_beta(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)  # at most 2% a step
    assert ppo_rlhf.adapted_beta(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)
