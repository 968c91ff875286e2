"""The sentiment experiment of the DPO paper (Rafailov et al. 2023, figure 2) on real text.

    pip install -r experiments/requirements.txt
    python experiments/real_text.py                                          # from the Hub
    python experiments/real_text.py --model DIRECTORY --texts FILE.jsonl     # offline

A small model of children's stories (Eldan & Li 2023) reads a real story without its last sentence
and writes the end. The gold reward is VADER's sentiment of what it writes (vader_reward.py). DPO
learns from comparisons of the model's own endings, drawn by the Bradley-Terry model on the gold
reward; PPO and GRPO have the gold reward itself. Every method runs at three betas and is judged on
the endings of held-out stories, as is

    pi* = pi_ref exp(r / beta) / Z

by re-weighting the model's own endings: the most reward that any policy can have at its KL.
Writes experiments/results/real_text.json and .png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from frontier import COLORS, share_of_optimum
from runs import ASSETS, RESULTS, ROOT, draw_comparisons, run, write_rows
from vader_reward import sentences, sentiment

sys.path[:0] = [str(ROOT), str(ASSETS)]

from common import generate, load_model, load_tokenizer, sequence_logprobs  # noqa: E402
from harness import load_rows, mean_and_se, print_table  # noqa: E402
from make import optimum  # noqa: E402

BETAS = (0.1, 0.3, 1.0)
CURVE = (10.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)
NEW_TOKENS, LONGEST_PROMPT = 64, 200
SAMPLES, SAMPLES_OF_REFERENCE = 8, 256  # per held-out prompt
MEASURED = ("gain", "gain_se", "kl", "kl_se")
LEAST_EFFECTIVE = 30  # samples of pi* that the reference's must be worth


@dataclass
class Args:
    model: str = "roneneldan/TinyStories-8M"
    """Hub id or directory of the model to start from"""
    texts: str = "roneneldan/TinyStories"
    """stories in a column `text`: Hub id or file"""
    train_prompts: int = 360
    """stories to learn from"""
    held_out_prompts: int = 100
    """stories to be judged by"""
    rounds: int = 12
    """pairs of endings per story, for DPO"""
    output_dir: Path = ROOT / "runs" / "real_text"
    """directory of the runs"""


# --- data ---


def load_prompts(args: Args, tokenizer) -> list[str]:
    """Stories without their last sentence."""
    wanted, prompts = args.train_prompts + args.held_out_prompts, []
    for row in load_rows(args.texts, f"train[:{10 * wanted}]"):
        if len(prompts) == wanted:
            break
        text = row["text"].strip()
        prompt = text.removesuffix(sentences(text)[-1]).rstrip()
        if 20 <= len(tokenizer(prompt).input_ids) <= LONGEST_PROMPT and prompt not in prompts:
            prompts.append(prompt)
    return prompts


def sample_pairs(model, tokenizer, prompts: list[str], rounds: int) -> list[dict]:
    """Two endings of each story, in each round, where both have an end."""
    pairs = []
    for _ in range(rounds):
        rollout = generate(model, tokenizer, prompts, 2, NEW_TOKENS)
        texts, both_ended = rollout.completions, rollout.ended.view(-1, 2).all(1)
        drawn = draw_comparisons(prompts, texts, sentiment(None, texts))
        pairs += [pair for pair, ended in zip(drawn, both_ended) if ended]
    return pairs


# --- runs ---


def commands(args: Args, data: Path) -> dict[tuple[str, float], list]:
    """(method, beta) -> its command line."""
    both = ["--model", args.model, "--reward-fn",
            f"{ROOT / 'experiments' / 'vader_reward.py'}:sentiment",
            "--eval-prompts", 20, "--eval-every", 10**6, "--max-new-tokens", NEW_TOKENS]
    prompts = ["--dataset", data / "train.jsonl", "--eval-dataset", data / "held_out.jsonl"]
    dpo = ["dpo.py", *both, "--dataset", data / "pairs.jsonl", "--learning-rate", 3e-6]
    ppo = ["ppo_rlhf.py", *both, *prompts, "--missing-eos-penalty", 0, "--batch-size", 64,
           "--max-steps", 50, "--epochs", 100, "--learning-rate", 2e-5,
           "--value-learning-rate", 2e-4]
    grpo = ["grpo.py", *both, *prompts, "--kl", "reward", "--baseline", "leave-one-out",
            "--no-scale", "--ratio", "sequence", "--batch-size", 16, "--samples-per-prompt", 8,
            "--max-steps", 40, "--epochs", 100, "--eval-samples", 1, "--learning-rate", 2e-5]
    return {(name, beta): [*command, "--beta", beta] for beta in BETAS
            for name, command in (("DPO", dpo), ("PPO", ppo), ("GRPO", grpo))}


# --- judgement ---


def judge(policy, reference, tokenizer, prompts: list[str], rewards_ref) -> dict:
    """Gain in reward over the reference and KL to it, on the held-out stories. rewards_ref: the
    reference's mean reward for each. The standard errors are for another draw of stories."""
    rollout = generate(policy, tokenizer, prompts, SAMPLES, NEW_TOKENS)
    with torch.no_grad():
        log_ratio = sequence_logprobs(policy, rollout.rows)
        log_ratio = log_ratio - sequence_logprobs(reference, rollout.rows)
    rewards = torch.tensor(sentiment(None, rollout.completions)).view(-1, SAMPLES).mean(1)
    gain, gain_se = mean_and_se(rewards - rewards_ref)
    kl, kl_se = mean_and_se(log_ratio.view(-1, SAMPLES).mean(1))
    return {"gain": gain, "gain_se": gain_se, "kl": kl, "kl_se": kl_se,
            "ended": rollout.ended.float().mean().item(),
            "tokens": sum(map(len, rollout.completion_ids)) / len(rollout.rows),
            "endings": [rollout.completions[n * SAMPLES] for n in range(5)]}


def draw(points: list[dict], curve: list[tuple[float, float]], path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    axis.plot(*zip(*curve), color="black", label="the optimum at each KL")
    for method in dict.fromkeys(point["method"] for point in points):
        own = [point for point in points if point["method"] == method]
        axis.errorbar([p["kl"] for p in own], [p["gain"] for p in own], label=method, fmt="o-",
                      xerr=[p["kl_se"] for p in own], yerr=[p["gain_se"] for p in own],
                      color=COLORS[method], linewidth=0.8)
        for p in own:
            axis.annotate(f"β {p['beta']}", (p["kl"], p["gain"]), xytext=(5, -11),
                          textcoords="offset points", color=COLORS[method], fontsize=8)
    axis.set(xlabel="KL to the reference, nats per ending", ylabel="gain in sentiment",
             xlim=(0, None), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(args: Args) -> None:
    tokenizer, data = load_tokenizer(args.model), args.output_dir / "data"
    reference = load_model(args.model)
    prompts = load_prompts(args, tokenizer)
    train, held_out = prompts[args.held_out_prompts:], prompts[:args.held_out_prompts]
    write_rows(data / "train.jsonl", [{"prompt": prompt} for prompt in train])
    write_rows(data / "held_out.jsonl", [{"prompt": prompt} for prompt in held_out])
    if not (data / "pairs.jsonl").exists():
        torch.manual_seed(0)
        pairs = sample_pairs(reference, tokenizer, train, args.rounds)
        write_rows(data / "pairs.jsonl", pairs)

    if not (data / "reference.jsonl").exists():
        torch.manual_seed(0)
        rollout = generate(reference, tokenizer, held_out, SAMPLES_OF_REFERENCE, NEW_TOKENS)
        write_rows(data / "reference.jsonl", [{"text": text} for text in rollout.completions])
    texts = [row["text"] for row in load_rows(str(data / "reference.jsonl"))]
    rewards = torch.tensor(sentiment(None, texts)).double().view(len(held_out), -1)
    curve = [(0.0, 0.0)]
    for beta in CURVE:
        kl, reward, effective = optimum(torch.zeros_like(rewards), rewards, beta)
        if effective.mean() >= LEAST_EFFECTIVE:
            curve.append((kl.mean().item(), (reward.mean() - rewards.mean()).item()))

    points = []
    for (method, beta), command in commands(args, data).items():
        directory = args.output_dir / f"{method}_{beta}"
        seconds = run(directory, command)["seconds"]
        torch.manual_seed(1)
        policy = load_model(str(directory))
        point = judge(policy, reference, tokenizer, held_out, rewards.mean(1))
        share, se = share_of_optimum(curve, *(point[name] for name in MEASURED))
        point |= {"share": share, "share_se": se, "seconds": seconds}
        points.append({"method": method, "beta": beta, **point})

    reference_row = {"reward": rewards.mean().item(), "sd": rewards.std(1).mean().item(),
                     "endings": texts[:5 * SAMPLES_OF_REFERENCE:SAMPLES_OF_REFERENCE]}
    results = {"model": args.model, "pairs": len(load_rows(str(data / "pairs.jsonl"))),
               "reference": reference_row, "prompts": [p[-120:] for p in held_out[:5]],
               "curve": curve, "points": points}
    (RESULTS / "real_text.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(points, curve, RESULTS / "real_text.png")
    table = [["method", "beta", "gain", "KL, nats", "of the optimum", "ended", "tokens"]]
    for p in points:
        share = "-" if p["share"] is None else f"{p['share']:.1%} ± {p['share_se']:.1%}"
        table.append([p["method"], str(p["beta"]), f"{p['gain']:.2f} ± {p['gain_se']:.2f}",
                      f"{p['kl']:.2f} ± {p['kl_se']:.2f}", share, f"{p['ended']:.0%}",
                      f"{p['tokens']:.1f}"])
    print_table(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
