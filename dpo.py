r"""Direct preference optimization: comparisons -> policy, with no reward model in between.

The policy that maximises E[r(x, y)] - beta KL(pi || pi_ref) is known, Rafailov et al. (2023), (4):

    pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x)

Z cannot be summed, but it need not be: solved for the reward, equation (5),

    r(x, y) = beta log pi*(y | x) / pi_ref(y | x) + beta log Z(x)

and put into the Bradley-Terry likelihood p(y_w > y_l | x) = sigma(r(x, y_w) - r(x, y_l)), log Z(x)
cancels. What is left is the maximum-likelihood loss of a policy, equation (7):

    L(theta) = -E log sigma(  beta log pi_theta(y_w | x) / pi_ref(y_w | x)
                            - beta log pi_theta(y_l | x) / pi_ref(y_l | x) )

    python dpo.py                     # tiny-sft, 4,000 noisy comparisons: true reward 0.0 -> 2.9
    python dpo.py --beta 1.0          # closer to the reference
    python dpo.py --loss-type ipo     # or hinge, simpo, robust with --label-smoothing 0.1
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized \
        --learning-rate 1e-6

Deviations from the paper's code: the learning rate decays linearly after the warm-up (theirs stays
constant), and AdamW instead of RMSprop. The reference's log-probabilities are computed once,
before training. IPO takes log-probabilities of whole completions, as its paper does; TRL's divides
them by their length: `--length-normalized`. dpo_loss() says where each loss converges.

Data: `prompt` + `chosen` + `rejected`, or `chosen` + `rejected` that begin with their prompt;
texts or lists of messages. Completions are cut where a row reaches --max-length, and a comparison
whose prompt alone is as long is skipped.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from common import (
    Row, UserError, adapters_off, all_reduce, clip_gradients, encode_row, load_policy,
    load_reference, load_tokenizer, mean_over_batch, micro_batches, pad_rows, save_and_reload,
    set_learning_rate, stop_ids, token_budget, token_logprobs
)
from harness import (
    ASSETS, GOLD, Count, Example, HeldOut, Limits, NonNegative, Positive, Run, TrainArgs,
    batches, comparison, different_prompts, evaluate_policy, is_embedded, load_examples,
    load_reward, progress_bar, report, run_script, tools_of, wins
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "comparisons.jsonl")
    """comparisons: Hub id, id:config, or a .jsonl, .json, .csv or .parquet file or directory"""
    reward_fn: str | None = None
    """FILE.py:function that judges completions in evaluations; embedded data: the true reward"""
    reward_model: str | None = None
    """sequence-classification model with one label that judges instead"""
    beta: Positive = 0.1
    """KL coefficient: the larger, the closer to the reference"""
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "simpo"] = "sigmoid"
    """sigmoid: equation (7); the others: see dpo_loss"""
    label_smoothing: Annotated[float, (lambda x: 0 <= x < 0.5, "a share from 0 to below 0.5")] = 0.0
    """share of comparisons with flipped labels: robust corrects it, sigmoid hedges (cDPO)"""
    length_normalized: bool = False
    """divide log-probabilities by the completion's tokens; SimPO always does"""
    target_margin: NonNegative = 0.0
    """SimPO's gamma, which the margin of the rewards has to exceed"""
    learning_rate: Positive = 3e-4
    """peak, after 10% warm-up, before linear decay to 0; for real models 5e-7 to 5e-6"""
    batch_size: Count = 32
    """comparisons per update"""
    epochs: Positive = 1.0
    """passes over the data"""
    max_grad_norm: Positive = 10.0
    """norm that gradients are clipped to"""
    max_new_tokens: Count = 64
    """tokens per completion in evaluations"""
    temperature: Positive = 1.0
    """temperature of the completions in evaluations, and of all log-probabilities"""
    eval_every: Count = 50
    """updates between held-out evaluations"""
    output_dir: str = "runs/dpo"


# --- data ---


@dataclass
class Pair:
    """A comparison, and its log-probabilities log pi_ref(y | x) under the reference, in nats."""

    example: Example
    chosen: Row
    rejected: Row
    ref_chosen_logp: float = math.nan
    ref_rejected_logp: float = math.nan


def load_pairs(args: Args, model, tokenizer) -> tuple[list[Pair], list[Pair], list]:
    """-> training and held-out pairs, and the held-out prompts, [(example, ids)]."""
    stops = stop_ids(model, tokenizer)

    def encode_pair(example):
        example["prompt"], chosen, rejected = comparison(example)
        tools = tools_of(example)
        return [encode_row(tokenizer, example["prompt"], completion, stops, tools)
                for completion in (chosen, rejected)]

    train, held_out = load_examples(args, encode_pair, Limits.of(args, model))
    prompts = different_prompts(held_out, args, model)
    train = [Pair(example, *rows) for example, rows in train]
    return train, [Pair(example, *rows) for example, rows in held_out[:args.eval_prompts]], prompts


def add_reference_logprobs(reference, pairs: list[Pair], args: Args) -> None:
    """Computed once, before training."""
    chosen, rejected = torch.zeros(2, len(pairs), device=reference.device)
    for group in micro_batches(lengths_of(pairs), args.micro_batch_size, token_budget(reference)):
        with torch.no_grad(), adapters_off(reference):
            logps = pair_logprobs(reference, [pairs[i] for i in group], args.temperature)
        chosen[group], rejected[group] = logps
    chosen, rejected = all_reduce(chosen).tolist(), all_reduce(rejected).tolist()
    for pair, chosen_logp, rejected_logp in zip(pairs, chosen, rejected):
        pair.ref_chosen_logp, pair.ref_rejected_logp = chosen_logp, rejected_logp


def lengths_of(pairs: list[Pair]) -> list[int]:
    """Tokens per pair, padding included."""
    return [2 * max(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in pairs]


# --- loss ---


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
    label_smoothing=0.0, loss_type="sigmoid", *, lengths=None, target_margin=0.0,
):
    """The loss of each comparison: sigmoid, without smoothing, is equation (7).

    All log-probabilities are those of whole completions, log pi(y | x) in nats, [B]. Returns
    (losses, chosen_rewards, rejected_rewards), each [B]; the rewards are the implicit ones of
    equation (5), without beta log Z(x) and without gradient. lengths: tokens of the chosen and of
    the rejected completions, ([B], [B]), to divide by. h is the log-ratio of the chosen completion
    - that of the rejected one, eps = label_smoothing; the arrow gives the fixed point, for pairs
    sampled from pi_ref:

    sigmoid  -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)  -> pi* for eps = 0, the DPO
             paper. eps > 0 is conservative DPO (Mitchell 2023). It does not correct flipped labels:
             clean ones take it to where plain DPO ends if a share eps is flipped, nearer to pi_ref
    robust   (-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)) / (1 - 2 eps)  -> pi*, if a
             share eps is flipped: Chowdhury et al. (2024)
    ipo      (h - 1 / (2 beta))^2: Azar et al. (2023), equation (17)  -> pi* of another reward, the
             probability that y beats a completion of pi_ref
    hinge    max(0, 1 - beta h): SLiC (Zhao et al. 2023), on log-ratios  -> pi_ref exp(u / beta)
             / Z, u an integer step function of the reward
    simpo    -log sigma(beta h - target_margin) per token, without reference: Meng et al. (2024),
             equation (6)  -> exp(tokens (r + c) / beta) for target_margin 0, c(x) makes the sum 1
    lengths  with sigmoid  -> pi_ref exp(tokens (r + c) / beta)
    """
    if loss_type == "simpo":
        ref_chosen_logps, ref_rejected_logps = 0.0, 0.0
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    if lengths is not None:
        chosen_logratios = chosen_logratios / lengths[0]
        rejected_logratios = rejected_logratios / lengths[1]
    margin = chosen_logratios - rejected_logratios  # log Z(x) appears in both terms and cancels
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        unbiased = (1 - label_smoothing) * right - label_smoothing * wrong
        losses = unbiased / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * margin)
    elif loss_type == "simpo":
        losses = -F.logsigmoid(beta * margin - target_margin)
    else:
        raise ValueError(f"loss_type {loss_type!r}: sigmoid, robust, ipo, hinge or simpo")
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def pair_logprobs(model, pairs: list[Pair], temperature: float):
    """-> log pi(y_w | x) and log pi(y_l | x), each [B], by one forward pass that computes the
    prompt of a pair once."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    logps = token_logprobs(model, *pad_rows(rows), temperature).sum(1)
    return logps[0::2], logps[1::2]


def preferences(policy, pairs: list[Pair], args: Args, train: bool) -> dict[str, float]:
    """-> the mean loss of these pairs, and what else is logged; if train, adds its gradient."""
    totals = defaultdict(float)
    for group in micro_batches(lengths_of(pairs), args.micro_batch_size, token_budget(policy)):
        part = [pairs[i] for i in group]
        chosen, rejected = pair_logprobs(policy, part, args.temperature)
        ref_chosen = torch.tensor([pair.ref_chosen_logp for pair in part], device=chosen.device)
        ref_rejected = torch.tensor([pair.ref_rejected_logp for pair in part], device=chosen.device)
        lengths = [[sum(pair.chosen.mask), sum(pair.rejected.mask)] for pair in part]
        lengths = torch.tensor(lengths, device=chosen.device).T  # [2, b]
        losses, chosen_rewards, rejected_rewards = dpo_loss(
            chosen, rejected, ref_chosen, ref_rejected,
            args.beta, args.label_smoothing, args.loss_type,
            lengths=lengths if args.length_normalized else None, target_margin=args.target_margin,
        )
        if train:
            (losses.sum() / len(pairs)).backward()
        totals["loss"] += losses.sum()
        totals["accuracy"] += wins(chosen_rewards, rejected_rewards).sum()
        totals["margin"] += (chosen_rewards - rejected_rewards).sum()
        totals["chosen_reward"] += chosen_rewards.sum()
        totals["rejected_reward"] += rejected_rewards.sum()
        totals["chosen_logps"] += chosen.detach().sum()
        totals["rejected_logps"] += rejected.detach().sum()
    return mean_over_batch(totals, len(pairs))


def evaluate(policy, held_out: HeldOut, pairs: list[Pair], run: Run, step: int):
    metrics, samples = evaluate_policy(policy, held_out, run.args, step)
    with torch.no_grad():
        losses = preferences(policy, pairs, run.args, train=False)
    metrics |= {f"eval_{name}": value for name, value in losses.items()}
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


# --- main ---


def check_args(args: Args) -> None:
    if args.loss_type == "robust" and not args.label_smoothing:
        raise UserError("--loss-type robust: give the share of flipped labels, --label-smoothing")
    if args.loss_type == "simpo":
        args.length_normalized = True
    if args.label_smoothing and args.loss_type not in ("sigmoid", "robust"):
        raise UserError(f"--label-smoothing: --loss-type {args.loss_type} has none")
    if args.target_margin and args.loss_type != "simpo":
        raise UserError("--target-margin: only --loss-type simpo has one: leave it out")


def main(args: Args) -> None:
    check_args(args)
    if is_embedded(args) and not args.reward_model:
        args.reward_fn = args.reward_fn or GOLD
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    policy = load_policy(args)
    reference = load_reference(policy, args)
    judge = load_reward(args, args.reward_fn, args.reward_model, tokenizer.chat_template)
    pairs, eval_pairs, prompts = load_pairs(args, policy, tokenizer)
    held_out = HeldOut(prompts, judge, reference, tokenizer)
    plan = batches(len(pairs), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(pairs)} comparisons, {len(eval_pairs)} held out; {len(plan)} updates", flush=True)

    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    seen = sorted({i for batch in plan for i in batch})
    if args.loss_type != "simpo":  # has no reference in its loss
        add_reference_logprobs(reference, [pairs[i] for i in seen] + eval_pairs, args)
    done, memory = run.start(policy, optimizer)
    if done == 0:
        _, memory["samples"] = evaluate(policy, held_out, eval_pairs, run, 0)
    held_out.reference_samples = memory["samples"]
    bar = progress_bar("dpo", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [pairs[i] for i in plan[step]]
        metrics = preferences(policy, batch, args, train=True)
        metrics["grad_norm"] = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(step, metrics, [pair.example for pair in batch])
        metrics["learning_rate"] = set_learning_rate(optimizer, step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pair in batch)
        run.log(step + 1, "train", **metrics, tokens_per_s=tokens / (time.perf_counter() - began))
        shown = {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy", "margin")}
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluate(policy, held_out, eval_pairs, run, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, policy, optimizer, memory)

    saved = save_and_reload(policy, tokenizer, run.dir, args)
    evaluation, samples = evaluate(saved, held_out, eval_pairs, run, len(plan))
    report(run, evaluation, samples, held_out)


if __name__ == "__main__":
    run_script(main, Args)
