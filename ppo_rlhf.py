"""PPO on a learned reward: stage 3 of RLHF, reward model -> policy.

The objective is that of InstructGPT (Ouyang et al. 2022), equation (2), without its pretraining term:

    max_theta  E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL(pi_theta(y|x) || pi_ref(y|x))                               (1)

The tokens of an answer are the actions, and the KL is paid where it arises: the reward of token t is

    R_t = -beta log(pi_old(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)) + [t is the last token] r(x, y)                   (2)

which sums to r - beta times the log-ratio of the whole. A critic V gives advantages, Schulman et al. (2015), (16):

    A_t = sum_l (gamma lambda)^l delta_{t+l},     delta_t = R_t + gamma V_{t+1} - V_t,     return_t = A_t + V_t      (3)

and policy and critic follow the clipped losses of PPO, Schulman et al. (2017), equation (7), and of its code:

    L_pi = -E[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ],     rho_t = pi_theta / pi_old of token t         (4)
    L_V  = 1/2 E[ max((V_t - return_t)^2, (clip(V_t, V_old,t - eps, V_old,t + eps) - return_t)^2) ]                  (5)

The optimum of (1) is pi* = pi_ref exp(r / beta) / Z; the tests hold PPO to it by enumeration. At pi* every advantage
is 0, and whitening then blows up what is left of them: only the decay of the learning rate to 0 lets PPO settle there.

    python ppo_rlhf.py                     # tiny-rm rewards tiny-sft, the truth judges: 0.0 -> 2.6
    python ppo_rlhf.py --beta 1            # closer to the reference
    python ppo_rlhf.py --reward-fn assets/rewards.py:sentiment --critic-model assets/tiny-rm   # the truth rewards, too
    python ppo_rlhf.py --target-kl 3       # beta finds its own value
    python ppo_rlhf.py --model Qwen/Qwen2.5-0.5B-Instruct --reward-model runs/reward_model \\
        --dataset trl-lib/ultrafeedback-prompt --learning-rate 1e-6 --value-learning-rate 1e-5 --max-new-tokens 300

The details, and who has them (Z: Ziegler et al. 2019; S: Stiennon et al. 2020; O: InstructGPT; 37, N, N+: Huang et al.,
"The 37 implementation details of PPO", 2022, "The N implementation details of RLHF with PPO", 2023, and its sequel on
summarisation, 2024):

    (2) per token, the score at the last token (S, O)       by its index, so that pad may equal EOS
    critic: own network, from the reward model (S, O)       with another tokenizer or none: from --model, its head 0 (N)
    no dropout (Z, N+), temperature in all passes (N)       the ratio is exactly 1 before the first update: ratio_first
    right padding, ids as they were sampled (N)             no position depends on padding, no text is encoded again
    gamma 1, lambda 0.95 (Z), whitening (37, N)             over the tokens of all completions of a step
    shuffled mini-batches (37), a few epochs of them        one by default; losses: mean over a mini-batch's tokens
    clipped value loss (37, N)                              --clip-value; off: Andrychowicz et al. (2021) found no use
    linear decay of the learning rate (37)                  after 10% warm-up
    gradient clipping (37)                                  policy and critic each by their own norm
    adaptive beta (Z, 2.2)                                  --target-kl; off: beta is fixed
    less for a completion without EOS (N+)                  --missing-eos-penalty is taken off; theirs score -1
    early stop on the update's KL (Spinning Up)             --max-update-kl; off
    critic first (Zheng et al. 2023)                        --critic-warmup: steps before the policy moves

Left out: pretraining gradients (O), whitening or scaling of rewards (Z: they change beta; reward_model.py centres
scores), an entropy bonus (37: (1) has one, beta), Adam's epsilon and TensorFlow's bias (N), rejection of samples (Z).

Data: prompts in `--prompt-column` (texts or lists of messages); every column reaches the reward function by its name.
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from common import (ASSETS, Run, UserError, batches, clip_gradients, evaluate_policy, generate, head_scores,
                    last_states, learning_rate_at, load_model, load_prompts, load_tokenizer, micro_batches, pad_rows,
                    progress_bar, report, reward_from_function, reward_from_model, run_script, save_model, shard,
                    summed, token_logprobs)

from transformers import AutoModelForSequenceClassification  # after common, which keeps transformers quiet


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
    """a sequence-classification model with one label, the reward; default on the embedded data, where --reward-fn is
    not given either: assets/tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function, the reward, or, beside --reward-model, only the judge of what that model taught; default on the
    embedded data: assets/rewards.py:sentiment"""
    critic_model: str | None = None
    """what the critic starts from; default: --reward-model if it has the policy's tokenizer, else --model"""
    output_dir: str = "runs/ppo_rlhf"
    """model, tokenizer, args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/"""
    beta: float = 0.5
    """KL coefficient: the larger, the closer to the reference"""
    target_kl: float | None = None
    """nats a completion: beta is adapted until the KL is this; default: beta stays"""
    gamma: float = 1.0
    """discount of later rewards"""
    lam: float = 0.95
    """lambda of the advantages: 1: none of the critic's bias, 0: none of the sampling's variance"""
    clip: float = 0.2
    """the ratio is clipped to 1 - clip ... 1 + clip"""
    clip_value: float = math.inf
    """the critic's move within a step is clipped to this; 0.2 in most code, for rewards of size 1; inf: not clipped"""
    whiten: bool = True
    """bring a step's advantages to mean 0 and deviation 1"""
    ppo_epochs: int = 1
    """passes over a step's completions"""
    mini_batches: int = 2
    """updates in each of them"""
    critic_warmup: int = 3
    """steps in which only the critic learns"""
    max_update_kl: float | None = None
    """nats a token that a step's updates may move the policy: the rest of them is skipped; default: no limit"""
    missing_eos_penalty: float = 1.0
    """taken off the score of completions cut at --max-new-tokens"""
    learning_rate: float = 4e-4
    """peak, after 10% warm-up; then linear decay to 0"""
    value_learning_rate: float = 1e-3
    """the critic's, likewise"""
    batch_size: int = 128
    """prompts a step, with a completion each"""
    micro_batch_size: int | None = None
    """completions a forward pass; default: as many as fit into 4,096 padded tokens"""
    epochs: float = 8.0
    """passes over the prompts"""
    max_steps: int | None = None
    """number of steps, whatever --epochs says"""
    max_length: int | None = None
    """tokens of prompt and completion; default: 1,024 or the model's window"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_new_tokens: int = 64
    """of a completion"""
    temperature: float = 1.0
    """of the samples, and of all log-probabilities"""
    eval_every: int = 25
    """steps between held-out evaluations"""
    eval_prompts: int = 500
    """held-out prompts that an evaluation answers"""
    save_every: int = 25
    """steps between checkpoints"""
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


# ----------------------------------------------------------------------------------------------------------------- loss


def kl_rewards(scores, logps, ref_logps, mask, beta):
    """Equation (2): scores [B], logps, ref_logps, mask [B, T] -> rewards [B, T], which sum to r - beta log-ratio."""
    rewards = (-beta * (logps - ref_logps)).masked_fill(~mask.bool(), 0.0)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)  # by index: the id there may be pad's, where pad is EOS
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Equation (3): rewards, values, mask [B, T], values of the state in which token t is chosen -> advantages, returns
    [B, T]. After its last token a completion is worth 0."""
    rewards, values = (x.masked_fill(~mask.bool(), 0.0) for x in (rewards, values))
    advantage, next_value, columns = 0.0, 0.0, []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def whiten(advantages, mask):
    """Mean 0 and deviation 1 over the tokens of all completions: [B, T] -> [B, T]."""
    inside = advantages[mask.bool()]
    return (advantages - inside.mean()) * (inside.var() + 1e-8).rsqrt() * mask


def policy_loss(logps, old_logps, advantages, mask, clip, total=None):
    """Equation (4), the mean over tokens: all [B, T] -> scalar. total: tokens to divide by, those of the mask unless
    micro-batches share an update's."""
    rho = ((logps - old_logps) * mask).exp()
    losses = -torch.min(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages)
    return (losses * mask).sum() / (mask.sum() if total is None else total)


def value_loss(values, old_values, returns, mask, clip, total=None):
    """Equation (5), the mean over tokens: all [B, T] -> scalar."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    losses = 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return (losses * mask).sum() / (mask.sum() if total is None else total)


# --------------------------------------------------------------------------------------------------------------- critic


def load_critic(args, tokenizer):
    """A sequence-classification model, whose head is read at every token."""
    name, how = args.critic_model or args.reward_model, (args.device, args.dtype, args.gradient_checkpointing)
    if name and tokenizer.get_vocab().items() <= load_tokenizer(name).get_vocab().items():  # it may have a pad more
        critic = load_model(name, *how, AutoModelForSequenceClassification)
        if critic.config.num_labels != 1:
            raise UserError(f"--critic-model {name}: has {critic.config.num_labels} labels: a critic has one")
        return critic
    if args.critic_model:
        raise UserError(f"--critic-model {name}: has not the tokenizer of --model {args.model}, whose ids it reads: "
                        "give another, or none")
    critic = load_model(args.model, *how, AutoModelForSequenceClassification)
    critic.score = torch.nn.Linear(critic.score.in_features, 1, bias=False).to(critic.device)
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def token_values(critic, input_ids, completion_mask):
    """V of the state in which each completion token is chosen, which the token before it ends -> [B, T] fp32, 0
    elsewhere."""
    needed = F.pad(completion_mask[:, 1:].flip(1).cumsum(1).flip(1) > 0, (0, 1))  # a completion token comes after
    states, place = last_states(critic, input_ids, needed)
    return F.pad(head_scores(critic, states)[place[:, :-1]], (1, 0)) * completion_mask


# ------------------------------------------------------------------------------------------------------------ one step


def update_plan(rollout, args) -> list[tuple[list[int], list[list[int]]]]:
    """Every mini-batch of a step's epochs, shuffled anew in each: its rows, and as micro-batches (this process's)."""
    plan = []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(len(rollout.rows)).tensor_split(args.mini_batches):
            groups = micro_batches([len(rollout.rows[i][0]) for i in rows], args.micro_batch_size)
            plan.append((rows.tolist(), [rows[group].tolist() for group in groups]))
    return plan


@torch.no_grad()
def before_the_update(model, reference, critic, rollout, plan, args):
    """-> old_logps, ref_logps, old_values [B, T], by the forward passes of the first epoch: the ratio of its first
    mini-batch is exactly 1, which the rollout's log-probabilities, computed token by token, would miss by rounding."""
    old_logps, ref_logps, old_values = (torch.zeros_like(rollout.logps) for _ in range(3))
    for group in (group for _, groups in plan[:len(plan) // args.ppo_epochs] for group in groups):
        input_ids, mask = pad_rows([rollout.rows[i] for i in group], model.device)
        width = mask.shape[1]
        old_logps[group, :width] = token_logprobs(model, input_ids, None, mask, args.temperature)
        ref_logps[group, :width] = token_logprobs(reference, input_ids, None, mask, args.temperature)
        old_values[group, :width] = token_values(critic, input_ids, mask)
    return summed(old_logps), summed(ref_logps), summed(old_values)


def add_gradients(model, critic, rollout, old_logps, old_values, advantages, returns, rows, groups, args):
    """Add the gradients of a mini-batch of `rows`, micro-batch by micro-batch -> what is logged. model None: the
    critic's."""
    stats = torch.zeros(6, device=critic.device)
    total = rollout.completion_mask[rows].sum()
    for group in groups:
        input_ids, mask = pad_rows([rollout.rows[i] for i in group], critic.device)
        old, value, advantage, target = (x[group, :mask.shape[1]] for x in (old_logps, old_values, advantages, returns))
        logps = token_logprobs(model, input_ids, None, mask, args.temperature) if model else old
        values = token_values(critic, input_ids, mask)
        losses = [policy_loss(logps, old, advantage, mask, args.clip, total),
                  value_loss(values, value, target, mask, args.clip_value, total)]
        sum(losses).backward()
        with torch.no_grad():
            log_ratio = (logps - old) * mask
            ratio = log_ratio.exp()
            moved = [ratio, (ratio - 1).abs() > args.clip, ratio - 1 - log_ratio,  # the last: KL by k3
                     (values - value).abs() > args.clip_value]
            stats += torch.stack(losses + [(x * mask).sum() / total for x in moved])
    names = ("loss", "value_loss", "ratio", "clip_fraction", "update_kl", "value_clip_fraction")
    return dict(zip(names, summed(stats).tolist()))


def update(model, critic, optimizer, rollout, old_logps, old_values, advantages, returns, plan, args, check):
    """All mini-batches of a step -> what is logged of each, up to where --max-update-kl stops them."""
    done = []
    for rows, groups in plan:
        stats = add_gradients(model, critic, rollout, old_logps, old_values, advantages, returns, rows, groups, args)
        norms = [clip_gradients(network, args.max_grad_norm) for network in (model, critic) if network]
        stats |= {"grad_norm": norms[0] if model else 0.0, "value_grad_norm": norms[-1]}
        check(stats["loss"] + stats["value_loss"], sum(norms))
        done.append(stats)
        if args.max_update_kl and stats["update_kl"] > args.max_update_kl:
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
    return done


def adapted_beta(beta: float, kl: float, target_kl: float | None) -> float:
    """Ziegler et al. (2019), section 2.2: up to 2% more or less a step."""
    return beta if target_kl is None else beta * (1 + 0.1 * max(-0.2, min(0.2, kl / target_kl - 1)))


def explained_variance(values, returns, mask) -> float:
    """1: the critic knows the returns; 0: no more than their mean; below: less."""
    values, returns = values[mask], returns[mask]
    return (1 - (returns - values).var() / returns.var().clamp(min=1e-8)).item()


# ----------------------------------------------------------------------------------------------------------------- main


def check_args(args: Args) -> None:
    positive = "ppo_epochs", "mini_batches", "clip", "clip_value", "value_learning_rate", "target_kl", "max_update_kl"
    for name in positive:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number greater than 0")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)}: give a number from 0 to 1")
    for name in ("critic_warmup", "missing_eos_penalty"):
        if not getattr(args, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give 0 or more")
    if args.mini_batches > args.batch_size:
        raise UserError(f"--mini-batches {args.mini_batches}: more than --batch-size {args.batch_size}: lower it")


def main(args: Args) -> None:
    check_args(args)
    if args.dataset == Args.dataset:
        args.eval_dataset = args.eval_dataset or str(ASSETS / "data" / "review_prompts_heldout.jsonl")
        if not args.reward_fn:
            args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
            args.reward_fn = str(ASSETS / "rewards.py") + ":sentiment"
    if not (args.reward_model or args.reward_fn):
        raise UserError("no reward: give a --reward-model or a --reward-fn")
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    model = shard(load_model(args.model, args.device, args.dtype, args.gradient_checkpointing), args)
    reference = shard(load_model(args.model, args.device, args.dtype), args)
    gold = reward_from_function(args.reward_fn) if args.reward_fn else None
    proxy = reward_from_model(args.reward_model, args) if args.reward_model else gold
    critic = shard(load_critic(args, tokenizer), args)

    rows, eval_rows = load_prompts(args, model, tokenizer)
    plan = batches(len(rows), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(rows)} prompts, {len(eval_rows)} held out; {len(plan)} steps of {args.batch_size} completions, "
          f"{args.ppo_epochs} x {args.mini_batches} updates each; in the first {args.critic_warmup} the critic learns "
          "alone", flush=True)

    networks = torch.nn.ModuleDict({"policy": model, "critic": critic})
    optimizer = torch.optim.AdamW([{"params": list(network.parameters())} for network in networks.values()],
                                  lr=args.learning_rate, weight_decay=0.0, fused=True)
    done, memory = run.start(networks, optimizer)
    beta = memory.get("beta", args.beta)

    def evaluate(step):
        evaluation, samples = evaluate_policy(
            model, tokenizer, eval_rows, gold or proxy, memory.get("reference"), args, step, reference=reference
        )
        evaluation["proxy_reward"] = evaluation["reward"]
        if gold and gold is not proxy:
            texts = ([sample[name] for sample in samples] for name in ("prompt", "completion"))
            evaluation["proxy_reward"] = proxy(*texts, eval_rows).mean().item()
        run.log(step, **({"loss": 0.0} if step == 0 else {}), **evaluation)  # ratio 1, and advantages of mean 0
        run.write("samples", *samples)
        return evaluation, samples

    if "reference" not in memory:  # the policy still is the reference
        before, memory["reference"] = evaluate(0)
        memory["proxy_reward_ref"] = before["proxy_reward"]
    shown = {}
    bar = progress_bar("ppo_rlhf", done, len(plan))
    for step in bar:
        began = time.perf_counter()
        batch_rows = [rows[i][0] for i in plan[step]]
        prompts, prompt_ids = [row["prompt"] for row in batch_rows], [rows[i][1] for i in plan[step]]
        rollout = generate(model, tokenizer, prompt_ids, 1, args.max_new_tokens, args.temperature)
        sampled = time.perf_counter()
        scores = proxy(prompts, rollout.completions, batch_rows)  # [B]
        truths = gold(prompts, rollout.completions, batch_rows) if gold and gold is not proxy else scores
        updates = update_plan(rollout, args)
        old_logps, ref_logps, old_values = before_the_update(model, reference, critic, rollout, updates, args)  # [B, T]
        scored_at = time.perf_counter()

        mask = rollout.completion_mask.bool()  # [B, T]
        penalised = (scores - args.missing_eos_penalty * ~rollout.ended).to(model.device)
        rewards = kl_rewards(penalised, old_logps, ref_logps, mask, beta)
        advantages, returns = gae(rewards, old_values, mask, args.gamma, args.lam)
        for group, peak in zip(optimizer.param_groups, (args.learning_rate, args.value_learning_rate)):
            group["lr"] = learning_rate_at(step, len(plan), peak)
        stats = update(
            None if step < args.critic_warmup else model, critic, optimizer, rollout, old_logps, old_values,
            whiten(advantages, mask) if args.whiten else advantages, returns, updates, args,
            lambda loss, grad_norm: run.check_finite(step, loss, grad_norm, plan[step])
        )
        updated = time.perf_counter()

        lengths = mask.sum(1).float()  # [B]
        tokens = sum(len(ids) for ids, _ in rollout.rows)
        kl = (old_logps - ref_logps).sum(1)  # [B] nats a completion
        metrics = {
            **{name: sum(batch[name] for batch in stats) / len(stats) for name in stats[0]},
            "update_kl": stats[-1]["update_kl"],
            "reward": truths.mean().item(),
            "proxy_reward": scores.mean().item(),
            "kl": kl.mean().item(),
            "kl_per_token": (kl.sum() / lengths.sum()).item(),
            "objective": rewards.sum(1).mean().item(),  # (1), less the penalty without EOS
            "beta": beta,
            "entropy": -(rollout.logps.sum() / lengths.sum()).item(),
            "explained_variance": explained_variance(old_values, returns, mask),
            "ratio_first": stats[0]["ratio"],
            "clip_fraction_first": stats[0]["clip_fraction"],
            "updates": len(stats),
            "ended": rollout.ended.float().mean().item(),
            "length": lengths.mean().item(),
            "sampling_gap": (old_logps - rollout.logps).abs().max().item(),
        }
        run.log(
            step + 1,
            **metrics,
            learning_rate=optimizer.param_groups[0]["lr"],
            tokens_per_s=tokens / (updated - began),
            rollout_tokens_per_s=lengths.sum().item() / (sampled - began),
            scoring_tokens_per_s=tokens / (scored_at - sampled),
            update_tokens_per_s=tokens * len(stats) / len(updates) * args.ppo_epochs / (updated - scored_at),
        )
        beta = memory["beta"] = adapted_beta(beta, metrics["kl"], args.target_kl)
        shown |= {name: f"{metrics[name]:.2f}" for name in ("proxy_reward", "reward", "kl", "explained_variance")}
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluation, _ = evaluate(step + 1)
            for name in ("win_rate", "share_of_optimum"):
                if name in evaluation:
                    shown[name] = f"{evaluation[name]:.2f}"
        bar.set_postfix(shown, refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, networks, optimizer, memory)

    save_model(model, tokenizer, run.dir)
    evaluation, samples = evaluate(len(plan))
    evaluation["proxy_reward_ref"] = memory["proxy_reward_ref"]
    report(run, evaluation, samples, memory["reference"])
    print(f"proxy reward: reference {evaluation['proxy_reward_ref']:.2f}, trained {evaluation['proxy_reward']:.2f}")


if __name__ == "__main__":
    run_script(main, Args)
