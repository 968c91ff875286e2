"""bt_arena.py against independent solvers (golden/bt.json, made by benchmarks/bt_golden.py with
scipy) and finite differences; the files it reads, leaves out and writes."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch

import bt_arena as bt
from harness import UserError, run_script

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "bt.json").read_text())
MODELS = ["half", "davidson", "rao-kupper"]
f64 = torch.float64


def battles(i, j, mu, K, weights=None):
    i, j, mu = torch.as_tensor(i), torch.as_tensor(j), torch.as_tensor(mu, dtype=f64)
    weights = torch.ones_like(mu) if weights is None else torch.as_tensor(weights, dtype=f64)
    ties = weights * (mu == 0.5)
    wins = (weights - ties) * mu
    names = [f"item{k:02}" for k in range(K)]
    return bt.Battles("--dataset x.csv", names, i, j, wins, ties, weights - ties - wins)


def golden_battles(data):
    """One row per comparison: the sandwich depends on what a row is."""
    counts = torch.tensor(GOLDEN[data]["counts"])
    times = counts[:, 2:].T.flatten()
    i = counts[:, 0].repeat(3).repeat_interleave(times)
    j = counts[:, 1].repeat(3).repeat_interleave(times)
    mu = torch.tensor([1.0, 0.5, 0.0]).repeat_interleave(len(counts)).repeat_interleave(times)
    return battles(i, j, mu, GOLDEN[data]["num_items"])


def simulated(K, N, seed, tie_rate=0.0):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(K, generator=generator, dtype=f64)
    i = torch.randint(K, (N,), generator=generator)
    j = (i + torch.randint(1, K, (N,), generator=generator)) % K
    p = torch.sigmoid(rewards[i] - rewards[j])
    mu = (torch.rand(N, generator=generator, dtype=f64) < p).to(f64)
    mu[torch.rand(N, generator=generator) < tie_rate] = 0.5
    return i, j, mu


def minimised(fit, data, model, l2=0.0):
    """-> value, gradient, Hessian at the fit."""
    wins = data.table(data.wins) + data.table(data.losses).T
    x = torch.cat([fit.rewards, fit.t.view(1)])
    return bt.objective(x, wins, data.table(data.ties), model, l2)


def fisher(fit):
    inverse = torch.linalg.inv(fit.hessian)[:-1, :-1]
    return inverse - inverse.mean()


# --- likelihood ---


@pytest.mark.parametrize("model, t", [("half", 0.0), ("davidson", 0.4), ("rao-kupper", 0.7)])
def test_derivatives(model, t):
    """Gradient and Hessian against finite differences, over (r, t) together; the value against the
    outcomes' probabilities, which must sum to 1."""
    i, j, mu = simulated(5, 60, 0, tie_rate=0.3)
    weights = torch.linspace(0.5, 2, 60, dtype=f64)
    data = battles(i, j, mu, 5, weights)
    wins, ties = data.table(data.wins) + data.table(data.losses).T, data.table(data.ties)
    x = torch.cat([torch.randn(5, dtype=f64), torch.tensor([t], dtype=f64)])

    def terms(x):
        return bt.objective(x, wins, ties, model, 0.3)

    d = x[data.i] - x[data.j]
    logs = bt.log_probabilities(d, x[5].expand_as(d), model)
    if model != "half":
        torch.testing.assert_close(sum(log.exp() for log in logs), torch.ones(60, dtype=f64))
    ridge = 0.15 * x[:5].square().sum()
    torch.testing.assert_close(terms(x)[0], bt.losses(logs, data).sum() + ridge)
    if model == "half":
        p = torch.sigmoid(d)
        expected = -(weights * (mu * p.log() + (1 - mu) * (1 - p).log())).sum()
        torch.testing.assert_close(terms(x)[0], expected + ridge)
    h, eye = 1e-5, torch.eye(6, dtype=f64)
    gradient = torch.stack([(terms(x + h * e)[0] - terms(x - h * e)[0]) / (2 * h) for e in eye])
    hessian = torch.stack([(terms(x + h * e)[1] - terms(x - h * e)[1]) / (2 * h) for e in eye])
    if model == "half":
        hessian[5, 5] = 1  # no t: an inert row
    torch.testing.assert_close(terms(x)[1], gradient, rtol=0, atol=1e-7)
    centre = eye.clone()
    centre[:5, :5] -= 1 / 5  # the Hessian has a curvature of its own for equal shifts
    torch.testing.assert_close(centre @ terms(x)[2] @ centre, centre @ hessian @ centre,
                               rtol=0, atol=1e-7)


CASES = []
for data in ("games", "simulated", "arena"):
    for model in ("half", "ridge", "davidson", "rao-kupper"):
        if model in GOLDEN[data]:  # the games have no ties
            CASES.append((data, model))


@pytest.mark.parametrize("data, model", CASES)
def test_agrees_with_scipy(data, model):
    golden = GOLDEN[data][model]
    l2, ties = (0.5, "half") if model == "ridge" else (0.0, model)
    rows = golden_battles(data)
    fit = bt.fit_battles(rows, ties, l2)
    expected = torch.tensor(golden["rewards"], dtype=f64)
    torch.testing.assert_close(fit.rewards, expected, rtol=0, atol=1e-8)
    assert fit.t.item() == pytest.approx(golden["tie"], abs=1e-8)
    ridge = l2 / 2 * fit.rewards.square().sum().item()
    assert fit.loss - ridge == pytest.approx(golden["loss"], rel=1e-12)
    assert minimised(fit, rows, ties, l2)[1].norm() < 1e-8


@pytest.mark.parametrize("data", ["games", "simulated", "arena"])
@pytest.mark.parametrize("robust, name", [(False, "fisher_se"), (True, "sandwich_se")])
def test_standard_errors_agree(data, robust, name):
    rows = golden_battles(data)
    fit = bt.fit_battles(rows, "half")
    V = bt.covariance(fit, rows, "half") if robust else fisher(fit)
    expected = torch.tensor(GOLDEN[data][name], dtype=f64)
    torch.testing.assert_close(V.diagonal().sqrt(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(V.sum(0), torch.zeros(len(V), dtype=f64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", MODELS)
def test_rows_and_sides_do_not_matter(model):
    i, j, mu = simulated(12, 900, 3, tie_rate=0.3)
    data = battles(i, j, mu, 12)
    fit = bt.fit_battles(data, model)
    assert abs(fit.rewards.mean()) < 1e-14
    again = bt.fit_battles(data.rows(torch.randperm(900)), model)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    swap = torch.rand(900) < 0.5
    turned = torch.where(swap, j, i), torch.where(swap, i, j), torch.where(swap, 1 - mu, mu)
    again = bt.fit_battles(battles(*turned, 12), model)
    torch.testing.assert_close(fit.rewards, again.rewards, rtol=0, atol=1e-11)
    assert fit.t.item() == pytest.approx(again.t.item(), abs=1e-11)
    label = torch.randperm(12)
    again = bt.fit_battles(battles(label[i], label[j], mu, 12), model)
    torch.testing.assert_close(fit.rewards, again.rewards[label], rtol=0, atol=1e-11)


def test_extreme_counts():
    """Odds of 10^9, and a chain of items 1,000 to 1, whose ends are 1,375 nats apart."""
    fit = bt.fit_battles(battles([0, 0], [1, 1], [1, 0], 2, [1e9, 1.0]), "half")
    assert (fit.rewards[0] - fit.rewards[1]).item() == pytest.approx(9 * math.log(10), rel=1e-8)
    K = 200
    i, j = torch.arange(K - 1).repeat(2), torch.arange(1, K).repeat(2)
    mu = torch.tensor([1.0, 0.0]).repeat_interleave(K - 1)
    weights = torch.tensor([1000.0, 1.0]).repeat_interleave(K - 1)
    fit = bt.fit_battles(battles(i, j, mu, K, weights), "half")
    expected = torch.full((K - 1,), 1000.0, dtype=f64).log()
    torch.testing.assert_close(fit.rewards[:-1] - fit.rewards[1:], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("model", MODELS)
def test_sandwich_by_rows(model):
    """A^-1 B A^-1 from the rows' own scores in (r, t), by automatic differentiation of each."""
    i, j, mu = simulated(6, 200, 7, tie_rate=0.3)
    weights = torch.linspace(0.5, 2, 200, dtype=f64)
    data = battles(i, j, mu, 6, weights)
    fit = bt.fit_battles(data, model)
    x = torch.cat([fit.rewards, fit.t.view(1)])

    def losses(x):
        return bt.losses(bt.log_probabilities(x[i] - x[j], x[6], model), data)

    scores = torch.autograd.functional.jacobian(losses, x)  # [N, K+1]
    A = torch.autograd.functional.hessian(lambda x: losses(x).sum(), x)
    inverse = torch.linalg.pinv(A)  # of mean 0 in the rewards
    expected = (inverse @ scores.T @ scores @ inverse)[:6, :6]
    torch.testing.assert_close(bt.covariance(fit, data, model), expected, rtol=0, atol=1e-9)


def test_newton_steps_that_are_too_long_are_halved():
    """Odds of 10^8 in a triangle; and a rare tie, where full steps would make t negative."""
    i, j, mu = [0, 0, 1, 2, 2], [1, 1, 2, 0, 0], [1, 0, 1, 1, 0]
    data = battles(i, j, mu, 3, [1e8, 1.0, 1.0, 1.0, 1e8])
    assert minimised(bt.fit_battles(data, "half", 1e-6), data, "half", 1e-6)[1].norm() < 1e-6
    data = battles([0, 0, 0], [1, 1, 1], [1, 0, 0.5], 2, [1e4, 1e4, 1.0])
    fit = bt.fit_battles(data, "rao-kupper")
    assert math.tanh(fit.t.item() / 2) == pytest.approx(1 / 20001, rel=1e-6)  # P(tie), d = 0


def test_sandwich_coverage():
    """95% intervals over 200 data sets of 8 items: the share that is covered is within 4 of its
    standard errors, taken from the spread between data sets."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.linspace(-1.5, 1.5, 8, dtype=f64)
    covered = []
    for _ in range(200):
        i = torch.randint(8, (1200,), generator=generator)
        j = (i + torch.randint(1, 8, (1200,), generator=generator)) % 8
        p = torch.sigmoid(rewards[i] - rewards[j])
        mu = (torch.rand(1200, generator=generator, dtype=f64) < p).to(f64)
        data = battles(i, j, mu, 8)
        fit = bt.fit_battles(data, "half")
        errors = bt.covariance(fit, data, "half").diagonal().sqrt()
        covered.append(((fit.rewards - rewards).abs() <= 1.96 * errors).to(f64).mean())
    covered = torch.stack(covered)
    assert abs(covered.mean() - 0.95) < 4 * covered.std() / 200**0.5 < 0.04


def test_sandwich_differs_where_the_model_is_wrong():
    """A tie every time: no noise is left, and Fisher does not see it."""
    i, j, mu = simulated(5, 500, 6)
    data = battles(i, j, torch.full_like(mu, 0.5), 5)
    fit = bt.fit_battles(data, "half")
    sandwich = bt.covariance(fit, data, "half")
    assert sandwich.abs().max() < 1e-20 < 1e-4 < fisher(fit).diagonal().min()


# --- no finite minimum ---


def test_connected_groups_against_reachability():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        i = torch.randint(12, (16,), generator=generator)
        j = (i + torch.randint(1, 12, (16,), generator=generator)) % 12
        mu = torch.randint(3, (16,), generator=generator) / 2
        reach = torch.eye(12)
        reach[i[mu > 0], j[mu > 0]] = 1
        reach[j[mu < 1], i[mu < 1]] = 1
        for _ in range(5):
            reach = ((reach @ reach) > 0).float()
        same = (reach > 0) & (reach.T > 0)
        data = battles(i, j, mu, 12)
        groups = bt.connected_groups(data)
        assert sorted(sum(groups, [])) == data.names
        assert [len(group) for group in groups] == sorted(len(group) for group in groups)
        for group in groups:
            first = data.names.index(group[0])
            assert [data.names[k] for k in same[first].nonzero().flatten()] == group


@pytest.mark.parametrize("model", ["davidson", "rao-kupper"])
def test_tie_parameters_without_finite_minimum(model):
    cases = [
        ([1, 0], "all comparisons are ties, or none is"),
        ([0.5, 0.5], "all comparisons are ties, or none is"),
        ([1, 0.5], "for want of wins in both directions"),
    ]
    for mu, what in cases:
        with pytest.raises(UserError, match=what):
            bt.fit_battles(battles([0, 0], [1, 1], mu, 2), model)
    data = battles([0, 0], [1, 1], [1, 0.5], 2)
    assert minimised(bt.fit_battles(data, model, 0.1), data, model, 0.1)[1].norm() < 1e-8
    # 0 > 1 > 2 = 0: finite, without wins both ways
    data = battles([0, 1, 0], [1, 2, 2], [1, 1, 0.5], 3)
    assert minimised(bt.fit_battles(data, model), data, model)[1].norm() < 1e-8


# --- files ---


def call(out, dataset, **flags):
    bt.main(bt.Args(dataset=str(dataset), output_dir=str(out), **flags))
    return json.loads((out / "results.json").read_text())


def write_battles(path, rows, columns=("model_a", "model_b", "winner")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def read_ratings(out):
    return {row["item"]: row for row in csv.DictReader(open(out / "ratings.csv"))}


@pytest.mark.parametrize("ties, suffix", [(model, ".csv") for model in MODELS]
                         + [("half", ".jsonl"), ("half", ".parquet")])
def test_run(tmp_path, capsys, ties, suffix):
    arena, path = GOLDEN["arena"], tmp_path / f"battles{suffix}"
    rows = []
    for a, b, *votes in arena["counts"]:
        for word, times in zip(("model_a", "tie (bothbad)", "model_b"), votes):
            rows += [(arena["names"][a], arena["names"][b], word)] * times
    frame = pandas.DataFrame(rows, columns=["model_a", "model_b", "winner"])
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    flags = {"bootstrap": 20, "anchor": 1200.0, "anchor_item": "GPT 4", "scale": 200.0}
    out = tmp_path / "out"
    results = call(out, path, ties=ties, **flags)
    ratings = read_ratings(out)
    golden = torch.tensor(arena[ties]["rewards"], dtype=f64)
    anchor = golden[arena["names"].index("GPT 4")]
    expected = 1200 + 200 / math.log(10) * (golden - anchor)
    got = torch.tensor([float(ratings[name]["rating"]) for name in arena["names"]], dtype=f64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    top, other = ratings["GPT 4"], ratings["command"]
    assert top["low"] == top["high"] == top["bootstrap_low"] == "1200.0" and top["rank"] == "1"
    assert float(other["low"]) < float(other["rating"]) < float(other["high"])
    assert float(other["bootstrap_low"]) < float(other["rating"]) < float(other["bootstrap_high"])
    assert int(other["rank_low"]) <= int(other["rank"]) <= int(other["rank_high"])
    assert results["log_loss"] < results["constant_log_loss"]
    assert results["accuracy"] > results["constant_accuracy"]
    matrix = list(csv.reader(open(out / "win_matrix.csv")))
    assert matrix[0][0] == "item" and matrix[0][1:] == list(ratings)
    assert float(matrix[1][2]) + float(matrix[2][1]) == pytest.approx(1)
    assert float(matrix[1][2]) > 0.5 and matrix[1][0] == "GPT 4"


def test_soft_comparisons_with_weights(tmp_path, capsys):
    rows = [["b", "a", 0.25, 4], ["a", "c", 0.5, 2], ["c", "b", 0.5, 2]] * 7
    path = write_battles(tmp_path / "soft.csv", rows, ("i", "j", "mu", "weight"))
    call(tmp_path / "out", path, bootstrap=0)
    ratings = read_ratings(tmp_path / "out")
    assert "bootstrap_low" not in ratings["a"]
    assert float(ratings["a"]["comparisons"]) == 42  # weighted
    data = battles([1, 0, 2], [0, 2, 1], [0.25, 0.5, 0.5], 3, [28.0, 14.0, 14.0])
    expected = 1000 + 400 / math.log(10) * bt.fit_battles(data, "half").rewards
    rated = torch.tensor([float(ratings[name]["rating"]) for name in "abc"], dtype=f64)
    torch.testing.assert_close(rated, expected)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_names_are_text(tmp_path, capsys, suffix):
    """1.10 and 1.1, 007 and 7, NA and nan are names, not numbers and not missing."""
    names = ["1.10", "1.1", "007", "7", "NA", "nan", "1e3"]
    rows = []
    for a in names:
        for b in names:
            if a != b:
                rows += [[a, b, "model_a"]]
    path = tmp_path / f"battles{suffix}"
    frame = pandas.DataFrame(rows, columns=["model_a", "model_b", "winner"])
    if suffix == ".csv":
        write_battles(path, rows)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    call(tmp_path / "out", path, bootstrap=0, anchor_item="1.10")
    assert sorted(read_ratings(tmp_path / "out")) == sorted(names)


def test_numbers_as_names(tmp_path, capsys):
    """A JSON file may hold numbers: whole ones keep no .0, though another row holds a text."""
    rows = [{"i": 7, "j": "x", "mu": 1}, {"i": "x", "j": 7, "mu": 1}]
    path = tmp_path / "battles.json"
    path.write_text(json.dumps(rows * 10))
    call(tmp_path / "out", path, bootstrap=0)
    assert sorted(read_ratings(tmp_path / "out")) == ["7", "x"]


def both_ways(a, b, times=1):
    return [[a, b, "model_a"], [b, a, "model_a"]] * times


def test_min_comparisons_is_repeated_until_stable(tmp_path, capsys):
    """d has 3 comparisons. Without it c has 4 left of 6, and goes too at 5."""
    rows = both_ways("a", "b", 10) + both_ways("c", "a", 2) + [["c", "d", "model_a"]] * 2
    path = write_battles(tmp_path / "battles.csv", rows + [["d", "a", "tie"]])
    results = call(tmp_path / "out", path, bootstrap=0, min_comparisons=5)
    assert results["items"] == 2 and results["comparisons"] == 20
    assert sorted(read_ratings(tmp_path / "out")) == ["a", "b"]
    out = capsys.readouterr().out
    assert "1 items with fewer than 5 comparisons: d" in out
    assert "1 items with fewer than 5 comparisons: c" in out
    results = call(tmp_path / "out", path, bootstrap=0, min_comparisons=4)
    assert sorted(read_ratings(tmp_path / "out")) == ["a", "b", "c"]  # 4 is not fewer than 4
    with pytest.raises(UserError, match="--min-comparisons"):
        call(tmp_path / "out", path, min_comparisons=100)


def test_largest_group(tmp_path, capsys):
    """x only won, y only lost, and p, q met nobody else: ratings are those of a, b, c alone."""
    core = both_ways("a", "b", 5) + both_ways("b", "c", 4) + [["a", "c", "model_a"]] * 3
    rest = [["x", "a", "model_a"], ["b", "y", "model_a"]] + both_ways("p", "q", 2)
    path = write_battles(tmp_path / "all.csv", core + rest)
    with pytest.raises(UserError, match="--largest-group"):
        call(tmp_path / "out", path)
    results = call(tmp_path / "out", path, bootstrap=5, largest_group=True)
    assert results["items"] == 3 and results["comparisons"] == len(core)
    assert "4 items outside of the largest group: p, q, x, y" in capsys.readouterr().out
    call(tmp_path / "alone", write_battles(tmp_path / "core.csv", core), bootstrap=5)
    assert read_ratings(tmp_path / "out") == read_ratings(tmp_path / "alone")


def test_largest_group_and_min_comparisons_together(tmp_path, capsys):
    """c is in the largest group, but its comparisons with x and y do not count there."""
    rows = both_ways("a", "b", 5) + both_ways("b", "c") + [["c", "x", "model_a"]] * 4
    path = write_battles(tmp_path / "battles.csv", rows)
    call(tmp_path / "out", path, bootstrap=0, largest_group=True, min_comparisons=3)
    assert sorted(read_ratings(tmp_path / "out")) == ["a", "b"]


def test_no_group_is_left(tmp_path):
    path = write_battles(tmp_path / "chain.csv", [["a", "b", "model_a"], ["b", "c", "model_a"]])
    with pytest.raises(UserError, match="outside of the largest group.*--l2"):
        call(tmp_path / "out", path, largest_group=True)


def test_held_out_check_survives_an_item_with_one_win(tmp_path, capsys):
    rows = [["a", "b", w] for w in ("model_a", "model_b")] * 30 + both_ways("a", "c")
    path = write_battles(tmp_path / "rare.csv", rows)
    for seed in range(6):
        results = call(tmp_path / "out", path, bootstrap=20, seed=seed)
        assert results["held_out"] == 6 and results["log_loss"] < 2


def test_ties_only(tmp_path, capsys):
    """Accuracy without ties is not known then, and JSON has no NaN."""
    rows = [["a", "b", "tie"], ["b", "c", "both_bad"]] * 10
    call(tmp_path / "out", write_battles(tmp_path / "ties.csv", rows), bootstrap=0)
    text = (tmp_path / "out" / "results.json").read_text()
    assert "NaN" not in text and json.loads(text)["accuracy"] is None


# --- mistakes ---

GOOD = [["a", "b", "model_a"], ["b", "a", "model_a"]]
SOFT = ("i", "j", "mu")
WEIGHTED = ("model_a", "model_b", "winner", "weight")
BAD_FILES = {
    "itself": (GOOD + [["a", "a", "tie"]], None, "row 3", "compared with itself"),
    "word": (GOOD + [["a", "b", "draw"]], None, "row 3", "'draw'): winner is none of model_a"),
    "no winner": (GOOD + [["a", "b", ""]], None, "row 3", "winner is none of"),
    "no name": (GOOD + [["", "b", "tie"]], None, "row 3", "an item has no name"),
    "blank first name": (GOOD + [[" ", "a", "tie"]], None, "row 3", "an item has no name"),
    "blank name": (GOOD + [["a", "  ", "tie"]], None, "row 3", "an item has no name"),
    "mu": ([["a", "b", 0.5], ["a", "b", 1.5]], SOFT, "row 2", "mu is not a number from 0 to 1"),
    "mu word": ([["a", "b", "0.5"], ["a", "b", "x"]], SOFT, "row 2", "mu is not a number"),
    "nan mu": ([["a", "b", 0.5], ["a", "b", "nan"]], SOFT, "row 2", "mu is not a number"),
    "nan weight": ([[*GOOD[0], "1"], [*GOOD[1], "nan"]], WEIGHTED, "row 2", "weight is not"),
    "no weight": ([[*GOOD[0], "1"], [*GOOD[1], ""]], WEIGHTED, "row 2", "weight is not"),
    "negative weight": ([[*GOOD[0], "1"], [*GOOD[1], "-2"]], WEIGHTED, "row 2", "weight is not"),
    "columns": (GOOD, ("left", "right", "winner"), "", "no column 'model_a'"),
    "one item": ([["a", "a", "tie"]], None, "row 1", "compared with itself"),
    "no rows": ([], None, "", "bad.csv"),
    "groups": (GOOD + [["a", "c", "model_a"]], None, "2 groups", "['c'] ['a', 'b']"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    rows, columns, *messages = BAD_FILES[name]
    path = write_battles(tmp_path / "bad.csv", rows, columns or ("model_a", "model_b", "winner"))
    with pytest.raises(UserError) as error:
        call(tmp_path / "out", path)
    text = str(error.value)
    assert all(message in text for message in messages), text
    assert "\n" not in text.strip() and f"--dataset {path}" in text
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "bad.csv"], "'draw'): winner is none of"),
    (["--dataset", "missing.csv"], "--dataset missing.csv: no such file"),
    (["--dataset", "empty.csv"], "empty.csv"),
    (["--dataset", "good.csv", "--anchor-item", "z"], "--anchor-item z: not in"),
    (["--dataset", "good.csv", "--ties", "davidson"], "all comparisons are ties, or none is"),
    (["--dataset", "soft.csv", "--ties", "davidson"], "mu is not 0, 0.5 or 1"),
    (["--dataset", "good.csv", "--scale", "0"], "--scale"),
    (["--dataset", "good.csv", "--anchor", "inf"], "--anchor"),
    (["--dataset", "good.csv", "--bootstrap", "-1"], "--bootstrap"),
    (["--dataset", "good.csv", "--l2", "-1"], "--l2 -1"),
    (["--dataset", "good.csv", "--l2", "nan"], "--l2 nan"),
])
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, capsys, flags, message):
    write_battles(tmp_path / "bad.csv", [GOOD[0], ["a", "b", "draw"]])
    write_battles(tmp_path / "good.csv", GOOD)
    write_battles(tmp_path / "soft.csv", [["a", "b", 0.7], ["b", "a", 1]], SOFT)
    (tmp_path / "empty.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bt_arena.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(bt.main, bt.Args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and len(error.strip().splitlines()) == 1, error


def test_the_script_as_a_process(tmp_path):
    """Alone with harness.py and common.py; a bad file gives status 2 and one line."""
    for name in ("bt_arena.py", "harness.py", "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    write_battles(tmp_path / "bad.csv", [GOOD[0], ["a", "b", "draw"]])
    write_battles(tmp_path / "good.csv", GOOD * 20)

    def run(name):
        command = [sys.executable, "bt_arena.py", "--dataset", name]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    good, bad = run("good.csv"), run("bad.csv")
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "runs" / "bt_arena" / "ratings.csv").exists()
    assert bad.returncode == 2 and len(bad.stderr.strip().splitlines()) == 1, bad.stderr
    assert "row 2" in bad.stderr
