r"""Policies side by side: reward, KL to the reference, win rate, length, diversity, Elo ratings.

Each policy completes the same held-out prompts, once. Against the reference's own completions,
prompt by prompt,

    win rate = mean_n mu_n,   mu_n = 1 where the policy's is better, 1/2 for a tie, else 0       (1)
    KL       = mean_n [ log pi(y_n | x_n) - log pi_ref(y_n | x_n) ],   y_n ~ pi(. | x_n)         (2)

and every pair of policies is compared on every prompt. With p_ij = sigma(r_i - r_j) (Bradley &
Terry 1952) the rewards r of the policies, with mean 0, maximise

    sum_n  mu_n log p_ij + (1 - mu_n) log p_ji,       Elo = 1000 + (400 / ln 10) r               (3)

The intervals are for another draw of prompts: battles on one prompt share completions, so scores
are added up by prompt before they enter the sandwich (Liang & Zeger 1986). bt_arena.py takes the
battles for independent: its ratings are the same, its intervals are not.

    python evaluate.py                                   # tiny-base against tiny-sft
    python evaluate.py --models runs/dpo runs/grpo --names DPO GRPO
    python evaluate.py --models runs/dpo runs/best_of_n/best.jsonl   # a file of completions
    python evaluate.py --models a b --reference c --dataset prompts.jsonl \
        --judge-fn my_judge.py:judge

A judge f(prompts, completions_a, completions_b, **columns) returns 1 where a is better, 0 where b
is, 0.5 for a tie. distinct-n is the share of different n-grams of words among all that a policy
wrote (Li et al. 2016 divide by words). Lengths are in the reference's tokens.
"""

import gc
import json
import math
import re
from dataclasses import dataclass, field
from itertools import combinations
from numbers import Real
from pathlib import Path

import torch

from common import (
    UserError, all_reduce, encode_continuation, encode_prompt, generate, load_model,
    load_tokenizer, make_row, rank, sequence_logprobs, shard
)
from harness import (
    ASSETS, FILES, GOLD, Count, Limits, Positive, Run, RunArgs, as_turn, call_user, column,
    columns_of, load_different_prompts, load_function, load_reward, load_rows, mean_and_se,
    print_table, progress_bar, run_script, tools_of, wins, with_se, write_atomically
)


@dataclass
class Args(RunArgs):
    models: list[str] = field(default_factory=lambda: [str(ASSETS / "tiny-base")])
    """policies: Hub ids, directories, or files of completions (`prompt`, `completion`)"""
    names: list[str] = field(default_factory=list)
    """their names in the tables; default: the last part of each path"""
    reference: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the policy that the others are compared with"""
    dataset: str = str(ASSETS / "data" / "review_prompts_heldout.jsonl")
    """prompts: Hub id, id:config, or a local .jsonl, .json, .csv or .parquet file or directory"""
    split: str = "train[:500]"
    """split of --dataset, or a part of it such as train[:1000]"""
    reward_fn: str | None = None
    """FILE.py:function that judges completions; embedded data: the true reward"""
    reward_model: str | None = None
    """sequence-classification model with one label that judges, or --reward-fn's proxy"""
    judge_fn: str | None = None
    """FILE.py:function that decides (1) and (3) instead of the reward"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    save_every: Count = 1
    """policies between checkpoints"""
    output_dir: str = "runs/evaluate"


# --- prompts and policies ---


@dataclass
class Policy:
    model: object
    tokenizer: object


def read_policy(name: str, args: Args) -> Policy:
    gc.collect()  # the policy before: FSDP's modules refer to each other
    tokenizer = load_tokenizer(name, args.chat_template)
    return Policy(shard(load_model(name, args.device, args.dtype), args), tokenizer)


def policy_names(args: Args) -> list[str]:
    """The reference's first."""
    own = args.names or [Path(model).name for model in args.models]
    names = [Path(args.reference).name, *own]
    if len(own) != len(args.models) or len(set(names)) < len(names):
        raise UserError(f"names {', '.join(names)}: give --names, a different one for each model")
    return names


def read_completions(path: str, examples) -> list[dict]:
    """A file of completions -> samples, the first completion of each example's prompt."""
    found, rows = {}, load_rows(path, flag="--models")
    for row in rows:
        try:
            prompt, completion = column(row, "prompt"), column(row, "completion")
        except UserError as error:
            raise UserError(f"{row.where}: {error}")
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        found.setdefault(str(prompt), text)
    if len(found) < len(rows):
        print(f"{path}: {len(rows) - len(found)} rows skipped: an earlier row has the same prompt")
    samples = []
    for prompt in [example["prompt"] for example in examples]:
        if str(prompt) not in found:
            raise UserError(f"--models {path}: no completion of {str(prompt)[:80]!r}: add one")
        samples.append({"prompt": prompt, "completion": found[str(prompt)]})
    return samples


def sample_policy(source: str, reference: Policy, prompts, args: Args, step: int):
    """-> samples, one per prompt, and log pi(y | x) - log pi_ref(y | x) [n], None where the
    policy's tokens are others."""
    policy = reference if source == args.reference else read_policy(source, args)
    examples, ref_ids = zip(*prompts)  # a policy's own prompts may begin with a label
    own_ids = [encode_prompt(policy.tokenizer, example["prompt"], tools_of(example))
               for example in examples]
    longest, room = max(map(len, own_ids)), Limits.of(args, policy.model).max_length
    if longest + args.max_new_tokens > room:
        raise UserError(f"--models {source}: has room for {room} tokens, its longest prompt has "
                        f"{longest}: lower --max-new-tokens, or leave long prompts out")
    torch.manual_seed(args.seed + 1000 * step)
    rollout = generate(policy.model, policy.tokenizer, own_ids, 1, args.max_new_tokens,
                       args.temperature)
    samples = []
    for example, text, ended in zip(examples, rollout.completions, rollout.ended.tolist()):
        samples.append({"prompt": example["prompt"], "completion": text, "ended": ended})
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        return samples, None
    ref_rows = [make_row(*ids) for ids in zip(ref_ids, rollout.completion_ids)]
    settings = args.micro_batch_size, args.temperature
    logps = sequence_logprobs(policy.model, rollout.rows, *settings)
    return samples, logps - sequence_logprobs(reference.model, ref_rows, *settings)


# --- measures ---


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams of words / all n-grams of words."""
    grams = []
    for words in map(str.split, texts):
        grams += [tuple(words[t:t + n]) for t in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def measure(samples, log_ratios, examples, rewards: dict, tokenizer) -> dict:
    """What needs no other policy. Each sample gets its rewards."""
    texts = [sample["completion"] for sample in samples]
    completion_ids = [encode_continuation(tokenizer, text) for text in texts]
    metrics = {"length": sum(map(len, completion_ids)) / len(texts)}
    metrics |= {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    if "ended" in samples[0]:
        metrics["ended"] = sum(sample["ended"] for sample in samples) / len(samples)
    if log_ratios is not None:
        metrics["kl"], metrics["kl_se"] = mean_and_se(log_ratios)
    for name, reward in rewards.items():
        values = reward(examples, texts, completion_ids)
        metrics[name], metrics[f"{name}_se"] = mean_and_se(values)
        for sample, value in zip(samples, values.tolist()):
            sample[name] = value
    return metrics


def outcomes_by_judge(args: Args, judge, examples, completions_a, completions_b):
    """mu of (1) by --judge-fn, [n]. In every other pair the sides are swapped: many judges favour
    one side."""
    mu = torch.zeros(len(examples), dtype=torch.float64)
    if rank() > 0:  # the first process calls it
        return all_reduce(mu)
    prompts = [example["prompt"] for example in examples]
    a = [as_turn(prompt, text) for prompt, text in zip(prompts, completions_a)]
    b = [as_turn(prompt, text) for prompt, text in zip(prompts, completions_b)]
    a[1::2], b[1::2] = b[1::2], a[1::2]
    arguments = columns_of(examples) | dict(prompts=prompts, completions_a=a, completions_b=b)
    values = call_user("--judge-fn", args.judge_fn, judge, arguments, args.reward_timeout)
    returned = f"--judge-fn {args.judge_fn} returned"
    if len(values) != len(mu):
        raise UserError(f"{returned} {len(values)} numbers for {len(mu)} pairs: return one each")
    for n, value in enumerate(values):
        if not isinstance(value, Real) or value not in (0, 0.5, 1):
            raise UserError(f"{returned} {value!r} for {examples[n].where}: return 1, 0.5 or 0")
        mu[n] = value if n % 2 == 0 else 1 - value
    return all_reduce(mu)


def battle(names: list[str], samples: dict, examples, args: Args, judge):
    """Every pair of policies on every prompt -> i, j, mu, prompt, [battles] each."""
    judged = "completion" if judge else "reward"
    values = [[sample[judged] for sample in samples[name]] for name in names]
    pairs, mu = list(combinations(range(len(names)), 2)), []
    for i, j in pairs:
        if judge:
            mu.append(outcomes_by_judge(args, judge, examples, values[i], values[j]))
        else:
            mu.append(wins(torch.tensor(values[i]), torch.tensor(values[j])))
    first, second = torch.tensor(pairs).T.repeat_interleave(len(examples), 1)
    return first, second, torch.cat(mu), torch.arange(len(examples)).repeat(len(pairs))


def fit_elo(i, j, mu, prompt, num_players: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Equation (3): players i, j, outcomes mu, prompts, [N] each -> rewards r [K] (nats, mean 0)
    and their covariance [K, K].

    None where no finite maximum exists: unless each player can be reached from each other
    along edges winner -> loser, a tie being one both ways (Ford 1957).
    """
    one_hot = torch.eye(num_players, dtype=torch.float64)
    X, reaches = one_hot[i] - one_hot[j], one_hot.bool()  # [N, K], [K, K]
    reaches[i[mu > 0], j[mu > 0]] = True
    reaches[j[mu < 1], i[mu < 1]] = True
    for k in range(num_players):  # Warshall
        reaches |= reaches[:, k:k + 1] & reaches[k]
    if not reaches.all():
        return None
    rewards = torch.zeros(num_players, dtype=torch.float64)
    for _ in range(200):  # Newton: about 6; at 0 the curvature is largest, so steps fall short
        p = torch.sigmoid(X @ rewards)
        hessian = X.T @ (X * (p * (1 - p))[:, None])
        hessian += 1 / num_players  # fixes the sum, which X does not see
        step = torch.linalg.solve(hessian, X.T @ (mu - p))
        rewards = rewards + step
        if step.abs().max() < 1e-11:
            break
    scores = torch.zeros(int(prompt.max()) + 1, num_players, dtype=torch.float64)
    scores = scores.index_add(0, prompt, X * (mu - p)[:, None])  # [prompts, K]
    inverse = torch.linalg.inv(hessian) - 1 / num_players
    return rewards, inverse @ (scores.T @ scores) @ inverse


# --- report ---


def compare(run, names: list[str], memory: dict, examples, judge) -> None:
    """Win rates, battles.jsonl, Elo ratings, results.json."""
    metrics = memory["metrics"]
    i, j, mu, prompt = battle(names, memory["samples"], examples, run.args, judge)
    metrics[names[0]]["win_rate"] = 0.5
    for k, name in enumerate(names[1:], 1):  # against the reference, which is i
        rate, se = mean_and_se(1 - mu[(i == 0) & (j == k)])
        metrics[name] |= {"win_rate": rate, "win_rate_se": se}
    lines, winner = [], {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}
    for a, b, x, n in zip(i.tolist(), j.tolist(), mu.tolist(), prompt.tolist()):
        row = {"model_a": names[a], "model_b": names[b], "winner": winner[x], "prompt": n}
        lines.append(json.dumps(row) + "\n")
    if rank() == 0:
        write_atomically(run.dir / "battles.jsonl", "".join(lines).encode())
    fit = fit_elo(i, j, mu, prompt, len(names))
    if fit:
        rewards, covariance = fit
        points = 400 / math.log(10)
        half = 1.96 * points * covariance.diagonal().clamp(min=0).sqrt()
        for name, reward, width in zip(names, rewards.tolist(), half.tolist()):
            elo = 1000 + points * reward
            metrics[name] |= {"elo": elo, "elo_low": elo - width, "elo_high": elo + width}
    run.write_results(policies=metrics, prompts=len(examples), battles=len(lines))


FORMS = {
    "reward": ".2f", "proxy_reward": ".2f", "kl": ".2f", "win_rate": ".1%", "elo": ".0f",
    "length": ".1f", "ended": ".1%", "distinct_1": ".3f", "distinct_2": ".3f",
}


def print_policies(run, metrics: dict) -> None:
    """The table, the highest win rate first, and how to look at the battles."""
    shown = [name for name in FORMS if any(name in m for m in metrics.values())]
    table = [["policy", *(name.replace("_", " ") for name in shown)]]
    for policy, m in sorted(metrics.items(), key=lambda item: -item[1]["win_rate"]):
        cells = {name: with_se(m, name, FORMS[name]) for name in shown}
        if "elo" in m:
            cells["elo"] += f" [{m['elo_low']:.0f} {m['elo_high']:.0f}]"
        table.append([policy, *cells.values()])
    print_table(table)
    command = f"python bt_arena.py --dataset {run.dir / 'battles.jsonl'}"
    if "elo" not in shown:
        print("no Elo: some policies won all battles, so no finite ratings fit")
        command += " --l2 0.01"
    print(f"saved to {run.dir}; the battles by other models of ties:\n  {command}")


# --- main ---


def main(args: Args) -> None:
    names = policy_names(args)
    embedded = str(ASSETS / "data" / "review_prompts")
    if str(Path(args.dataset).resolve()).startswith(embedded):
        args.reward_fn = args.reward_fn or GOLD
    if not (args.reward_fn or args.reward_model or args.judge_fn):
        raise UserError("nothing judges: give a --reward-fn, a --reward-model or a --judge-fn")
    run = Run(args)
    reference = read_policy(args.reference, args)
    judge = load_function("--judge-fn", args.judge_fn) if args.judge_fn else None
    template = reference.tokenizer.chat_template
    gold = load_reward(args, args.reward_fn)
    proxy = load_reward(args, None, args.reward_model, template)
    rewards = {"reward": gold or proxy, "proxy_reward": gold and proxy}
    rewards = {name: reward for name, reward in rewards.items() if reward}
    prompts = load_different_prompts(args, reference.model, reference.tokenizer)
    examples = [example for example, _ in prompts]
    print(f"{len(prompts)} prompts; {len(names)} policies; reference: {names[0]}", flush=True)

    done, memory = run.start(None, None)  # nothing is trained
    memory = memory or {"samples": {}, "metrics": {}}
    bar = progress_bar("evaluate", done, len(names))
    for step in bar:
        name, source = names[step], [args.reference, *args.models][step]
        if re.search(FILES, source):
            samples, log_ratios = read_completions(source, examples), None
        else:
            samples, log_ratios = sample_policy(source, reference, prompts, args, step)
        metrics = measure(samples, log_ratios, examples, rewards, reference.tokenizer)
        memory["samples"][name], memory["metrics"][name] = samples, metrics
        run.log(step, "eval", policy=name, **metrics)
        run.write("samples", *({"policy": name, **sample} for sample in samples))
        if (step + 1) % args.save_every == 0 or step + 1 == len(names):
            run.save_checkpoint(step + 1, None, None, memory)
    compare(run, names, memory, examples, judge)
    print()
    print_policies(run, memory["metrics"])


if __name__ == "__main__":
    run_script(main, Args)
