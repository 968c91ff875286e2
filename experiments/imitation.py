"""Can this model be the optimum at all? tiny-sft, taught by imitation what pi* = pi_ref exp(r / beta) / Z itself would say.

For each of 1,000 prompts 32 samples of tiny-sft are drawn anew with weights exp(r / beta), r the gold reward, which makes
them samples of pi*; sft.py learns from eight of them, evaluate.py judges on held-out prompts. There is no exploration, no
noise in a reward and no critic here, so what is missing to the optimum is what this model does not learn of pi*. Where a
method of reinforcement learning gets as far, its own errors are not what keeps it below the curve.

    python experiments/imitation.py              # writes experiments/results/imitation.json
"""

import json
import sys
from pathlib import Path

import torch

from runs import ASSETS, DATA, GOLD, RESULTS, ROOT, run

sys.path[:0] = [str(ROOT), str(ASSETS)]

from common import generate, load_model, load_rows, load_tokenizer, print_table  # noqa: E402
from frontier import gain_and_slope  # noqa: E402
from rewards import sentiment  # noqa: E402

BETAS, SAMPLES, KEPT = [1.0, 0.5], 32, 8
RUNS = ROOT / "runs" / "imitation"


def samples_of_the_optimum(beta: float, path: Path) -> None:
    """Rows of prompt and completion, KEPT a prompt."""
    torch.manual_seed(0)
    tokenizer, model = load_tokenizer(str(ASSETS / "tiny-sft")), load_model(str(ASSETS / "tiny-sft"))
    prompts = [row["prompt"] for row in load_rows(str(DATA / "review_prompts.jsonl"))]
    texts = generate(model, tokenizer, prompts, SAMPLES).completions
    weights = (torch.tensor(sentiment(None, texts)) / beta).view(-1, SAMPLES).softmax(1)
    chosen = torch.multinomial(weights, KEPT, replacement=True)
    rows = [{"prompt": prompt, "completion": texts[i * SAMPLES + j]} for i, prompt in enumerate(prompts)
            for j in chosen[i].tolist() if texts[i * SAMPLES + j].strip()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    table = json.loads((ASSETS / "frontier.json").read_text())
    curve = [(0.0, 0.0)] + [(p["kl"], p["reward"] - table["reward_ref"]) for p in table["points"]]
    points = []
    for beta in BETAS:
        data, directory = RUNS / f"beta_{beta}.jsonl", RUNS / f"sft_{beta}"
        if not data.exists():
            samples_of_the_optimum(beta, data)
        run(directory, ["sft.py", "--model", ASSETS / "tiny-sft", "--dataset", data, "--learning-rate", 1e-3, "--epochs", 3])
        judged = run(RUNS / f"evaluate_{beta}", ["evaluate.py", "--models", directory, "--names", "imitation",
                                                 "--reward-fn", GOLD])["policies"]
        policy, reference = judged["imitation"], judged["tiny-sft"]
        gain = policy["reward"] - reference["reward"]
        points.append({"beta": beta, "kl": policy["kl"], "reward": policy["reward"],
                       "share_of_optimum": gain / gain_and_slope(curve, policy["kl"])[0]})
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "imitation.json").write_text(json.dumps({"points": points}, indent=1) + "\n")
    print_table([["beta", "KL, nats", "gold reward", "of the optimum"]] +
                [[p["beta"], f"{p['kl']:.2f}", f"{p['reward']:.2f}", f"{p['share_of_optimum']:.1%}"] for p in points])


if __name__ == "__main__":
    main()
