"""grpo_loss against TRL's numbers, GRPO against the optimum it aims at, and grpo.py as its users run it."""

import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import grpo
from common import generate, load_model, load_tokenizer, run_script, token_logprobs
from conftest import ROOT
from grpo import add_gradients, group_advantages, grpo_loss, kl_k3, loss_total, rows_to_learn_from
from test_runs import kill_at, metrics_of, run

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "grpo.json").read_text())
MASK = torch.tensor(EXPECTED["inputs"]["completion_mask"])
LOGPS, OLD, REF = (torch.tensor(EXPECTED[f"{name}_per_token_logps"]) for name in ("policy", "old", "ref"))
ADVANTAGES = torch.tensor(EXPECTED["advantages"])


# ----------------------------------------------------------------------------------------------- other people's numbers


def test_golden_advantages():
    rewards = torch.tensor(EXPECTED["rewards"])
    for scale, name in ((True, "group"), (False, "none")):
        expected = torch.tensor(EXPECTED["advantages_from_rewards"][name])
        torch.testing.assert_close(group_advantages(rewards, 4, scale), expected, rtol=1e-5, atol=1e-5)


def test_golden_k3():
    expected = torch.tensor(EXPECTED["kl_k3_per_token"])
    torch.testing.assert_close(kl_k3(LOGPS, REF), expected, rtol=1e-5, atol=1e-5)
    assert ((kl_k3(LOGPS, REF) * MASK).sum().item() / MASK.sum().item()
            == pytest.approx(EXPECTED["kl_k3_mean"], abs=1e-5))


def golden_kwargs(settings):
    """TRL's dapo divides by num_items_in_batch; its dr_grpo by completions x longest allowed, as wide as the mask."""
    total = settings["num_items_in_batch"] if settings["loss_type"] == "dapo" else None
    return dict(beta=settings["beta"], clip_low=settings["epsilon_low"], clip_high=settings["epsilon_high"],
                loss_type=settings["loss_type"], kl_correction=settings["use_bias_correction_kl"], total=total)


@pytest.mark.parametrize("name", EXPECTED["expected"])
def test_golden_losses(name):
    settings = EXPECTED["expected"][name]["settings"]
    old = LOGPS if settings["old_is_policy"] else OLD
    kwargs = golden_kwargs(settings)
    if settings["importance_sampling_level"] == "token":
        loss = grpo_loss(LOGPS, old, REF, ADVANTAGES, MASK, **kwargs)
    else:
        # TRL's is GSPO's: fed with log-probabilities divided by the length, ours gives it; its KL stays that of tokens
        lengths = MASK.sum(1, keepdim=True)
        policy = grpo_loss(LOGPS / lengths, old / lengths, REF, ADVANTAGES, MASK, **{**kwargs, "beta": 0.0},
                           ratio="sequence")
        kl = grpo_loss(LOGPS, LOGPS, REF, torch.zeros(12), MASK, **kwargs)
        loss = policy + kl
    assert loss.item() == pytest.approx(EXPECTED["expected"][name]["loss"], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("name", ["beta0p04_eps0p2", "beta0p04_eps0p2_trl_default_kl", "beta0p04_onpolicy"])
def test_golden_ids_to_loss_to_gradient(name, loss_type):
    """The whole path: three models' log-probabilities of right-padded rows, the loss, and every weight's gradient."""
    policy, old, reference = (load_model(str(GOLDEN / name)) for name in ("policy", "old", "ref"))
    inputs = {name: torch.tensor(EXPECTED["inputs"][name]) for name in EXPECTED["inputs"]}
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
    logps, old_logps, ref_logps = (token_logprobs(m, ids, attention, mask)[:, -10:] for m in (policy, old, reference))
    for ours, theirs in ((logps, LOGPS), (old_logps, OLD), (ref_logps, REF)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    expected = EXPECTED["expected"][f"{loss_type}/{name}"]
    old_logps = logps if expected["settings"]["old_is_policy"] else old_logps
    loss = grpo_loss(logps, old_logps.detach(), ref_logps.detach(), ADVANTAGES, MASK,
                     **golden_kwargs(expected["settings"]))
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in policy.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    if name == "beta0p04_eps0p2":
        gradients = load_file(GOLDEN / f"grads_grpo_{loss_type}.safetensors")
        largest = max(g.abs().max() for g in gradients.values()).item()
        for n, parameter in policy.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[n], rtol=1e-4, atol=1e-6 * largest)


def test_golden_temperature():
    policy = load_model(str(GOLDEN / "policy"))
    inputs = {name: torch.tensor(EXPECTED["inputs"][name]) for name in EXPECTED["inputs"]}
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    mask = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
    expected = torch.tensor(EXPECTED["policy_per_token_logps_temperature0p7"])
    torch.testing.assert_close(token_logprobs(policy, ids, attention, mask, 0.7)[:, -10:], expected,
                               rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- what a line means


def test_equal_rewards_give_exactly_zero():
    for size in (3, 6, 7):  # sizes by which the mean of equal numbers is not that number in floating point
        assert group_advantages(torch.full((2 * size,), 0.1), size).abs().max() == 0


def test_the_course_s_equation_by_hand():
    """ratio "sequence" is (1) to the letter, whole completions in ratio and KL; GSPO's ratio is its geometric mean."""
    length = MASK.sum(1)
    rho = ((LOGPS - OLD) * MASK).sum(1).exp()
    d = ((REF - LOGPS) * MASK).sum(1)
    objective = torch.min(rho * ADVANTAGES, rho.clamp(0.8, 1.3) * ADVANTAGES) - 1e-6 * (d.exp() - d - 1)
    loss = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, 1e-6, 0.2, 0.3, "grpo", "sequence")
    torch.testing.assert_close(loss, -objective.mean(), rtol=1e-5, atol=1e-5)
    assert ((rho < 0.8) | (rho > 1.3)).sum() > ((rho ** (1 / length) < 0.8) | (rho ** (1 / length) > 1.3)).sum()


def test_at_ratio_1_the_gradient_is_reinforce_with_group_advantages():
    """A completion's weight: 1 / tokens in DeepSeekMath's mean, the same for all in (1) and with a constant or global
    total."""
    advantages, lengths = group_advantages(torch.tensor(EXPECTED["rewards"]), 4), MASK.sum(1)
    for loss_type, ratio, weight in (("grpo", "token", 1 / lengths / 12), ("grpo", "sequence", torch.ones(12) / 12),
                                     ("dapo", "token", torch.ones(12) / MASK.sum()),
                                     ("dr_grpo", "token", torch.ones(12) / 120)):
        logps, twin = LOGPS.clone().requires_grad_(), LOGPS.clone().requires_grad_()
        grpo_loss(logps, LOGPS, REF, advantages, MASK, 0.0, 0.2, 0.2, loss_type, ratio).backward()
        (-(weight * advantages) @ (twin * MASK).sum(1)).backward()
        torch.testing.assert_close(logps.grad, twin.grad, rtol=1e-5, atol=1e-8)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="dr_grpo"):
        grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, 0.0, 0.2, 0.2, "bnpo")


def small_rollout(prompts=4, group_size=2):
    model, tokenizer = (load(str(ROOT / "assets" / "tiny-sft")) for load in (load_model, load_tokenizer))
    torch.manual_seed(1)
    texts = ["Q: 3+4?", "Review of The Lost King, a drama:", "Q: 37+58?", "Review of The Silent House, a thriller:"]
    return model, generate(model, tokenizer, texts[:prompts], group_size, 12)


def gradient(model, rollout, mask, advantages, rows, args, old_logps=None):
    ref_logps = rollout.logps - 0.3 * rollout.completion_mask
    loss, _ = add_gradients(model, rollout, mask, advantages, old_logps, ref_logps, rows, loss_total(mask, args), args)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss, flat


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_1_by_8_and_8_by_1_give_the_same_gradient(loss_type):
    model, rollout = small_rollout()
    mask, advantages = rollout.completion_mask.bool(), torch.randn(8)
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2  # of different lengths, or nothing is tested
    args = grpo.Args(loss_type=loss_type, beta=0.1, max_new_tokens=12)
    old_logps = rollout.logps + 0.1 * torch.randn_like(rollout.logps) * mask
    losses, gradients = zip(*(gradient(model, rollout, mask, advantages, list(range(8)),
                                       replace(args, micro_batch_size=size), old_logps) for size in (8, 1)))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert gradients[0].norm() > 0.01 and (gradients[0] - gradients[1]).abs().max() < 1e-6 * max(1, gradients[0].norm())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_groups_of_equal_rewards_are_skipped_without_changing_the_gradient(loss_type):
    model, rollout = small_rollout()
    mask = rollout.completion_mask.bool()
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.3, 0.3, 1.0, 1.0, 0.0, 0.5]), 2)
    args = grpo.Args(loss_type=loss_type, max_new_tokens=12)
    rows = rows_to_learn_from(advantages, mask, 0.0)
    assert rows == [0, 1, 6, 7]
    (loss, some), (all_loss, all_of_them) = (gradient(model, rollout, mask, advantages, r, args)
                                             for r in (rows, list(range(8))))
    assert loss == pytest.approx(all_loss, abs=1e-6) and some.norm() > 0.01
    assert (some - all_of_them).abs().max() < 1e-6 * max(1, some.norm())
    assert rows_to_learn_from(advantages, mask, 0.1) == list(range(8))  # the KL has a gradient everywhere
    rows = rows_to_learn_from(torch.zeros(8), mask, 0.0)  # nothing to learn: one row, and a gradient of zeros
    _, nothing = gradient(model, rollout, mask, torch.zeros(8), rows, args)
    assert rows == [0] and nothing.abs().max() == 0


def test_truncated_completions_leave_the_loss():
    model, rollout = small_rollout()
    advantages = torch.randn(8)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool()
    mask = rollout.completion_mask.bool() & keep[:, None]
    rows = rows_to_learn_from(advantages, mask, 0.0)
    assert rows == keep.nonzero().flatten().tolist()
    _, masked = gradient(model, rollout, mask, advantages, rows, grpo.Args())
    fewer = torch.where(keep, advantages, 0.0) * 8 / 6  # the mean is over six completions, not eight
    _, expected = gradient(model, rollout, rollout.completion_mask.bool(), fewer, list(range(8)), grpo.Args())
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-6)


def test_the_ratio_of_the_first_update_is_exactly_1():
    model, rollout = small_rollout()
    mask, advantages = rollout.completion_mask.bool(), torch.randn(8)
    args = grpo.Args(max_new_tokens=12)
    _, logps = add_gradients(model, rollout, mask, advantages, None, rollout.logps, list(range(8)), 8, args)
    torch.testing.assert_close(logps, rollout.logps, rtol=0, atol=1e-4)  # the sampler's, up to rounding
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    _, again = add_gradients(model, rollout, mask, advantages, logps, rollout.logps, list(range(8)), 8, args)
    assert torch.equal(logps, again) and grpo.ratio_metrics(again, logps, advantages, mask, args)["ratio"] == 1.0
    assert all(torch.equal(first[n], p.grad) for n, p in model.named_parameters())


# ---------------------------------------------------------------------------- exact: every sequence of a small language
#
# As in test_dpo.py: two prompts, three tokens, every sequence up to three tokens, and a table of logits for every
# prefix.

SEQUENCES = [s for n in (1, 2, 3) for s in itertools.product(range(3), repeat=n)
             if 0 not in s[:-1] and (s[-1] == 0 or n == 3)]
PREFIXES = {s: i for i, s in enumerate([(), *itertools.product((1, 2), repeat=1),
                                        *itertools.product((1, 2), repeat=2)])}
AT = torch.tensor([[PREFIXES[s[:t]] if t < len(s) else 0 for t in range(3)] for s in SEQUENCES])  # [15, 3]
TOKEN = torch.tensor([[s[t] if t < len(s) else 0 for t in range(3)] for s in SEQUENCES])
WRITTEN = torch.tensor([[float(t < len(s)) for t in range(3)] for s in SEQUENCES], dtype=torch.float64)


def token_logps(table):
    """Logits [2 prompts, 7 prefixes, 3 tokens] -> log-probability of each sequence's tokens [2, 15, 3]."""
    return table.log_softmax(-1)[:, AT, TOKEN] * WRITTEN


def small_world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref_table = torch.randn(2, len(PREFIXES), 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(2, len(SEQUENCES), generator=generator, dtype=torch.float64)
    return ref_table, token_logps(ref_table).sum(2), rewards


def expected_advantages(probabilities, rewards, scale, group_size):
    """What a completion's advantage is on average over the rest of its group -> [15]; group_size None: of infinite
    size."""
    if group_size is None:
        advantages = rewards - probabilities @ rewards
        return advantages / (probabilities @ advantages**2).sqrt() if scale else advantages
    others = torch.tensor(list(itertools.product(range(15), repeat=group_size - 1)))  # [n, G - 1]
    first = torch.arange(15)[:, None, None].expand(15, len(others), 1)
    groups = torch.cat([first, others.expand(15, -1, -1)], 2)  # [15, n, G]
    advantages = group_advantages(rewards[groups].flatten(), group_size, scale).view(
        15, len(others), group_size)[..., 0]
    return advantages @ probabilities[others].prod(1)


def fixed_point(beta, scale, group_size=None, loss_type="grpo", ratio="sequence", kl_correction=True, steps=400):
    """Where the expected on-policy gradient of grpo_loss vanishes -> pi [2, 15]: gradient steps, no sampling."""
    ref_table, _, rewards = small_world()
    table = ref_table.clone().requires_grad_()
    ref_logps, optimizer = token_logps(ref_table), torch.optim.Adam([table], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def one(logps, old_logps, ref_logps, advantage, mask):  # one completion, as a batch of one
        return grpo_loss(logps[None], old_logps[None], ref_logps[None], advantage[None], mask[None], beta, 0.2, 0.2,
                         loss_type, ratio, kl_correction, 1)

    for _ in range(steps):
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


def distance(policy, beta):
    """Total variation from pi* -> the larger of the two prompts'."""
    _, ref_logps, rewards = small_world()
    return 0.5 * (policy - (ref_logps + rewards / beta).softmax(1)).abs().sum(1).max().item()


def test_k3_is_not_negative_and_its_mean_is_the_kl():
    ref_table, ref_logps, _ = small_world()
    tokens, ref_tokens = token_logps(small_world(1)[0]), token_logps(ref_table)
    logps = tokens.sum(2)
    exact = (logps.exp() * (logps - ref_logps)).sum(1)
    assert kl_k3(logps, ref_logps).min() >= 0 and exact.min() > 0.1
    torch.testing.assert_close((logps.exp() * kl_k3(logps, ref_logps)).sum(1), exact)  # of whole completions
    torch.testing.assert_close((logps.exp() * kl_k3(tokens, ref_tokens).sum(2)).sum(1), exact)  # and summed over tokens


def test_mean_only_advantages_with_the_exact_kl_gradient_reach_the_optimum():
    _, ref_logps, _ = small_world()
    assert distance(ref_logps.exp(), 0.5) > 0.15  # there is something to learn
    assert distance(fixed_point(0.5, scale=False), 0.5) < 0.005
    finite = fixed_point(0.5, scale=False, group_size=3)  # r_i is part of its own mean: advantages shrink by 1 - 1/G
    assert distance(finite, 0.5 * 3 / 2) < 0.005 < 0.03 < distance(finite, 0.5)


def test_k3_as_a_loss_lands_elsewhere():
    """Its gradient is that of KL(pi_ref || pi): at the fixed point pi (beta + E[r] - r) = beta pi_ref, not pi*."""
    _, ref_logps, rewards = small_world()
    policy = fixed_point(0.5, scale=False, kl_correction=False)
    mean = (policy * rewards).sum(1, keepdim=True)
    torch.testing.assert_close(policy * (0.5 + mean - rewards), 0.5 * ref_logps.exp(), rtol=0, atol=0.01)
    assert 0.6 < distance(policy, 0.5) < 0.75


def test_k3_of_tokens_lands_elsewhere_even_when_corrected():
    """The ratio of a token corrects for that token's distribution, not for the prefixes that the policy comes to
    write."""
    assert 0.45 < distance(fixed_point(0.5, scale=False, loss_type="dr_grpo", ratio="token"), 0.5) < 0.65


def test_std_scaling_lands_elsewhere():
    """Where rewards have deviation sigma(x) under the policy, beta acts as beta sigma(x): another pi* for each prompt,
    and the surer the policy, the weaker the KL."""
    _, ref_logps, rewards = small_world()
    policy = fixed_point(1.0, scale=True)
    sigma = ((policy * rewards**2).sum(1) - (policy * rewards).sum(1) ** 2).sqrt()
    own = (ref_logps + rewards / sigma[:, None]).softmax(1)
    assert 0.5 * (policy - own).abs().sum(1).max() < 0.01
    assert 0.35 < distance(policy, 1.0) < 0.45


# -------------------------------------------------------------------------------------------------- as its users run it

QUICK = ["--max-steps", "6", "--batch-size", "4", "--group-size", "4", "--eval-every", "2", "--save-every", "2",
         "--eval-prompts", "20", "--eval-samples", "2", "--beta", "0.1", "--updates-per-rollout", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("grpo")
    status, _, errors = run("grpo", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory


def without_speeds(directory):
    return [{name: value for name, value in row.items() if not name.endswith("tokens_per_s")}
            for row in metrics_of(directory)]


def test_run_directory(finished):
    rows = metrics_of(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    updates = [row for row in rows if "grad_norm" in row]
    assert all(row["ratio_first"] == 1.0 and row["sampling_gap"] < 1e-4 for row in updates)
    assert all(row["ratio"] != 1.0 for row in updates[1:])  # the second update on a rollout
    assert updates[0]["kl"] == pytest.approx(0, abs=1e-6) and all(row["kl"] >= 0 for row in updates)
    assert all(row[f"{part}_tokens_per_s"] > 0 for row in updates for part in ("rollout", "scoring", "update"))
    results = json.loads((finished / "results.json").read_text())
    assert set(results) >= {"pass_at_1_ref", "pass_at_1", "pass_at_k_ref", "pass_at_k", "greedy_accuracy_ref",
                            "greedy_accuracy", "reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se",
                            "win_rate", "win_rate_se", "ended", "seconds"}
    assert results["pass_at_k"] >= results["pass_at_1"] and all(isinstance(v, (int, float)) for v in results.values())
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 2, 4, 6} and all("reward" in s for s in samples)


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    for lines in (5, 9):  # of metrics.jsonl: after one checkpoint, and after the last update
        kill_at(lines, "grpo", *QUICK, directory=tmp_path)
    status, output, errors = run("grpo", *QUICK, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "resuming" in output, errors
    assert without_speeds(tmp_path) == without_speeds(finished)
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def call(monkeypatch, capsys, *flags):
    """grpo.py in this process -> exit status, what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["grpo.py", *map(str, flags)])
    try:
        run_script(grpo.main, grpo.Args)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err


REWARD = "import time\ndef reward(prompts, completions, **columns):\n    "
MISTAKES = {
    # name: (flags, body of a reward function, what the line must name)
    "a group of one": (["--group-size", "1"], None, "--group-size"),
    "no update": (["--updates-per-rollout", "0"], None, "--updates-per-rollout"),
    "no sample": (["--eval-samples", "0"], None, "--eval-samples"),
    "a negative clipping range": (["--clip-low", "-0.1"], None, "--clip-low"),
    "a negative beta": (["--beta", "-0.1"], None, "--beta"),
    "an unknown loss": (["--loss-type", "bnpo"], None, "bnpo"),
    "no reward": (["--dataset", ROOT / "assets" / "data" / "review_prompts.jsonl"], None, "--reward-fn"),
    "a missing prompt column": (["--prompt-column", "question"], None, "question"),
    "no room for completions": (["--max-new-tokens", "255"], None, "--max-new-tokens"),
    "weights without functions": (["--reward-weights", "1", "2"], None, "--reward-weights"),
    "two kinds of reward": (["--reward-fn", "r.py:reward", "--reward-model", "m"], "return [0.0]", "--reward-model"),
    "a function that raises": ([], "return [1 / (p != 'Q: 10+97?') for p in prompts]", "Q: 10+97?"),
    "a function that fails on batches only": ([], "return [0.0] if len(prompts) == 1 else 1 / 0", "ZeroDivisionError"),
    "a reward that is not a number": ([], "return [float('nan' if p == 'Q: 10+97?' else 1) for p in prompts]",
                                      "Q: 10+97?"),
    "too few rewards": ([], "return [0.0]", "Q: 43+43?"),
    "a function that takes forever": (
        ["--reward-timeout", "0.2"],
        "[time.sleep(100) for p in prompts if p == 'Q: 10+97?']\n    return [0.0] * len(prompts)", "Q: 10+97?"),
    "a function that loops": (["--reward-timeout", "0.2"],
                              "while 'Q: 10+97?' in prompts:\n        pass\n    return [0.0] * len(prompts)",
                              "--reward-timeout"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch, capsys):
    flags, body, what = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    if body:
        (tmp_path / "r.py").write_text(REWARD + body)
        flags = flags if "--reward-fn" in flags else [*flags, "--reward-fn", "r.py:reward"]
    status, errors = call(monkeypatch, capsys, "--max-steps", 1, "--eval-prompts", 20, *flags)
    assert status == 2 and errors.startswith("grpo.py: error: ") and errors.count("\n") == 1 and what in errors, errors
    assert len(errors) < 500


def test_a_reward_function_that_fails_loses_nothing(finished, tmp_path, monkeypatch, capsys):
    """It fails in the fourth rollout, between checkpoints; mended, the run goes on to what it would have been."""
    body = """
    from pathlib import Path
    if len(prompts) == 16 and Path("broken").exists() and \
Path("runs/grpo/metrics.jsonl").read_text().count("grad_norm") == 3:
        return 1 / 0
    return [float(text.strip() == right) for text, right in zip(completions, columns["answer"])]
"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARD + body.strip())
    (tmp_path / "broken").touch()
    flags = [*QUICK, "--reward-fn", "r.py:reward"]
    status, errors = call(monkeypatch, capsys, *flags)
    assert status == 2 and "ZeroDivisionError" in errors
    assert sum("grad_norm" in row for row in metrics_of(tmp_path / "runs" / "grpo")) == 3
    (tmp_path / "broken").unlink()
    assert call(monkeypatch, capsys, *flags, "--resume") == (0, "")
    assert without_speeds(tmp_path / "runs" / "grpo") == without_speeds(finished)


def test_several_rewards_are_weighted_and_logged_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(
        REWARD + "return [1.0] * len(prompts)\n\n\ndef short(prompts, completions, **columns):\n"
        "    return [float(len(text) < 4) for text in completions]\n")
    flags = ["--reward-fn", "r.py:reward", "r.py:short", "--reward-weights", 0.5, 2, "--max-steps", 2,
             "--eval-prompts", 4]
    assert call(monkeypatch, capsys, *flags) == (0, "")
    for row in metrics_of(tmp_path / "runs" / "grpo"):
        if "grad_norm" in row:
            assert row["reward_1"] == 1.0 and row["reward"] == pytest.approx(0.5 + 2 * row["reward_2"], abs=1e-6)


def test_questions_and_final_numbers(tmp_path, monkeypatch, capsys):
    """GSM8K's columns: the prompt is `question`, and `answer` reaches the reward function."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"Q: {i}+{i}?", "answer": f"Twice {i} is {2 * i}.\n#### {2 * i}"} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--dataset", "d.jsonl", "--prompt-column", "question", "--reward-fn",
             ROOT / "assets" / "rewards.py:final_number", "--max-steps", 2, "--batch-size", 4]
    assert call(monkeypatch, capsys, *flags) == (0, "")
    results = json.loads((tmp_path / "runs" / "grpo" / "results.json").read_text())
    assert results["pass_at_k_ref"] > 0 and results["reward_ref"] <= 1


def test_final_number():
    sys.path.insert(0, str(ROOT / "assets"))
    from rewards import final_number
    pairs = [("#### 42", 1), ("so she has 42", 1), ("The answer is 42.", 1), ("$42.00", 1), ("41, no: 42", 1),
             ("42 or 43", 0), ("\\boxed{42}", 1), ("", 0), ("none", 0), ("-42", 0), ("142", 0),
             ("#### 42\nQ: 7+7?", 1), ("1,042", 0)]
    texts, right = zip(*pairs)
    assert final_number(list(texts), list(texts), ["6 * 7 = 42\n#### 42"] * len(texts)) == [float(r) for r in right]
    assert final_number(["q"] * 3, ["1,234", "1234", "-5"], ["#### 1,234", "1,234.0", "#### -5"]) == [1.0, 1.0, 1.0]
    assert final_number(["q"], [[{"role": "assistant", "content": "It is 7"}]], ["#### 7"]) == [1.0]
