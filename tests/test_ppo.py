"""PPO's functions against TRL's numbers, PPO against the optimum that it aims at, and ppo_rlhf.py as its users run
it."""

import copy
import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import ppo_rlhf
from common import (Rollout, generate, load_model, make_row, pad_rows, sequence_logprobs, set_learning_rate,
                    token_logprobs)
from conftest import ROOT
from harness import Example, reward_from_model, run_script
from ppo_rlhf import (Experience, add_gradients, gae, kl_rewards, policy_loss, score_experience, token_values, update,
                      update_plan, value_loss, whiten)
from test_runs import ENVIRONMENT, kill_at, metrics_of, run
from tiny import ARCHITECTURES, Ids

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "ppo.json").read_text())
CLASSIC = {name: torch.tensor(value) for name, value in EXPECTED["classic"].items()}
V2 = {name: torch.tensor(value) for name, value in EXPECTED["v2"].items() if name != "settings"}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------- other people's numbers


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
    logps = token_logprobs(policy, input_ids, token_mask)
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


# ---------------------------------------------------------------------------------------------------- what a line means


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
    # the last tokens
    assert ((rewards - without) != 0).nonzero().tolist() == [[0, 8], [1, 6], [2, 7], [3, 0], [4, 8], [5, 5]]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.95, 0.0)])
def test_gae_is_the_direct_sum(gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, row in enumerate(mask.tolist()):
        first, end = row.index(1), row.index(1) + sum(row)
        for t in range(first, end):
            deltas = [rewards[i, s] + (gamma * values[i, s + 1] if s + 1 < end else 0.0) - values[i, s]
                      for s in range(t, end)]
            direct = sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas))
            assert advantages[i, t].item() == pytest.approx(direct.item(), abs=1e-5)
            assert returns[i, t].item() == pytest.approx(direct.item() + values[i, t].item(), abs=1e-5)
            if gamma == lam == 1:
                assert returns[i, t].item() == pytest.approx(rewards[i, t:end].sum().item(), abs=1e-5)


def test_what_lies_outside_the_mask_is_never_read():
    """A completion's numbers are those that it has alone; garbage before its start and after its end changes
    nothing."""
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
    losses = [policy_loss(rewards + outside * (1 - mask), values, advantages, mask, 0.2) for outside in (0, 50)]
    close(*losses)


def test_losses_by_hand():
    """One token each: the pessimistic one of the clipped and the unclipped, equation (4) and (5)."""
    one = torch.ones(1, 1)
    for ratio, advantage, objective in ((1.5, 1.0, 1.2), (1.5, -1.0, -1.5), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8)):
        assert (policy_loss(one * math.log(ratio), one * 0, one * advantage, one, 0.2).item()
                == pytest.approx(-objective))
    assert value_loss(one * 3, one * 1, one * 3, one, 0.2).item() == pytest.approx(0.5 * 1.8**2)  # right, but too fast
    assert value_loss(one * 3, one * 1, one * 3, one, math.inf).item() == 0
    assert value_loss(one * 0, one * 1, one * 3, one, 0.2).item() == pytest.approx(0.5 * 3**2)


def test_adaptive_beta():
    assert ppo_rlhf.adapted_beta(0.5, 100.0, None) == 0.5
    assert ppo_rlhf.adapted_beta(0.5, 6.6, 6.0) == pytest.approx(0.5 * 1.01)
    assert ppo_rlhf.adapted_beta(0.5, 60.0, 6.0) == pytest.approx(0.5 * 1.02)  # at most 2% a step
    assert ppo_rlhf.adapted_beta(0.5, 0.0, 6.0) == pytest.approx(0.5 * 0.98)


# ------------------------------------------------------------------------------- traps: every pass sees the same policy


def own_logps(model, rows, temperature):
    """Each row alone, unpadded, every logit: the plainest form of log p -> list of [completion tokens]."""
    result = []
    for ids, mask in rows:
        with torch.no_grad():
            logps = (model(input_ids=torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)
        first = mask.index(1)
        result.append(logps[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:])])
    return result


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def world(request, tmp_path_factory):
    """Policy, reference, critic with dropout in their configurations, and a rollout of prompts of many lengths."""
    directory, networks = tmp_path_factory.mktemp("world"), []
    for number, kind in enumerate((transformers.AutoModelForCausalLM,) * 2 + (AutoModelForSequenceClassification,)):
        config = ARCHITECTURES[request.param].__class__(**{**ARCHITECTURES[request.param].to_dict(), "num_labels": 1})
        for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, name):
                setattr(config, name, 0.5)
        torch.manual_seed(number)
        model = kind.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(directory / str(number))
        networks.append(load_model(str(directory / str(number)), kind=kind))
    torch.manual_seed(5)
    prompts = [torch.randint(4, 60, (n,)).tolist() for n in (1, 9, 3, 14, 2, 2, 7, 5)]
    rollout = generate(networks[0], Ids(), prompts, 2, 12, 0.7)
    return *networks, rollout


ARGS = ppo_rlhf.Args(temperature=0.7, mini_batches=3, ppo_epochs=2, micro_batch_size=4, clip_value=0.2)


def test_every_pass_gives_the_log_probs_and_values_of_the_row_alone(world):
    """At the temperature of the samples, without dropout, for any padding, on absolute positions (GPT-2) too.
    Generation pads on the left, so its own log-probabilities are held to the same numbers."""
    model, reference, critic, rollout = world
    assert len({len(ids) for ids, _ in rollout.rows}) > 5
    before = score_experience({"policy": model, "critic": critic}, reference, rollout, update_plan(rollout.rows, ARGS, 4096), ARGS)
    old_logps, ref_logps, old_values = before.old_logps, before.ref_logps, before.old_values
    mask = rollout.completion_mask.bool()
    for ours, theirs in ((rollout.logps, model), (old_logps, model), (ref_logps, reference)):
        torch.testing.assert_close(ours[mask], torch.cat(own_logps(theirs, rollout.rows, 0.7)), rtol=1e-4, atol=1e-4)
        assert (ours[~mask] == 0).all()
    for (ids, row_mask), values in zip(rollout.rows, old_values):
        with torch.no_grad():
            hidden = critic.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            expected = critic.score(hidden).squeeze(1)[row_mask.index(1) - 1:-1]  # what was known before each token
        torch.testing.assert_close(values[row_mask.index(1):len(ids)], expected, rtol=1e-4, atol=1e-4)


def first_mini_batch(world):
    """-> what is logged of the first mini-batch of a step."""
    model, reference, critic, rollout = world
    plan = update_plan(rollout.rows, ARGS, 4096)
    experience = score_experience({"policy": model, "critic": critic}, reference, rollout, plan, ARGS)
    experience.advantages = experience.returns = torch.randn_like(rollout.logps)
    stats = add_gradients(model, critic, experience, plan[0], ARGS)
    model.zero_grad(), critic.zero_grad()
    return stats


def test_the_ratio_of_the_first_mini_batch_is_exactly_1(world):
    stats = first_mini_batch(world)
    assert stats["ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["clip_fraction"] == stats["update_kl"] == 0


@pytest.mark.parametrize("trap", ["temperature", "dropout", "padding"])
def test_it_is_not_where_a_pass_forgets_something(trap, world, monkeypatch):
    """The second pass, that of the update, forgets; so the test above would fail."""
    original = ppo_rlhf.token_logprobs

    def forgetful(model, input_ids, mask, temperature):
        if not torch.is_grad_enabled():
            return original(model, input_ids, mask, temperature)
        if trap == "temperature":
            return original(model, input_ids, mask)
        if trap == "dropout":
            noise = torch.nn.Dropout(0.5)
            hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: noise(output))
            logps = original(model, input_ids, mask, temperature)
            hook.remove()
            return logps
        shifts = [int(row.flip(0).argmax()) for row in mask]  # padded on the left, and no positions given
        ids, moved = (torch.stack([row.roll(s) for row, s in zip(x, shifts)]) for x in (input_ids, mask))
        logps = original(model, ids, moved, temperature)
        return torch.stack([row.roll(-s) for row, s in zip(logps, shifts)])

    monkeypatch.setattr(ppo_rlhf, "token_logprobs", forgetful)
    assert abs(first_mini_batch(world)["ratio"] - 1) > 1e-3


@pytest.mark.parametrize("size", [1, 3, None])
def test_micro_batches_do_not_change_the_gradient(size, world):
    model, reference, critic, rollout = world
    experience = score_experience({"policy": model, "critic": critic}, reference, rollout, update_plan(rollout.rows, ARGS, 4096), ARGS)
    torch.manual_seed(2)
    noise = 0.3 * torch.randn_like(experience.old_logps)
    experience.old_logps += noise * rollout.completion_mask  # some ratios are clipped
    experience.advantages, experience.returns = torch.randn(2, *noise.shape)
    results = []
    for micro in (16, size):
        args = ppo_rlhf.Args(temperature=0.7, mini_batches=1, ppo_epochs=1, micro_batch_size=micro)
        stats = add_gradients(model, critic, experience, update_plan(rollout.rows, args, 4096)[0], args)
        gradients = [p.grad.flatten() for n in (model, critic) for p in n.parameters() if p.grad is not None]
        results.append((stats, torch.cat(gradients)))
        model.zero_grad(), critic.zero_grad()
    (one, gradient), (other, others) = results
    assert 0 < one["clip_fraction"] < 1 and one == pytest.approx(other, abs=1e-5)
    assert gradient.norm() > 0.1 and (gradient - others).norm() < 1e-5 * gradient.norm()


def test_plans_hold_each_row_once_an_epoch(world):
    rollout = world[3]
    plan = update_plan(rollout.rows, ARGS, 4096)
    assert len(plan) == 6 and plan[0] != plan[3]
    for epoch in (plan[:3], plan[3:]):
        assert sorted(i for _, groups in epoch for group in groups for i in group) == list(range(16))
        assert all(sorted(rows) == sorted(sum(groups, [])) for rows, groups in epoch)


def test_where_pad_is_eos_the_reward_is_read_at_eos(tmp_path):
    """The stock head looks for pad, and finds the token before EOS; ours, and the place of the reward, go by the
    index."""
    from tiny import byte_level
    tokenizer = byte_level(pad_token="<|endoftext|>")
    config = transformers.GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=1,
                                     eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    torch.nn.init.normal_(judge.score.weight)
    judge.save_pretrained(tmp_path), tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("he said").input_ids + tokenizer(" abab").input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        at_eos = judge.score(judge.base_model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        stock = judge(torch.tensor([ids])).logits.item()
    reward = reward_from_model(ppo_rlhf.Args(), str(tmp_path))
    for others in ([], ["a much longer completion than the other one"]):
        scores = reward([Example(prompt="he said")] * (1 + len(others)), [" abab", *others])
        assert scores[0].item() == pytest.approx(at_eos, abs=1e-5)
    assert abs(stock - at_eos) > 0.01
    rows = [make_row([5, 6], [7, tokenizer.eos_token_id]), make_row([5], [7, 8, 9, tokenizer.eos_token_id])]
    _, mask = pad_rows(rows)
    rewards = kl_rewards(torch.tensor([1.0, 2.0]), torch.zeros(2, 5), torch.zeros(2, 5), mask, 0.1)
    assert rewards.nonzero().tolist() == [[0, 3], [1, 4]]


# ---------------------------------------------------------------------------- exact: every sequence of a small language
#
# As in test_dpo.py: two prompts (tokens 3 and 4), three tokens, every sequence up to three of them, and tables, which
# are complete policies and critics. Sampling is exact; the rest of a step is the script's.

SEQUENCES = [s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n)
             if 0 not in s[:-1] and (s[-1] == 0 or n == 3)]
ROWS = [make_row([3 + x], list(s)) for x in range(2) for s in SEQUENCES]


class Table(torch.nn.Module):
    """A row of numbers for every prefix: logits of a policy, or features of a critic, as a transformer's last state."""

    def __init__(self, width, policy):
        super().__init__()
        self.table = torch.nn.Embedding(5**3, width)
        self.head = self.score = torch.nn.Linear(width, width if policy else 1, bias=False)
        torch.nn.init.eye_(self.head.weight).requires_grad_(False)
        torch.nn.init.zeros_(self.table.weight)
        self.config, self.device, self.base_model = transformers.LlamaConfig(), torch.device("cpu"), self

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, use_cache=False):
        ids = torch.nn.functional.pad(input_ids, (2, 0))
        hidden = self.table(ids[:, :-2] * 25 + ids[:, 1:-1] * 5 + ids[:, 2:])  # [B, T, width]
        return transformers.utils.ModelOutput(last_hidden_state=hidden, logits=self.head(hidden))


def all_logps(policy):
    """log pi(y | x) of every sequence -> [2, 15]."""
    return sequence_logprobs(policy, ROWS).view(2, -1)


def distance(logps, other_logps):
    """Total variation -> the larger of the two prompts'."""
    return 0.5 * (logps.exp() - other_logps.exp()).abs().sum(1).max().item()


def small_world(seed):
    torch.manual_seed(seed)
    reference = Table(3, policy=True)
    torch.nn.init.normal_(reference.table.weight, std=0.5)
    return reference, 0.5 * torch.randn(2, len(SEQUENCES))


def sampled(policy, number):
    """Every prompt `number` times -> Rollout, and which of ROWS it holds."""
    chosen = torch.multinomial(all_logps(policy).exp(), number, replacement=True)  # [2, number]
    chosen = (chosen + torch.tensor([[0], [15]])).flatten().tolist()
    rows = [ROWS[i] for i in chosen]
    input_ids, mask = pad_rows(rows)
    return Rollout(rows, input_ids, mask, torch.zeros(mask.shape), [], torch.ones(len(rows)).bool()), chosen


def trained(seed, beta, steps=60, learning_rate=0.1, **kwargs):
    """-> (reference, rewards, policy after PPO)."""
    reference, rewards = small_world(seed)
    policy, critic = copy.deepcopy(reference), Table(1, policy=False)
    args = ppo_rlhf.Args(beta=beta, ppo_epochs=2, mini_batches=2, critic_warmup=0, **kwargs)
    networks, run = {"policy": policy, "critic": critic}, SimpleNamespace(args=args, check_finite=lambda *_: None)
    optimizer = torch.optim.AdamW([*policy.table.parameters(), *critic.table.parameters()], weight_decay=0.0)
    for step in range(steps):
        rollout, chosen = sampled(policy, 256)
        scores, plan = rewards.flatten()[chosen], update_plan(rollout.rows, args, 4096)
        e = score_experience(networks, reference, rollout, plan, args)
        token_rewards = kl_rewards(scores, e.old_logps, e.ref_logps, e.mask, beta)
        e.advantages, e.returns = gae(token_rewards, e.old_values, e.mask, args.gamma, args.lam)
        if args.scale:
            e.advantages = whiten(e.advantages, e.mask)
        set_learning_rate(optimizer, step, steps, learning_rate)
        stats = update(networks, optimizer, e, plan, run, step)
        assert stats[0]["ratio"] == pytest.approx(1, abs=1e-6) and stats[0]["clip_fraction"] == 0
    return reference, rewards, policy


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_ppo_reaches_the_optimum(beta, seed):
    reference, rewards, policy = trained(seed, beta)
    ref_logps = all_logps(reference)
    torch.testing.assert_close(ref_logps.exp().sum(1), torch.ones(2))
    optimal = (ref_logps + rewards / beta).log_softmax(1)
    assert distance(ref_logps, optimal) > 0.15  # there is something to learn
    assert distance(all_logps(policy), optimal) < 0.03


def test_with_a_large_beta_it_stays():
    reference, _, policy = trained(0, beta=100.0)
    assert distance(all_logps(policy), all_logps(reference)) < 0.01


# -------------------------------------------------------------------------------------------------- as its users run it

QUICK = ["--max-steps", "6", "--batch-size", "8", "--mini-batches", "2", "--micro-batch-size", "3",
         "--critic-warmup", "1", "--max-new-tokens", "12", "--target-kl", "0.5", "--eval-every", "2",
         "--save-every", "2", "--eval-prompts", "10"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ppo")
    status, output, errors = run("ppo_rlhf", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    assert "proxy reward: " in output
    return directory


def without_speeds(directory):
    return [{name: value for name, value in row.items() if not name.endswith("tokens_per_s")}
            for row in metrics_of(directory)]


def test_run_directory(finished):
    rows = metrics_of(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert abs(rows[0]["kl"]) < 1e-5 and rows[0]["win_rate"] == 0.5 and rows[0]["proxy_reward"] != rows[0]["reward"]
    steps = [row for row in rows if row["phase"] == "train"]
    assert all(row["ratio_first"] == pytest.approx(1, abs=1e-6) for row in steps)
    assert all(row["sampling_gap"] < 1e-4 for row in steps) and steps[2]["ratio"] != 1.0
    # the critic comes first
    assert abs(steps[0]["kl"]) < 1e-5 and abs(steps[1]["kl"]) < 1e-5 and abs(steps[2]["kl"]) > 1e-5
    assert steps[0]["beta"] == 0.5 and steps[1]["beta"] == pytest.approx(0.49)  # the KL is 0, and should be 0.5
    assert all(row[f"{part}_tokens_per_s"] > 0 for row in steps for part in ("rollout", "scoring", "update"))
    for row in steps:
        assert row["objective"] == pytest.approx(
            row["proxy_reward"] - (1 - row["ended"]) - row["beta"] * row["kl"], abs=1e-4)
        assert {"reward", "entropy", "clip_fraction", "update_kl", "explained_variance"} <= set(row)
    results = json.loads((finished / "results.json").read_text())
    assert set(results) >= {"proxy_reward", "proxy_reward_ref", "reward_ref", "reward_ref_sd", "reward", "reward_se",
                            "kl", "kl_se", "win_rate", "win_rate_se", "ended", "seconds"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 2, 4, 6} and all("reward" in s for s in samples)
    assert transformers.AutoModelForCausalLM.from_pretrained(finished).dtype == torch.float32  # as it was trained


@pytest.mark.parametrize("wait_for", [5])  # lines of metrics.jsonl
def test_killed_and_resumed_equals_uninterrupted(wait_for, finished, tmp_path):
    kill_at(wait_for, "ppo_rlhf", *QUICK, directory=tmp_path)
    status, output, errors = run("ppo_rlhf", *QUICK, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "resuming" in output, errors
    assert without_speeds(tmp_path) == without_speeds(finished)
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def call(monkeypatch, capsys, *flags):
    """ppo_rlhf.py in this process -> exit status, what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["ppo_rlhf.py", *map(str, flags)])
    try:
        run_script(ppo_rlhf.main, ppo_rlhf.Args)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


TINY = ["--max-steps", 1, "--batch-size", 4, "--mini-batches", 2, "--eval-prompts", 4, "--max-new-tokens", 8]
REWARD = "def reward(prompts, completions, **columns):\n    "
MISTAKES = {
    # name: (flags, body of a reward function, what the line must name)
    "no epoch": (["--ppo-epochs", "0"], None, "--ppo-epochs"),
    "no mini-batch": (["--mini-batches", "0"], None, "--mini-batches"),
    "more mini-batches than rows": (["--mini-batches", "5"], None, "--mini-batches"),
    "no clipping range": (["--clip", "0"], None, "--clip"),
    "a negative clipping range of values": (["--clip-value", "-1"], None, "--clip-value"),
    "a critic that cannot learn": (["--value-learning-rate", "0"], None, "--value-learning-rate"),
    "a negative target": (["--target-kl", "-1"], None, "--target-kl"),
    "a discount above 1": (["--gamma", "1.1"], None, "--gamma"),
    "a negative lambda": (["--lam", "-0.1"], None, "--lam"),
    "a negative penalty": (["--missing-eos-penalty", "-1"], None, "--missing-eos-penalty"),
    "beta 0": (["--beta", "0"], None, "--beta"),
    "no reward": (["--dataset", ROOT / "assets" / "data" / "sum_prompts.jsonl"], None, "--reward-model"),
    "a missing prompt column": (["--prompt-column", "question"], None, "question"),
    "no room for completions": (["--max-new-tokens", "255"], None, "--max-new-tokens"),
    "a reward model that is nowhere": (["--reward-model", "nobody/judge"], None, "nobody/judge"),
    "a critic of another tokenizer": (["--critic-model", ROOT / "tests" / "golden" / "rm"], None, "--critic-model"),
    "a function that raises": ([], "return [1 / (p != 'Review of The Secret Song, a romance:') for p in prompts]",
                               "ZeroDivisionError"),
    "a reward that is not a number": ([], "return [float('nan')] * len(prompts)", "nan"),
    "too few rewards": ([], "return [0.0]", "1 numbers for"),
    "a learning rate that breaks it": (["--learning-rate", "1e30", "--max-steps", "3", "--critic-warmup", "0"], None,
                                       "update"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch, capsys):
    flags, body, what = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    if body:
        (tmp_path / "r.py").write_text(REWARD + body)
        flags = [*flags, "--reward-fn", "r.py:reward"]
    status, errors = call(monkeypatch, capsys, *TINY, *flags)
    assert (status == 2 and errors.startswith("ppo_rlhf.py: error: ") and errors.count("\n") == 1
            and what in errors), errors
    assert len(errors) < 500


def test_a_reward_function_alone_and_chats(tmp_path, monkeypatch, capsys):
    """No reward model: the critic starts from the policy, its values at 0; conversations reach the function as such."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARD + "return [float(len(c[0]['content'])) for c in completions]\n")
    rows = [{"prompt": [{"role": "user", "content": f"Film {i}?"}]} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    flags = ["--dataset", "d.jsonl", "--reward-fn", "r.py:reward", "--chat-template", "chat.jinja",
             "--no-scale"]
    assert call(monkeypatch, capsys, *TINY, *flags) == (0, "")
    first = metrics_of(tmp_path / "runs" / "ppo_rlhf")[1]
    assert first["explained_variance"] == 0 and first["proxy_reward"] == first["reward"]
    results = json.loads((tmp_path / "runs" / "ppo_rlhf" / "results.json").read_text())
    assert results["proxy_reward"] == pytest.approx(results["reward"], abs=1e-4)


def test_a_reward_model_with_another_tokenizer(tmp_path, monkeypatch, capsys):
    """It reads text; the critic, which reads the policy's ids, cannot start from it."""
    monkeypatch.chdir(tmp_path)
    judge = ROOT / "tests" / "golden" / "rm"
    assert call(monkeypatch, capsys, *TINY, "--reward-model", judge) == (0, "")
    assert metrics_of(tmp_path / "runs" / "ppo_rlhf")[1]["explained_variance"] == 0


def test_an_update_that_goes_too_far_is_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--max-steps", 2, "--learning-rate", "1e-2", "--max-update-kl", "0.01", "--critic-warmup", 0,
             "--ppo-epochs", 4]
    assert call(monkeypatch, capsys, *TINY, *flags) == (0, "")
    steps = [row for row in metrics_of(tmp_path / "runs" / "ppo_rlhf") if "value_loss" in row]
    # the first move is seen in the second mini-batch, which makes no other
    assert steps[0]["updates"] == 1 and steps[0]["update_kl"] > 0.01


def test_a_copied_script_runs_anywhere(tmp_path):
    for name in ("ppo_rlhf.py", "common.py", "harness.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"prompt": f"Review of {i}:"}) for i in range(20)))
    (tmp_path / "r.py").write_text(REWARD + "return [float(len(c)) for c in completions]\n")
    command = [sys.executable, "ppo_rlhf.py", *TINY, "--model", ROOT / "assets" / "tiny-sft", "--dataset", "d.jsonl",
               "--reward-fn", "r.py:reward"]
    result = subprocess.run([*map(str, command)], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
