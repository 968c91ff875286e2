"""Group-relative policy optimisation: rewards or checks -> policy, with no value model: the group is the baseline.

For each prompt q the old policy writes a group of G completions o_1 ... o_G. Their rewards, compared with each other,
are the advantages, and the policy follows PPO's clipped objective. As printed for DeepSeek-R1 (Guo et al. 2025):

    J(theta) = E[ 1/G sum_i  min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) - beta D_i ]                          (1)
    D_i      = pi_ref(o_i|q) / pi_theta(o_i|q) - log(pi_ref(o_i|q) / pi_theta(o_i|q)) - 1                            (2)
    A_i      = (r_i - mean(r_1 ... r_G)) / std(r_1 ... r_G)                                                          (3)

with rho_i = pi_theta(o_i|q) / pi_old(o_i|q), the ratio of whole completions: `--ratio sequence`. DeepSeekMath (Shao et
al. 2024), where the method comes from and whose form everybody runs, has a ratio and a D for each *token*, and their
mean over the tokens of each completion, its equations (3) and (4): `--ratio token --loss-type grpo`, the default here.
The two agree neither in what is clipped nor in length: a token of a long completion counts less in DeepSeekMath's.

    --loss-type grpo        mean over each completion's tokens, then over completions: DeepSeekMath (3), and (1) here
    --loss-type dapo        mean over all tokens of the update: DAPO (Yu et al. 2025); `--clip-high 0.28` is its too
    --loss-type dr_grpo     sum over tokens / (completions x --max-new-tokens), a constant; with `--no-scale` it is
                            Dr. GRPO (Liu et al. 2025), whose gradient is the plain policy gradient
    --ratio sequence        (1) to the letter. GSPO (Zheng et al. 2025) takes the geometric mean over the tokens,
                            rho_i ** (1 / |o_i|): without it, a long completion's ratio soon leaves the clipping range

    python grpo.py                                                   # sums: right 30% of the time, then 96%
    python grpo.py --beta 0.04 --kl-correction                       # stay close to the reference
    python grpo.py --loss-type dr_grpo --no-scale --updates-per-rollout 2
    python grpo.py --dataset assets/data/review_prompts.jsonl --eval-dataset assets/data/review_prompts_heldout.jsonl \\
        --reward-fn assets/rewards.py:sentiment --beta 0.1 --max-new-tokens 64
    python grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k:main --prompt-column question \\
        --reward-fn assets/rewards.py:final_number --max-new-tokens 300 --learning-rate 1e-6

Data: prompts in `--prompt-column` (texts or lists of messages); every column reaches the reward function by its name.
"""

import contextlib
import signal
import time
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from common import (ASSETS, Run, UserError, batches, clip_gradients, evaluate_policy, generate, learning_rate_at,
                    load_model, load_prompts, load_reward, load_tokenizer, mean_and_se, micro_batches, pad_rows,
                    print_table, progress_bar, random_state, report, run_script, save_model, set_random_state, shard,
                    summed, token_logprobs, world)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "sum_prompts.jsonl")
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train"
    """split of --dataset"""
    prompt_column: str = "prompt"
    """column that holds the prompts"""
    eval_dataset: str | None = None
    """held-out prompts; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    reward_fn: list[str] = field(default_factory=list)
    """FILE.py:function, one or several; default on the embedded data: assets/rewards.py:correct_sum"""
    reward_weights: list[float] = field(default_factory=list)
    """the reward is the sum of the functions' values times these; default: 1 each"""
    reward_timeout: float = 60.0
    """seconds that one call of a reward function may take"""
    reward_model: str | None = None
    """a sequence-classification model with one label that judges instead"""
    pass_reward: float = 1.0
    """a completion with at least this reward counts as right in pass@1, pass@k and greedy accuracy"""
    output_dir: str = "runs/grpo"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    group_size: int = 8
    """G: completions of each prompt"""
    scale: bool = True
    """divide advantages by the group's standard deviation, equation (3); --no-scale: only subtract its mean"""
    beta: float = 0.0
    """KL coefficient: the larger, the closer to the reference; 0: none, and no reference is loaded for training"""
    kl_correction: bool = False
    """multiply the KL estimate by the ratio, which makes its gradient that of the KL"""
    clip_low: float = 0.2
    """the ratio is clipped below 1 - clip_low where the advantage is negative"""
    clip_high: float = 0.2
    """and above 1 + clip_high where it is positive"""
    updates_per_rollout: int = 1
    """updates on the same completions: from the second on the ratio differs from 1"""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    """how tokens are averaged: within each completion, by a constant, over all"""
    ratio: Literal["token", "sequence"] = "token"
    """of what the ratio and the KL estimate are taken: DeepSeekMath's tokens, or equation (1)'s whole completions"""
    mask_truncated: bool = False
    """leave completions cut at --max-new-tokens out of the loss (they stay in their group's mean)"""
    learning_rate: float = 7e-4
    """peak, after 10% warm-up; then linear decay to 0"""
    batch_size: int = 64
    """prompts a rollout; times --group-size completions"""
    micro_batch_size: int | None = None
    """completions a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 8.0
    """passes over the prompts"""
    max_steps: int | None = None
    """number of rollouts, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 8
    """of a completion"""
    temperature: float = 1.0
    """of the samples, and of all log-probabilities"""
    eval_every: int = 100
    """rollouts between held-out evaluations"""
    eval_prompts: int = 500
    """held-out prompts that an evaluation answers"""
    eval_samples: int = 8
    """k of pass@k: further completions of each held-out prompt"""
    save_every: int = 50
    """rollouts between checkpoints"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    seed: int = 0
    """of data order and sampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the forward passes; auto: bfloat16 autocast on GPUs, float32 on CPUs. Master weights are float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    replicas: int = 1
    """under torchrun: copies of the model, each divided among as many processes (HSDP: one a node); 1: one among all"""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's template"""
    tensorboard: bool = False
    """also write TensorBoard events"""

    may_be_zero: ClassVar = ("beta",)


# ----------------------------------------------------------------------------------------------------------------- loss


def group_advantages(rewards, group_size, scale=True):
    """Equation (3): rewards [B], groups one after the other -> advantages [B]. scale=False: only the mean is taken off.

    The standard deviation is the unbiased one, plus 1e-4. Equal rewards give exactly 0: what rounding leaves of their
    differences would be blown up by 1e4.
    """
    groups = rewards.view(-1, group_size)  # [prompts, G]
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0.0).flatten()


def kl_k3(logps, ref_logps):
    """Equation (2) for each element: pi_ref / pi - log(pi_ref / pi) - 1, never negative (nats). Its expectation under
    pi is KL(pi || pi_ref), but that of its gradient is the gradient of KL(pi_ref || pi): --kl-correction mends it."""
    log_ratio = ref_logps - logps
    return log_ratio.exp() - log_ratio - 1


def log_ratios(logps, other_logps, mask, ratio):
    """log pi / pi_other of each token -> [B, T]; ratio "sequence": of the whole completion, at each of its tokens."""
    log_ratio = (logps - other_logps) * mask
    return log_ratio if ratio == "token" else log_ratio.sum(1, keepdim=True) * mask


def grpo_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    beta,
    clip_low,
    clip_high,
    loss_type="grpo",
    ratio="token",
    kl_correction=False,
    total=None,
):
    """Minus equation (1), or minus DeepSeekMath's (3) with ratio "token" -> scalar.

    logps, old_logps, ref_logps [B, T] in nats: of the policy, of the one that sampled, of the reference (not read where
    beta is 0); mask [B, T]: 1 on completion tokens; advantages [B].

    grpo     sum_i (1 / |o_i|) sum_t loss_it / total,  total = completions
    dapo     sum_i sum_t loss_it / total,              total = tokens of all completions
    dr_grpo  sum_i sum_t loss_it / total,              total = completions x longest allowed: a constant

    `total` is that of B rows, as wide as they are, unless it is given: micro-batches of an update share the update's.
    """
    mask = mask.to(logps.dtype)
    rho = log_ratios(logps, old_logps, mask, ratio).exp()  # [B, T]
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.min(rho * advantages[:, None], clipped * advantages[:, None])
    if beta:
        kl = kl_k3(log_ratios(logps, ref_logps, mask, ratio), 0.0)
        losses = losses + beta * (kl * rho if kl_correction else kl)
    sums = (losses * mask).sum(1)  # [B]
    if loss_type == "grpo":
        return (sums / mask.sum(1).clamp(min=1)).sum() / (total or len(mask))
    if loss_type == "dapo":
        return sums.sum() / (total or mask.sum().clamp(min=1))
    if loss_type == "dr_grpo":
        return sums.sum() / (total or mask.numel())
    raise ValueError(f"loss_type {loss_type!r}: grpo, dr_grpo or dapo")


def loss_total(mask, args) -> int:
    """What an update's loss is divided by: its completions (those of the loss), or tokens; mask [B, T]."""
    completions = int(mask.any(1).sum())
    totals = {"grpo": completions, "dapo": int(mask.sum()), "dr_grpo": completions * args.max_new_tokens}
    return max(1, totals[args.loss_type])


def rows_to_learn_from(advantages, mask, beta) -> list[int]:
    """Where neither advantage nor KL has a gradient, a row needs no pass: with beta 0, all of a group whose rewards are
    equal. One row for each process always stays, and if its gradient is zeros."""
    learn = (mask.any(1) & ((advantages != 0) | (beta > 0))).long()
    return learn.argsort(descending=True, stable=True)[:max(learn.sum(), world()[1])].tolist()


def completion_logprobs(model, rollout, rows, temperature):
    """token_logprobs of these rows of the rollout -> [b, T]. What a row shares with the one before is computed once."""
    input_ids, completion_mask = pad_rows([rollout.rows[i] for i in rows], model.device)
    logps = token_logprobs(model, input_ids, None, completion_mask, temperature)
    return F.pad(logps, (0, rollout.input_ids.shape[1] - logps.shape[1]))


def groups_of_rows(rollout, rows, args) -> list[list[int]]:
    """Micro-batches, each prompt's completions side by side, and equal ones among them."""
    rows, longest = sorted(rows, key=lambda i: rollout.rows[i][0]), {}
    prompts = [tuple(ids[:mask.index(1)]) for ids, mask in (rollout.rows[i] for i in rows)]
    for prompt, i in zip(prompts, rows):
        longest[prompt] = max(longest.get(prompt, 0), len(rollout.rows[i][0]))
    return [[rows[j] for j in group]
            for group in micro_batches([longest[prompt] for prompt in prompts], args.micro_batch_size, together=True)]


def add_gradients(model, rollout, mask, advantages, old_logps, ref_logps, rows, total, args):
    """Add the gradient of the loss of these rows of the rollout, micro-batch by micro-batch -> loss, logps [B, T].

    old_logps None: the policy still is the one that sampled, and its own log-probabilities are the old ones. The ratio
    is then exactly 1, which the rollout's log-probabilities, computed token by token, would miss by rounding."""
    loss, all_logps = 0.0, torch.zeros_like(rollout.logps)
    for group in groups_of_rows(rollout, rows, args):
        logps = completion_logprobs(model, rollout, group, args.temperature)  # [b, T]
        all_logps[group] = logps.detach()
        part = grpo_loss(
            logps, logps.detach() if old_logps is None else old_logps[group], ref_logps[group], advantages[group],
            mask[group], args.beta, args.clip_low, args.clip_high, args.loss_type, args.ratio, args.kl_correction, total
        )
        part.backward()
        loss = loss + part.detach()
    return summed(loss).item(), summed(all_logps)


def ratio_metrics(logps, old_logps, advantages, mask, args) -> dict:
    """Mean ratio, and the shares of tokens that the clipping leaves without a gradient on either side."""
    if not mask.any():  # --mask-truncated, and all were
        return {"ratio": 1.0, "clipped_low": 0.0, "clipped_high": 0.0}
    ratios = log_ratios(logps, old_logps, mask, args.ratio).exp()[mask]
    positive = (advantages[:, None] > 0).expand_as(mask)[mask]
    low, high = (ratios < 1 - args.clip_low) & ~positive, (ratios > 1 + args.clip_high) & positive
    return {"ratio": ratios.mean().item(), "clipped_low": low.float().mean().item(),
            "clipped_high": high.float().mean().item()}


@torch.no_grad()
def reference_logprobs(reference, rollout, args) -> torch.Tensor:
    """[B, T]; zeros where there is no reference."""
    logps = torch.zeros_like(rollout.logps)
    for group in groups_of_rows(rollout, list(range(len(logps))), args) if reference else ():
        logps[group] = completion_logprobs(reference, rollout, group, args.temperature)
    return summed(logps)


# -------------------------------------------------------------------------------------------------------------- rewards


def load_rewards(args):
    """-> reward(prompts, completions, rows) -> [n, number of functions], and their weights."""
    if not (args.reward_fn or args.reward_model):
        raise UserError("no reward: give --reward-fn FILE.py:function or --reward-model")
    functions = [load_reward(replace(args, reward_fn=spec), lambda f: with_timeout(f, args.reward_timeout))
                 for spec in args.reward_fn or [None]]
    weights = args.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise UserError(f"--reward-weights: {len(weights)} for {len(functions)} reward functions: give one for each")
    return (lambda *inputs: torch.stack([function(*inputs) for function in functions], 1)), torch.tensor(weights)


def with_timeout(function, seconds: float):
    """TimeoutError inside the function, seconds after each call."""

    def late(number, frame):
        raise TimeoutError(f"no result within {seconds:g} seconds (--reward-timeout)")

    def call(**inputs):
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            return function(**inputs)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    return call


@contextlib.contextmanager
def keeping(run, step, model, optimizer, memory):
    """Where a reward function fails, the run ends, and --resume goes on from here, once it is mended."""
    before = random_state()
    try:
        yield
    except UserError:
        set_random_state(before)
        run.save_checkpoint(step, model, optimizer, memory)
        raise


@torch.no_grad()
def pass_rates(model, tokenizer, rows, reward, args, step: int) -> dict:
    """pass@1 and pass@k from k samples of each prompt, and the accuracy of greedy completions."""
    prompts, k = [row["prompt"] for row in rows], args.eval_samples
    with torch.random.fork_rng(devices=[]):  # an evaluation must not change what training draws
        torch.manual_seed(args.seed + 1000 * step + 500)
        sampled = generate(model, tokenizer, prompts, k, args.max_new_tokens, args.temperature).completions
        greedy = generate(model, tokenizer, prompts, 1, args.max_new_tokens, 0.0).completions
    rewards = reward([p for p in prompts for _ in range(k)], sampled, [row for row in rows for _ in range(k)])
    passed = (rewards >= args.pass_reward).float().view(-1, k)  # [prompts, k]
    pass_at_1, se = mean_and_se(passed.mean(1))
    right = (reward(prompts, greedy, rows) >= args.pass_reward).float()
    return {"pass_at_1": pass_at_1, "pass_at_1_se": se, "pass_at_k": passed.amax(1).mean().item(), "k": k,
            "greedy_accuracy": right.mean().item()}


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    if args.group_size < 2:
        raise UserError(f"--group-size {args.group_size}: a group is compared with itself: at least 2")
    for name in ("updates_per_rollout", "eval_samples", "reward_timeout", "clip_low", "clip_high"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number greater than 0")
    if args.dataset == Args.dataset:
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "sum_prompts_heldout.jsonl")
        if not args.reward_model:
            args.reward_fn = args.reward_fn or [str(ASSETS / "rewards.py") + ":correct_sum"]
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    reference = shard(load_model(args.model, args.device, args.dtype), args) if args.beta else None
    rewards_of, weights = load_rewards(args)

    def reward(prompts, completions, rows):
        return rewards_of(prompts, completions, rows) @ weights  # [n]

    rows, eval_rows = load_prompts(args, model, tokenizer)
    plan = batches(len(rows), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(rows)} prompts, {len(eval_rows)} held out; {len(plan)} rollouts of {args.batch_size} x "
          f"{args.group_size} completions, {args.updates_per_rollout} update(s) each", flush=True)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    done, memory = run.start(model, optimizer)
    # evaluate_policy knows one function by its name
    judged_by = replace(args, reward_fn=" + ".join(args.reward_fn) if weights.tolist() == [1.0] else "weighted")

    def evaluate(step):
        evaluation, samples = evaluate_policy(
            model, tokenizer, eval_rows, reward, memory.get("reference"), judged_by, step, reference=reference
        )
        evaluation |= pass_rates(model, tokenizer, eval_rows, reward, args, step)
        run.log(step, **({"loss": 0.0} if step == 0 else {}), **evaluation)  # ratio 1, and advantages that sum to 0
        run.write("samples", *samples)
        return evaluation, samples

    if "reference" not in memory:  # the policy still is the reference
        before, memory["reference"] = evaluate(0)
        memory["before"] = {f"{name}_ref": before[name] for name in ("pass_at_1", "pass_at_k", "greedy_accuracy")}
    shown = {}
    bar = progress_bar("grpo", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch_rows = [rows[i][0] for i in plan[step] for _ in range(args.group_size)]
        prompt_ids = [rows[i][1] for i in plan[step]]
        with keeping(run, step, model, optimizer, memory):
            rollout = generate(model, tokenizer, prompt_ids, args.group_size, args.max_new_tokens, args.temperature)
            sampled = time.perf_counter()
            prompts = [row["prompt"] for row in batch_rows]
            rewards = rewards_of(prompts, rollout.completions, batch_rows)  # [B, functions]
        ref_logps = reference_logprobs(reference, rollout, args)  # [B, T]
        scored = time.perf_counter()

        advantages = group_advantages(rewards @ weights, args.group_size, args.scale).to(model.device)  # [B]
        mask = rollout.completion_mask.bool()
        if args.mask_truncated:
            mask = mask & rollout.ended.to(model.device)[:, None]
        learn = rows_to_learn_from(advantages, mask, args.beta)
        total, old_logps, ratios = loss_total(mask, args), None, []
        for _ in range(args.updates_per_rollout):
            loss, logps = add_gradients(model, rollout, mask, advantages, old_logps, ref_logps, learn, total, args)
            old_logps = logps if old_logps is None else old_logps
            ratios.append(ratio_metrics(logps[learn], old_logps[learn], advantages[learn], mask[learn], args))
            grad_norm = clip_gradients(model, args.max_grad_norm)
            run.check_finite(step, loss, grad_norm, plan[step])
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(plan), args.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        updated = time.perf_counter()

        lengths = rollout.completion_mask.sum(1).float()  # [B]
        tokens = sum(len(ids) for ids, _ in rollout.rows)
        metrics = {
            "loss": loss,
            "reward": (rewards @ weights).mean().item(),
            **({f"reward_{i}": r for i, r in enumerate(rewards.mean(0).tolist(), 1)} if len(weights) > 1 else {}),
            "zero_variance": (advantages.view(-1, args.group_size) == 0).all(1).float().mean().item(),
            "ended": rollout.ended.float().mean().item(),
            "length": lengths.mean().item(),
            "entropy": -(rollout.logps.sum() / lengths.sum()).item(),
            "ratio_first": ratios[0]["ratio"],
            **ratios[-1],
            "sampling_gap": (old_logps - rollout.logps)[learn].abs().max().item(),
            "grad_norm": grad_norm,
        }
        if reference:
            kl = kl_k3(old_logps[learn], ref_logps[learn]) * rollout.completion_mask[learn]  # [B, T]
            metrics["kl"] = kl.sum(1).mean().item()  # nats a completion
        run.log(
            step + 1,
            **metrics,
            learning_rate=optimizer.param_groups[0]["lr"],
            tokens_per_s=tokens / (updated - began),
            rollout_tokens_per_s=lengths.sum().item() / (sampled - began),
            scoring_tokens_per_s=tokens / (scored - sampled),
            update_tokens_per_s=tokens * args.updates_per_rollout / (updated - scored),
        )
        shown |= {name: f"{metrics[name]:.3f}" for name in ("reward", "zero_variance", "entropy")}
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            with keeping(run, step + 1, model, optimizer, memory):
                evaluation, _ = evaluate(step + 1)
            for name in ("kl", "pass_at_1", "greedy_accuracy", "share_of_optimum"):
                if name in evaluation:
                    shown[name] = f"{evaluation[name]:.2f}"
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, memory)

    save_model(model, tokenizer, run.dir)
    evaluation, samples = evaluate(len(plan))
    evaluation |= memory["before"]
    report(run, evaluation, samples, memory["reference"])
    rates = ("pass_at_1", "pass_at_k", "greedy_accuracy")
    print_table([["policy", "pass@1", f"pass@{args.eval_samples}", "greedy accuracy"],
                 ["reference", *(f"{evaluation[name + '_ref']:.1%}" for name in rates)],
                 ["trained", *(f"{evaluation[name]:.1%}" for name in rates)]])


if __name__ == "__main__":
    run_script(main, Args)
