"""The controlled comparison: every method's win rate against SFT, everything else being equal.

AlpacaFarm's table (Dubois et al. 2023) on the embedded world, where the judge is the gold reward.
All methods start from tiny-sft, whose own held-out completions they must win against, and all have
the same budget of gold labels: the 4,000 comparisons of assets/data/comparisons.jsonl.

    DPO                          the comparisons
    binary FeedME                the preferred completions only, as demonstrations for sft.py
    binary reward conditioning   preferred and other completions, labelled 2 and 1
    PPO, GRPO, Quark, expert     tiny-rm, trained on the same comparisons, and their own samples for
    iteration, best-of-16        the 1,000 review prompts (best-of-16: for the held-out ones)
    SFT, base                    none

The settings are the scripts' defaults, but for GRPO, whose default is another task: its flags aim
at pi* with the beta of PPO. These defaults were chosen by looking at gold rewards of held-out
samples, which no labeller would have given.

    pip install -r experiments/requirements.txt
    python experiments/controlled_comparison.py     # two runs at a time; finished runs are kept

evaluate.py has the last word, once per seed, on the same 500 held-out prompts with fresh samples.
The standard error is that of one seed's 500 prompts, or that of the seeds where they differ by
more. Writes experiments/results/controlled_comparison.json and .png, which also shows base, SFT
and PPO side by side.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from runs import (
    ASSETS, DATA, RESULTS, ROOT, TO_PI_STAR, directory_of, mean, run, run_all, variance_of_mean
)

sys.path.insert(0, str(ROOT))

from harness import print_table, run_script  # noqa: E402

PROMPTS, N = 500, 16
SELDOM = ["--eval-every", 10**6, "--eval-prompts", 100]  # the judgement comes at the end
HELDOUT = DATA / "review_prompts_heldout.jsonl"
RUNS = {
    "PPO": ["ppo_rlhf.py", "--eval-every", 10**6],
    "GRPO": ["grpo.py", "--dataset", DATA / "review_prompts.jsonl", "--eval-dataset", HELDOUT,
             "--reward-model", ASSETS / "tiny-rm", "--beta", 0.5, *TO_PI_STAR, *SELDOM],
    "DPO": ["dpo.py", "--eval-every", 10**6],
    f"best-of-{N}": ["best_of_n.py", "--samples-per-prompt", N, "--split", f"train[:{PROMPTS}]"],
    "expert iteration": ["expert_iteration.py", "--eval-prompts", 100],
    "Quark": ["reward_conditioning.py", "--eval-prompts", 100],
    "binary reward conditioning": ["reward_conditioning.py", "--method", "binary", *SELDOM],
    "binary FeedME": ["sft.py", "--model", ASSETS / "tiny-sft", "--completion-column", "chosen",
                      "--dataset", DATA / "comparisons.jsonl",
                      "--eval-dataset", DATA / "comparisons_heldout.jsonl",
                      "--eval-every", 10**6],
}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """seeds: one run of every method for each"""
    methods: list[str] = field(default_factory=lambda: list(RUNS))
    """methods to run; default: all"""
    processes: int = 2
    """runs at a time, one thread each"""
    output_dir: str = str(ROOT / "runs" / "controlled_comparison")
    """directory for the runs; the results go to experiments/results"""


def judge(args: Args, directories: dict, seed: int) -> dict:
    """evaluate.py on all policies of a seed -> its metrics by policy; tiny-sft is the reference."""
    models, names = [ASSETS / "tiny-base"], ["base"]
    for method in args.methods:
        directory = directories[method, seed]
        is_file = RUNS[method][0] == "best_of_n.py"
        models.append(directory / "best.jsonl" if is_file else directory)
        names.append(method)
    command = ["evaluate.py", "--models", *models, "--names", *names,
               "--split", f"train[:{PROMPTS}]", "--reward-model", ASSETS / "tiny-rm",
               "--seed", 100 + seed]
    policies = run(Path(args.output_dir) / f"evaluate_{seed}", command)["policies"]
    for method in args.methods:  # a file of completions has no KL, but best-of-n knows its own
        if "kl" not in policies[method]:
            results = json.loads((directories[method, seed] / "results.json").read_text())
            policies[method] |= {name: results[name] for name in ("kl", "kl_se")}
    policies["SFT"] = policies.pop("tiny-sft")
    return policies


def summary(by_seed: dict[int, dict]) -> list[dict]:
    """Means over the seeds, best first."""
    rows = []
    for name in next(iter(by_seed.values())):
        own = [policies[name] for policies in by_seed.values()]
        row = {"method": name, "seeds": len(own)}
        for key in ("win_rate", "reward", "proxy_reward", "kl", "length"):
            row[key] = mean([m[key] for m in own])
        row["win_rate_by_seed"] = [m["win_rate"] for m in own]
        over_prompts = mean([m.get("win_rate_se", 0.0) ** 2 for m in own])  # the same prompts
        row["win_rate_se"] = max(over_prompts, variance_of_mean(row["win_rate_by_seed"])) ** 0.5
        rows.append(row)
    return sorted(rows, key=lambda row: -row["win_rate"])


def discordant(rows: list[dict]) -> list[str]:
    """Pairs that some seed orders otherwise, though their means differ by more than two standard
    errors."""
    found = []
    for n, better in enumerate(rows):
        for worse in rows[n + 1:]:
            se = (better["win_rate_se"] ** 2 + worse["win_rate_se"] ** 2) ** 0.5
            apart = better["win_rate"] - worse["win_rate"] > 2 * se
            by_seed = zip(better["win_rate_by_seed"], worse["win_rate_by_seed"])
            if apart and any(a < b for a, b in by_seed):
                found.append(f"{better['method']} and {worse['method']}")
    return found


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), width_ratios=[1, 2])
    by_name = {row["method"]: row for row in rows}
    stages = [name for name in ("base", "SFT", "PPO") if name in by_name]
    for axis, names in ((left, stages), (right, [row["method"] for row in reversed(rows)])):
        heights = [100 * by_name[name]["win_rate"] for name in names]
        errors = [100 * by_name[name]["win_rate_se"] for name in names]
        colors = [{"base": "C7", "SFT": "C0", "PPO": "C3"}.get(name, "C2") for name in names]
        if axis is left:
            axis.bar(names, heights, yerr=errors, color=colors, capsize=4)
            axis.set(ylabel="win rate against SFT, %", ylim=(0, 100), title="base, SFT, RLHF")
            axis.axhline(50, color="black", linewidth=0.6)
        else:
            axis.barh(names, heights, xerr=errors, color=colors, capsize=3)
            axis.set(xlabel="win rate against SFT, %", xlim=(0, 100),
                     title="4,000 comparisons, every method")
            axis.axvline(50, color="black", linewidth=0.6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    began = time.time()
    wanted = [(method, seed) for seed in args.seeds for method in args.methods]
    directories = {key: directory_of(args.output_dir, *key) for key in wanted}
    commands = {directories[method, seed]: [*RUNS[method], "--seed", seed]
                for method, seed in wanted}
    results = run_all(commands, args.processes)
    by_seed = {seed: judge(args, directories, seed) for seed in args.seeds}

    rows = summary(by_seed)
    turned = discordant(rows)
    seconds = sum(result["seconds"] for result in results.values())
    RESULTS.mkdir(exist_ok=True)
    saved = {"methods": rows, "discordant": turned, "prompts": PROMPTS, "seeds": args.seeds,
             "run_seconds": seconds}
    (RESULTS / "controlled_comparison.json").write_text(json.dumps(saved, indent=1) + "\n")
    draw(rows, RESULTS / "controlled_comparison.png")

    table = [["method", "win rate, %", "by seed", "gold reward", "proxy reward", "KL, nats"]]
    for row in rows:
        table.append([
            row["method"],
            f"{100 * row['win_rate']:.1f} ± {100 * row['win_rate_se']:.1f}",
            " ".join(f"{100 * win_rate:.1f}" for win_rate in row["win_rate_by_seed"]),
            *(f"{row[key]:.2f}" for key in ("reward", "proxy_reward", "kl")),
        ])
    print_table(table)
    agree = f"seeds disagree on {', '.join(turned)}" if turned else "the same in all seeds"
    print(f"order of methods more than two standard errors apart: {agree}\n"
          f"{len(results)} runs, {seconds / 60:.0f} minutes; this call took "
          f"{(time.time() - began) / 60:.1f} minutes\n"
          f"saved to {RESULTS / 'controlled_comparison.json'} and .png")


if __name__ == "__main__":
    run_script(main, Args)
