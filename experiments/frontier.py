"""Reward against KL: every method under the curve that no policy can exceed.

The curve is assets/frontier.json: pi* = pi_ref exp(r / beta) / Z for beta from 10 to 0.4, by re-weighting samples of
tiny-sft and of six policies trained towards it (assets/make.py, optimum() and make_frontier()). The methods that want a
reward have the gold one (PPO's critic starts from tiny-rm); DPO has 4,000 noisy comparisons by it instead. Every point
is one run of a script on one seed, or one round or one n of it, on held-out prompts:

    share of the optimum = (reward - reward of tiny-sft) / (what pi* gains at the same KL)

Its standard error is that of both rewards and of the KL, the latter times the curve's slope (the delta method).

    pip install -r experiments/requirements.txt
    python experiments/frontier.py               # two runs at a time; finished ones are kept, unfinished ones go on
    python experiments/frontier.py --seeds 0 --methods DPO best-of-n

Writes experiments/results/frontier.json and .png. A point above the curve by more than its standard error is ringed in
red and named; near the optimum some are expected to be, one in six of those that are at it.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs import ASSETS, DATA, GOLD, RESULTS, ROOT, mean, metrics_of, run_all

sys.path.insert(0, str(ROOT))

from common import print_table, run_script  # noqa: E402

PROMPTS = 1000  # held-out ones, of each evaluation
REVIEWS = ["--dataset", DATA / "review_prompts.jsonl", "--eval-dataset", DATA / "review_prompts_heldout.jsonl"]
SELDOM = ["--eval-every", 10**6, "--save-every", 25, "--eval-prompts", PROMPTS]
# GRPO's flags are those under which its fixed point is pi*, with beta G / (G - 1): see grpo.py and tests/test_grpo.py
TO_PI_STAR = ["--no-scale", "--kl-correction", "--ratio", "sequence", "--group-size", 8, "--max-new-tokens", 64,
              "--eval-samples", 1, "--batch-size", 32, "--epochs", 2, "--learning-rate", 5e-4]
RUNS = {  # method -> {setting: command}
    "PPO": {f"beta {beta}": ["ppo_rlhf.py", "--reward-fn", GOLD, "--critic-model", ASSETS / "tiny-rm", "--beta", beta,
                             *SELDOM] for beta in (0.5, 1.0)},
    "GRPO": {f"beta {beta}": ["grpo.py", *REVIEWS, "--reward-fn", GOLD, "--beta", beta, *TO_PI_STAR, *SELDOM]
             for beta in (0.5, 1.0)},
    "DPO": {f"beta {beta}": ["dpo.py", "--beta", beta, *SELDOM] for beta in (0.1, 0.3, 1.0)},
    "best-of-n": {"n 64": ["best_of_n.py", "--reward-fn", GOLD, "--split", f"train[:{PROMPTS // 4}]"]},
    "expert iteration": {f"n {n}": ["expert_iteration.py", "--reward-fn", GOLD, "--n", n, "--eval-prompts", PROMPTS]
                         for n in (4,)},
    "Quark": {f"beta {beta}": ["reward_conditioning.py", "--reward-fn", GOLD, "--beta", beta, "--eval-prompts", PROMPTS]
              for beta in (0.5,)},
}
COLORS = {"PPO": "C3", "GRPO": "C1", "DPO": "C0", "best-of-n": "C2", "expert iteration": "C4", "Quark": "C5"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """one run of everything for each"""
    methods: list[str] = field(default_factory=lambda: list(RUNS))
    """which of them; default: all"""
    processes: int = 2
    """runs at a time, one thread each"""
    output_dir: str = str(ROOT / "runs" / "frontier")
    """of the runs; the results go to experiments/results"""


# ------------------------------------------------------------------------------------------------------------ the curve


def gain_and_slope(curve: list[tuple[float, float]], kl: float) -> tuple[float, float] | None:
    """(KL, gain) of the curve, from (0, 0) on -> what pi* gains at this KL, and the slope; None beyond the end."""
    for (kl_0, gain_0), (kl_1, gain_1) in zip(curve, curve[1:]):
        if kl_0 < kl <= kl_1:
            slope = (gain_1 - gain_0) / (kl_1 - kl_0)
            return gain_0 + slope * (kl - kl_0), slope
    return None


def judged(point: dict, curve) -> dict:
    """Adds the share of the optimum, its standard error, and whether it exceeds 1 by more than that."""
    at = gain_and_slope(curve, point["kl"])
    if at is None:
        return point | {"share_of_optimum": None, "share_se": None, "above": False}
    optimum, slope = at
    gain = point["reward"] - point["reward_ref"]
    share = gain / optimum
    variance = point["reward_se"] ** 2 + point["reward_ref_se"] ** 2 + (share * slope * point["kl_se"]) ** 2
    se = variance**0.5 / optimum
    return point | {"share_of_optimum": share, "share_se": se, "above": share - 1 > se}


# ----------------------------------------------------------------------------------------------------------- the points


def points_of(method: str, setting: str, directory: Path, results: dict) -> list[dict]:
    """One for a run, or one for each n of best-of-n and for each round of the methods that have rounds."""
    names = ("kl", "kl_se", "reward", "reward_se")
    ref = {"reward_ref": results["reward_ref"], "reward_ref_se": results["reward_ref_sd"] / PROMPTS**0.5}
    if method == "best-of-n":  # its n = 1 is the reference, on the same prompts
        ref = {"reward_ref": results["reward_n1"], "reward_ref_se": results["reward_se_n1"]}
        return [{"setting": f"n {n}", **{name: results[f"{name}_n{n}"] for name in names}, **ref}
                for n in (2, 4, 8, 16, 32, 64)]
    if method in ("expert iteration", "Quark"):
        rounds = [row for row in metrics_of(directory) if "win_rate" in row and row["step"]]
        return [{"setting": f"{setting}, round {n}", **{name: row[name] for name in names}, **ref}
                for n, row in enumerate(rounds, 1)]
    return [{"setting": setting, **{name: results[name] for name in names}, **ref}]


def summary(points: list[dict]) -> list[dict]:
    """Means over seeds; the mean share's standard error is the larger of what the points say and what they spread."""
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
            told = mean([p["share_se"] ** 2 for p in group]) / len(group)
            spread = sum((s - row["share_of_optimum"]) ** 2 for s in shares) / max(1, len(group) - 1) / len(group)
            row["share_se"] = max(told, spread) ** 0.5
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
        left.errorbar([p["kl"] for p in own], [p["reward"] - p["reward_ref"] for p in own], label=method,
                      xerr=[p["kl_se"] for p in own], yerr=[p["reward_se"] for p in own], **style)
        shared = [p for p in own if p["share_of_optimum"] is not None]
        right.errorbar([p["kl"] for p in shared], [p["share_of_optimum"] for p in shared],
                       yerr=[p["share_se"] for p in shared], **style)
    above = [point for point in points if point["above"]]
    if above:
        ring = {"s": 90, "facecolors": "none", "edgecolors": "red"}
        left.scatter([p["kl"] for p in above], [p["reward"] - p["reward_ref"] for p in above], **ring,
                     label="above the optimum by more than its standard error")
        right.scatter([p["kl"] for p in above], [p["share_of_optimum"] for p in above], **ring)
    left.set(xlabel="KL to the reference, nats", ylabel="gain in gold reward", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="KL to the reference, nats", ylabel="share of the optimum", xlim=(0, None), ylim=(0, 1.15))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    began = time.time()
    table = json.loads((ASSETS / "frontier.json").read_text())
    curve = [(0.0, 0.0)] + [(p["kl"], p["reward"] - table["reward_ref"]) for p in table["points"]]
    wanted = [(method, setting, seed) for seed in args.seeds for method in args.methods for setting in RUNS[method]]
    directories = {key: Path(args.output_dir) / "_".join(map(str, key)).replace(" ", "_") for key in wanted}
    results = run_all({directories[key]: [*RUNS[key[0]][key[1]], "--seed", key[2]] for key in wanted}, args.processes)

    points = []
    for method, setting, seed in wanted:
        directory = directories[method, setting, seed]
        points += [judged({"method": method, "seed": seed, **point}, curve)
                   for point in points_of(method, setting, directory, results[directory])]
    RESULTS.mkdir(exist_ok=True)
    rows = summary(points)
    seconds = sum(result["seconds"] for result in results.values())  # of all runs, whenever they were made
    saved = {"points": points, "summary": rows, "run_seconds": seconds}
    (RESULTS / "frontier.json").write_text(json.dumps(saved, indent=1) + "\n")
    draw(points, curve, RESULTS / "frontier.png")

    def share(p):
        return "beyond the curve" if p["share_se"] is None else f"{p['share_of_optimum']:.1%} ± {p['share_se']:.1%}"

    print_table([["method", "setting", "KL, nats", "reward", "share of the optimum"]] +
                [[r["method"], r["setting"], f"{r['kl']:.2f}", f"{r['reward']:.2f}", share(r)] for r in rows])
    for p in points:
        if p["above"]:
            print(f"ABOVE THE OPTIMUM: {p['method']}, {p['setting']}, seed {p['seed']}: {share(p)}")
    print(f"{len(points)} points of {len(results)} runs, {seconds / 60:.0f} minutes of runs; this call took "
          f"{(time.time() - began) / 60:.1f} minutes\nsaved to {RESULTS / 'frontier.json'} and .png")


if __name__ == "__main__":
    run_script(main, Args)
