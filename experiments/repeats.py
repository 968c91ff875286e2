"""Why the trained policies stay below the curve: they say twice what counts once.

A word of judgement counts once in the gold reward. pi* = pi_ref exp(r / beta) / Z therefore repeats
itself no more than tiny-sft does, and a policy that has learnt to praise, but not to remember what
it has said, pays KL for words that earn nothing. Counted here: the share of a review's words of
judgement that stood in it before, at pi* (samples of tiny-sft, re-weighted, where they are enough)
and in the held-out samples of experiments/frontier.py's runs.

    python experiments/frontier.py && python experiments/repeats.py

Writes experiments/results/repeats.json.
"""

import json
import re
import sys

import torch

from frontier import RUNS
from runs import ASSETS, DATA, RESULTS, ROOT, directory_of, mean

sys.path[:0] = [str(ROOT), str(ASSETS)]

from common import generate, load_model, load_tokenizer  # noqa: E402
from harness import load_rows, print_table  # noqa: E402
from make import optimum  # noqa: E402
from rewards import VALENCE, sentiment  # noqa: E402

PROMPTS, SAMPLES = 100, 128
RUNS_OF_FRONTIER = ROOT / "runs" / "frontier"



def counts(text: str) -> tuple[int, int]:
    """Words of judgement, and how many of them are repeats."""
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in VALENCE]
    return len(words), len(words) - len(set(words))


def at_the_optimum() -> list[dict]:
    torch.manual_seed(0)
    model = load_model(str(ASSETS / "tiny-sft"))
    tokenizer = load_tokenizer(str(ASSETS / "tiny-sft"))
    held_out = load_rows(str(DATA / "review_prompts_heldout.jsonl"), f"train[:{PROMPTS}]")
    prompts = [row["prompt"] for row in held_out]
    texts = generate(model, tokenizer, prompts, SAMPLES).completions
    rewards = torch.tensor(sentiment(None, texts), dtype=torch.float64).view(PROMPTS, SAMPLES)
    said = torch.tensor([counts(text) for text in texts], dtype=torch.float64)
    said = said.view(PROMPTS, SAMPLES, 2)
    rows = []
    for name, beta in (("tiny-sft", 1e9), ("optimum, beta 1", 1.0), ("optimum, beta 0.7", 0.7)):
        kl, reward, _ = optimum(torch.zeros_like(rewards), rewards, beta)
        weights = (rewards / beta).softmax(1)
        words, repeats = (weights[..., None] * said).sum(1).mean(0).tolist()
        rows.append({"policy": name, "kl": kl.mean().item(), "reward": reward.mean().item(),
                     "repeats": repeats / words})
    return rows


def of_runs() -> list[dict]:
    rows = []
    for method in ("PPO", "GRPO", "DPO"):
        for setting in RUNS[method]:
            found = []
            pattern = directory_of("", method, setting, "*").name
            for directory in sorted(RUNS_OF_FRONTIER.glob(pattern)):
                lines = (directory / "samples.jsonl").read_text().splitlines()
                samples = [json.loads(line) for line in lines]
                last = [s["completion"] for s in samples if s["step"] == samples[-1]["step"]]
                said = torch.tensor([counts(text) for text in last]).sum(0).tolist()
                results = json.loads((directory / "results.json").read_text())
                found.append({"kl": results["kl"], "reward": results["reward"],
                              "repeats": said[1] / said[0]})
            means = {name: mean([row[name] for row in found]) for name in found[0]}
            rows.append({"policy": f"{method}, {setting}", **means})
    return rows


if __name__ == "__main__":
    policies = at_the_optimum() + of_runs()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "repeats.json").write_text(json.dumps({"policies": policies}, indent=1) + "\n")
    table = [["policy", "KL, nats", "gold reward", "words of judgement said before"]]
    for p in policies:
        table.append([p["policy"], f"{p['kl']:.2f}", f"{p['reward']:.2f}", f"{p['repeats']:.1%}"])
    print_table(table)
