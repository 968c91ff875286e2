"""Supervised fine-tuning: stage 1 of RLHF, demonstrations -> policy.

    L(theta) = - sum_t m_t log pi_theta(y_t | x, y_<t) / sum_t m_t                                              (SFT)

over the completion tokens (m_t = 1) of demonstrations (x, y): InstructGPT (Ouyang et al. 2022), section 3.5. The mean
is over the tokens of the whole batch, however it is cut into micro-batches. Deviations from InstructGPT: the loss is on
the completion only (--train-on-prompt for all tokens), the learning rate decays linearly, there is no weight decay.

    python sft.py                                   # tiny-base -> the model that is shipped as assets/tiny-sft
    python sft.py --model assets/tiny-sft --dataset assets/data/comparisons.jsonl --completion-column chosen    # FeedME
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara --learning-rate 2e-5 --batch-size 16

Data: `prompt` + `completion`, `messages` (the loss is on every assistant turn) or `text`. Expect a held-out loss that
falls from 2.7 to 1.0 nats a token within half a minute on two CPU cores.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import (ASSETS, Run, batches, clip_gradients, column, encode_all, encode_conversation, encode_prompt,
                    encode_row, generate, hold_out, learning_rate_at, load_model, load_rows, load_tokenizer,
                    max_row_length, micro_batches, pad_rows, print_table, progress_bar, run_script, save_model, shard,
                    stop_ids, summed, token_logprobs)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-base")
    """Hub id or directory of the model to start from"""
    dataset: str = str(ASSETS / "data" / "demonstrations.jsonl")
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train"
    """split of --dataset"""
    eval_dataset: str | None = None
    """held-out demonstrations; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    completion_column: str = "completion"
    """column that answers `prompt`"""
    output_dir: str = "runs/sft"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    train_on_prompt: bool = False
    """put the loss on the prompt's tokens too"""
    learning_rate: float = 7e-4
    """peak, after 10% warm-up; then linear decay to 0. Real models want 1e-5 to 5e-5"""
    batch_size: int = 64
    """demonstrations an update"""
    micro_batch_size: int | None = None
    """demonstrations a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 1.0
    """passes over the data"""
    max_steps: int | None = None
    """number of updates, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 64
    """of the samples that are shown"""
    temperature: float = 1.0
    """of the samples that are shown"""
    eval_every: int = 50
    """updates between held-out evaluations"""
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


def encode_demonstration(row: dict, tokenizer, stops: list[int], args: Args) -> list[tuple[list[int], list[int]]]:
    """-> [(ids, mask)], the mask 1 on the tokens that carry loss."""
    if row.get("messages") is not None:
        ids, mask = encode_conversation(tokenizer, column(row, "messages"), stops)
    elif row.get("text") is not None and row.get("prompt") is None:
        ids = encode_prompt(tokenizer, column(row, "text")) + [tokenizer.eos_token_id]
        mask = [0] + [1] * (len(ids) - 1)
    else:
        ids, mask = encode_row(tokenizer, column(row, "prompt"), column(row, args.completion_column), stops)
    return [(ids, [0] + [1] * (len(ids) - 1) if args.train_on_prompt else mask)]


def load_demonstrations(args: Args, model, tokenizer):
    """-> training rows and held-out rows, (ids, mask), and the ids of a few held-out prompts to sample from."""
    stops, max_length = stop_ids(model, tokenizer), max_row_length(model, args.max_length)
    rows = load_rows(args.dataset, args.split)
    rows, eval_rows = (rows, load_rows(args.eval_dataset, None)) if args.eval_dataset else hold_out(rows, args.seed)

    def encode(rows, name):
        encoded = encode_all(rows, name, lambda row: encode_demonstration(row, tokenizer, stops, args), max_length)
        return [demonstration for _, (demonstration,) in encoded]

    rows, eval_rows = encode(rows, args.dataset), encode(eval_rows, args.eval_dataset or args.dataset)
    # A completion begins where the loss does; with --train-on-prompt, or a plain text, it continues the first token.
    prompts = [ids[:mask.index(1)] for ids, mask in eval_rows[:64]]
    return rows, eval_rows, [p for p in prompts if len(p) + args.max_new_tokens <= max_length][:16] or [prompts[0][:1]]


# ----------------------------------------------------------------------------------------------------------------- loss


def sft_loss(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (SFT): logps, mask [B, T] -> scalar, nats per token with mask 1."""
    return -(logps * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, tokenizer, rows, prompts, args: Args, step: int) -> tuple[dict, list[dict]]:
    """Held-out loss (nats a token) and perplexity, and samples for a few held-out prompts."""
    total, tokens = 0.0, 0
    for group in micro_batches([len(ids) for ids, _ in rows], args.micro_batch_size):
        input_ids, mask = pad_rows([rows[i] for i in group], model.device)
        total -= token_logprobs(model, input_ids, None, mask).sum().item()
        tokens += int(mask.sum())
    total, tokens = summed(torch.tensor([total, tokens], dtype=torch.double)).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed + step)
        rollout = generate(model, tokenizer, prompts, 1, args.max_new_tokens, args.temperature)
    samples = [{"step": step, "prompt": tokenizer.decode(p, skip_special_tokens=True), "completion": c, "ended": e}
               for p, c, e in zip(prompts, rollout.completions, rollout.ended.tolist())]
    metrics = {"eval_loss": total / tokens, "perplexity": math.exp(total / tokens)}
    return metrics | {"ended": rollout.ended.float().mean().item()}, samples


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    if args.dataset == Args.dataset:
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "demonstrations_heldout.jsonl")
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    rows, eval_rows, prompts = load_demonstrations(args, model, tokenizer)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    done, _ = run.start(model, optimizer)
    plan = batches(len(rows), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(rows)} demonstrations, {len(eval_rows)} held out; {len(plan)} updates of {args.batch_size}")

    def log_evaluation(step):
        evaluation, samples = evaluate(model, tokenizer, eval_rows, prompts, args, step)
        run.log(step, **({"loss": evaluation["eval_loss"]} if step == 0 else {}), **evaluation)
        run.write("samples", *samples)
        return evaluation, samples

    if done == 0:
        log_evaluation(0)
    shown = {}
    bar = progress_bar("sft", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [rows[i] for i in plan[step]]
        tokens = sum(sum(mask) for _, mask in batch)  # of the whole batch: micro-batches must not change the gradient
        loss = torch.zeros((), device=model.device)
        for group in micro_batches([len(ids) for ids, _ in batch], args.micro_batch_size):
            input_ids, mask = pad_rows([batch[i] for i in group], model.device)
            micro_loss = sft_loss(token_logprobs(model, input_ids, None, mask), mask) * (mask.sum() / tokens)
            micro_loss.backward()
            loss += micro_loss.detach()
        loss = summed(loss).item()
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, loss, grad_norm, plan[step])
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        run.log(step + 1, loss=loss, grad_norm=grad_norm, learning_rate=optimizer.param_groups[0]["lr"],
                tokens_per_s=sum(len(ids) for ids, _ in batch) / (time.perf_counter() - began))
        shown["loss"] = f"{loss:.3f}"
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            shown["held_out"] = f"{log_evaluation(step + 1)[0]['eval_loss']:.3f}"
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, {})

    save_model(model, tokenizer, run.dir)
    evaluation, samples = log_evaluation(len(plan))
    run.write_results(**evaluation)
    for sample in samples[:5]:
        print(f"\n{sample['prompt'][-200:]}\n    -> {sample['completion'].strip()[:300]}")
    print(f"\n{len(eval_rows)} held-out demonstrations, nats a token; share of {len(samples)} samples that ended:")
    print_table([["loss", "perplexity", "ended"], [evaluation[key] for key in ("eval_loss", "perplexity", "ended")]])
    print(f"saved to {run.dir}")


if __name__ == "__main__":
    run_script(main, Args)
