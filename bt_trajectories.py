"""Bradley-Terry on trajectories: learn a reward from compared walks, then PPO on it.

The judge of two trajectories adds up rewards r(s, a) (Christiano et al. 2017, equation 1):

    P[tau1 > tau2] = sigma( sum_t r(s1_t, a1_t) - sum_t r(s2_t, a2_t) )                  (1)

With mu = 1 where tau1 was preferred and 0 where tau2 was, maximum likelihood minimises

    L(r) = - sum_n [ mu_n log P_n + (1 - mu_n) log(1 - P_n) ]   ( + l2/2 |r|^2 )         (2)

The world has 5 columns of 3 rows. A walker starts in the middle of the first column. Each of
5 actions moves it one column to the right, and a row up (0), straight on (1) or a row down
(2). At a wall it keeps its row. With probability --slip the direction is random. r(s, a)
is from N(0, 1). The pairs are random walks.

    python bt_trajectories.py --slip 0.1                # the default: a few seconds

Expect a policy within 1% of the optimum.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import UserError, print_table, run_script, write_json


@dataclass
class Args:
    comparisons: int = 5000
    """simulated pairs of walks"""
    slip: float = 0.1
    """probability that the walker's direction is random"""
    l2: float = 0.0
    """ridge on the rewards: l2 in l2/2 |r|^2"""
    output_dir: str = "runs/bt_trajectories"
    """directory for args.json and results.json"""
    seed: int = 0
    """seed of the true rewards, of the walks and of PPO"""


# --- the world ---

ROWS, COLUMNS, ACTIONS = 3, 5, 3
STATES, START = ROWS * COLUMNS, 1  # state = 3 * column + row; the number 15 is the end
# A walk [T] holds numbers 3 * state + action: indices of r(s, a).flatten().


def transition_probabilities(slip: float) -> Tensor:
    """-> P(s' | s, a), [S, A, S + 1]."""
    P = torch.zeros(STATES, ACTIONS, STATES + 1, dtype=torch.float64)
    for state in range(STATES):
        column, row = divmod(state, ROWS)
        for direction in range(ACTIONS):
            new_row = min(max(row + direction - 1, 0), ROWS - 1)
            new_state = min(ROWS * (column + 1) + new_row, STATES)
            P[state, :, new_state] += slip / ACTIONS
            P[state, direction, new_state] += 1 - slip
    return P


def sample_walks(P: Tensor, policy: Tensor, num: int, generator) -> Tensor:
    """Transitions P [S, A, S + 1], policy [S, A] -> walks [num, T], T = 5."""
    state = torch.full((num,), START)
    steps = []
    for _ in range(COLUMNS):
        action = torch.multinomial(policy[state], 1, generator=generator)[:, 0]
        steps.append(state * ACTIONS + action)
        state = torch.multinomial(P[state, action], 1, generator=generator)[:, 0]
    return torch.stack(steps, 1)


def action_values(P: Tensor, rewards: Tensor, policy: Tensor | None = None) -> Tensor:
    """Q(s, a) [S, A] of a policy, or without one the optimal Q by value iteration."""
    Q = torch.zeros_like(rewards)
    for _ in range(COLUMNS):  # exact after as many sweeps as there are steps
        V = Q.max(1).values if policy is None else (policy * Q).sum(1)
        Q = rewards + P @ F.pad(V, (0, 1))  # the end is worth 0
    return Q


def expected_return(P: Tensor, rewards: Tensor, policy: Tensor) -> float:
    return (policy * action_values(P, rewards, policy)).sum(1)[START].item()


# --- rewards from comparisons ---


def trajectory_loss(rewards_1: Tensor, rewards_2: Tensor, mu: Tensor) -> Tensor:
    """Equation (2): rewards of each step [N, T] (0 after the end), mu [N] -> the sum, nats."""
    margins = rewards_1.sum(-1) - rewards_2.sum(-1)
    return -(mu * F.logsigmoid(margins) + (1 - mu) * F.logsigmoid(-margins)).sum()


def visit_differences(first: Tensor, second: Tensor) -> Tensor:
    """Walks [N, T] -> visits of each (s, a) by the first less the second, [N, S A]."""
    size = STATES * ACTIONS
    return (F.one_hot(first, size).sum(1) - F.one_hot(second, size).sum(1)).double()


def identifiable(first: Tensor, second: Tensor) -> Tensor:
    """What the pairs say about r(s, a): a projection [S A, S A].

    Equation (1) sees r through differences of visits only. The part of r in their span is
    identified. An invisible table v has the same sum along all walks.

    Without slip, all such v are psi(s') - psi(s) with psi constant after the end: potential
    shaping (Ng, Harada & Russell 1999), one number for each of the 13 states in reach. Then
    3 * 13 - 13 = 26 directions are identified: the optimal advantages, and so the optimal
    policies. With slip, each row can follow the middle row, so psi depends on the column
    only. A constant per step is lost: 39 - 5 = 34 directions.
    """
    difference = visit_differences(first, second)
    values, vectors = torch.linalg.eigh(difference.T @ difference)
    seen = vectors[:, values > 1e-9 * values.max()]
    return seen @ seen.T


def fit_rewards(first: Tensor, second: Tensor, mu: Tensor, l2: float) -> Tensor:
    """The minimum of (2) in the identifiable span, [S A], by Newton's method."""
    def loss(rewards):
        data = trajectory_loss(rewards[first], rewards[second], mu)
        return data + l2 / 2 * rewards.square().sum()

    rewards = torch.zeros(STATES * ACTIONS, dtype=torch.float64)
    invisible = torch.eye(len(rewards)) - identifiable(first, second)
    step = torch.ones_like(rewards)
    while step.abs().max() > 1e-8:
        gradient = torch.func.grad(loss)(rewards)
        hessian = torch.func.hessian(loss)(rewards) + invisible
        if l2 == 0 and torch.linalg.eigvalsh(hessian).min() < 1 / 30**2:  # standard error 30 nats
            raise UserError(f"--comparisons {len(mu)}: too few for finite rewards: "
                            "give more, or pass --l2 0.01")
        step = torch.linalg.solve(hessian, gradient)
        while loss(rewards - step) > loss(rewards):  # too long, or only rounding is left
            step = step / 2
        rewards = rewards - step
    return rewards


# --- PPO ---


def ppo(P: Tensor, rewards: Tensor, generator) -> Tensor:
    """Proximal policy optimization (Schulman et al. 2017) of a softmax policy -> policy [S, A].

        max  E min( rho A, clip(rho, 0.8, 1.2) A ),   rho = pi(a | s) / pi_old(a | s)
        A_t = delta_t + 0.95 A_{t+1},   delta_t = r_t + V(s_{t+1}) - V(s_t)

    There is no discount. Advantages are standardised. V is fitted to the returns A + V.
    """
    logits = torch.zeros_like(rewards, requires_grad=True)  # [S, A]
    values = torch.zeros(STATES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    for _ in range(60):
        walks = sample_walks(P, logits.detach().softmax(1), 256, generator)  # [N, T]
        states = walks // ACTIONS
        old_logps = logits.detach().log_softmax(1).flatten()[walks]
        V = values.detach()[states]
        deltas = rewards.flatten()[walks] + F.pad(V[:, 1:], (0, 1)) - V
        advantages = deltas.clone()
        for t in reversed(range(COLUMNS - 1)):
            advantages[:, t] += 0.95 * advantages[:, t + 1]
        returns = advantages + V
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for _ in range(4):
            ratio = (logits.log_softmax(1).flatten()[walks] - old_logps).exp()
            gain = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
            loss = -gain + 0.5 * (values[states] - returns).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.detach().softmax(1)


def main(args: Args) -> None:
    if args.comparisons < 1 or not 0 <= args.slip <= 1 or not 0 <= args.l2 < math.inf:
        raise UserError(f"--comparisons {args.comparisons}, --slip {args.slip}, --l2 {args.l2}: "
                        "must be at least 1, from 0 to 1, at least 0")
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", asdict(args))
    generator = torch.Generator().manual_seed(args.seed)
    P = transition_probabilities(args.slip)
    rewards = torch.randn(STATES, ACTIONS, generator=generator, dtype=torch.float64)
    uniform = torch.full_like(rewards, 1 / ACTIONS)
    first = sample_walks(P, uniform, args.comparisons, generator)
    second = sample_walks(P, uniform, args.comparisons, generator)
    p = torch.sigmoid(visit_differences(first, second) @ rewards.flatten())  # equation (1)
    mu = (torch.rand(len(p), generator=generator, dtype=torch.float64) < p).double()
    learned = fit_rewards(first, second, mu, args.l2).view_as(rewards)
    seen = identifiable(first, second)
    identified = round(seen.trace().item())
    error = (seen @ (learned - rewards).flatten()).norm() / (seen @ rewards.flatten()).norm()
    print(f"{len(mu):,} pairs of walks identify {identified} directions of {rewards.numel()}; "
          f"the rewards are off by {error:.0%} there\n")
    greedy = F.one_hot(action_values(P, learned).argmax(1), ACTIONS).double()
    returns = {
        "random": expected_return(P, rewards, uniform),
        "ppo": expected_return(P, rewards, ppo(P, learned, generator)),
        "planned": expected_return(P, rewards, greedy),
        "optimal": action_values(P, rewards)[START].max().item(),
    }
    print("PPO and planning use the learned reward, the optimum the true one:")
    print_table([["policy", "true return"], *returns.items()])
    share = (returns["ppo"] - returns["random"]) / (returns["optimal"] - returns["random"])
    print(f"PPO goes {share:.1%} of the way from random to optimal.")
    results = {f"return_{name}": value for name, value in returns.items()}
    results |= {"identified": identified, "reward_error": error.item(), "share_of_optimum": share}
    write_json(out / "results.json", results)
    print(f"saved to {out}")


if __name__ == "__main__":
    run_script(main, Args)
