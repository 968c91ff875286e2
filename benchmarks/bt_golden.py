"""Golden numbers for tests/test_bt_*.py, by scipy and numpy alone: nothing of bt_*.py is used.

    python benchmarks/bt_golden.py --battles llmfao_battles.jsonl        # -> tests/golden/bt.json

The likelihoods are written here by the outcome and differentiated by complex steps, which are exact to rounding; the
equations gradient = 0 are solved by scipy.optimize.root, from where scipy.optimize.minimize ends. The battles are
LLMFAO's (Dmitry Ustalov, https://github.com/dustalov/llmfao, CC BY 4.0): 8,931 human votes on 59 models; the golden
file keeps their counts by pair, [a, b, votes for a, ties, votes for b].
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.optimize import minimize, root

# Wikipedia's worked example, arena-rank's first test
GAMES = [[0, 1, 2, 0, 3], [0, 3, 1, 0, 4], [1, 2, 5, 0, 3], [2, 3, 1, 0, 3]]
SOURCE = "benchmarks/bt_golden.py; arena: LLMFAO, Dmitry Ustalov, https://github.com/dustalov/llmfao, CC BY 4.0"


def probabilities(pi_a, pi_b, tie, model):
    """By the textbooks' worths pi = exp(r): Bradley-Terry, Davidson (1970), Rao & Kupper (1967)."""
    if model == "half":
        return pi_a / (pi_a + pi_b), None, pi_b / (pi_a + pi_b)
    if model == "davidson":
        total = pi_a + pi_b + np.exp(tie) * np.sqrt(pi_a * pi_b)
        return pi_a / total, np.exp(tie) * np.sqrt(pi_a * pi_b) / total, pi_b / total
    k = np.exp(tie)
    win, loss = pi_a / (pi_a + k * pi_b), pi_b / (pi_b + k * pi_a)
    return win, 1 - win - loss, loss


def minus_log_likelihood(x, counts, num_items, model, l2):
    """x: the rewards of items 1 ... K-1 against item 0 (with a ridge: all K), then the tie parameter."""
    rewards = x[:num_items] if l2 else np.concatenate([[0 * x[0]], x[:num_items - 1]])
    a, b, wins, ties, losses = counts.T
    p_win, p_tie, p_loss = probabilities(np.exp(rewards[a]), np.exp(rewards[b]), x[-1], model)
    if model == "half":
        value = -((wins + ties / 2) * np.log(p_win) + (losses + ties / 2) * np.log(p_loss)).sum()
    else:
        value = -(wins * np.log(p_win) + losses * np.log(p_loss)).sum() - (ties * np.log(p_tie)).sum()
    return value + l2 / 2 * (rewards**2).sum()


def solve(counts, num_items, model="half", l2=0.0):
    counts = np.array(counts)
    size = num_items - (not l2) + (model != "half")

    def loss(x):
        return minus_log_likelihood(x, counts, num_items, model, l2)

    def gradient(x):
        return np.array([loss(x + 1e-30j * unit).imag / 1e-30 for unit in np.eye(size)])

    x = np.zeros(size)
    if model != "half":
        x[-1] = 0.5
    x = minimize(loss, x, jac=gradient, method="BFGS", options={"gtol": 1e-6}).x
    x = root(gradient, x, method="hybr", tol=1e-14).x
    assert np.abs(gradient(x)).max() < 1e-9, np.abs(gradient(x)).max()
    rewards = x[:num_items] if l2 else np.concatenate([[0.0], x[:num_items - 1]])
    return {"rewards": (rewards - rewards.mean()).tolist(), "tie": float(x[-1]) if model != "half" else 0.0,
            "loss": float(loss(x) - l2 / 2 * (rewards**2).sum())}


def sandwich(counts, rewards):
    """Standard errors of the centred rewards from votes one by one, by pseudo-inverses of outer products."""
    rewards, K = np.array(rewards), len(rewards)
    A, B = np.zeros((K, K)), np.zeros((K, K))
    for a, b, wins, ties, losses in counts:
        x = np.zeros(K)
        x[a], x[b] = 1, -1
        p = 1 / (1 + np.exp(rewards[b] - rewards[a]))
        A += (wins + ties + losses) * p * (1 - p) * np.outer(x, x)
        B += (wins * (1 - p)**2 + ties * (0.5 - p)**2 + losses * p**2) * np.outer(x, x)
    bread = np.linalg.pinv(A)
    return np.sqrt(np.diag(bread)).tolist(), np.sqrt(np.diag(bread @ B @ bread)).tolist()


def count(battles):
    names = sorted({row[side] for row in battles for side in ("model_a", "model_b")})
    counts = {}
    for row in battles:
        a, b = names.index(row["model_a"]), names.index(row["model_b"])
        outcome = {"model_a": 0, "tie": 1, "tie (bothbad)": 1, "model_b": 2}[row["winner"]]
        if a > b:
            a, b, outcome = b, a, 2 - outcome
        counts.setdefault((a, b), [0, 0, 0])[outcome] += 1
    return names, [[a, b, *c] for (a, b), c in sorted(counts.items())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--battles", required=True)
    names, arena = count([json.loads(line) for line in open(parser.parse_args().battles)])
    rng = np.random.default_rng(0)
    true, simulated = rng.normal(size=20), []
    for a in range(20):
        for b in range(a + 1, 20):
            if rng.random() < 0.5:
                p = probabilities(np.exp(true[a]), np.exp(true[b]), 0.3, "davidson")
                simulated.append([a, b, *rng.multinomial(rng.integers(1, 30), p).tolist()])
    golden = {"source": SOURCE}
    for name, counts, K in (("games", GAMES, 4), ("simulated", simulated, 20), ("arena", arena, len(names))):
        golden[name] = {"num_items": K, "counts": counts, "half": solve(counts, K), "ridge": solve(counts, K, l2=0.5)}
        if name != "games":
            golden[name] |= {model: solve(counts, K, model) for model in ("davidson", "rao-kupper")}
        golden[name]["fisher_se"], golden[name]["sandwich_se"] = sandwich(counts, golden[name]["half"]["rewards"])
    golden["arena"]["names"] = names
    path = Path(__file__).resolve().parents[1] / "tests" / "golden" / "bt.json"
    text = json.dumps(golden, separators=(",", ":"))
    path.write_text(text.replace('"arena"', '\n"arena"').replace('"simulated"', '\n"simulated"') + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes")
