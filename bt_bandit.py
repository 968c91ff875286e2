"""Bradley-Terry: rewards from comparisons, on a bandit, on real battles and on trajectories.

Items i (arms, chat models) have latent rewards r_i. A judge prefers i to j with probability (Bradley & Terry 1952)

    p_ij = exp(r_i) / (exp(r_i) + exp(r_j)) = sigma(r_i - r_j)                                                     (1)

and from comparisons (i, j, mu), mu = 1 where i was preferred, 0 where j was, 1/2 where neither, with weights w, the
rewards are found by maximum likelihood: they minimise

    L(r) = - sum_n w_n [ mu_n log p_ij + (1 - mu_n) log p_ji ]  ( + l2/2 |r|^2 )                                   (2)

L depends on differences only, so the rewards are given with mean 0. The judge of two trajectories of states and actions
adds up latent rewards r(s, a) (Christiano et al. 2017, equation 1):

    P[tau1 > tau2] = sigma( sum_t r(s1_t, a1_t) - sum_t r(s2_t, a2_t) )                                            (3)

In (2) a tie is half a win for each. Two models give it a probability of its own; with d = r_i - r_j,

    Davidson (1970)      P(i) : P(tie) : P(j) = exp(d/2) : nu : exp(-d/2)                       tie = log nu       (4)
    Rao & Kupper (1967)  P(i) = sigma(d - theta), P(j) = sigma(-d - theta), P(tie) the rest,    tie = theta > 0    (5)

    python bt_bandit.py                                        # 10 arms, 5,000 comparisons: about 15 seconds
    python bt_bandit.py --data battles.csv                     # model_a, model_b, winner; or i, j, mu; optional weight
    python bt_bandit.py --data battles.csv --ties davidson --anchor-item gpt-4 --anchor 1200
    python bt_bandit.py --setting trajectories                 # learn r(s, a) from pairs, then PPO: a few seconds

Expect, on the bandit, 95% intervals that cover the true rewards 95% of the time, an error that falls as N^-1/2, and
three definitions of the best arm that agree, as they must under (1) and need not elsewhere; on trajectories, a policy
within 1% of the optimum. The maximum of (2) is finite if and only if the items are strongly connected by edges
winner -> loser (Ford 1957); where they are not, the groups are named and the run ends.

The walk, the MDP of --setting trajectories: 5 columns of 3 rows, a walker who starts in the middle of the first column
and moves one column to the right with each of 5 actions; action 0, 1, 2 goes one row up, straight on, one row down (at
a wall it stays), but with probability --slip the direction is drawn at random. r(s, a) is drawn from N(0, 1).
Trajectories are compared that a random walker makes; what they identify is stated at `identifiable`.
"""

import csv
import io
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError, load_rows, print_table, run_script, write_atomically


@dataclass
class Args:
    setting: Literal["bandit", "trajectories"] = "bandit"
    """which simulation, where no --data is given"""
    data: str | None = None
    """real comparisons (.csv, .jsonl, .json or .parquet): model_a, model_b, winner, or i, j, mu; optional weight"""
    ties: Literal["half", "davidson", "rao-kupper"] = "half"
    """of --data: a tie is half a win for each, or has its own probability by equation (4) or (5)"""
    l2: float = 0.0
    """ridge on the rewards, l2/2 |r|^2 (not on the tie parameter)"""
    anchor: float = 1000.0
    """of --data: rating of --anchor-item, or the mean rating"""
    anchor_item: str | None = None
    """of --data: the item that --anchor belongs to; intervals are then of differences to it"""
    scale: float = 400.0
    """of --data: rating points that make odds of 10 to 1; 400 is Elo's"""
    bootstrap: int = 200
    """of --data: refits to reweighted comparisons; 0: none"""
    arms: int = 10
    """of the bandit"""
    comparisons: int = 5000
    """simulated comparisons"""
    simulations: int = 500
    """simulated data sets that the coverage of the bandit's intervals is measured on"""
    slip: float = 0.1
    """probability that the walker's direction is random"""
    output_dir: str = "runs/bt_bandit"
    """args.json, results.json; with --data ratings.csv and win_matrix.csv; a plot where matplotlib is installed"""
    seed: int = 0
    """of simulation, bootstrap, held-out rows and PPO"""


# ------------------------------------------------------------------------------------------------------------ the model


def bt_probability(r_i: Tensor, r_j: Tensor) -> Tensor:
    """Equation (1): rewards (nats) of any shapes that broadcast -> P(i preferred to j)."""
    return torch.sigmoid(r_i - r_j)


def bt_loss(rewards: Tensor, i: Tensor, j: Tensor, mu: Tensor) -> Tensor:
    """Equation (2): rewards [K]; items i, j [N]; mu [N] in [0, 1] -> the sum over comparisons, nats."""
    margins = rewards[i] - rewards[j]
    return -(mu * F.logsigmoid(margins) + (1 - mu) * F.logsigmoid(-margins)).sum()


def trajectory_loss(rewards_1: Tensor, rewards_2: Tensor, mu: Tensor) -> Tensor:
    """Equations (3) and (2): rewards of each step [N, T] (0 after the end), mu [N] -> the sum over pairs, nats."""
    margins = rewards_1.sum(-1) - rewards_2.sum(-1)
    return -(mu * F.logsigmoid(margins) + (1 - mu) * F.logsigmoid(-margins)).sum()


def transitive_probability(p_ij, p_jk):
    """Under (1) odds multiply, p_ik / p_ki = p_ij / p_ji * p_jk / p_kj: two probabilities fix the third."""
    return p_ij * p_jk / (p_ij * p_jk + (1 - p_ij) * (1 - p_jk))


def condorcet_winner(P: Tensor) -> int | None:
    """P [K, K], the diagonal unread -> the (first) item with P[i, j] >= 1/2 against every other, or None."""
    winners = (P >= 0.5).fill_diagonal_(True).all(1).nonzero().flatten().tolist()
    return winners[0] if winners else None


def copeland_winners(P: Tensor) -> list[int]:
    """P [K, K] -> all items that beat (P[i, j] > 1/2) the largest number of others."""
    beaten = (P > 0.5).fill_diagonal_(False).sum(1)
    return (beaten == beaten.max()).nonzero().flatten().tolist()


def borda_winner(P: Tensor) -> int:
    """P [K, K] -> the (first) item with the largest sum over others of P[i, j]."""
    return int(P.clone().fill_diagonal_(0.0).sum(1).argmax())


def outcome_probabilities(d: Tensor, tie: float, ties: str) -> Tensor:
    """Equations (1), (4), (5): reward differences [...] -> P(win), P(tie), P(loss) [3, ...]."""
    if ties == "davidson":
        return torch.stack([d / 2, torch.full_like(d, tie), -d / 2]).softmax(0)
    win, loss = torch.sigmoid(d - tie), torch.sigmoid(-d - tie)  # ties == "half": tie is 0
    return torch.stack([win, math.expm1(2 * tie) * win * loss, loss])


# -------------------------------------------------------------------------------------------------- maximum likelihood


class Outcomes(NamedTuple):
    """Weights of what happened to item a against b: of single comparisons, or counted up for pairs a < b. All [P]."""
    a: Tensor
    b: Tensor
    wins: Tensor
    ties: Tensor
    losses: Tensor


class BTFit(NamedTuple):
    rewards: Tensor  # [K] float64, mean 0
    tie: float  # log nu of (4), theta of (5), else 0
    loss: float  # negative log-likelihood in nats, without the ridge
    gradient_norm: float  # of the minimised function, at the end
    iterations: int  # Newton steps


def outcomes(i: Tensor, j: Tensor, mu: Tensor, weights: Tensor, ties: str) -> Outcomes:
    tied = torch.zeros_like(mu) if ties == "half" else weights * (mu == 0.5)
    return Outcomes(i, j, (weights - tied) * mu, tied, (weights - tied) * (1 - mu))


def count_pairs(i: Tensor, j: Tensor, mu: Tensor, weights: Tensor, ties: str, num_items: int) -> Outcomes:
    """The sufficient statistics: N comparisons -> the pairs that were compared, of K (K - 1) / 2, with their counts."""
    def number(i, j):
        return torch.minimum(i, j) * num_items + torch.maximum(i, j)

    dense, index = num_items**2 <= 2**24, i  # a small table of all pairs is faster than sorting
    if not dense:
        pair, index = number(i, j).unique(return_inverse=True)
    sums = [mu.new_zeros(num_items**2 if dense else len(pair)) for _ in range(2 if ties == "half" else 3)]
    for some, *rows in zip(*(x.split(2**15) for x in (index, i, j, mu, weights))):  # chunks that stay in the cache
        a, b, wins, tied, losses = outcomes(*rows, ties)
        turned = (losses - wins) * (a > b)  # what moves to the other side
        for total, x in zip(sums, (wins + turned, losses - turned, tied)):
            total.scatter_add_(0, number(a, b) if dense else some, x)
    if dense:
        pair = sum(sums[1:], sums[0]).nonzero().flatten()
        sums = [total.index_select(0, pair) for total in sums]
    wins, losses, tied = sums if len(sums) == 3 else (*sums, torch.zeros_like(sums[0]))
    return Outcomes(pair // num_items, pair % num_items, wins, tied, losses)


def likelihood_terms(rewards: Tensor, tie: Tensor, o: Outcomes, ties: str):
    """-> negative log-likelihood (scalar), and of each entry's share the derivatives in d = r_a - r_b and in the tie
    parameter t: g_d, g_t, h_dd, h_dt, h_tt, each [P]. It is convex in (r, t) together."""
    d, w, t, l = rewards.index_select(0, o.a) - rewards.index_select(0, o.b), o.wins, o.ties, o.losses
    if ties == "davidson":
        log_p = torch.stack([d / 2, tie.expand_as(d), -d / 2]).log_softmax(0)
        win, tied, loss = log_p.exp()
        n, mean = w + t + l, (win - loss) / 2  # n times a covariance: exponents (1/2, 0, -1/2) for d, (0, 1, 0) for t
        return (-(w * log_p[0] + t * log_p[1] + l * log_p[2]).sum(), n * mean - (w - l) / 2, n * tied - t,
                n * ((win + loss) / 4 - mean**2), -n * mean * tied, n * tied * (1 - tied))
    if ties == "half":
        win, loss, none = torch.sigmoid(d), torch.sigmoid(-d), torch.zeros_like(d)  # 1 - win rounds to 0 at d = 37
        return l @ d - (w + l) @ F.logsigmoid(d), l * win - w * loss, none, (w + l) * win * loss, none, none
    # Under (5), P(tie) = (exp(2 theta) - 1) P(i) P(j): a tie counts as a win for each.
    win, loss, w, l = torch.sigmoid(d - tie), torch.sigmoid(-d - tie), w + t, l + t
    value = -(w * F.logsigmoid(d - tie) + l * F.logsigmoid(-d - tie)).sum()
    g_d, h_w, h_l = l * (1 - loss) - w * (1 - win), w * win * (1 - win), l * loss * (1 - loss)
    rest = -torch.expm1(-2 * tie)  # 1 - exp(-2 theta)
    return (value - t.sum() * torch.log(torch.expm1(2 * tie)), g_d, w * (1 - win) + l * (1 - loss) - 2 * t / rest,
            h_w + h_l, h_l - h_w, h_w + h_l + 4 * t * (1 - rest) / rest**2)


def assemble(o: Outcomes, dd: Tensor, dt: Tensor, tt: Tensor, num_items: int) -> Tensor:
    """Entries' second-order terms [P] -> the symmetric matrix over (r_1 ... r_K, t), [K+1, K+1]."""
    K, matrix = num_items, dd.new_zeros(num_items + 1, num_items + 1)
    matrix.view(-1).scatter_add_(0, o.a * (K + 1) + o.b, -dd)
    matrix += matrix.T.clone()
    matrix.diagonal().sub_(matrix.sum(1))  # a Laplacian: rows sum to 0
    if dt.any() or tt.any():
        matrix[:K, K] = matrix[K, :K] = torch.bincount(o.a, dt, K) - torch.bincount(o.b, dt, K)
        matrix[K, K] = tt.sum()
    return matrix


def regular(hessian: Tensor, l2: float, ties: str) -> Tensor:
    """The Hessian with what makes it invertible and leaves steps orthogonal to (1, ..., 1) as they are."""
    rewards = hessian[:-1, :-1]
    rewards += rewards.diagonal().mean() / len(rewards)  # shifting all rewards changes nothing: fix the shift
    rewards.diagonal().add_(l2)
    if ties == "half":
        hessian[-1, -1] = 1.0  # no tie parameter: an inert row
    return hessian


def conjugate_gradients(times, diagonal: Tensor, b: Tensor, most: int, accuracy: float) -> tuple[Tensor, bool]:
    """Solve A x = b, `times` being v -> A v, preconditioned by A's diagonal (Jacobi) -> x, and whether `most` products
    were enough for a residual of `accuracy` |b|."""
    x, residual = torch.zeros_like(b), b
    scaled = direction = residual / diagonal
    for _ in range(most):
        image, old = times(direction), residual @ scaled
        size = old / (direction @ image)
        x, residual = x + size * direction, residual - size * image
        if residual.norm() <= accuracy * b.norm():
            return x, True
        scaled = residual / diagonal
        direction = scaled + (residual @ scaled) / old * direction
    return x, False


def newton_step(o: Outcomes, dd, dt, tt, gradient: Tensor, l2: float, ties: str, num_items: int) -> Tensor:
    """H^-1 gradient, [K+1], accurately enough for the next step. Where many pairs are compared, H is well conditioned
    and conjugate gradients need a few products; where they need many, as in a chain of items, Cholesky does it. Above
    2,000 items, where the pairs compared are far fewer than K^2, H is not formed but applied pair by pair."""
    K = num_items
    if K <= 2000:
        hessian = regular(assemble(o, dd, dt, tt, K), l2, ties)
        if K > 200:
            step, solved = conjugate_gradients(hessian.matmul, hessian.diagonal(), gradient, 20, 1e-6)
            if solved:
                return step
        return torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]

    def times(v):
        difference = v.index_select(0, o.a) - v.index_select(0, o.b)
        flow = dd * difference + dt * v[K]
        return torch.cat([torch.bincount(o.a, flow, K) - torch.bincount(o.b, flow, K) + l2 * v[:K],
                          (dt @ difference + tt.sum() * v[K]).view(1)])

    diagonal = torch.cat([torch.bincount(o.a, dd, K) + torch.bincount(o.b, dd, K) + l2, tt.sum().view(1)])
    diagonal[K] += ties == "half"  # no tie parameter: an inert row
    return conjugate_gradients(times, diagonal, gradient, 2 * K, 1e-3)[0]


def fit_bt(i, j, mu, num_items: int, l2=0.0, weights=None, ties="half", start=None, names=None) -> BTFit:
    """Minimise (2), or the likelihoods of (4), (5), by Newton's method on the pair counts, in float64, on i's device.

    i, j [N] items 0 ... K-1; mu [N] in [0, 1]; weights [N] > 0. A comparison of an item with itself and the like, or
    data of which no finite maximum exists (l2 = 0 and the graph not strongly connected, or a tie parameter without
    bound), raise UserError. `start` is another fit to begin from, `names` are the items' for that message.
    """
    i, j = torch.as_tensor(i), torch.as_tensor(j)
    mu = torch.as_tensor(mu, dtype=torch.float64, device=i.device)
    if weights is None:
        weights = mu.new_ones(1).expand(len(mu))
    weights = torch.as_tensor(weights, dtype=torch.float64, device=i.device)
    check_comparisons(i, j, mu, weights, num_items, ties)
    pairs, K = count_pairs(i, j, mu, weights, ties, num_items), num_items
    check_finite_maximum(pairs, K, l2, ties, names)
    parts = [Outcomes(*part) for part in zip(*(x.split(2**15) for x in pairs))]

    def objective(x):
        value, second = l2 / 2 * x[:K].square().sum(), []
        gradient = l2 * torch.cat([x[:K], 0 * x[K:]])
        for part in parts:
            part_value, g_d, g_t, *part_second = likelihood_terms(x[:K], x[K], part, ties)
            value += part_value
            gradient.scatter_add_(0, part.a, g_d).scatter_add_(0, part.b, -g_d)[K] += g_t.sum()
            second.append(part_second)
        if ties == "half":  # no tie parameter: two times the zeros that are there
            return value, gradient, (torch.cat([dd for dd, _, _ in second]), pairs.ties, pairs.ties)
        return value, gradient, tuple(map(torch.cat, zip(*second)))

    if start is None:
        rewards, tie = log_odds(pairs, K), 1.0 if ties == "rao-kupper" else 0.0
    else:
        rewards, tie = start.rewards, start.tie
    x = torch.cat([rewards - rewards.mean(), mu.new_tensor([tie])])
    value, gradient, second = objective(x)
    total, norm_before = weights.sum(), math.inf
    for iteration in range(200):
        norm = gradient.norm()
        only_rounding_is_left = norm < 1e-12 * total and norm > norm_before / 2
        if norm < 1e-10 * min(1.0, total) or only_rounding_is_left:
            break
        step = newton_step(pairs, *second, gradient, l2, ties, K)
        step[:K] -= step[:K].mean()  # the optimum has mean 0, and `regular` is exact for such steps only
        size, decrease = 1.0, gradient @ step
        while True:  # halve the step until it pays; theta stays positive
            new_x = x - size * step
            if ties != "rao-kupper" or new_x[K] > 0:
                new_value, new_gradient, new_second = objective(new_x)
                if new_value <= value - 1e-4 * size * decrease + 1e-13 * (value.abs() + total) or size < 1e-9:
                    break
            size /= 2
        x, value, gradient, second, norm_before = new_x, new_value, new_gradient, new_second, norm
    else:
        raise UserError(f"no convergence in 200 Newton steps (gradient norm {norm:.1e}): pass --l2 0.01")
    if ties != "half" and x[K] > 10:  # odds of exp(10): with few wins each way, r and the tie run off together
        raise UserError(f"--ties {ties}: no finite tie parameter fits, for want of wins in both directions: "
                        "use --ties half, or pass --l2 0.01")
    loss = value - l2 / 2 * x[:K].square().sum()
    return BTFit(x[:K] - x[:K].mean(), x[K].item(), loss.item(), norm.item(), iteration)


def log_odds(pairs: Outcomes, num_items: int) -> Tensor:
    """Where Newton's method starts: each item's log odds against all its opponents together, [K]."""
    a, b, wins, _, losses = pairs
    won = 1 + wins.new_zeros(num_items).index_add(0, a, wins).index_add(0, b, losses)
    lost = 1 + wins.new_zeros(num_items).index_add(0, a, losses).index_add(0, b, wins)
    return (won / lost).log().clamp(-5, 5)


def covariance(fit: BTFit, i, j, mu, l2=0.0, weights=None, ties="half", robust=False) -> Tensor:
    """Of the centred rewards, [K, K]: the inverse Fisher information A^-1, or, robust to a model that is wrong, the
    sandwich A^-1 B A^-1 (Huber 1967; White 1982) with B the sum over comparisons of the squared scores."""
    K, mu = len(fit.rewards), mu.double()
    rows = outcomes(i, j, mu, torch.ones_like(mu) if weights is None else weights, ties)
    _, g_d, g_t, *second = likelihood_terms(fit.rewards, fit.rewards.new_tensor(fit.tie), rows, ties)
    inverse = torch.linalg.inv(regular(assemble(rows, *second, K), l2, ties))
    if robust:
        inverse = inverse @ assemble(rows, g_d**2, g_d * g_t, g_t**2, K) @ inverse
    rewards = inverse[:K, :K] - inverse[:K, :K].mean(0)
    return rewards - rewards.mean(1, keepdim=True)


# ------------------------------------------------------------------------------------------- what has no finite maximum


def check_comparisons(i, j, mu, weights, num_items: int, ties: str) -> None:
    if not len(i) == len(j) == len(mu) == len(weights):
        raise UserError(f"{len(i)} first items, {len(j)} second items, {len(mu)} mu, {len(weights)} weights: "
                        "give one of each a comparison")
    if len(i) == 0:
        raise UserError("there are no comparisons: give some")
    known = (0 <= i) & (i < num_items) & (0 <= j) & (j < num_items)
    checks = [(~known, f"an item is not one of 0 ... {num_items - 1}: renumber"),
              (i == j, "an item is compared with itself: delete the row"),
              (~((mu >= 0) & (mu <= 1)),
               "mu is not a number in [0, 1]: 1 where the first item won, 0 where the second, 0.5 for a tie"),
              (~((weights > 0) & weights.isfinite()), "the weight is not a positive number: mend it or delete the row")]
    if ties != "half":
        checks.append(((mu != 0) & (mu != 0.5) & (mu != 1),
                       f"mu is not 0, 0.5 or 1: --ties {ties} needs whole outcomes, --ties half does not"))
    for bad, what in checks:
        if bad.any():
            raise UserError(f"row {int(bad.nonzero()[0]) + 1}: {what}")
    if num_items < 2:
        raise UserError("there is one item only: comparisons need two")


def reach(tails: Tensor, heads: Tensor, start: Tensor) -> Tensor:
    """start [K] bool -> what can be reached from it along edges tail -> head."""
    reached = start.clone()
    while True:
        new = heads[reached[tails] & ~reached[heads]]
        if len(new) == 0:
            return reached
        reached[new] = True


def strong_components(winners: Tensor, losers: Tensor, num_items: int) -> Tensor:
    """Edges winner -> loser -> a component number for each item, [K]. Forward-backward search (Fleischer et al. 2000):
    what a pivot reaches and is reached from is its component, and no other component crosses the border of either set;
    all blocks of items are cut at once, each by a random pivot, so a few rounds of passes over the edges are enough."""
    block = torch.zeros(num_items, dtype=torch.long, device=winners.device)
    done = torch.zeros(num_items, dtype=torch.bool, device=winners.device)
    generator = torch.Generator().manual_seed(0)
    while not done.all():
        inside = (block[winners] == block[losers]) & ~done[winners]
        winners, losers = winners[inside], losers[inside]
        order = torch.randperm(num_items, generator=generator).to(block.device)
        pivots = torch.zeros_like(done)
        pivots[torch.zeros_like(block).scatter_(0, block[order], order)[block[~done]]] = True
        forward, backward = reach(winners, losers, pivots), reach(losers, winners, pivots)
        done |= forward & backward
        block = (4 * block + 2 * forward + backward).unique(return_inverse=True)[1]
    return block


def check_finite_maximum(pairs: Outcomes, num_items: int, l2: float, ties: str, names) -> None:
    def components(step):  # of every step-th pair
        a, b, wins, tied, losses = (x[::step] for x in pairs)
        a_scored, b_scored = wins + tied > 0, losses + tied > 0  # a tie is an edge in both directions
        winners, losers = torch.cat([a[a_scored], b[b_scored]]), torch.cat([b[a_scored], a[b_scored]])
        return strong_components(winners, losers, num_items)

    part = 1 + len(pairs.a) // (30 * num_items)  # where a part of the pairs connects all, all do: a fast yes
    if l2 == 0 and components(part).max() > 0 and (component := components(1)).max() > 0:
        raise UserError(f"no finite maximum: the items fall into {int(component.max()) + 1} groups between which wins "
                        f"go one way or there are none, {groups_by_name(component, names)}: pass --l2 0.01 for the "
                        "regularised fit, or leave the small groups out")
    tied, decided = (pairs.ties > 0).any(), (pairs.wins + pairs.losses > 0).any()
    if ties != "half" and not (tied and decided):
        what = "all comparisons are ties" if tied else "there are no ties"
        raise UserError(f"--ties {ties}: {what}: use --ties half")


def groups_by_name(component: Tensor, names) -> str:
    """A component number for each item -> "{a} {b, c}", the small ones first, no more than fit into a message."""
    groups = [(component == c).nonzero().flatten().tolist() for c in component.unique().tolist()[:1000]]
    told = []
    for group in sorted(groups, key=len):
        shown = [names[k] if names else str(k) for k in group[:10]] + [f"... {len(group)} items"] * (len(group) > 10)
        told.append("{" + ", ".join(shown) + "}")
    return " ".join(told if len(told) <= 20 else told[:10] + ["..."] + told[-1:])


# ------------------------------------------------------------------------------------------------------------- bandit


def simulate(rewards: Tensor, num: int, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random pairs of arms, each shown to two judges who follow (1): mu is the mean of their votes, 1, 1/2 or 0, and
    counts for two (weight 2), so that (2) is the likelihood of the votes and its Fisher information holds.
    -> i, j, mu, weights [num]"""
    K = len(rewards)
    i = torch.randint(K, (num,), generator=generator)
    j = (i + torch.randint(1, K, (num,), generator=generator)) % K
    votes = torch.rand(2, num, generator=generator, dtype=torch.float64) < bt_probability(rewards[i], rewards[j])
    return i, j, votes.double().mean(0), torch.full((num,), 2.0, dtype=torch.float64)


def win_shares(i, j, mu, weights, num_items: int) -> tuple[Tensor, Tensor]:
    """-> P [K, K], the share of i's comparisons with j that i won (1/2 if there are none), and their number [K, K]."""
    K = num_items
    wins = torch.bincount(i * K + j, weights * mu, K**2) + torch.bincount(j * K + i, weights * (1 - mu), K**2)
    wins = wins.view(K, K)
    n = wins + wins.T
    return torch.where(n > 0, wins / n, 0.5), n


def misfit(rewards: Tensor, P: Tensor, n: Tensor) -> tuple[float, int, float]:
    """Likelihood-ratio test of (1) against the saturated model, a free p for each pair -> deviance, degrees of freedom,
    and the probability of a deviance as large if (1) is true (chi^2)."""
    model = bt_probability(rewards[:, None], rewards)
    deviance = 2 * (n * (torch.xlogy(P, P) - torch.xlogy(P, model))).sum().item()  # (i, j) and (j, i): p and 1 - p
    freedom = int((n > 0).triu(1).sum()) - (len(rewards) - 1)
    if freedom == 0:
        return deviance, 0, 1.0
    tail = torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(max(0.0, deviance) / 2))
    return deviance, freedom, tail.item()


def coverage(rewards: Tensor, args: Args, generator) -> Tensor:
    """Share of simulated data sets in which the 95% interval of arm k holds its true reward, [K]."""
    covered = torch.zeros_like(rewards)
    for _ in range(args.simulations):
        i, j, mu, weights = simulate(rewards, args.comparisons, generator)
        fit = fit_bt(i, j, mu, args.arms, args.l2, weights)
        errors = covariance(fit, i, j, mu, args.l2, weights).diagonal().sqrt()
        covered += (fit.rewards - rewards).abs() <= 1.96 * errors
    return covered / args.simulations


def error_by_size(rewards: Tensor, args: Args, generator, repeats: int = 10) -> tuple[list[int], list[float]]:
    """Root mean square error of the rewards at growing numbers of comparisons."""
    sizes, errors = [30 * args.arms * factor for factor in (1, 3, 10, 30, 100, 300)], []
    for size in sizes:
        squares = []
        for _ in range(repeats):
            i, j, mu, weights = simulate(rewards, size, generator)
            squares.append((fit_bt(i, j, mu, args.arms, args.l2, weights).rewards - rewards).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    return sizes, errors


def plot_error(sizes: list[int], errors: list[float], path: Path) -> None:
    """Log-log, as a PNG where matplotlib is installed, else in plain text."""
    try:
        import matplotlib
    except ImportError:
        high, low = math.log10(max(errors)), math.log10(min(errors))
        for size, error in zip(sizes, errors):  # turned by 90 degrees: N goes down, the error to the right
            column = round(50 * (math.log10(error) - low) / (high - low or 1))
            print(f"  {size:>9,}  {' ' * column}* {error:.4f}")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(5, 4))
    axes.loglog(sizes, errors, "o-", label="maximum likelihood")
    axes.loglog(sizes, [errors[-1] * (sizes[-1] / size) ** 0.5 for size in sizes], "--", label="slope -1/2")
    axes.set(xlabel="comparisons", ylabel="root mean square error of the rewards (nats)")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"  {path}")


def bandit(args: Args, out: Path) -> dict:
    generator, K = torch.Generator().manual_seed(args.seed), args.arms
    rewards = torch.randn(K, generator=generator, dtype=torch.float64)
    rewards -= rewards.mean()
    i, j, mu, weights = simulate(rewards, args.comparisons, generator)
    fit = fit_bt(i, j, mu, K, args.l2, weights)
    half = 1.96 * covariance(fit, i, j, mu, args.l2, weights).diagonal().sqrt()
    covered = coverage(rewards, args, generator)
    order = rewards.argsort(descending=True).tolist()
    print(f"{args.comparisons:,} comparisons of {K} arms, {(mu == 0.5).double().mean():.0%} ties; {fit.iterations} "
          f"Newton steps, gradient norm {fit.gradient_norm:.0e}. Coverage over {args.simulations} such data sets:")
    table = [["arm", "reward", "estimate", "95% interval", "coverage"]]
    for k in order:
        interval = f"{fit.rewards[k] - half[k]:+.3f} {fit.rewards[k] + half[k]:+.3f}"
        table.append([k, f"{rewards[k]:+.3f}", f"{fit.rewards[k]:+.3f}", interval, f"{covered[k]:.1%}"])
    print_table(table + [["all", "", "", "", f"{covered.mean():.1%}"]])

    true_P, fitted_P = bt_probability(rewards[:, None], rewards), bt_probability(fit.rewards[:, None], fit.rewards)
    counted_P, n = win_shares(i, j, mu, weights, K)
    results = best_arm(true_P, fitted_P, counted_P, misfit(fit.rewards, counted_P, n))

    print("\nTransitivity: p_ik from the counted p_ij and p_jk, and p_ik itself:")
    table = [["i, j, k", "from p_ij, p_jk", "counted", "fitted", "true"]]
    for x in list(range(0, K - 2, max(1, (K - 2) // 4)))[:5]:
        a, b, c = order[x:x + 3]
        implied = transitive_probability(counted_P[a, b], counted_P[b, c])
        table.append([f"{a}, {b}, {c}", *(p.item() for p in (implied, counted_P[a, c], fitted_P[a, c], true_P[a, c]))])
    print_table(table)

    sizes, errors = error_by_size(rewards, args, generator)
    x, y = torch.tensor(sizes).log(), torch.tensor(errors).log()
    slope = (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()
    print(f"\nError of the rewards against the number of comparisons, log-log, slope {slope:.2f}:")
    plot_error(sizes, errors, out / "error.png")
    return {**results, "coverage": covered.mean().item(), "coverage_low": covered.min().item(),
            "coverage_high": covered.max().item(), "rmse": (fit.rewards - rewards).square().mean().sqrt().item(),
            "slope": slope, "gradient_norm": fit.gradient_norm, "iterations": fit.iterations,
            **{f"rmse_{size}": error for size, error in zip(sizes, errors)}}


def best_arm(true_P: Tensor, fitted_P: Tensor, counted_P: Tensor, arms_misfit: tuple[float, int, float]) -> dict:
    """Winners by three definitions, of the arms and of two sets of three items that (1) cannot describe."""
    cycle = torch.tensor([[0.5, 0.8, 0.4], [0.2, 0.5, 0.7], [0.6, 0.3, 0.5]], dtype=torch.float64)  # 0 > 1 > 2 > 0
    split = [[0.5, 0.55, 0.55], [0.45, 0.5, 0.95], [0.45, 0.05, 0.5]]  # 0 beats all, 1 wins more
    sets = [("arms, true", true_P, None), ("arms, fitted", fitted_P, None), ("arms, counted", counted_P, arms_misfit)]
    deviance, freedom, tail = arms_misfit
    results = {"misfit_deviance": deviance, "misfit_freedom": freedom, "misfit_p": tail, "winners_agree": all(
        condorcet_winner(P) == borda_winner(P) and copeland_winners(P) == [borda_winner(P)] for _, P, _ in sets)}
    first, second = torch.triu_indices(3, 3, 1)
    for name, what, P in (("cycle", "rock, paper, scissors", cycle),
                          ("split", "Borda is not Condorcet", torch.tensor(split, dtype=torch.float64))):
        fit = fit_bt(first, second, P[first, second], 3, weights=[100.0] * 3)
        its_misfit = misfit(fit.rewards, P, 100 * (1 - torch.eye(3)))
        sets += [(what, P, its_misfit), ("  fitted by (1)", bt_probability(fit.rewards[:, None], fit.rewards), None)]
        results[f"{name}_deviance"] = its_misfit[0]

    print("\nThe best arm. The arms' data fit (1); two sets of three items do not, however often (here 100 times) they "
          "are compared:")
    table = [["probabilities", "Condorcet", "Copeland", "Borda", "misfit of (1): deviance", "freedom", "p"]]
    for what, P, test in sets:
        condorcet, copeland = condorcet_winner(P), " ".join(map(str, copeland_winners(P)))
        table.append([what, "none" if condorcet is None else condorcet, copeland, borda_winner(P),
                      *([f"{test[0]:.1f}", test[1], f"{test[2]:.2g}"] if test else [""] * 3)])
    print_table(table)
    return results


# --------------------------------------------------------------------------------------------------------- real battles

# both_bad is LMArena's newer word
WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}


def read_battles(path: str) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """-> names [K], i, j, mu, weights [N]"""
    try:
        rows = load_rows(path)
    except UserError as error:
        raise UserError(str(error).replace("--dataset", "--data"))
    battles = "winner" in rows[0]
    columns = ("model_a", "model_b", "winner") if battles else ("i", "j", "mu")
    if missing := [column for column in columns if column not in rows[0]]:
        raise UserError(f"--data {path}: no column {missing[0]!r} (columns: {', '.join(rows[0])}): "
                        "give model_a, model_b, winner or i, j, mu")
    first, second, mu, weights = [], [], [], []
    for number, row in enumerate(rows, 1):
        where = f"--data {path}, row {number}"
        a, b, outcome = (row[column] for column in columns)
        if battles and outcome not in WINNERS:
            raise UserError(f"{where}: winner {outcome!r} is none of {', '.join(WINNERS)}: rename it")
        if any(name is None or name != name or str(name).strip() == "" for name in (a, b)):
            raise UserError(f"{where}: an item has no name: fill it in or delete the row")
        outcome = WINNERS[outcome] if battles else outcome
        for what, value, values in (("mu", outcome, mu), ("weight", row.get("weight", 1.0), weights)):
            try:
                values.append(float(value))
            except (TypeError, ValueError):
                raise UserError(f"{where}: {what} {value!r} is not a number: mend it or delete the row")
        first.append(str(a))
        second.append(str(b))
    names = sorted({*first, *second})
    index = {name: k for k, name in enumerate(names)}
    i, j = (torch.tensor([index[name] for name in side]) for side in (first, second))
    return names, i, j, torch.tensor(mu, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


def held_out(i, j, mu, weights, num_items: int, args: Args) -> dict:
    """Fit to nine tenths of the rows; on the others log-loss (nats a comparison) and accuracy (whether the side
    predicted won, of comparisons that were no ties), each against a constant: the outcomes' shares in the nine tenths.
    """
    order = torch.randperm(len(i), generator=torch.Generator().manual_seed(args.seed))
    test, train = order[:max(1, len(i) // 10)], order[max(1, len(i) // 10):]
    for l2 in (args.l2, max(args.l2, 0.1)):  # an item of few comparisons may lose its last win: the ridge, then
        try:
            fit = fit_bt(i[train], j[train], mu[train], num_items, l2, weights[train], args.ties)
            break
        except UserError:
            continue
    else:
        return {"held_out": 0}
    results = {"held_out": len(test), "held_out_l2": l2}
    seen, unseen = (torch.stack(outcomes(i[rows], j[rows], mu[rows], weights[rows], args.ties)[2:])
                    for rows in (train, test))  # [3, N]
    half_a_win = seen.new_tensor([0.5, 0.0 if args.ties == "half" else 0.5, 0.5])  # if there is none
    share = torch.maximum(seen.sum(1), half_a_win)
    share = share / share.sum()
    i, j, mu, weights = i[test], j[test], mu[test], weights[test]
    decisive, total = mu != 0.5, weights.sum()
    for name, P in (("", outcome_probabilities(fit.rewards[i] - fit.rewards[j], fit.tie, args.ties)),
                    ("_constant", share[:, None].expand(3, len(test)))):
        losses = -torch.xlogy(unseen, P).sum(0) / weights
        right = 0.5 + 0.5 * torch.sign((P[0] - P[2]) * (mu - 0.5))[decisive]
        mean = (losses * weights).sum() / total
        results |= {f"log_loss{name}": mean.item(),
                    f"log_loss{name}_se": ((weights * (losses - mean)).square().sum().sqrt() / total).item(),
                    f"accuracy{name}": ((right * weights[decisive]).sum() / weights[decisive].sum()).item()}
    return results


def rate(fit: BTFit, i, j, mu, weights, anchor: int | None, args: Args) -> dict[str, Tensor]:
    """The columns of ratings.csv, each [K]. Ratings are differences to the item `anchor`, or to the mean of all."""
    K, points = len(fit.rewards), args.scale / math.log(10)
    eye = torch.eye(K, dtype=torch.float64)
    differences = eye - (1 / K if anchor is None else eye[anchor])  # [K, K], to be applied to the rewards
    ratings = args.anchor + points * (differences @ fit.rewards)
    V = covariance(fit, i, j, mu, args.l2, weights, args.ties, robust=True)
    half = 1.96 * points * (differences @ V @ differences.T).diagonal().clamp(min=0).sqrt()
    low, high = ratings - half, ratings + half
    columns = {"rating": ratings, "low": low, "high": high}
    if args.bootstrap:
        # Weights from Exp(1) (Rubin 1981), not rows drawn anew: no comparison vanishes, so no refit loses its maximum.
        generator, refits = torch.Generator().manual_seed(args.seed), []
        for _ in range(args.bootstrap):
            draw = -torch.rand(len(i), generator=generator, dtype=torch.float64).log() + 1e-12
            refits.append(fit_bt(i, j, mu, K, args.l2, weights * draw, args.ties, start=fit).rewards)
        quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
        refitted = args.anchor + points * (torch.stack(refits) @ differences.T).quantile(quantiles, 0)  # [2, K]
        columns |= {"bootstrap_low": refitted[0], "bootstrap_high": refitted[1]}
    surely_better, surely_worse = (low > high[:, None]).sum(1), (high < low[:, None]).sum(1)
    return columns | {"rank": 1 + (ratings > ratings[:, None]).sum(1), "rank_low": 1 + surely_better,
                      "rank_high": K - surely_worse,
                      "comparisons": torch.bincount(torch.cat([i, j]), torch.cat([weights, weights]), K)}


def battles(args: Args, out: Path) -> dict:
    names, i, j, mu, weights = read_battles(args.data)
    K = len(names)
    if args.anchor_item is not None and args.anchor_item not in names:
        raise UserError(f"--anchor-item {args.anchor_item}: not in {args.data}: take one of {', '.join(names[:5])} ...")
    try:
        fit = fit_bt(i, j, mu, K, args.l2, weights, args.ties, names=names)
        checked = held_out(i, j, mu, weights, K, args)
    except UserError as error:
        raise UserError(f"--data {args.data}, {error}")
    anchor = None if args.anchor_item is None else names.index(args.anchor_item)
    columns = rate(fit, i, j, mu, weights, anchor, args)
    order = columns["rating"].argsort(descending=True).tolist()
    P = outcome_probabilities(fit.rewards[:, None] - fit.rewards, fit.tie, args.ties)
    P = P[0] + P[1] / 2
    write_csv(out / "ratings.csv", ["item", *columns],
              [[names[k], *(column[k].item() for column in columns.values())] for k in order])
    write_csv(out / "win_matrix.csv", ["item", *(names[k] for k in order)],
              [[names[k], *P[k, order].tolist()] for k in order])

    tie = {"half": "a tie is half a win", "davidson": f"Davidson, nu = {math.exp(fit.tie):.3f}",
           "rao-kupper": f"Rao-Kupper, theta = {fit.tie:.3f}"}[args.ties]
    print(f"{len(i):,} comparisons of {K} items, {(mu == 0.5).double().mean():.0%} ties ({tie}); {fit.iterations} "
          f"Newton steps, gradient norm {fit.gradient_norm:.0e}. 95% intervals by the sandwich"
          f"{' and by bootstrap' if args.bootstrap else ''}:")
    print_ratings([names[k] for k in order], {name: column[order] for name, column in columns.items()})
    print(f"{'all in' if K <= 25 else f'all {K} in'} {out / 'ratings.csv'}\n")
    print(f"P(row beats column), a tie for half; all in {out / 'win_matrix.csv'}:")
    print_table([["", *(f"({n})" for n, _ in enumerate(order[:8], 1))]] +
                [[f"({n}) {names[k][:24]}", *(f"{P[k, m]:.2f}" if k != m else "" for m in order[:8])]
                 for n, k in enumerate(order[:8], 1)])
    print_held_out(checked)
    return {"items": K, "comparisons": len(i), "tie": fit.tie, "loss": fit.loss, "gradient_norm": fit.gradient_norm,
            "iterations": fit.iterations, **checked}


def print_ratings(names: list[str], columns: dict[str, Tensor]) -> None:
    """The first 25 items."""
    kinds = {"95%": "", "bootstrap": "bootstrap_"} if "bootstrap_low" in columns else {"95%": ""}
    table = [["item", "rank", "of", "rating", *kinds, "comparisons"]]
    for k, name in enumerate(names[:25]):
        row = {column: values[k].item() for column, values in columns.items()}
        intervals = [f"{row[kind + 'low']:.0f} {row[kind + 'high']:.0f}" for kind in kinds.values()]
        table.append([name[:40], row["rank"], f"{row['rank_low']}-{row['rank_high']}", f"{row['rating']:.1f}",
                      *intervals, f"{row['comparisons']:g}"])
    print_table(table)


def print_held_out(checked: dict) -> None:
    if not checked["held_out"]:
        print("\n0 comparisons held out: too few")
        return
    print(f"\n{checked['held_out']} comparisons held out, l2 {checked['held_out_l2']:g} for the others:")
    table = [["", "log-loss", "accuracy without ties"]]
    for what, name in (("Bradley-Terry", ""), ("constant", "_constant")):
        log_loss = f"{checked[f'log_loss{name}']:.4f} ± {checked[f'log_loss{name}_se']:.4f}"
        table.append([what, log_loss, f"{checked[f'accuracy{name}']:.1%}"])
    print_table(table)


def write_csv(path: Path, header: list, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, text.getvalue().encode())


# --------------------------------------------------------------------------------------------------------- trajectories

ROWS, COLUMNS, ACTIONS, START = 3, 5, 3, 1  # state = 3 * column + row; 15, after the last column, is the end


def walk(slip: float) -> Tensor:
    """The MDP of the docstring -> P(s' | s, a) [S, A, S + 1]."""
    transitions = torch.zeros(ROWS * COLUMNS, ACTIONS, ROWS * COLUMNS + 1, dtype=torch.float64)
    for state in range(ROWS * COLUMNS):
        column, row = divmod(state, ROWS)
        for action in range(ACTIONS):
            for direction in range(ACTIONS):
                new_row = min(max(row + direction - 1, 0), ROWS - 1)
                new_state = ROWS * (column + 1) + new_row if column + 1 < COLUMNS else ROWS * COLUMNS
                transitions[state, action, new_state] += slip / ACTIONS + (1 - slip) * (direction == action)
    return transitions


def sample_walks(transitions: Tensor, policy: Tensor, num: int, generator) -> tuple[Tensor, Tensor]:
    """policy [S, A] -> states, actions [num, COLUMNS]"""
    state, states, actions = torch.full((num,), START), [], []
    for _ in range(COLUMNS):
        action = torch.multinomial(policy[state], 1, generator=generator)[:, 0]
        states.append(state)
        actions.append(action)
        state = torch.multinomial(transitions[state, action], 1, generator=generator)[:, 0]
    return torch.stack(states, 1), torch.stack(actions, 1)


def action_values(transitions: Tensor, rewards: Tensor, policy: Tensor | None = None) -> Tensor:
    """Q(s, a) [S, A] of a policy, or (None) of the optimal one by value iteration; exact after COLUMNS sweeps."""
    Q = torch.zeros_like(rewards)
    for _ in range(COLUMNS):
        V = Q.max(1).values if policy is None else (policy * Q).sum(1)
        Q = rewards + transitions @ torch.cat([V, V.new_zeros(1)])
    return Q


def identifiable(states_1, actions_1, states_2, actions_2) -> Tensor:
    """What pairs of trajectories [N, T] say about r(s, a): the projection [S A, S A] on the span of the differences of
    their visit counts. (3) sees r through these differences only, so the part of r in the span is identified, and the
    rest is not: a table v that is invisible has the same sum along all trajectories.

    All trajectories start in one state and have T = 5 steps, and (s, a) says which step it is. With slip = 0 the
    invisible v are all of the form psi(s') - psi(s) with psi = const after the end: potential shaping (Ng, Harada &
    Russell 1999), one number for each of the 13 states in reach; 3 * 13 - 13 = 26 are identified. They are the optimal
    advantages, so the optimal policies are too. With slip > 0 each row follows each (s, a) of the middle row, so psi
    may depend on the column only: a constant for each of the 5 steps is all that is lost, and 39 - 5 = 34 are
    identified."""
    difference = visit_differences(states_1, actions_1, states_2, actions_2)
    values, vectors = torch.linalg.eigh(difference.T @ difference)
    seen = vectors[:, values > 1e-9 * values.max()]
    return seen @ seen.T


def visit_differences(states_1, actions_1, states_2, actions_2) -> Tensor:
    """[N, S A]: how much more often the first trajectory of a pair takes action a in state s than the second does."""
    first, second = (F.one_hot(states * ACTIONS + actions, ROWS * COLUMNS * ACTIONS).sum(1)
                     for states, actions in ((states_1, actions_1), (states_2, actions_2)))
    return (first - second).double()


def fit_trajectory_rewards(states_1, actions_1, states_2, actions_2, mu, l2: float) -> Tensor:
    """The table [S, A] that minimises trajectory_loss, of all those the one of least norm: from 0, steps along
    gradients stay in the identifiable span."""
    table = torch.zeros(ROWS * COLUMNS, ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=1000, history_size=50, tolerance_grad=1e-8, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = trajectory_loss(table[states_1, actions_1], table[states_2, actions_2], mu)
        loss = loss + l2 / 2 * table.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    table, pairs = table.detach(), (states_1, actions_1, states_2, actions_2)
    difference, seen = visit_differences(*pairs), identifiable(*pairs)
    p = torch.sigmoid(difference @ table.flatten())
    information = difference.T @ (difference * (p * (1 - p))[:, None]) + torch.eye(len(seen)) - seen
    if l2 == 0 and torch.linalg.eigvalsh(information).min() < 1e-3:  # a standard error above 30 nats: no maximum
        raise UserError(f"--comparisons {len(mu)}: too few, the learned rewards have no finite maximum: "
                        "give more, or pass --l2 0.01")
    return table


def ppo(transitions: Tensor, rewards: Tensor, generator,
        iterations=60, walks=256, epochs=4, clip=0.2, lam=0.95) -> Tensor:
    """Proximal policy optimization (Schulman et al. 2017) of a softmax policy on rewards [S, A] -> policy [S, A].

        max  E min( rho A, clip(rho, 1 - clip, 1 + clip) A ),    rho = pi(a | s) / pi_old(a | s)         (6), their (7)
        A_t = sum_k lam^k delta_{t+k},   delta_t = r_t + V(s_{t+1}) - V(s_t)                             (7), their (11)

    without discount. The advantages are standardised; V is a table that is fitted to the returns A + V."""
    logits = torch.zeros_like(rewards, requires_grad=True)
    values = torch.zeros(len(rewards), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    for _ in range(iterations):
        states, actions = sample_walks(transitions, logits.detach().softmax(1), walks, generator)  # [B, T]
        old_logps, V = logits.detach().log_softmax(1)[states, actions], values.detach()[states]
        deltas = rewards[states, actions] + F.pad(V[:, 1:], (0, 1)) - V
        advantages = torch.zeros_like(deltas)
        for t in reversed(range(COLUMNS)):
            advantages[:, t] = deltas[:, t] + (lam * advantages[:, t + 1] if t + 1 < COLUMNS else 0)
        returns = advantages + V
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(epochs):
            ratio = (logits.log_softmax(1)[states, actions] - old_logps).exp()
            gain = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
            loss = -gain + 0.5 * (values[states] - returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.detach().softmax(1)


def trajectories(args: Args, out: Path) -> dict:
    generator, transitions = torch.Generator().manual_seed(args.seed), walk(args.slip)
    rewards = torch.randn(ROWS * COLUMNS, ACTIONS, generator=generator, dtype=torch.float64)
    uniform = torch.full_like(rewards, 1 / ACTIONS)
    pairs = [tensor for _ in range(2) for tensor in sample_walks(transitions, uniform, args.comparisons, generator)]
    p = bt_probability(*(rewards[states, actions].sum(1) for states, actions in (pairs[:2], pairs[2:])))
    mu = (torch.rand(len(p), generator=generator, dtype=torch.float64) < p).double()
    learned = fit_trajectory_rewards(*pairs, mu, args.l2)
    seen = identifiable(*pairs)
    identified, error = seen @ rewards.flatten(), seen @ (learned - rewards).flatten()
    rank = round(seen.trace().item())
    reward_error = (error.norm() / identified.norm()).item()
    print(f"{len(mu):,} pairs of walks of {COLUMNS} steps identify {rank} directions of the {rewards.numel()} numbers "
          f"r(s, a); there the learned rewards are off by {reward_error:.0%} of the true ones' norm.\n")

    def true_return(policy):
        return (policy * action_values(transitions, rewards, policy)).sum(1)[START].item()

    greedy = F.one_hot(action_values(transitions, learned).argmax(1), ACTIONS).double()
    best, random = action_values(transitions, rewards)[START].max().item(), true_return(uniform)
    by_ppo = true_return(ppo(transitions, learned, generator))
    table = [["policy", "true return", "of the way from random to optimal"]]
    for name, value in (("random", random), ("PPO on the learned reward", by_ppo),
                        ("optimal for the learned reward", true_return(greedy)),
                        ("optimal for the true reward (value iteration)", best)):
        table.append([name, value, f"{(value - random) / (best - random):.1%}"])
    print_table(table)
    return {"identified": rank, "reward_error": reward_error, "return_random": random, "return_ppo": by_ppo,
            "return_optimal": best, "share_of_optimum": (by_ppo - random) / (best - random)}


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    for name, least in {"arms": 2, "comparisons": 1, "simulations": 1, "bootstrap": 0, "l2": 0, "slip": 0}.items():
        if not least <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: must be a number, at least {least}")
    if not 0 < args.scale < math.inf or not math.isfinite(args.anchor) or args.slip > 1:
        raise UserError(f"--scale {args.scale}, --anchor {args.anchor}, --slip {args.slip}: "
                        "scale above 0, anchor finite, slip at most 1")
    began, out = time.perf_counter(), Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "args.json", json.dumps(asdict(args), indent=1).encode())
    results = (battles if args.data else {"bandit": bandit, "trajectories": trajectories}[args.setting])(args, out)
    for name, value in results.items():
        if isinstance(value, float) and not math.isfinite(value):  # accuracy, where all were ties
            results[name] = None
    results["seconds"] = time.perf_counter() - began
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    print(f"saved to {out}")


if __name__ == "__main__":
    run_script(main, Args)
