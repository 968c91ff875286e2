"""dpo_loss against TRL's numbers, and DPO against the optimum that it claims to reach."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from common import encode_row, load_model, load_tokenizer, pad_rows, sequence_logprobs, token_logprobs
from conftest import ROOT
from dpo import dpo_loss, pair_logprobs

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "dpo.json").read_text())
LOGPS = {name: torch.tensor(values) for name, values in EXPECTED["sequence_logps"].items()}
NAMES = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]


# ----------------------------------------------------------------------------------------------- other people's numbers


@pytest.mark.parametrize("name, kwargs", [
    ("sigmoid_ls0.0", dict()), ("sigmoid_ls0.1", dict(label_smoothing=0.1)), ("ipo_ls0.0", dict(loss_type="ipo"))])
def test_golden_losses_and_rewards(name, kwargs):
    expected = EXPECTED["trl_0p11p4"][name]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*(LOGPS[n] for n in NAMES), 0.1, **kwargs)
    torch.testing.assert_close(losses, torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(chosen_rewards, torch.tensor(expected["chosen_rewards"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rejected_rewards, torch.tensor(expected["rejected_rewards"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, beta, loss_type", [
    ("sigmoid", 0.1, "sigmoid"), ("sigmoid_beta0p5", 0.5, "sigmoid"), ("ipo", 0.1, "ipo"), ("ipo_beta0p5", 0.5, "ipo")])
def test_golden_text_to_loss_to_gradient(name, beta, loss_type):
    """The whole path. TRL 1.16's ipo is on mean log-probabilities: ours gives its numbers when it is fed those."""
    model, reference = load_model(str(GOLDEN / "policy")), load_model(str(GOLDEN / "ref"))
    tokenizer = load_tokenizer(str(GOLDEN / "policy"))
    pairs = [tuple(encode_row(tokenizer, row["prompt"], row[column], [2]) for column in ("chosen", "rejected"))
             for row in EXPECTED["text"]]
    input_ids, completion_mask = pad_rows([row for column in zip(*pairs) for row in column])  # chosen first, as in TRL
    golden_mask = torch.tensor(EXPECTED["inputs"]["completion_mask"])
    assert torch.equal(completion_mask, golden_mask)
    assert torch.equal(input_ids[golden_mask.bool()], torch.tensor(EXPECTED["inputs"]["input_ids"])[golden_mask.bool()])
    per_token = token_logprobs(model, input_ids, None, completion_mask)
    expected = torch.tensor(EXPECTED["per_token_logps"]["policy"])
    torch.testing.assert_close(per_token[:, 1:], expected, rtol=1e-5, atol=1e-5)

    logps = pair_logprobs(model, pairs, 1.0)
    ref_logps = torch.stack([sequence_logprobs(reference, column) for column in zip(*pairs)], 1)
    expected = torch.cat([LOGPS["policy_chosen"], LOGPS["policy_rejected"]])
    torch.testing.assert_close(logps.T.flatten(), expected, rtol=1e-5, atol=1e-5)
    if loss_type == "ipo":
        lengths = torch.tensor([[sum(mask) for _, mask in pair] for pair in pairs])
        logps, ref_logps = logps / lengths, ref_logps / lengths
    losses, _, _ = dpo_loss(*logps.T, *ref_logps.T, beta, loss_type=loss_type)
    losses.mean().backward()
    expected = EXPECTED["expected"][name]
    torch.testing.assert_close(losses, torch.tensor(expected["loss_per_pair"]), rtol=1e-5, atol=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    if beta == 0.1:
        gradients = load_file(GOLDEN / f"grads_dpo_{loss_type}.safetensors")
        largest = max(g.abs().max() for g in gradients.values())
        for n, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=1e-6 * largest.item())


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="sigmoid or ipo"):
        dpo_loss(*(LOGPS[n] for n in NAMES), 0.1, loss_type="hinge")


# ---------------------------------------------------------------------------- exact: every sequence of a small language
#
# Two prompts, three tokens, and every sequence up to three tokens: y ends with token 0 or at length 3. A table of
# logits for every prefix is a complete autoregressive policy, so pi_ref, pi* and all log-probabilities can be listed.

SEQUENCES = [s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n)
             if 0 not in s[:-1] and (s[-1] == 0 or n == 3)]
PREFIXES = {s: i for i, s in enumerate(s for n in (0, 1, 2) for s in itertools.product((1, 2), repeat=n))}


def all_logps(table):
    """Logits [2 prompts, 7 prefixes, 3 tokens] -> log pi(y | x) [2, 15]."""
    steps = table.log_softmax(-1)
    return torch.stack([sum(steps[:, PREFIXES[s[:t]], s[t]] for t in range(len(s))) for s in SEQUENCES], 1)


def small_world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref_table = torch.randn(2, len(PREFIXES), 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(2, len(SEQUENCES), generator=generator, dtype=torch.float64)
    return ref_table, all_logps(ref_table), rewards


def optimum(ref_logps, rewards, beta):
    return (ref_logps + rewards / beta).softmax(1)


def fit(ref_table, ref_logps, rewards, beta, loss_type):
    """Minimise the population loss: every pair of sequences, drawn from pi_ref, labelled by Bradley-Terry."""
    table = ref_table.clone().requires_grad_()
    i, j = torch.triu_indices(len(SEQUENCES), len(SEQUENCES), 1)
    weight = ref_logps[:, i].exp() * ref_logps[:, j].exp()  # how often the pair is sampled
    prefers_i = torch.sigmoid(rewards[:, i] - rewards[:, j])
    optimizer = torch.optim.LBFGS([table], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logps, loss = all_logps(table), 0.0
        for x in range(2):
            pairs = (logps[x, i], logps[x, j], ref_logps[x, i], ref_logps[x, j])
            swapped = (pairs[1], pairs[0], pairs[3], pairs[2])
            i_wins, _, _ = dpo_loss(*pairs, beta, loss_type=loss_type)
            j_wins, _, _ = dpo_loss(*swapped, beta, loss_type=loss_type)
            loss = loss + (weight[x] * (prefers_i[x] * i_wins + (1 - prefers_i[x]) * j_wins)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return all_logps(table.detach())


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_population_dpo_reaches_the_optimum(beta):
    ref_table, ref_logps, rewards = small_world()
    assert len(SEQUENCES) == 15 and torch.allclose(ref_logps.exp().sum(1), torch.ones(2, dtype=torch.float64))
    logps = fit(ref_table, ref_logps, rewards, beta, "sigmoid")
    optimal = optimum(ref_logps, rewards, beta)
    assert 0.5 * (logps.exp() - optimal).abs().sum(1).max() < 0.01
    assert 0.5 * (ref_logps.exp() - optimal).abs().sum(1).min() > 0.15  # there was something to learn
    implicit = beta * (logps - ref_logps)  # equation (5): the reward, up to a constant for each prompt
    constant = implicit - rewards
    assert (constant - constant.mean(1, keepdim=True)).abs().max() < 0.02
    log_z = (ref_logps + rewards / beta).logsumexp(1, keepdim=True)
    assert (constant + beta * log_z).abs().max() < 0.02


def test_label_smoothing_expects_flipped_labels():
    """Conservative DPO's optimum is Bradley-Terry's margin only where labels really are flipped with that probability:
    the loss's minimum for one pair is at sigma(beta h) = p (1 - eps) + (1 - p) eps."""
    probability = torch.tensor([0.6, 0.9], dtype=torch.float64)
    margin = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([margin], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        zero = torch.zeros(2, dtype=torch.float64)
        wins, _, _ = dpo_loss(margin, zero, zero, zero, 0.5, 0.2)
        losses, _, _ = dpo_loss(zero, margin, zero, zero, 0.5, 0.2)
        loss = (probability * wins + (1 - probability) * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(torch.sigmoid(0.5 * margin.detach()), probability * 0.8 + (1 - probability) * 0.2,
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_population_ipo_reaches_its_own_fixed_point(beta):
    """IPO regresses h = log pi/pi_ref(y) - log pi/pi_ref(y') on (p(y > y') - 1/2) / beta, averaged over its two labels;
    weighted least squares with pi_ref's weights: log pi/pi_ref(y) = (p(y > pi_ref) - 1/2) / beta + const (its paper,
    Theorem 1 with Psi the identity): pi* for the reward p(y > pi_ref), which is not DPO's."""
    ref_table, ref_logps, rewards = small_world(1)
    logps = fit(ref_table, ref_logps, rewards, beta, "ipo")
    beats = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])  # [2, y, y']
    wins = (beats * ref_logps.exp()[:, None, :]).sum(2)
    assert 0.5 * (logps.exp() - optimum(ref_logps, wins, beta)).abs().sum(1).max() < 0.01
    assert 0.5 * (logps.exp() - optimum(ref_logps, rewards, beta)).abs().sum(1).max() > 0.05  # not DPO's


def test_log_z_cancels():
    """A number added to all rewards of a prompt moves neither labels nor pi*; one added to both log-ratios no loss."""
    _, ref_logps, rewards = small_world()
    shift = torch.tensor([[3.0], [-7.0]], dtype=torch.float64)
    torch.testing.assert_close(optimum(ref_logps, rewards + shift, 0.3), optimum(ref_logps, rewards, 0.3))
    losses = dpo_loss(*(LOGPS[n].double() for n in NAMES), 0.1)[0]
    shifted = dpo_loss(*(LOGPS[n].double() + (5.0 if n.startswith("policy") else 0.0) for n in NAMES), 0.1)[0]
    torch.testing.assert_close(shifted, losses)


def test_before_training_the_loss_is_ln_2():
    for label_smoothing in (0.0, 0.2):
        reference = LOGPS["ref_chosen"], LOGPS["ref_rejected"]
        losses, chosen_rewards, rejected_rewards = dpo_loss(*reference, *reference, 0.1, label_smoothing)
        torch.testing.assert_close(losses, torch.full((6,), math.log(2)), rtol=0, atol=1e-7)
        assert chosen_rewards.abs().max() == rejected_rewards.abs().max() == 0


def test_the_gradient_weighs_pairs_by_how_wrong_the_implicit_reward_is():
    """Section 4 of the DPO paper: d loss / d log pi(y_w) = -beta sigma(r_l - r_w)."""
    chosen = LOGPS["policy_chosen"].clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, *(LOGPS[n] for n in NAMES[1:]), 0.1)
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, -0.1 * torch.sigmoid(rejected_rewards - chosen_rewards))
