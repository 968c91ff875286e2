"""Reward conditioning: learn from good and bad completions alike, and ask for good ones.

A label k says how good a completion is, and stands as text in front of its prompt. The policy
learns the likelihood of every completion given its label, and is sampled given the best label:
as CTRL (Keskar et al. 2019) and the decision transformer (Chen et al. 2021). Two kinds:

    --method binary    comparisons: label 2 for the chosen completion, 1 for the rejected one.
                       Supervised learning, as in AlpacaFarm (Dubois et al. 2023)
    --method quark     Quark (Lu et al. 2022), in rounds. Explore: sample the policy given the
                       best label (at first the reference), score, add to the pool. Quantise:
                       cut the pool, sorted by reward, into K equal parts, labels 1 ... K.
                       Learn from all parts

    L(theta) = E_{k, (x, y) of label k} [ sum_t  - log pi_theta(y_t | k, x, y_<t)
               + beta KL( pi_ref(. | x, y_<t) || pi_theta(. | k, x, y_<t) ) ]             (1)

which is Quark's objective, as a mean over tokens; the KL is exact, over the vocabulary. What is
reported as `kl` is sampled, of the policy as it is used, and in the other direction:
KL( pi(. | K, x) || pi_ref(. | x) ).

    python reward_conditioning.py                      # Quark, rewards by tiny-rm
    python reward_conditioning.py --beta 1             # closer to the reference
    python reward_conditioning.py --method binary      # 4,000 noisy comparisons
    python reward_conditioning.py --method binary --model Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset trl-lib/ultrafeedback_binarized --prefix "Quality {label} of 2. " \\
        --learning-rate 1e-5

Deviations: Quark's labels are new tokens, which then must never be sampled; here they are text,
and the vocabulary stays as it is. Quark explores with all prompts, here with --prompts-per-round
of them; it can add an entropy bonus.

The saved model asks for the best label by itself, in any software: its tokenizer puts the label
in front of every text, its chat template in front of what the user says first.

Expect of the first command a policy that wins 88% against the reference, at 4.1 nats. The first
round learns little: the embedded model hardly reads its prompt (of the reviews that name a genre,
14% name the prompt's; 1 in 8 is chance), and has to find out that there is a label. Hence the
default of --prefix, the label twelve times: written once, it was not found within 400 updates.
Binary's labels are noisier, and it wins 58% to 60% in three seeds, at 1.7 nats.

Data: quark prompts in `--prompt-column` (every further column reaches the reward function by its
name), binary `prompt` + `chosen` + `rejected`. Texts or lists of messages.
"""

import copy
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from common import (
    Row, UserError, adapters_off, clip_gradients, encode, encode_prompt, encode_row, generate,
    load_model, load_reference, load_tokenizer, logits_at, make_row, mean_over_batch, micro_batches,
    pad_rows, prepare_for_training, save_model, send, set_learning_rate, shard, stop_ids,
    token_budget
)
from harness import (
    ASSETS, GOLD, Count, HeldOut, Limits, NonNegative, Positive, Run, TrainArgs, batches, column,
    comparison, different_prompts, evaluate_policy, load_examples, load_reward, progress_bar,
    report, run_script, tools_of
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    method: Literal["quark", "binary"] = "quark"
    """quark: quantiles of the reward of own completions; binary: chosen and rejected"""
    dataset: str | None = None
    """prompts (binary: comparisons): Hub id, id:config, or a local file or directory"""
    split: str = "train"
    """split of --dataset, or a part of it such as train[:1000]"""
    prompt_column: str = "prompt"
    """column with the prompts"""
    eval_dataset: str | None = None
    """held-out data of the same kind; default: that of a tenth of the prompts, at most 500"""
    eval_split: str = "test"
    """split of --eval-dataset"""
    reward_model: str | None = None
    """sequence-classification model with one label: quark's reward; embedded data: tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function: quark's reward; beside --reward-model, and for binary, only the judge"""
    prefix: str = 12 * "{label}" + " "
    """text in front of prompts, {label} the number; for real models "Quality {label} of 5. " """
    beta: NonNegative | None = None
    """KL coefficient: the larger, the closer to the reference; default: quark 0.2, binary 0"""
    quantiles: Annotated[int, (lambda x: x >= 2, "at least 2")] = 5
    """quark: number of labels"""
    rounds: Count = 6
    """quark: number of explorations"""
    prompts_per_round: Count = 500
    """quark: prompts per exploration"""
    samples_per_prompt: Count = 2
    """quark: completions per prompt"""
    learning_rate: Positive | None = None
    """peak, after 10% warm-up, before linear decay to 0; default: quark 3e-3, binary 4e-3"""
    batch_size: Count = 32
    """completions per update"""
    epochs: Positive | None = None
    """binary: passes over the completions, default 1.5; quark: over those of a round, default 1"""
    max_steps: Count | None = None
    """number of updates (quark: per round), whatever --epochs says"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    eval_every: Count = 50
    """binary: updates between held-out evaluations; quark's are after each round"""
    eval_prompts: Count = 500
    """held-out prompts per evaluation"""
    output_dir: str = "runs/reward_conditioning"


# --- labels ---


def quantile_labels(rewards: torch.Tensor, quantiles: int) -> torch.Tensor:
    """Rewards [N] -> labels 1 ... K [N], K the best: the sorted pool, cut into parts of equal size
    (to one completion). Of equal rewards at a cut, the earlier get the lower label."""
    labels = torch.empty(len(rewards), dtype=torch.long)
    order = rewards.sort(stable=True).indices
    labels[order] = 1 + torch.arange(len(rewards)) * quantiles // len(rewards)
    return labels


# In front of a chat template: the label's text begins what the user says first.
CHAT_LABEL = """{%%- set i = 1 if messages[0]['role'] == 'system' else 0 -%%}
{%%- set asked = dict(messages[i], content=%s + messages[i]['content']) -%%}
{%%- set messages = messages[:i] + [asked] + messages[i + 1:] %%}"""


def with_label(tokenizer, text: str):
    """A copy of the tokenizer that puts a label's text in front of every prompt, in any software
    that reads its files. The label and a text are encoded apart: no token spans both."""
    labelled = copy.deepcopy(tokenizer)
    labelled.__class__ = PreTrainedTokenizerFast  # some classes write their own post-processor
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    start, end = special.index(0), len(ids) - special[::-1].index(0)
    pieces = []
    for name, added in (("before", ids[:start] + encode(tokenizer, text)), ("after", ids[end:])):
        tokens = tokenizer.convert_ids_to_tokens(added)
        pieces.append({"id": name, "ids": added, "tokens": tokens})
    processor = TemplateProcessing(single="before $A after", special_tokens=pieces)
    labelled.backend_tokenizer.post_processor = processor
    if tokenizer.chat_template:
        label = json.dumps(text, ensure_ascii=False)
        labelled.chat_template = CHAT_LABEL % label + tokenizer.get_chat_template()
    return labelled


@dataclass
class Models:
    policy: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: PreTrainedTokenizerFast  # without a label
    labelled: dict[int, PreTrainedTokenizerFast]  # label -> a tokenizer that asks for it


def load_models(args: Args) -> Models:
    tokenizer, labelled = load_tokenizer(args.model, args.chat_template), {}
    if not tokenizer.is_fast:
        raise UserError(f"model {args.model}: it has no tokenizer.json to put the label into")
    best = args.quantiles if args.method == "quark" else 2
    for label in range(1, best + 1):
        labelled[label] = with_label(tokenizer, args.prefix.replace("{label}", str(label)))
    policy = load_model(args.model, args.device, args.dtype)
    policy = prepare_for_training(policy, args)
    reference = load_reference(policy, args)
    return Models(policy, reference, tokenizer, labelled)


# --- data ---


def load_data(args: Args, models: Models):
    """-> training examples, binary's labelled completions [(example, row)], and held-out prompts
    [(example, ids)]. Prompts must leave room for a completion behind the longest label."""
    stops = stop_ids(models.policy, models.tokenizer)
    longest = max(models.labelled.values(), key=lambda asking: len(encode_prompt(asking, "")))

    def encode_example(example):
        if args.method == "quark":
            example["prompt"] = column(example, args.prompt_column)
            return [make_row(prompt_ids(longest, example), [])]
        prompt, chosen, rejected = comparison(example)
        example["prompt"] = prompt
        rows = [make_row(prompt_ids(longest, example), [])]
        for label, completion in ((2, chosen), (1, rejected)):
            tokenizer, tools = models.labelled[label], tools_of(example)
            rows.append(encode_row(tokenizer, prompt, completion, stops, tools))
        return rows

    limits = Limits.of(args, models.policy)
    train, held_out = load_examples(args, encode_example, limits, args.max_new_tokens)
    examples = [example for example, _ in train]
    completions = [(example, row) for example, (_, *rows) in train for row in rows]
    held_out = [example for example, _ in different_prompts(held_out, args)]
    eval_prompts = [(example, prompt_ids(models.tokenizer, example)) for example in held_out]
    return examples, completions, eval_prompts


def prompt_ids(tokenizer, example) -> list[int]:
    return encode_prompt(tokenizer, example["prompt"], tools_of(example))


def without_label(tokenizer, example, row: Row) -> Row:
    """The row's completion behind the prompt as this tokenizer encodes it."""
    ids, start = prompt_ids(tokenizer, example), row.mask.index(1)
    return Row(ids + row.ids[start:], [0] * len(ids) + row.mask[start:])


# --- loss ---


def conditioning_loss(logps, ref_logps, targets, beta: float):
    """Equation (1), summed over tokens -> (loss, KL(pi_ref || pi_theta)), nats.

    logps, ref_logps [N, V]: log-probabilities of all tokens, with and without the label; targets
    [N]: the tokens that came. ref_logps None: without the KL.
    """
    nll = F.nll_loss(logps, targets, reduction="sum")
    if ref_logps is None:
        return nll, torch.zeros_like(nll)
    kl = F.kl_div(logps, ref_logps, reduction="sum", log_target=True)
    return nll + beta * kl, kl.detach()


def vocabulary_logprobs(model, rows: list[Row], temperature: float):
    """-> log-probabilities of the whole vocabulary where a completion's token is predicted [N, V],
    and these tokens [N]: in the order of rows and positions, whatever their prompts are."""
    input_ids, mask = pad_rows(rows)
    predicts = F.pad(mask[:, 1:], (0, 1)).bool()  # a completion's token comes next
    logits = logits_at(model, input_ids, predicts)  # [N, V]
    (targets,) = send(logits.device, input_ids[mask.bool()])
    return F.log_softmax(logits.float() / temperature, -1), targets


def batch_loss(models: Models, batch, args: Args):
    """Equation (1) for [(example, row)]. The reference reads no labels."""
    labelled, ref_logps = [row for _, row in batch], None
    logps, targets = vocabulary_logprobs(models.policy, labelled, args.temperature)  # [N, V], [N]
    if args.beta:
        plain = [without_label(models.tokenizer, example, row) for example, row in batch]
        with torch.no_grad(), adapters_off(models.reference) as reference:
            ref_logps, _ = vocabulary_logprobs(reference, plain, args.temperature)
    return conditioning_loss(logps, ref_logps, targets, args.beta)


def update(models: Models, optimizer, batch, args: Args, check) -> dict[str, float]:
    """One update by equation (1) on [(example, row)] -> what is logged of it."""
    began, totals = time.perf_counter(), defaultdict(float)
    lengths = [len(row.ids) for _, row in batch]
    targets = sum(sum(row.mask) for _, row in batch)
    for group in micro_batches(lengths, args.micro_batch_size, token_budget(models.policy)):
        loss, kl = batch_loss(models, [batch[i] for i in group], args)
        (loss / targets).backward()
        totals["loss"] += loss.detach()
        if args.beta:
            totals["kl_per_token"] += kl
    metrics = mean_over_batch(totals, targets)
    grad_norm = clip_gradients(models.policy, args.max_grad_norm)
    check(metrics["loss"], grad_norm, [example.where for example, _ in batch])
    optimizer.step()
    optimizer.zero_grad()
    return metrics | {
        "grad_norm": grad_norm,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "tokens_per_s": sum(lengths) / (time.perf_counter() - began),
    }


# --- rounds of Quark ---


def explore(policy, tokenizer, examples, indices, pool: list[dict], *, reward, args: Args) -> dict:
    """Add completions of these examples, asked for by this tokenizer, to the pool -> what is logged
    of them."""
    n, prompts = args.samples_per_prompt, [prompt_ids(tokenizer, examples[i]) for i in indices]
    rollout = generate(policy, tokenizer, prompts, n, args.max_new_tokens, args.temperature)
    indices = [i for i in indices for _ in range(n)]
    completion_ids = [row.ids[row.mask.index(1):] for row in rollout.rows]
    rewards = reward([examples[i] for i in indices], rollout.completions, completion_ids)
    for i, ids, value in zip(indices, completion_ids, rewards.tolist()):
        pool.append({"example": i, "completion": ids, "reward": value})
    return {
        "pool": len(pool),
        "round_reward": rewards.mean().item(),
        "round_ended": rollout.ended.float().mean().item(),
    }


def labelled_pool(pool: list[dict], examples, labelled: dict) -> list:
    """All that was explored, each completion behind its quantile's label -> [(example, row)]."""
    rewards, rows = torch.tensor([entry["reward"] for entry in pool]), []
    for entry, label in zip(pool, quantile_labels(rewards, len(labelled)).tolist()):
        example = examples[entry["example"]]
        row = make_row(prompt_ids(labelled[label], example), entry["completion"])
        rows.append((example, row))
    return rows


def plan_rounds(args: Args, num_examples: int) -> tuple[list[list[int]], int]:
    """-> the indices of each round's examples, and updates per round. Binary is one round."""
    per_round, rounds, completions = num_examples, 1, 2 * num_examples
    if args.method == "quark":
        per_round, rounds = min(args.prompts_per_round, num_examples), args.rounds
        completions = per_round * args.samples_per_prompt
    asked = batches(num_examples, per_round, 1, rounds, args.seed)
    steps = len(batches(completions, args.batch_size, args.epochs, args.max_steps, 0))
    print(f"{num_examples} examples; rounds: {rounds}, each adds {completions} completions and has "
          f"{steps} updates", flush=True)
    return asked, steps


# --- main ---


def fill_defaults(args: Args) -> None:
    """Those that depend on --method, and the embedded data's rewards."""
    defaults = {
        "quark": {"beta": 0.2, "epochs": 1.0, "learning_rate": 3e-3},
        "binary": {"beta": 0.0, "epochs": 1.5, "learning_rate": 4e-3},
    }
    for name, value in defaults[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        name = "review_prompts" if args.method == "quark" else "comparisons"
        args.dataset = str(ASSETS / "data" / f"{name}.jsonl")
        args.eval_dataset = args.eval_dataset or args.dataset.replace(".jsonl", "_heldout.jsonl")
        if not args.reward_fn:
            args.reward_fn, args.reward_model = GOLD, args.reward_model or str(ASSETS / "tiny-rm")
    if "{label}" not in args.prefix:
        raise UserError(f"--prefix {args.prefix!r}: put {{label}} where the label stands")
    if args.method == "quark" and not (args.reward_model or args.reward_fn):
        raise UserError("no reward: give --reward-model or --reward-fn FILE.py:function")


def main(args: Args) -> None:
    fill_defaults(args)
    run, quark = Run(args), args.method == "quark"
    torch.manual_seed(args.seed)
    models = load_models(args)
    policy, reference, tokenizer = models.policy, models.reference, models.tokenizer
    best = models.labelled[len(models.labelled)]
    gold = load_reward(args, args.reward_fn)
    proxy = load_reward(args, None, args.reward_model, chat_template=tokenizer.chat_template)
    examples, completions, eval_prompts = load_data(args, models)
    eval_examples = [example for example, _ in eval_prompts]
    held_out = HeldOut(eval_prompts, gold or proxy)
    asked, steps = plan_rounds(args, len(examples))
    total = len(asked) * steps
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    done, memory = run.start(policy, optimizer)

    def evaluate(policy, asking, step):
        ids = [prompt_ids(asking, example) for example in eval_examples]
        metrics, samples = evaluate_policy(policy, reference, tokenizer, held_out, args, step, ids)
        if proxy:
            texts = [sample["completion"] for sample in samples]
            metrics["proxy_reward"] = proxy(eval_examples, texts).mean().item()
        run.log(step, "eval", **metrics)
        run.write("samples", *samples)
        return metrics, samples

    if done == 0:
        memory["before"], memory["reference_samples"] = evaluate(policy, tokenizer, 0)
        memory["pool"] = []
    held_out.reference_samples, pool = memory["reference_samples"], memory["pool"]
    bar = progress_bar("reward_conditioning", done, total)
    for step in bar:
        number, turn = divmod(step, steps)
        if quark and turn == 0:
            asking = best if number else tokenizer  # at first a label means nothing
            metrics = explore(policy, asking, examples, asked[number], pool,
                              reward=proxy or gold, args=args)
            run.log(step, "train", **metrics)
        if quark and (turn == 0 or step == done):
            completions = labelled_pool(pool, examples, models.labelled)
        order = batches(len(completions), args.batch_size, 1, steps, args.seed + number)[turn]
        batch = [completions[i] for i in order]
        set_learning_rate(optimizer, step, total, args.learning_rate)
        metrics = update(models, optimizer, batch, args, partial(run.check_finite, step))
        run.log(step + 1, "train", **metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        is_due = (step + 1) % (steps if quark else args.eval_every) == 0
        if is_due and step + 1 < total:
            evaluate(policy, best, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            run.save_checkpoint(step + 1, policy, optimizer, memory)

    save_model(policy, best, run.dir, args.save_dtype, args.model)
    saved = shard(load_model(str(run.dir), args.device, args.dtype), args)
    evaluation, samples = evaluate(saved, load_tokenizer(str(run.dir)), total)
    if proxy:
        evaluation["proxy_reward_ref"] = memory["before"]["proxy_reward"]
    report(run, evaluation, samples, held_out.reference_samples)


if __name__ == "__main__":
    run_script(main, Args)
