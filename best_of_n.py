"""Best of n: sample n answers, keep the one that a reward likes best. No training, and hard to beat.

With F(y) the probability that a sample of pi_ref scores at most r(x, y), and F(<y) less than that, the kept answer has

    pi_n(y | x) = pi_ref(y | x) (F(y)^n - F(<y)^n) / (F(y) - F(<y))                                              (1)

    KL(pi_n || pi_ref) <= log n - (n - 1) / n,    equal where no two answers tie                                  (2)
    P(kept answer beats a fresh sample) = n / (n + 1),    by the reward that chose it, without ties                (3)

(2): Stiennon et al. (2020), appendix G.3; that it is only a bound: Beirami et al. (2024). Ties take away what the
choice among equals would have told: (1) and the chain rule give, with rho = F(<y) / F(y) and y drawn from pi_n,

    KL(pi_n || pi_ref) = log n - (n - 1) / n - E[ g(rho, n) ],    g in kl_of_ties()                               (4)

Every n = 1, 2, 4 ... N comes from one set of N samples a prompt, without bias: the mean over all subsets of n, which is
a weighted mean of the sorted samples, weights C(k - 1, n - 1) / C(N, n) for the k-th (Nakano et al. 2021, appendix I).

    python best_of_n.py                               # tiny-sft, chosen by tiny-rm, judged by the truth: half a minute
    python best_of_n.py --reward-fn assets/rewards.py:sentiment       # chosen by the truth itself: many ties
    python best_of_n.py --n 16 --dataset assets/data/review_prompts.jsonl --split train     # data for sft.py and dpo.py
    python sft.py --model assets/tiny-sft --dataset runs/best_of_n/best.jsonl
    python dpo.py --dataset runs/best_of_n/pairs.jsonl --reward-fn assets/rewards.py:sentiment

What the reward model promises (proxy) rises with n; the truth (gold) falls behind: over-optimisation (Gao et al. 2022).
Nothing is trained, so no model is written; best.jsonl holds the kept answers, pairs.jsonl best against worst.
"""

import json
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import (ASSETS, Run, UserError, as_answer, column, generate, load_model, load_rows, load_tokenizer,
                    max_row_length, mean_and_se, optimal_gain, print_table, progress_bar, prompts_that_fit, report,
                    reward_from_function, reward_from_model, run_script, shard, write_atomically)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model that is sampled"""
    dataset: str = str(ASSETS / "data" / "review_prompts_heldout.jsonl")
    """prompts: Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train[:200]"
    """split of --dataset, or a part of it"""
    reward_model: str | None = None
    """a sequence-classification model with one label that chooses; default on the embedded data, where --reward-fn is
    not given either: assets/tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function that chooses, or, beside --reward-model, only judges what that model chose; default on the
    embedded data: assets/rewards.py:sentiment"""
    output_dir: str = "runs/best_of_n"
    """best.jsonl, pairs.jsonl, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    n: int = 64
    """samples a prompt"""
    batch_size: int = 8
    """prompts a step"""
    micro_batch_size: int | None = None
    """samples a forward pass of --reward-model; default: as many as fit into 4,096 padded tokens"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_new_tokens: int = 64
    """of samples"""
    temperature: float = 1.0
    """of samples"""
    save_every: int = 5
    """steps between checkpoints"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    seed: int = 0
    """of sampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward passes; auto: bfloat16 autocast on GPUs, float32 on CPUs"""
    replicas: int = 1
    """under torchrun: copies of the model, each divided among as many processes (HSDP: one a node); 1: one among all"""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's template"""
    tensorboard: bool = False
    """also write TensorBoard events"""


# ----------------------------------------------------------------------------------------------------------- estimators


def best_of_n_kl(n: int) -> float:
    """Equation (2): the most nats that best of n can be away from the policy that it samples."""
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    """Equation (3): against one fresh sample, by the reward that chose, without ties."""
    return n / (n + 1)


def best_of_n_weights(scores: torch.Tensor, n: int) -> torch.Tensor:
    """How probably each of N samples is the best of a random n of them, ties broken at random: [P, N] -> [P, N] fp64,
    rows sum to 1. sum_i weights_i f(y_i) is an unbiased estimate of E[f] under best of n, for any f."""
    samples = scores.shape[1]
    subsets = torch.tensor([math.comb(k, n) / math.comb(samples, n) for k in range(samples + 1)], dtype=torch.float64)
    below, up_to = rank_range(scores)
    return (subsets[up_to] - subsets[below]) / (up_to - below)


def rank_range(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's scores are lower, and how many are at most as high: [P, N] -> two times [P, N]."""
    ordered = scores.sort(1).values
    return torch.searchsorted(ordered, scores), torch.searchsorted(ordered, scores, right=True)


def kl_of_ties(rho: torch.Tensor, n: int) -> torch.Tensor:
    """g of equation (4), nats: what the best of n uniform numbers U tells about U beyond the interval that it lies in,
    an interval from rho b to b:

        g = log( n (1 - rho) / (1 - rho^n) ) - (n - 1) ( rho^n log(rho) / (1 - rho^n) + 1 / n )

    0 for rho -> 1 (no ties), log n - (n - 1) / n for rho = 0 (all tie)."""
    rho = rho.double()
    tail = torch.special.xlogy(rho**n, rho) / (1 - rho**n)
    g = torch.log(n * (1 - rho) / (1 - rho**n)) - (n - 1) * (tail + 1 / n)
    return torch.where(rho > 1 - 1e-6, 0.0, g)  # there it is below n^2 1e-13, and the formula is 0 / 0


def tie_probability(scores: torch.Tensor, logps: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """P(a fresh sample ties with this one) = F(y) - F(<y), estimated: [P, N] -> [P, N]. The larger of the share of the
    other samples that do, and of pi_ref's own probability of the different ones seen (`first`: not seen before in its
    row), which tells the small ones that no N samples could."""
    below, up_to = rank_range(scores)
    share = (up_to - below - 1) / max(1, scores.shape[1] - 1)
    order = scores.argsort(1)
    mass = (logps.double().exp() * first).gather(1, order).cumsum(1)
    mass = torch.cat([torch.zeros(len(mass), 1, dtype=mass.dtype), mass], 1)
    return torch.maximum(share, mass.gather(1, up_to) - mass.gather(1, below)).clamp(max=1.0)


def best_of_n_metrics(n: int, proxy, gold, ended, tie, ref_gold) -> dict:
    """Equations (1) to (4) by the samples: proxy, gold, ended, tie [P, N], ref_gold [P] of one more sample a prompt."""
    weights = best_of_n_weights(proxy, n)  # [P, N]
    below = torch.minimum(rank_range(proxy)[0] / proxy.shape[1], 1 - tie)
    rho = below / (below + tie).clamp(min=1e-300)
    wins = (gold > ref_gold[:, None]) + 0.5 * (gold == ref_gold[:, None])
    metrics = {"kl_bound": best_of_n_kl(n)}
    values = {"proxy_reward": proxy, "reward": gold, "kl": best_of_n_kl(n) - kl_of_ties(rho, n), "win_rate": wins}
    for name, value in values.items():
        metrics[name], metrics[f"{name}_se"] = mean_and_se((weights * value).sum(1))
    metrics["ended"] = (weights * ended).sum(1).mean().item()
    return metrics


# ----------------------------------------------------------------------------------------------------------------- main


def judged(rollout, rows, num_samples: int, proxy, gold) -> dict:
    """Scores of a rollout, [P, N] each. Equal answers are scored once: batching must not make them differ by 1e-7."""
    keys = [(i // num_samples, text) for i, text in enumerate(rollout.completions)]
    different = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    number = torch.tensor([different[key] for key in keys])
    scored_rows, completions = [rows[i] for i, _ in different], [text for _, text in different]
    arguments = [row["prompt"] for row in scored_rows], completions, scored_rows
    result = {"proxy": proxy(*arguments).double()[number]}
    result["gold"] = gold(*arguments).double()[number] if gold else result["proxy"]
    seen = set()
    first = torch.tensor([not (key in seen or seen.add(key)) for key in keys])
    result |= {"logps": rollout.logps.sum(1).cpu(), "first": first, "ended": rollout.ended}
    return {name: value.view(-1, num_samples) for name, value in result.items()}


def main(args: Args) -> None:
    if args.n < 1:
        raise UserError(f"--n {args.n}: give a number greater than 0")
    if args.dataset.startswith(str(ASSETS / "data" / "review_prompts")):
        if not args.reward_fn:
            args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
            args.reward_fn = str(ASSETS / "rewards.py") + ":sentiment"
    if not (args.reward_model or args.reward_fn):
        raise UserError("nothing chooses: give a --reward-model or a --reward-fn")
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype), args)
    proxy = reward_from_model(args.reward_model, args) if args.reward_model else reward_from_function(args.reward_fn)
    gold = reward_from_function(args.reward_fn) if args.reward_model and args.reward_fn else None

    rows = load_rows(args.dataset, args.split)
    for number, row in enumerate(rows, 1):
        try:
            column(row, "prompt")
        except UserError as error:
            raise UserError(f"{args.dataset}, row {number}: {error}")
    rows = prompts_that_fit(rows, tokenizer, args.max_new_tokens, max_row_length(model, args.max_length))
    steps = math.ceil(len(rows) / args.batch_size)
    print(f"{len(rows)} prompts, {args.n} samples each; {steps} steps of {args.batch_size} prompts", flush=True)

    nothing = torch.nn.Module()  # is trained
    done, memory = run.start(nothing, nothing)

    def sample(rows, num_samples):
        prompts = [row["prompt"] for row in rows]
        rollout = generate(model, tokenizer, prompts, num_samples, args.max_new_tokens, args.temperature)
        return rollout, judged(rollout, rows, num_samples, proxy, gold)

    def kept(rollout, scores, rows, step, index):
        num_samples = scores["proxy"].shape[1]
        return [{"step": step, "prompt": row["prompt"], "completion": rollout.completions[i * num_samples + j],
                 "ended": scores["ended"][i, j].item(), "reward": scores["gold"][i, j].item(),
                 "proxy_reward": scores["proxy"][i, j].item()} for i, (row, j) in enumerate(zip(rows, index.tolist()))]

    if done == 0:  # one sample a prompt: the policy without any choice
        rollout, scores = sample(rows, 1)
        reference = kept(rollout, scores, rows, 0, torch.zeros(len(rows), dtype=torch.long))
        memory = {"reference": reference, "best": [], "worst": [], "scores": []}
        run.log(0, reward=scores["gold"].mean().item(), proxy_reward=scores["proxy"].mean().item(), kl=0.0,
                ended=scores["ended"].double().mean().item())
        run.write("samples", *reference)
    ref_gold = torch.tensor([sample["reward"] for sample in memory["reference"]], dtype=torch.float64)
    bar = progress_bar("best_of_n", done, steps)
    for step in bar:
        began = time.perf_counter()
        batch = slice(step * args.batch_size, (step + 1) * args.batch_size)
        rollout, scores = sample(rows[batch], args.n)
        scores["tie"] = tie_probability(scores["proxy"], scores["logps"], scores["first"])
        memory["scores"].append({name: scores[name] for name in ("proxy", "gold", "ended", "tie")})
        best = kept(rollout, scores, rows[batch], step + 1, scores["proxy"].argmax(1))
        memory["best"] += best
        memory["worst"] += kept(rollout, scores, rows[batch], step + 1, scores["proxy"].argmin(1))

        metrics = best_of_n_metrics(args.n, **memory["scores"][-1], ref_gold=ref_gold[batch])
        tokens = sum(len(ids) for ids, _ in rollout.rows)
        run.log(step + 1, **metrics, tokens_per_s=tokens / (time.perf_counter() - began))
        run.write("samples", *best)
        shown = {name: f"{metrics[name]:.2f}" for name in ("proxy_reward", "reward", "win_rate")}
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            run.save_checkpoint(step + 1, nothing, nothing, memory)
    finish(run, args, memory, ref_gold)


def finish(run, args: Args, memory: dict, ref_gold: torch.Tensor) -> None:
    """Write best.jsonl, pairs.jsonl and results.json; print the table over n."""
    best = [(b["prompt"], as_answer(b["prompt"], b["completion"]), b["completion"]) for b in memory["best"]]
    worst = [as_answer(w["prompt"], w["completion"]) for w in memory["worst"]]
    singles = [{"prompt": p, "completion": answer} for p, answer, text in best if text.strip()]
    pairs = [{"prompt": p, "chosen": answer, "rejected": low} for (p, answer, text), low, w in
             zip(best, worst, memory["worst"]) if text.strip() and w["completion"].strip() and answer != low]
    for name, lines in (("best", singles), ("pairs", pairs)):
        write_atomically(run.dir / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    scores = {name: torch.cat([part[name] for part in memory["scores"]]) for name in memory["scores"][0]}
    numbers = sorted({2**k for k in range(args.n.bit_length())} | {args.n})
    results = {n: best_of_n_metrics(n, **scores, ref_gold=ref_gold) for n in numbers}
    evaluation = dict(results[args.n])
    evaluation["proxy_reward_ref"] = sum(s["proxy_reward"] for s in memory["reference"]) / len(memory["reference"])
    for n, metrics in results.items():
        for name in ("proxy_reward", "reward", "reward_se", "kl", "kl_se", "kl_bound", "win_rate"):
            evaluation[f"{name}_n{n}"] = metrics[name]
    optimum = optimal_gain(args, evaluation["kl"])
    if optimum:
        evaluation["share_of_optimum"] = (evaluation["reward"] - results[1]["reward"]) / optimum
    report(run, evaluation, memory["best"], memory["reference"])

    print(f"\n{len(memory['best'])} prompts, every n from the same {args.n} samples of each; gap: what the proxy "
          "gained and the judge did not;\nKL: its bound log n - (n - 1) / n, and the estimate with ties; win rate "
          "against one sample, by the judge, and n / (n + 1)")
    table = [["n", "proxy reward", "gold reward", "gap", "KL bound", "KL", "win rate", "n/(n+1)"]]
    for n, m in results.items():
        gap = m["proxy_reward"] - results[1]["proxy_reward"] - (m["reward"] - results[1]["reward"])
        proxy, gold = (f"{m[name]:.2f} ± {m[name + '_se']:.2f}" for name in ("proxy_reward", "reward"))
        win_rate = f"{m['win_rate']:.1%} ± {m['win_rate_se']:.1%}"
        table.append([n, proxy, gold, f"{gap:.2f}", m["kl_bound"], m["kl"], win_rate, f"{best_of_n_win_rate(n):.1%}"])
    print_table(table)
    print(f"{len(singles)} kept answers in {run.dir / 'best.jsonl'}, {len(pairs)} pairs in {run.dir / 'pairs.jsonl'}")


if __name__ == "__main__":
    run_script(main, Args)
