r"""A reward model: stage 2 of RLHF, human judgements -> a number for each completion.

Bradley-Terry (1952): p(a > b | x) = sigma(r(x, a) - r(x, b)). The likelihood of the judgements is
the loss, InstructGPT (Ouyang et al. 2022), equation (1), for K ranked completions of a prompt, best
first (K = 2: a comparison):

    L(theta) = -1 / (K choose 2) sum_{i < j} log sigma( r_theta(x, y_i) - r_theta(x, y_j) )  (pairs)

averaged over prompts: as separate data, the pairs of a prompt overfit within an epoch (its section
3.5). Or the likelihood of the ranking as a whole, Luce (1959), Plackett (1975):

    L(theta) = -sum_k log( exp r_theta(x, y_k) / sum_{l >= k} exp r_theta(x, y_l) ) (plackett-luce)

A `margin` column m asks for r_chosen - r_rejected > m: Llama 2 (Touvron et al. 2023), (2).

    python reward_model.py                   # 4,000 noisy comparisons -> assets/tiny-rm: 75.6%
    python reward_model.py --dataset assets/data/rankings.jsonl     # 1,000 rankings of four
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct \
        --dataset trl-lib/ultrafeedback_binarized --learning-rate 1e-5

The head starts as N(0, 1 / (d + 1)) (Stiennon et al. 2020) and reads the last token of prompt +
completion + EOS, found by its index. The likelihood does not know the rewards' zero: centre() sets
it so that the training judgements' completions score 0 on average, as InstructGPT does with a bias
and reference completions. Deviations from InstructGPT: linear decay, and several epochs, which
need weight decay and dropout.

The saved model loads with AutoModelForSequenceClassification and gives the same scores. Its head
reads the last token that is not pad, so a token <pad> is added where there is no pad or it is EOS.
Whoever scores a text must append EOS, which users of TRL often forget.

Data: `prompt` + `chosen` + `rejected` (or an implicit prompt), optional `margin`; or `prompt` +
`responses`, best first.
"""

import contextlib
import itertools
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForSequenceClassification

from common import (
    UserError, all_reduce, clip_gradients, encode, encode_row, head_scores, load_model,
    load_tokenizer, mean_over_batch, micro_batches, prepare_for_training, reshard,
    save_and_reload, set_learning_rate, states_at_end
)
from harness import (
    ASSETS, GOLD, Count, Limits, NonNegative, Positive, Run, Skip, TrainArgs, batches, column,
    comparison, conversational, is_embedded, load_examples, load_reward, print_table,
    progress_bar, run_script, score_all, tools_of, wins
)


@dataclass
class Args(TrainArgs):
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from; it gets a new head"""
    dataset: str = str(ASSETS / "data" / "comparisons.jsonl")
    """judgements: Hub id, id:config, or a .jsonl, .json, .csv or .parquet file or directory"""
    reward_fn: str | None = None
    """FILE.py:function, the true reward, for the Bayes ceiling and the rank correlation"""
    ranking_loss: Literal["pairs", "plackett-luce"] = "pairs"
    """loss of rankings: all pairs, or the likelihood of the whole ranking"""
    learning_rate: Positive = 5e-4
    """peak, after 10% warm-up, before linear decay to 0; for real models 5e-6 to 2e-5"""
    weight_decay: NonNegative = 0.1
    """AdamW's weight decay"""
    dropout: Annotated[float, (lambda x: 0 <= x < 1, "a share from 0 to below 1")] = 0.1
    """dropout of the token embeddings, in training only"""
    batch_size: Count = 32
    """comparisons or rankings per update"""
    epochs: Positive = 3.0
    """passes over the data"""
    eval_every: Count = 100
    """updates between held-out evaluations"""
    eval_prompts: Count = 1000
    """held-out judgements per evaluation"""
    output_dir: str = "runs/reward_model"


# --- data ---


def load_judgements(args: Args, model, tokenizer):
    """-> training and held-out judgements, [(example, rows)], completions best first."""
    def encode(example):
        if example.get("responses") is None:
            prompt, *completions = comparison(example)
        elif not isinstance(example["responses"], list) or len(example["responses"]) < 2:
            raise UserError("'responses' must be a list of at least two completions, best first")
        else:
            prompt, *completions = conversational(column(example, "prompt"), *example["responses"])
        if len(set(map(str, completions))) == 1:
            raise Skip("all completions are identical")
        example["prompt"], example["margin"] = prompt, margin_of(example)
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        example["completions"] = texts
        eos, tools = [tokenizer.eos_token_id], tools_of(example)
        return [encode_row(tokenizer, prompt, c, eos, tools) for c in completions]

    train, held_out = load_examples(args, encode, Limits.of(args, model))
    margins = [example for example, _ in train if example["margin"] is not None]
    if margins and (len(margins) < len(train) or any(len(rows) > 2 for _, rows in train)):
        raise UserError(f"{margins[0].where}: has a 'margin', and other rows have none or are "
                        "rankings: give one in each row, or in none")
    return train, held_out[:args.eval_prompts]


def margin_of(example) -> float | None:
    margin = example.get("margin")
    if margin in (None, ""):
        return None
    with contextlib.suppress(TypeError, ValueError):
        if math.isfinite(float(margin)):
            return float(margin)
    raise UserError(f"'margin' is {margin!r}: give a number, or leave it out")


# --- model ---


def add_head(model, tokenizer) -> None:
    """A new head with one label, and a pad token by which the stock head finds EOS."""
    width = model.score.in_features
    model.config.num_labels = model.num_labels = 1
    head = torch.nn.Linear(width, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=1 / math.sqrt(width + 1))
    model.score = head.to(model.device)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        if tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def centre(model, rows, micro_batch_size) -> None:
    """Shift the scores so that `rows` score 0 on average.

    A bias would do, but the stock head has none. The states h at EOS have much in common, so there
    is a direction u with u h = 1 for nearly every row: the one of least variance, u ~ (cov h)^-1
    mean h. The shift goes along it, w <- w - (w mean h) u. (After a LayerNorm u h = 1 is exact.)
    """
    states = torch.zeros(len(rows), model.score.in_features, device=model.device)
    for group in micro_batches([len(ids) for ids, _ in rows], micro_batch_size):
        states[group] = states_at_end(model, [rows[i] for i in group]).float()
    states = all_reduce(states).double().cpu()
    mean, covariance = states.mean(0), states.T.cov(correction=0)
    ridge = 1e-4 * covariance.trace() / len(mean)  # rows may be fewer than dimensions
    direction = torch.linalg.solve(covariance + ridge * torch.eye(len(mean)), mean)
    direction /= direction @ mean
    reshard(model)
    parameter = model.score.weight
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    weight = whole.detach().double().cpu().squeeze(0)
    weight = (weight - (weight @ mean) * direction).float()[None].to(parameter.device)
    if isinstance(parameter, DTensor):
        weight = distribute_tensor(weight, parameter.device_mesh, parameter.placements,
                                   src_data_rank=None)
    parameter.copy_(weight)


# --- loss ---


def pairwise_loss(chosen_rewards, rejected_rewards, margin=None):
    """-log sigma(r_w - r_l - m): all [B] -> scalar, nats per comparison."""
    differences = chosen_rewards - rejected_rewards
    return -F.logsigmoid(differences if margin is None else differences - margin).mean()


def pairs_of(sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with so many ranked completions -> i, j [pairs], i ranked above j."""
    pairs, start = [], 0
    for size in sizes:
        pairs += itertools.combinations(range(start, start + size), 2)
        start += size
    return torch.tensor(pairs)[:, 0], torch.tensor(pairs)[:, 1]


def ranking_loss(rewards, sizes):
    """Equation (pairs): rewards [sum of sizes], prompt after prompt, each best first; sizes: how
    many completions each prompt has -> scalar, nats per pair, averaged within each prompt first."""
    (i, j), sizes = pairs_of(sizes), torch.as_tensor(sizes)
    pairs = (sizes * (sizes - 1) / 2).repeat_interleave(sizes)[i].to(rewards.device)
    return (-F.logsigmoid(rewards[i] - rewards[j]) / pairs).sum() / len(sizes)


def plackett_luce_loss(rewards, sizes):
    """Equation (plackett-luce), of the same -> scalar, nats per ranking, the mean over prompts."""
    prompt = torch.arange(len(sizes)).repeat_interleave(torch.as_tensor(sizes))
    left = (prompt[:, None] == prompt).triu()  # [i, j]: j has no place yet when i gets one
    left = left.to(rewards.device)
    log_sums = rewards.expand(len(rewards), -1).masked_fill(~left, -torch.inf).logsumexp(1)
    return (log_sums - rewards).sum() / len(sizes)


def batch_loss(model, batch, args: Args) -> dict[str, float]:
    """Add the gradient of the loss of these judgements -> what is logged of it."""
    totals, rank_pairs = defaultdict(float), sum(math.comb(len(rows), 2) for _, rows in batch)
    lengths = [len(rows) * max(len(row.ids) for row in rows) for _, rows in batch]
    for group in micro_batches(lengths, args.micro_batch_size):
        sizes = [len(batch[i][1]) for i in group]
        margins = torch.tensor([batch[i][0]["margin"] or 0.0 for i in group])
        states = states_at_end(model, [row for i in group for row in batch[i][1]])
        rewards = head_scores(model, states)  # [sum of the sizes]
        if max(sizes) == 2:
            loss = pairwise_loss(rewards[0::2], rewards[1::2], margins.to(rewards.device))
        elif args.ranking_loss == "pairs":
            loss = ranking_loss(rewards, sizes)
        else:
            loss = plackett_luce_loss(rewards, sizes)
        loss = loss * len(group) / len(batch)
        loss.backward()
        i, j = pairs_of(sizes)
        differences = (rewards[i] - rewards[j]).detach()
        totals["loss"] += loss.detach() * rank_pairs
        totals["accuracy"] += wins(differences, 0).sum()
        totals["margin"] += differences.sum()
    return mean_over_batch(totals, rank_pairs)


# --- evaluation ---


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Of a share, with 95% coverage; too narrow for rankings, whose pairs are not independent."""
    p, z = successes / n, 1.96
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def calibration(differences: torch.Tensor, bins: int = 10) -> tuple[float, list[list]]:
    """Expected calibration error, and its table: how sure the model was of its preference, and how
    often the judge had the same."""
    predicted, agrees = torch.sigmoid(differences.abs()), wins(differences, 0)
    bin_of = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, error = [["predicted", "mean", "observed", "pairs"]], 0.0
    for b in range(bins):
        here = bin_of == b
        if here.any():
            mean, observed = predicted[here].mean().item(), agrees[here].mean().item()
            error += here.float().mean().item() * abs(mean - observed)
            edges = f"{0.5 + b / 2 / bins:.0%}-{0.5 + (b + 1) / 2 / bins:.0%}"
            table.append([edges, mean, observed, int(here.sum())])
    return error, table


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs."""
    def ranks(values):
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[group].double()

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def evaluation_metrics(rewards: torch.Tensor, gold: torch.Tensor | None, sizes: list[int]) -> dict:
    """Against held-out judgements: rewards [n] of all completions, gold [n] the true ones."""
    i, j = pairs_of(sizes)
    differences = rewards[i] - rewards[j]
    right = wins(differences, 0)  # 1/2 for a tie
    low, high = wilson_interval(right.sum().item(), len(right))
    metrics = {
        "accuracy": right.mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": -F.logsigmoid(differences).mean().item(),
        "ece": calibration(differences)[0],
    }
    if gold is not None:  # what the judge's own probabilities, sigma(gold difference), would score
        truth = gold[i] - gold[j]
        metrics |= {
            "bayes_accuracy": wins(truth, 0).mean().item(),
            "bayes_log_loss": -F.logsigmoid(truth).mean().item(),
            "rank_correlation": rank_correlation(rewards, gold),
        }
    return metrics


def gold_rewards(args: Args, held_out) -> torch.Tensor | None:
    """The true rewards of all held-out completions, where there is a function for them."""
    if not args.reward_fn:
        return None
    examples = [example for example, _ in held_out for _ in example["completions"]]
    completions = [text for example, _ in held_out for text in example["completions"]]
    return load_reward(args, args.reward_fn)(examples, completions)


def evaluate(model, held_out, gold, run: Run, step: int) -> tuple[dict, torch.Tensor]:
    """-> metrics, and the differences of rewards of all held-out pairs."""
    rows = [row for _, rows in held_out for row in rows]
    sizes = [len(rows) for _, rows in held_out]
    rewards = score_all(model, rows, run.args.micro_batch_size)
    metrics = evaluation_metrics(rewards, gold, sizes)
    run.log(step, "eval", **metrics)
    for (example, _), scores in list(zip(held_out, rewards.split(sizes)))[:50]:
        for completion, score in zip(example["completions"], scores.tolist()):
            run.write("samples", {"step": step, "prompt": example["prompt"],
                                  "completion": completion, "reward": score})
    i, j = pairs_of(sizes)
    return metrics, rewards[i] - rewards[j]


# --- main ---


def main(args: Args) -> None:
    if is_embedded(args):
        args.reward_fn = args.reward_fn or GOLD
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    kind = AutoModelForSequenceClassification
    model = load_model(args.model, args.device, args.dtype, kind, new_head=True)
    add_head(model, tokenizer)
    train, held_out = load_judgements(args, model, tokenizer)
    model = prepare_for_training(model, args)
    gold = gold_rewards(args, held_out)
    plan = batches(len(train), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(train)} judgements, {len(held_out)} held out; {len(plan)} updates", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=True)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: F.dropout(output, args.dropout, torch.is_grad_enabled())
    )
    done, _ = run.start(model, optimizer)
    if done == 0:
        evaluate(model, held_out, gold, run, 0)
    bar = progress_bar("reward_model", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [train[i] for i in plan[step]]
        metrics = batch_loss(model, batch, args)
        metrics["grad_norm"] = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, metrics, [example for example, _ in batch])
        metrics["learning_rate"] = set_learning_rate(optimizer, step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens = sum(len(row.ids) for _, rows in batch for row in rows)
        run.log(step + 1, "train", **metrics, tokens_per_s=tokens / (time.perf_counter() - began))
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", refresh=False)
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluate(model, held_out, gold, run, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, {})

    centre(model, [row for _, rows in train[:args.eval_prompts] for row in rows],
           args.micro_batch_size)
    saved = save_and_reload(model, tokenizer, run.dir, args, kind)
    evaluation, differences = evaluate(saved, held_out, gold, run, len(plan))
    run.write_results(**evaluation)
    print("\nheld-out pairs, by how sure the model was:")
    print_table(calibration(differences)[1])
    print(f"\n{len(differences)} held-out pairs; bayes: what the true probabilities would score:")
    print_table([["measure", "trained"], *evaluation.items()])
    print(f"saved to {run.dir}")


if __name__ == "__main__":
    run_script(main, Args)
