r"""Group-relative policy optimization: from rewards or checks to a policy, no value model.

For each prompt q the old policy writes a group of G completions o_1 ... o_G. Their rewards,
compared with each other, are the advantages, and the policy follows PPO's clipped objective. As
printed for DeepSeek-R1 (Guo et al. 2025):

    J(theta) = E[ 1/G sum_i  min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta D_i ]     (1)
    D_i      = pi_ref(o_i|q) / pi_theta(o_i|q) - log(pi_ref(o_i|q) / pi_theta(o_i|q)) - 1       (2)
    A_i      = (r_i - mean(r_1 ... r_G)) / std(r_1 ... r_G)                                     (3)

with rho_i = pi_theta(o_i|q) / pi_old(o_i|q), the ratio of whole completions: `--ratio sequence`.
DeepSeekMath (Shao et al. 2024), where the method comes from, has a ratio and a D for each *token*
and their mean over the tokens of each completion, its equations (3) and (4). That form is in
common use, and the default here. The variants:

    --loss-type dapo       mean over all tokens: DAPO (Yu et al. 2025), with `--clip-high 0.28`
    --loss-type dr_grpo    sum over tokens / a constant: Dr. GRPO (Liu et al. 2025), with
                           `--no-scale`; its gradient is the plain policy gradient
    --ratio sequence       (1) to the letter: a long completion's ratio soon leaves the clip range
    --ratio gspo           rho_i^(1 / tokens): GSPO (Zheng et al. 2025), equation (7)
    --ratio cispo          clip(rho) A log pi, rho without gradient: no token drops out. CISPO of
                           MiniMax-M1 (2025), equations (4) and (5)
    --baseline leave-one-out   A_i = r_i - mean of the others: RLOO (Ahmadian et al. 2024)
    --baseline batch       mean and deviation over the batch: REINFORCE++ (Hu 2025)
    --kl k2                D = log(pi_theta / pi_ref)^2 / 2
    --kl reward            r_i - beta log(pi_old / pi_ref) in place of r_i, and no D: RLOO's, PPO's

Where they converge (`experiments/fixed_points.py`): with `--kl reward` every baseline, ratio and
loss type lands on pi* = pi_ref exp(r / beta) / Z. With D in the loss, only `--ratio sequence
--no-scale` does, and only with `--kl k2` or `--kl-correction`; in that case `--baseline group` acts
like beta G / (G - 1) in place of beta, and `--scale` like beta times the rewards' deviation. k3
alone lands on beta pi_ref / (beta + E[r] - r). A D of tokens does not see what a token does to
later ones' KL.

    python grpo.py                                          # sums: right 30% of the time, then 96%
    python grpo.py --beta 0.04 --kl-correction              # stay close to the reference
    python grpo.py --loss-type dr_grpo --no-scale --updates-per-rollout 2
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k:main \
        --prompt-column question --reward-fn assets/rewards.py:final_number \
        --max-new-tokens 300 --learning-rate 1e-6

Data: prompts, texts or lists of messages. Further columns reach the reward function by name.
"""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from common import (
    Row, UserError, adapters_off, all_reduce, clip_gradients, generate, load_policy,
    load_reference, load_tokenizer, micro_batches, pad_rows, save_and_reload, send,
    set_learning_rate, to_floats, token_budget, token_logprobs, world_size
)
from harness import (
    ASSETS, Count, HeldOut, NonNegative, Positive, Run, TrainArgs, batches, evaluate_policy,
    is_embedded, load_prompts, load_reward, mean_and_se, print_table, progress_bar, report,
    run_script, speeds
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "sum_prompts.jsonl")
    """prompts: Hub id, id:config, or a .jsonl, .json, .csv or .parquet file or directory"""
    prompt_column: str = "prompt"
    """column with the prompts"""
    reward_fn: list[str] = field(default_factory=list)
    """FILE.py:function, one or several; embedded data: whether the sum is correct"""
    reward_weights: list[float] = field(default_factory=list)
    """weights of the functions in the total reward; default: 1 each"""
    reward_model: str | None = None
    """sequence-classification model with one label that gives the reward instead"""
    pass_reward: float = 1.0
    """completions with at least this reward count as right in evaluations"""
    samples_per_prompt: Count = 8
    """completions per prompt, the group size G"""
    baseline: Literal["group", "leave-one-out", "batch"] = "group"
    """mean that a reward is compared with: its group's, the others' there, the batch's"""
    scale: bool = True
    """divide advantages by the standard deviation, equation (3)"""
    beta: NonNegative = 0.0
    """KL coefficient: the larger, the closer to the reference; 0: none"""
    kl: Literal["k3", "k2", "reward"] = "k3"
    """in the loss, by equation (2) or half the squared log-ratio; or in the reward"""
    kl_correction: bool = False
    """multiply k3 by the ratio, which makes its gradient that of the KL"""
    clip: Positive = 0.2
    """smallest ratio is 1 - clip, for completions with a negative advantage (CISPO: for all)"""
    clip_high: Positive | None = None
    """largest ratio is 1 + this, for positive advantages (CISPO: for all); default: --clip"""
    updates_per_rollout: Count = 1
    """updates on the same completions"""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """how tokens are averaged: within each completion, by a constant, over all"""
    ratio: Literal["token", "sequence", "gspo", "cispo"] = "token"
    """of a token, a completion as in (1), its geometric mean (GSPO), or a clipped weight (CISPO)"""
    mask_truncated: bool = False
    """leave truncated completions out of the loss, not out of their group's mean"""
    learning_rate: Positive = 7e-4
    """peak, after 10% warm-up, before linear decay to 0; for real models 1e-6 to 2e-5"""
    batch_size: Count = 64
    """prompts per rollout"""
    epochs: Positive = 8.0
    """passes over the prompts"""
    max_new_tokens: Count = 8
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    eval_every: Count = 100
    """rollouts between held-out evaluations"""
    eval_samples: Count = 8
    """k of pass@k: additional completions of each held-out prompt"""
    output_dir: str = "runs/grpo"


# --- loss ---


def group_advantages(rewards, group_size, scale=True, baseline="group"):
    """Equation (3): rewards [B], groups one after the other -> advantages [B].

    leave-one-out: the distance to the mean of the others is G / (G - 1) times that to all's. The
    standard deviation is the unbiased one, plus 1e-4. Equal rewards give exactly 0: rounding
    errors of their differences would be amplified by up to 1e4.
    """
    size = len(rewards) if baseline == "batch" else group_size
    groups = rewards.view(-1, size)  # [prompts, G]
    advantages = groups - groups.mean(1, keepdim=True)
    if baseline == "leave-one-out":
        advantages = advantages * group_size / (group_size - 1)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()


def rewards_with_kl(rewards, logps, ref_logps, mask, beta):
    """r - beta log(pi_old / pi_ref) of whole completions: [B] and log-probabilities [B, T] -> [B].
    The expectation of the log-ratio is the KL (k1)."""
    return rewards - beta * ((logps - ref_logps) * mask).sum(1)


def kl_k3(logps, ref_logps):
    """Equation (2) for each element (nats). Its expectation under pi is KL(pi || pi_ref), but that
    of its gradient is the gradient of KL(pi_ref || pi): --kl-correction puts that right."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def kl_k2(logps, ref_logps):
    """log(pi / pi_ref)^2 / 2 for each element (nats). Its expectation is near the KL only where
    that is small, but that of its gradient is the gradient of KL(pi || pi_ref)."""
    return 0.5 * (logps - ref_logps) ** 2


def whole_completions(logps, mask):
    """Log-probabilities of tokens -> of their completion, at each of its tokens: [B, T]."""
    return (logps * mask).sum(1, keepdim=True) * mask


def ratios(logps, old_logps, mask, ratio):
    """rho at each token, [B, T]: its own (token, cispo), its completion's (sequence), or the
    geometric mean over its completion (gspo)."""
    log_ratio = (logps - old_logps) * mask
    if ratio in ("sequence", "gspo"):
        log_ratio = whole_completions(log_ratio, mask)
    if ratio == "gspo":
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.exp()


def grpo_loss(
    logps, old_logps, ref_logps, advantages, mask, *, beta, clip_low, clip_high,
    loss_type="grpo", ratio="token", kl="k3", kl_correction=False, total=None,
):
    """Minus equation (1), or minus DeepSeekMath's (3) with ratio "token" -> scalar.

    logps, old_logps, ref_logps [B, T] in nats: of the policy, of the one that sampled, of the
    reference (not read where beta is 0 or kl "reward"); mask [B, T]: 1 on completion tokens;
    advantages [B].

    grpo     sum_i (1 / |o_i|) sum_t loss_it / total,  total = B
    dapo     sum_i sum_t loss_it / total,              total = tokens of the mask
    dr_grpo  sum_i sum_t loss_it / total,              total = B x T

    Micro-batches share the total of their update, which loss_total() counts.
    """
    mask = mask.to(logps.dtype)
    logps, ref_logps = logps * mask, ref_logps * mask
    rho = ratios(logps, old_logps, mask, ratio)  # [B, T]
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.min(rho * advantages[:, None], clipped * advantages[:, None])
    if ratio == "cispo":
        losses = -clipped.detach() * logps * advantages[:, None]
    if beta and kl != "reward":
        if ratio == "sequence":
            logps, ref_logps = [whole_completions(x, mask) for x in (logps, ref_logps)]
        estimates = {"k3": kl_k3, "k2": kl_k2}[kl](logps, ref_logps)
        losses = losses + beta * (estimates * rho if kl_correction else estimates)
    sums = (losses * mask).sum(1)  # [B]
    totals = {"grpo": len(mask), "dapo": mask.sum().clamp(min=1), "dr_grpo": mask.numel()}
    if loss_type not in totals:
        raise ValueError(f"loss_type {loss_type!r}: grpo, dr_grpo or dapo")
    if loss_type == "grpo":
        sums = sums / mask.sum(1).clamp(min=1)
    return sums.sum() / (total or totals[loss_type])


def loss_total(mask, args: Args) -> int:
    """What an update's loss is divided by: completions (grpo), their tokens (dapo), or as many as
    they could have (dr_grpo). mask [B, T] of all completions of the update."""
    completions = int(mask.any(1).sum())
    totals = {"grpo": completions, "dapo": int(mask.sum())}
    return max(1, totals.get(args.loss_type, completions * args.max_new_tokens))


# --- one step ---


@dataclass
class Experience:
    """What an update learns from: B completions, on the policy's device."""

    rows: list[Row]  # [B]
    mask: torch.Tensor  # [B, T]: 1 on the tokens in the loss
    advantages: torch.Tensor  # [B]
    ref_logps: torch.Tensor  # [B, T]
    indices: list[int]  # of the rows that have a gradient
    total: int  # what the loss is divided by
    old_logps: torch.Tensor | None = None  # [B, T]; None: of the policy itself, the ratio is 1
    examples: list | None = None  # [B], for messages


def rows_to_learn_from(advantages, mask, beta) -> list[int]:
    """With beta 0, a row whose advantage is 0 has no gradient and needs no pass. One row for each
    process always stays."""
    learn = (mask.any(1) & ((advantages != 0) | (beta > 0))).long()
    order = learn.argsort(descending=True, stable=True)
    return order[:max(int(learn.sum()), world_size())].tolist()


def forward_passes(model, rows: list[Row], indices, width: int, args: Args):
    """Yields for each micro-batch the indices of its rows, and log pi of their tokens [b, width].

    Completions of one prompt, and equal ones, are side by side: what a row shares with the one
    before is computed once.
    """
    indices = sorted(indices, key=lambda i: rows[i].ids)
    prompts = [tuple(rows[i].ids[:rows[i].mask.index(1)]) for i in indices]
    longest = defaultdict(int)
    for prompt, i in zip(prompts, indices):
        longest[prompt] = max(longest[prompt], len(rows[i].ids))
    lengths = [longest[prompt] for prompt in prompts]
    for group in micro_batches(lengths, args.micro_batch_size, token_budget(model)):
        (at,) = send(model.device, torch.tensor([indices[j] for j in group]))
        input_ids, mask = pad_rows([rows[indices[j]] for j in group])
        logps = token_logprobs(model, input_ids, mask, args.temperature)
        yield at, F.pad(logps, (0, width - logps.shape[1]))


@torch.no_grad()
def rollout_logprobs(model, rollout, args: Args) -> torch.Tensor:
    """log pi of the sampled tokens -> [B, T]."""
    all_logps = torch.zeros_like(rollout.logps)
    width, everything = all_logps.shape[1], range(len(rollout.rows))
    for at, logps in forward_passes(model, rollout.rows, everything, width, args):
        all_logps[at] = logps
    return all_reduce(all_logps)


def add_gradients(policy, experience: Experience, args: Args):
    """Add the gradient of the loss, by micro-batches -> loss, logps [B, T].

    While the policy is the one that sampled, its own log-probabilities are the old ones, and the
    ratio exactly 1: those that were computed token by token differ in their last digits.
    """
    e, loss = experience, torch.zeros((), device=policy.device)
    all_logps = torch.zeros_like(e.ref_logps)
    for at, logps in forward_passes(policy, e.rows, e.indices, e.mask.shape[1], args):
        old_logps = logps.detach() if e.old_logps is None else e.old_logps[at]
        part = grpo_loss(
            logps, old_logps, e.ref_logps[at], e.advantages[at], e.mask[at],
            beta=args.beta, clip_low=args.clip, clip_high=args.clip_high or args.clip,
            loss_type=args.loss_type, ratio=args.ratio, kl=args.kl,
            kl_correction=args.kl_correction, total=e.total,
        )
        part.backward()
        loss += part.detach()
        all_logps[at] = logps.detach()
    return all_reduce(loss).item(), all_reduce(all_logps)


def update(policy, optimizer, experience: Experience, run: Run, step: int) -> dict:
    """--updates-per-rollout updates on the same completions -> what is logged of them."""
    e, args, of_updates = experience, run.args, []
    for _ in range(args.updates_per_rollout):
        loss, logps = add_gradients(policy, e, args)
        if e.old_logps is None:
            e.old_logps = logps
        of_updates.append(ratio_metrics(logps, e, args))
        metrics = {"loss": loss, "grad_norm": clip_gradients(policy, args.max_grad_norm)}
        run.check_finite(step, metrics, e.examples)
        optimizer.step()
        optimizer.zero_grad()
    return metrics | {"ratio_first": of_updates[0]["ratio"]} | of_updates[-1]


def ratio_metrics(logps, experience: Experience, args: Args) -> dict:
    """Mean ratio, and the shares of tokens whose policy gradient clipping removes, or in CISPO
    makes smaller or larger."""
    e, (at,) = experience, send(logps.device, torch.tensor(experience.indices))
    mask = e.mask[at]
    ratio = ratios(logps[at], e.old_logps[at], mask, args.ratio)
    positive, is_weight = (e.advantages[at] > 0)[:, None], args.ratio == "cispo"
    values = {
        "ratio": ratio,
        "clipped_low": (ratio < 1 - args.clip) & (~positive | is_weight),
        "clipped_high": (ratio > 1 + (args.clip_high or args.clip)) & (positive | is_weight),
    }
    tokens = mask.sum().clamp(min=1)
    return to_floats({name: (value * mask).sum() / tokens for name, value in values.items()})


# --- rewards ---


def load_rewards(args: Args, chat_template):
    """-> rewards_of(examples, completions, completion_ids) -> [n, functions], NaN where a function
    does not apply; and the functions' weights."""
    functions = [load_reward(args, spec, args.reward_model, chat_template, optional=True)
                 for spec in args.reward_fn or [None]]
    if functions == [None]:
        raise UserError("no reward: give --reward-fn FILE.py:function or --reward-model")
    weights = torch.tensor(args.reward_weights or [1.0] * len(functions))
    if len(weights) != len(functions):
        raise UserError(f"--reward-weights: {len(weights)} for {len(functions)} reward functions")

    def rewards_of(*inputs):
        return torch.stack([function(*inputs) for function in functions], 1)

    return rewards_of, weights


def weighted_sum(rewards, weights, examples):
    """rewards [n, functions], NaN where a function does not apply -> [n]."""
    nothing = rewards.isnan().all(1)
    if nothing.any():
        where = examples[int(nothing.nonzero()[0])].where
        raise UserError(f"--reward-fn: every function returned None for {where}: one must apply")
    return (rewards * weights).nansum(1)


@torch.no_grad()
def pass_rates(policy, held_out: HeldOut, args: Args, step: int) -> dict:
    """pass@1 and pass@k from k completions of each prompt, and the accuracy of greedy ones."""
    examples, prompt_ids = zip(*held_out.prompts)

    def passed(num_samples, temperature):
        rollout = generate(policy, held_out.tokenizer, prompt_ids, num_samples,
                           args.max_new_tokens, temperature)
        repeated = [example for example in examples for _ in range(num_samples)]
        rewards = held_out.reward(repeated, rollout.completions, rollout.completion_ids)
        return (rewards >= args.pass_reward).float().view(-1, num_samples)  # [prompts, k]

    with torch.random.fork_rng(devices=[]):  # must not change what training draws
        torch.manual_seed(args.seed + 1000 * step + 500)
        sampled, greedy = passed(args.eval_samples, args.temperature), passed(1, 0.0)
    pass_at_1, se = mean_and_se(sampled.mean(1))
    return {"pass_at_1": pass_at_1, "pass_at_1_se": se,
            "pass_at_k": sampled.amax(1).mean().item(), "greedy_accuracy": greedy.mean().item()}


def evaluate(policy, held_out: HeldOut, run: Run, step: int):
    metrics, samples = evaluate_policy(policy, held_out, run.args, step)
    metrics |= pass_rates(policy, held_out, run.args, step)
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


# --- main ---


def collect(policy, reference, rollout, total, args: Args) -> Experience:
    """A rollout and its rewards [B] -> advantages, masks, the reference's log-probabilities."""
    ref_logps, beta = torch.zeros_like(rollout.logps), args.beta
    if beta:
        with adapters_off(reference):
            ref_logps = rollout_logprobs(reference, rollout, args)
    mask, device = rollout.completion_mask, ref_logps.device
    if beta and args.kl == "reward":
        logps = rollout_logprobs(policy, rollout, args)  # as the reference's: equal at first
        total = rewards_with_kl(total.to(device), logps, ref_logps, mask.to(device), beta)
        total, beta = total.cpu(), 0.0  # the loss has no KL
    advantages = group_advantages(total, args.samples_per_prompt, args.scale, args.baseline)
    if args.mask_truncated:
        mask = mask * rollout.ended[:, None]
    indices = rows_to_learn_from(advantages, mask, beta)
    return Experience(rollout.rows, mask.to(device), advantages.to(device), ref_logps, indices,
                      loss_total(mask, args))


def rollout_metrics(rollout, rewards, total, experience: Experience, args: Args) -> dict:
    e, lengths = experience, rollout.completion_mask.sum(1).float()  # [B]
    groups = total.view(-1, args.samples_per_prompt)
    gap = (e.old_logps - rollout.logps) * (e.old_logps != 0)  # 0: a row that was not learnt from
    metrics = {
        "entropy": -rollout.logps.sum() / lengths.sum(),
        "sampling_gap": gap.abs().max(),
    }
    if args.beta:
        kl = kl_k3(rollout.logps, e.ref_logps) * rollout.completion_mask.to(e.mask.device)
        metrics["kl"] = kl.sum(1).mean()  # nats per completion, truncated ones included
    on_host = {
        "reward": total.mean(),
        "zero_variance": (groups == groups[:, :1]).all(1).float().mean(),
        "length": lengths.mean(),
        "ended": rollout.ended.float().mean(),  # by themselves: the others are truncated
    }
    if len(args.reward_fn) > 1:
        on_host |= {f"reward_{i}": reward for i, reward in enumerate(rewards.nanmean(0), 1)}
    return to_floats(metrics) | to_floats(on_host)


def check_args(args: Args) -> None:
    """Combinations that would do nothing, or not what their names say."""
    if args.samples_per_prompt < 2 and args.baseline != "batch":
        raise UserError("--samples-per-prompt 1: gives no advantage: give at least 2")
    if args.baseline == "leave-one-out" and args.scale:
        raise UserError("--baseline leave-one-out: divides by no deviation: add --no-scale")
    if args.beta == 0 and (args.kl != "k3" or args.kl_correction):
        raise UserError("--kl and --kl-correction: do nothing at --beta 0: give a --beta")
    if args.kl_correction and args.kl != "k3":
        raise UserError(f"--kl-correction: --kl {args.kl} has the KL's gradient without it")
    if args.kl_correction and args.ratio == "gspo":
        raise UserError("--kl-correction: needs ratios of probabilities, gspo's are means of "
                        "them: choose another --ratio")
    if args.ratio == "sequence" and args.loss_type != "grpo":
        raise UserError(f"--loss-type {args.loss_type}: --ratio sequence needs grpo")


def main(args: Args) -> None:
    check_args(args)
    if is_embedded(args) and not args.reward_model:
        args.reward_fn = args.reward_fn or [f"{ASSETS / 'rewards.py'}:correct_sum"]
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    policy = load_policy(args)
    reference = load_reference(policy, args)
    rewards_of, weights = load_rewards(args, tokenizer.chat_template)
    prompts, eval_prompts = load_prompts(args, policy, tokenizer)

    def reward(examples, completions, completion_ids):
        return weighted_sum(rewards_of(examples, completions, completion_ids), weights, examples)

    held_out = HeldOut(eval_prompts, reward, reference, tokenizer)
    plan = batches(len(prompts), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(prompts)} prompts, {len(eval_prompts)} held out; {len(plan)} rollouts", flush=True)

    parameters, betas = policy.parameters(), (0.9, 0.95)
    optimizer = torch.optim.AdamW(parameters, betas=betas, weight_decay=0.0, fused=True)
    done, memory = run.start(policy, optimizer)
    if done == 0:
        memory["before"], memory["samples"] = evaluate(policy, held_out, run, 0)
    held_out.reference_samples = memory["samples"]
    bar = progress_bar("grpo", done, len(plan))
    for step in bar:
        times = [time.perf_counter()]
        examples = [prompts[i][0] for i in plan[step] for _ in range(args.samples_per_prompt)]
        rollout = generate(policy, tokenizer, [prompts[i][1] for i in plan[step]],
                           args.samples_per_prompt, args.max_new_tokens, args.temperature)
        times.append(time.perf_counter())
        rewards = rewards_of(examples, rollout.completions, rollout.completion_ids)
        total = weighted_sum(rewards, weights, examples)  # [B]
        experience = collect(policy, reference, rollout, total, args)
        experience.examples = examples
        times.append(time.perf_counter())
        learning_rate = set_learning_rate(optimizer, step, len(plan), args.learning_rate)
        metrics = update(policy, optimizer, experience, run, step)
        times.append(time.perf_counter())

        metrics |= rollout_metrics(rollout, rewards, total, experience, args)
        speed = speeds(rollout, times, args.updates_per_rollout)
        run.log(step + 1, "train", **metrics, learning_rate=learning_rate, **speed)
        bar.set_postfix(reward=f"{metrics['reward']:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluate(policy, held_out, run, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, policy, optimizer, memory)

    saved = save_and_reload(policy, tokenizer, run.dir, args)
    evaluation, samples = evaluate(saved, held_out, run, len(plan))
    rates = ("pass_at_1", "pass_at_k", "greedy_accuracy")
    evaluation |= {f"{name}_ref": memory["before"][name] for name in rates}
    report(run, evaluation, samples, held_out)
    print_table([["policy", "pass@1", f"pass@{args.eval_samples}", "greedy accuracy"],
                 ["reference", *[f"{evaluation[f'{name}_ref']:.1%}" for name in rates]],
                 ["trained", *[f"{evaluation[name]:.1%}" for name in rates]]])


if __name__ == "__main__":
    run_script(main, Args)
