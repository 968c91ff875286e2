r"""Best of n: sample n completions, keep the one with the highest reward. No training.

With F(y) the probability that a sample of pi_ref scores at most r(x, y), and F(<y) that it
scores less, the completion that is kept has

    pi_n(y | x) = pi_ref(y | x) (F(y)^n - F(<y)^n) / (F(y) - F(<y))                     (1)

    KL(pi_n || pi_ref) <= log n - (n - 1) / n,    equal where no completions tie        (2)
    P(it beats a fresh sample) = n / (n + 1),     by the reward that chose, no ties     (3)

(2): Stiennon et al. (2020), appendix G.3; that it is only a bound: Beirami et al. (2024).
Of equals one is chosen at random: (1) gives, with rho = F(<y) / F(y) and y drawn from pi_n,

    KL(pi_n || pi_ref) = log n - (n - 1) / n - E[ g(rho, n) ],    g in kl_of_ties()     (4)

    python best_of_n.py        # tiny-sft, chosen by tiny-rm, judged by the truth: 30 s
    python best_of_n.py --reward-fn assets/rewards.py:sentiment   # by the truth: many ties
    python best_of_n.py --dataset assets/data/review_prompts.jsonl --split train \
        --samples-per-prompt 16                                   # data for sft.py and dpo.py
    python sft.py --model assets/tiny-sft --dataset runs/best_of_n/best.jsonl
    python dpo.py --dataset runs/best_of_n/pairs.jsonl --reward-fn assets/rewards.py:sentiment

What the reward model promises (proxy) rises with n. The truth (gold) falls behind: this is
over-optimization (Gao et al. 2022). best.jsonl holds the best completion of each prompt,
truncated or not, and pairs.jsonl the best and the worst, where they differ.

Data: `prompt`, a text or a list of messages. Further columns reach the reward function.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from common import generate, load_model, load_tokenizer, rank, shard
from harness import (
    ASSETS, GOLD, Count, HeldOut, Positive, Run, RunArgs, as_turn, load_different_prompts,
    load_rewards, mean_and_se, optimal_gain, print_table, progress_bar, report, run_script, wins,
    with_se, write_atomically
)


@dataclass
class Args(RunArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model that is sampled, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "review_prompts_heldout.jsonl")
    """prompts: Hub id, id:config, or a local .jsonl, .json, .csv or .parquet file or directory"""
    split: str = "train[:200]"
    """split of --dataset, or a part of it such as train[:1000]"""
    reward_model: str | None = None
    """sequence-classification model with one label that chooses; embedded data: tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function that chooses, or judges what --reward-model chose"""
    samples_per_prompt: Annotated[Count, tyro.conf.arg(aliases=["--n"])] = 64
    """completions per prompt, of which one is kept"""
    batch_size: Count = 8
    """prompts per step"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions"""
    save_every: Count = 5
    """steps between checkpoints"""
    output_dir: str = "runs/best_of_n"


# --- estimators ---


def best_of_n_kl(n: int) -> float:
    """Equation (2): the largest KL (nats) of best of n to the policy that it samples."""
    return math.log(n) - (n - 1) / n


def best_of_n_win_rate(n: int) -> float:
    """Equation (3): against one fresh sample, by the reward that chose, without ties."""
    return n / (n + 1)


def best_of_n_weights(rewards: torch.Tensor, n: int) -> torch.Tensor:
    """P(each of N samples is the best of a random n of them), ties broken at random:
    [P, N] -> [P, N] fp64. Without ties, C(k - 1, n - 1) / C(N, n) for the k-th lowest.

    sum_i weights_i f(y_i), the mean over all subsets of n, is an unbiased estimate of E[f]
    under best of n, for any f (Nakano et al. 2021, appendix I).
    """
    num = rewards.shape[1]
    within = [math.comb(k, n) / math.comb(num, n) for k in range(num + 1)]  # the k lowest
    within = torch.tensor(within, dtype=torch.float64)
    below, up_to = rank_range(rewards)
    return (within[up_to] - within[below]) / (up_to - below)


def rank_range(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[P, N] -> how many in its row are lower, and how many at most as high, [P, N]."""
    ordered = rewards.sort(1).values
    up_to = torch.searchsorted(ordered, rewards, right=True)
    return torch.searchsorted(ordered, rewards), up_to


def kl_of_ties(rho: torch.Tensor, n: int) -> torch.Tensor:
    """g of equation (4), nats: what the best of n uniform numbers U tells about U beyond the
    interval that it lies in, an interval from rho b to b:

        g = log( n (1 - rho) / (1 - rho^n) ) - (n - 1) ( rho^n log(rho) / (1 - rho^n) + 1 / n )

    0 for rho -> 1 (no ties), log n - (n - 1) / n for rho = 0 (all tie).
    """
    rho = rho.double()
    tail = torch.special.xlogy(rho**n, rho) / (1 - rho**n)
    g = torch.log(n * (1 - rho) / (1 - rho**n)) - (n - 1) * (tail + 1 / n)
    return torch.where(rho > 1 - 1e-6, 0.0, g)  # below n^2 1e-13, computed as 0 / 0


def tie_probability(rewards, logps, is_first) -> torch.Tensor:
    """P(a fresh sample ties with this one) = F(y) - F(<y), estimated: [P, N] each -> [P, N].

    The larger of two estimates: the share of the other samples that tie, and pi_ref's own
    probability of the different completions seen (is_first: not seen before in its row).
    """
    below, up_to = rank_range(rewards)
    share = (up_to - below - 1) / max(1, rewards.shape[1] - 1)
    probabilities = logps.double().exp() * is_first
    mass = probabilities.gather(1, rewards.argsort(1)).cumsum(1)
    mass = torch.nn.functional.pad(mass, (1, 0))  # [P, N + 1], of the k lowest
    mass = mass.gather(1, up_to) - mass.gather(1, below)
    return torch.maximum(share, mass).clamp(max=1.0)


def best_of_n_metrics(n: int, scores: dict, ref_rewards: torch.Tensor) -> dict:
    """Equations (1) to (4). scores: score()'s; ref_rewards [P, 1]: of another sample."""
    proxy, tie = scores["proxy_reward"], scores["tie"]
    weights = best_of_n_weights(proxy, n)  # [P, N]
    below = torch.minimum(rank_range(proxy)[0] / proxy.shape[1], 1 - tie)
    rho = below / (below + tie).clamp(min=1e-300)
    values = {
        "proxy_reward": proxy,
        "reward": scores["reward"],
        "kl": best_of_n_kl(n) - kl_of_ties(rho, n),
        "win_rate": wins(scores["reward"], ref_rewards),
    }
    metrics = {"kl_bound": best_of_n_kl(n)}
    for name, value in values.items():
        metrics[name], metrics[f"{name}_se"] = mean_and_se((weights * value).sum(1))
    metrics["ended"] = (weights * scores["ended"]).sum(1).mean().item()
    return metrics


# --- one step ---


def score(rollout, examples, proxy, gold) -> dict[str, torch.Tensor]:
    """N completions of P examples each -> rewards, whether they ended, ties, [P, N] each.

    Equal completions have the reward of the first: batching must not make them differ.
    """
    shape = P, N = len(examples), len(rollout.rows) // len(examples)
    first = []
    for start in range(0, P * N, N):
        texts = rollout.completions[start:start + N]
        first += [start + texts.index(text) for text in texts]

    def rewards_by(reward):
        repeated = [example for example in examples for _ in range(N)]
        rewards = reward(repeated, rollout.completions, rollout.completion_ids)
        return rewards.double()[first].view(shape)

    proxy_rewards = rewards_by(proxy)
    is_first = torch.tensor(first) == torch.arange(P * N)
    logps = rollout.logps.sum(1).cpu()
    return {
        "proxy_reward": proxy_rewards,
        "reward": proxy_rewards if gold is proxy else rewards_by(gold),
        "ended": rollout.ended.view(shape),
        "tie": tie_probability(proxy_rewards, logps.view(shape), is_first.view(shape)),
    }


def pick(rollout, scores, examples, indices, step: int) -> list[dict]:
    """The completions at indices [P], one per prompt, for samples.jsonl."""
    samples, N = [], scores["tie"].shape[1]
    for i, (example, index) in enumerate(zip(examples, indices.tolist())):
        sample = {"step": step, "prompt": example["prompt"]}
        sample["completion"] = rollout.completions[i * N + index]
        for name in ("ended", "reward", "proxy_reward"):
            sample[name] = scores[name][i, index].item()
        samples.append(sample)
    return samples


# --- main ---


def write_data(run, best: list[dict], worst: list[dict]) -> None:
    """best.jsonl for sft.py, and pairs.jsonl for dpo.py and reward_model.py."""
    rows, pairs = [], []
    for high, low in zip(best, worst):
        prompt = high["prompt"]
        chosen, rejected = [as_turn(prompt, sample["completion"]) for sample in (high, low)]
        rows.append({"prompt": prompt, "completion": chosen})
        if chosen != rejected:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    for name, written in (("best.jsonl", rows), ("pairs.jsonl", pairs)):
        if rank() == 0:
            lines = [json.dumps(row) + "\n" for row in written]
            write_atomically(run.dir / name, "".join(lines).encode())
        print(f"{len(written)} of {len(best)} prompts in {run.dir / name}")


def report_over_n(run, memory: dict, held_out: HeldOut) -> None:
    """results.json, and the table over n."""
    most, parts = run.args.samples_per_prompt, memory["scores"]
    ref_scores = memory["reference_scores"]
    scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    numbers = sorted({2**k for k in range(most.bit_length())} | {most})
    results = {n: best_of_n_metrics(n, scores, ref_scores["reward"]) for n in numbers}
    evaluation = results[most] | {"proxy_reward_ref": ref_scores["proxy_reward"].mean().item()}
    optimum = optimal_gain(run.args, evaluation["kl"])
    if optimum:
        gain = evaluation["reward"] - results[1]["reward"]
        evaluation["share_of_optimum"] = gain / optimum
    for n, metrics in results.items():
        evaluation |= {f"{name}_n{n}": value for name, value in metrics.items()}
    report(run, evaluation, memory["best"], held_out, "best of n")

    print(f"\nEvery n, by the same {most} completions. Proxy: what chooses; gold: what judges:")
    table = [["n", "proxy reward", "gold reward", "KL bound", "KL", "win rate", "n/(n+1)"]]
    for n, m in results.items():
        rewards = with_se(m, "proxy_reward", ".2f"), with_se(m, "reward", ".2f")
        win_rates = with_se(m, "win_rate", ".1%"), f"{best_of_n_win_rate(n):.1%}"
        table.append([n, *rewards, m["kl_bound"], m["kl"], *win_rates])
    print_table(table)


def main(args: Args) -> None:
    embedded = str(ASSETS / "data" / "review_prompts")
    if str(Path(args.dataset).resolve()).startswith(embedded) and not args.reward_fn:
        args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
        args.reward_fn = GOLD
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    reference = shard(load_model(args.model, args.device, args.dtype), args)
    proxy, gold = load_rewards(args, tokenizer.chat_template)
    prompts = load_different_prompts(args, reference, tokenizer)
    steps = math.ceil(len(prompts) / args.batch_size)
    print(f"{len(prompts)} prompts, {args.samples_per_prompt} completions of each", flush=True)

    done, memory = run.start(None, None)  # nothing is trained

    def draw(batch, num_samples):
        rollout = generate(reference, tokenizer, [ids for _, ids in batch], num_samples,
                           args.max_new_tokens, args.temperature)
        examples = [example for example, _ in batch]
        return examples, rollout, score(rollout, examples, proxy, gold)

    if done == 0:  # one completion per prompt: the policy without any choice
        examples, rollout, scores = draw(prompts, 1)
        samples = pick(rollout, scores, examples, scores["reward"].argmax(1), 0)
        memory = {"reference_samples": samples, "reference_scores": scores}
        memory |= {"best": [], "worst": [], "scores": []}
        run.log(0, "eval", **best_of_n_metrics(1, scores, scores["reward"]))
        run.write("samples", *samples)
    held_out = HeldOut(prompts, gold, reference, tokenizer, memory["reference_samples"])
    ref_rewards = memory["reference_scores"]["reward"]  # [P, 1]
    bar = progress_bar("best_of_n", done, steps)
    for step in bar:
        batch = slice(step * args.batch_size, (step + 1) * args.batch_size)
        examples, rollout, scores = draw(prompts[batch], args.samples_per_prompt)
        best, worst = scores["proxy_reward"].argmax(1), scores["proxy_reward"].argmin(1)
        best = pick(rollout, scores, examples, best, step + 1)
        memory["best"] += best
        memory["worst"] += pick(rollout, scores, examples, worst, step + 1)
        memory["scores"].append(scores)

        metrics = best_of_n_metrics(args.samples_per_prompt, scores, ref_rewards[batch])
        run.log(step + 1, "eval", **metrics)
        run.write("samples", *best)
        bar.set_postfix(reward=f"{metrics['reward']:.2f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            run.save_checkpoint(step + 1, None, None, memory)
    report_over_n(run, memory, held_out)
    write_data(run, memory["best"], memory["worst"])


if __name__ == "__main__":
    run_script(main, Args)
