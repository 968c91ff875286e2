"""bt_bandit.py against independent solvers (golden/bt.json, made by benchmarks/bt_golden.py with scipy), finite
differences, and what must hold by construction."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bt_bandit as bt  # noqa: E402
from common import UserError, run_script  # noqa: E402

GOLDEN = json.loads((ROOT / "tests" / "golden" / "bt.json").read_text())
f64 = torch.float64


def expand(counts):
    """[[a, b, wins, ties, losses]] -> i, j, mu, weights"""
    counts = torch.tensor(counts)
    i, j = counts[:, 0].repeat(3), counts[:, 1].repeat(3)
    mu = torch.tensor([1.0, 0.5, 0.0], dtype=f64).repeat_interleave(len(counts))
    weights = counts[:, 2:].T.flatten().to(f64)
    return i[weights > 0], j[weights > 0], mu[weights > 0], weights[weights > 0]


def simulate(K, N, seed, scale=1.0, tie_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = scale * torch.randn(K, generator=generator, dtype=f64)
    i = torch.randint(K, (N,), generator=generator)
    j = (i + torch.randint(1, K, (N,), generator=generator)) % K
    mu = (torch.rand(N, generator=generator, dtype=f64) < torch.sigmoid(rewards[i] - rewards[j])).to(f64)
    mu[torch.rand(N, generator=generator) < tie_rate] = 0.5
    return rewards - rewards.mean(), i, j, mu


# ---------------------------------------------------------------------------------------------------------- equations


def test_equations_by_hand():
    r = torch.tensor([1.0, 0.0, -2.0], dtype=f64)
    e = torch.e
    assert bt.bt_probability(r[0], r[1]).item() == pytest.approx(e / (e + 1), abs=1e-15)
    i, j, mu = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), torch.tensor([1.0, 0.5, 0.25], dtype=f64)
    P = r.exp()[:, None] / (r.exp()[:, None] + r.exp())
    expected = -(P[0, 1].log() + 0.5 * (P[1, 2].log() + P[2, 1].log()) + 0.25 * P[2, 0].log() + 0.75 * P[0, 2].log())
    assert bt.bt_loss(r, i, j, mu).item() == pytest.approx(expected.item(), abs=1e-14)
    one = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 0.0]], dtype=f64)
    two = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]], dtype=f64)
    expected = -torch.tensor([1.5, 2.5], dtype=f64).sigmoid().log().sum()  # margins 1.5 (won) and -2.5 (lost)
    loss = bt.trajectory_loss(one, two, torch.tensor([1.0, 0.0], dtype=f64))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    assert bt.transitive_probability(P[0, 1], P[1, 2]).item() == pytest.approx(P[0, 2].item(), abs=1e-15)


def test_losses_stay_finite_where_probabilities_underflow():
    far = torch.tensor([2000.0, -2000.0], dtype=f64, requires_grad=True)
    loss = bt.bt_loss(far, torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0], dtype=f64))
    loss.backward()
    assert loss.item() == 4000 and far.grad.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("ties, tie", [("half", 0.0), ("davidson", 0.4), ("rao-kupper", 0.7)])
def test_derivatives(ties, tie):
    """Gradient and Hessian of likelihood_terms against finite differences, over (r, t) together; the value against the
    outcome probabilities, which must sum to 1."""
    _, i, j, mu = simulate(5, 60, 0, tie_rate=0.3)
    weights = torch.linspace(0.5, 2, 60, dtype=f64)
    pairs = bt.count_pairs(i, j, mu, weights, ties, 5)
    x = torch.cat([torch.randn(5, dtype=f64), torch.tensor([tie], dtype=f64)])

    def terms(x):
        value, g_d, g_t, *second = bt.likelihood_terms(x[:5], x[5], pairs, ties)
        gradient = torch.cat([torch.bincount(pairs.a, g_d, 5) - torch.bincount(pairs.b, g_d, 5), g_t.sum().view(1)])
        return value, gradient, bt.assemble(pairs, *second, 5)

    P = bt.outcome_probabilities(x[pairs.a] - x[pairs.b], tie, ties)
    torch.testing.assert_close(P.sum(0), torch.ones_like(P[0]))
    torch.testing.assert_close(terms(x)[0], -torch.xlogy(torch.stack(pairs[2:]), P).sum())
    if ties == "half":
        log_p = torch.sigmoid(x[i] - x[j]).log(), torch.sigmoid(x[j] - x[i]).log()
        torch.testing.assert_close(terms(x)[0], -(weights * (mu * log_p[0] + (1 - mu) * log_p[1])).sum())
    h, eye = 1e-5, torch.eye(6, dtype=f64)
    gradient = torch.stack([(terms(x + h * e)[0] - terms(x - h * e)[0]) / (2 * h) for e in eye])
    hessian = torch.stack([(terms(x + h * e)[1] - terms(x - h * e)[1]) / (2 * h) for e in eye])
    size = 5 if ties == "half" else 6  # without a tie parameter its row is empty
    torch.testing.assert_close(terms(x)[1][:size], gradient[:size], rtol=0, atol=1e-7)
    torch.testing.assert_close(terms(x)[2][:size, :size], hessian[:size, :size], rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------ against other solvers


@pytest.mark.parametrize("data, model", [(data, model) for data in ("games", "simulated", "arena")  # the games: no ties
                                         for model in ("half", "ridge", "davidson", "rao-kupper")
                                         if model in GOLDEN[data]])
def test_agrees_with_scipy(data, model):
    golden = GOLDEN[data]
    i, j, mu, weights = expand(golden["counts"])
    l2, ties = (0.5, "half") if model == "ridge" else (0.0, model)
    fit = bt.fit_bt(i, j, mu, golden["num_items"], l2, weights, ties)
    torch.testing.assert_close(fit.rewards, torch.tensor(golden[model]["rewards"], dtype=f64), rtol=0, atol=1e-8)
    assert fit.tie == pytest.approx(golden[model]["tie"], abs=1e-8)
    assert fit.loss == pytest.approx(golden[model]["loss"], rel=1e-12)
    assert fit.gradient_norm < 1e-8 and fit.iterations < 20


def test_arena_rank_example():
    """22 games: A-B 2:3, A-D 1:4, B-C 5:3, C-D 1:3 -> worths with geometric mean 1."""
    i, j, mu, weights = expand(GOLDEN["games"]["counts"])
    assert weights.sum() == 22
    worths = bt.fit_bt(i, j, mu, 4, weights=weights).rewards.exp().tolist()
    assert [round(w, 3) for w in worths] == [0.640, 1.043, 0.660, 2.270]


@pytest.mark.parametrize("data", ["games", "simulated", "arena"])
def test_standard_errors_agree(data):
    golden = GOLDEN[data]
    *rows, weights = expand(golden["counts"])
    i, j, mu = (x.repeat_interleave(weights.long()) for x in rows)
    fit = bt.fit_bt(i, j, mu, golden["num_items"])  # one row a comparison: the sandwich depends on what a row is
    for robust, name in ((False, "fisher_se"), (True, "sandwich_se")):
        V = bt.covariance(fit, i, j, mu, robust=robust)
        torch.testing.assert_close(V.diagonal().sqrt(), torch.tensor(golden[name], dtype=f64), rtol=0, atol=1e-9)
        torch.testing.assert_close(V.sum(0), torch.zeros(len(V), dtype=f64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("ties", ["half", "davidson", "rao-kupper"])
@pytest.mark.parametrize("K", [250, 2100])
def test_newton_step_without_cholesky(K, ties):
    """250 items go by conjugate gradients on the matrix, 2,100 pair by pair: the step must solve the dense system, the
    fit converge."""
    _, i, j, mu = simulate(K, 30 * K, 1, tie_rate=0.2)
    fit = bt.fit_bt(i, j, mu, K, 0.1, ties=ties)
    assert fit.gradient_norm < 1e-8 and fit.iterations < 12
    pairs = bt.count_pairs(i, j, mu, torch.ones_like(mu), ties, K)
    _, _, _, *second = bt.likelihood_terms(fit.rewards, torch.tensor(fit.tie, dtype=f64), pairs, ties)
    gradient = torch.randn(K + 1, dtype=f64, generator=torch.Generator().manual_seed(0))
    gradient[-1] *= ties != "half"
    gradient[:-1] -= gradient[:-1].mean()
    dense = torch.linalg.solve(bt.regular(bt.assemble(pairs, *second, K), 0.1, ties), gradient)
    step = bt.newton_step(pairs, *second, gradient, 0.1, ties, K)
    assert (dense - step).norm() < 1e-3 * dense.norm()


def test_large_fit_equals_small_fit():
    """The same comparisons among 5,000 items, of which the others only tied with item 0, which moves nobody."""
    _, i, j, mu = simulate(30, 2000, 8)
    small = bt.fit_bt(i, j, mu, 30)
    rest = torch.arange(30, 5000)
    tied = torch.full((4970,), 0.5, dtype=f64)
    large = bt.fit_bt(torch.cat([i, rest]), torch.cat([j, 0 * rest]), torch.cat([mu, tied]), 5000)
    of_few, of_many = small.rewards - small.rewards[0], large.rewards - large.rewards[0]
    torch.testing.assert_close(of_many[:30], of_few, rtol=0, atol=1e-8)
    torch.testing.assert_close(large.rewards[30:], large.rewards[:1].expand(4970), rtol=0, atol=1e-8)


def test_counts_of_sorted_pairs_equal_counts_of_the_table():
    _, i, j, mu = simulate(50, 3000, 2, tie_rate=0.2)
    weights = torch.linspace(1, 2, 3000, dtype=f64)
    table = bt.count_pairs(i, j, mu, weights, "davidson", 50)
    far = bt.count_pairs(i * 100, j * 100, mu, weights, "davidson", 5000)  # too many items for a table
    assert torch.equal(table.a * 100, far.a) and torch.equal(table.b * 100, far.b)
    for x, y in zip(table[2:], far[2:]):
        torch.testing.assert_close(x, y)
    assert (table.a < table.b).all() and len(table.a) == len(set(zip(table.a.tolist(), table.b.tolist())))


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("ties", ["half", "davidson", "rao-kupper"])
def test_rows_and_sides_do_not_matter(ties):
    _, i, j, mu = simulate(12, 900, 3, tie_rate=0.3)
    fit = bt.fit_bt(i, j, mu, 12, ties=ties)
    order = torch.randperm(900)
    again = bt.fit_bt(i[order], j[order], mu[order], 12, ties=ties)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    swap = torch.rand(900) < 0.5
    again = bt.fit_bt(torch.where(swap, j, i), torch.where(swap, i, j), torch.where(swap, 1 - mu, mu), 12, ties=ties)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    assert fit.tie == pytest.approx(again.tie, abs=1e-11) and abs(fit.rewards.mean()) < 1e-14
    label = torch.randperm(12)
    again = bt.fit_bt(label[i], label[j], mu, 12, ties=ties)
    torch.testing.assert_close(fit.rewards, again.rewards[label], rtol=0, atol=1e-11)


def test_shift_invariance_and_minimum():
    _, i, j, mu = simulate(8, 400, 4, tie_rate=0.1)
    fit = bt.fit_bt(i, j, mu, 8)
    least = bt.bt_loss(fit.rewards, i, j, mu)
    assert fit.loss == pytest.approx(least.item(), rel=1e-13)
    torch.testing.assert_close(bt.bt_loss(fit.rewards + 3.7, i, j, mu), least)
    for seed in range(5):
        nudge = 1e-3 * torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=f64)
        assert bt.bt_loss(fit.rewards + nudge - nudge.mean(), i, j, mu) > least


def test_weights_are_repeats_and_soft_labels_are_means():
    _, i, j, mu = simulate(6, 200, 5)
    repeats = 1 + torch.arange(200) % 3
    fit = bt.fit_bt(i, j, mu, 6, weights=repeats)
    again = bt.fit_bt(*(x.repeat_interleave(repeats) for x in (i, j, mu)), 6)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    votes = bt.fit_bt(i.repeat(4), j.repeat(4), torch.cat([mu, mu, mu, 1 - mu]), 6)  # three of four votes one way
    soft = bt.fit_bt(i, j, 0.25 + 0.5 * mu, 6)
    torch.testing.assert_close(votes.rewards, soft.rewards, rtol=0, atol=1e-11)


def test_extreme_counts():
    """Odds of 10^9 and a chain of items 1,000 to 1: Newton's step must be damped, its end is known in closed form."""
    fit = bt.fit_bt([0, 0], [1, 1], [1, 0], 2, weights=[1e9, 1.0])
    assert (fit.rewards[0] - fit.rewards[1]).item() == pytest.approx(9 * math.log(10), rel=1e-8)
    K = 200
    i, j = torch.arange(K - 1), torch.arange(1, K)
    fit = bt.fit_bt(torch.cat([i, i]), torch.cat([j, j]), torch.cat([torch.ones(K - 1), torch.zeros(K - 1)]), K,
                    weights=torch.cat([torch.full((K - 1,), 1000.0), torch.ones(K - 1)]))
    expected = torch.full((K - 1,), 1000.0, dtype=f64).log()
    torch.testing.assert_close(fit.rewards[:-1] - fit.rewards[1:], expected, rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ intervals


def test_coverage():
    """95% intervals over 300 data sets of 8 arms: the share of 2,400 covered is within 4 standard errors of 95%, were
    arms independent 0.44%; they are not quite, so take the data sets' own spread."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.linspace(-1.5, 1.5, 8, dtype=f64)
    for robust in (False, True):
        covered = []
        for _ in range(300):
            i, j, mu, weights = bt.simulate(rewards, 600, generator)
            fit = bt.fit_bt(i, j, mu, 8, weights=weights)
            errors = bt.covariance(fit, i, j, mu, weights=weights, robust=robust).diagonal().sqrt()
            covered.append(((fit.rewards - rewards).abs() <= 1.96 * errors).to(f64).mean())
        covered = torch.stack(covered)
        assert abs(covered.mean() - 0.95) < 4 * covered.std() / 300**0.5 < 0.04


def test_sandwich_differs_where_the_model_is_wrong():
    """Each comparison entered twice: Fisher believes in twice the data; a tie every time: no noise is left, and Fisher
    does not see it."""
    _, i, j, mu = simulate(5, 500, 6)
    tied = torch.full_like(mu, 0.5)
    fit = bt.fit_bt(i, j, tied, 5)
    sandwich, fisher = bt.covariance(fit, i, j, tied, robust=True), bt.covariance(fit, i, j, tied)
    assert sandwich.abs().max() < 1e-20 < 1e-4 < fisher.diagonal().min()


# -------------------------------------------------------------------------------------------------------------- winners


def test_winners():
    P = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
    assert bt.condorcet_winner(P) is None and bt.copeland_winners(P) == [0, 1, 2]
    P = torch.tensor([[0.0, 0.55, 0.55], [0.45, 1.0, 0.95], [0.45, 0.05, 0.0]])  # the diagonal must not be read
    assert bt.condorcet_winner(P) == 0 and bt.copeland_winners(P) == [0] and bt.borda_winner(P) == 1
    # 1/2 is enough for Condorcet, not for Copeland
    P = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.6], [0.1, 0.4, 0.5]])
    assert bt.condorcet_winner(P) == 0 and bt.copeland_winners(P) == [0, 1] and bt.borda_winner(P) == 0


def test_winners_agree_under_bradley_terry():
    for seed in range(50):
        r = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=f64)
        P, best = bt.bt_probability(r[:, None], r), int(r.argmax())
        assert (bt.condorcet_winner(P), bt.copeland_winners(P), bt.borda_winner(P)) == (best, [best], best)


def test_misfit():
    """No misfit where (1) holds exactly; where it cannot hold, the deviance is the one worked out by hand; under (1) it
    is chi^2."""
    r = torch.tensor([0.3, 0.1, -0.4], dtype=f64)
    n = 100 * (1 - torch.eye(3, dtype=f64))
    assert bt.misfit(r, bt.bt_probability(r[:, None], r), n)[0] == pytest.approx(0, abs=1e-9)
    cycle = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]], dtype=f64)
    fit = bt.fit_bt([0, 0, 1], [1, 2, 2], [0.8, 0.2, 0.8], 3, weights=[100.0] * 3)
    torch.testing.assert_close(fit.rewards, torch.zeros(3, dtype=f64), rtol=0, atol=1e-12)
    deviance, freedom, tail = bt.misfit(fit.rewards, cycle, n)
    by_hand = 2 * 300 * (0.8 * math.log(1.6) + 0.2 * math.log(0.4))  # three pairs of 100 at 0.8, fitted as 0.5
    assert deviance == pytest.approx(by_hand, rel=1e-6) and freedom == 1 and tail < 1e-10
    generator, deviances = torch.Generator().manual_seed(0), []
    for _ in range(200):
        i, j, mu, weights = bt.simulate(r, 2000, generator)
        P, n = bt.win_shares(i, j, mu, weights, 3)
        deviances.append(bt.misfit(bt.fit_bt(i, j, mu, 3, weights=weights).rewards, P, n)[0])
    assert abs(torch.tensor(deviances).mean() - 1) < 4 * (2 / 200) ** 0.5  # chi^2 with 1 degree: mean 1, variance 2


# ---------------------------------------------------------------------------------------------------- no finite maximum


def test_strong_components_against_reachability():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        edges = torch.randint(12, (2, 16), generator=generator)
        reach = torch.eye(12) + torch.zeros(12, 12).index_put((edges[0], edges[1]), torch.tensor(1.0))
        for _ in range(5):
            reach = ((reach @ reach) > 0).float()
        same = (reach > 0) & (reach.T > 0)
        component = bt.strong_components(edges[0], edges[1], 12)
        assert torch.equal(component[:, None] == component, same)


def test_groups_without_finite_maximum_are_named():
    names, groups = ["ann", "bob", "cleo", "dan"], r"(\{dan\}.*\{cleo\}|\{cleo\}.*\{dan\}).*\{ann, bob\}"
    with pytest.raises(UserError, match="3 groups.*" + groups):
        bt.fit_bt([0, 1, 0], [1, 0, 2], [1, 1, 1], 4, names=names)  # cleo only lost, dan never played
    with pytest.raises(UserError, match=r"\{0\}.*\{1\}|\{1\}.*\{0\}"):
        bt.fit_bt([0], [1], [1], 2)
    fit = bt.fit_bt([0, 1, 0], [1, 0, 2], [1, 1, 1], 4, l2=0.1, names=names)
    assert fit.rewards.isfinite().all() and fit.gradient_norm < 1e-8
    assert fit.rewards[3].item() == pytest.approx(0, abs=1e-12)
    assert bt.fit_bt([0], [1], [0.5], 2).rewards.tolist() == [0, 0]  # a tie is an edge each way


@pytest.mark.parametrize("ties", ["davidson", "rao-kupper"])
def test_tie_parameters_without_finite_maximum(ties):
    for mu, what in (([1, 0], "there are no ties"), ([0.5, 0.5], "all comparisons are ties"),
                     ([1, 0.5], "for want of wins in both directions")):
        with pytest.raises(UserError, match=what):
            bt.fit_bt([0, 0], [1, 1], mu, 2, ties=ties)
    assert bt.fit_bt([0, 0], [1, 1], [1, 0.5], 2, l2=0.1, ties=ties).gradient_norm < 1e-8
    # 0 > 1 > 2 = 0: finite, without wins both ways
    assert bt.fit_bt([0, 1, 0], [1, 2, 2], [1, 1, 0.5], 3, ties=ties).gradient_norm < 1e-8


# --------------------------------------------------------------------------------------------------------- trajectories


def sampled_walks(slip, num, seed=0):
    generator, P = torch.Generator().manual_seed(seed), bt.walk(slip)
    uniform = torch.full((15, 3), 1 / 3, dtype=f64)
    return P, [x for _ in range(2) for x in bt.sample_walks(P, uniform, num, generator)]


@pytest.mark.parametrize("slip, rank", [(0.0, 26), (0.3, 34)])
def test_what_trajectories_identify(slip, rank):
    P, pairs = sampled_walks(slip, 4000)
    torch.testing.assert_close(P.sum(-1), torch.ones(15, 3, dtype=f64))
    seen = bt.identifiable(*pairs)
    assert seen.trace().item() == pytest.approx(rank, abs=1e-6)
    rewards = torch.randn(15, 3, dtype=f64, generator=torch.Generator().manual_seed(1))
    mu = torch.ones(4000, dtype=f64)

    def loss(table):
        return bt.trajectory_loss(table[pairs[0], pairs[1]], table[pairs[2], pairs[3]], mu)

    per_step = torch.randn(5, dtype=f64).repeat_interleave(3)[:, None].expand(15, 3)
    psi = torch.cat([torch.randn(15, dtype=f64), torch.tensor([0.7], dtype=f64)])  # one value after the end
    shaping = P @ psi - psi[:-1, None]
    torch.testing.assert_close(loss(rewards + per_step), loss(rewards))  # never seen
    assert (seen @ per_step.flatten()).norm() < 1e-6
    if slip == 0:  # potential shaping is not seen either, and the optimal policy does not change with it
        torch.testing.assert_close(loss(rewards + shaping), loss(rewards))
        assert (seen @ shaping.flatten()).norm() < 1e-6
        assert torch.equal(bt.action_values(P, rewards).argmax(1), bt.action_values(P, rewards + shaping).argmax(1))
    else:  # the expected shaping is seen: which row was slipped into shows
        assert abs(loss(rewards + shaping) - loss(rewards)) > 1 and (seen @ shaping.flatten()).norm() > 0.1
    within = torch.zeros(15, 3, dtype=f64)
    # Two actions of a state differ by what is identified where the same states follow: at the wall, and, with slip,
    # everywhere.
    state = 3 if slip == 0 else 4
    within[state, 0], within[state, 1] = 1, -1
    torch.testing.assert_close(seen @ within.flatten(), within.flatten(), rtol=0, atol=1e-6)


def test_learned_trajectory_rewards():
    """The identified part converges to the truth, the rest stays 0; without slip optimal advantages are identified."""
    P, pairs = sampled_walks(0.0, 20_000)
    rewards = torch.randn(15, 3, dtype=f64, generator=torch.Generator().manual_seed(2))
    margins = rewards[pairs[0], pairs[1]].sum(1) - rewards[pairs[2], pairs[3]].sum(1)
    learned = bt.fit_trajectory_rewards(*pairs, margins.sigmoid(), 0.0)  # labels without noise: the minimum is true
    seen = bt.identifiable(*pairs)
    torch.testing.assert_close(learned.flatten(), seen @ rewards.flatten(), rtol=0, atol=1e-5)

    def advantages(table):
        Q = bt.action_values(P, table)
        return (Q - Q.max(1, keepdim=True).values)[[1, *range(3, 15)]]  # states in reach

    torch.testing.assert_close(advantages(learned), advantages(rewards), rtol=0, atol=1e-4)


def test_value_iteration_against_all_plans():
    """Without slip a plan is a path: the best of 3^5 is the optimum; a random policy's return is the mean of all."""
    P, rewards = bt.walk(0.0), torch.randn(15, 3, dtype=f64, generator=torch.Generator().manual_seed(3))
    returns = []
    for plan in torch.cartesian_prod(*[torch.arange(3)] * 5).tolist():
        row, total = 1, 0.0
        for column, action in enumerate(plan):
            total += rewards[3 * column + row, action].item()
            row = min(max(row + action - 1, 0), 2)
        returns.append(total)
    assert bt.action_values(P, rewards)[bt.START].max().item() == pytest.approx(max(returns), abs=1e-12)
    uniform = torch.full((15, 3), 1 / 3, dtype=f64)
    mean_return = bt.action_values(P, rewards, uniform)[bt.START].mean().item()
    assert mean_return == pytest.approx(sum(returns) / len(returns), abs=1e-12)


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_ppo_finds_the_optimum(slip):
    P, rewards = bt.walk(slip), torch.randn(15, 3, dtype=f64, generator=torch.Generator().manual_seed(4))
    policy = bt.ppo(P, rewards, torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy.sum(1), torch.ones(15, dtype=f64))
    start = lambda policy: (policy * bt.action_values(P, rewards, policy)).sum(1)[bt.START].item()  # noqa: E731
    best, random = bt.action_values(P, rewards)[bt.START].max().item(), start(torch.full((15, 3), 1 / 3, dtype=f64))
    assert random + 0.97 * (best - random) < start(policy) <= best + 1e-9


# --------------------------------------------------------------------------------------------------------- command line


def call(tmp_path, **flags):
    args = bt.Args(output_dir=str(tmp_path), **flags)
    bt.main(args)
    return json.loads((tmp_path / "results.json").read_text())


def write_battles(path, rows, columns=("model_a", "model_b", "winner")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_bandit_run(tmp_path, capsys):
    results = call(tmp_path, simulations=60, comparisons=2000)
    assert results["winners_agree"] and results["cycle_deviance"] > 50 and results["split_deviance"] > 30
    assert -0.65 < results["slope"] < -0.4 and 0.9 < results["coverage"] < 0.99 and results["gradient_norm"] < 1e-8
    out = capsys.readouterr().out
    assert "rock, paper, scissors" in out and "Transitivity" in out
    assert json.loads((tmp_path / "args.json").read_text())["simulations"] == 60


def test_trajectories_run(tmp_path, capsys):
    results = call(tmp_path, setting="trajectories")
    assert results["identified"] == 34 and results["share_of_optimum"] > 0.95 and results["reward_error"] < 0.3


@pytest.mark.parametrize("ties, suffix", [("half", ".csv"), ("davidson", ".csv"), ("rao-kupper", ".csv"),
                                          ("half", ".jsonl"), ("half", ".parquet")])
def test_battles_run(tmp_path, capsys, ties, suffix):
    arena, path = GOLDEN["arena"], tmp_path / f"battles{suffix}"
    words = ["model_a", "tie (bothbad)", "model_b"]
    rows = [(arena["names"][a], arena["names"][b], word) for a, b, *votes in arena["counts"]
            for word, times in zip(words, votes) for _ in range(times)]
    frame = __import__("pandas").DataFrame(rows, columns=["model_a", "model_b", "winner"])
    {".csv": lambda: frame.to_csv(path, index=False),
     ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
     ".parquet": lambda: frame.to_parquet(path)}[suffix]()
    out = tmp_path / "out"
    results = call(out, data=str(path), ties=ties, bootstrap=20, anchor=1200.0, anchor_item="GPT 4", scale=200.0)
    ratings = {row["item"]: row for row in csv.DictReader(open(out / "ratings.csv"))}
    golden = torch.tensor(arena[ties]["rewards"], dtype=f64)
    expected = 1200 + 200 / torch.log(torch.tensor(10.0, dtype=f64)) * (golden - golden[arena["names"].index("GPT 4")])
    got = torch.tensor([float(ratings[name]["rating"]) for name in arena["names"]], dtype=f64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    top = ratings["GPT 4"]
    assert top["low"] == top["high"] == top["bootstrap_low"] == "1200.0" and top["rank"] == "1"
    other = ratings["command"]
    assert float(other["low"]) < float(other["rating"]) < float(other["high"])
    assert int(other["rank_low"]) <= int(other["rank"]) <= int(other["rank_high"])
    assert results["log_loss"] < results["log_loss_constant"] and results["accuracy"] > results["accuracy_constant"]
    matrix = list(csv.reader(open(out / "win_matrix.csv")))
    assert float(matrix[1][2]) + float(matrix[2][1]) == pytest.approx(1)
    assert float(matrix[1][2]) > 0.5 and matrix[1][0] == "GPT 4"


def test_soft_comparisons_with_weights(tmp_path, capsys):
    rows = [["b", "a", 0.25, 4], ["a", "c", 0.5, 2], ["c", "b", 0.5, 2]] * 7
    call(tmp_path / "out", data=write_battles(tmp_path / "soft.csv", rows, ("i", "j", "mu", "weight")), bootstrap=0)
    ratings = {row["item"]: float(row["rating"]) for row in csv.DictReader(open(tmp_path / "out" / "ratings.csv"))}
    fit = bt.fit_bt([1, 0, 2], [0, 2, 1], [0.25, 0.5, 0.5], 3, weights=[28.0, 14.0, 14.0])
    rated = torch.tensor([ratings[name] for name in "abc"], dtype=f64)
    torch.testing.assert_close(rated, 1000 + 400 / math.log(10) * fit.rewards)


def test_held_out_check_survives_an_item_with_one_win(tmp_path, capsys):
    rows = [["a", "b", w] for w in ("model_a", "model_b")] * 30 + [["a", "c", "model_a"], ["c", "a", "model_a"]]
    for seed in range(6):
        results = call(tmp_path / "out", data=write_battles(tmp_path / "rare.csv", rows), bootstrap=20, seed=seed)
        assert results["held_out"] == 6 and results["log_loss"] < 2


GOOD = [["a", "b", "model_a"], ["b", "a", "model_a"]]
WEIGHTED = ("model_a", "model_b", "winner", "weight")
BAD_FILES = {
    "itself": (GOOD + [["a", "a", "tie"]], None, "row 3: an item is compared with itself"),
    "word": (GOOD + [["a", "b", "draw"]], None, "row 3: winner 'draw' is none of model_a"),
    "no winner": (GOOD + [["a", "b", ""]], None, "row 3: winner None"),
    "no name": (GOOD + [["", "b", "tie"]], None, "row 3: an item has no name"),
    "mu": ([["a", "b", 0.5], ["a", "b", 1.5]], ("i", "j", "mu"), "row 2: mu is not a number in [0, 1]"),
    "mu word": ([["a", "b", "0.5"], ["a", "b", "x"]], ("i", "j", "mu"), "row 2: mu 'x'"),
    "nan mu": ([["a", "b", 0.5], ["a", "b", "nan"]], ("i", "j", "mu"), "row 2: mu"),
    "nan weight": ([[*GOOD[0], "1"], [*GOOD[1], "nan"]], WEIGHTED, "row 2: weight None is not a number"),
    "no weight": ([[*GOOD[0], "1"], [*GOOD[1], ""]], WEIGHTED, "row 2: "),
    "negative weight": ([[*GOOD[0], "1"], [*GOOD[1], "-2"]], WEIGHTED, "row 2: the weight"),
    "columns": (GOOD, ("left", "right", "winner"), "no column 'model_a'"),
    "one item": ([["a", "a", "tie"]], None, "row 1: an item is compared with itself"),
    "no rows": ([], None, "bad.csv"),
    "groups": (GOOD + [["a", "c", "model_a"]], None, "{c} {a, b}"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    rows, columns, message = BAD_FILES[name]
    with pytest.raises(UserError) as error:
        call(tmp_path / "out", data=write_battles(tmp_path / "bad.csv", rows, *([columns] if columns else [])))
    assert message in str(error.value) and "\n" not in str(error.value).strip() and "--data" in str(error.value)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--data", "bad.csv"], "row 2: winner 'draw' is none of"),
    (["--data", "missing.csv"], "--data missing.csv: no such file"),
    (["--data", "empty.csv"], "empty.csv"),
    (["--data", "good.csv", "--anchor-item", "z"], "--anchor-item z: not in"),
    (["--data", "good.csv", "--ties", "davidson"], "there are no ties"),
    (["--data", "good.csv", "--scale", "0"], "--scale"),
    (["--arms", "1"], "--arms 1"),
    (["--comparisons", "0"], "--comparisons 0"),
    (["--comparisons", "3"], "no finite maximum"),
    (["--setting", "trajectories", "--comparisons", "20"], "--comparisons 20"),
    (["--l2", "-1"], "--l2 -1"),
    (["--l2", "nan"], "--l2 nan"),
])
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, flags, message):
    write_battles(tmp_path / "bad.csv", [GOOD[0], ["a", "b", "draw"]])
    write_battles(tmp_path / "good.csv", GOOD)
    (tmp_path / "empty.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bt_bandit.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(bt.main, bt.Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error


def test_the_script_as_a_process(tmp_path):
    """Alone with common.py in an empty folder; a bad file gives status 2 and one line."""
    for name in ("bt_bandit.py", "common.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    write_battles(tmp_path / "bad.csv", [GOOD[0], ["a", "b", "draw"]])
    write_battles(tmp_path / "good.csv", GOOD * 20)
    good, bad = (subprocess.run([sys.executable, "bt_bandit.py", "--data", name], cwd=tmp_path, capture_output=True,
                                text=True) for name in ("good.csv", "bad.csv"))
    assert good.returncode == 0 and (tmp_path / "runs" / "bt_bandit" / "ratings.csv").exists(), good.stderr
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1 and "row 2" in bad.stderr, bad.stderr


def test_fit_refuses_bad_tensors():
    for arguments, message in ((([0, 1], [1, 1], [1, 1], 2), "row 2: an item is compared with itself"),
                               (([0], [2], [1], 2), "row 1: an item is not one of"),
                               (([0], [1], [1.1], 2), "row 1: mu"), (([0], [1], [float("nan")], 2), "row 1: mu"),
                               (([], [], [], 2), "no comparisons"), (([], [], [], 1), "no comparisons"),
                               (([0, 1], [1, 0], [1, 1, 1], 2), "give one of each"),
                               (([0, 1], [1], [1, 1], 2), "give one of each"),
                               (([0, 1, 0], [1, 0], [1, 1], 2), "give one of each")):
        with pytest.raises(UserError, match=message.replace("[", r"\[")):
            bt.fit_bt(*arguments)
    with pytest.raises(UserError, match="row 2: the weight"):
        bt.fit_bt([0, 1], [1, 0], [1, 1], 2, weights=[1.0, float("nan")])
    with pytest.raises(UserError, match="row 1: mu is not 0, 0.5 or 1"):
        bt.fit_bt([0, 1], [1, 0], [0.7, 1], 2, ties="davidson")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu():
    _, i, j, mu = simulate(40, 4000, 7)
    cpu, gpu = bt.fit_bt(i, j, mu, 40), bt.fit_bt(i.cuda(), j.cuda(), mu.cuda(), 40)
    assert gpu.rewards.is_cuda
    torch.testing.assert_close(cpu.rewards, gpu.rewards.cpu(), rtol=0, atol=1e-10)
