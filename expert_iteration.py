"""Expert iteration: the policy's best of n answers become its demonstrations, and again.

    repeat R times:    for each prompt x of the round:  y_1 ... y_n ~ pi(. | x),    y+ = argmax_i r(x, y_i)          (1)
                       pi <- argmin over pi of the loss of sft.py on the kept pairs (x, y+), from where pi is        (2)

The expert is the policy with a choice, the apprentice the policy alone (Anthony et al. 2017); STaR (Zelikman et al.
2022) does it with a check for a reward, AlpacaFarm (Dubois et al. 2023) once, with a reward model. What (1) draws from
is the law of best of n, best_of_n.py's equation (1), and (2) reaches at best that law: after a round the policy has the
reward of best of n without its n samples, and the next starts from there. Nothing holds the policy to the reference but
small n and few rounds.

    python expert_iteration.py                                       # chosen by tiny-rm, judged by the truth
    python expert_iteration.py --n 16 --rounds 1                     # AlpacaFarm's
    python expert_iteration.py --reward-fn assets/rewards.py:sentiment             # chosen by the truth itself
    python expert_iteration.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback-prompt \\
        --reward-model runs/reward_model --learning-rate 1e-5 --max-new-tokens 300

Deviations: each round has prompts of its own while there are enough, where STaR goes through all of them; the policy
goes on from where it is, where STaR starts each time from the base model; a prompt whose answers all score alike
teaches nothing, and is left out (STaR: answers that fail the check); the optimizer's moments and the
learning rate's decay go on through all rounds.

Data: prompts in `--prompt-column` (texts or lists of messages); every column reaches the reward function by its name.
Expect of the first command, in 29 seconds of one processor: rounds that win 82%, 92% and 96% against the reference, at
2.0, 3.2 and 5.1 nats.
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import (ASSETS, Run, UserError, batches, clip_gradients, evaluate_policy, generate, learning_rate_at,
                    load_model, load_prompts, load_tokenizer, micro_batches, pad_rows, print_table, progress_bar,
                    report, reward_from_function, reward_from_model, run_script, save_model, shard, summed,
                    token_logprobs)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "review_prompts.jsonl")
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train"
    """split of --dataset"""
    prompt_column: str = "prompt"
    """column that holds the prompts"""
    eval_dataset: str | None = None
    """held-out prompts; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    reward_model: str | None = None
    """a sequence-classification model with one label that chooses; default on the embedded data, where --reward-fn is
    not given either: assets/tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function that chooses, or, beside --reward-model, only judges what that model chose; default on the
    embedded data: assets/rewards.py:sentiment"""
    output_dir: str = "runs/expert_iteration"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    rounds: int = 3
    """R: how often the policy learns from its own best answers"""
    n: int = 8
    """answers to each prompt, of which the best is kept"""
    prompts_per_round: int = 320
    """prompts that are answered in a round"""
    learning_rate: float = 1e-3
    """peak, after 10% warm-up; then linear decay to 0"""
    batch_size: int = 32
    """kept answers an update"""
    micro_batch_size: int | None = None
    """answers a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 2.0
    """updates a round, as passes over one answer of each prompt; over the kept ones more, where some are left out"""
    max_steps: int | None = None
    """updates a round, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 64
    """of an answer"""
    temperature: float = 1.0
    """of the samples, and of all log-probabilities"""
    eval_prompts: int = 500
    """held-out prompts that are answered after each round"""
    save_every: int = 20
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


# ----------------------------------------------------------------------------------------------------- choice and loss


def keep_best(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (1): rewards [P, n] -> which answer is the best [P], and whether it is better than any other [P]. Of
    equal ones the first: samples come in no order."""
    return rewards.argmax(1), rewards.amax(1) > rewards.amin(1)


def sft_loss(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (2), as in sft.py: logps, mask [B, T] -> scalar, nats per token with mask 1."""
    return -(logps * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------------------------------------- main


def expert_round(model, tokenizer, rows, proxy, args: Args) -> tuple[list, dict]:
    """Equation (1) -> the rows (ids, mask) that are kept, and what the round says of itself."""
    began = time.perf_counter()
    answered = [row for row, _ in rows for _ in range(args.n)]
    rollout = generate(model, tokenizer, [ids for _, ids in rows], args.n, args.max_new_tokens, args.temperature)
    rewards = proxy([row["prompt"] for row in answered], rollout.completions, answered).view(-1, args.n)  # [P, n]
    best, better = keep_best(rewards)
    kept = [rollout.rows[i * args.n + best[i]] for i in better.nonzero().flatten().tolist()]
    if not kept:
        raise UserError(f"all {args.n} answers to each prompt score alike: nothing to choose from: raise --n, or use a "
                        "finer reward")
    seconds = time.perf_counter() - began
    return kept, {"round_reward": rewards.mean().item(), "kept_reward": rewards.amax(1).mean().item(),
                  "kept": len(kept) / len(rows), "round_ended": rollout.ended.float().mean().item(),
                  "rollout_tokens_per_s": sum(len(ids) for ids, _ in rollout.rows) / seconds}


def main(args: Args) -> None:
    for name, least in {"n": 2, "rounds": 1, "prompts_per_round": 1}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    if args.dataset == Args.dataset:
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "review_prompts_heldout.jsonl")
        if not args.reward_fn:
            args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
            args.reward_fn = str(ASSETS / "rewards.py") + ":sentiment"
    if not (args.reward_model or args.reward_fn):
        raise UserError("nothing chooses: give a --reward-model or a --reward-fn")
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    gold = reward_from_function(args.reward_fn) if args.reward_fn else None
    proxy = reward_from_model(args.reward_model, args) if args.reward_model else gold

    rows, eval_rows = load_prompts(args, model, tokenizer)
    chosen = batches(len(rows), min(args.prompts_per_round, len(rows)), 1, args.rounds, args.seed)  # for each round
    steps = len(batches(len(chosen[0]), args.batch_size, args.epochs, args.max_steps, 0))  # of each round
    print(f"{len(rows)} prompts, {len(eval_rows)} held out; {args.rounds} rounds of {len(chosen[0])} prompts x "
          f"{args.n} answers, {steps} updates of {args.batch_size} each", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    done, memory = run.start(model, optimizer)

    def evaluate(step, number):
        evaluation, samples = evaluate_policy(
            model, tokenizer, eval_rows, gold or proxy, memory.get("reference"), args, step
        )
        scores = proxy(*([sample[name] for sample in samples] for name in ("prompt", "completion")), eval_rows)
        evaluation = {"round": number, **evaluation, "proxy_reward": scores.mean().item()}
        run.log(step, **evaluation)
        run.write("samples", *samples)
        return evaluation, samples

    if "reference" not in memory:  # the policy still is the reference
        before, memory["reference"] = evaluate(0, 0)
        memory["rounds"] = [before]
    shown = {}
    bar = progress_bar("expert_iteration", done, args.rounds * steps)
    for step in bar:
        number, turn = divmod(step, steps)
        if turn == 0:
            memory["kept"], metrics = expert_round(model, tokenizer, [rows[i] for i in chosen[number]], proxy, args)
            run.log(step, **metrics)
            shown["kept_reward"] = f"{metrics['kept_reward']:.2f}"
        began, kept = time.perf_counter(), memory["kept"]
        indices = batches(len(kept), args.batch_size, 1, steps, args.seed + number)[turn]
        batch = [kept[i] for i in indices]
        tokens, loss = sum(sum(mask) for _, mask in batch), torch.zeros((), device=model.device)
        for group in micro_batches([len(ids) for ids, _ in batch], args.micro_batch_size):
            input_ids, mask = pad_rows([batch[i] for i in group], model.device)
            logps = token_logprobs(model, input_ids, None, mask, args.temperature)  # [b, T]
            micro_loss = sft_loss(logps, mask) * (mask.sum() / tokens)
            micro_loss.backward()
            loss += micro_loss.detach()
        loss = summed(loss).item()
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, loss, grad_norm, indices)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, args.rounds * steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        run.log(step + 1, loss=loss, grad_norm=grad_norm, learning_rate=optimizer.param_groups[0]["lr"],
                tokens_per_s=sum(len(ids) for ids, _ in batch) / (time.perf_counter() - began))
        shown["loss"] = f"{loss:.3f}"
        if turn + 1 == steps and number + 1 < args.rounds:
            evaluation, _ = evaluate(step + 1, number + 1)
            memory["rounds"].append(evaluation)
            shown |= {name: f"{evaluation[name]:.2f}" for name in ("reward", "kl", "win_rate")}
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.rounds * steps:
            run.save_checkpoint(step + 1, model, optimizer, memory)

    save_model(model, tokenizer, run.dir)
    evaluation, samples = evaluate(args.rounds * steps, args.rounds)
    report(run, evaluation | {"proxy_reward_ref": memory["rounds"][0]["proxy_reward"]}, samples, memory["reference"])
    print()
    print_table([["round", "proxy reward", "reward", "KL, nats", "win rate"]] +
                [[m["round"], m["proxy_reward"], *(f"{m[name]:{form}} ± {m[name + '_se']:{form}}" for name, form in
                                                   (("reward", ".2f"), ("kl", ".2f"), ("win_rate", ".1%")))]
                 for m in [*memory["rounds"], evaluation]])


if __name__ == "__main__":
    run_script(main, Args)
