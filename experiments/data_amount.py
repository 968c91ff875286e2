"""What preference data buys: DPO, and reward model + PPO, from 1,000, 4,000 and 32,000 comparisons.

    pip install -r experiments/requirements.txt
    python experiments/data_amount.py     # 30 minutes; finished runs are kept

The comparisons are fresh: two completions of tiny-sft for each prompt of comparisons.jsonl, eight
times over, judged by the Bradley-Terry model on the gold reward. Both ways aim at the same
optimum, pi_ref exp(r / beta) / Z with beta 0.3: DPO directly, PPO through a reward model that
reward_model.py learns from the same comparisons. All other flags are at their defaults, and every
policy is judged by the gold reward on the same held-out prompts.

Writes experiments/results/data_amount.json and .png: where each policy ends, under the curve of
the most reward that any policy can have at its KL.
"""

import json
import sys

from runs import ASSETS, DATA, RESULTS, ROOT, draw_comparisons, run, write_rows

sys.path[:0] = [str(ROOT), str(ASSETS)]

AMOUNTS, BETA, ROUNDS = [1000, 4000, 32_000], 0.3, 8
KEPT = ("reward", "reward_se", "kl", "win_rate", "share_of_optimum")
RUNS = ROOT / "runs" / "data_amount"


def write_pairs() -> None:
    """pairs.jsonl: first one comparison of every prompt, then another one of every prompt ..."""
    import torch
    from common import generate, load_model, load_tokenizer
    from rewards import sentiment

    path = RUNS / "pairs.jsonl"
    if path.exists():
        return
    torch.manual_seed(0)
    name = str(ASSETS / "tiny-sft")
    model, tokenizer = load_model(name), load_tokenizer(name)
    lines = (DATA / "comparisons.jsonl").read_text(encoding="utf-8").splitlines()
    prompts, pairs = [json.loads(line)["prompt"] for line in lines], []
    for _ in range(ROUNDS):
        completions = generate(model, tokenizer, prompts, 2, 64).completions
        pairs += draw_comparisons(prompts, completions, sentiment(None, completions))
    write_rows(path, pairs)


def measure() -> list[dict]:
    points = []
    for amount in AMOUNTS:
        data = ["--dataset", RUNS / "pairs.jsonl", "--split", f"train[:{amount}]",
                "--eval-dataset", DATA / "comparisons_heldout.jsonl"]
        gold = ["--reward-fn", f"{ASSETS / 'rewards.py'}:sentiment"]
        seldom = ["--eval-every", 10**6]
        dpo = run(RUNS / f"dpo_{amount}", ["dpo.py", *data, *gold, "--beta", BETA, *seldom])
        judge = run(RUNS / f"rm_{amount}", ["reward_model.py", *data, *gold, *seldom])
        ppo = run(RUNS / f"ppo_{amount}", ["ppo_rlhf.py", "--beta", BETA, *gold, *seldom,
                                           "--reward-model", RUNS / f"rm_{amount}"])
        for method, result in (("DPO", dpo), ("reward model + PPO", ppo)):
            point = {"method": method, "comparisons": amount, "gain": gain(result)}
            point |= {name: result.get(name) for name in KEPT}
            points.append(point | {"accuracy": judge["accuracy"]})
    return points


def gain(result: dict) -> float:
    return result["reward"] - result["reward_ref"]


def draw(points: list[dict]) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from assets.frontier import gain_at

    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    longest = max(point["kl"] for point in points) * 1.05
    nats = [n * longest / 200 for n in range(201)]
    nats = [kl for kl in nats if gain_at(kl) is not None]
    axis.plot(nats, [gain_at(kl) for kl in nats], "black", label="the optimum at each KL")
    for method, colour in (("DPO", "C0"), ("reward model + PPO", "C1")):
        own = [point for point in points if point["method"] == method]
        axis.errorbar([p["kl"] for p in own], [p["gain"] for p in own],
                      yerr=[p["reward_se"] for p in own], fmt="o-", color=colour, label=method)
        for p in own:
            axis.annotate(f"{p['comparisons']:,}", (p["kl"], p["gain"]), xytext=(6, -11),
                          textcoords="offset points", color=colour, fontsize=9)
    axis.set(xlabel="KL to the reference, nats per completion", ylabel="gain in gold reward",
             xlim=(0, 1.1 * longest), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(RESULTS / "data_amount.png", dpi=150)


def main() -> None:
    from harness import print_table
    write_pairs()
    points = measure()
    RESULTS.mkdir(exist_ok=True)
    results = {"beta": BETA, "points": points}
    (RESULTS / "data_amount.json").write_text(json.dumps(results, indent=1) + "\n")
    table = [["comparisons", "method", "gain", "KL, nats", "win rate", "of the optimum",
              "reward model's accuracy"]]
    for p in points:
        share = "-" if p["share_of_optimum"] is None else f"{p['share_of_optimum']:.1%}"
        accuracy = f"{p['accuracy']:.1%}" if "PPO" in p["method"] else "-"
        table.append([f"{p['comparisons']:,}", p["method"], f"{p['gain']:.2f} ± "
                      f"{p['reward_se']:.2f}", f"{p['kl']:.2f}", f"{p['win_rate']:.1%}", share,
                      accuracy])
    print_table(table)
    draw(points)
    print(f"wrote {RESULTS / 'data_amount.json'} and .png")


if __name__ == "__main__":
    main()
