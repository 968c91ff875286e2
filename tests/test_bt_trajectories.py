"""bt_trajectories.py: what pairs of walks identify, the fit, value iteration, and PPO."""

import json
import sys

import pytest
import torch

import bt_trajectories as bt
from harness import run_script

f64 = torch.float64
UNIFORM = torch.full((15, 3), 1 / 3, dtype=f64)


def sampled_pairs(slip, num, seed=0):
    generator, P = torch.Generator().manual_seed(seed), bt.transition_probabilities(slip)
    first = bt.sample_walks(P, UNIFORM, num, generator)
    return P, first, bt.sample_walks(P, UNIFORM, num, generator)


def random_rewards(seed):
    return torch.randn(15, 3, dtype=f64, generator=torch.Generator().manual_seed(seed))


def test_loss_by_hand():
    one = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]], dtype=f64)
    two = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]], dtype=f64)
    # margins 1.5 (won) and -2.5 (lost)
    expected = -torch.tensor([1.5, 2.5], dtype=f64).sigmoid().log().sum()
    loss = bt.trajectory_loss(one, two, torch.tensor([1.0, 0.0], dtype=f64))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    half = bt.trajectory_loss(one[:1], two[:1], torch.tensor([0.5], dtype=f64))
    both = torch.tensor([1.5, -1.5], dtype=f64).sigmoid().log().sum()
    assert half.item() == pytest.approx(-0.5 * both.item(), abs=1e-14)


@pytest.mark.parametrize("slip, rank", [(0.0, 26), (0.3, 34)])
def test_what_trajectories_identify(slip, rank):
    P, first, second = sampled_pairs(slip, 4000)
    torch.testing.assert_close(P.sum(-1), torch.ones(15, 3, dtype=f64))
    seen = bt.identifiable(first, second)
    assert seen.trace().item() == pytest.approx(rank, abs=1e-6)
    rewards = random_rewards(1)
    mu = torch.ones(4000, dtype=f64)

    def loss(table):
        return bt.trajectory_loss(table.flatten()[first], table.flatten()[second], mu)

    per_step = torch.randn(5, dtype=f64).repeat_interleave(3)[:, None].expand(15, 3)
    psi = torch.cat([torch.randn(15, dtype=f64), torch.tensor([0.7], dtype=f64)])  # 0.7: the end
    shaping = P @ psi - psi[:-1, None]
    torch.testing.assert_close(loss(rewards + per_step), loss(rewards))  # never seen
    assert (seen @ per_step.flatten()).norm() < 1e-6
    if slip == 0:  # potential shaping is not seen either, and it keeps the optimal policy
        torch.testing.assert_close(loss(rewards + shaping), loss(rewards))
        assert (seen @ shaping.flatten()).norm() < 1e-6
        shaped = bt.action_values(P, rewards + shaping)
        assert torch.equal(bt.action_values(P, rewards).argmax(1), shaped.argmax(1))
    else:  # the expected shaping is seen: which row was slipped into shows
        assert abs(loss(rewards + shaping) - loss(rewards)) > 1
        assert (seen @ shaping.flatten()).norm() > 0.1
    within = torch.zeros(15, 3, dtype=f64)
    # Two actions of a state differ by what is identified where the same states follow: at the
    # wall, and, with slip, everywhere.
    state = 3 if slip == 0 else 4
    within[state, 0], within[state, 1] = 1, -1
    torch.testing.assert_close(seen @ within.flatten(), within.flatten(), rtol=0, atol=1e-6)


def test_learned_rewards():
    """The identified part converges to the truth, the rest stays 0. Without slip, the optimal
    advantages are identified."""
    P, first, second = sampled_pairs(0.0, 20_000)
    rewards = random_rewards(2)
    margins = bt.visit_differences(first, second) @ rewards.flatten()
    learned = bt.fit_rewards(first, second, margins.sigmoid(), 0.0)  # no noise: the truth fits best
    seen = bt.identifiable(first, second)
    torch.testing.assert_close(learned.flatten(), seen @ rewards.flatten(), rtol=0, atol=1e-5)

    def advantages(table):
        Q = bt.action_values(P, table)
        return (Q - Q.max(1, keepdim=True).values)[[1, *range(3, 15)]]  # states in reach

    learned = learned.view(15, 3)
    torch.testing.assert_close(advantages(learned), advantages(rewards), rtol=0, atol=1e-4)


def test_ridge_is_the_minimum():
    _, first, second = sampled_pairs(0.3, 300)
    mu = (torch.rand(300) < 0.5).to(f64)
    learned = bt.fit_rewards(first, second, mu, 0.7).flatten().requires_grad_()
    loss = bt.trajectory_loss(learned[first], learned[second], mu) + 0.35 * learned.square().sum()
    loss.backward()
    assert learned.grad.norm() < 1e-8


def test_value_iteration_against_all_plans():
    """Without slip a plan is a path: the best of 3^5 is the optimum, their mean is the return of a
    random policy."""
    P, rewards = bt.transition_probabilities(0.0), random_rewards(3)
    returns = []
    for plan in torch.cartesian_prod(*[torch.arange(3)] * 5).tolist():
        row, total = 1, 0.0
        for column, action in enumerate(plan):
            total += rewards[3 * column + row, action].item()
            row = min(max(row + action - 1, 0), 2)
        returns.append(total)
    best = bt.action_values(P, rewards)[bt.START].max().item()
    assert best == pytest.approx(max(returns), abs=1e-12)
    mean = sum(returns) / len(returns)
    assert bt.expected_return(P, rewards, UNIFORM) == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_ppo_finds_the_optimum(slip):
    P, rewards = bt.transition_probabilities(slip), random_rewards(4)
    policy = bt.ppo(P, rewards, torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.sum(1), torch.ones(15, dtype=f64))
    best = bt.action_values(P, rewards)[bt.START].max().item()
    random = bt.expected_return(P, rewards, UNIFORM)
    reached = bt.expected_return(P, rewards, policy)
    assert random + 0.97 * (best - random) < reached <= best + 1e-9


def test_run(tmp_path, capsys):
    bt.main(bt.Args(output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["identified"] == 34 and results["share_of_optimum"] > 0.95
    assert results["reward_error"] < 0.3
    assert json.loads((tmp_path / "args.json").read_text())["slip"] == 0.1


@pytest.mark.parametrize("flags, message", [
    (["--comparisons", "20"], "--comparisons 20"),
    (["--comparisons", "0"], "--comparisons 0"),
    (["--slip", "1.5"], "--slip 1.5"),
    (["--l2", "-1"], "--l2 -1"),
    (["--l2", "nan"], "--l2 nan"),
])
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bt_trajectories.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(bt.main, bt.Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.rglob("results.json"))
