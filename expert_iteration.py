r"""Expert iteration: the policy's best of n completions become its demonstrations, and again.

    repeat R times:
        for each prompt x of the round:  y_1 ... y_n ~ pi(. | x),  y+ = argmax_i r(x, y_i)      (1)
        pi <- argmin over pi of the loss of sft.py on the kept pairs (x, y+)                    (2)

The expert is the policy with a choice, the apprentice the policy alone (Anthony et al. 2017). STaR
(Zelikman et al. 2022) does it with a check as the reward, AlpacaFarm (Dubois et al. 2023) once,
with a reward model. What (1) keeps follows the law of best of n, equation (1) of best_of_n.py,
and (2) reaches at best that law: after a round the policy has the reward of best of n without its
n samples, and the next round starts from there. Nothing holds the policy to the reference but
small n and few rounds.

    python expert_iteration.py                      # chosen by tiny-rm, judged by the true reward
    python expert_iteration.py --samples-per-prompt 16 --rounds 1                 # AlpacaFarm's
    python expert_iteration.py --reward-fn assets/rewards.py:sentiment     # chosen by the truth too
    python expert_iteration.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --dataset trl-lib/ultrafeedback-prompt --reward-model runs/reward_model \
        --learning-rate 1e-5 --max-new-tokens 300

Deviations: each round has prompts of its own while there are enough, where STaR goes through all of
them; (2) starts from the current policy, where STaR's starts from the base model each time; a
prompt whose completions all score alike teaches nothing and is left out (STaR: completions that
fail the check); the optimizer's moments and the learning rate's decay span all rounds.

Expect of the first command, in 29 seconds on one core: rounds that win 82%, 92% and 96% against the
reference, at 2.0, 3.2 and 5.1 nats.

Data: prompts in `--prompt-column` (texts or lists of messages). Every further column reaches the
reward function by its name.
"""

import time
from dataclasses import dataclass
from typing import Annotated

import torch

from common import (
    Row, UserError, all_reduce, clip_gradients, generate, load_policy, load_reference,
    load_tokenizer, micro_batches, pad_rows, save_and_reload, set_learning_rate, token_budget,
    token_logprobs
)
from harness import (
    ASSETS, GOLD, Count, HeldOut, Positive, Run, TrainArgs, batches, evaluate_policy,
    is_embedded, load_prompts, load_rewards, print_table, progress_bar, report, run_script,
    with_se
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    dataset: str = str(ASSETS / "data" / "review_prompts.jsonl")
    """prompts: Hub id, id:config, or a .jsonl, .json, .csv or .parquet file or directory"""
    prompt_column: str = "prompt"
    """column with the prompts"""
    reward_model: str | None = None
    """sequence-classification model with one label that chooses; embedded data: tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function that chooses; beside --reward-model it only judges what that model chose"""
    samples_per_prompt: Annotated[int, (lambda x: x >= 2, "at least 2 to choose from")] = 8
    """completions per prompt, of which the best is kept"""
    rounds: Count = 3
    """how often the policy learns from its own best completions"""
    prompts_per_round: Count = 320
    """prompts per round"""
    learning_rate: Positive = 1e-3
    """peak, after 10% warm-up, before linear decay to 0; for real models about 1e-5"""
    batch_size: Count = 32
    """kept completions per update"""
    epochs: Positive = 2.0
    """updates per round, as passes over one completion of each of its prompts"""
    max_steps: Count | None = None
    """updates per round, whatever --epochs says"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    save_every: Count = 20
    """updates between checkpoints"""
    output_dir: str = "runs/expert_iteration"


# --- choice and loss ---


def keep_best(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation (1): rewards [P, n] -> which completion is the best [P], and whether it is better
    than any other [P]. Of equal ones the first: samples come in no order."""
    return rewards.argmax(1), rewards.amax(1) > rewards.amin(1)


def sft_loss(logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Equation (2), as in sft.py: logps, mask [B, T] -> scalar, nats per token with mask 1."""
    return -(logps * mask).sum() / mask.sum()


# --- one round ---


def sample_and_choose(policy, tokenizer, prompts, reward, args: Args):
    """Equation (1) for prompts [(example, ids)] -> the completions that are kept, with the
    indices of their prompts, and what is logged of the round."""
    began, n = time.perf_counter(), args.samples_per_prompt
    examples = [example for example, _ in prompts for _ in range(n)]
    prompt_ids = [ids for _, ids in prompts]
    rollout = generate(policy, tokenizer, prompt_ids, n, args.max_new_tokens, args.temperature)
    tokens_per_s = rollout.completion_mask.sum().item() / (time.perf_counter() - began)
    rewards = reward(examples, rollout.completions, rollout.completion_ids).view(-1, n)  # [P, n]
    best, is_better = keep_best(rewards)
    kept = []
    for i in is_better.nonzero().flatten().tolist():
        row = rollout.rows[i * n + int(best[i])]
        kept.append({"prompt": i, "ids": row.ids, "mask": row.mask})
    if not kept:
        raise UserError(f"all {n} completions of each prompt score alike, so none is the best: "
                        "raise --samples-per-prompt, or use a finer reward")
    return kept, {
        "round_reward": rewards.mean().item(),
        "kept_reward": rewards.amax(1).mean().item(),
        "kept": len(kept) / len(prompts),
        "round_ended": rollout.ended.float().mean().item(),
        "rollout_tokens_per_s": tokens_per_s,
    }


def add_gradients(policy, rows: list[Row], args: Args) -> float:
    """Add the gradient of equation (2) for these rows, by micro-batches -> its loss."""
    tokens = sum(sum(mask) for _, mask in rows)
    total = torch.zeros((), device=policy.device)
    lengths = [len(ids) for ids, _ in rows]
    for group in micro_batches(lengths, args.micro_batch_size, token_budget(policy)):
        input_ids, mask = pad_rows([rows[i] for i in group])
        logps = token_logprobs(policy, input_ids, mask, args.temperature)  # [b, T]
        share = mask.sum().item() / tokens  # micro-batches must not change the gradient
        loss = sft_loss(logps, mask.to(logps.device)) * share
        loss.backward()
        total += loss.detach()
    return all_reduce(total).item()


def evaluate(policy, held_out: HeldOut, chooser, run: Run, step: int):
    metrics, samples = evaluate_policy(policy, held_out, run.args, step)
    if run.args.reward_model:
        examples = [example for example, _ in held_out.prompts]
        rewards = chooser(examples, [sample["completion"] for sample in samples])
        metrics["proxy_reward"] = rewards.mean().item()
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


# --- main ---


def print_rounds(rounds: list[dict]) -> None:
    table = [["round", "proxy reward", "reward", "KL, nats", "win rate"]]
    for number, metrics in enumerate(rounds):
        table.append([
            number,
            with_se(metrics, "proxy_reward", ".2f"),
            with_se(metrics, "reward", ".2f"),
            with_se(metrics, "kl", ".2f"),
            with_se(metrics, "win_rate", ".1%"),
        ])
    print()
    print_table(table)


def main(args: Args) -> None:
    if is_embedded(args) and not args.reward_fn:
        args.reward_fn, args.reward_model = GOLD, args.reward_model or str(ASSETS / "tiny-rm")
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    policy = load_policy(args)
    reference = load_reference(policy, args)
    chooser, judge = load_rewards(args, tokenizer.chat_template)
    prompts, eval_prompts = load_prompts(args, policy, tokenizer)
    held_out = HeldOut(eval_prompts, judge, reference, tokenizer)
    per_round = min(args.prompts_per_round, len(prompts))
    asked = batches(len(prompts), per_round, 1, args.rounds, args.seed)  # indices of each round
    steps = len(batches(per_round, args.batch_size, args.epochs, args.max_steps, 0))  # per round
    total = args.rounds * steps
    print(f"{len(prompts)} prompts, {len(eval_prompts)} held out; {args.rounds} rounds of {steps} "
          f"updates on the best of {args.samples_per_prompt}", flush=True)

    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    done, memory = run.start(policy, optimizer)
    if done == 0:
        before, memory["reference_samples"] = evaluate(policy, held_out, chooser, run, 0)
        memory["rounds"] = [before]
    held_out.reference_samples = memory["reference_samples"]
    bar = progress_bar("expert_iteration", done, total)
    for step in bar:
        number, turn = divmod(step, steps)
        chosen = [prompts[i] for i in asked[number]]
        if turn == 0:
            memory["kept"], metrics = sample_and_choose(policy, tokenizer, chosen, chooser, args)
            run.log(step, "train", round=number + 1, **metrics)
        began, kept = time.perf_counter(), memory["kept"]
        plan = batches(len(kept), args.batch_size, 1, steps, args.seed + number)
        batch = [kept[i] for i in plan[turn]]
        rows = [Row(completion["ids"], completion["mask"]) for completion in batch]
        metrics = {"loss": add_gradients(policy, rows, args)}
        metrics["grad_norm"] = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(step, metrics, [chosen[completion["prompt"]][0] for completion in batch])
        metrics["learning_rate"] = set_learning_rate(optimizer, step, total, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(row.ids) for row in rows)
        run.log(step + 1, "train", **metrics, tokens_per_s=tokens / (time.perf_counter() - began))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        if turn + 1 == steps and step + 1 < total:
            metrics, _ = evaluate(policy, held_out, chooser, run, step + 1)
            memory["rounds"].append(metrics)
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            run.save_checkpoint(step + 1, policy, optimizer, memory)

    saved = save_and_reload(policy, tokenizer, run.dir, args)
    evaluation, samples = evaluate(saved, held_out, chooser, run, total)
    if args.reward_model:
        evaluation["proxy_reward_ref"] = memory["rounds"][0]["proxy_reward"]
    report(run, evaluation, samples, held_out)
    print_rounds([*memory["rounds"], evaluation])


if __name__ == "__main__":
    run_script(main, Args)
