"""Reward conditioning: learn from good and bad answers alike, told which is which, and ask for good ones.

A label k says how good an answer is, and stands as text in front of its prompt. The policy learns the likelihood of
every answer given its label, and is sampled given the best one: as CTRL (Keskar et al. 2019) and the decision
transformer (Chen et al. 2021). Two kinds:

    --method binary    comparisons: label 2 for the chosen answer, 1 for the rejected one. Supervised learning, as in
                       AlpacaFarm's binary reward conditioning (Dubois et al. 2023)
    --method quark     Quark (Lu et al. 2022), in rounds. Explore: sample the policy given the best label (at first the
                       reference), score, add to the pool. Quantise: cut the pool, sorted by reward, into K equal
                       parts, labels 1 ... K. Learn from all parts

    L(theta) = E_{k, (x, y) of label k} [ sum_t  - log pi_theta(y_t | k, x, y_<t)
                                                 + beta KL( pi_ref(. | x, y_<t) || pi_theta(. | k, x, y_<t) ) ]      (1)

which is Quark's objective, as a mean over tokens; the KL is exact, over the vocabulary. What is reported as `kl` is of
the policy as it is used, and in the other direction: KL( pi(. | K, x) || pi_ref(. | x) ), sampled.

    python reward_conditioning.py                               # Quark: rewards by tiny-rm, judged by the truth
    python reward_conditioning.py --beta 1                      # closer to the reference
    python reward_conditioning.py --method binary               # 4,000 noisy comparisons
    python reward_conditioning.py --method binary --model Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset trl-lib/ultrafeedback_binarized --prefix "Quality {label} of 2. " --learning-rate 1e-5 --batch-size 32

Deviations: Quark's labels are new tokens, which then must never be sampled; here they are text, and tokenizer and model
stay as they are. Quark explores with all prompts, here with --prompts-per-round of them; it can add an entropy bonus.

The saved model is used like any other: its tokenizer_config.json holds the best label as `prompt_prefix`, and all
scripts here put that in front of a prompt (common.encode_prompt). With other software, write it there yourself.

Data: binary `prompt` + `chosen` + `rejected`; quark prompts in `--prompt-column`, and every column reaches the reward
function by its name. Texts or lists of messages; a label goes in front of what the user says first.

Expect of the first command a policy that wins 88% against the reference, at 4.1 nats. The first round learns little:
the embedded model hardly reads its prompt (of the reviews that name a genre, 14% name the prompt's; 1 in 8 is chance),
and has to find out that there is a label. Hence the default of --prefix, the label twelve times: written once, it was
not found within 400 updates. Binary's labels are noisier, and it wins 58% to 60% in three seeds, at 1.7 nats.
"""

import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from common import (ASSETS, Run, UserError, autocast, batches, clip_gradients, column, comparison, encode_all,
                    encode_prompt, encode_row, evaluate_policy, generate, hold_out, last_states, learning_rate_at,
                    load_model, load_rows, load_tokenizer, logits_of, make_row, max_row_length, micro_batches,
                    own_prefix, pad_rows, print_table, progress_bar, prompts_that_fit, report, reward_from_function,
                    reward_from_model, run_script, save_model, shard, stop_ids, summed, with_prefix)


@dataclass
class Args:
    model: str = str(ASSETS / "tiny-sft")
    """Hub id or directory of the model to start from, which is also the reference"""
    method: Literal["quark", "binary"] = "quark"
    """quark: quantiles of the reward of own samples, in rounds; binary: chosen and rejected of comparisons"""
    dataset: str | None = None
    """Hub id, id:config, or a local .jsonl/.json/.csv/.parquet file or directory; default: the embedded prompts (quark)
    or comparisons (binary)"""
    split: str = "train"
    """split of --dataset"""
    prompt_column: str = "prompt"
    """column that holds the prompts"""
    eval_dataset: str | None = None
    """held-out prompts; default: the embedded ones, or a tenth of --dataset, at most 500 rows"""
    reward_model: str | None = None
    """a sequence-classification model with one label: quark's reward; default on the embedded data, where --reward-fn
    is not given either: assets/tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function: quark's reward, or, beside --reward-model, only the judge in evaluations; default on the
    embedded data: assets/rewards.py:sentiment"""
    prefix: str = 12 * "{label}" + " "
    """what stands in front of the prompt, {label} the number; for a real model write "Quality {label} of 5. " """
    output_dir: str = "runs/reward_conditioning"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    beta: float | None = None
    """KL coefficient: the larger, the closer to the reference; default: 0.2 for quark, and 0, none, for binary"""
    quantiles: int = 5
    """K of quark"""
    rounds: int = 6
    """of quark: explorations"""
    prompts_per_round: int = 500
    """of quark: prompts that an exploration answers"""
    samples: int = 2
    """of quark: answers to each of them"""
    learning_rate: float | None = None
    """peak, after 10% warm-up; then linear decay to 0. Default: 3e-3 for quark, 4e-3 for binary"""
    batch_size: int = 32
    """answers an update"""
    micro_batch_size: int | None = None
    """answers a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float | None = None
    """passes over the comparisons' answers, by default 1.5; quark: updates of a round, as passes over as many answers
    as it adds, by default 1"""
    max_steps: int | None = None
    """number of updates (quark: of a round), whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 64
    """of a completion"""
    temperature: float = 1.0
    """of the samples, and of all log-probabilities"""
    eval_every: int = 50
    """updates between held-out evaluations of binary; quark's are after each round"""
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

    may_be_zero: ClassVar = ("beta",)


# --------------------------------------------------------------------------------------------------------------- labels


def quantile_labels(rewards: torch.Tensor, quantiles: int) -> torch.Tensor:
    """Rewards [N] -> labels 1 ... K [N], K the best: the sorted pool cut into parts of equal size (to one answer). Of
    equal rewards at a cut, the earlier answers get the lower label, as a stable sort leaves them."""
    labels = torch.empty(len(rewards), dtype=torch.long)
    labels[rewards.sort(stable=True).indices] = 1 + torch.arange(len(rewards)) * quantiles // len(rewards)
    return labels


def labelled(prompt, label, args):
    return with_prefix(prompt, args.prefix.replace("{label}", str(label)))


def best_label(args) -> int:
    return args.quantiles if args.method == "quark" else 2


# ----------------------------------------------------------------------------------------------------------------- loss


def conditioning_loss(logps: torch.Tensor, ref_logps: torch.Tensor | None, targets: torch.Tensor, beta: float):
    """Equation (1), summed over tokens: logps, ref_logps [N, V] log-probabilities of all tokens, with and without the
    label; targets [N] -> (loss, KL(pi_ref || pi_theta)), nats. ref_logps None: beta is 0."""
    nll = F.nll_loss(logps, targets, reduction="sum")
    if ref_logps is None:
        return nll, torch.zeros_like(nll)
    kl = F.kl_div(logps, ref_logps, reduction="sum", log_target=True)
    return nll + beta * kl, kl.detach()


def vocabulary_logprobs(model, rows, temperature: float):
    """Rows (ids, mask) -> log-probabilities of the whole vocabulary where a completion's token is predicted [N, V], and
    these tokens [N]; in the order of rows and positions, so that rows with other prompts line up."""
    input_ids, mask = pad_rows(rows, model.device)
    predicts = F.pad(mask[:, 1:], (0, 1)).bool()  # a completion's token comes next
    states, place = last_states(model, input_ids, predicts.flip(1).cumsum(1).flip(1) > 0)
    with autocast(model):
        logits = logits_of(model, states[place[predicts]])  # [N, V]
    return F.log_softmax(logits.float() / temperature, -1), input_ids[:, 1:][mask[:, 1:].bool()]


# ----------------------------------------------------------------------------------------------------------------- data


def load_data(args: Args, model, tokenizer):
    """-> what is learnt from, and rows with held-out prompts. Binary: answers (row with the label, row without). Quark:
    rows of prompts."""
    stops, max_length = stop_ids(model, tokenizer), max_row_length(model, args.max_length)
    rows = load_rows(args.dataset, args.split)
    rows, eval_rows = (rows, load_rows(args.eval_dataset, None)) if args.eval_dataset else hold_out(rows, args.seed)

    def encode_pair(row):
        row["prompt"], chosen, rejected = comparison(row)
        return [encode_row(tokenizer, prompt, completion, stops)
                for label, completion in ((2, chosen), (1, rejected))
                for prompt in (labelled(row["prompt"], label, args), row["prompt"])]

    def encode(row):
        implicit = args.method == "binary" and row.get("prompt") is None  # what chosen and rejected share
        row["prompt"] = comparison(row)[0] if implicit else column(row, args.prompt_column)
        ids = encode_prompt(tokenizer, labelled(row["prompt"], best_label(args), args))
        return [make_row(ids, [0])]  # a token in the place of the completion

    eval_rows = [row for row, _ in encode_all(eval_rows, args.eval_dataset or args.dataset, encode, max_length)]
    room = max_length - len(encode_prompt(tokenizer, labelled("", best_label(args), args)))  # beside the label
    eval_rows = prompts_that_fit(eval_rows, tokenizer, args.max_new_tokens, room)[: args.eval_prompts]
    if args.method == "binary":
        encoded = encode_all(rows, args.dataset, encode_pair, max_length)
        return [cut_alike(*both) for _, (*good, bad, same) in encoded for both in (good, (bad, same))], eval_rows
    rows = encode_all(rows, args.dataset, encode, max_length - args.max_new_tokens + 1)
    return [row for row, _ in rows], eval_rows


def cut_alike(with_label, without):
    """Where --max-length cut the completion behind a label, the same completion without it ends there too."""
    surplus = sum(without[1]) - sum(with_label[1])
    return with_label, tuple(values[:len(values) - surplus] for values in without)


def explore(model, tokenizer, rows, label, proxy, args: Args) -> tuple[list[dict], dict]:
    """Quark's exploration: answers of the policy given a label (None: of the reference), with their rewards."""
    began = time.perf_counter()
    prompts = [row["prompt"] for row in rows]
    asked = prompts if label is None else [labelled(prompt, label, args) for prompt in prompts]
    rollout = generate(model, tokenizer, asked, args.samples, args.max_new_tokens, args.temperature)
    answered = [row for row in rows for _ in range(args.samples)]
    rewards = proxy([row["prompt"] for row in answered], rollout.completions, answered)
    answers = [{"prompt": row["prompt"], "ids": ids[mask.index(1):], "reward": reward}
               for row, (ids, mask), reward in zip(answered, rollout.rows, rewards.tolist())]
    tokens = sum(len(ids) for ids, _ in rollout.rows)
    return answers, {"round_reward": rewards.mean().item(), "round_ended": rollout.ended.float().mean().item(),
                     "rollout_tokens_per_s": tokens / (time.perf_counter() - began)}


def labelled_pool(pool: list[dict], tokenizer, args: Args) -> list[tuple]:
    """-> (row with the label of its quantile, row without), each (ids, mask): on the ids that were sampled."""
    labels = quantile_labels(torch.tensor([answer["reward"] for answer in pool]), args.quantiles).tolist()
    return [tuple(make_row(encode_prompt(tokenizer, prompt), answer["ids"])
                  for prompt in (labelled(answer["prompt"], label, args), answer["prompt"]))
            for answer, label in zip(pool, labels)]


# ----------------------------------------------------------------------------------------------------------------- main


def check(args: Args) -> None:
    for name, least in {"quantiles": 2, "rounds": 1, "prompts_per_round": 1, "samples": 1}.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least {least}")
    defaults = {"quark": {"beta": 0.2, "epochs": 1.0, "learning_rate": 3e-3},
                "binary": {"beta": 0.0, "epochs": 1.5, "learning_rate": 4e-3}}[args.method]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "{label}" not in args.prefix:
        raise UserError(f"--prefix {args.prefix!r}: must say where the label stands: put {{label}} into it")
    if args.dataset is None:
        name = "review_prompts" if args.method == "quark" else "comparisons"
        args.dataset = str(ASSETS / "data" / f"{name}.jsonl")
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "review_prompts_heldout.jsonl")
        if not args.reward_fn:
            args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
            args.reward_fn = str(ASSETS / "rewards.py") + ":sentiment"
    if args.method == "quark" and not (args.reward_model or args.reward_fn):
        raise UserError("no reward: give a --reward-model or a --reward-fn")


def main(args: Args) -> None:
    check(args)
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    reference = shard(load_model(args.model, args.device, args.dtype), args) if args.beta else None
    gold = reward_from_function(args.reward_fn) if args.reward_fn else None
    proxy = reward_from_model(args.reward_model, args) if args.reward_model else gold
    data, eval_rows = load_data(args, model, tokenizer)

    quark, rounds = args.method == "quark", args.rounds if args.method == "quark" else 1
    if quark:
        asked = batches(len(data), min(args.prompts_per_round, len(data)), 1, rounds, args.seed)  # in each round
        new = len(asked[0]) * args.samples
        steps = args.max_steps or max(1, round(args.epochs * new / args.batch_size))  # of each round
        print(f"{len(data)} prompts, {len(eval_rows)} held out; {rounds} rounds that add {new} answers to the pool, "
              f"{steps} updates of {args.batch_size} each", flush=True)
    else:
        steps = args.max_steps or max(1, round(args.epochs * len(data) / args.batch_size))
        print(f"{len(data)} labelled answers, {len(eval_rows)} held-out prompts; {steps} updates of {args.batch_size}",
              flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    done, memory = run.start(model, optimizer)

    def evaluate(step):
        prefix = labelled("", best_label(args), args) if step else ""  # before any update a label means nothing
        evaluation, samples = evaluate_policy(
            model, tokenizer, eval_rows, gold or proxy, memory.get("reference"), args, step, prefix, reference
        )
        if proxy:
            texts = [sample["completion"] for sample in samples]
            evaluation["proxy_reward"] = proxy([row["prompt"] for row in eval_rows], texts, eval_rows).mean().item()
        run.log(step, **evaluation)
        run.write("samples", *samples)
        return evaluation, samples

    if "reference" not in memory:  # the policy still is the reference
        before, memory["reference"] = evaluate(0)
        memory |= {"rounds": [(0, before)], "pool": []}
    answers = data if not quark else labelled_pool(memory["pool"], tokenizer, args) if memory["pool"] else []
    shown = {}
    bar = progress_bar("reward_conditioning", done, rounds * steps)
    for step in bar:
        number, turn = divmod(step, steps)
        if quark and turn == 0:
            label = best_label(args) if number else None
            explored, metrics = explore(model, tokenizer, [data[i] for i in asked[number]], label, proxy, args)
            memory["pool"] += explored
            answers = labelled_pool(memory["pool"], tokenizer, args)
            run.log(step, **metrics, pool=len(answers))
            shown["round_reward"] = f"{metrics['round_reward']:.2f}"
        began = time.perf_counter()
        indices = batches(len(answers), args.batch_size, 1, steps, args.seed + number)[turn]
        batch = [answers[i] for i in indices]
        tokens, losses = sum(sum(mask) for (_, mask), _ in batch), torch.zeros(2, device=model.device)
        for group in micro_batches([len(ids) for (ids, _), _ in batch], args.micro_batch_size):
            with_label, without = zip(*(batch[i] for i in group))
            logps, targets = vocabulary_logprobs(model, with_label, args.temperature)  # [N, V], [N]
            with torch.no_grad():
                ref_logps = vocabulary_logprobs(reference, without, args.temperature)[0] if reference else None
            micro_loss, micro_kl = conditioning_loss(logps, ref_logps, targets, args.beta)
            (micro_loss / tokens).backward()
            losses += torch.stack([micro_loss.detach(), micro_kl]) / tokens
        loss, kl = summed(losses).tolist()
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.check_finite(step, loss, grad_norm, indices)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, rounds * steps, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        tokens_per_s = sum(len(ids) for (ids, _), _ in batch) / (time.perf_counter() - began)
        run.log(step + 1, loss=loss, kl_per_token=kl, grad_norm=grad_norm,
                learning_rate=optimizer.param_groups[0]["lr"], tokens_per_s=tokens_per_s)
        shown["loss"] = f"{loss:.3f}"
        due = turn + 1 == steps if quark else (step + 1) % args.eval_every == 0
        if due and step + 1 < rounds * steps:
            evaluation, _ = evaluate(step + 1)
            memory["rounds"].append((step + 1, evaluation))
            shown |= {name: f"{evaluation[name]:.2f}" for name in ("reward", "kl", "win_rate") if name in evaluation}
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == rounds * steps:
            run.save_checkpoint(step + 1, model, optimizer, memory)

    before = own_prefix(tokenizer)  # of a reference that is conditioned already
    tokenizer.init_kwargs["prompt_prefix"] = before + labelled("", best_label(args), args)
    save_model(model, tokenizer, run.dir)
    tokenizer.init_kwargs["prompt_prefix"] = before
    evaluation, samples = evaluate(rounds * steps)
    finish(run, memory, evaluation, samples)


def finish(run, memory: dict, evaluation: dict, samples: list[dict]) -> None:
    before = memory["rounds"][0][1]
    report(run, evaluation | {f"{name}_ref": before[name] for name in ("proxy_reward",) if name in before}, samples,
           memory["reference"])
    if "reward" in evaluation:
        print()
        print_table([["update", "proxy reward", "reward", "KL, nats", "win rate"]] +
                    [[step, m["proxy_reward"], *(f"{m[name]:{form}} ± {m[name + '_se']:{form}}" for name, form in
                                                 (("reward", ".2f"), ("kl", ".2f"), ("win_rate", ".1%")))]
                     for step, m in [*memory["rounds"], ("end", evaluation)]])


if __name__ == "__main__":
    run_script(main, Args)
