r"""Reward conditioning: learn from good and bad completions alike, and ask for good ones.

A label k says how good a completion is, and stands as text in front of its prompt. The policy
learns the likelihood of every completion given its label, and is sampled given the best label:
as CTRL (Keskar et al. 2019) and the decision transformer (Chen et al. 2021). Two kinds:

    --method binary    comparisons: label 2 for the chosen completion, 1 for the rejected one,
                       as in AlpacaFarm (Dubois et al. 2023)
    --method quark     Quark (Lu et al. 2022), in rounds. Explore: sample the policy given the
                       best label (at first the reference), score, add to the pool. Quantise:
                       cut the sorted pool into K equal parts, labels 1 ... K. Learn from all

    L(theta) = E_{k, (x, y) of label k} [ sum_t  - log pi_theta(y_t | k, x, y_<t)
               + beta KL( pi_ref(. | x, y_<t) || pi_theta(. | k, x, y_<t) ) ]             (1)

which is Quark's objective, as a mean over tokens; the KL is exact, over the vocabulary. What is
reported as `kl` is sampled, and in the other direction: KL( pi(. | K, x) || pi_ref(. | x) ).

    python reward_conditioning.py                      # Quark, rewards by tiny-rm
    python reward_conditioning.py --beta 1             # closer to the reference
    python reward_conditioning.py --method binary      # 4,000 noisy comparisons
    python reward_conditioning.py --method binary --model Qwen/Qwen2.5-0.5B-Instruct \
        --dataset trl-lib/ultrafeedback_binarized --prefix "Quality {label} of 2. " \
        --learning-rate 1e-5

Deviations: Quark's labels are new tokens, which then must never be sampled; here they are text,
and the vocabulary stays as it is. Quark explores with all prompts, here with --prompts-per-round
of them; it can add an entropy bonus.

The saved model asks for the best label by itself, in any software: its tokenizer puts the label
in front of every text, its chat template in front of what the user says first.

Expect of the first command a policy that wins 88% against the reference, at 4.1 nats; binary's
labels are noisier, and it wins 58% to 61% in three seeds, at 1.3 to 1.6 nats. The embedded model
hardly reads its prompt, and has to find out that there is a label. Hence the default of --prefix,
the label twelve times: written once, it was not found in 400 updates.

Data: quark prompts (further columns reach the reward function by name), binary `prompt` +
`chosen` + `rejected`. Texts or lists of messages.
"""

import copy
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from common import (
    Row, UserError, adapters_off, clip_gradients, encode, encode_prompt, encode_row, generate,
    load_policy, load_reference, load_tokenizer, logits_at, make_row, mean_over_batch,
    micro_batches, pad_rows, save_and_reload, send, set_learning_rate, stop_ids, token_budget
)
from harness import (
    ASSETS, GOLD, Count, HeldOut, Limits, NonNegative, Positive, Run, TrainArgs, batches,
    column, comparison, different_prompts, evaluate_policy, load_examples, load_reward,
    progress_bar, report, run_script, tools_of
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    method: Literal["quark", "binary"] = "quark"
    """quark: quantiles of the reward of own completions; binary: chosen and rejected"""
    dataset: str | None = None
    """prompts (binary: comparisons): Hub id, id:config, or file or directory"""
    prompt_column: str = "prompt"
    """column with the prompts"""
    reward_model: str | None = None
    """sequence-classification model with one label: quark's reward"""
    reward_fn: str | None = None
    """FILE.py:function: quark's reward; the judge beside --reward-model or for binary"""
    prefix: str = 12 * "{label}" + " "
    """text before prompts, {label} the number; real models: "Quality {label} of 5. " """
    beta: NonNegative | None = None
    """KL coefficient: the larger, the closer to the reference; default: 0.2, binary 0"""
    quantiles: Annotated[int, (lambda x: x >= 2, "at least 2")] = 5
    """quark: number of labels"""
    rounds: Count = 6
    """quark: number of explorations"""
    prompts_per_round: Count = 500
    """quark: prompts per exploration"""
    samples_per_prompt: Count = 2
    """quark: completions per prompt"""
    learning_rate: Positive | None = None
    """peak, after 10% warm-up, before linear decay to 0; default: 3e-3, binary 4e-3"""
    batch_size: Count = 32
    """completions per update"""
    epochs: Positive | None = None
    """passes over as many completions as there are new; default: 1, binary 1.5"""
    max_steps: Count | None = None
    """number of updates (quark: per round), whatever --epochs says"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    eval_every: Count = 50
    """binary: updates between held-out evaluations; quark's are after each round"""
    output_dir: str = "runs/reward_conditioning"


# --- labels ---


def quantile_labels(rewards: torch.Tensor, quantiles: int) -> torch.Tensor:
    """Rewards [N] -> labels 1 ... K [N], K the best: the sorted pool, cut into equal parts. Of
    equal rewards at a cut, the earlier get the lower label."""
    labels = torch.empty(len(rewards), dtype=torch.long)
    order = rewards.sort(stable=True).indices
    labels[order] = 1 + torch.arange(len(rewards)) * quantiles // len(rewards)
    return labels


# In front of a chat template: the label's text begins what the user says first.
CHAT_LABEL = """{%%- set i = 1 if messages[0]['role'] == 'system' else 0 -%%}
{%%- set asked = dict(messages[i], content=%s + messages[i]['content']) -%%}
{%%- set messages = messages[:i] + [asked] + messages[i + 1:] %%}"""


def with_label(tokenizer, text: str):
    """A copy of the tokenizer that puts a label's text in front of every prompt, in any
    software. The label and a text are encoded apart: no token spans both."""
    labelled = copy.deepcopy(tokenizer)
    labelled.__class__ = PreTrainedTokenizerFast  # some classes write their own post-processor
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    start, end = special.index(0), len(ids) - special[::-1].index(0)
    pieces, before, after = [], ids[:start] + encode(tokenizer, text), ids[end:]
    for name, added in (("before", before), ("after", after)):
        tokens = tokenizer.convert_ids_to_tokens(added)
        pieces.append({"id": name, "ids": added, "tokens": tokens})
    processor = TemplateProcessing(single="before $A after", special_tokens=pieces)
    labelled.backend_tokenizer.post_processor = processor
    if tokenizer.chat_template:
        label = json.dumps(text, ensure_ascii=False)
        labelled.chat_template = CHAT_LABEL % label + tokenizer.get_chat_template()
    return labelled


def label_tokenizers(args: Args) -> dict:
    """label -> the tokenizer that asks for it, from 1 to the best; 0: without a label."""
    tokenizers = {0: load_tokenizer(args.model, args.chat_template)}
    if not tokenizers[0].is_fast:
        raise UserError(f"model {args.model}: it has no tokenizer.json to put the label into")
    for label in range(1, 1 + (args.quantiles if args.method == "quark" else 2)):
        text = args.prefix.replace("{label}", str(label))
        tokenizers[label] = with_label(tokenizers[0], text)
    return tokenizers


# --- data ---


def load_data(args: Args, policy, tokenizers):
    """-> training examples, binary's labelled completions [(example, row)], held-out examples.
    Prompts must leave room for a completion behind the longest label."""
    stops = stop_ids(policy, tokenizers[0])
    longest = max(tokenizers.values(), key=lambda asking: len(encode_prompt(asking, "")))

    def encode_example(example):
        if args.method == "quark":
            example["prompt"] = column(example, args.prompt_column)
            return [make_row(prompt_ids(longest, example), [])]
        prompt, chosen, rejected = comparison(example)
        example["prompt"], tools = prompt, tools_of(example)
        return [make_row(prompt_ids(longest, example), []),
                encode_row(tokenizers[2], prompt, chosen, stops, tools),
                encode_row(tokenizers[1], prompt, rejected, stops, tools)]

    limits = Limits.of(args, policy)
    train, held_out = load_examples(args, encode_example, limits, args.max_new_tokens)
    completions = [(example, row) for example, (_, *rows) in train for row in rows]
    held_out = [example for example, _ in different_prompts(held_out, args, policy)]
    return [example for example, _ in train], completions, held_out


def prompt_ids(tokenizer, example) -> list[int]:
    return encode_prompt(tokenizer, example["prompt"], tools_of(example))


def without_label(tokenizer, example, row: Row) -> Row:
    """The row's completion behind the prompt as this tokenizer encodes it."""
    ids, start = prompt_ids(tokenizer, example), row.mask.index(1)
    return Row(ids + row.ids[start:], [0] * len(ids) + row.mask[start:])


# --- loss ---


def conditioning_loss(logps, ref_logps, targets, beta: float):
    """Equation (1), summed over tokens -> (loss, KL(pi_ref || pi_theta)), nats.

    logps, ref_logps [N, V]: of all tokens, with and without the label (None: no KL); targets [N]:
    the tokens that came.
    """
    nll = F.nll_loss(logps, targets, reduction="sum")
    if ref_logps is None:
        return nll, torch.zeros_like(nll)
    kl = F.kl_div(logps, ref_logps, reduction="sum", log_target=True)
    return nll + beta * kl, kl.detach()


def vocabulary_logprobs(model, rows: list[Row], temperature: float):
    """-> log-probabilities of the whole vocabulary where a completion's token is predicted
    [N, V], and these tokens [N]: row by row, whatever the prompts are."""
    input_ids, mask = pad_rows(rows)
    predicts = F.pad(mask[:, 1:], (0, 1)).bool()  # a completion's token comes next
    logits = logits_at(model, input_ids, predicts)  # [N, V]
    (targets,) = send(logits.device, input_ids[mask.bool()])
    return F.log_softmax(logits.float() / temperature, -1), targets


def add_gradients(policy, reference, tokenizer, batch, args: Args) -> dict[str, float]:
    """Add the gradient of equation (1) for [(example, row)] -> its loss and KL per token."""
    lengths = [len(row.ids) for _, row in batch]
    tokens = sum(sum(row.mask) for _, row in batch)
    totals = defaultdict(float)
    for group in micro_batches(lengths, args.micro_batch_size, token_budget(policy)):
        rows, ref_logps = [batch[i][1] for i in group], None
        logps, targets = vocabulary_logprobs(policy, rows, args.temperature)
        if args.beta:
            rows = [without_label(tokenizer, *batch[i]) for i in group]
            with torch.no_grad(), adapters_off(reference):
                ref_logps, _ = vocabulary_logprobs(reference, rows, args.temperature)
        loss, kl = conditioning_loss(logps, ref_logps, targets, args.beta)
        (loss / tokens).backward()
        totals["loss"] += loss
        if args.beta:
            totals["kl_per_token"] += kl
    return mean_over_batch(totals, tokens)


# --- rounds of Quark ---


def explore(policy, tokenizer, examples, indices, pool, *, reward, args: Args) -> dict:
    """Add completions of these examples, asked for by this tokenizer, to the pool -> what is
    logged of them."""
    n = args.samples_per_prompt
    prompts = [prompt_ids(tokenizer, examples[i]) for i in indices]
    rollout = generate(policy, tokenizer, prompts, n, args.max_new_tokens, args.temperature)
    indices = [i for i in indices for _ in range(n)]
    completion_ids = rollout.completion_ids
    rewards = reward([examples[i] for i in indices], rollout.completions, completion_ids)
    for i, ids, value in zip(indices, completion_ids, rewards.tolist()):
        pool.append({"example": i, "completion": ids, "reward": value})
    ended = rollout.ended.float().mean().item()
    return {"pool": len(pool), "round_reward": rewards.mean().item(), "round_ended": ended}


def labelled_pool(pool: list[dict], examples, tokenizers) -> list:
    """Each completion behind the label of its quantile -> [(example, row)]."""
    rewards, labelled = torch.tensor([entry["reward"] for entry in pool]), []
    for entry, label in zip(pool, quantile_labels(rewards, max(tokenizers)).tolist()):
        example = examples[entry["example"]]
        ids = prompt_ids(tokenizers[label], example)
        labelled.append((example, make_row(ids, entry["completion"])))
    return labelled


def plan_rounds(args: Args, num_examples: int) -> tuple[list[list[int]], int]:
    """-> indices of each round's examples, and updates per round. Binary is one round."""
    rounds, size, n = 1, num_examples, 2
    if args.method == "quark":
        rounds, n = args.rounds, args.samples_per_prompt
        size = min(args.prompts_per_round, num_examples)
    updates = len(batches(n * size, args.batch_size, args.epochs, args.max_steps, args.seed))
    print(f"{num_examples} examples; {rounds} rounds of {updates} updates", flush=True)
    return batches(num_examples, size, 1, rounds, args.seed), updates


# --- main ---


def fill_defaults(args: Args) -> None:
    """Those that depend on --method, and the embedded data's rewards."""
    quark = args.method == "quark"
    defaults = {"beta": 0.2, "epochs": 1.0, "learning_rate": 3e-3}
    if not quark:
        defaults = {"beta": 0.0, "epochs": 1.5, "learning_rate": 4e-3}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.dataset is None:
        name = "review_prompts" if quark else "comparisons"
        args.dataset = str(ASSETS / "data" / f"{name}.jsonl")
        args.eval_dataset = args.eval_dataset or args.dataset.replace(".jsonl", "_heldout.jsonl")
        if not args.reward_fn:
            args.reward_fn = GOLD
            args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
    if "{label}" not in args.prefix:
        raise UserError(f"--prefix {args.prefix!r}: put {{label}} where the label stands")
    if quark and not (args.reward_model or args.reward_fn):
        raise UserError("no reward: give --reward-model or --reward-fn FILE.py:function")


def evaluate(policy, tokenizer, held_out: HeldOut, run: Run, step: int, *, proxy):
    """Of the policy as this tokenizer asks it."""
    examples = [example for example, _ in held_out.prompts]
    prompts = [prompt_ids(tokenizer, example) for example in examples]
    metrics, samples = evaluate_policy(policy, held_out, run.args, step, prompts)
    if proxy:
        rewards = proxy(examples, [sample["completion"] for sample in samples])
        metrics["proxy_reward"] = rewards.mean().item()
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


def main(args: Args) -> None:
    fill_defaults(args)
    run, quark = Run(args), args.method == "quark"
    torch.manual_seed(args.seed)
    tokenizers = label_tokenizers(args)
    plain, best = tokenizers[0], tokenizers[max(tokenizers)]
    policy = load_policy(args)
    reference = load_reference(policy, args)
    gold = load_reward(args, args.reward_fn)
    proxy = load_reward(args, None, args.reward_model, plain.chat_template)
    examples, completions, eval_examples = load_data(args, policy, tokenizers)
    eval_prompts = [(example, prompt_ids(plain, example)) for example in eval_examples]
    held_out = HeldOut(eval_prompts, gold or proxy, reference, plain)
    asked, steps = plan_rounds(args, len(examples))
    total = len(asked) * steps

    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0, fused=True)
    done, memory = run.start(policy, optimizer)
    if done == 0:
        before, samples = evaluate(policy, plain, held_out, run, 0, proxy=proxy)
        memory |= {"before": before, "samples": samples, "pool": []}
    held_out.reference_samples, pool = memory["samples"], memory["pool"]
    bar = progress_bar("reward_conditioning", done, total)
    for step in bar:
        number, turn = divmod(step, steps)
        if quark and turn == 0:
            asking = best if number else plain  # at first a label means nothing
            indices = asked[number]
            reward = proxy or gold
            metrics = explore(policy, asking, examples, indices, pool, reward=reward, args=args)
            run.log(step, "train", **metrics)
        if quark and (turn == 0 or step == done):
            completions = labelled_pool(pool, examples, tokenizers)
        began = time.perf_counter()
        plan = batches(len(completions), args.batch_size, 1, steps, args.seed + number)
        batch = [completions[i] for i in plan[turn]]
        metrics = add_gradients(policy, reference, plain, batch, args)
        metrics["grad_norm"] = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(step, metrics, [example for example, _ in batch])
        metrics["learning_rate"] = set_learning_rate(optimizer, step, total, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(row.ids) for _, row in batch)
        metrics["tokens_per_s"] = tokens / (time.perf_counter() - began)
        run.log(step + 1, "train", **metrics)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        is_due = (step + 1) % (steps if quark else args.eval_every) == 0
        if is_due and step + 1 < total:
            evaluate(policy, best, held_out, run, step + 1, proxy=proxy)
        if (step + 1) % args.save_every == 0 or step + 1 == total:
            run.save_checkpoint(step + 1, policy, optimizer, memory)

    saved = save_and_reload(policy, best, run.dir, args)
    best = load_tokenizer(str(run.dir))
    evaluation, samples = evaluate(saved, best, held_out, run, total, proxy=proxy)
    if proxy:
        evaluation["proxy_reward_ref"] = memory["before"]["proxy_reward"]
    report(run, evaluation, samples, held_out)


if __name__ == "__main__":
    run_script(main, Args)
