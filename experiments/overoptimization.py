"""Over-optimisation: PPO with a KL coefficient that is too small learns the reward model's errors.

    pip install -r experiments/requirements.txt
    python experiments/overoptimization.py                  # runs ppo_rlhf.py, then draws; a few minutes
    python experiments/overoptimization.py --draw-only      # from the metrics of the run before

What the reward model promises (proxy) keeps rising; the truth (gold) rises, then falls: Gao et al. (2022), figure 1.
Faint lines: the completions of each step; lines with dots: held-out prompts.
Writes experiments/results/overoptimization.json (the curves, and the command) and .png.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


@dataclass
class Args:
    beta: float = 0.01
    """KL coefficient: too small"""
    max_steps: int = 120
    """of PPO"""
    learning_rate: float = 1e-3
    """of the policy, peak"""
    batch_size: int = 64
    """completions a step"""
    eval_every: int = 10
    """steps between held-out evaluations"""
    seed: int = 2
    """of data order and sampling; seeds differ, see the README"""
    output_dir: Path = ROOT / "runs" / "overoptimization"
    """of the run"""
    draw_only: bool = False
    """draw the run that --output-dir holds"""


def main(args: Args) -> None:
    names = ("beta", "max_steps", "learning_rate", "batch_size", "eval_every", "seed")
    flags = [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(args, name)))]
    if not args.draw_only:
        command = [sys.executable, str(ROOT / "ppo_rlhf.py"), *flags, "--output-dir", str(args.output_dir)]
        subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (args.output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "value_loss" in row]  # the others are held-out evaluations
    held_out = [row for row in rows if "win_rate" in row]
    curves = {name: {key: [row[key] for row in chosen] for key in ("step", "proxy_reward", "reward", "kl")}
              for name, chosen in (("training", steps), ("held_out", held_out))}
    means = [{name: sum(row[name] for row in steps[i:i + 5]) / 5 for name in ("step", "proxy_reward", "reward", "kl")}
             for i in range(len(steps) - 4)]  # over five steps
    best = max(range(len(means)), key=lambda i: means[i]["reward"])
    worst = min(range(best, len(means)), key=lambda i: means[i]["reward"])
    for when, row in (("gold at its best", means[best]), ("lowest after that", means[worst]), ("end", means[-1])):
        print(f"{when}: step {row['step']:g}, proxy {row['proxy_reward']:.2f}, gold {row['reward']:.2f}, "
              f"KL {row['kl']:.1f} nats")
    RESULTS.mkdir(exist_ok=True)
    results = {"command": " ".join(["python ppo_rlhf.py", *flags]), **curves}
    (RESULTS / "overoptimization.json").write_text(json.dumps(results) + "\n")
    draw(curves)


def draw(curves) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=[2, 1],
                                            layout="constrained")
    training, held_out = curves["training"], curves["held_out"]
    for key, label, colour in (("proxy_reward", "proxy: the reward model", "C1"), ("reward", "gold: the truth", "C0")):
        top.plot(training["step"], training[key], colour, alpha=0.35)
        top.plot(held_out["step"], held_out[key], colour, marker="o", label=label)
    bottom.plot(training["step"], training["kl"], "C2")
    top.set_ylabel("reward")
    top.legend()
    bottom.set_ylabel("KL to the reference, nats")
    bottom.set_xlabel("PPO step")
    figure.savefig(RESULTS / "overoptimization.png", dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
