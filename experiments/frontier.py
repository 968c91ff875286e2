"""Reward against KL: every method under the curve that no policy can exceed.

The curve is assets/frontier.json: pi* = pi_ref exp(r / beta) / Z for beta from 10 to 0.4, by
re-weighting samples of tiny-sft and of six policies trained towards it (assets/make.py, optimum()
and make_frontier()). The methods that want a reward have the gold one (PPO's critic starts from
tiny-rm); DPO has 4,000 noisy comparisons by it instead. Every point is one run of a script on one
seed, or one round or one n of it, on held-out prompts:

    share of the optimum = (reward - reward of tiny-sft) / (what pi* gains at the same KL)

Its standard error is that of both rewards and of the KL, the latter times the curve's slope (the
delta method).

    pip install -r experiments/requirements.txt
    python experiments/frontier.py              # two runs at a time; finished runs are kept
    python experiments/frontier.py --seeds 0 --methods DPO best-of-n

Writes experiments/results/frontier.json and .png. A point above the curve by more than its standard
error is ringed in red and named; near the optimum some are expected to be, one in six of those
that are at it.
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs import (
    ASSETS, DATA, GOLD, RESULTS, ROOT, TO_PI_STAR, directory_of, mean, metrics_of, run_all,
    variance_of_mean
)

sys.path.insert(0, str(ROOT))

from harness import print_table, run_script  # noqa: E402

PROMPTS = 1000  # held-out prompts per evaluation
SELDOM = ["--eval-every", 10**6, "--save-every", 25, "--eval-prompts", PROMPTS]
PPO = ["ppo_rlhf.py", "--reward-fn", GOLD, "--critic-model", ASSETS / "tiny-rm", *SELDOM]
GRPO = ["grpo.py", "--dataset", DATA / "review_prompts.jsonl",
        "--eval-dataset", DATA / "review_prompts_heldout.jsonl",
        "--reward-fn", GOLD, *TO_PI_STAR, *SELDOM]
GOLD_ROUNDS = ["--reward-fn", GOLD, "--eval-prompts", PROMPTS]
RUNS = {  # method -> {setting: command}
    "PPO": {f"beta {beta}": [*PPO, "--beta", beta] for beta in (0.5, 1.0)},
    "GRPO": {f"beta {beta}": [*GRPO, "--beta", beta] for beta in (0.5, 1.0)},
    "DPO": {f"beta {beta}": ["dpo.py", "--beta", beta, *SELDOM] for beta in (0.1, 0.3, 1.0)},
    "best-of-n": {
        "n 64": ["best_of_n.py", "--reward-fn", GOLD, "--split", f"train[:{PROMPTS // 4}]"],
    },
    "expert iteration": {
        "n 4": ["expert_iteration.py", "--samples-per-prompt", 4, *GOLD_ROUNDS],
    },
    "Quark": {"beta 0.5": ["reward_conditioning.py", "--beta", 0.5, *GOLD_ROUNDS]},
}
COLORS = {"PPO": "C3", "GRPO": "C1", "DPO": "C0", "best-of-n": "C2", "expert iteration": "C4",
          "Quark": "C5"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds: one run of every method for each"""
    methods: list[str] = field(default_factory=lambda: list(RUNS))
    """methods to run; default: all"""
    processes: int = 2
    """runs at a time, one thread each"""
    output_dir: str = str(ROOT / "runs" / "frontier")
    """directory for the runs; the results go to experiments/results"""


# --- the curve ---


def gain_and_slope(curve: list[tuple[float, float]], kl: float) -> tuple[float, float] | None:
    """(KL, gain) of the curve, from (0, 0) on -> what pi* gains at this KL, and the slope; None
    beyond the end."""
    for (kl_0, gain_0), (kl_1, gain_1) in zip(curve, curve[1:]):
        if kl_0 < kl <= kl_1:
            slope = (gain_1 - gain_0) / (kl_1 - kl_0)
            return gain_0 + slope * (kl - kl_0), slope
    return None


def share_of_optimum(curve, gain: float, gain_se: float, kl: float, kl_se: float) -> tuple:
    """The gain, divided by that of pi* at the same KL, and its standard error; None, None beyond
    the curve's end."""
    at = gain_and_slope(curve, kl)
    if at is None:
        return None, None
    optimum, slope = at
    share = gain / optimum
    return share, math.hypot(gain_se, share * slope * kl_se) / optimum


def judged(point: dict, curve) -> dict:
    """Adds the share of the optimum, its standard error, and whether it exceeds 1 by more."""
    gain = point["reward"] - point["reward_ref"]
    gain_se = math.hypot(point["reward_se"], point["reward_ref_se"])
    share, se = share_of_optimum(curve, gain, gain_se, point["kl"], point["kl_se"])
    above = share is not None and share - 1 > se
    return point | {"share_of_optimum": share, "share_se": se, "above": above}


# --- the points ---


def points_of(method: str, setting: str, directory: Path, results: dict) -> list[dict]:
    """One per run, or one for each n of best-of-n and for each round of the methods with rounds."""
    names = ("kl", "kl_se", "reward", "reward_se")
    found = {setting: {name: results[name] for name in names}}
    reference = {"reward_ref": results["reward_ref"],
                 "reward_ref_se": results["reward_ref_sd"] / PROMPTS**0.5}
    if method == "best-of-n":  # its n = 1 is the reference, on the same prompts
        reference = {"reward_ref": results["reward_n1"], "reward_ref_se": results["reward_se_n1"]}
        found = {f"n {n}": {name: results[f"{name}_n{n}"] for name in names}
                 for n in (2, 4, 8, 16, 32, 64)}
    if method in ("expert iteration", "Quark"):
        rounds = [row for row in metrics_of(directory) if row["phase"] == "eval" and row["step"]]
        found = {f"{setting}, round {n}": {name: row[name] for name in names}
                 for n, row in enumerate(rounds, 1)}
    return [{"setting": name, **point, **reference} for name, point in found.items()]


def summary(points: list[dict]) -> list[dict]:
    """Means over seeds. The mean share's standard error is that of the points, or that of the
    seeds where they differ by more."""
    groups = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"]), []).append(point)
    rows = []
    for (method, setting), group in groups.items():
        row = {"method": method, "setting": setting, "seeds": len(group)}
        row |= {name: mean([p[name] for p in group]) for name in ("kl", "reward")}
        shares = [p["share_of_optimum"] for p in group if p["share_of_optimum"] is not None]
        row["share_of_optimum"] = row["share_se"] = None
        if len(shares) == len(group):
            row["share_of_optimum"] = mean(shares)
            of_points = mean([p["share_se"] ** 2 for p in group]) / len(group)
            row["share_se"] = max(of_points, variance_of_mean(shares)) ** 0.5
        rows.append(row)
    return rows


def draw(points: list[dict], curve, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2))
    left.plot(*zip(*curve), color="black", label="optimum: no policy can be above")
    right.axhline(1.0, color="black")
    for method in dict.fromkeys(point["method"] for point in points):
        own = [point for point in points if point["method"] == method]
        style = {"fmt": "o", "markersize": 4, "color": COLORS[method], "elinewidth": 0.8}
        gains = [p["reward"] - p["reward_ref"] for p in own]
        left.errorbar([p["kl"] for p in own], gains, label=method, xerr=[p["kl_se"] for p in own],
                      yerr=[p["reward_se"] for p in own], **style)
        shared = [p for p in own if p["share_of_optimum"] is not None]
        right.errorbar([p["kl"] for p in shared], [p["share_of_optimum"] for p in shared],
                       yerr=[p["share_se"] for p in shared], **style)
    above = [point for point in points if point["above"]]
    if above:
        ring = {"s": 90, "facecolors": "none", "edgecolors": "red"}
        kls, gains = [p["kl"] for p in above], [p["reward"] - p["reward_ref"] for p in above]
        left.scatter(kls, gains, label="above the optimum by more than its standard error", **ring)
        right.scatter(kls, [p["share_of_optimum"] for p in above], **ring)
    for axis, label, top in ((left, "gain in gold reward", None),
                             (right, "share of the optimum", 1.15)):
        axis.set(xlabel="KL to the reference, nats", ylabel=label, xlim=(0, None), ylim=(0, top))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    began = time.time()
    table = json.loads((ASSETS / "frontier.json").read_text())
    curve = [(0.0, 0.0)] + [(p["kl"], p["reward"] - table["reward_ref"]) for p in table["points"]]
    wanted = [(method, setting, seed)
              for seed in args.seeds for method in args.methods for setting in RUNS[method]]
    directories = {key: directory_of(args.output_dir, *key) for key in wanted}
    commands = {directories[method, setting, seed]: [*RUNS[method][setting], "--seed", seed]
                for method, setting, seed in wanted}
    results = run_all(commands, args.processes)

    points = []
    for method, setting, seed in wanted:
        directory = directories[method, setting, seed]
        for point in points_of(method, setting, directory, results[directory]):
            points.append(judged({"method": method, "seed": seed, **point}, curve))
    RESULTS.mkdir(exist_ok=True)
    rows = summary(points)
    seconds = sum(result["seconds"] for result in results.values())
    saved = {"points": points, "summary": rows, "run_seconds": seconds}
    (RESULTS / "frontier.json").write_text(json.dumps(saved, indent=1) + "\n")
    draw(points, curve, RESULTS / "frontier.png")

    def share(p):
        if p["share_se"] is None:
            return "beyond the curve"
        return f"{p['share_of_optimum']:.1%} ± {p['share_se']:.1%}"

    lines = [["method", "setting", "KL, nats", "reward", "share of the optimum"]]
    for row in rows:
        means = f"{row['kl']:.2f}", f"{row['reward']:.2f}"
        lines.append([row["method"], row["setting"], *means, share(row)])
    print_table(lines)
    for p in points:
        if p["above"]:
            print(f"ABOVE THE OPTIMUM: {p['method']}, {p['setting']}, seed {p['seed']}: {share(p)}")
    print(f"{len(points)} points of {len(results)} runs, {seconds / 60:.0f} minutes of runs; "
          f"this call took {(time.time() - began) / 60:.1f} minutes\n"
          f"saved to {RESULTS / 'frontier.json'} and .png")



if __name__ == "__main__":
    run_script(main, Args)
