"""Direct preference optimization: comparisons -> policy, with no reward model in between.

The policy that maximises E[r(x, y)] - beta KL(pi || pi_ref) is known, Rafailov et al. (2023), equation (4):

    pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x),      Z(x) = sum_y pi_ref(y | x) exp(r(x, y) / beta)

Z cannot be summed, but it need not be: solved for the reward, equation (5),

    r(x, y) = beta log pi*(y | x) / pi_ref(y | x) + beta log Z(x)

and put into the Bradley-Terry likelihood p(y_w > y_l | x) = sigma(r(x, y_w) - r(x, y_l)), log Z(x) cancels. What is
left is the maximum-likelihood loss of a policy, equation (7):

    L_DPO(theta) = -E log sigma( beta log pi_theta(y_w|x) / pi_ref(y_w|x) - beta log pi_theta(y_l|x) / pi_ref(y_l|x) )

    python dpo.py                                                    # tiny-sft, 4,000 noisy comparisons: half a minute
    python dpo.py --beta 1.0                                         # closer to the reference
    python dpo.py --loss-type ipo
    python dpo.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-6

Deviations from the paper's code: the learning rate decays linearly after the warm-up (theirs stays), AdamW instead of
RMSprop; the reference log-probabilities are computed once, before training, and the reference model is then freed (it
is read again, for a moment, where an evaluation measures the KL). IPO (Azar et al. 2023) uses the log-probabilities of
whole sequences, as its paper does; TRL's `ipo` divides them by the length.

Data: `prompt` + `chosen` + `rejected`, or `chosen` + `rejected` that share their prompt; texts or lists of messages.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from common import (ASSETS, Run, UserError, batches, clip_gradients, comparison, encode_all, encode_row,
                    evaluate_policy, hold_out, learning_rate_at, load_model, load_reward, load_rows, load_tokenizer,
                    max_row_length, micro_batches, pad_rows, progress_bar, prompts_that_fit, report, run_script,
                    save_model, shard, stop_ids, summed, token_logprobs)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "comparisons.jsonl")
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train"
    """split of --dataset"""
    eval_dataset: str | None = None
    """held-out comparisons; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    reward_fn: str | None = None
    """FILE.py:function that judges samples in evaluations; default on the embedded data: assets/rewards.py:sentiment"""
    reward_model: str | None = None
    """a sequence-classification model with one label that judges instead"""
    output_dir: str = "runs/dpo"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    beta: float = 0.1
    """KL coefficient: the larger, the closer to the reference"""
    label_smoothing: float = 0.0
    """probability that a comparison is labelled the wrong way round (conservative DPO)"""
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: equation (7); ipo: squared distance of the log-ratio margin to 1 / (2 beta)"""
    learning_rate: float = 3e-4
    """peak, after 10% warm-up; then linear decay to 0. Real models want 5e-7 to 5e-6"""
    batch_size: int = 32
    """comparisons an update"""
    micro_batch_size: int | None = None
    """comparisons a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 1.0
    """passes over the data"""
    max_steps: int | None = None
    """number of updates, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 10.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 64
    """of samples in evaluations"""
    temperature: float = 1.0
    """of the samples in evaluations, and of all log-probabilities"""
    eval_every: int = 50
    """updates between held-out evaluations"""
    eval_prompts: int = 500
    """held-out prompts that an evaluation answers"""
    save_every: int = 50
    """updates between checkpoints"""
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


# ----------------------------------------------------------------------------------------------------------------- data


def load_comparisons(args: Args, model, tokenizer):
    """-> training and held-out pairs, [(chosen row, rejected row)], and rows with held-out prompts to sample from."""
    stops, max_length = stop_ids(model, tokenizer), max_row_length(model, args.max_length)
    rows = load_rows(args.dataset, args.split)
    rows, eval_rows = (rows, load_rows(args.eval_dataset, None)) if args.eval_dataset else hold_out(rows, args.seed)

    def encode(row):
        row["prompt"], chosen, rejected = comparison(row)
        return [encode_row(tokenizer, row["prompt"], completion, stops) for completion in (chosen, rejected)]

    pairs = [pair for _, pair in encode_all(rows, args.dataset, encode, max_length)]
    eval_rows, eval_pairs = zip(*encode_all(eval_rows, args.eval_dataset or args.dataset, encode, max_length))
    prompt_rows = prompts_that_fit(eval_rows, tokenizer, args.max_new_tokens, max_length)
    return pairs, eval_pairs, prompt_rows[:args.eval_prompts]


# ----------------------------------------------------------------------------------------------------------------- loss


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta,
             label_smoothing=0.0, loss_type="sigmoid"):
    """Equation (7), for a batch of comparisons.

    All log-probabilities are those of whole completions, log pi(y | x) in nats, [B]. Returns (losses, chosen_rewards,
    rejected_rewards), each [B]; the rewards are the implicit ones of equation (5), without beta log Z(x) and gradient.

    sigmoid  -(1 - eps) log sigma(beta h) - eps log sigma(-beta h),  h = log-ratio chosen - log-ratio rejected;
             eps = label_smoothing: 0 in the DPO paper, else conservative DPO (Mitchell 2023): a share is mislabelled
    ipo      (h - 1 / (2 beta))^2: Azar et al. (2023), equation (17)
    """
    chosen_logratios = policy_chosen_logps - ref_chosen_logps
    rejected_logratios = policy_rejected_logps - ref_rejected_logps
    margin = chosen_logratios - rejected_logratios  # log Z(x) would stand in both, and cancels
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * margin) - label_smoothing * F.logsigmoid(-beta * margin)
    elif loss_type == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss_type {loss_type!r}: sigmoid or ipo")
    return losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()


def pair_logprobs(model, pairs, temperature: float) -> torch.Tensor:
    """[(chosen row, rejected row)] -> [B, 2]: log pi(y_w | x) and log pi(y_l | x), in one forward pass."""
    input_ids, mask = pad_rows([row for pair in pairs for row in pair], model.device)
    return token_logprobs(model, input_ids, None, mask, temperature).sum(1).view(-1, 2)


@torch.no_grad()
def all_pair_logprobs(model, pairs, args: Args) -> torch.Tensor:
    """The same for any number of comparisons, without gradient -> [n, 2] on the CPU."""
    logps = torch.zeros(len(pairs), 2)
    for group in micro_batches([pair_length(pair) for pair in pairs], args.micro_batch_size):
        logps[group] = pair_logprobs(model, [pairs[i] for i in group], args.temperature).cpu()
    return summed(logps)


def pair_length(pair) -> int:
    return 2 * max(len(ids) for ids, _ in pair)


def preference_metrics(losses, chosen_rewards, rejected_rewards, logps, prefix="") -> dict:
    means = {"loss": losses, "accuracy": (chosen_rewards > rejected_rewards).float(),
             "margin": chosen_rewards - rejected_rewards, "chosen_reward": chosen_rewards,
             "rejected_reward": rejected_rewards, "chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1]}
    return {prefix + name: values.mean().item() for name, values in means.items()}


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label-smoothing {args.label_smoothing}: a share of flipped labels, from 0 to below 0.5")
    if args.dataset == Args.dataset:
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "comparisons_heldout.jsonl")
        if not args.reward_model:
            args.reward_fn = args.reward_fn or str(ASSETS / "rewards.py") + ":sentiment"
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    reward = load_reward(args)
    pairs, eval_pairs, prompt_rows = load_comparisons(args, model, tokenizer)
    plan = batches(len(pairs), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(pairs)} comparisons, {len(eval_pairs)} held out; {len(plan)} updates of {args.batch_size}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    done, memory = run.start(model, optimizer)

    def evaluate(step):
        reference = memory.get("reference")  # its samples
        evaluation, samples = evaluate_policy(model, tokenizer, prompt_rows, reward, reference, args, step)
        logps = all_pair_logprobs(model, eval_pairs, args)
        losses = dpo_loss(*logps.T, *memory["eval_ref_logps"].T, args.beta, args.label_smoothing, args.loss_type)
        evaluation |= preference_metrics(*losses, logps, prefix="eval_")
        run.log(step, **({"loss": evaluation["eval_loss"]} if step == 0 else {}), **evaluation)
        run.write("samples", *samples)
        return evaluation, samples

    if done == 0:  # the policy still is the reference: its log-probabilities, once, of all that training will see
        seen = sorted({i for batch in plan for i in batch})
        memory["ref_logps"] = torch.full((len(pairs), 2), torch.nan)
        memory["ref_logps"][seen] = all_pair_logprobs(model, [pairs[i] for i in seen], args)
        memory["eval_ref_logps"] = all_pair_logprobs(model, eval_pairs, args)
        _, memory["reference"] = evaluate(0)
    shown = {}
    bar = progress_bar("dpo", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [pairs[i] for i in plan[step]]
        ref_logps = memory["ref_logps"][plan[step]].to(model.device)  # [B, 2]
        results = torch.zeros(5, len(batch), device=model.device)
        for group in micro_batches([pair_length(pair) for pair in batch], args.micro_batch_size):
            logps = pair_logprobs(model, [batch[i] for i in group], args.temperature)  # [b, 2]
            losses, *rewards = dpo_loss(*logps.T, *ref_logps[group].T, args.beta, args.label_smoothing, args.loss_type)
            (losses.sum() / len(batch)).backward()
            results[:, group] = torch.stack([losses.detach(), *rewards, *logps.detach().T])
        losses, *rewards, chosen_logps, rejected_logps = summed(results)
        metrics = preference_metrics(losses, *rewards, torch.stack([chosen_logps, rejected_logps], 1))
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, metrics["loss"], grad_norm, plan[step])
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens_per_s = sum(len(ids) for pair in batch for ids, _ in pair) / (time.perf_counter() - began)
        run.log(step + 1, **metrics, grad_norm=grad_norm, learning_rate=optimizer.param_groups[0]["lr"],
                tokens_per_s=tokens_per_s)
        shown |= {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy", "margin")}
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluation, _ = evaluate(step + 1)
            for name in ("kl", "reward", "win_rate", "share_of_optimum"):
                if name in evaluation:
                    shown[name] = f"{evaluation[name]:.2f}"
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, memory)

    save_model(model, tokenizer, run.dir)
    evaluation, samples = evaluate(len(plan))
    report(run, evaluation, samples, memory["reference"])


if __name__ == "__main__":
    run_script(main, Args)
