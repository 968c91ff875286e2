"""Battles between models (or players, or teams) -> ratings with intervals.

With rewards r (nats) and d = r_i - r_j, the models of a battle are

    Bradley & Terry (1952)   P(i wins) = sigma(d), P(j wins) = sigma(-d)                     (1)
    Davidson (1970)          P(i) : P(tie) : P(j) = exp(d/2) : exp(t) : exp(-d/2)            (2)
    Rao & Kupper (1967)      P(i) = sigma(d - t), P(j) = sigma(-d - t), the rest is P(tie)   (3)

In (1) a tie is half a win for each. r and t minimise the negative log-likelihood + l2/2 |r|^2.
A finite minimum needs connected items: each can be reached from each other along edges
winner -> loser, a tie being one both ways (Ford 1957).

A rating is r in points. Intervals are by the sandwich A^-1 B A^-1 (Huber 1967; White 1982),
with A the Hessian and B the sum of squared scores, and by a bootstrap (Rubin 1981).

    python bt_arena.py                               # assets/data/battles.jsonl: a few seconds
    python bt_arena.py --dataset battles.csv --ties davidson --anchor-item gpt-4 --anchor 1200
    python bt_arena.py --dataset football.csv --min-comparisons 20 --largest-group

The file has model_a, model_b, winner (see OUTCOMES), or i, j, mu (1: i won, 0: j won), and
perhaps weight. Names are text. Expect a held-out log-loss below that of a constant.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import networkx
import pandas
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from harness import (
    NonNegative, Positive, UserError, load_rows, run_script, write_atomically, write_json
)


@dataclass
class Args:
    dataset: str = str(Path(__file__).resolve().parent / "assets" / "data" / "battles.jsonl")
    """battles: a .csv, .jsonl, .json or .parquet file"""
    ties: Literal["half", "davidson", "rao-kupper"] = "half"
    """model of ties: half a win for each, equation (2) or equation (3)"""
    min_comparisons: int = 0
    """items with fewer comparisons are left out, until all have as many"""
    largest_group: bool = False
    """keep only the largest group of connected items"""
    l2: NonNegative = 0.0
    """ridge on the rewards: l2 in l2/2 |r|^2"""
    anchor: Annotated[float, (math.isfinite, "a number")] = 1000.0
    """rating of --anchor-item, or else the mean rating, in points"""
    anchor_item: str | None = None
    """item with the rating --anchor; intervals are of differences to it"""
    scale: Positive = 400.0
    """rating points that make odds of 10 to 1; 400 is Elo's"""
    bootstrap: Annotated[int, (lambda x: x >= 0, "0 or more")] = 200
    """refits to reweighted comparisons; 0: no bootstrap"""
    output_dir: str = "runs/bt_arena"
    """directory for args.json, results.json, ratings.csv and win_matrix.csv"""
    seed: int = 0
    """seed of the bootstrap and of the held-out rows"""


# --- battles ---

OUTCOMES = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5, "both_bad": 0.5}


@dataclass
class Battles:
    source: str  # for messages
    names: list[str]  # [K]
    i: Tensor  # [N], indices of names
    j: Tensor  # [N]
    wins: Tensor  # [N], weights of i's
    ties: Tensor  # [N]
    losses: Tensor  # [N]

    def rows(self, chosen: Tensor):
        fields = ("i", "j", "wins", "ties", "losses")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})

    def weights(self) -> Tensor:
        return self.wins + self.ties + self.losses

    def table(self, x: Tensor) -> Tensor:
        """Sums of x [N] by i and j, [K, K]."""
        K = len(self.names)
        return torch.bincount(self.i * K + self.j, x, K * K).view(K, K)

    def comparisons(self) -> Tensor:
        """Of each item, weighted, [K]."""
        table = self.table(self.weights())
        return table.sum(0) + table.sum(1)


def read_battles(args: Args) -> Battles:
    source = f"--dataset {args.dataset}"
    rows = load_rows(args.dataset)
    frame = pandas.DataFrame(rows, dtype=object)  # object: names stay as they are
    columns = ["model_a", "model_b", "winner"] if "winner" in frame else ["i", "j", "mu"]
    if missing := [column for column in columns if column not in frame]:
        raise UserError(f"{source}: no column {missing[0]!r}: give {', '.join(columns)}")
    first, second, outcome = (frame[column].fillna("").map(str) for column in columns)
    won = outcome.map(OUTCOMES) if "winner" in frame else outcome
    mu = pandas.to_numeric(won, errors="coerce")
    ones = pandas.Series(1.0, frame.index)
    weights = pandas.to_numeric(frame.get("weight", ones), errors="coerce")
    checks = {
        "an item has no name": (first.str.strip() != "") & (second.str.strip() != ""),
        "an item is compared with itself": first != second,
        f"winner is none of {', '.join(OUTCOMES)}": won.notna(),
        "mu is not a number from 0 to 1": mu.between(0, 1),
        "mu is not 0, 0.5 or 1: --ties half": mu.isin([0, 0.5, 1]) | (args.ties == "half"),
        "weight is not a positive number": (weights > 0) & (weights < math.inf),
    }
    for problem, good in checks.items():
        if not good.all():
            row = rows[int(good.argmin())]
            values = ", ".join(repr(row.get(column)) for column in columns)
            raise UserError(f"{row.where} ({values}): {problem}: correct it")
    indices, names = pandas.factorize(pandas.concat([first, second]), sort=True)
    i, j = torch.tensor(indices).view(2, -1)
    mu, weights = torch.tensor([mu.tolist(), weights.tolist()], dtype=torch.float64)
    ties = weights * (mu == 0.5)
    wins = (weights - ties) * mu
    return Battles(source, list(names), i, j, wins, ties, weights - ties - wins)


def connected_groups(battles: Battles) -> list[list[str]]:
    """Names, the smallest group first."""
    points = battles.table(battles.wins + battles.ties)
    points += battles.table(battles.losses + battles.ties).T
    graph = networkx.DiGraph(points.nonzero().tolist())
    graph.add_nodes_from(range(len(points)))
    groups = networkx.strongly_connected_components(graph)
    return sorted(([battles.names[k] for k in sorted(group)] for group in groups), key=len)


def leave_out(battles: Battles, args: Args) -> Battles:
    """--min-comparisons and --largest-group, until nothing changes."""
    while True:
        why = f"with fewer than {args.min_comparisons} comparisons"
        kept = battles.comparisons() >= args.min_comparisons
        if kept.all() and args.largest_group:
            why = "outside of the largest group"
            largest = set(connected_groups(battles)[-1])
            kept = torch.tensor([name in largest for name in battles.names])
        if kept.all():
            return battles
        if kept.sum() < 2:
            raise UserError(f"{battles.source}: fewer than two items are left without those {why}: "
                            "change --min-comparisons, or pass --l2 0.01")
        names = [name for name, keep in zip(battles.names, kept) if keep]
        gone = [name for name, keep in zip(battles.names, kept) if not keep]
        print(f"left out: {len(gone)} items {why}: {', '.join(gone[:10])}")
        battles = battles.rows(kept[battles.i] & kept[battles.j])
        index = kept.cumsum(0) - 1
        battles = replace(battles, names=names, i=index[battles.i], j=index[battles.j])


def log_probabilities(d: Tensor, t: Tensor, model: str) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (1), (2), (3): d, t -> log P(i wins), log P(tie), log P(j wins)."""
    if model == "davidson":
        total = torch.stack(torch.broadcast_tensors(d / 2, t, -d / 2)).logsumexp(0)
        return d / 2 - total, t - total, -d / 2 - total
    t = 0 * t if model == "half" else t  # (1) has none
    win, loss = F.logsigmoid(d - t), F.logsigmoid(-d - t)
    tie = (win + loss) / 2 if model == "half" else win + loss + torch.expm1(2 * t).log()
    return win, tie, loss


def losses(log_probs: tuple, battles: Battles) -> Tensor:
    """The negative log-likelihood of each row, [N]."""
    win, tie, loss = log_probs
    return -(battles.wins * win + battles.ties * tie + battles.losses * loss)


def assemble(dd: Tensor, dt: Tensor, tt: Tensor) -> Tensor:
    """Second-order terms in d, t [K, K] -> the matrix for (r, t), [K+1, K+1]."""
    K = len(dd)
    matrix = dd.new_zeros(K + 1, K + 1)
    matrix[:K, :K] = (dd + dd.T).sum(1).diag() - dd - dd.T
    matrix[K, :K] = matrix[:K, K] = dt.sum(1) - dt.sum(0)
    matrix[K, K] = tt.sum()
    return matrix


def objective(x: Tensor, wins: Tensor, ties: Tensor, model: str, l2: float) -> tuple:
    """x = (r, t) [K+1], wins and ties [K, K] -> what is minimised, its gradient and Hessian."""
    rewards, K = x[:-1], len(wins)
    d = (rewards[:, None] - rewards).requires_grad_()
    t = x[K].repeat(K, K).requires_grad_()
    win, tie, _ = log_probabilities(d, t, model)
    value = l2 / 2 * rewards.square().sum() - (wins * win + ties * tie).sum()
    by_d, by_t = grad(value, (d, t), create_graph=True)
    dd, dt = grad(by_d.sum(), (d, t), retain_graph=True)  # entry by entry: pairs do not mix
    tt = grad(by_t.sum(), t)[0]
    by_r = by_d.sum(1) - by_d.sum(0) + l2 * rewards
    hessian = assemble(dd, dt, tt)
    # Equal shifts change nothing: their curvature makes it invertible.
    hessian[:K, :K] += hessian.diagonal()[:K].mean() / K + l2 * torch.eye(K)
    hessian[K, K] += model == "half"  # no t: an inert row
    return value.detach(), torch.cat([by_r, by_t.sum().view(1)]).detach(), hessian


@dataclass
class Fit:
    rewards: Tensor  # [K], nats, mean 0
    t: Tensor  # of equations (2) and (3), a number
    loss: float  # what is minimised, nats
    hessian: Tensor  # [K+1, K+1]


def fit_battles(battles: Battles, model: str, l2: float = 0.0, start: Fit | None = None) -> Fit:
    """Newton's method, in float64, from another fit if there is one."""
    groups = [battles.names] if start or l2 else connected_groups(battles)
    if len(groups) > 1:
        smallest = " ".join(str(group[:10]) for group in groups[:10])
        raise UserError(f"{battles.source}: no finite ratings for {len(groups)} groups of items "
                        f"between which wins go one way or there are none: {smallest}: "
                        "pass --largest-group, --min-comparisons 20 or --l2 0.01")
    tied = battles.ties > 0
    if model != "half" and (tied.all() or not tied.any()):
        raise UserError(f"--ties {model}: all comparisons are ties, or none is: use --ties half")
    wins = battles.table(battles.wins) + battles.table(battles.losses).T
    ties, K = battles.table(battles.ties), len(battles.names)
    x = torch.zeros(K + 1, dtype=torch.float64)
    x[K] = 1.0 if model == "rao-kupper" else 0.0
    x = torch.cat([start.rewards, start.t.view(1)]) if start else x
    loss, gradient, hessian = objective(x, wins, ties, model, l2)
    for _ in range(100):
        step = torch.linalg.solve(hessian, gradient)
        last = step.abs().max() < 1e-7  # the next one would be about 1e-14
        before = loss * (1 + 1e-12)  # room for rounding
        loss, gradient, hessian = objective(x - step, wins, ties, model, l2)
        while not loss <= before:  # too long, or nan: in (3), t must be positive
            step /= 2
            loss, gradient, hessian = objective(x - step, wins, ties, model, l2)
        x = x - step
        if x[K] > 10:  # r and t run off together
            raise UserError(f"--ties {model}: no finite t fits, for want of wins in both "
                            "directions: use --ties half, or pass --l2 0.01")
        if last:
            return Fit(x[:K] - x[:K].mean(), x[K], loss.item(), hessian)
    raise UserError("no convergence in 100 Newton steps: pass --l2 0.01")


def covariance(fit: Fit, battles: Battles, model: str) -> Tensor:
    """Of the centred rewards, [K, K]: the sandwich."""
    d = (fit.rewards[battles.i] - fit.rewards[battles.j]).requires_grad_()
    t = fit.t.repeat(len(d)).requires_grad_()
    by_d, by_t = grad(losses(log_probabilities(d, t, model), battles).sum(), (d, t))
    squares = [battles.table(x) for x in (by_d**2, by_d * by_t, by_t**2)]
    inverse = torch.linalg.inv(fit.hessian)
    sandwich = (inverse @ assemble(*squares) @ inverse)[:-1, :-1]
    return sandwich - sandwich.mean(0) - sandwich.mean(1, keepdim=True) + sandwich.mean()


def rate(fit: Fit, battles: Battles, args: Args) -> pandas.DataFrame:
    """ratings.csv, the best item first."""
    K = len(battles.names)
    points = args.scale / math.log(10)
    eye = torch.eye(K, dtype=torch.float64)
    anchor = None if args.anchor_item is None else battles.names.index(args.anchor_item)
    differences = eye - (eye.mean(0) if anchor is None else eye[anchor])  # [K, K], of rewards
    rating = args.anchor + points * differences @ fit.rewards
    variances = (differences @ covariance(fit, battles, args.ties) @ differences.T).diagonal()
    half = 1.96 * points * variances.clamp(min=0).sqrt()
    low, high = rating - half, rating + half
    columns = {"rating": rating, "low": low, "high": high}
    if args.bootstrap:
        generator = torch.Generator().manual_seed(args.seed)
        refits = []
        for _ in range(args.bootstrap):  # weights from Exp(1): no comparison vanishes
            draw = torch.rand(len(battles.i), generator=generator, dtype=torch.float64)
            draw = -draw.log() + 1e-12
            wins, ties, losses = battles.wins * draw, battles.ties * draw, battles.losses * draw
            again = replace(battles, wins=wins, ties=ties, losses=losses)
            refits.append(fit_battles(again, args.ties, args.l2, fit).rewards)
        refitted = args.anchor + points * torch.stack(refits) @ differences.T
        columns["bootstrap_low"] = refitted.quantile(0.025, 0)
        columns["bootstrap_high"] = refitted.quantile(0.975, 0)
    columns["rank"] = 1 + (rating > rating[:, None]).sum(1)
    columns["rank_low"] = 1 + (low > high[:, None]).sum(1)
    columns["rank_high"] = K - (high < low[:, None]).sum(1)
    columns["comparisons"] = battles.comparisons()
    columns = {name: column.numpy() for name, column in columns.items()}
    frame = pandas.DataFrame(columns, index=pandas.Index(battles.names, name="item"))
    return frame.sort_values("rating", ascending=False)


def score(log_probs: tuple, battles: Battles) -> dict:
    """Log-loss (nats per comparison), and accuracy without ties."""
    weights, loss = battles.weights(), losses(log_probs, battles)
    mean = loss.sum() / weights.sum()
    se = (loss - weights * mean).square().sum().sqrt() / weights.sum()
    decided = battles.wins + battles.losses
    right = torch.sign((log_probs[0] - log_probs[2]) * (battles.wins - battles.losses))
    accuracy = 0.5 + 0.5 * (right * decided).sum() / decided.sum()
    return {"log_loss": mean.item(), "log_loss_se": se.item(), "accuracy": accuracy.item()}


def held_out(battles: Battles, args: Args) -> dict:
    """Fit nine tenths of the rows, score the others; so too a constant prediction."""
    order = torch.randperm(len(battles.i), generator=torch.Generator().manual_seed(args.seed))
    size = max(1, len(order) // 10)
    test, train = battles.rows(order[:size]), battles.rows(order[size:])
    sides = replace(train, names=["first", "second"], i=0 * train.i, j=0 * train.j + 1)
    for l2 in (args.l2, max(args.l2, 0.1)):  # an item may have lost its only win
        with contextlib.suppress(UserError):
            fit = fit_battles(train, args.ties, l2)
            side_fit = fit_battles(sides, args.ties, l2)
            break
    else:
        return {"held_out": 0}
    d = fit.rewards[test.i] - fit.rewards[test.j]
    scores = score(log_probabilities(d, fit.t, args.ties), test)
    d = (side_fit.rewards[0] - side_fit.rewards[1]).expand_as(d)
    constant = score(log_probabilities(d, side_fit.t, args.ties), test)
    constant = {f"constant_{name}": value for name, value in constant.items()}
    return {"held_out": size, "held_out_l2": l2, **scores, **constant}


def main(args: Args) -> None:
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", asdict(args))
    battles = leave_out(read_battles(args), args)
    names, K = battles.names, len(battles.names)
    if args.anchor_item not in [None, *names]:
        raise UserError(f"--anchor-item {args.anchor_item}: not in the data, or left out")
    fit = fit_battles(battles, args.ties, args.l2)
    checked = held_out(battles, args)
    ratings = rate(fit, battles, args)
    d = fit.rewards[:, None] - fit.rewards
    win, _, loss = log_probabilities(d, fit.t, args.ties)
    P = (1 + win.exp() - loss.exp()) / 2  # a tie is half a win
    wins = pandas.DataFrame(P.numpy(), names, names).loc[ratings.index, ratings.index]
    write_atomically(out / "ratings.csv", ratings.to_csv().encode())
    write_atomically(out / "win_matrix.csv", wins.to_csv(index_label="item").encode())

    print(f"{len(battles.i):,} comparisons of {K} items, t = {fit.t:.3f}; 95% intervals:")
    print(ratings.head(25).to_string(float_format="%.1f"))
    print("\nHeld-out comparisons:")
    print(pandas.Series(checked).to_string(float_format="%.4f"))
    results = {"items": K, "comparisons": len(battles.i), "t": fit.t.item(), "loss": fit.loss}
    write_json(out / "results.json", results | checked)
    print(f"saved to {out}")


if __name__ == "__main__":
    run_script(main, Args)
