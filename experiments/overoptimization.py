"""Over-optimisation: PPO with a KL coefficient that is too small learns the reward model's errors.

    pip install -r experiments/requirements.txt
    python experiments/overoptimization.py                 # runs ppo_rlhf.py, then draws: minutes
    python experiments/overoptimization.py --draw-only     # from the metrics of the run before

What the reward model promises (proxy) keeps rising; the truth (gold) rises, then falls: Gao et al.
(2022), figure 1. Faint lines: the completions of each step; lines with dots: held-out prompts.
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
    """steps of PPO"""
    learning_rate: float = 1e-3
    """peak learning rate of the policy"""
    batch_size: int = 64
    """completions per step"""
    eval_every: int = 10
    """steps between held-out evaluations"""
    seed: int = 2
    """of data order and sampling; seeds differ, see the README"""
    output_dir: Path = ROOT / "runs" / "overoptimization"
    """directory for the run"""
    draw_only: bool = False
    """draw the run that --output-dir holds"""


def main(args: Args) -> None:
    flags = []
    for name in ("beta", "max_steps", "learning_rate", "batch_size", "eval_every", "seed"):
        flags += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    if not args.draw_only:
        command = [sys.executable, str(ROOT / "ppo_rlhf.py"), *flags]
        subprocess.run([*command, "--output-dir", str(args.output_dir)], check=True)
    lines = (args.output_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    training = [row for row in rows if row["phase"] == "train"]
    held_out = [row for row in rows if row["phase"] == "eval"]
    curves = {"training": curves_of(training), "held_out": curves_of(held_out)}
    parts = [curves_of(training[i:i + 5]) for i in range(len(training) - 4)]
    means = [{name: sum(curve) / 5 for name, curve in part.items()} for part in parts]
    best = max(range(len(means)), key=lambda i: means[i]["reward"])
    worst = min(range(best, len(means)), key=lambda i: means[i]["reward"])
    for when, i in (("gold at its best", best), ("lowest after that", worst), ("end", -1)):
        row = means[i]
        print(f"{when}: step {row['step']:g}, proxy {row['proxy_reward']:.2f}, "
              f"gold {row['reward']:.2f}, KL {row['kl']:.1f} nats")
    RESULTS.mkdir(exist_ok=True)
    results = {"command": " ".join(["python ppo_rlhf.py", *flags]), **curves}
    (RESULTS / "overoptimization.json").write_text(json.dumps(results) + "\n")
    draw(curves)


def curves_of(rows: list[dict]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in ("step", "proxy_reward", "reward", "kl")}


def draw(curves) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=[2, 1],
                                            layout="constrained")
    training, held_out = curves["training"], curves["held_out"]
    for key, label, colour in (("proxy_reward", "proxy: the reward model", "C1"),
                               ("reward", "gold: the truth", "C0")):
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
