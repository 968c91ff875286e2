"""dpo_loss against TRL's numbers, and DPO against the optimum that it claims to reach."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from common import load_model, load_tokenizer, pad_rows, token_logprobs
from conftest import ROOT
from dpo import (
    Args, Pair, add_reference_logprobs, dpo_loss, load_pairs, pair_logprobs, preferences
)

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "dpo.json").read_text())
LOGPS = {name: torch.tensor(values) for name, values in EXPECTED["sequence_logps"].items()}
NAMES = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
ALL_LOGPS = [LOGPS[name] for name in NAMES]


# --- other people's numbers ---


@pytest.mark.parametrize("name, kwargs", [
    ("sigmoid_ls0.0", dict()),
    ("sigmoid_ls0.1", dict(label_smoothing=0.1)),
    ("ipo_ls0.0", dict(loss_type="ipo")),
])
def test_golden_losses_and_rewards(name, kwargs):
    expected = EXPECTED["trl_0p11p4"][name]
    results = dpo_loss(*ALL_LOGPS, 0.1, **kwargs)
    for ours, theirs in zip(results, ("losses", "chosen_rewards", "rejected_rewards")):
        torch.testing.assert_close(ours, torch.tensor(expected[theirs]), rtol=1e-5, atol=1e-5)


@pytest.fixture
def golden(tmp_path):
    """The texts as dpo.py reads them -> policy, and pairs with the reference's log-probabilities"""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in EXPECTED["text"]))
    policy, reference = (load_model(str(GOLDEN / name)) for name in ("policy", "ref"))
    args = Args(dataset=str(path), eval_dataset=str(path))
    pairs, held_out, _ = load_pairs(args, policy, load_tokenizer(str(GOLDEN / "policy")))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        (pair.chosen, pair.rejected) for pair in held_out]
    add_reference_logprobs(reference, pairs, args)
    return policy, pairs


def test_golden_text_to_logprobs(golden):
    policy, pairs = golden
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]  # TRL's order
    input_ids, mask = pad_rows(rows)
    assert torch.equal(mask, torch.tensor(EXPECTED["inputs"]["completion_mask"]))
    is_token = input_ids != 0
    expected = torch.tensor(EXPECTED["inputs"]["input_ids"])
    assert torch.equal(input_ids[is_token], expected[is_token])
    per_token = token_logprobs(policy, input_ids, mask)[:, 1:]
    expected = torch.tensor(EXPECTED["per_token_logps"]["policy"])
    torch.testing.assert_close(per_token, expected, rtol=1e-5, atol=1e-5)

    chosen, rejected = pair_logprobs(policy, pairs, 1.0)
    ref_chosen = torch.tensor([pair.ref_chosen_logp for pair in pairs])
    ref_rejected = torch.tensor([pair.ref_rejected_logp for pair in pairs])
    for logps, name in zip((chosen, rejected, ref_chosen, ref_rejected), NAMES):
        torch.testing.assert_close(logps, LOGPS[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, beta, loss_type", [
    ("sigmoid", 0.1, "sigmoid"),
    ("sigmoid_beta0p5", 0.5, "sigmoid"),
    ("ipo", 0.1, "ipo"),
    ("ipo_beta0p5", 0.5, "ipo"),
])
def test_golden_text_to_loss_to_gradient(golden, name, beta, loss_type):
    """The whole path. TRL 1.16's ipo is on mean log-probabilities: --length-normalized."""
    policy, pairs = golden
    expected = EXPECTED["expected"][name]
    args = Args(beta=beta, loss_type=loss_type, micro_batch_size=4)
    args.length_normalized = loss_type == "ipo"
    metrics = preferences(policy, pairs, args, train=True)
    losses = expected["loss_per_pair"]
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    if beta == 0.1:
        gradients = load_file(GOLDEN / f"grads_dpo_{loss_type}.safetensors")
        atol = 1e-6 * max(gradient.abs().max() for gradient in gradients.values()).item()
        for n, parameter in policy.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=atol)


def test_one_pair_at_a_time_gives_the_same(golden):
    """1 x 8 = 8 x 1, also in what is logged."""
    policy, pairs = golden
    results = []
    for size in (None, 1):
        policy.zero_grad()
        metrics = preferences(policy, pairs, Args(micro_batch_size=size), train=True)
        results.append((metrics, [p.grad.clone() for p in policy.parameters()]))
    (metrics, gradients), (metrics_apart, gradients_apart) = results
    assert metrics == pytest.approx(metrics_apart, rel=1e-5, abs=1e-6)
    for together, apart in zip(gradients, gradients_apart):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)


def test_a_pair_whose_reference_was_forgotten_is_seen(golden):
    policy, pairs = golden
    pairs[2].ref_rejected_logp = Pair(*[None] * 3).ref_rejected_logp
    assert math.isnan(preferences(policy, pairs, Args(), train=False)["loss"])


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="sigmoid, robust, ipo"):
        dpo_loss(*ALL_LOGPS, 0.1, loss_type="kto")


# --- exact: every sequence of a small language ---
#
# Two prompts, three tokens, and every sequence up to three tokens: y ends with token 0 or at length
# 3. A table of logits for every prefix is a complete autoregressive policy, so pi_ref, pi* and all
# log-probabilities can be listed.

ALL = [s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n)]
SEQUENCES = [s for s in ALL if 0 not in s[:-1] and (s[-1] == 0 or len(s) == 3)]
NOT_ENDED = [s for n in (0, 1, 2) for s in itertools.product((1, 2), repeat=n)]
PREFIXES = {s: i for i, s in enumerate(NOT_ENDED)}


def all_logps(table):
    """Logits [2 prompts, 7 prefixes, 3 tokens] -> log pi(y | x) [2, 15]."""
    steps = table.log_softmax(-1)
    logps = []
    for s in SEQUENCES:
        logps.append(sum(steps[:, PREFIXES[s[:t]], s[t]] for t in range(len(s))))
    return torch.stack(logps, 1)


def small_world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref_table = torch.randn(2, len(PREFIXES), 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(2, len(SEQUENCES), generator=generator, dtype=torch.float64)
    return ref_table, all_logps(ref_table), rewards


def optimum(ref_logps, rewards, beta):
    return (ref_logps + rewards / beta).softmax(1)


def minimise(parameter, loss_of):
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
        history_size=50, line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of(parameter)
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameter.detach()


def fit(ref_table, ref_logps, rewards, beta, loss_type):
    """Minimise the population loss: every pair of sequences, drawn from pi_ref, labelled by
    Bradley-Terry."""
    i, j = torch.triu_indices(len(SEQUENCES), len(SEQUENCES), 1)
    weight = ref_logps[:, i].exp() * ref_logps[:, j].exp()  # how often the pair is sampled
    prefers_i = torch.sigmoid(rewards[:, i] - rewards[:, j])

    def population_loss(table):
        logps = all_logps(table)
        i_wins, _, _ = dpo_loss(logps[:, i], logps[:, j], ref_logps[:, i], ref_logps[:, j],
                                beta, loss_type=loss_type)
        j_wins, _, _ = dpo_loss(logps[:, j], logps[:, i], ref_logps[:, j], ref_logps[:, i],
                                beta, loss_type=loss_type)
        return (weight * (prefers_i * i_wins + (1 - prefers_i) * j_wins)).sum()

    return all_logps(minimise(ref_table.clone().requires_grad_(), population_loss))


def total_variation(policy, other):
    return 0.5 * (policy - other).abs().sum(1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_population_dpo_reaches_the_optimum(beta):
    ref_table, ref_logps, rewards = small_world()
    ones = torch.ones(2, dtype=torch.float64)
    assert len(SEQUENCES) == 15 and torch.allclose(ref_logps.exp().sum(1), ones)
    logps = fit(ref_table, ref_logps, rewards, beta, "sigmoid")
    optimal = optimum(ref_logps, rewards, beta)
    assert total_variation(logps.exp(), optimal).max() < 0.01
    assert total_variation(ref_logps.exp(), optimal).min() > 0.15  # there was something to learn
    implicit = beta * (logps - ref_logps)  # equation (5): the reward, up to a constant per prompt
    constant = implicit - rewards
    assert (constant - constant.mean(1, keepdim=True)).abs().max() < 0.02
    log_z = (ref_logps + rewards / beta).logsumexp(1, keepdim=True)
    assert (constant + beta * log_z).abs().max() < 0.02


def test_label_smoothing_expects_flipped_labels():
    """Conservative DPO's optimum is Bradley-Terry's margin only where labels really are flipped
    with that probability: one pair's loss is least at sigma(beta h) = p (1 - eps) + (1 - p) eps."""
    probability = torch.tensor([0.6, 0.9], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)

    def expected_loss(margin):
        wins, _, _ = dpo_loss(margin, zero, zero, zero, 0.5, 0.2)
        losses, _, _ = dpo_loss(zero, margin, zero, zero, 0.5, 0.2)
        return (probability * wins + (1 - probability) * losses).sum()

    margin = minimise(zero.clone().requires_grad_(), expected_loss)
    flipped = probability * 0.8 + (1 - probability) * 0.2
    torch.testing.assert_close(torch.sigmoid(0.5 * margin), flipped, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_population_ipo_reaches_its_own_fixed_point(beta):
    """IPO regresses h = log pi/pi_ref(y) - log pi/pi_ref(y') on (p(y > y') - 1/2) / beta, averaged
    over its two labels; weighted least squares with pi_ref's weights:

        log pi/pi_ref(y) = (p(y > pi_ref) - 1/2) / beta + const

    (its paper, Theorem 1 with Psi the identity): pi* for the reward p(y > pi_ref), not DPO's."""
    ref_table, ref_logps, rewards = small_world(1)
    policy = fit(ref_table, ref_logps, rewards, beta, "ipo").exp()
    beats = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])  # [2, y, y']
    wins = (beats * ref_logps.exp()[:, None, :]).sum(2)
    assert total_variation(policy, optimum(ref_logps, wins, beta)).max() < 0.01
    assert total_variation(policy, optimum(ref_logps, rewards, beta)).max() > 0.05


# --- what the equation says ---


def test_log_z_cancels():
    """A number added to all rewards of a prompt moves neither labels nor pi*; one added to both
    log-ratios, no loss."""
    _, ref_logps, rewards = small_world()
    shifted = rewards + torch.tensor([[3.0], [-7.0]], dtype=torch.float64)
    torch.testing.assert_close(optimum(ref_logps, shifted, 0.3), optimum(ref_logps, rewards, 0.3))
    chosen, rejected, *reference = [logps.double() for logps in ALL_LOGPS]
    losses, _, _ = dpo_loss(chosen, rejected, *reference, 0.1)
    shifted, _, _ = dpo_loss(chosen + 5.0, rejected + 5.0, *reference, 0.1)
    torch.testing.assert_close(shifted, losses)


def test_before_training_the_loss_is_ln_2():
    reference = LOGPS["ref_chosen"], LOGPS["ref_rejected"]
    for label_smoothing in (0.0, 0.2):
        results = dpo_loss(*reference, *reference, 0.1, label_smoothing)
        ln_2 = torch.full((6,), math.log(2))
        torch.testing.assert_close(results[0], ln_2, rtol=0, atol=1e-7)
        assert results[1].abs().max() == results[2].abs().max() == 0


def test_the_gradient_weighs_pairs_by_how_wrong_the_implicit_reward_is():
    """Section 4 of the DPO paper: d loss / d log pi(y_w) = -beta sigma(r_l - r_w)."""
    chosen = LOGPS["policy_chosen"].clone().requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, *ALL_LOGPS[1:], 0.1)
    losses.sum().backward()
    expected = -0.1 * torch.sigmoid(rejected_rewards - chosen_rewards)
    torch.testing.assert_close(chosen.grad, expected)
