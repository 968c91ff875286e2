"""bt_bandit.py against independent solvers (golden/bt.json, made by benchmarks/bt_golden.py with
scipy), finite differences, and what must hold by construction."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import bt_bandit as bt
from harness import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "bt.json").read_text())
f64 = torch.float64


def expand(counts):
    """[[a, b, wins, ties, losses]] -> i, j, mu, weights."""
    counts = torch.tensor(counts)
    i, j = counts[:, 0].repeat(3), counts[:, 1].repeat(3)
    mu = torch.tensor([1.0, 0.5, 0.0], dtype=f64).repeat_interleave(len(counts))
    weights = counts[:, 2:].T.flatten().to(f64)
    return i[weights > 0], j[weights > 0], mu[weights > 0], weights[weights > 0]


def simulate(K, N, seed, tie_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(K, generator=generator, dtype=f64)
    i = torch.randint(K, (N,), generator=generator)
    j = (i + torch.randint(1, K, (N,), generator=generator)) % K
    p = torch.sigmoid(rewards[i] - rewards[j])
    mu = (torch.rand(N, generator=generator, dtype=f64) < p).to(f64)
    mu[torch.rand(N, generator=generator) < tie_rate] = 0.5
    return i, j, mu


def gradient_norm(fit, l2=0.0):
    return bt.loss_and_derivatives(fit.rewards, fit.wins, l2)[1].norm()


# --- equations ---


def test_equations_by_hand():
    r = torch.tensor([1.0, 0.0, -2.0], dtype=f64)
    e = torch.e
    assert bt.bt_probability(r[0], r[1]).item() == pytest.approx(e / (e + 1), abs=1e-15)
    i, j = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    mu = torch.tensor([1.0, 0.5, 0.25], dtype=f64)
    P = r.exp()[:, None] / (r.exp()[:, None] + r.exp())
    tie = 0.5 * (P[1, 2].log() + P[2, 1].log())
    expected = -(P[0, 1].log() + tie + 0.25 * P[2, 0].log() + 0.75 * P[0, 2].log())
    assert bt.bt_loss(r, i, j, mu).item() == pytest.approx(expected.item(), abs=1e-14)
    implied = bt.transitive_probability(P[0, 1], P[1, 2])
    assert implied.item() == pytest.approx(P[0, 2].item(), abs=1e-15)


def test_losses_stay_finite_where_probabilities_underflow():
    far = torch.tensor([2000.0, -2000.0], dtype=f64, requires_grad=True)
    loss = bt.bt_loss(far, torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0], dtype=f64))
    loss.backward()
    assert loss.item() == 4000 and far.grad.tolist() == [1.0, -1.0]


def test_derivatives():
    """The value of loss_and_derivatives against bt_loss, the rest against finite differences."""
    i, j, mu = simulate(5, 60, 0, tie_rate=0.3)
    weights = torch.linspace(0.5, 2, 60, dtype=f64)
    wins = bt.fit_bt(i, j, mu, 5, weights=weights).wins
    x = torch.randn(5, dtype=f64)

    def terms(x):
        return bt.loss_and_derivatives(x, wins, 0.3)

    losses = [bt.bt_loss(x, i[[n]], j[[n]], mu[[n]]) for n in range(60)]
    expected = (weights * torch.stack(losses)).sum() + 0.15 * x.square().sum()
    torch.testing.assert_close(terms(x)[0], expected)
    h, eye = 1e-5, torch.eye(5, dtype=f64)
    gradient = torch.stack([(terms(x + h * e)[0] - terms(x - h * e)[0]) / (2 * h) for e in eye])
    hessian = torch.stack([(terms(x + h * e)[1] - terms(x - h * e)[1]) / (2 * h) for e in eye])
    torch.testing.assert_close(terms(x)[1], gradient, rtol=0, atol=1e-7)
    centre = eye - 1 / 5  # the Hessian has a curvature of its own for equal shifts
    torch.testing.assert_close(centre @ terms(x)[2] @ centre, centre @ hessian @ centre,
                               rtol=0, atol=1e-7)


# --- against other solvers ---


@pytest.mark.parametrize("data", ["games", "simulated", "arena"])
@pytest.mark.parametrize("model, l2", [("half", 0.0), ("ridge", 0.5)])
def test_agrees_with_scipy(data, model, l2):
    golden = GOLDEN[data]
    i, j, mu, weights = expand(golden["counts"])
    fit = bt.fit_bt(i, j, mu, golden["num_items"], l2, weights)
    expected = torch.tensor(golden[model]["rewards"], dtype=f64)
    torch.testing.assert_close(fit.rewards, expected, rtol=0, atol=1e-8)
    loss = bt.loss_and_derivatives(fit.rewards, fit.wins, 0.0)[0]
    assert loss.item() == pytest.approx(golden[model]["loss"], rel=1e-12)
    assert gradient_norm(fit, l2) < 1e-8 and fit.iterations < 20


def test_arena_rank_example():
    """22 games: A-B 2:3, A-D 1:4, B-C 5:3, C-D 1:3 -> worths with geometric mean 1."""
    i, j, mu, weights = expand(GOLDEN["games"]["counts"])
    assert weights.sum() == 22
    worths = bt.fit_bt(i, j, mu, 4, weights=weights).rewards.exp().tolist()
    assert [round(w, 3) for w in worths] == [0.640, 1.043, 0.660, 2.270]


@pytest.mark.parametrize("data", ["games", "simulated", "arena"])
def test_standard_errors_agree(data):
    golden = GOLDEN[data]
    i, j, mu, weights = expand(golden["counts"])
    V = bt.covariance(bt.fit_bt(i, j, mu, golden["num_items"], weights=weights))
    expected = torch.tensor(golden["fisher_se"], dtype=f64)
    torch.testing.assert_close(V.diagonal().sqrt(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(V.sum(0), torch.zeros(len(V), dtype=f64), rtol=0, atol=1e-10)


def test_large_fit_equals_small_fit():
    """The same comparisons among 1,500 items. The others only tied with item 0: it moves nobody."""
    i, j, mu = simulate(30, 2000, 8)
    small = bt.fit_bt(i, j, mu, 30)
    rest = torch.arange(30, 1500)
    tied = torch.full((1470,), 0.5, dtype=f64)
    large = bt.fit_bt(torch.cat([i, rest]), torch.cat([j, 0 * rest]), torch.cat([mu, tied]), 1500)
    of_few, of_many = small.rewards - small.rewards[0], large.rewards - large.rewards[0]
    torch.testing.assert_close(of_many[:30], of_few, rtol=0, atol=1e-8)
    torch.testing.assert_close(of_many[30:], torch.zeros(1470, dtype=f64), rtol=0, atol=1e-8)


# --- invariances ---


def test_rows_and_sides_do_not_matter():
    i, j, mu = simulate(12, 900, 3, tie_rate=0.3)
    fit = bt.fit_bt(i, j, mu, 12)
    assert abs(fit.rewards.mean()) < 1e-14
    order = torch.randperm(900)
    again = bt.fit_bt(i[order], j[order], mu[order], 12)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    swap = torch.rand(900) < 0.5
    turned = torch.where(swap, j, i), torch.where(swap, i, j), torch.where(swap, 1 - mu, mu)
    again = bt.fit_bt(*turned, 12)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    label = torch.randperm(12)
    again = bt.fit_bt(label[i], label[j], mu, 12)
    torch.testing.assert_close(fit.rewards, again.rewards[label], rtol=0, atol=1e-11)


def test_shift_invariance_and_minimum():
    i, j, mu = simulate(8, 400, 4, tie_rate=0.1)
    fit = bt.fit_bt(i, j, mu, 8)
    least = bt.bt_loss(fit.rewards, i, j, mu)
    torch.testing.assert_close(bt.bt_loss(fit.rewards + 3.7, i, j, mu), least)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        nudge = 1e-3 * torch.randn(8, generator=generator, dtype=f64)
        assert bt.bt_loss(fit.rewards + nudge - nudge.mean(), i, j, mu) > least


def test_weights_are_repeats_and_soft_labels_are_means():
    i, j, mu = simulate(6, 200, 5)
    repeats = 1 + torch.arange(200) % 3
    fit = bt.fit_bt(i, j, mu, 6, weights=repeats)
    again = bt.fit_bt(*(x.repeat_interleave(repeats) for x in (i, j, mu)), 6)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    three_of_four = torch.cat([mu, mu, mu, 1 - mu])
    votes = bt.fit_bt(i.repeat(4), j.repeat(4), three_of_four, 6)
    soft = bt.fit_bt(i, j, 0.25 + 0.5 * mu, 6)
    torch.testing.assert_close(votes.rewards, soft.rewards, rtol=0, atol=1e-11)


def test_extreme_counts():
    """Odds of 10^9, and a chain of items 1,000 to 1, whose ends are 1,375 nats apart."""
    fit = bt.fit_bt([0, 0], [1, 1], [1, 0], 2, weights=[1e9, 1.0])
    assert (fit.rewards[0] - fit.rewards[1]).item() == pytest.approx(9 * math.log(10), rel=1e-8)
    K = 200
    i, j = torch.arange(K - 1).repeat(2), torch.arange(1, K).repeat(2)
    mu = torch.tensor([1.0, 0.0]).repeat_interleave(K - 1)
    weights = torch.tensor([1000.0, 1.0]).repeat_interleave(K - 1)
    fit = bt.fit_bt(i, j, mu, K, weights=weights)
    expected = torch.full((K - 1,), 1000.0, dtype=f64).log()
    torch.testing.assert_close(fit.rewards[:-1] - fit.rewards[1:], expected, rtol=0, atol=1e-7)


def test_newton_steps_that_are_too_long_are_halved():
    """Odds of 10^8 in a triangle: full steps alone would overshoot."""
    i, j = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 1, 2, 0, 0])
    mu, weights = [1, 0, 1, 1, 0], [1e8, 1.0, 1.0, 1.0, 1e8]
    fit = bt.fit_bt(i, j, mu, 3, 1e-6, weights=weights)
    assert gradient_norm(fit, 1e-6) < 1e-6


# --- intervals ---


def test_coverage():
    """95% intervals over 300 data sets of 8 arms: the share that is covered is within 4 of its
    standard errors, taken from the spread between data sets."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.linspace(-1.5, 1.5, 8, dtype=f64)
    covered = []
    for _ in range(300):
        fit = bt.simulated_fit(rewards, 600, 0.0, generator)
        errors = bt.covariance(fit).diagonal().sqrt()
        covered.append(((fit.rewards - rewards).abs() <= 1.96 * errors).to(f64).mean())
    covered = torch.stack(covered)
    assert abs(covered.mean() - 0.95) < 4 * covered.std() / 300**0.5 < 0.04


# --- winners ---


def test_winners():
    P = torch.tensor([[0.5, 0.8, 0.2], [0.2, 0.5, 0.8], [0.8, 0.2, 0.5]])
    assert bt.condorcet_winner(P) is None and bt.copeland_winners(P) == [0, 1, 2]
    # The diagonal must not be read.
    P = torch.tensor([[0.0, 0.55, 0.55], [0.45, 1.0, 0.95], [0.45, 0.05, 0.0]])
    assert bt.condorcet_winner(P) == 0 and bt.copeland_winners(P) == [0]
    assert bt.borda_winner(P) == 1
    # 1/2 is enough for Condorcet, not for Copeland.
    P = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.6], [0.1, 0.4, 0.5]])
    assert bt.condorcet_winner(P) == 0 and bt.copeland_winners(P) == [0, 1]
    assert bt.borda_winner(P) == 0


def test_winners_agree_under_bradley_terry():
    for seed in range(50):
        r = torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=f64)
        P, best = bt.bt_probability(r[:, None], r), int(r.argmax())
        assert bt.condorcet_winner(P) == bt.borda_winner(P) == best
        assert bt.copeland_winners(P) == [best]


def test_misfit():
    """No misfit where (1) holds exactly. Where it cannot hold, the deviance is the one worked out
    by hand. Under (1) it is chi^2."""
    r = torch.tensor([0.3, 0.1, -0.4], dtype=f64)
    wins = 100 * bt.bt_probability(r[:, None], r).fill_diagonal_(0.0)
    i, j = torch.triu_indices(3, 3, 1)
    fit = bt.fit_bt(i, j, wins[i, j] / 100, 3, weights=[100.0] * 3)
    assert bt.misfit(fit)["deviance"] == pytest.approx(0, abs=1e-9)
    cycle = bt.fit_bt(i, j, [0.8, 0.2, 0.8], 3, weights=[100.0] * 3)
    torch.testing.assert_close(cycle.rewards, torch.zeros(3, dtype=f64), rtol=0, atol=1e-12)
    result = bt.misfit(cycle)
    by_hand = 2 * 300 * (0.8 * math.log(1.6) + 0.2 * math.log(0.4))  # fitted as 0.5
    assert result["deviance"] == pytest.approx(by_hand, rel=1e-6)
    assert result["freedom"] == 1 and result["p"] < 1e-10
    generator, deviances = torch.Generator().manual_seed(0), []
    for _ in range(200):
        deviances.append(bt.misfit(bt.simulated_fit(r, 2000, 0.0, generator))["deviance"])
    # chi^2 with 1 degree of freedom: mean 1, variance 2
    assert abs(torch.tensor(deviances).mean() - 1) < 4 * (2 / 200) ** 0.5
    two = bt.misfit(bt.fit_bt([0, 0], [1, 1], [1, 0], 2))
    assert two["freedom"] == 0 and two["p"] == pytest.approx(1, abs=1e-6)


# --- no finite minimum ---


def test_connected_groups_against_reachability():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        beats = torch.zeros(12, 12, dtype=torch.bool)
        winners, losers = torch.randint(12, (2, 16), generator=generator)
        beats[winners, losers] = True
        reach = (torch.eye(12) + beats.float() > 0).float()
        for _ in range(5):
            reach = ((reach @ reach) > 0).float()
        same = (reach > 0) & (reach.T > 0)
        groups = bt.connected_groups(beats)
        assert sorted(sum(groups, [])) == list(range(12))
        assert [len(group) for group in groups] == sorted(len(group) for group in groups)
        for group in groups:
            assert same[group[0]].nonzero().flatten().tolist() == group


def test_groups_without_finite_minimum_are_named():
    for groups in (r"\[3\].*\[0, 1\]", r"\[2\].*\[0, 1\]", "3 groups"):
        with pytest.raises(UserError, match=groups):
            bt.fit_bt([0, 1, 0], [1, 0, 2], [1, 1, 1], 4)  # 2 only lost, 3 never played
    with pytest.raises(UserError, match=r"\[0\] \[1\]"):
        bt.fit_bt([0], [1], [1], 2)
    fit = bt.fit_bt([0, 1, 0], [1, 0, 2], [1, 1, 1], 4, l2=0.1)
    assert fit.rewards.isfinite().all() and gradient_norm(fit, 0.1) < 1e-8
    assert fit.rewards[3].item() == pytest.approx(0, abs=1e-12)
    assert bt.fit_bt([0], [1], [0.5], 2).rewards.tolist() == [0, 0]  # a tie is an edge each way


# --- command line ---


def test_run(tmp_path, capsys):
    bt.main(bt.Args(output_dir=str(tmp_path), simulations=60, comparisons=2000))
    results = json.loads((tmp_path / "results.json").read_text())
    assert -0.65 < results["slope"] < -0.4 and 0.9 < results["coverage"] < 0.99
    assert results["misfit_p"] > 1e-4
    out = capsys.readouterr().out
    lines = {name: line.removeprefix("  " + name).split() for line in out.splitlines()
             for name in ("arms", "rock, paper, scissors", "Borda is not Condorcet")
             if line.startswith("  " + name)}
    condorcet, copeland, borda, fitted, *_ = lines["arms"]
    assert condorcet == borda == fitted and copeland == f"[{borda}]"  # winners agree
    assert float(lines["rock, paper, scissors"][-3]) > 50
    assert float(lines["Borda is not Condorcet"][-3]) > 30
    assert "Transitivity" in out
    assert json.loads((tmp_path / "args.json").read_text())["simulations"] == 60


@pytest.mark.parametrize("flags, message", [
    (["--arms", "1"], "--arms 1"),
    (["--comparisons", "0"], "--comparisons 0"),
    (["--comparisons", "3"], "no finite rewards"),
    (["--l2", "-1"], "--l2 -1"),
    (["--l2", "nan"], "--l2 nan"),
])
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bt_bandit.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(bt.main, bt.Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error
    assert not list(tmp_path.rglob("results.json"))


def test_fit_refuses_bad_tensors():
    cases = [
        (([0, 1], [1, 1], [1, 1], 2), "row 2: an item is compared with itself"),
        (([0], [2], [1], 2), "row 1: an item is not in"),
        (([0], [-1], [1], 2), "row 1: an item is not in"),
        (([0], [1], [1.1], 2), "row 1: mu"),
        (([0], [1], [float("nan")], 2), "row 1: mu"),
        (([], [], [], 2), "there must be comparisons"),
        (([0, 1], [1, 0], [1, 1, 1], 2), "one of each"),
        (([0, 1], [1], [1, 1], 2), "one of each"),
        (([0, 1, 0], [1, 0], [1, 1], 2), "one of each"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            bt.fit_bt(*arguments)
    with pytest.raises(UserError, match="row 2: the weight"):
        bt.fit_bt([0, 1], [1, 0], [1, 1], 2, weights=[1.0, float("nan")])


def test_inputs_are_moved_to_the_device_of_i(monkeypatch):
    """`meta` stands for a GPU: what reaches check_comparisons must be there."""
    devices = []

    def note(*tensors_and_number):
        devices.extend(x.device.type for x in tensors_and_number[:4])
        raise UserError("enough")

    monkeypatch.setattr(bt, "check_comparisons", note)
    i = torch.zeros(3, dtype=torch.long, device="meta")
    with pytest.raises(UserError, match="enough"):
        bt.fit_bt(i, torch.ones(3, dtype=torch.long), torch.ones(3), 2, weights=torch.ones(3))
    assert devices == ["meta"] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu():
    i, j, mu = simulate(40, 4000, 7)
    cpu, gpu = bt.fit_bt(i, j, mu, 40), bt.fit_bt(i.cuda(), j, mu, 40)
    assert gpu.rewards.is_cuda
    torch.testing.assert_close(cpu.rewards, gpu.rewards.cpu(), rtol=0, atol=1e-10)
