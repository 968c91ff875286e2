r"""Supervised fine-tuning: stage 1 of RLHF, demonstrations -> policy.

    L(theta) = - sum_t m_t log pi_theta(y_t | x, y_<t) / sum_t m_t                            (SFT)

over the completion tokens (m_t = 1) of demonstrations (x, y): InstructGPT (Ouyang et al. 2022),
section 3.5. The mean is over the tokens of the whole batch, however it is cut into micro-batches.
Deviations from InstructGPT: the loss is on the completion only (--train-on-prompt: on all tokens),
the learning rate decays linearly, and there is no weight decay.

    python sft.py                 # tiny-base -> what is shipped as assets/tiny-sft
    python sft.py --model assets/tiny-sft --dataset assets/data/comparisons.jsonl \
        --completion-column chosen                                                # binary FeedME
    python sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara --learning-rate 2e-5

Expect a held-out loss that falls from 2.7 to 1.0 nats per token within half a minute on two cores.

Data: `prompt` + `completion`, `messages` (the loss is on every turn of the assistant) or `text`.
"""

import itertools
import math
import time
from dataclasses import dataclass

import torch

from common import (
    Row, UserError, all_reduce, clip_gradients, encode, encode_conversation, encode_prompt,
    encode_row, generate, load_policy, load_tokenizer, micro_batches, pad_rows, save_and_reload,
    set_learning_rate, stop_ids, token_budget, token_logprobs, window
)
from harness import (
    ASSETS, Count, Limits, Positive, Run, Skip, TrainArgs, batches, column, conversational,
    is_embedded, load_examples, print_table, progress_bar, run_script, tools_of
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-base")
    """Hub id or directory of the model to start from"""
    dataset: str = str(ASSETS / "data" / "demonstrations.jsonl")
    """demonstrations: Hub id, id:config, or a .jsonl, .json, .csv or .parquet file or directory"""
    completion_column: str = "completion"
    """column with the completions of `prompt`"""
    train_on_prompt: bool = False
    """put the loss on the prompt's tokens too"""
    learning_rate: Positive = 7e-4
    """peak, after 10% warm-up, before linear decay to 0; for real models 1e-5 to 5e-5"""
    batch_size: Count = 64
    """demonstrations per update"""
    epochs: Positive = 1.0
    """passes over the data"""
    max_new_tokens: Count = 64
    """tokens per completion in evaluations"""
    temperature: Positive = 1.0
    """temperature of the completions in evaluations"""
    eval_every: Count = 50
    """updates between held-out evaluations"""
    output_dir: str = "runs/sft"


# --- data ---


def load_demonstrations(args: Args, model, tokenizer):
    """-> training and held-out rows, [(example, row)], the mask on the tokens that carry loss."""
    stops = stop_ids(model, tokenizer)

    def encode(example):
        tools = tools_of(example)
        name = "messages" if example.get("messages") else "conversations"
        if example.get(name):
            messages = column(example, name)
            if isinstance(messages, str):
                raise UserError(f"{name!r} is a text: give a list of messages, or call it 'text'")
            asked = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
            example["prompt"] = list(asked)  # one prompt's rows are all held out, or none
            rows = encode_conversation(tokenizer, messages, stops, tools)
        elif example.get("text") is not None and example.get("prompt") is None:
            ids = encode_prompt(tokenizer, column(example, "text"))
            ids = ids if ids[-1] in stops and len(ids) > 1 else [*ids, tokenizer.eos_token_id]
            rows = [Row(ids, [0] + [1] * (len(ids) - 1))]  # nothing predicts the first token
        else:
            completion = column(example, args.completion_column)
            prompt, completion = conversational(column(example, "prompt"), completion)
            rows = [encode_row(tokenizer, prompt, completion, stops, tools)]
        if not rows:
            raise Skip("no assistant turn")
        if args.train_on_prompt:
            rows = [Row(ids, [0] + [1] * (len(ids) - 1)) for ids, _ in rows]
        return rows

    train, held_out = load_examples(args, encode, Limits.of(args, model))
    train = [(example, row) for example, rows in train for row in rows]
    held_out = [(example, row) for example, rows in held_out for row in rows]
    return train, held_out[:args.eval_prompts]


# --- loss ---


def sft_loss(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (SFT): logps, mask [B, T] -> scalar, nats per token with mask 1."""
    return -(logps * mask).sum() / mask.sum()


def batch_loss(model, rows: list[Row], args: Args, train: bool) -> float:
    """The mean loss over all tokens of these rows; adds up its gradient if train."""
    tokens = sum(sum(mask) for _, mask in rows)
    total = torch.zeros((), device=model.device)
    lengths = [len(ids) for ids, _ in rows]
    for group in micro_batches(lengths, args.micro_batch_size, token_budget(model)):
        input_ids, mask = pad_rows([rows[i] for i in group])
        logps = token_logprobs(model, input_ids, mask)
        share = mask.sum().item() / tokens  # micro-batches must not change the gradient
        loss = sft_loss(logps, mask.to(logps.device)) * share
        if train:
            loss.backward()
        total += loss.detach()
    return all_reduce(total).item()


# --- evaluation ---


@torch.no_grad()
def evaluate(model, tokenizer, held_out, run: Run, step: int):
    """-> held-out loss (nats per token) and perplexity, and completions of 16 held-out prompts."""
    args, rows = run.args, [row for _, row in held_out]
    loss = batch_loss(model, rows, args, train=False)
    prompts = [ids[:mask.index(1)] for ids, mask in rows[:64]]
    room = window(model) - args.max_new_tokens
    prompts = [ids for ids in prompts if len(ids) <= room][:16] or [prompts[0][:1]]
    with torch.random.fork_rng(devices=[]):  # must not change what training draws
        torch.manual_seed(args.seed + step)
        rollout = generate(model, tokenizer, prompts, 1, args.max_new_tokens, args.temperature)
    samples = []
    for ids, completion, ended in zip(prompts, rollout.completions, rollout.ended.tolist()):
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        samples.append({"step": step, "prompt": prompt, "completion": completion, "ended": ended})
    ended = rollout.ended.float().mean().item()
    perplexity = math.exp(loss) if loss < 700 else math.inf
    metrics = {"eval_loss": loss, "perplexity": perplexity, "ended": ended}
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


# --- main ---


def main(args: Args) -> None:
    is_embedded(args)
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = load_policy(args)
    rows, held_out = load_demonstrations(args, model, tokenizer)
    plan = batches(len(rows), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(rows)} demonstrations, {len(held_out)} held out; {len(plan)} updates", flush=True)

    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    done, _ = run.start(model, optimizer)
    if done == 0:
        evaluate(model, tokenizer, held_out, run, 0)
    bar = progress_bar("sft", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [rows[i][1] for i in plan[step]]
        metrics = {"loss": batch_loss(model, batch, args, train=True)}
        metrics["grad_norm"] = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, metrics, [rows[i][0] for i in plan[step]])
        metrics["learning_rate"] = set_learning_rate(optimizer, step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(ids) for ids, _ in batch)
        run.log(step + 1, "train", **metrics, tokens_per_s=tokens / (time.perf_counter() - began))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluate(model, tokenizer, held_out, run, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, {})

    saved = save_and_reload(model, tokenizer, run.dir, args)
    metrics, samples = evaluate(saved, tokenizer, held_out, run, len(plan))
    run.write_results(**metrics)
    for sample in samples[:5]:
        print(f"\n{sample['prompt'][-200:]}\n    -> {sample['completion'].strip()[:300]}")
    print(f"\n{len(held_out)} held-out demonstrations; loss in nats per token; share of "
          f"{len(samples)} completions that ended:")
    print_table([["loss", "perplexity", "ended"], list(metrics.values())])
    print(f"saved to {run.dir}")


if __name__ == "__main__":
    run_script(main, Args)
