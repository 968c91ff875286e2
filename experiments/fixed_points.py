"""Where every loss lands: each method's fixed point, on a language whose completions are listed.

Three prompts, four tokens, every completion up to four tokens long (121 per prompt: it ends with
token 0 or is cut off), a table of logits for every prefix, a reference that is not uniform and a
reward with seven levels. Nothing is sampled: each loss function of the scripts is averaged over all
completions, pairs or groups with their exact probabilities, and driven to convergence. What is left
is compared with

    pi* = pi_ref exp(r / beta) / Z

and with the point that theory names for the loss, which is computed apart (`named`).

    python experiments/fixed_points.py          # 2 processes; 5.6 minutes of processor time

Groups are infinite where no size is given. A size of 8 is exact too: with seven levels there are
1,716 different companies of seven that a completion can be in. Writes
experiments/results/fixed_points.json, and .png where matplotlib is installed.

    tv                 total variation from pi*, of the worst prompt
    kl_to_optimum      KL(pi || pi*), nats; like reward, kl and mean_length the mean over prompts
    share_of_optimum   gain in reward / the most that any policy can gain at this KL to pi_ref
    tv_named           total variation from the point in `lands_on`; null where nothing names it
"""

import itertools
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
sys.path.insert(0, str(ROOT))

from best_of_n import best_of_n_weights  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from expert_iteration import keep_best, sft_loss  # noqa: E402
from grpo import group_advantages, grpo_loss, rewards_with_kl  # noqa: E402
from harness import print_table  # noqa: E402
from ppo_rlhf import gae, kl_rewards, policy_loss  # noqa: E402
from reward_conditioning import conditioning_loss, quantile_labels  # noqa: E402

BETAS = (0.3, 1.0)
FLIPPED = 0.1  # share of labels, where some are flipped
SAMPLES = 100_000  # per prompt, of functions that want samples: in proportion to the probabilities


# --- the language ---


class World:
    """P prompts, N completions each of up to T of V tokens. Token 0 ends a completion."""

    def __init__(self, tokens=4, longest=4, prompts=3, seed=0):
        lengths = range(1, longest + 1)
        some = [s for n in lengths for s in itertools.product(range(tokens), repeat=n)]
        going_on = [s for s in some if 0 not in s and len(s) < longest]
        prefixes = {s: i for i, s in enumerate([(), *going_on])}
        ended = [s for s in some if 0 not in s[:-1] and (s[-1] == 0 or len(s) == longest)]
        shape = len(ended), longest
        self.prefix = torch.zeros(shape, dtype=torch.long)  # the prefix before each token
        self.token = torch.zeros(shape, dtype=torch.long)
        self.mask = torch.zeros(shape, dtype=torch.float64)
        for row, completion in enumerate(ended):
            for t, token in enumerate(completion):
                self.prefix[row, t], self.token[row, t] = prefixes[completion[:t]], token
                self.mask[row, t] = 1
        self.lengths = self.mask.sum(1)  # [N]
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        self.ref_table = 0.7 * normal(prompts, len(prefixes), tokens)
        self.ref_logps = self.token_logps(self.ref_table)  # [P, N, T]
        self.ref = self.ref_logps.sum(2)  # [P, N]
        self.levels = torch.arange(-3, 4, dtype=torch.float64) / 2
        self.level = (2 * normal(prompts, len(ended))).round().clamp(-3, 3).long() + 3  # [P, N]
        self.rewards = self.levels[self.level]

    def token_logps(self, table):
        """Logits [P, prefixes, V] -> log-probabilities of each completion's tokens [P, N, T]."""
        return table.log_softmax(-1)[:, self.prefix, self.token] * self.mask

    def tilted(self, values):
        """pi_ref exp(values) / Z -> [P, N]."""
        return (self.ref + values).softmax(1)

    def per_prefix(self, values):
        """[P, N, T] -> sums over the completions that go through each prefix and token
        [P, prefixes, V]."""
        sums = torch.zeros_like(self.ref_table).flatten(1)
        where = (self.prefix * self.ref_table.shape[2] + self.token).flatten()
        return sums.index_add(1, where, (values * self.mask).flatten(1)).view_as(self.ref_table)

    def counts(self, probabilities):
        """[P, N] -> how often each completion is in samples that go by the probabilities [P, N]."""
        ends = (probabilities.cumsum(1) * SAMPLES).round().long()
        return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))


def with_adam(world, objective, start=None, steps=500, updates=1, peak=0.1) -> torch.Tensor:
    """Follow the gradient of objective(logps, old_logps) -> the policy [P, N]. old_logps are those
    of `updates` updates ago at most. The learning rate falls to 0."""
    table = (world.ref_table if start is None else start).clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=peak, betas=(0.9, 0.99), eps=1e-15)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 - step / steps)
        logps = world.token_logps(table)
        if step % updates == 0:
            old_logps = logps.detach()
        optimizer.zero_grad()
        objective(logps, old_logps).backward()
        optimizer.step()
    return world.token_logps(table.detach()).sum(2).exp()


def with_lbfgs(world, objective, start=None, steps=500) -> torch.Tensor:
    """Minimise objective(logps), which needs no samples of the policy -> the policy [P, N]."""
    return minimise(world, lambda table: objective(world.token_logps(table)), start, steps)


def minimise(world, objective, start, steps) -> torch.Tensor:
    """Minimise objective(table) -> the policy [P, N]."""
    table = (world.ref_table if start is None else start).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=30,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(table)
        loss.backward()
        return loss

    optimizer.step(closure)
    return world.token_logps(table.detach()).sum(2).exp()


# --- GRPO ---


@lru_cache
def groups_of(values: tuple, size: int, scale: bool, baseline: str):
    """All groups that a completion with one of these L rewards can be in -> its advantages [L, M],
    the rewards of the others as indices [M, G - 1], and in how many orders these come [M]."""
    levels = len(values)
    others = torch.combinations(torch.arange(levels), size - 1, with_replacement=True)
    counts = torch.nn.functional.one_hot(others, levels).sum(1)
    orders = (math.lgamma(size) - torch.lgamma(counts + 1.0).sum(1)).double().exp()
    first = torch.arange(levels)[:, None, None].expand(-1, len(others), 1)
    groups = torch.cat([first, others.expand(levels, -1, -1)], 2)  # [L, M, G]
    rewards = torch.tensor(values, dtype=torch.float64)[groups].flatten()
    advantages = group_advantages(rewards, size, scale, baseline).view(groups.shape)
    return advantages[..., 0], others, orders


def mean_advantages(values, probabilities, *settings):
    """Over the rest of a group: rewards [L], with probabilities [P, L] -> [P, L]."""
    advantages, others, orders = groups_of(tuple(values.tolist()), *settings)
    return (orders * probabilities[:, others].prod(2)) @ advantages.T


def population_advantages(world, scores, policy, variant):
    """scores, policy [P, N] -> the expected advantages [P, N]."""
    size, scale, baseline = variant["group_size"], variant["scale"], variant["baseline"]
    if size and variant["kl"] == "reward":  # as many levels as completions
        rows = [mean_advantages(score, p[None], size, scale, baseline)
                for score, p in zip(scores, policy)]
        return torch.cat(rows)
    if size:
        shares = torch.zeros(len(policy), len(world.levels), dtype=torch.float64)
        shares.scatter_add_(1, world.level, policy)
        advantages = mean_advantages(world.levels, shares, size, scale, baseline)
        return advantages.gather(1, world.level)
    mean = (policy * scores).sum(1, keepdim=True)
    if baseline == "batch":
        mean = mean.mean()
    variance = (policy * (scores - mean) ** 2).sum(1, keepdim=True)
    if baseline == "batch":
        variance = variance.mean()
    return (scores - mean) / (variance.sqrt() + 1e-4) if scale else scores - mean


GRPO = dict(baseline="leave-one-out", scale=False, group_size=None, loss_type="grpo",
            ratio="sequence", kl="reward", kl_correction=False)


def grpo(world, beta, start=None, steps=1500, updates=1, **changes) -> torch.Tensor:
    variant = GRPO | changes
    names = ("loss_type", "ratio", "kl", "kl_correction")
    settings = {name: variant[name] for name in names}

    def one(logps, old_logps, ref_logps, advantage, mask):  # one completion, as a batch of one
        return grpo_loss(logps[None], old_logps[None], ref_logps[None], advantage[None], mask[None],
                         beta=beta, clip_low=0.2, clip_high=0.2, total=1, **settings)

    losses_of = torch.vmap(torch.vmap(one, (0, 0, 0, 0, 0)), (0, 0, 0, 0, None))

    def objective(logps, old_logps):
        policy, scores = old_logps.sum(2).exp(), world.rewards
        if variant["kl"] == "reward":
            scores = rewards_with_kl(scores.flatten(), old_logps.flatten(0, 1),
                                     world.ref_logps.flatten(0, 1),
                                     world.mask.repeat(len(policy), 1), beta).view_as(policy)
        advantages = population_advantages(world, scores, policy, variant)
        losses = losses_of(logps, old_logps, world.ref_logps, advantages, world.mask)
        return (policy * losses).sum()

    return with_adam(world, objective, start, steps, updates)


# --- PPO ---


def ppo(world, beta, start=None, steps=1500, lam=0.95, scale=False, updates=4) -> torch.Tensor:
    """With a critic that knows the value of every prefix."""
    mask = world.mask.repeat(len(world.ref), 1)

    def objective(logps, old_logps):
        policy = old_logps.sum(2).exp()
        rewards = kl_rewards(world.rewards.flatten(), old_logps.flatten(0, 1),
                             world.ref_logps.flatten(0, 1), mask, beta)
        returns = rewards.flip(1).cumsum(1).flip(1).view_as(logps)
        weights = policy[:, :, None].expand_as(logps)
        values = world.per_prefix(weights * returns).sum(2) / world.per_prefix(weights).sum(2)
        values = values[:, world.prefix].flatten(0, 1)
        advantages, _ = gae(rewards, values, mask, 1.0, lam)
        weights = weights.flatten(0, 1) * mask
        if scale:  # whiten(), by the exact moments; the mean is 0
            advantages = advantages / ((weights * advantages**2).sum() / weights.sum()).sqrt()
        return policy_loss(logps.flatten(0, 1), old_logps.flatten(0, 1), advantages * weights, mask,
                           0.2, 1)

    return with_adam(world, objective, start, steps, updates)


# --- DPO ---


def label_probabilities(world, flipped=0.0):
    """P(y is preferred to y') -> [P, N, N], Bradley-Terry's, or with a share of flipped labels."""
    p = torch.sigmoid(world.rewards[:, :, None] - world.rewards[:, None, :])
    return p * (1 - flipped) + (1 - p) * flipped


def dpo(world, beta, start=None, steps=1000, flipped=0.0, per_token=False, uniform=False,
        **settings) -> torch.Tensor:
    """All pairs of completions, drawn from pi_ref (or each as often)."""
    i, j = torch.triu_indices(world.ref.shape[1], world.ref.shape[1], 1)
    weight = (world.ref[:, i] + world.ref[:, j]).exp()
    if uniform:
        weight = torch.full_like(weight, 1 / weight.shape[1])
    p = label_probabilities(world, flipped)[:, i, j]

    def one_side(logps, won, lost):
        lengths = (world.lengths[won], world.lengths[lost]) if per_token else None
        losses, _, _ = dpo_loss(logps[:, won], logps[:, lost], world.ref[:, won],
                                world.ref[:, lost], beta, lengths=lengths, **settings)
        return losses

    def objective(logps, _=None):
        logps = logps.sum(2)
        return (weight * (p * one_side(logps, i, j) + (1 - p) * one_side(logps, j, i))).sum()

    if settings.get("loss_type") in ("hinge", "simpo"):  # has corners; is badly conditioned
        return with_adam(world, objective, start, 3 * steps)
    return with_lbfgs(world, objective, start, steps)


# --- likelihood: SFT, best of n, expert iteration, Quark ---


def fit_by_sft(world, target, start=None, steps=500) -> torch.Tensor:
    """Maximise the likelihood of completions that come with probabilities target [P, N]."""
    weights = target[:, :, None] * world.mask

    def objective(logps):
        return sft_loss(logps.flatten(0, 1), weights.flatten(0, 1))

    return with_lbfgs(world, objective, start, steps)


def sft_on_chosen(world, beta, start=None, steps=500) -> torch.Tensor:
    chosen = 2 * world.ref.exp() * win_rates(world, label_probabilities(world))
    return fit_by_sft(world, chosen, start, steps)


def best_of(world, beta, n=4, **_) -> torch.Tensor:
    """The weights that best_of_n.py gives to samples of pi_ref."""
    counts, rows = world.counts(world.ref.exp()), []
    for rewards, count in zip(world.rewards, counts):
        which = torch.arange(len(count)).repeat_interleave(count)
        weights = best_of_n_weights(rewards[which][None], n)[0]
        rows.append(torch.zeros_like(rewards).index_add(0, which, weights))
    return torch.stack(rows)


def expert_iteration(world, beta, rounds=1, start=None, steps=500) -> torch.Tensor:
    """All pairs of completions, the better one kept, then SFT."""
    policy, number = world.ref.exp(), world.ref.shape[1]
    pairs = torch.cartesian_prod(torch.arange(number), torch.arange(number))  # [N * N, 2]
    for _ in range(rounds):
        kept = torch.zeros_like(policy)
        for x, rewards in enumerate(world.rewards):
            best, is_better = keep_best(rewards[pairs])
            weights = policy[x][pairs].prod(1) * is_better
            kept[x].index_add_(0, pairs.gather(1, best[:, None])[:, 0], weights)
        policy = fit_by_sft(world, kept / kept.sum(1, keepdim=True), start, steps)
    return policy


def quark(world, beta, rounds=1, quantiles=5, start=None, steps=500) -> torch.Tensor:
    """The policy behind the best label; every round adds its completions to the pool."""
    prompts, number = world.ref.shape
    generator, pool = torch.Generator().manual_seed(0), torch.zeros_like(world.level)
    policy = world.ref.exp()
    for _ in range(rounds):
        pool += world.counts(policy)
        which = torch.arange(prompts * number).repeat_interleave(pool.flatten())
        which = which[torch.randperm(len(which), generator=generator)]  # who of equals is best
        labels = quantile_labels(world.rewards.flatten()[which], quantiles)
        best = torch.bincount(which[labels == quantiles], minlength=prompts * number)
        best = best.view(prompts, number).double() / len(which)
        policy = fit_by_conditioning(world, best, beta, start, steps)
    return policy


def fit_by_conditioning(world, weights, beta, start, steps) -> torch.Tensor:
    """Minimise Quark's loss on completions with these weights [P, N]."""
    weights = world.per_prefix(weights[:, :, None].expand_as(world.ref_logps)).flatten()
    tokens = world.ref_table.shape[2]
    ref = world.ref_table.log_softmax(-1).flatten(0, 1).repeat_interleave(tokens, 0)
    targets, some = torch.arange(tokens).repeat(len(ref) // tokens), weights > 0

    def one(logps, ref_logps, target):
        return conditioning_loss(logps[None], ref_logps[None], target[None], beta)[0]

    def objective(table):
        logps = table.log_softmax(-1).flatten(0, 1).repeat_interleave(tokens, 0)
        losses = [one(*row) for row in zip(logps[some], ref[some], targets[some])]
        return (weights[some] * torch.stack(losses)).sum()

    return minimise(world, objective, start, min(steps, 40))


# --- the points that theory names, computed apart ---
#
# All take (world, beta, policy). The policy that was found is read only by those that state what
# must hold at the fixed point itself, such as "beta times the deviation under the policy".


def solve(function, low, high):
    """The zero of a function that falls from low to high, by bisection: [P, 1] -> [P, 1]."""
    for _ in range(200):
        middle = (low + high) / 2
        above = function(middle) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


def optimum(world, beta, policy=None):
    return world.tilted(world.rewards / beta)


def optimum_of_smaller_advantages(world, beta, policy=None, size=8):
    return optimum(world, beta * size / (size - 1))


def optimum_by_deviation(world, beta, policy, batch=False):
    mean = (policy * world.rewards).sum(1, keepdim=True)
    if batch:
        mean = mean.mean()
    variance = (policy * (world.rewards - mean) ** 2).sum(1, keepdim=True)
    if batch:
        variance = variance.mean()
    return world.tilted(world.rewards / beta / (variance.sqrt() + 1e-4))


def optimum_of_advantages(world, beta, policy, **changes):
    """pi_ref exp(A / beta) / Z, A the mean advantage of a completion in groups of this policy."""
    variant = GRPO | changes
    advantages = population_advantages(world, world.rewards, policy, variant)
    return world.tilted(advantages / beta)


def reverse_k3(world, beta, policy=None):
    """beta pi_ref / (beta + m - r), with m = E[r] where the sum is 1."""
    best = world.rewards.amax(1, keepdim=True)

    def excess(m):
        return (beta * world.ref.exp() / (beta + m - world.rewards)).sum(1, keepdim=True) - 1

    m = solve(excess, best - beta + 1e-12, best)
    return beta * world.ref.exp() / (beta + m - world.rewards)


def squared_log_ratio(world, beta, policy):
    """The optimum of E[r] - beta / 2 E[log(pi / pi_ref)^2]: with l the log-ratio, r - beta (l^2 / 2
    + l) is the same for all completions but those with l < -1, which were given up."""
    log_ratio = policy.clamp(min=1e-300).log() - world.ref
    kept = log_ratio > -1
    values = world.rewards - beta * (0.5 * log_ratio**2 + log_ratio)
    mean = (policy * values * kept).sum(1, keepdim=True) / (policy * kept).sum(1, keepdim=True)
    root = (1 + 2 * (world.rewards - mean) / beta).clamp(min=0).sqrt()
    return torch.where(kept, world.ref.exp() * torch.exp(root - 1), 0.0)


def step_by_step(world, beta, policy=None, k3=False):
    """Each token weighs its own KL against the reward to come: pi_ref exp(Q / beta) / Z at every
    prefix, or k3's form of that, where Q = E[r | prefix, token]. Right from the last token on."""
    table, ref = world.ref_table, world.ref_table.log_softmax(-1)
    for _ in range(world.mask.shape[1] + 1):
        policy = world.token_logps(table).sum(2).exp()[:, :, None].expand_as(world.ref_logps)
        q = world.per_prefix(policy * world.rewards[:, :, None]) / world.per_prefix(policy)
        if not k3:
            table = ref + q / beta
            continue
        best = q.amax(2, keepdim=True)
        m = solve(lambda m: (beta * ref.exp() / (beta + m - q)).sum(2, keepdim=True) - 1,
                  best - beta + 1e-12, best)
        table = (beta * ref.exp() / (beta + m - q)).log()
    return world.token_logps(table).sum(2).exp()


def win_rates(world, preferred):
    """P(y is preferred to a completion of pi_ref) -> [P, N]."""
    return (preferred * world.ref.exp()[:, None, :]).sum(2)


def fitted_to_labels(world, beta, policy=None, flips=0, robust=False):
    """The rewards whose Bradley-Terry win rates against pi_ref are those of the labels, by the
    iteration of Zermelo (1929). A flip takes p to (1 - e) p + e (1 - p); robust takes it back."""
    p = label_probabilities(world)
    for _ in range(flips):
        p = p * (1 - FLIPPED) + (1 - p) * FLIPPED
    if robust:
        p = (p - FLIPPED) / (1 - 2 * FLIPPED)
    ref = world.ref.exp()
    strength = torch.ones_like(ref)
    for _ in range(5000):
        against = (ref[:, None, :] / (strength[:, :, None] + strength[:, None, :])).sum(2)
        strength = win_rates(world, p) / against
        strength = strength / (strength.log() * ref).sum(1, keepdim=True).exp()
    return world.tilted(strength.log() / beta)


def best_against_reference(world, beta, policy=None):
    return world.tilted(win_rates(world, label_probabilities(world)) / beta)


def reward_per_token(world, beta, policy=None, values=None, reference=True):
    """(pi_ref) exp(tokens (r + c) / beta): c makes the sum 1."""
    values = world.rewards if values is None else values
    start = world.ref if reference else torch.zeros_like(world.ref)

    def weights(c):
        return (start + world.lengths * (values + c) / beta).logsumexp(1, keepdim=True)

    c = solve(lambda c: weights(-c), torch.full_like(start[:, :1], -50.0),
              torch.full_like(start[:, :1], 50.0))
    return (start + world.lengths * (values - c) / beta).exp()


def ipo_per_token(world, beta, policy=None):
    return reward_per_token(world, beta, values=win_rates(world, label_probabilities(world)))


def staircase(world, beta, policy):
    """beta log(pi / pi_ref), but for a constant, is a whole number."""
    steps = beta * (policy.log() - world.ref)
    steps = steps - steps.gather(1, policy.argmax(1, keepdim=True))
    return world.tilted(steps.round() / beta)


def chosen_law(world, beta, policy=None):
    return 2 * world.ref.exp() * win_rates(world, label_probabilities(world))


def best_of_law(world, beta, policy=None, n=4, start=None):
    """Equation (1) of best_of_n.py, with ties."""
    ref = world.ref.exp() if start is None else start
    at_most = (ref[:, None, :] * (world.rewards[:, None, :] <= world.rewards[:, :, None])).sum(2)
    below = (ref[:, None, :] * (world.rewards[:, None, :] < world.rewards[:, :, None])).sum(2)
    return ref * sum(at_most**k * below ** (n - 1 - k) for k in range(n))  # (1), divided out


def expert_law(world, beta, policy=None, rounds=1):
    """Best of two, without the pairs that score alike, which are not learnt from."""
    law = world.ref.exp()
    same = world.rewards[:, None, :] == world.rewards[:, :, None]
    for _ in range(rounds):
        alike = law * (law[:, None, :] * same).sum(2)
        law = best_of_law(world, beta, n=2, start=law) - alike
        law = law / law.sum(1, keepdim=True)
    return law


def best_label_law(world, beta, policy=None, quantiles=5, rounds=1):
    """At every prefix the mean of the best fifth of the pool and, beta times, of pi_ref; pi_ref
    where none of the best fifth comes by. The fifth is that of all prompts together."""
    ref, rewards, pool = world.ref_table.softmax(-1), world.rewards, 0.0
    law = world.ref.exp()
    for _ in range(rounds):
        pool = pool + law
        weights = pool / pool.sum()
        at_least = torch.stack([(weights * (rewards >= r)).sum() for r in rewards.flatten()])
        above = torch.stack([(weights * (rewards > r)).sum() for r in rewards.flatten()])
        share = ((1 / quantiles - above) / (at_least - above)).clamp(0, 1).view_as(weights)
        best = world.per_prefix((weights * share)[:, :, None].expand_as(world.ref_logps))
        visits = best.sum(2, keepdim=True)
        mixed = (best / visits.clamp(min=1e-300) + beta * ref) / (1 + beta)
        law = world.token_logps(torch.where(visits > 0, mixed, ref).log()).sum(2).exp()
    return law


# --- the atlas ---


@dataclass
class Row:
    """A method and variant, how to find its fixed point, and the point that theory names."""

    method: str
    variant: str
    find: object  # (world, beta) -> policy [P, N]
    lands_on: str
    named: object = optimum  # (world, beta, policy) -> [P, N]; None: nothing names it


def g(variant, lands_on="pi*", named=optimum, method="GRPO", **settings):
    return Row(method, variant, partial(grpo, **settings), lands_on, named)


def d(variant, lands_on="pi*", named=optimum, method="DPO", **settings):
    return Row(method, variant, partial(dpo, **settings), lands_on, named)


OWN = "its own point"
TOKENS = dict(ratio="token", loss_type="dr_grpo")
LOSS = dict(kl="k3", kl_correction=True)
K3 = dict(kl="k3")
SCALED = dict(scale=True, baseline="group")
FIRST = "by deviation: beta sigma(x)"
MYOPIC = "step by step: exp(Q / beta)"

ROWS = [
    Row("PPO", "lambda 0.95", ppo, "pi*"),
    Row("PPO", "lambda 1, advantages whitened", partial(ppo, lam=1.0, scale=True), "pi*"),
    g("others' mean, KL in reward", method="RLOO"),
    g("mean of the batch, deviation, KL in reward", method="REINFORCE++", ratio="token",
      loss_type="dapo", baseline="batch", scale=True),
    g("KL in reward, deviation, token", **SCALED, ratio="token"),
    g("KL in reward, deviation, token, groups of 2", **SCALED, ratio="token", group_size=2),
    g("KL in reward, dapo, 4 updates", ratio="token", loss_type="dapo", updates=4),
    g("KL in reward, sequence, 4 updates", updates=4),
    g("KL in reward, GSPO, 4 updates", **SCALED, ratio="gspo", updates=4),
    g("KL in reward, CISPO, 4 updates", **SCALED, ratio="cispo", loss_type="dapo", updates=4),
    g("k3 corrected, sequence, others' mean of 8", **LOSS, group_size=8),
    g("k2, sequence, others' mean of 8", kl="k2", group_size=8),
    g("k3 corrected, sequence, own mean of 8", "pi* of beta G / (G - 1)",
      optimum_of_smaller_advantages, **LOSS, baseline="group", group_size=8),
    g("k3 corrected, sequence, deviation", FIRST, optimum_by_deviation, **LOSS, **SCALED),
    g("k3 corrected, sequence, deviation of 8", "by deviation in groups",
      partial(optimum_of_advantages, **LOSS, **SCALED, group_size=8), **LOSS, **SCALED,
      group_size=8),
    g("k3 corrected, sequence, deviation of batch", "by deviation: beta sigma",
      partial(optimum_by_deviation, batch=True), **LOSS, scale=True, baseline="batch"),
    g("k3, sequence", "beta pi_ref / (beta + E[r] - r)", reverse_k3, **K3),
    g("k2 corrected, sequence", "optimum of the squared log-ratio", squared_log_ratio, kl="k2",
      kl_correction=True),
    g("k3 corrected, token", MYOPIC, step_by_step, **LOSS, **TOKENS),
    g("k2, token", MYOPIC, step_by_step, kl="k2", **TOKENS),
    g("k3, token", "step by step: beta / (beta + V - Q)", partial(step_by_step, k3=True), **K3,
      **TOKENS),
    g("k3, CISPO, dapo", "step by step: beta / (beta + V - Q)", partial(step_by_step, k3=True),
      **K3, ratio="cispo", loss_type="dapo"),
    g("k3 corrected, token, mean per completion", OWN, None, **LOSS, ratio="token"),
    g("k3, token, deviation of 8 (DeepSeekMath)", OWN, None, **K3, **SCALED, ratio="token",
      group_size=8),
    g("k3, GSPO, deviation of 8", OWN, None, **K3, **SCALED, ratio="gspo", group_size=8),
    d("clean labels"),
    d("clean labels, pairs drawn uniformly", uniform=True),
    d("flipped labels", "labels flipped once", partial(fitted_to_labels, flips=1),
      flipped=FLIPPED),
    d("clean labels", "labels flipped once", partial(fitted_to_labels, flips=1), method="cDPO",
      label_smoothing=FLIPPED),
    d("flipped labels", "labels flipped twice", partial(fitted_to_labels, flips=2), method="cDPO",
      label_smoothing=FLIPPED, flipped=FLIPPED),
    d("flipped labels", method="robust DPO", loss_type="robust", label_smoothing=FLIPPED,
      flipped=FLIPPED),
    d("clean labels", "labels surer than they are", partial(fitted_to_labels, robust=True),
      method="robust DPO", loss_type="robust", label_smoothing=FLIPPED),
    d("", "pi* of p(y > pi_ref)", best_against_reference, method="IPO", loss_type="ipo"),
    d("per token", "exp(tokens (p(y > pi_ref) + c) / beta)", ipo_per_token, method="IPO",
      loss_type="ipo", per_token=True),
    d("", "a staircase of whole steps", staircase, method="hinge", loss_type="hinge"),
    d("per token", "exp(tokens (r + c) / beta)", reward_per_token, per_token=True),
    d("margin 0", "the same without pi_ref", partial(reward_per_token, reference=False),
      method="SimPO", loss_type="simpo", per_token=True),
    d("margin 0.5", OWN, None, method="SimPO", loss_type="simpo", per_token=True,
      target_margin=0.5),
    Row("best of n", "n = 4", best_of, "law of best of n", best_of_law),
    Row("best of n", "n = 16", partial(best_of, n=16), "law of best of n",
        partial(best_of_law, n=16)),
    Row("expert iteration", "best of 2, 1 round", expert_iteration, "best of 2 of unequal pairs",
        expert_law),
    Row("expert iteration", "best of 2, 3 rounds", partial(expert_iteration, rounds=3),
        "best of 2 of unequal pairs, thrice", partial(expert_law, rounds=3)),
    Row("Quark", "1 round", quark, "best fifth and pi_ref, per token", best_label_law),
    Row("Quark", "6 rounds", partial(quark, rounds=6), "the same of six rounds' pool",
        partial(best_label_law, rounds=6)),
    Row("SFT on chosen", "", sft_on_chosen, "2 pi_ref p(y > pi_ref)", chosen_law),
]


def total_variation(policy, other) -> float:
    """Of the worst prompt."""
    return 0.5 * (policy - other).abs().sum(1).max().item()


def reward_and_kl(world, policy) -> tuple[float, float]:
    """Means over prompts."""
    kl = torch.xlogy(policy, policy) - policy * world.ref
    return (policy * world.rewards).sum(1).mean().item(), kl.sum(1).mean().item()


def most_reward(world, kl: float) -> float:
    """The highest mean reward at this mean KL: that of pi*, whose beta is found by bisection."""
    low, high = 1e-3, 1e6
    for _ in range(200):
        beta = (low * high) ** 0.5
        if reward_and_kl(world, optimum(world, beta))[1] > kl:
            low = beta
        else:
            high = beta
    return reward_and_kl(world, optimum(world, low))[0]


def measured(world, row: Row, beta: float, policy) -> dict:
    reward, kl = reward_and_kl(world, policy)
    start, _ = reward_and_kl(world, world.ref.exp())
    best, log_best = most_reward(world, kl), (world.ref + world.rewards / beta).log_softmax(1)
    to_optimum = (torch.xlogy(policy, policy) - policy * log_best).sum(1).mean().item()
    tv_named = None
    if row.named:
        tv_named = total_variation(policy, row.named(world, beta, policy))
    return {
        "method": row.method,
        "variant": row.variant,
        "beta": beta,
        "tv": total_variation(policy, optimum(world, beta)),
        "kl_to_optimum": to_optimum,
        "reward": reward,
        "kl": kl,
        "share_of_optimum": (reward - start) / (best - start),
        "most_reward": best,
        "mean_length": (policy * world.lengths).sum(1).mean().item(),
        "lands_on": row.lands_on,
        "tv_named": tv_named,
    }


def one(job) -> dict:
    torch.set_num_threads(1)
    index, beta = job
    began, world = time.time(), World()
    result = measured(world, ROWS[index], beta, ROWS[index].find(world, beta))
    return result | {"seconds": time.time() - began}


# --- table and figure ---


def as_text(row: dict) -> list[str]:
    named = "-" if row["tv_named"] is None else f"{row['tv_named']:.4f}"
    return [row["method"], row["variant"], f"{row['beta']}", f"{row['tv']:.4f}",
            f"{row['kl_to_optimum']:.4f}", f"{row['reward']:.3f}", f"{row['kl']:.3f}",
            f"{row['share_of_optimum']:.1%}", f"{row['mean_length']:.2f}", row["lands_on"], named]


def markdown(rows: list[dict]) -> str:
    """The table of docs/results.md: one line for each variant, both betas in it."""
    small, large = BETAS
    lines = [f"| method | variant | lands on | tv, β = {small} | tv, β = {large} | "
             f"share, β = {small} | share, β = {large} | length, β = {small} |",
             "|---|---|---|---|---|---|---|---|"]
    for first, second in zip(rows[0::2], rows[1::2]):
        numbers = [f"{row['tv']:.3f}" for row in (first, second)]
        numbers += [f"{row['share_of_optimum']:.1%}" for row in (first, second)]
        cells = [first["method"], first["variant"], first["lands_on"], *numbers,
                 f"{first['mean_length']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], curve: list, path: Path) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6))
    colors = {method: f"C{i}" if i < 10 else "black"
              for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for axis, beta in zip(axes, BETAS):
        own = [row for row in rows if row["beta"] == beta]
        axis.plot([kl for kl, _ in curve], [reward for _, reward in curve], color="black", lw=1,
                  label="no policy can be above")
        seen = set()
        for row in own:
            exact = row["lands_on"] == "pi*"
            axis.plot(row["kl"], row["reward"], "*" if exact else "o", ms=15 if exact else 5,
                      color="gold" if exact else colors[row["method"]], mec="black", mew=0.4)
            place = round(row["kl"], 1), round(row["reward"], 1)
            if not exact and place not in seen:
                seen.add(place)
                axis.annotate(f"{row['method']} {row['variant']}", (row["kl"], row["reward"]),
                              xytext=(4, -7), textcoords="offset points", fontsize=6)
        landed = sum(row["lands_on"] == "pi*" for row in own)
        axis.plot([], [], "*", ms=12, color="gold", mec="black",
                  label=f"π*: {landed} of {len(own)} variants land here")
        axis.set(title=f"β = {beta}", xlabel="KL to the reference, nats", ylabel="reward",
                 xlim=(0, 1.15 * max(row["kl"] for row in own)))
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    began, world = time.time(), World()
    jobs = [(index, beta) for index in range(len(ROWS)) for beta in BETAS]
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(one, jobs))
    print_table([["method", "variant", "beta", "tv", "KL to pi*", "reward", "KL", "share", "length",
                  "lands on", "tv to it"], *map(as_text, rows)])
    betas = torch.logspace(-1.3, 2, 200, dtype=torch.float64).tolist()
    points = [reward_and_kl(world, optimum(world, beta)) for beta in betas]
    curve = [(2 * points[0][1], points[0][0])] + [(kl, reward) for reward, kl in points]
    saved = {"betas": BETAS, "flipped": FLIPPED, "rows": rows, "curve": curve,
             "seconds": round(time.time() - began)}
    (RESULTS / "fixed_points.json").write_text(json.dumps(saved, indent=1) + "\n")
    print(f"{len(rows)} rows in {saved['seconds']} s, saved to {RESULTS / 'fixed_points.json'}")
    try:
        draw(rows, curve, RESULTS / "fixed_points.png")
    except ModuleNotFoundError:
        print("no figure: pip install -r experiments/requirements.txt")


if __name__ == "__main__":
    main()
