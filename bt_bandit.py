"""Bradley-Terry on k arms: rewards from comparisons, their intervals, the best arm.

Arms i have rewards r_i (nats). A judge prefers i to j with probability (Bradley & Terry 1952)

    p_ij = exp(r_i) / (exp(r_i) + exp(r_j)) = sigma(r_i - r_j)                      (1)

Comparisons (i, j, mu) have mu = 1 where i was preferred, 0 where j was, 1/2 where neither was.
With weights w, maximum likelihood minimises

    L(r) = - sum_n w_n [ mu_n log p_ij + (1 - mu_n) log p_ji ]   ( + l2/2 |r|^2 )   (2)

Only differences count, so the rewards are given with mean 0. The minimum is finite if and only
if every arm can be reached from every other along edges winner -> loser (Ford 1957). The rewards
have covariance A^-1, about, where A is the Hessian of (2): the Fisher information.

    python bt_bandit.py --arms 10 --comparisons 5000        # the defaults: a few seconds

Expect 95% intervals that cover the true rewards 95% of the time, an error that falls as N^-1/2,
and three definitions of the best arm that agree, as they must under (1). They disagree for two
sets of three items that (1) cannot describe, which the likelihood-ratio test finds.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import UserError, print_table, run_script, write_json


@dataclass
class Args:
    arms: int = 10
    """number of arms"""
    comparisons: int = 5000
    """simulated comparisons, each by two judges"""
    simulations: int = 500
    """simulated data sets that the coverage of the intervals is measured on"""
    l2: float = 0.0
    """ridge on the rewards: l2 in l2/2 |r|^2"""
    output_dir: str = "runs/bt_bandit"
    """directory for args.json and results.json"""
    seed: int = 0
    """seed of the true rewards and of all simulated comparisons"""


# --- the model ---


def bt_probability(r_i: Tensor, r_j: Tensor) -> Tensor:
    """Equation (1): rewards (nats) of shapes that broadcast -> P(i is preferred to j)."""
    return torch.sigmoid(r_i - r_j)


def bt_loss(rewards: Tensor, i: Tensor, j: Tensor, mu: Tensor) -> Tensor:
    """Equation (2), w = 1: rewards [K], items i, j [N], mu [N] in [0, 1] -> the sum, nats."""
    margins = rewards[i] - rewards[j]
    return -(mu * F.logsigmoid(margins) + (1 - mu) * F.logsigmoid(-margins)).sum()


def transitive_probability(p_ij, p_jk):
    """Under (1) odds multiply, p_ik / p_ki = p_ij / p_ji * p_jk / p_kj -> p_ik."""
    return p_ij * p_jk / (p_ij * p_jk + (1 - p_ij) * (1 - p_jk))


def condorcet_winner(P: Tensor) -> int | None:
    """P(i beats j) [K, K] -> the (first) item with P[i, j] >= 1/2 for all others j, or None."""
    unbeaten = (P >= 0.5).fill_diagonal_(True).all(1)
    return int(unbeaten.nonzero()[0]) if unbeaten.any() else None


def copeland_winners(P: Tensor) -> list[int]:
    """P [K, K] -> all items that beat (P[i, j] > 1/2) the largest number of others."""
    beaten = (P > 0.5).fill_diagonal_(False).sum(1)
    return (beaten == beaten.max()).nonzero().flatten().tolist()


def borda_winner(P: Tensor) -> int:
    """P [K, K] -> the (first) item with the largest sum of P[i, j] over the others."""
    return int(P.clone().fill_diagonal_(0.0).sum(1).argmax())


# --- maximum likelihood ---


@dataclass
class Fit:
    rewards: Tensor  # [K] float64, mean 0, nats
    wins: Tensor  # [K, K], of the row's item over the column's
    hessian: Tensor  # [K, K], of (2) at the rewards
    iterations: int  # Newton steps


def check_comparisons(i, j, mu, weights, num_items: int) -> None:
    """Refuse what is no comparison. Rows are counted from 1."""
    if not 0 < len(i) == len(j) == len(mu) == len(weights):
        raise UserError(f"{len(i)} i, {len(j)} j, {len(mu)} mu and {len(weights)} weights: "
                        "there must be comparisons, and one of each per comparison")
    checks = {
        "an item is not in 0 ... num_items - 1": (i.minimum(j) >= 0) & (i.maximum(j) < num_items),
        "an item is compared with itself": i != j,
        "mu is not a number from 0 to 1": (mu >= 0) & (mu <= 1),
        "the weight is not a positive number": (weights > 0) & (weights < math.inf),
    }
    for message, good in checks.items():
        if not good.all():
            raise UserError(f"row {int(good.long().argmin()) + 1}: {message}: correct it")


def connected_groups(beats: Tensor) -> list[list[int]]:
    """Edges winner -> loser [K, K] -> strongly connected groups of items, the smallest first."""
    left = torch.ones(len(beats), dtype=torch.bool, device=beats.device)
    groups = []
    while left.any():
        group = left.clone()
        for edges in (beats, beats.T):  # a group: what one item reaches and is reached from
            reached = torch.zeros_like(left)
            reached[int(left.nonzero()[0])] = True
            frontier = reached
            while frontier.any():
                frontier = edges[frontier].any(0) & left & ~reached
                reached = reached | frontier
            group &= reached
        groups.append(group.nonzero().flatten().tolist())
        left &= ~group
    return sorted(groups, key=len)


def loss_and_derivatives(rewards: Tensor, wins: Tensor, l2: float) -> tuple:
    """Equation (2) for rewards [K], wins [K, K] -> its value, gradient [K], Hessian [K, K]."""
    margins = rewards[:, None] - rewards
    P = torch.sigmoid(margins)
    Q = torch.sigmoid(-margins)  # 1 - P would round to 0 at a margin of 37
    loss = l2 / 2 * rewards.square().sum() - (wins * F.logsigmoid(margins)).sum()
    pull = wins * Q  # each win pulls i up and j down by 1 - p_ij
    gradient = l2 * rewards + pull.sum(0) - pull.sum(1)
    hessian = -(wins + wins.T) * P * Q
    hessian.diagonal().add_(l2 - hessian.sum(1))
    # Equal shifts change nothing; a curvature for them, which steps of mean 0 do not see, lets the
    # Hessian be inverted.
    hessian += hessian.diagonal().mean() / len(rewards)
    return loss, gradient, hessian


def fit_bt(i, j, mu, num_items: int, l2=0.0, weights=None) -> Fit:
    """Items i, j [N], mu, weights [N] -> the minimum of (2), found in float64 on i's device."""
    i = torch.as_tensor(i)
    j = torch.as_tensor(j, device=i.device)
    mu = torch.as_tensor(mu, dtype=torch.float64, device=i.device)
    weights = torch.ones_like(mu) if weights is None else weights
    weights = torch.as_tensor(weights, dtype=torch.float64, device=i.device)
    check_comparisons(i, j, mu, weights, num_items)
    wins = mu.new_zeros(num_items, num_items)
    wins.view(-1).scatter_add_(0, i * num_items + j, weights * mu)
    wins.view(-1).scatter_add_(0, j * num_items + i, weights * (1 - mu))
    groups = connected_groups(wins > 0)
    if len(groups) > 1 and l2 == 0:
        smallest = " ".join(str(group[:10]) for group in groups[:10])
        raise UserError(f"no finite rewards: the items form {len(groups)} groups between which "
                        f"wins go one way or there are none. The smallest are {smallest}: "
                        "add comparisons, pass --l2 0.01, or leave small groups out")

    rewards = ((1 + wins.sum(1)) / (1 + wins.sum(0))).log()  # log odds against all others together
    rewards -= rewards.mean()
    loss, gradient, hessian = loss_and_derivatives(rewards, wins, l2)
    for iteration in range(1, 101):  # Newton's method
        factor = torch.linalg.cholesky(hessian)
        step = torch.cholesky_solve(gradient[:, None], factor)[:, 0]
        last = step.abs().max() < 1e-7  # the next one would be about 1e-14
        before = loss * (1 + 1e-12)  # room for rounding
        loss, gradient, hessian = loss_and_derivatives(rewards - step, wins, l2)
        while loss > before:  # far from the minimum, the step may be too long
            step /= 2
            loss, gradient, hessian = loss_and_derivatives(rewards - step, wins, l2)
        rewards = rewards - step
        if last:
            return Fit(rewards - rewards.mean(), wins, hessian, iteration)
    raise UserError("no convergence in 100 Newton steps: pass --l2 0.01")


def covariance(fit: Fit) -> Tensor:
    """The inverse Fisher information -> covariance of the centred rewards, [K, K]."""
    inverse = torch.linalg.inv(fit.hessian)
    return inverse - inverse.mean()  # less the variance of equal shifts


def win_shares(wins: Tensor) -> Tensor:
    """Wins [K, K] -> the share of its comparisons that i won against j; 1/2 without any."""
    n = wins + wins.T
    return torch.where(n > 0, wins / n, 0.5)


def misfit(fit: Fit) -> dict:
    """Likelihood-ratio test of (1) against the saturated model, a free p_ij for each pair.
    Under (1) the deviance follows chi^2; p is the probability of one as large."""
    wins, rewards = fit.wins, fit.rewards
    model = bt_probability(rewards[:, None], rewards)
    deviance = 2 * (torch.xlogy(wins, win_shares(wins)) - torch.xlogy(wins, model)).sum()
    freedom = int((wins + wins.T > 0).triu(1).sum()) - (len(rewards) - 1)
    half = wins.new_tensor(max(freedom, 1) / 2)  # two arms leave no freedom: p is 1 there
    p = torch.special.gammaincc(half, deviance.clamp(min=0) / 2)
    return {"deviance": deviance.item(), "freedom": freedom, "p": p.item()}


def best_item(fit: Fit) -> dict:
    """By three definitions of the counted wins and by the fit, and the misfit of the fit."""
    P = win_shares(fit.wins)
    return {
        "Condorcet": condorcet_winner(P),
        "Copeland": copeland_winners(P),
        "Borda": borda_winner(P),
        "fit of (1)": int(fit.rewards.argmax()),
        **misfit(fit),
    }


# --- simulation ---


def simulated_fit(rewards: Tensor, num: int, l2: float, generator) -> Fit:
    """`num` random pairs of arms, each judged twice by (1), and the fit. The mean vote counts for
    two: so (2) is the likelihood of the votes."""
    K = len(rewards)
    i = torch.randint(K, (num,), generator=generator)
    j = (i + torch.randint(1, K, (num,), generator=generator)) % K
    uniform = torch.rand(2, num, generator=generator, dtype=torch.float64)
    votes = (uniform < bt_probability(rewards[i], rewards[j])).double()
    return fit_bt(i, j, votes.mean(0), K, l2, torch.full((num,), 2.0))


def coverage(rewards: Tensor, args: Args, generator) -> Tensor:
    """The share of simulated data sets in which the 95% interval of each arm is right, [K]."""
    covered = torch.zeros_like(rewards)
    for _ in range(args.simulations):
        fit = simulated_fit(rewards, args.comparisons, args.l2, generator)
        errors = covariance(fit).diagonal().sqrt()
        covered += (fit.rewards - rewards).abs() <= 1.96 * errors
    return covered / args.simulations


def error_by_size(rewards: Tensor, args: Args, generator) -> dict[int, float]:
    """Number of comparisons -> root mean square error of the rewards, over 10 data sets."""
    result = {}
    for factor in (30, 90, 300, 900, 3000, 9000):
        size = factor * args.arms
        fits = [simulated_fit(rewards, size, args.l2, generator) for _ in range(10)]
        errors = torch.stack([fit.rewards - rewards for fit in fits])
        result[size] = errors.square().mean().sqrt().item()
    return result


def print_arms(rewards: Tensor, fit: Fit, covered: Tensor) -> None:
    half = 1.96 * covariance(fit).diagonal().sqrt()
    table = [["arm", "reward", "estimate", "95% interval", "coverage"]]
    for k in rewards.argsort(descending=True).tolist():
        estimate = fit.rewards[k]
        interval = f"{estimate - half[k]:+.3f} {estimate + half[k]:+.3f}"
        table.append([k, f"{rewards[k]:+.3f}", f"{estimate:+.3f}", interval, f"{covered[k]:.1%}"])
    print_table([*table, ["all", "", "", "", f"{covered.mean():.1%}"]])


def print_transitivity(rewards: Tensor, fit: Fit) -> None:
    P = win_shares(fit.wins)
    order = rewards.argsort(descending=True).tolist()
    table = [["i, j, k", "p_ik from p_ij, p_jk", "counted", "fitted", "true"]]
    for i, j, k in list(zip(order, order[1:], order[2:]))[:5]:
        implied = transitive_probability(P[i, j], P[j, k]).item()
        fitted = bt_probability(fit.rewards[i], fit.rewards[k]).item()
        true = bt_probability(rewards[i], rewards[k]).item()
        table.append([f"{i}, {j}, {k}", implied, P[i, k].item(), fitted, true])
    print_table(table)


def main(args: Args) -> None:
    for name, least in {"arms": 2, "comparisons": 1, "simulations": 1, "l2": 0}.items():
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: give a number, at least {least}")
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", asdict(args))
    generator = torch.Generator().manual_seed(args.seed)
    rewards = torch.randn(args.arms, generator=generator, dtype=torch.float64)
    rewards -= rewards.mean()

    fit = simulated_fit(rewards, args.comparisons, args.l2, generator)
    covered = coverage(rewards, args, generator)
    print(f"{args.comparisons:,} comparisons of {args.arms} arms, {fit.iterations} Newton steps; "
          f"coverage over {args.simulations} such data sets:")
    print_arms(rewards, fit, covered)

    first, second, hundred = [0, 0, 1], [1, 2, 2], [100.0] * 3
    cycle = fit_bt(first, second, [0.8, 0.4, 0.7], 3, weights=hundred)
    split = fit_bt(first, second, [0.55, 0.55, 0.95], 3, weights=hundred)  # 0 beats all
    best = {
        "arms": best_item(fit),
        "rock, paper, scissors": best_item(cycle),
        "Borda is not Condorcet": best_item(split),
    }
    print("\nThe best item by three definitions and by the fit of (1), and the misfit of (1):")
    print_table([["", *best["arms"]], *([name, *row.values()] for name, row in best.items())])
    print("\nTransitivity, three neighbours at a time:")
    print_transitivity(rewards, fit)

    errors = error_by_size(rewards, args, generator)
    log_sizes = [math.log(size) for size in errors]
    log_errors = [math.log(error) for error in errors.values()]
    slope = statistics.linear_regression(log_sizes, log_errors).slope
    print(f"\nRoot mean square error of the rewards, about N^{slope:.2f}:")
    print_table([["comparisons N", "error (nats)"], *errors.items()])
    results = {"coverage": covered.mean().item(), "slope": slope, "misfit_p": best["arms"]["p"]}
    write_json(out / "results.json", results)
    print(f"saved to {out}")


if __name__ == "__main__":
    run_script(main, Args)
