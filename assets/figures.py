"""The figures in assets/README.md: python assets/figures.py"""

import json
import math
import sys
from pathlib import Path

import torch

ASSETS = Path(__file__).resolve().parent
sys.path[:0] = [str(ASSETS), str(ASSETS.parent)]

from common import encode_row, generate, load_model, load_rows, load_tokenizer, sequence_logprobs  # noqa: E402
from rewards import correct_sum, sentiment  # noqa: E402


def rows_of(name: str) -> list[dict]:
    return load_rows(str(ASSETS / "data" / f"{name}.jsonl"))


for name in ("tiny-base", "tiny-sft"):
    torch.manual_seed(0)
    model, tokenizer = load_model(str(ASSETS / name)), load_tokenizer(str(ASSETS / name))
    rows = [encode_row(tokenizer, row["prompt"], row["completion"], []) for row in rows_of("demonstrations_heldout")]
    nll = -sequence_logprobs(model, rows).sum().item() / sum(sum(mask) for _, mask in rows)
    sums = rows_of("sum_prompts_heldout")
    right = []
    for temperature, samples in ((0, 1), (1.0, 8)):
        texts = generate(model, tokenizer, [row["prompt"] for row in sums], samples, 12, temperature).completions
        texts = [text.split("\n")[0] for text in texts]  # tiny-base goes on with another line
        answers = [row["answer"] for row in sums for _ in range(samples)]
        right.append(sum(correct_sum(None, texts, answer=answers)) / len(answers))
    reviews = generate(model, tokenizer, [row["prompt"] for row in rows_of("review_prompts_heldout")], 1, 64)
    rewards = torch.tensor(sentiment(None, reviews.completions))
    print(f"{name}: {nll:.3f} nats a token; sums right {right[0]:.1%} greedy, {right[1]:.1%} sampled; "
          f"ended {reviews.ended.float().mean():.1%}; gold reward {rewards.mean():.2f} (sd {rewards.std():.2f})")

for name in ("comparisons", "comparisons_heldout"):
    rows = rows_of(name)
    chosen, rejected = (sentiment(None, [row[side] for row in rows]) for side in ("chosen", "rejected"))
    margins = [a - b for a, b in zip(chosen, rejected)]
    different = [margin for margin in margins if margin != 0]
    bayes = sum(1 / (1 + math.exp(-abs(margin))) for margin in margins) / len(margins)
    print(f"{name}: gold rewards differ in {len(different) / len(margins):.1%}, the preferred one is higher in "
          f"{sum(margin > 0 for margin in different) / len(different):.1%} of those; Bayes accuracy {bayes:.1%}")
print("bytes in all:", json.dumps(sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())))
