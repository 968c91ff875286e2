"""Any number of policies side by side: reward, KL to the reference, win rate, length, diversity, and an Elo table.

Each policy answers the same held-out prompts, once. Against the reference's own answers, prompt by prompt,

    win rate = mean_n mu_n,    mu_n = 1 where the policy's answer is better, 1/2 where neither is, else 0          (1)
    KL       = mean_n [ log pi(y_n | x_n) - log pi_ref(y_n | x_n) ],    y_n ~ pi(. | x_n)                           (2)

and in a round robin every pair of policies battles on every prompt. With p_ij = sigma(r_i - r_j) (Bradley & Terry 1952)
the ratings r maximise

    sum_n  mu_n log p_ij + (1 - mu_n) log p_ji,      Elo = 1000 + (400 / ln 10) r,  mean of r 0                     (3)

which is what bt_bandit.py does, in a few lines for a few players. The intervals are for another draw of prompts:
battles on one prompt share answers, so scores are added up by prompt before they enter the sandwich (Liang & Zeger
1986). The command that this script prints at its end fits the same battles.jsonl, as independent ones: the ratings are
the same, the intervals are not.

    python evaluate.py                                                   # tiny-base against tiny-sft
    python evaluate.py --models runs/dpo runs/ppo_rlhf runs/grpo --names DPO PPO GRPO --reward-model assets/tiny-rm
    python evaluate.py --models runs/dpo runs/best_of_n/best.jsonl       # a file of answers is a policy too
    python evaluate.py --models a b --reference c --dataset prompts.jsonl --judge-fn my_judge.py:judge

A judge is a Python function of pairs, f(prompts, completions_a, completions_b, **columns) -> list with 1 where a is
better, 0 where b is, 0.5 where neither: it then decides (1) and (3) instead of the reward. Which policy is its a
changes from prompt to prompt. distinct-n is the share of different n-grams of words among all that a policy wrote
(after Li et al. 2016, who divide by words). Policies of reward_conditioning.py are asked for their best: their
tokenizer knows the prefix.
"""

import json
import math
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch

from common import (ASSETS, Run, UserError, as_answer, column, encode_continuation, encode_prompt, generate,
                    load_function, load_model, load_rows, load_tokenizer, make_row, max_row_length, mean_and_se,
                    optimal_gain, print_table, progress_bar, prompts_that_fit, reward_from_function, reward_from_model,
                    run_script, sequence_logprobs, shard, write_atomically)


@dataclass
class Args:
    models: list[str] = field(default_factory=lambda: [str(ASSETS / "tiny-base")])
    """policies: Hub ids or directories, or .jsonl files of their answers (prompt, completion)"""
    names: list[str] = field(default_factory=list)
    """what the tables call them; default: the last part of each path"""
    reference: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the policy that the others are held against; it battles along"""
    dataset: str = str(ASSETS / "data" / "review_prompts_heldout.jsonl")
    """held-out prompts: Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train[:500]"
    """split of --dataset, or a part of it"""
    reward_fn: str | None = None
    """FILE.py:function that judges; default on the embedded data: assets/rewards.py:sentiment"""
    reward_model: str | None = None
    """a sequence-classification model with one label: judges, or, beside --reward-fn, is reported as proxy reward"""
    judge_fn: str | None = None
    """FILE.py:function that compares pairs of completions, instead of the reward"""
    output_dir: str = "runs/evaluate"
    """battles.jsonl, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    micro_batch_size: int | None = None
    """completions a forward pass; default: as many as fit into 4,096 padded tokens"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the reference's window"""
    max_new_tokens: int = 64
    """of a completion"""
    temperature: float = 1.0
    """of the samples, and of all log-probabilities"""
    resume: bool = False
    """go on after the last policy that is done in --output-dir"""
    seed: int = 0
    """of sampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward passes; auto: bfloat16 autocast on GPUs, float32 on CPUs"""
    replicas: int = 1
    """under torchrun: copies of the model, each divided among as many processes (HSDP: one a node); 1: one among all"""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizers' templates"""

    tensorboard: ClassVar = False  # there is no curve


# ------------------------------------------------------------------------------------------------------------- policies


def policy_names(args: Args) -> list[str]:
    """The reference's first."""
    if args.names and len(args.names) != len(args.models):
        raise UserError(f"--names: {len(args.names)} for {len(args.models)} models: give one for each")
    names = [Path(args.reference).name, *(args.names or [Path(model).name for model in args.models])]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--models: two policies are called {name!r}: tell them apart with --names")
    return names


def read_answers(path: str, rows: list[dict]) -> list[str]:
    """A file of answers -> that to each row's prompt."""
    answers = {}
    for number, row in enumerate(load_rows(path), 1):
        try:
            completion = column(row, "completion")
            completion = completion if isinstance(completion, str) else completion[-1]["content"]
            answers[str(column(row, "prompt"))] = completion
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}")
    for row in rows:
        if str(row["prompt"]) not in answers:
            raise UserError(f"--models {path}: no answer to the prompt {str(row['prompt'])[:80]!r}: write one, or "
                            "leave it out of --dataset")
    return [answers[str(row["prompt"])] for row in rows]


def sample_policy(name: str, rows, reference, ref_tokenizer, args: Args, seed: int):
    """-> samples, one a prompt, and their log pi(y | x) - log pi_ref(y | x), None where that is not known: of a policy
    that is a file, or one whose tokens are not the reference's."""
    prompts = [row["prompt"] for row in rows]
    if name.endswith(".jsonl"):
        return [{"prompt": p, "completion": c} for p, c in zip(prompts, read_answers(name, rows))], None
    tokenizer = load_tokenizer(name, args.chat_template)
    model = shard(load_model(name, args.device, args.dtype), args)
    longest, room = max(len(encode_prompt(tokenizer, p)) for p in prompts), max_row_length(model, args.max_length)
    if longest + args.max_new_tokens > room:
        raise UserError(f"--models {name}: has room for {room} tokens, the longest prompt takes {longest}: lower "
                        "--max-new-tokens, or shorten the prompts")
    torch.manual_seed(seed)
    rollout = generate(model, tokenizer, prompts, 1, args.max_new_tokens, args.temperature)
    samples = [{"prompt": p, "completion": c, "ended": e}
               for p, c, e in zip(prompts, rollout.completions, rollout.ended.tolist())]
    if tokenizer.get_vocab() != ref_tokenizer.get_vocab():
        return samples, None
    ref_rows = [make_row(encode_prompt(ref_tokenizer, p), ids[mask.index(1):])
                for p, (ids, mask) in zip(prompts, rollout.rows)]
    log_ratios = (sequence_logprobs(model, rollout.rows, args.micro_batch_size, args.temperature)
                  - sequence_logprobs(reference, ref_rows, args.micro_batch_size, args.temperature))
    return samples, log_ratios.tolist()


# ------------------------------------------------------------------------------------------------------------- measures


def distinct_n(texts: list[str], n: int) -> float:
    """Different n-grams of words / all n-grams of words."""
    grams = [tuple(words[t:t + n]) for words in map(str.split, texts) for t in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def outcomes_by_reward(rewards_a: torch.Tensor, rewards_b: torch.Tensor) -> torch.Tensor:
    """mu of (1): 1 where a has more, 0.5 where they tie."""
    return (rewards_a > rewards_b).double() + 0.5 * (rewards_a == rewards_b)


def outcomes_by_judge(spec: str, function, rows, completions_a, completions_b) -> torch.Tensor:
    """mu of (1) by a Python function of pairs. Every other pair is turned round: many judges like one side."""
    turned = [n % 2 == 1 for n in range(len(rows))]
    prompts = [row["prompt"] for row in rows]
    sides = [(b, a) if turn else (a, b) for a, b, turn in zip(completions_a, completions_b, turned)]
    a, b = ([as_answer(p, pair[side]) for p, pair in zip(prompts, sides)] for side in (0, 1))
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    try:
        outcomes = [float(mu) for mu in function(prompts=prompts, completions_a=a, completions_b=b, **columns)]
    except Exception as error:  # a judge raises what it likes
        raise UserError(f"--judge-fn {spec} raised {type(error).__name__}: {error}: mend the function")
    if len(outcomes) != len(rows):
        raise UserError(f"--judge-fn {spec} returned {len(outcomes)} outcomes for {len(rows)} pairs: return one each")
    for prompt, mu in zip(prompts, outcomes):
        if mu not in (0.0, 0.5, 1.0):
            raise UserError(f"--judge-fn {spec} returned {mu} for prompt {str(prompt)[:80]!r}: return 1 where a is "
                            "better, 0 where b is, 0.5 where neither")
    return torch.tensor([1 - mu if turn else mu for mu, turn in zip(outcomes, turned)], dtype=torch.float64)


def fit_elo(i, j, mu, prompt, num_players: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Equation (3): players i, j [N], outcomes mu [N], prompts [N] -> rewards r [K] with mean 0, nats, and their
    covariance [K, K], robust to battles on one prompt being alike. None where no finite maximum exists: unless each
    player can be reached from each other along edges winner -> loser, a tie being one both ways (Ford 1957)."""
    one_hot = torch.eye(num_players, dtype=torch.float64)
    X = one_hot[i] - one_hot[j]  # [N, K]
    beats = torch.zeros(num_players, num_players, dtype=torch.bool)
    beats[i[mu > 0], j[mu > 0]] = True
    beats[j[mu < 1], i[mu < 1]] = True
    for k in range(num_players):  # Warshall
        beats |= beats[:, k:k + 1] & beats[k]
    if not (beats | one_hot.bool()).all():
        return None
    rewards = torch.zeros(num_players, dtype=torch.float64)
    for _ in range(200):  # about 6 are needed: at 0 the curvature is largest, and steps from there fall short
        p = torch.sigmoid(X @ rewards)
        hessian = X.T @ (X * (p * (1 - p))[:, None]) + 1 / num_players  # the last term fixes the sum, unseen by X
        step = torch.linalg.solve(hessian, X.T @ (mu - p))
        rewards = rewards + step
        if step.abs().max() < 1e-11:
            break
    scores = torch.zeros(int(prompt.max()) + 1, num_players, dtype=torch.float64)
    scores = scores.index_add(0, prompt, X * (mu - p)[:, None])  # [prompts, K]
    inverse = torch.linalg.inv(hessian) - 1 / num_players
    return rewards, inverse @ (scores.T @ scores) @ inverse


# ----------------------------------------------------------------------------------------------------------------- main


def measure(samples: list[dict], log_ratios, ref_samples, rows, proxy, ref_tokenizer, args: Args) -> dict:
    """What one policy's samples say, but for what needs pairs. Samples get their `reward`."""
    texts = [sample["completion"] for sample in samples]
    inputs = [row["prompt"] for row in rows], texts, rows
    lengths = torch.tensor([len(encode_continuation(ref_tokenizer, text)) for text in texts])
    metrics = {"length": lengths.double().mean().item()} | {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    if "ended" in samples[0]:
        metrics["ended"] = sum(sample["ended"] for sample in samples) / len(samples)
    if log_ratios is not None:
        metrics["kl"], metrics["kl_se"] = mean_and_se(torch.tensor(log_ratios))
    if args.reward_fn:
        rewards = reward_from_function(args.reward_fn)(*inputs)
        if proxy:
            metrics["proxy_reward"], metrics["proxy_reward_se"] = mean_and_se(proxy(*inputs))
    elif proxy:
        rewards = proxy(*inputs)
    else:
        return metrics
    for sample, reward in zip(samples, rewards.tolist()):
        sample["reward"] = reward
    metrics["reward"], metrics["reward_se"] = mean_and_se(rewards)
    known_for = SimpleNamespace(model=args.reference, reward_fn=args.reward_fn, temperature=args.temperature)
    optimum = optimal_gain(known_for, metrics["kl"]) if "kl" in metrics and ref_samples else None
    if optimum:
        ref_reward = sum(sample["reward"] for sample in ref_samples) / len(ref_samples)
        metrics["share_of_optimum"] = (metrics["reward"] - ref_reward) / optimum
    return metrics


def battle(names: list[str], samples: dict, rows, args: Args):
    """Every pair of policies on every prompt -> i, j, mu, prompt, each [battles]."""
    judge = load_function("--judge-fn", args.judge_fn) if args.judge_fn else None
    parts = []
    for i, j in combinations(range(len(names)), 2):
        sides = samples[names[i]], samples[names[j]]
        if judge:
            mu = outcomes_by_judge(args.judge_fn, judge, rows, *([s["completion"] for s in side] for side in sides))
        else:
            mu = outcomes_by_reward(*(torch.tensor([s["reward"] for s in side]) for side in sides))
        parts.append((torch.full_like(mu, i).long(), torch.full_like(mu, j).long(), mu, torch.arange(len(mu))))
    return [torch.cat(columns) for columns in zip(*parts)]


def finish(run, names: list[str], memory: dict, rows, args: Args) -> None:
    """Win rates, battles.jsonl, Elo, results.json, the table."""
    metrics = memory["metrics"]
    i, j, mu, prompt = battle(names, memory["samples"], rows, args)
    metrics[names[0]]["win_rate"] = 0.5
    for k, name in enumerate(names[1:], 1):  # the pairs with the reference come as (0, k)
        metrics[name]["win_rate"], metrics[name]["win_rate_se"] = mean_and_se(1 - mu[(i == 0) & (j == k)])
    winner = {1.0: "model_a", 0.0: "model_b", 0.5: "tie"}
    lines = [{"model_a": names[a], "model_b": names[b], "winner": winner[outcome], "prompt": n}
             for a, b, outcome, n in zip(*(column.tolist() for column in (i, j, mu, prompt)))]
    write_atomically(run.dir / "battles.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    elo = fit_elo(i, j, mu, prompt, len(names))
    if elo:
        points = 400 / math.log(10)
        for name, reward, variance in zip(names, elo[0].tolist(), elo[1].diagonal().clamp(min=0).tolist()):
            middle, half = 1000 + points * reward, 1.96 * points * variance**0.5
            metrics[name] |= {"elo": middle, "elo_low": middle - half, "elo_high": middle + half}
    run.write_results(policies=metrics, prompts=len(rows), battles=len(lines))

    print(f"\n{len(rows)} held-out prompts, one sample each; reference: {names[0]}")
    form = {"reward": ".2f", "proxy_reward": ".2f", "kl": ".2f", "win_rate": ".1%", "elo": ".0f",
            "share_of_optimum": ".1%", "length": ".1f", "ended": ".1%", "distinct_1": ".3f", "distinct_2": ".3f"}
    form = {key: value for key, value in form.items() if any(key in m for m in metrics.values())}

    def cell(m, key):
        se = f" ± {m[key + '_se']:{form[key]}}" if key + "_se" in m else ""
        return f"{m[key]:{form[key]}}{se}" if key in m else "-"

    table = [["policy", *(key.replace("_", " ") for key in form)]]
    for name in sorted(names, key=lambda name: -metrics[name].get("elo", metrics[name]["win_rate"])):
        m = metrics[name]
        interval = f" [{m['elo_low']:.0f} {m['elo_high']:.0f}]" if "elo" in m else ""
        table.append([name, *(cell(m, key) + interval * (key == "elo") for key in form)])
    print_table(table)
    if not elo:
        print("no Elo: some policies won all battles against the others, so no finite ratings fit")
    print(f"saved to {run.dir}; the battles again, with other models of ties, a bootstrap and all probabilities:\n"
          f"  python bt_bandit.py --data {run.dir / 'battles.jsonl'}" + " --l2 0.01" * (not elo))


def main(args: Args) -> None:
    names = policy_names(args)
    if args.dataset == Args.dataset:
        args.reward_fn = args.reward_fn or str(ASSETS / "rewards.py") + ":sentiment"
    if not (args.reward_fn or args.reward_model or args.judge_fn):
        raise UserError("nothing judges: give a --reward-fn, a --reward-model or a --judge-fn")
    run = Run(args)
    ref_tokenizer = load_tokenizer(args.reference, args.chat_template)
    reference = shard(load_model(args.reference, args.device, args.dtype), args)
    proxy = reward_from_model(args.reward_model, args) if args.reward_model else None
    rows = load_rows(args.dataset, args.split)
    for number, row in enumerate(rows, 1):
        try:
            column(row, "prompt")
        except UserError as error:
            raise UserError(f"{args.dataset}, row {number}: {error}")
    rows = prompts_that_fit(rows, ref_tokenizer, args.max_new_tokens, max_row_length(reference, args.max_length))

    nothing = torch.nn.Module()  # is trained
    done, memory = run.start(nothing, nothing)
    memory = memory or {"samples": {}, "metrics": {}}
    bar = progress_bar("evaluate", done, len(names))
    for step in bar:
        source = [args.reference, *args.models][step]
        samples, log_ratios = sample_policy(source, rows, reference, ref_tokenizer, args, args.seed + 1000 * step)
        ref_samples = memory["samples"].get(names[0])
        metrics = measure(samples, log_ratios, ref_samples, rows, proxy, ref_tokenizer, args)
        memory["samples"][names[step]], memory["metrics"][names[step]] = samples, metrics
        run.write("metrics", {"step": step, "policy": names[step], **metrics})
        run.write("samples", *({"policy": names[step], **sample} for sample in samples))
        run.save_checkpoint(step + 1, nothing, nothing, memory)
    finish(run, names, memory, rows, args)


if __name__ == "__main__":
    run_script(main, Args)
