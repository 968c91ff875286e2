r"""PPO on a learned reward: stage 3 of RLHF, reward model -> policy.

The objective is that of InstructGPT (Ouyang et al. 2022), equation (2), without its pretraining
term:

    max_theta  E_{x, y ~ pi_theta} [ r(x, y) ] - beta KL(pi_theta(y|x) || pi_ref(y|x))          (1)

The tokens of a completion are the actions, and the KL is charged token by token, as the reward

    R_t = -beta log(pi_old(y_t | x, y_<t) / pi_ref(y_t | x, y_<t)) + [t is the last] r(x, y)    (2)

A critic V gives advantages, Schulman et al. (2015), (16):

    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = R_t + gamma V_{t+1} - V_t,
    return_t = A_t + V_t                                                                        (3)

The policy's loss (4) is that of PPO, Schulman et al. (2017), equation (7). The critic's (5) is that
of PPO's code; its clipping has an eps of its own, and is off by default:

    L_pi = -E[ min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) ],   rho_t = pi_theta / pi_old (4)
    L_V  = 1/2 E[ max((V - return)^2, (clip(V, V_old - eps, V_old + eps) - return)^2) ]         (5)

The optimum of (1) is pi* = pi_ref exp(r / beta) / Z. There every advantage is 0, and scaling
amplifies the noise that is left: only the decay of the learning rate to 0 lets PPO settle.

    python ppo_rlhf.py                     # trains tiny-sft on tiny-rm: true reward 0.0 -> 2.7
    python ppo_rlhf.py --beta 1            # closer to the reference
    python ppo_rlhf.py --target-kl 3       # beta is adapted
    python ppo_rlhf.py --reward-fn assets/rewards.py:sentiment --critic-model assets/tiny-rm
    python ppo_rlhf.py --model Qwen/Qwen2.5-0.5B-Instruct --reward-model runs/reward_model \
        --dataset trl-lib/ultrafeedback-prompt --learning-rate 1e-6 --value-learning-rate 1e-5 \
        --max-new-tokens 300

The implementation details and their sources (Z: Ziegler et al. 2019; S: Stiennon et al. 2020; O:
InstructGPT; 37, N, N+: Huang et al., "The 37 implementation details of PPO", 2022, "The N
implementation details of RLHF with PPO", 2023, and its sequel on summarisation, 2024):

    (2) per token, the score at the last token (S, O)     by its index, so that pad may equal EOS
    critic: own network, from the reward model (S, O)     else from --model, its head 0 (N)
    no dropout (Z, N+), temperature in all passes (N)     ratio_first is exactly 1
    right padding, ids as they were sampled (N)           no text is encoded again
    gamma 1, lambda 0.95 (Z), whitening (37, N)           --scale, over all tokens of a step
    shuffled mini-batches (37), a few epochs of them      one by default
    clipped value loss (37, N)                            --clip-value; off by default
    linear decay of the learning rate (37)                after 10% warm-up
    gradient clipping (37)                                policy and critic by their own norms
    adaptive beta (Z, 2.2)                                --target-kl; off: beta is fixed
    less for a truncated completion (N+)                  --missing-eos-penalty is subtracted
    early stop on the update's KL (Spinning Up)           --max-update-kl; off
    critic first (Zheng et al. 2023)                      --critic-warmup steps

Left out: pretraining gradients (O), whitening or scaling of rewards (Z: they change beta), an
entropy bonus (37: the KL in (1) contains beta times the entropy), Adam's epsilon and TensorFlow's
bias (N), rejection of samples (Z).

Data: prompts, texts or lists of messages. Further columns reach the reward function by name.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from common import (
    Row, UserError, adapters_off, all_reduce, clip_gradients, generate, head_scores, load_model,
    load_policy, load_reference, load_tokenizer, mean_over_batch, micro_batches, pad_rows,
    prepare_for_training, save_and_reload, send, set_learning_rate, states_at, to_floats,
    token_budget, token_logprobs
)
from harness import (
    ASSETS, GOLD, Count, HeldOut, NonNegative, Positive, Run, Share, TrainArgs, batches,
    evaluate_policy, is_embedded, load_prompts, load_rewards, progress_bar, report, run_script,
    speeds
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
    """sequence-classification model with one label, the reward; embedded data: tiny-rm"""
    reward_fn: str | None = None
    """FILE.py:function, the reward; beside --reward-model it is reported, not trained on"""
    critic_model: str | None = None
    """start of the critic; default: --reward-model if it reads the policy's ids, else --model"""
    beta: Positive = 0.5
    """KL coefficient: the larger, the closer to the reference"""
    target_kl: Positive | None = None
    """nats per completion: beta is adapted until the KL is this; default: beta stays"""
    gamma: Share = 1.0
    """discount of later rewards"""
    lam: Share = 0.95
    """lambda of the advantages; 1: no bias of the critic, 0: least variance"""
    scale: bool = True
    """bring a step's advantages to mean 0 and deviation 1"""
    clip: Positive = 0.2
    """the ratio is clipped to 1 - clip ... 1 + clip"""
    clip_value: Positive | None = None
    """the critic's change within a step is clipped to this; default: no clip"""
    ppo_epochs: Count = 1
    """passes over a step's completions"""
    mini_batches: Count = 2
    """updates per pass"""
    critic_warmup: Annotated[int, (lambda x: x >= 0, "0 or more steps")] = 3
    """steps in which only the critic learns"""
    max_update_kl: Positive | None = None
    """nats per token: a mini-batch that moved further is skipped, and the rest of its step"""
    missing_eos_penalty: NonNegative = 1.0
    """subtracted from the score of completions truncated at --max-new-tokens"""
    learning_rate: Positive = 4e-4
    """peak, after 10% warm-up, before linear decay to 0; for real models about 1e-6"""
    value_learning_rate: Positive = 1e-3
    """the critic's"""
    batch_size: Count = 128
    """prompts per step, with one completion each"""
    epochs: Positive = 8.0
    """passes over the prompts"""
    max_new_tokens: Count = 64
    """tokens per completion"""
    temperature: Positive = 1.0
    """temperature of the completions, and of all log-probabilities"""
    eval_every: Count = 25
    """steps between held-out evaluations"""
    output_dir: str = "runs/ppo_rlhf"


# --- loss ---


def kl_rewards(scores, logps, ref_logps, mask, beta):
    """Equation (2): scores [B], logps, ref_logps, mask [B, T] -> rewards [B, T], whose sum is
    r - beta log-ratio of the whole completion."""
    rewards = (-beta * (logps - ref_logps)).masked_fill(~mask.bool(), 0.0)
    last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)  # by index: pad may be EOS
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, gamma, lam):
    """Equation (3): rewards, values, mask [B, T], values of the state in which token t is chosen ->
    advantages, returns [B, T]. The value after a completion's last token is 0."""
    outside = ~mask.bool()
    rewards, values = rewards.masked_fill(outside, 0.0), values.masked_fill(outside, 0.0)
    advantage, next_value, columns = 0.0, 0.0, []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        next_value = values[:, t]
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + values


def whiten(advantages, mask):
    """Mean 0 and deviation 1 over the tokens of all completions: [B, T] -> [B, T]; one token: 0."""
    tokens = mask.sum()
    centred = (advantages - (advantages * mask).sum() / tokens) * mask
    variance = centred.square().sum() / (tokens - 1).clamp(min=1)
    return centred * (variance + 1e-8).rsqrt()


def policy_loss(logps, old_logps, advantages, mask, clip, total=None):
    """Equation (4), the mean over tokens: all [B, T] -> scalar. total: tokens to divide by, those
    of the mask unless micro-batches share an update's."""
    rho = ((logps - old_logps) * mask).exp()
    losses = -torch.min(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages)
    return (losses * mask).sum() / (mask.sum() if total is None else total)


def value_loss(values, old_values, returns, mask, clip, total=None):
    """Equation (5), the mean over tokens: all [B, T] -> scalar. clip None: not clipped."""
    losses = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.max(losses, (clipped - returns) ** 2)
    return (0.5 * losses * mask).sum() / (mask.sum() if total is None else total)


def adapted_beta(beta: float, kl: float, target_kl: float | None) -> float:
    """Ziegler et al. (2019), section 2.2: up to 2% more or less per step."""
    if target_kl is None:
        return beta
    return beta * (1 + 0.1 * max(-0.2, min(0.2, kl / target_kl - 1)))


# --- critic ---


def load_critic(args: Args, tokenizer):
    """A sequence-classification model, whose head is read at every token."""
    kind, name = AutoModelForSequenceClassification, args.critic_model or args.reward_model
    if name and tokenizer.get_vocab().items() <= load_tokenizer(name).get_vocab().items():
        critic = load_model(name, args.device, args.dtype, kind)
        if critic.config.num_labels != 1:
            raise UserError(f"--critic-model: {name} has {critic.config.num_labels} labels, not 1")
        return critic
    if args.critic_model:
        raise UserError(f"--critic-model {name}: has another tokenizer than --model {args.model}, "
                        "whose ids it reads: give another, or none")
    critic = load_model(args.model, args.device, args.dtype, kind, new_head=True)
    critic.score = torch.nn.Linear(critic.score.in_features, 1, bias=False).to(critic.device)
    torch.nn.init.zeros_(critic.score.weight)
    return critic


def token_values(critic, input_ids, completion_mask):
    """V of the state before each completion token, read at the token before it -> [B, T] fp32, 0
    elsewhere."""
    is_token = completion_mask.bool()
    before = F.pad(is_token[:, 1:], (0, 1))
    values = head_scores(critic, states_at(critic, input_ids, before))
    (where,) = send(values.device, is_token.flatten().nonzero().squeeze(1))
    empty = torch.zeros(is_token.numel(), device=values.device)
    return empty.index_copy(0, where, values).view(is_token.shape)


# --- one step ---


@dataclass
class Experience:
    """A step's completions, and what policy, reference and critic computed for them before the
    update: [B, T], prompt and completion, on the policy's device; 0 outside the completion."""

    examples: list
    rows: list[Row]
    mask: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None


def update_plan(rows: list[Row], args: Args, budget: int) -> list[tuple[list, list]]:
    """The mini-batches of a step, shuffled anew in each epoch: [(indices, micro-batches)]."""
    plan = []
    for _ in range(args.ppo_epochs):
        for indices in torch.randperm(len(rows)).tensor_split(args.mini_batches):
            lengths = [len(rows[i].ids) for i in indices]
            groups = micro_batches(lengths, args.micro_batch_size, budget)
            plan.append((indices.tolist(), [indices[group].tolist() for group in groups]))
    return plan


@torch.no_grad()
def score_experience(networks, reference, rollout, plan, args: Args) -> Experience:
    """By the forward passes of the first epoch: the ratio of its first mini-batch is then exactly
    1, which the rollout's log-probabilities, computed token by token, would miss by rounding."""
    policy, critic = networks["policy"], networks["critic"]
    logps, ref_logps, values = [torch.zeros_like(rollout.logps) for _ in range(3)]
    for _, groups in plan[:len(plan) // args.ppo_epochs]:
        for group in groups:
            input_ids, mask = pad_rows([rollout.rows[i] for i in group])
            width, (at,) = mask.shape[1], send(policy.device, torch.tensor(group))
            logps[at, :width] = token_logprobs(policy, input_ids, mask, args.temperature)
            values[at, :width] = token_values(critic, input_ids, mask)
            with adapters_off(reference):
                ref = token_logprobs(reference, input_ids, mask, args.temperature)
            ref_logps[at, :width] = ref
    logps, ref_logps, values = [all_reduce(x) for x in (logps, ref_logps, values)]
    mask = rollout.completion_mask.to(policy.device)
    return Experience([], rollout.rows, mask, logps, ref_logps, values)


def add_advantages(experience: Experience, scores, beta: float, args: Args) -> torch.Tensor:
    """Scores [B] -> the rewards of tokens [B, T], and from them the advantages and returns."""
    e = experience
    rewards = kl_rewards(scores.to(e.mask.device), e.old_logps, e.ref_logps, e.mask, beta)
    e.advantages, e.returns = gae(rewards, e.old_values, e.mask, args.gamma, args.lam)
    if args.scale:
        e.advantages = whiten(e.advantages, e.mask)
    return rewards


def add_gradients(policy, critic, experience: Experience, mini_batch, args: Args) -> dict:
    """Add the gradients of a mini-batch, by micro-batches -> what is logged. policy None: the
    critic's alone."""
    e, (indices, groups), totals = experience, mini_batch, defaultdict(float)
    tokens = sum(sum(e.rows[i].mask) for i in indices)
    for group in groups:
        input_ids, mask = pad_rows([e.rows[i] for i in group])
        width, (at,) = mask.shape[1], send(critic.device, torch.tensor(group))
        old_logps, old_values = e.old_logps[at, :width], e.old_values[at, :width]
        advantages, returns = e.advantages[at, :width], e.returns[at, :width]
        values, logps = token_values(critic, input_ids, mask), old_logps
        if policy is not None:
            logps = token_logprobs(policy, input_ids, mask, args.temperature)
        mask = e.mask[at, :width]
        loss = policy_loss(logps, old_logps, advantages, mask, args.clip, tokens)
        loss_v = value_loss(values, old_values, returns, mask, args.clip_value, tokens)
        (loss + loss_v).backward()
        with torch.no_grad():
            log_ratio = (logps - old_logps) * mask
            ratio = log_ratio.exp()
            totals["loss"] += loss * tokens
            totals["value_loss"] += loss_v * tokens
            totals["ratio"] += (ratio * mask).sum()
            totals["clip_fraction"] += (((ratio - 1).abs() > args.clip) * mask).sum()
            totals["update_kl"] += ((ratio - 1 - log_ratio) * mask).sum()  # k3
    return mean_over_batch(totals, tokens)


def update(networks, optimizer, experience: Experience, plan, run: Run, step: int) -> list[dict]:
    """All mini-batches of a step -> what is logged of each. During the warm-up only the critic
    learns."""
    args, done = run.args, []
    policy = networks["policy"] if step >= args.critic_warmup else None
    for mini_batch in plan:
        stats = add_gradients(policy, networks["critic"], experience, mini_batch, args)
        stats["value_grad_norm"] = clip_gradients(networks["critic"], args.max_grad_norm)
        if policy is not None:
            stats["grad_norm"] = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(step, stats, experience.examples)
        too_far = bool(args.max_update_kl) and stats["update_kl"] > args.max_update_kl
        done.append(stats | {"updates": 0 if too_far else 1})
        if too_far:
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
    return done


def explained_variance(values, returns, mask) -> torch.Tensor:
    """1: the critic predicts the returns; 0: no better than their mean; negative: worse."""
    def variance(x):
        mean = (x * mask).sum() / mask.sum()
        return ((x - mean).square() * mask).sum()

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


# --- main ---


def evaluate(policy, held_out: HeldOut, proxy, run: Run, step: int):
    """By the judge (gold), and beside it by the reward that is trained on (proxy)."""
    metrics, samples = evaluate_policy(policy, held_out, run.args, step)
    metrics["proxy_reward"] = metrics["reward"]
    if proxy is not held_out.reward:
        examples = [example for example, _ in held_out.prompts]
        completions = [sample["completion"] for sample in samples]
        metrics["proxy_reward"] = proxy(examples, completions).mean().item()
    run.log(step, "eval", **metrics)
    run.write("samples", *samples)
    return metrics, samples


def step_metrics(rollout, experience: Experience, rewards, scores, truths) -> dict:
    e, lengths = experience, experience.mask.sum(1).float()  # [B]
    return to_floats({
        "reward": truths.mean().to(lengths.device),
        "proxy_reward": scores.mean().to(lengths.device),
        "kl": (e.old_logps - e.ref_logps).sum(1).mean(),  # nats per completion
        "objective": rewards.sum(1).mean(),  # (1), less the penalty for truncation
        "entropy": -rollout.logps.sum() / lengths.sum(),
        "explained_variance": explained_variance(e.old_values, e.returns, e.mask),
        "length": lengths.mean(),
        "ended": rollout.ended.float().mean().to(lengths.device),
        "sampling_gap": (e.old_logps - rollout.logps).abs().max(),
    })


def update_metrics(stats: list[dict]) -> dict:
    """Means over a step's mini-batches, and what its first and last one say."""
    means = {name: sum(part[name] for part in stats) / len(stats) for name in stats[0]}
    return means | {
        "update_kl": stats[-1]["update_kl"],
        "ratio_first": stats[0]["ratio"],
        "updates": sum(part["updates"] for part in stats),
    }


def check_args(args: Args) -> None:
    if args.mini_batches > args.batch_size:
        raise UserError(f"--mini-batches {args.mini_batches}: give at most --batch-size")
    if is_embedded(args) and not args.reward_fn:
        args.reward_model = args.reward_model or str(ASSETS / "tiny-rm")
        args.reward_fn = GOLD


def main(args: Args) -> None:
    check_args(args)
    run = Run(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, args.chat_template)
    policy = load_policy(args)
    reference = load_reference(policy, args)
    proxy, gold = load_rewards(args, tokenizer.chat_template)
    critic = prepare_for_training(load_critic(args, tokenizer), args)
    networks = torch.nn.ModuleDict({"policy": policy, "critic": critic})
    prompts, eval_prompts = load_prompts(args, policy, tokenizer)
    held_out = HeldOut(eval_prompts, gold, reference, tokenizer)
    plan = batches(len(prompts), args.batch_size, args.epochs, args.max_steps, args.seed)
    print(f"{len(prompts)} prompts, {len(eval_prompts)} held out; {len(plan)} steps", flush=True)

    peaks = args.learning_rate, args.value_learning_rate
    groups = [{"params": list(network.parameters())} for network in networks.values()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    done, memory = run.start(networks, optimizer)
    if done == 0:
        before, samples = evaluate(policy, held_out, proxy, run, 0)
        memory = {"before": before, "samples": samples, "beta": args.beta}
    held_out.reference_samples = memory["samples"]
    bar = progress_bar("ppo_rlhf", done, len(plan))
    for step in bar:
        times = [time.perf_counter()]
        examples, prompt_ids = zip(*[prompts[i] for i in plan[step]])
        rollout = generate(policy, tokenizer, prompt_ids, 1, args.max_new_tokens, args.temperature)
        times.append(time.perf_counter())
        to_score = examples, rollout.completions, rollout.completion_ids
        scores = proxy(*to_score)  # [B]
        truths = scores if gold is proxy else gold(*to_score)
        mini_batches = update_plan(rollout.rows, args, token_budget(policy))
        e = score_experience(networks, reference, rollout, mini_batches, args)
        e.examples = examples
        times.append(time.perf_counter())

        penalised = scores - args.missing_eos_penalty * ~rollout.ended  # truncated: less
        rewards = add_advantages(e, penalised, memory["beta"], args)
        learning_rate = set_learning_rate(optimizer, step, len(plan), *peaks)
        stats = update(networks, optimizer, e, mini_batches, run, step)
        times.append(time.perf_counter())

        metrics = {"beta": memory["beta"], "learning_rate": learning_rate}
        metrics |= update_metrics(stats) | step_metrics(rollout, e, rewards, scores, truths)
        metrics |= speeds(rollout, times, len(stats) / args.mini_batches)
        run.log(step + 1, "train", **metrics)
        memory["beta"] = adapted_beta(memory["beta"], metrics["kl"], args.target_kl)
        bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("reward", "kl")}, refresh=False)
        if (step + 1) % args.eval_every == 0 and step + 1 < len(plan):
            evaluate(policy, held_out, proxy, run, step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == len(plan):
            run.save_checkpoint(step + 1, networks, optimizer, memory)

    saved = save_and_reload(policy, tokenizer, run.dir, args)
    evaluation, samples = evaluate(saved, held_out, proxy, run, len(plan))
    evaluation["proxy_reward_ref"] = memory["before"]["proxy_reward"]
    report(run, evaluation, samples, held_out)
    print("proxy reward: {proxy_reward_ref:.2f} -> {proxy_reward:.2f}".format(**evaluation))


if __name__ == "__main__":
    run_script(main, Args)
