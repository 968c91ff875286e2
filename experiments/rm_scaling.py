"""How a reward model improves with judgements and with size: held-out accuracy of reward_model.py
for four numbers of comparisons and three sizes of model, under the ceiling of who knows the gold
rewards.

    pip install -r experiments/requirements.txt
    python experiments/rm_scaling.py          # writes experiments/results/rm_scaling.json and .png

The two smaller models are made as assets/make.py and sft.py make tiny-sft, from the same pages and
demonstrations. Every run is `python reward_model.py --model M --split train[:N] --seed S` with all
other flags at their defaults. Finished runs under runs/rm_scaling are not run again.
"""

import json
import sys
from pathlib import Path

from runs import ASSETS, RESULTS, ROOT, run

sys.path[:0] = [str(ASSETS), str(ROOT)]

from harness import print_table  # noqa: E402

RUNS = ROOT / "runs" / "rm_scaling"
SIZES = {(1, 32): 29_000, (2, 64): 132_000, (4, 128): 857_000}  # (layers, width): parameters
COMPARISONS, SEEDS = [500, 1000, 2000, 4000], [0, 1, 2]
KEPT = ("accuracy", "log_loss", "rank_correlation", "bayes_accuracy", "bayes_log_loss")


def policy_of(layers: int, width: int) -> Path:
    """What tiny-sft is, in this size."""
    if (layers, width) == (4, 128):
        return ASSETS / "tiny-sft"
    base, sft = RUNS / f"base-{layers}x{width}", RUNS / f"sft-{layers}x{width}"
    if not (sft / "results.json").exists():
        from make import make_base
        make_base(layers=layers, width=width, directory=base)
        run(sft, ["sft.py", "--model", base])
    return sft


def measure() -> list[dict]:
    points = []
    for layers, width in SIZES:
        model = policy_of(layers, width)
        for n in COMPARISONS:
            for seed in SEEDS:
                command = ["reward_model.py", "--model", model, "--split", f"train[:{n}]",
                           "--seed", seed, "--eval-every", 10**6, "--save-every", 10**6]
                result = run(RUNS / f"{layers}x{width}-{n}-{seed}", command)
                point = {"layers": layers, "width": width, "parameters": SIZES[layers, width],
                         "comparisons": n, "seed": seed}
                points.append(point | {key: result[key] for key in KEPT})
    return points


def mean_of(points, size, n, key) -> tuple[float, float]:
    """Mean and range over the seeds."""
    values = [p[key] for p in points
              if (p["layers"], p["width"]) == size and p["comparisons"] == n]
    return sum(values) / len(values), max(values) - min(values)


def draw(points) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("accuracy", "rank_correlation"),
                                ("held-out accuracy", "rank correlation with the gold reward")):
        for size, parameters in SIZES.items():
            axis.plot(COMPARISONS, [mean_of(points, size, n, key)[0] for n in COMPARISONS], "o-",
                      label=f"{parameters / 1e6:.2f}M parameters")
        axis.set(xscale="log", xlabel="comparisons", ylabel=label, xticks=COMPARISONS,
                 xticklabels=COMPARISONS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].axhline(points[0]["bayes_accuracy"], color="black", linestyle="--",
                    label="who knows the gold rewards")
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="lower right",
                   bbox_to_anchor=(1, 0.1), frameon=False)
    figure.savefig(RESULTS / "rm_scaling.png", dpi=150)


def main() -> None:
    points = measure()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rm_scaling.json").write_text(json.dumps({"points": points}, indent=1) + "\n")
    print(f"held-out accuracy, mean of {len(SEEDS)} seeds (range); who knows the gold rewards: "
          f"{points[0]['bayes_accuracy']:.1%}")
    table = [["comparisons", *(f"{size / 1e6:.2f}M parameters" for size in SIZES.values())]]

    for n in COMPARISONS:
        cells = [mean_of(points, size, n, "accuracy") for size in SIZES]
        table.append([n, *(f"{mean:.1%} ({spread:.1%})" for mean, spread in cells)])
    print_table(table)
    draw(points)
    print(f"wrote {RESULTS / 'rm_scaling.json'} and .png")


if __name__ == "__main__":
    main()
