"""A reward model: stage 2 of RLHF, human judgements -> a number for each answer.

Bradley-Terry (1952): p(a > b | x) = sigma(r(x, a) - r(x, b)). The likelihood of the judgements gives the loss,
InstructGPT (Ouyang et al. 2022), equation (1), for K ranked answers of a prompt, best first (K = 2: a comparison):

    L(theta) = -1 / (K choose 2) sum_{i < j} log sigma( r_theta(x, y_i) - r_theta(x, y_j) )                    (pairs)

averaged over prompts; all pairs of a prompt share one forward pass for each answer, because as separate data they
overfit within an epoch (its section 3.5). Or the likelihood of the ranking as a whole, Luce (1959), Plackett (1975):

    L(theta) = -sum_k log( exp r_theta(x, y_k) / sum_{l >= k} exp r_theta(x, y_l) )                    (plackett-luce)

A `margin` column m asks for r_chosen - r_rejected > m: Llama 2 (Touvron et al. 2023), equation (2).

    python reward_model.py                                        # 4,000 noisy comparisons -> assets/tiny-rm
    python reward_model.py --dataset assets/data/rankings.jsonl   # 1,000 rankings of four
    python reward_model.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset trl-lib/ultrafeedback_binarized \\
        --learning-rate 1e-5

The head starts as N(0, 1 / (d + 1)) (Stiennon et al. 2020) and reads the last token of prompt + completion + EOS, found
by its index. The likelihood does not know the rewards' zero; InstructGPT sets it with a bias, so that reference answers
score 0 on average. The stock heads of transformers have no bias, so the shift is written into the head's weights: see
centre(). Deviations from InstructGPT: linear decay, and several epochs, which want weight decay and dropout (a reward
model is no policy: nothing depends on what it says in training); the reference answers are those of the training
judgements (tiny-sft's samples, in the embedded world), not the labelers' demonstrations.

The saved model loads with AutoModelForSequenceClassification and gives the same scores, also in batches padded on the
right: the stock head reads the last token that is not pad, so pad must not be EOS. Where a tokenizer has no pad, or pad
is EOS, a token <pad> is added. Whoever scores a text must append EOS, which users of TRL often forget.

Data: `prompt` + `chosen` + `rejected` (or an implicit prompt), optional `margin`; or `prompt` + `responses`, best
first.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from common import (ASSETS, Run, UserError, batches, clip_gradients, column, comparison, encode_all, encode_row,
                    head_scores, hold_out, in_parts, learning_rate_at, load_model, load_rows, load_tokenizer,
                    max_row_length, micro_batches, own_part, pad_rows, print_table, progress_bar, reward_from_function,
                    run_script, save_model, shard, states_at_end, summed)

from transformers import AutoModelForSequenceClassification  # after common, which keeps transformers quiet


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from; it gets a new head"""
    dataset: str = str(ASSETS / "data" / "comparisons.jsonl")
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory"""
    split: str = "train"
    """split of --dataset"""
    eval_dataset: str | None = None
    """held-out judgements; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    reward_fn: str | None = None
    """FILE.py:function, the true reward, if there is one: for the Bayes ceiling and the rank correlation; default on
    the embedded data: assets/rewards.py:sentiment"""
    output_dir: str = "runs/reward_model"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    ranking_loss: Literal["pairs", "plackett-luce"] = "pairs"
    """of rankings: all pairs, or the likelihood of the whole ranking"""
    learning_rate: float = 5e-4
    """peak, after 10% warm-up; then linear decay to 0"""
    weight_decay: float = 0.1
    """of AdamW"""
    dropout: float = 0.1
    """of the token embeddings, in training only"""
    batch_size: int = 32
    """comparisons or rankings an update"""
    micro_batch_size: int | None = None
    """comparisons or rankings a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 3.0
    """passes over the data"""
    max_steps: int | None = None
    """number of updates, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    eval_every: int = 100
    """updates between held-out evaluations"""
    save_every: int = 100
    """updates between checkpoints"""
    resume: bool = False
    """go on from the checkpoint in --output-dir"""
    seed: int = 0
    """of data order and the head's first weights"""
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


def judgement(row: dict) -> tuple[object, list, float]:
    """-> (prompt, answers, best first, margin)."""
    if row.get("responses") is None:
        prompt, chosen, rejected = comparison(row)
        margin = row.get("margin", 0.0)
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
            raise UserError(f"'margin' is {margin!r}: give a number in each row, or leave the column out")
        return prompt, [chosen, rejected], float(margin)
    responses = column(row, "responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError("'responses' must be a list of at least two answers, best first: mend or delete the row")
    return column(row, "prompt"), [column({"responses": r}, "responses") for r in responses], 0.0


# ---------------------------------------------------------------------------------------------------------------- model


def add_head(model, tokenizer) -> None:
    """A new head with one label, and a pad token by which the stock head finds EOS in rows padded on the right."""
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


def scores(model, rows) -> torch.Tensor:
    """[(ids, mask)] -> r_theta(x, y) [B], in one forward pass."""
    return head_scores(model, states_at_end(model, *pad_rows(rows, model.device)))


@torch.no_grad()
def all_hidden(model, rows, micro_batch_size) -> torch.Tensor:
    """The states from which any number of rows are scored, without gradient -> [n, D] fp32."""
    hidden = torch.zeros(len(rows), model.score.in_features, device=model.device)
    for group in micro_batches([len(ids) for ids, _ in rows], micro_batch_size):
        hidden[group] = states_at_end(model, *pad_rows([rows[i] for i in group], model.device)).float()
    return summed(hidden)


@torch.no_grad()
def centre(model, rows, micro_batch_size) -> None:
    """Shift the scores so that `rows` score 0 on average.

    A bias b in score = w h + b would do, but the stock head has none. The states h at EOS have much in common, so there
    is a direction u with u h = 1 for nearly every row: the one of least variance, u ~ (cov h)^-1 mean h. The shift goes
    along it, w <- w - (w mean h) u. (After a LayerNorm u h = 1 holds exactly, u ~ 1 / gain: the centred state sums to
    0; after an RMSNorm nearly.)
    """
    hidden = all_hidden(model, rows, micro_batch_size).double()
    mean, covariance = hidden.mean(0), hidden.T.cov(correction=0)
    ridge = 1e-4 * covariance.trace() / len(mean)  # rows may be fewer than dimensions
    direction = torch.linalg.solve(covariance + ridge * torch.eye(len(mean), device=mean.device), mean)
    direction /= direction @ mean
    parameter = in_parts(model).score.weight
    weight = (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).double().squeeze(0)
    parameter.copy_(own_part((weight - (weight @ mean) * direction).float()[None], parameter))


# ----------------------------------------------------------------------------------------------------------------- loss


def pairwise_loss(chosen_rewards, rejected_rewards, margin=None):
    """-log sigma(r_w - r_l - m), the mean over a batch of comparisons: all [B] -> scalar, nats a comparison."""
    differences = chosen_rewards - rejected_rewards
    return -F.logsigmoid(differences if margin is None else differences - margin).mean()


def ranking_loss(rewards, sizes):
    """Equation (pairs): rewards [sum of sizes], prompt after prompt, each best first; sizes: how many answers each
    prompt has -> scalar, nats a pair, first averaged over the pairs of each prompt."""
    sizes = torch.as_tensor(sizes, device=rewards.device)
    i, j = same_prompt(sizes).triu(1).nonzero(as_tuple=True)  # i is ranked above j
    pairs = (sizes * (sizes - 1) / 2).repeat_interleave(sizes)[i]
    return (-F.logsigmoid(rewards[i] - rewards[j]) / pairs).sum() / len(sizes)


def plackett_luce_loss(rewards, sizes):
    """Equation (plackett-luce), of the same -> scalar, nats a ranking, the mean over prompts."""
    sizes = torch.as_tensor(sizes, device=rewards.device)
    left = same_prompt(sizes).triu()  # [i, j]: j is not yet placed when i is
    log_sums = rewards.expand(len(rewards), -1).masked_fill(~left, -torch.inf).logsumexp(1)
    return (log_sums - rewards).sum() / len(sizes)


def same_prompt(sizes) -> torch.Tensor:
    prompt = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return prompt[:, None] == prompt


# ----------------------------------------------------------------------------------------------------------- evaluation


def differences_of(rewards: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """r_i - r_j for all pairs where i is ranked above j -> [number of pairs]."""
    return torch.cat([(r[:, None] - r)[tuple(torch.triu_indices(len(r), len(r), 1))] for r in rewards.split(sizes)])


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Of a share, with 95% coverage. (The pairs of one ranking are not independent: there it is too narrow.)"""
    p = successes / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def calibration(differences: torch.Tensor, bins: int = 10) -> tuple[float, list[list]]:
    """Expected calibration error, and its table: how sure the model was of the answer that it prefers, on average and
    in bins between 50% and 100%, and how often the judge preferred that answer too."""
    predicted, agrees = torch.sigmoid(differences.abs()), share_right(differences)
    number = ((predicted - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table, error = [["predicted", "mean", "observed", "pairs"]], 0.0
    for b in range(bins):
        here = number == b
        if here.any():
            mean, observed = predicted[here].mean().item(), agrees[here].mean().item()
            error += here.float().mean().item() * abs(mean - observed)
            table.append([f"{0.5 + b / 2 / bins:.0%}-{0.5 + (b + 1) / 2 / bins:.0%}", mean, observed, int(here.sum())])
    return error, table


def share_right(differences: torch.Tensor) -> torch.Tensor:
    return (differences > 0).double() + 0.5 * (differences == 0)


def by_margin(differences: torch.Tensor, margins: torch.Tensor) -> list[list]:
    """Accuracy where the answers are about equally good, and where one is much better."""
    edges, table = [0.0, 0.5, 1.0, 2.0, 4.0, math.inf], [["margin", "accuracy", "low", "high", "pairs"]]
    for low, high in zip(edges, edges[1:]):
        right = share_right(differences[(margins.abs() >= low) & (margins.abs() < high)])
        if len(right):
            interval = wilson_interval(right.sum().item(), len(right))
            table.append([f"{low:g} to {high:g}", right.mean().item(), *interval, len(right)])
    return table


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs."""
    def ranks(values):
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        return (counts.cumsum(0) - (counts - 1) / 2)[group].double()
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def evaluation_metrics(rewards: torch.Tensor, gold: torch.Tensor | None, sizes: list[int]) -> dict:
    """Against held-out judgements: rewards [n] of all answers, gold [n] the true ones."""
    differences = differences_of(rewards, sizes)
    right = share_right(differences)
    metrics = {"accuracy": right.mean().item(), "log_loss": -F.logsigmoid(differences).mean().item(),
               "ece": calibration(differences)[0]}
    metrics["accuracy_low"], metrics["accuracy_high"] = wilson_interval(right.sum().item(), len(right))
    if gold is not None:  # what the judge's own probabilities, sigma(gold difference), would score
        truth = differences_of(gold, sizes)
        metrics["bayes_accuracy"] = share_right(truth).mean().item()  # of these noisy judgements
        metrics["bayes_accuracy_expected"] = torch.sigmoid(truth.abs()).mean().item()  # over the judge's noise
        metrics["accuracy_expected"] = torch.sigmoid(truth * differences.sign()).mean().item()
        metrics["bayes_log_loss"] = -F.logsigmoid(truth).mean().item()
        metrics["rank_correlation"] = rank_correlation(rewards, gold)
    return metrics


# ----------------------------------------------------------------------------------------------------------------- main


def main(args: Args) -> None:
    if not 0 <= args.dropout < 1 or not 0 <= args.weight_decay < math.inf:
        raise UserError(f"--dropout {args.dropout}, --weight-decay {args.weight_decay}: dropout from 0 to below 1, and "
                        "a decay of at least 0")
    if args.dataset in (Args.dataset, str(ASSETS / "data" / "rankings.jsonl")):
        args.eval_dataset = args.eval_dataset or args.dataset.replace(".jsonl", "_heldout.jsonl")
        args.reward_fn = args.reward_fn or str(ASSETS / "rewards.py") + ":sentiment"
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = load_model(args.model, args.device, args.dtype, args.gradient_checkpointing,
                       kind=AutoModelForSequenceClassification)
    add_head(model, tokenizer)
    stops, max_length = [tokenizer.eos_token_id], max_row_length(model, args.max_length)
    true_reward = reward_from_function(args.reward_fn) if args.reward_fn else None

    rows = load_rows(args.dataset, args.split)
    rows, eval_rows = (rows, load_rows(args.eval_dataset, None)) if args.eval_dataset else hold_out(rows, args.seed)

    def encode(row):
        row["prompt"], row["answers"], row["margin"] = judgement(row)
        return [encode_row(tokenizer, row["prompt"], answer, stops) for answer in row["answers"]]

    rows, answers = zip(*encode_all(rows, args.dataset, encode, max_length))
    eval_rows, eval_answers = zip(*encode_all(eval_rows, args.eval_dataset or args.dataset, encode, max_length))
    margins = torch.tensor([row["margin"] for row in rows])
    if margins.any() and max(map(len, answers)) > 2:
        raise UserError(f"{args.dataset}: 'margin' is for comparisons, and there are rankings: leave one of them out")
    eval_flat = [answer for group in eval_answers for answer in group]
    eval_sizes = [len(group) for group in eval_answers]
    texts = [(row, text_of(answer)) for row in eval_rows for answer in row["answers"]]
    gold = true_reward([row["prompt"] for row, _ in texts], [text for _, text in texts],
                       [row for row, _ in texts]) if true_reward else None
    plan = batches(len(rows), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(rows)} judgements, {len(eval_rows)} held out; {len(plan)} updates of {args.batch_size}", flush=True)

    shard(model, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: F.dropout(output, args.dropout, training=torch.is_grad_enabled())
    )
    done, _ = run.start(model, optimizer)

    def evaluate(step):
        hidden = all_hidden(model, eval_flat, args.micro_batch_size)
        rewards = head_scores(model, hidden).detach().cpu()
        evaluation = evaluation_metrics(rewards, gold, eval_sizes)
        run.log(step, **({"loss": evaluation["log_loss"]} if step == 0 else {}), **evaluation)
        samples = [{"step": step, "prompt": row["prompt"], "completion": text, "reward": reward}
                   | ({"gold": gold[i].item()} if true_reward else {})
                   for i, ((row, text), reward) in enumerate(zip(texts[:100], rewards.tolist()))]
        run.write("samples", *samples)
        return evaluation, samples, rewards

    if done == 0:
        evaluate(0)
    shown = {}
    bar = progress_bar("reward_model", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch = [answers[i] for i in plan[step]]
        sizes = [len(a) for a in batch]
        loss, results = 0.0, [torch.zeros(size, device=model.device) for size in sizes]
        for group in micro_batches([len(a) * max(len(ids) for ids, _ in a) for a in batch], args.micro_batch_size):
            group_sizes = [sizes[i] for i in group]
            rewards = scores(model, [answer for i in group for answer in batch[i]])  # [sum of the group's sizes]
            if max(group_sizes) == 2:
                margin = margins[[plan[step][i] for i in group]].to(model.device)
                micro_loss = pairwise_loss(*rewards.view(-1, 2).T, margin)
            elif args.ranking_loss == "pairs":
                micro_loss = ranking_loss(rewards, group_sizes)
            else:
                micro_loss = plackett_luce_loss(rewards, group_sizes)
            micro_loss = micro_loss * (len(group) / len(batch))
            micro_loss.backward()
            loss += micro_loss.detach()
            for i, part in zip(group, rewards.detach().split(group_sizes)):
                results[i] = part
        grad_norm = clip_gradients(model, args.max_grad_norm)
        loss, rewards = summed(loss).item(), summed(torch.cat(results))
        differences = differences_of(rewards, sizes)
        run.check_finite(step, loss, grad_norm, plan[step])
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, len(plan), args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        metrics = {"loss": loss, "accuracy": share_right(differences).mean().item()}
        run.log(step + 1, **metrics, margin=differences.mean().item(), reward_sd=rewards.std().item(),
                grad_norm=grad_norm, learning_rate=optimizer.param_groups[0]["lr"],
                tokens_per_s=sum(len(ids) for a in batch for ids, _ in a) / (time.perf_counter() - began))
        shown |= {name: f"{value:.3f}" for name, value in metrics.items()}
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            shown["held_out"] = f"{evaluate(step + 1)[0]['accuracy']:.3f}"
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, model, optimizer, {})

    reference = [answer for group in answers[:1000] for answer in group]
    centre(model, reference, args.micro_batch_size)
    save_model(model, tokenizer, run.dir)
    evaluation, samples, rewards = evaluate(len(plan))
    with torch.no_grad():
        hidden = all_hidden(model, reference, args.micro_batch_size)
        evaluation["reference_mean"] = head_scores(model, hidden).mean().item()
    run.write_results(**evaluation)
    report(evaluation, samples, rewards, gold, eval_sizes, eval_rows)
    print(f"saved to {run.dir}")


def text_of(answer) -> str:
    return answer if isinstance(answer, str) else answer[-1]["content"]


def report(evaluation, samples, rewards, gold, sizes, eval_rows) -> None:
    differences = differences_of(rewards, sizes)
    if gold is not None:
        what, margins = "the true rewards' difference", differences_of(gold, sizes)
    elif any(row["margin"] for row in eval_rows):
        what, margins = "annotated margin", torch.tensor([row["margin"] for row in eval_rows])
    else:
        what, margins = "difference of scores", differences
    for sample in samples[:6]:
        gold_text = f" (gold {sample['gold']:+.2f})" if gold is not None else ""
        print(f"\n{str(sample['prompt'])[-200:]}\n  {sample['reward']:+.2f}{gold_text} |{sample['completion'][:300]}")
    print("\nheld-out pairs, by how sure the model was:")
    print_table(calibration(differences)[1])
    print(f"\nby {what}:")
    print_table(by_margin(differences, margins))
    print(f"\n{len(differences)} held-out pairs; bayes: what the true probabilities would score:")
    print_table([["", *(list(evaluation))], ["trained", *evaluation.values()]])


if __name__ == "__main__":
    run_script(main, Args)
