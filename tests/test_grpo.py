"""grpo_loss against TRL's numbers, GRPO against the optimum it aims at, and grpo.py as its users
run it."""

import itertools
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import grpo
from common import generate, load_model, load_tokenizer, make_row, pad_rows, token_logprobs
from conftest import ROOT
from grpo import (
    Experience, add_gradients, group_advantages, grpo_loss, kl_k3, loss_total, ratio_metrics,
    rollout_logprobs, rows_to_learn_from
)
from test_runs import kill_at, metrics_of, run

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "grpo.json").read_text())
MASK = torch.tensor(EXPECTED["inputs"]["completion_mask"])
LOGPS, OLD, REF = (torch.tensor(EXPECTED[f"{name}_per_token_logps"])
                   for name in ("policy", "old", "ref"))
ADVANTAGES = torch.tensor(EXPECTED["advantages"])


# --- other people's numbers ---


def test_golden_advantages():
    rewards = torch.tensor(EXPECTED["rewards"])
    for scale, name in ((True, "group"), (False, "none")):
        expected = torch.tensor(EXPECTED["advantages_from_rewards"][name])
        ours = group_advantages(rewards, 4, scale)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_golden_k3():
    expected = torch.tensor(EXPECTED["kl_k3_per_token"])
    k3 = kl_k3(LOGPS, REF)
    torch.testing.assert_close(k3, expected, rtol=1e-5, atol=1e-5)
    mean = (k3 * MASK).sum().item() / MASK.sum().item()
    assert mean == pytest.approx(EXPECTED["kl_k3_mean"], abs=1e-5)


def golden_kwargs(settings):
    """TRL's dapo divides by num_items_in_batch; its dr_grpo by completions x longest allowed, as
    wide as the mask."""
    return dict(
        beta=settings["beta"],
        clip_low=settings["epsilon_low"],
        clip_high=settings["epsilon_high"],
        loss_type=settings["loss_type"],
        kl_correction=settings["use_bias_correction_kl"],
        total=settings["num_items_in_batch"] if settings["loss_type"] == "dapo" else None,
    )


@pytest.mark.parametrize("name", EXPECTED["expected"])
def test_golden_losses(name):
    settings = EXPECTED["expected"][name]["settings"]
    old = LOGPS if settings["old_is_policy"] else OLD
    kwargs = golden_kwargs(settings)
    if settings["importance_sampling_level"] == "token":
        loss = grpo_loss(LOGPS, old, REF, ADVANTAGES, MASK, **kwargs)
    else:
        # TRL's is GSPO's: fed with log-probabilities divided by the length, ours gives it; its KL
        # stays that of tokens.
        lengths, no_kl = MASK.sum(1, keepdim=True), {**kwargs, "beta": 0.0}
        policy = grpo_loss(LOGPS / lengths, old / lengths, REF, ADVANTAGES, MASK, **no_kl,
                           ratio="sequence")
        loss = policy + grpo_loss(LOGPS, LOGPS, REF, torch.zeros(12), MASK, **kwargs)
    assert loss.item() == pytest.approx(EXPECTED["expected"][name]["loss"], abs=1e-5)


def golden_rows():
    """TRL pads prompts on the left; ours are padded on the right, after their completions."""
    inputs, rows = EXPECTED["inputs"], []
    for i in range(12):
        parts = []
        for part in ("prompt", "completion"):
            pairs = zip(inputs[f"{part}_ids"][i], inputs[f"{part}_mask"][i])
            parts.append([token for token, real in pairs if real])
        rows.append(make_row(*parts))
    return rows


@pytest.fixture(scope="module")
def golden():
    """-> policy, and the golden completions with the log-probabilities of all three models"""
    rows = golden_rows()
    input_ids, mask = pad_rows(rows)
    rollout = SimpleNamespace(rows=rows, logps=torch.zeros(mask.shape))
    policy, old, reference = (load_model(str(GOLDEN / name)) for name in ("policy", "old", "ref"))
    with torch.no_grad():
        old_logps = token_logprobs(old, input_ids, mask)
    ref_logps = rollout_logprobs(reference, rollout, grpo.Args(micro_batch_size=5))
    return policy, Experience(
        examples=[], rows=rows, mask=mask, advantages=ADVANTAGES, ref_logps=ref_logps,
        old_logps=old_logps, indices=list(range(12)), total=12,
    )


def of_completions(values, mask):
    """Each token's value, completion after completion, whatever the padding."""
    return values[mask.bool()]


def test_golden_ids_to_logprobs(golden):
    policy, experience = golden
    mask = experience.mask
    input_ids, _ = pad_rows(experience.rows)
    with torch.no_grad():
        logps = token_logprobs(policy, input_ids, mask)
        at_0p7 = token_logprobs(policy, input_ids, mask, 0.7)
    expected_0p7 = torch.tensor(EXPECTED["policy_per_token_logps_temperature0p7"])
    for ours, theirs in ((logps, LOGPS), (experience.old_logps, OLD), (experience.ref_logps, REF),
                         (at_0p7, expected_0p7)):
        torch.testing.assert_close(of_completions(ours, mask), of_completions(theirs, MASK),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("name", ["beta0p04_eps0p2", "beta0p04_eps0p2_trl_default_kl",
                                  "beta0p04_onpolicy"])
def test_golden_ids_to_loss_to_gradient(golden, name, loss_type):
    """The whole path: log-probabilities in micro-batches, the loss, and every weight's gradient."""
    policy, experience = golden
    policy.zero_grad()
    expected = EXPECTED["expected"][f"{loss_type}/{name}"]
    settings = expected["settings"]
    if settings["old_is_policy"]:
        experience = replace(experience, old_logps=None)
    args = grpo.Args(loss_type=loss_type, beta=settings["beta"], clip=settings["epsilon_low"],
                     clip_high=settings["epsilon_high"], max_new_tokens=10, micro_batch_size=5,
                     kl_correction=settings["use_bias_correction_kl"])
    experience = replace(experience, total=loss_total(experience.mask, args))
    loss, _ = add_gradients(policy, experience, args)
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    if name == "beta0p04_eps0p2":
        gradients = load_file(GOLDEN / f"grads_grpo_{loss_type}.safetensors")
        atol = 1e-6 * max(gradient.abs().max() for gradient in gradients.values()).item()
        for n, parameter in policy.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=atol)


# --- what a line means ---


def test_equal_rewards_give_exactly_zero():
    for size in (3, 6, 7):  # the mean of so many equal numbers is not that number in floating point
        assert group_advantages(torch.full((2 * size,), 0.1), size).abs().max() == 0


def test_the_course_s_equation_by_hand():
    """ratio "sequence" is (1) to the letter, whole completions in ratio and KL; GSPO's ratio is its
    geometric mean, which leaves the clipping range less often."""
    length = MASK.sum(1)
    rho = ((LOGPS - OLD) * MASK).sum(1).exp()
    d = ((REF - LOGPS) * MASK).sum(1)
    clipped = rho.clamp(0.8, 1.3)
    objective = torch.min(rho * ADVANTAGES, clipped * ADVANTAGES) - 1e-6 * (d.exp() - d - 1)
    loss = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=1e-6, clip_low=0.2, clip_high=0.3,
                     loss_type="grpo", ratio="sequence")
    torch.testing.assert_close(loss, -objective.mean(), rtol=1e-5, atol=1e-5)
    outside, gspo_outside = (((r < 0.8) | (r > 1.3)).sum() for r in (rho, rho ** (1 / length)))
    assert outside > gspo_outside


@pytest.mark.parametrize("loss_type, ratio, weight", [
    ("grpo", "token", 1 / MASK.sum(1) / 12),
    ("grpo", "sequence", torch.ones(12) / 12),
    ("dapo", "token", torch.ones(12) / MASK.sum()),
    ("dr_grpo", "token", torch.ones(12) / 120),
])
def test_at_ratio_1_the_gradient_is_reinforce_with_group_advantages(loss_type, ratio, weight):
    """A completion's weight: 1 / tokens in DeepSeekMath's mean, the same for all in (1) and with a
    constant or global total."""
    advantages = group_advantages(torch.tensor(EXPECTED["rewards"]), 4)
    logps, twin = LOGPS.clone().requires_grad_(), LOGPS.clone().requires_grad_()
    grpo_loss(logps, LOGPS, REF, advantages, MASK, beta=0.0, clip_low=0.2, clip_high=0.2,
              loss_type=loss_type, ratio=ratio).backward()
    (-(weight * advantages) @ (twin * MASK).sum(1)).backward()
    torch.testing.assert_close(logps.grad, twin.grad, rtol=1e-5, atol=1e-8)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="dr_grpo"):
        grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=0.0, clip_low=0.2, clip_high=0.2,
                  loss_type="bnpo")


@pytest.fixture(scope="module")
def sampled():
    """-> tiny-sft, and a rollout of it, groups of two"""
    model, tokenizer = (load(str(ROOT / "assets" / "tiny-sft"))
                        for load in (load_model, load_tokenizer))
    torch.manual_seed(1)
    prompts = ["Q: 3+4?", "Review of The Lost King, a drama:", "Q: 37+58?",
               "Review of The Silent House, a thriller:"]
    rollout = generate(model, tokenizer, prompts, 2, 12)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2  # or little is tested
    return model, rollout


def experience_of(rollout, advantages, args):
    """As collect() makes it, with a reference that is less sure."""
    mask = rollout.completion_mask.bool()
    ref_logps = rollout.logps - 0.3 * mask
    return Experience(
        examples=[], rows=rollout.rows, mask=mask, advantages=advantages, ref_logps=ref_logps,
        indices=rows_to_learn_from(advantages, mask, args.beta), total=loss_total(mask, args),
    )


def gradient(model, experience, args):
    """-> loss, the gradient of all weights in one vector"""
    loss, _ = add_gradients(model, experience, args)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss, flat


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_1_by_8_and_8_by_1_give_the_same_gradient(sampled, loss_type):
    model, rollout = sampled
    args = grpo.Args(loss_type=loss_type, beta=0.1, max_new_tokens=12)
    experience = experience_of(rollout, torch.randn(8), args)
    noise = 0.1 * torch.randn_like(rollout.logps) * experience.mask
    experience.old_logps = rollout.logps + noise
    (loss, flat), (loss_apart, flat_apart) = (
        gradient(model, experience, replace(args, micro_batch_size=size)) for size in (8, 1))
    assert loss == pytest.approx(loss_apart, abs=1e-6)
    assert flat.norm() > 0.01
    assert (flat - flat_apart).abs().max() < 1e-6 * max(1, flat.norm())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_groups_of_equal_rewards_are_skipped_without_changing_the_gradient(sampled, loss_type):
    model, rollout = sampled
    args = grpo.Args(loss_type=loss_type, max_new_tokens=12)
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.3, 1.0, 1.0, 0.0, 0.5])
    experience = experience_of(rollout, group_advantages(rewards, 2), args)
    assert experience.indices == [0, 1, 6, 7]
    loss, some = gradient(model, experience, args)
    everything = replace(experience, indices=list(range(8)))
    loss_of_all, all_of_them = gradient(model, everything, args)
    assert loss == pytest.approx(loss_of_all, abs=1e-6) and some.norm() > 0.01
    assert (some - all_of_them).abs().max() < 1e-6 * max(1, some.norm())
    # The KL has a gradient everywhere.
    assert rows_to_learn_from(experience.advantages, experience.mask, 0.1) == list(range(8))
    # Nothing to learn: one row, and a gradient of zeros.
    nothing = experience_of(rollout, torch.zeros(8), args)
    _, zeros = gradient(model, nothing, args)
    assert nothing.indices == [0] and zeros.abs().max() == 0


def test_truncated_completions_leave_the_loss(sampled):
    model, rollout = sampled
    rewards, ended = torch.randn(8), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    args = grpo.Args(samples_per_prompt=2, mask_truncated=True)
    masked = grpo.collect(model, model, replace(rollout, ended=ended), rewards, args)
    assert torch.equal(masked.advantages, group_advantages(rewards, 2))  # still in their group
    assert masked.indices == ended.nonzero().flatten().tolist()
    _, flat = gradient(model, masked, args)
    fewer = torch.where(ended, masked.advantages, 0.0) * 8 / 6  # the mean is over six completions
    _, expected = gradient(model, experience_of(rollout, fewer, args), args)
    torch.testing.assert_close(flat, expected, rtol=1e-4, atol=1e-6)


def test_the_ratio_of_the_first_update_is_exactly_1(sampled):
    model, rollout = sampled
    args = grpo.Args(max_new_tokens=12)
    experience = experience_of(rollout, torch.randn(8), args)
    _, logps = add_gradients(model, experience, args)
    torch.testing.assert_close(logps, rollout.logps, rtol=0, atol=1e-4)  # up to rounding
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    experience.old_logps = logps
    _, again = add_gradients(model, experience, args)
    assert torch.equal(logps, again)
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters()))
    model.zero_grad()
    metrics = ratio_metrics(again, experience, args)
    assert metrics == {"ratio": 1.0, "clipped_low": 0.0, "clipped_high": 0.0}


def test_what_clipping_leaves_without_a_gradient_is_logged():
    mask = torch.ones(2, 4, dtype=torch.long)
    ratios = torch.tensor([[0.5, 0.9, 1.25, 1.5], [0.5, 0.9, 1.25, 1.5]])
    nothing, advantages = torch.zeros(2, 4), torch.tensor([1.0, -1.0])
    experience = Experience(examples=[], rows=[], mask=mask, advantages=advantages,
                            ref_logps=nothing, old_logps=nothing, indices=[0, 1], total=2)
    args = grpo.Args(clip=0.2, clip_high=0.3)
    metrics = ratio_metrics(ratios.log(), experience, args)
    assert metrics == pytest.approx({"ratio": 1.0375, "clipped_low": 1 / 8, "clipped_high": 1 / 8})


# --- exact: every sequence of a small language ---
#
# As in test_dpo.py: two prompts, three tokens, every sequence up to three tokens, and a table of
# logits for every prefix.

ALL = [s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n)]
SEQUENCES = [s for s in ALL if 0 not in s[:-1] and (s[-1] == 0 or len(s) == 3)]
NOT_ENDED = [s for n in (0, 1, 2) for s in itertools.product((1, 2), repeat=n)]
PREFIXES = {s: i for i, s in enumerate(NOT_ENDED)}
AT = torch.zeros(15, 3, dtype=torch.long)  # the prefix before each token of each sequence
TOKEN = torch.zeros(15, 3, dtype=torch.long)
WRITTEN = torch.zeros(15, 3, dtype=torch.float64)
for number, sequence in enumerate(SEQUENCES):
    for t, token in enumerate(sequence):
        AT[number, t], TOKEN[number, t] = PREFIXES[sequence[:t]], token
        WRITTEN[number, t] = 1


def token_logps(table):
    """Logits [2 prompts, 7 prefixes, 3 tokens] -> log-probabilities of each sequence's tokens
    [2, 15, 3]."""
    return table.log_softmax(-1)[:, AT, TOKEN] * WRITTEN


def small_world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref_table = torch.randn(2, len(PREFIXES), 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(2, len(SEQUENCES), generator=generator, dtype=torch.float64)
    return ref_table, token_logps(ref_table).sum(2), rewards


def expected_advantages(probabilities, rewards, scale, group_size):
    """What a completion's advantage is on average over the rest of its group -> [15]; group_size
    None: of infinite size."""
    if group_size is None:
        advantages = rewards - probabilities @ rewards
        return advantages / (probabilities @ advantages**2).sqrt() if scale else advantages
    others = torch.tensor(list(itertools.product(range(15), repeat=group_size - 1)))  # [n, G - 1]
    first = torch.arange(15)[:, None, None].expand(15, len(others), 1)
    groups = torch.cat([first, others.expand(15, -1, -1)], 2)  # [15, n, G]
    advantages = group_advantages(rewards[groups].flatten(), group_size, scale)
    advantages = advantages.view(15, len(others), group_size)[..., 0]
    return advantages @ probabilities[others].prod(1)


def fixed_point(beta, scale, group_size=None, loss_type="grpo", ratio="sequence",
                kl_correction=True):
    """Where the expected on-policy gradient of grpo_loss vanishes -> pi [2, 15]: gradient steps, no
    sampling."""
    ref_table, _, rewards = small_world()
    table = ref_table.clone().requires_grad_()
    ref_logps, optimizer = token_logps(ref_table), torch.optim.Adam([table], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def one(logps, old_logps, ref_logps, advantage, mask):  # one completion, as a batch of one
        return grpo_loss(logps[None], old_logps[None], ref_logps[None], advantage[None], mask[None],
                         beta=beta, clip_low=0.2, clip_high=0.2, loss_type=loss_type, ratio=ratio,
                         kl_correction=kl_correction, total=1)

    for _ in range(400):
        logps = token_logps(table)
        old_logps = logps.detach()
        probabilities = old_logps.sum(2).exp()  # [2, 15]
        loss = 0.0
        for x in range(2):
            advantages = expected_advantages(probabilities[x], rewards[x], scale, group_size)
            losses = torch.vmap(one)(logps[x], old_logps[x], ref_logps[x], advantages, WRITTEN)
            loss = loss + probabilities[x] @ losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert table.grad.abs().max() < 2e-3
    return token_logps(table.detach()).sum(2).exp()


def total_variation(policy, other):
    return 0.5 * (policy - other).abs().sum(1).max().item()


def distance(policy, beta):
    """Total variation from pi* -> the larger of the two prompts'."""
    _, ref_logps, rewards = small_world()
    return total_variation(policy, (ref_logps + rewards / beta).softmax(1))


def test_k3_is_not_negative_and_its_mean_is_the_kl():
    ref_table, ref_logps, _ = small_world()
    tokens, ref_tokens = token_logps(small_world(1)[0]), token_logps(ref_table)
    logps = tokens.sum(2)
    exact = (logps.exp() * (logps - ref_logps)).sum(1)
    assert kl_k3(logps, ref_logps).min() >= 0 and exact.min() > 0.1
    of_wholes = kl_k3(logps, ref_logps)
    of_tokens = kl_k3(tokens, ref_tokens).sum(2)
    torch.testing.assert_close((logps.exp() * of_wholes).sum(1), exact)
    torch.testing.assert_close((logps.exp() * of_tokens).sum(1), exact)


def test_mean_only_advantages_with_the_exact_kl_gradient_reach_the_optimum():
    _, ref_logps, _ = small_world()
    assert distance(ref_logps.exp(), 0.5) > 0.15  # there is something to learn
    assert distance(fixed_point(0.5, scale=False), 0.5) < 0.005


def test_a_finite_group_s_own_mean_makes_beta_larger():
    """r_i is part of its own mean: advantages shrink by 1 - 1/G."""
    finite = fixed_point(0.5, scale=False, group_size=3)
    assert distance(finite, 0.5 * 3 / 2) < 0.005 < 0.03 < distance(finite, 0.5)


def test_k3_as_a_loss_lands_elsewhere():
    """Its gradient is that of KL(pi_ref || pi): at the fixed point pi (beta + E[r] - r) = beta
    pi_ref, not pi*."""
    _, ref_logps, rewards = small_world()
    policy = fixed_point(0.5, scale=False, kl_correction=False)
    mean = (policy * rewards).sum(1, keepdim=True)
    left = policy * (0.5 + mean - rewards)
    torch.testing.assert_close(left, 0.5 * ref_logps.exp(), rtol=0, atol=0.01)
    assert 0.6 < distance(policy, 0.5) < 0.75


def test_k3_of_tokens_lands_elsewhere_even_when_corrected():
    """The ratio of a token corrects for that token's distribution, not for the prefixes that the
    policy comes to write."""
    policy = fixed_point(0.5, scale=False, loss_type="dr_grpo", ratio="token")
    assert 0.45 < distance(policy, 0.5) < 0.65


def test_std_scaling_lands_elsewhere():
    """Where rewards have deviation sigma(x) under the policy, beta acts as beta sigma(x): another
    pi* for each prompt, and the surer the policy, the weaker the KL."""
    _, ref_logps, rewards = small_world()
    policy = fixed_point(1.0, scale=True)
    variance = (policy * rewards**2).sum(1) - (policy * rewards).sum(1) ** 2
    own = (ref_logps + rewards / variance.sqrt()[:, None]).softmax(1)
    assert total_variation(policy, own) < 0.01
    assert 0.35 < distance(policy, 1.0) < 0.45


# --- as its users run it ---

QUICK = ["--max-steps", "6", "--batch-size", "4", "--samples-per-prompt", "4", "--eval-every", "2",
         "--save-every", "2", "--eval-prompts", "20", "--eval-samples", "2", "--beta", "0.1",
         "--updates-per-rollout", "2", "--split", "train[:100]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo")
    status, _, errors = run("grpo", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory


def without_speeds(directory):
    return [{name: value for name, value in row.items() if not name.endswith("tokens_per_s")}
            for row in metrics_of(directory)]


def train_rows(directory):
    return [row for row in metrics_of(directory) if row["phase"] == "train"]


def test_run_directory(finished):
    rows = metrics_of(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    updates = train_rows(finished)
    assert all(row["ratio_first"] == 1.0 and row["sampling_gap"] < 1e-4 for row in updates)
    assert all(row["ratio"] != 1.0 for row in updates[1:])  # the second update on a rollout
    assert updates[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(row["kl"] >= 0 for row in updates)
    for part in ("rollout", "scoring", "update"):
        assert all(row[f"{part}_tokens_per_s"] > 0 for row in updates)
    results = json.loads((finished / "results.json").read_text())
    assert set(results) >= {"pass_at_1_ref", "pass_at_1", "pass_at_k_ref", "pass_at_k",
                            "greedy_accuracy_ref", "greedy_accuracy", "reward_ref",
                            "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
                            "win_rate_se", "ended", "seconds"}
    assert results["pass_at_k"] >= results["pass_at_1"]
    assert all(isinstance(value, (int, float)) for value in results.values())
    lines = (finished / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["step"] for sample in samples} == {0, 2, 4, 6}
    assert all("reward" in sample for sample in samples)


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    for lines in (5, 9):  # of metrics.jsonl: after one checkpoint, and after the last update
        kill_at(lines, "grpo", *QUICK, directory=tmp_path)
    status, output, errors = run("grpo", *QUICK, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "resuming" in output, errors
    assert without_speeds(tmp_path) == without_speeds(finished)
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_loss_type_on_the_command_line():
    status, _, errors = run("grpo", "--loss-type", "bnpo")
    assert status == 2 and "bnpo" in errors


REWARD = "import time\ndef reward(prompts, completions, **columns):\n    "
FOREVER = "while True:\n        pass"
SLEEPS = "try:\n        time.sleep(100)\n    except Exception:\n        pass"
OTHER_DATA = ["--dataset", ROOT / "assets" / "data" / "review_prompts.jsonl"]
SECOND = "[p == 'Q: 10+97?' for p in prompts]"  # row 2 of the held-out file
MISTAKES = {
    # name: (flags, body of a reward function, what the line must name)
    "a group of one": (["--samples-per-prompt", "1"], None, "--samples-per-prompt"),
    "no update": (["--updates-per-rollout", "0"], None, "--updates-per-rollout"),
    "no sample": (["--eval-samples", "0"], None, "--eval-samples"),
    "a negative clipping range": (["--clip", "-0.1"], None, "--clip"),
    "a negative beta": (["--beta", "-0.1"], None, "--beta"),
    "no reward": (OTHER_DATA, None, "--reward-fn"),
    "a missing prompt column": (["--prompt-column", "question"], None, "question"),
    "no room for completions": (["--max-new-tokens", "255"], None, "--max-new-tokens"),
    "weights without functions": (["--reward-weights", "1", "2"], None, "--reward-weights"),
    "two kinds of reward": (["--reward-model", "m"], "return [0.0]", "--reward-model"),
    "a function that raises": ([], "return [1 / (p != p) for p in prompts]", "ZeroDivisionError"),
    "a function that fails on batches only": (
        [], "return [0.0] if len(prompts) == 1 else 1 / 0", "ZeroDivisionError"),
    "a reward that is not a number": (
        [], f"return [float('nan' if x else 1) for x in {SECOND}]", "row 2"),
    "too few rewards": ([], "return [0.0]", "1 numbers for"),
    "no function that applies": ([], f"return [None if x else 1.0 for x in {SECOND}]", "row 2"),
    "a function that sleeps": (["--reward-timeout", "0.2"], SLEEPS, "--reward-timeout"),
    "a function that loops": (["--reward-timeout", "0.2"], FOREVER, "--reward-timeout"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch):
    flags, body, what = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    if body:
        (tmp_path / "r.py").write_text(REWARD + body)
        flags = [*flags, "--reward-fn", "r.py:reward"]
    status, _, errors = run("grpo", "--max-steps", 1, "--eval-prompts", 20, *flags)
    assert status == 2
    assert errors.startswith("grpo.py: error: ") and errors.count("\n") == 1, errors
    assert what in errors and len(errors) < 500, errors


def test_a_reward_function_that_fails_loses_nothing(finished, tmp_path, monkeypatch):
    """It fails in the fourth rollout, between checkpoints; repaired, the run ends as it would have
    ended."""
    body = """from pathlib import Path
    metrics = Path("runs/grpo/metrics.jsonl")
    if len(prompts) == 16 and Path("broken").exists():
        if metrics.read_text().count("grad_norm") == 3:
            return 1 / 0
    return [float(text.strip() == right) for text, right in zip(completions, columns["answer"])]
"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARD + body)
    (tmp_path / "broken").touch()
    flags = [*QUICK, "--reward-fn", "r.py:reward"]
    status, _, errors = run("grpo", *flags)
    assert status == 2 and "ZeroDivisionError" in errors
    assert len(train_rows(tmp_path / "runs" / "grpo")) == 3
    (tmp_path / "broken").unlink()
    status, _, errors = run("grpo", *flags, "--resume")
    assert (status, errors) == (0, "")
    assert without_speeds(tmp_path / "runs" / "grpo") == without_speeds(finished)


def test_several_rewards_are_weighted_and_logged_apart(tmp_path, monkeypatch):
    """One of them says None: there the others count alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(
        REWARD + "return [1.0] * len(prompts)\n"
        "def short(prompts, completions, **columns):\n"
        "    return [float(len(text) < 4) for text in completions]\n"
        "def nothing(prompts, **columns):\n"
        "    return [None] * len(prompts)\n")
    functions = ["r.py:reward", "r.py:short", "r.py:nothing"]
    flags = ["--reward-fn", *functions, "--reward-weights", 0.5, 2, 7, "--max-steps", 2,
             "--batch-size", 8, "--eval-prompts", 4]
    status, _, errors = run("grpo", *flags)
    assert (status, errors) == (0, "")
    rows = train_rows(tmp_path / "runs" / "grpo")
    assert len(rows) == 2
    for row in rows:
        assert row["reward_1"] == 1.0 and row["reward_3"] is None
        assert row["reward"] == pytest.approx(0.5 + 2 * row["reward_2"], abs=1e-6)


def test_questions_and_final_numbers(tmp_path, monkeypatch):
    """GSM8K's columns: the prompt is `question`, and `answer` reaches the reward function."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Q: {i}+{i}?", "answer": f"Twice {i} is {2 * i}.\n#### {2 * i}"}
            for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--dataset", "d.jsonl", "--prompt-column", "question", "--reward-fn",
             ROOT / "assets" / "rewards.py:final_number", "--max-steps", 2, "--batch-size", 4]
    status, _, errors = run("grpo", *flags)
    assert (status, errors) == (0, "")
    results = json.loads((tmp_path / "runs" / "grpo" / "results.json").read_text())
    assert results["pass_at_k_ref"] > 0 and results["reward_ref"] <= 1


def test_final_number():
    sys.path.insert(0, str(ROOT / "assets"))
    from rewards import final_number
    texts = {"#### 42": 1, "so she has 42": 1, "The answer is 42.": 1, "$42.00": 1,
             "41, no: 42": 1, "42 or 43": 0, "\\boxed{42}": 1, "": 0, "none": 0, "-42": 0,
             "142": 0, "#### 42\nQ: 7+7?": 1, "1,042": 0}
    right = final_number(list(texts), list(texts), ["6 * 7 = 42\n#### 42"] * len(texts))
    assert right == [float(value) for value in texts.values()]
    answers = ["#### 1,234", "1,234.0", "#### -5"]
    assert final_number(["q"] * 3, ["1,234", "1234", "-5"], answers) == [1.0, 1.0, 1.0]
    turn = [{"role": "assistant", "content": "It is 7"}]
    assert final_number(["q"], [turn], ["#### 7"]) == [1.0]
