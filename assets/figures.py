"""The figures in assets/README.md: python assets/figures.py"""

import math

import sys
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent
sys.path[:0] = [str(ASSETS), str(ASSETS.parent)]

from common import encode_row, generate, load_model, load_tokenizer, sequence_logprobs  # noqa: E402
from harness import load_rows  # noqa: E402
from rewards import correct_sum, sentiment  # noqa: E402


def rows_of(name: str) -> list[dict]:
    return load_rows(str(ASSETS / "data" / f"{name}.jsonl"))


for name in ("tiny-base", "tiny-sft"):
    torch.manual_seed(0)
    model, tokenizer = load_model(str(ASSETS / name)), load_tokenizer(str(ASSETS / name))
    rows = [encode_row(tokenizer, row["prompt"], row["completion"], [])
            for row in rows_of("demonstrations_heldout")]
    nll = -sequence_logprobs(model, rows).sum().item() / sum(sum(row.mask) for row in rows)
    sums = rows_of("sum_prompts_heldout")
    prompts, right = [row["prompt"] for row in sums], []
    for temperature, samples in ((0, 1), (1.0, 8)):
        texts = generate(model, tokenizer, prompts, samples, 12, temperature).completions
        texts = [text.split("\n")[0] for text in texts]  # tiny-base writes another line
        answers = [row["answer"] for row in sums for _ in range(samples)]
        right.append(sum(correct_sum(None, texts, answer=answers)) / len(answers))
    prompts = [row["prompt"] for row in rows_of("review_prompts_heldout")]
    reviews = generate(model, tokenizer, prompts, 1, 64)
    rewards = torch.tensor(sentiment(None, reviews.completions))
    print(f"{name}: {nll:.3f} nats per token; sums right {right[0]:.1%} greedy, {right[1]:.1%} "
          f"sampled; ended {reviews.ended.float().mean():.1%}; "
          f"gold reward {rewards.mean():.2f} (sd {rewards.std():.2f})")

for name in ("comparisons", "comparisons_heldout"):
    rows = rows_of(name)
    chosen = sentiment(None, [row["chosen"] for row in rows])
    rejected = sentiment(None, [row["rejected"] for row in rows])
    margins = [a - b for a, b in zip(chosen, rejected)]
    different = [margin for margin in margins if margin != 0]
    higher = sum(margin > 0 for margin in different) / len(different)
    bayes = sum(1 / (1 + math.exp(-abs(margin))) for margin in margins) / len(margins)
    print(f"{name}: gold rewards differ in {len(different) / len(margins):.1%}, the preferred one "
          f"is higher in {higher:.1%} of those; Bayes accuracy {bayes:.1%}")
print("bytes in all:", sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()))
