"""The variants of grpo.py and dpo.py: each against TRL's numbers where it has them, and against the
formula of its paper, written out completion by completion."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import dpo
import grpo
from common import UserError, load_model, make_row, pad_rows
from conftest import ROOT
from dpo import dpo_loss
from grpo import group_advantages, grpo_loss, kl_k2, kl_k3, ratio_metrics, rewards_with_kl
from test_runs import metrics_of, run

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "grpo.json").read_text())
MASK = torch.tensor(EXPECTED["inputs"]["completion_mask"])
LOGPS, OLD, REF = (torch.tensor(EXPECTED[f"{name}_per_token_logps"])
                   for name in ("policy", "old", "ref"))
REWARDS, ADVANTAGES = (torch.tensor(EXPECTED[name]) for name in ("rewards", "advantages"))
CLIP = dict(clip_low=0.2, clip_high=0.3)

# TRL 1.16.0's RLOO on the same completions: advantages without and with a KL of 0.05 in the
# reward, and the loss at its ADVANTAGES.
RLOO = [0.8333333135, -0.5, 0.1666666567, -0.5, 0, 0, 0, 0, -1.9333333969, 2.0666666031,
        0.3333332837, -0.4666666687]
RLOO_KL = [0.9448296428, -0.5145683289, 0.1806256175, -0.6108869314, -0.0590577126, 0.1197816581,
           -0.1910589933, 0.1303350180, -2.1871514320, 2.3994319439, 0.3117622435, -0.5240426064]
RLOO_LOSS = 0.5224819183

# TRL 1.16.0's DPO losses, pair by pair, on the six pairs of dpo.json.
DPO_LOSSES = {
    ("hinge", 0.1, 0.0, False): [1.3175617456, 1.1313664913, 0.8563888669, 1.2592121363,
                                 0.8248469234, 0.8336910009],
    ("hinge", 0.5, 0.0, False): [2.5878086090, 1.6568326950, 0.2819442749, 2.2960605621,
                                 0.1242346764, 0.1684551239],
    ("robust", 0.1, 0.1, False): [0.9041762948, 0.7774069309, 0.6059659719, 0.8635301590,
                                  0.5875064135, 0.5926573873],
    ("sigmoid", 0.1, 0.0, True): [0.7183868885, 0.7020492554, 0.6876389384, 0.7096485496,
                                  0.6959037781, 0.6807486415],
    ("ipo", 0.1, 0.0, True): [30.2343921661, 26.8039855957, 23.9075012207, 28.3806438446,
                              25.5535869598, 22.5669937134],
}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=tolerance, atol=tolerance)


# --- GRPO: advantages ---


def test_leave_one_out_is_the_distance_to_the_mean_of_the_others():
    ours = group_advantages(REWARDS, 4, False, "leave-one-out")
    close(ours, RLOO)
    for i, reward in enumerate(REWARDS.tolist()):
        group = REWARDS.tolist()[i // 4 * 4:i // 4 * 4 + 4]
        assert ours[i].item() == pytest.approx(reward - (sum(group) - reward) / 3, abs=1e-6)


def test_the_batch_s_mean_and_deviation():
    values, number = REWARDS.tolist(), len(REWARDS)
    mean = sum(values) / number
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1))
    close(group_advantages(REWARDS, 4, True, "batch"),
          [(value - mean) / (deviation + 1e-4) for value in values])
    close(group_advantages(REWARDS, 1, False, "batch"), [value - mean for value in values])
    assert group_advantages(torch.full((6,), 0.1), 3, True, "batch").abs().max() == 0


def test_golden_kl_in_the_reward():
    scores = rewards_with_kl(REWARDS, LOGPS, REF, MASK, 0.05)
    close(group_advantages(scores, 4, False, "leave-one-out"), RLOO_KL)


def test_collect_puts_the_kl_into_the_reward_and_no_other_into_the_loss():
    """From rows to advantages, with another model as the reference."""
    inputs, rows = EXPECTED["inputs"], []
    for i in range(12):
        parts = [[token for token, real in zip(inputs[f"{part}_ids"][i], inputs[f"{part}_mask"][i])
                  if real] for part in ("prompt", "completion")]
        rows.append(make_row(*parts))
    _, mask = pad_rows(rows)
    logps = torch.zeros(mask.shape)
    logps[mask.bool()] = LOGPS[MASK.bool()]
    rollout = SimpleNamespace(rows=rows, logps=logps, completion_mask=mask,
                              ended=torch.ones(12).bool())
    args = grpo.Args(samples_per_prompt=4, beta=0.05, kl="reward", scale=False,
                     baseline="leave-one-out")
    reference = load_model(str(GOLDEN / "ref"))
    policy = load_model(str(GOLDEN / "policy"))
    experience = grpo.collect(policy, reference, rollout, REWARDS, args)
    close(experience.advantages, RLOO_KL)
    loss = [grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=beta, kl="reward", **CLIP)
            for beta in (0.0, 5.0)]
    assert loss[0] == loss[1]
    args = grpo.Args(samples_per_prompt=4, beta=0.05)
    close(grpo.collect(reference, reference, rollout, REWARDS, args).advantages,
          group_advantages(REWARDS, 4))


# --- GRPO: ratios ---


def completions():
    """Each completion's advantage and its tokens' (log pi, log pi_old), as plain numbers."""
    for row in range(12):
        tokens = [(LOGPS[row, t].item(), OLD[row, t].item()) for t in range(MASK.shape[1])
                  if MASK[row, t]]
        yield ADVANTAGES[row].item(), tokens


def test_golden_rloo_loss():
    loss = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=0.0, clip_low=0.2, clip_high=0.2,
                     ratio="sequence")
    assert loss.item() == pytest.approx(RLOO_LOSS, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_golden_gspo(loss_type):
    """TRL's sequence level: the geometric mean, and the KL of tokens."""
    golden = EXPECTED["expected"][f"{loss_type}/beta0p04_eps0p2_seqlevel"]
    total = golden["settings"]["num_items_in_batch"] if loss_type == "dapo" else None
    loss = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=0.04, clip_low=0.2, clip_high=0.2,
                     loss_type=loss_type, ratio="gspo", total=total)
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)


def test_gspo_by_hand():
    expected, outside = 0.0, 0
    for advantage, tokens in completions():
        ratio = math.exp(sum(logp - old for logp, old in tokens) / len(tokens))
        clipped = min(max(ratio, 0.8), 1.3)
        expected -= min(ratio * advantage, clipped * advantage) / 12
        outside += ratio != clipped
    loss = grpo_loss(LOGPS, OLD, REF, ADVANTAGES, MASK, beta=0.0, ratio="gspo", **CLIP)
    assert outside > 0 and loss.item() == pytest.approx(expected, abs=1e-5)


def test_cispo_by_hand():
    """Value and gradient: every token keeps its gradient, clipped(rho) A, also where PPO's
    objective has none."""
    number, expected = MASK.sum().item(), 0.0
    gradient = torch.zeros_like(LOGPS)
    at = iter(MASK.nonzero().tolist())
    for advantage, tokens in completions():
        for logp, old in tokens:
            weight = min(max(math.exp(logp - old), 0.8), 1.3)
            expected -= weight * advantage * logp / number
            gradient[tuple(next(at))] = -weight * advantage / number
    logps = LOGPS.clone().requires_grad_()
    loss = grpo_loss(logps, OLD, REF, ADVANTAGES, MASK, beta=0.0, loss_type="dapo", ratio="cispo",
                     **CLIP)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    close(logps.grad, gradient)
    twin = LOGPS.clone().requires_grad_()
    grpo_loss(twin, OLD, REF, ADVANTAGES, MASK, beta=0.0, loss_type="dapo", **CLIP).backward()
    dropped = (twin.grad == 0) & (gradient != 0)
    assert dropped.sum() > 5


@pytest.mark.parametrize("ratio, low, high", [("token", 1 / 8, 1 / 8), ("cispo", 2 / 8, 2 / 8)])
def test_what_clipping_changes_is_logged(ratio, low, high):
    mask = torch.ones(2, 4, dtype=torch.long)
    logps = torch.tensor([[0.5, 0.9, 1.25, 1.5], [0.5, 0.9, 1.25, 1.5]]).log()
    experience = SimpleNamespace(indices=[0, 1], mask=mask, old_logps=torch.zeros(2, 4),
                                 advantages=torch.tensor([1.0, -1.0]))
    metrics = ratio_metrics(logps, experience, grpo.Args(clip=0.2, clip_high=0.3, ratio=ratio))
    assert metrics == pytest.approx({"ratio": 1.0375, "clipped_low": low, "clipped_high": high})


# --- GRPO: the KL ---


def test_k2_by_hand():
    logps, ref_logps = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    close(kl_k2(logps, ref_logps), [0.125, 0.5])
    no_gain = torch.zeros(12)
    loss = grpo_loss(LOGPS, OLD, REF, no_gain, MASK, beta=0.3, loss_type="dapo", kl="k2", **CLIP)
    tokens = [(LOGPS[i, t] - REF[i, t]).item() for i, t in MASK.nonzero().tolist()]
    mean = sum(x * x / 2 for x in tokens) / len(tokens)
    assert loss.item() == pytest.approx(0.3 * mean, rel=1e-5)
    whole = grpo_loss(LOGPS, OLD, REF, no_gain, MASK, beta=0.3, ratio="sequence", kl="k2", **CLIP)
    sums = ((LOGPS - REF) * MASK).sum(1)
    assert whole.item() == pytest.approx(0.3 * (sums**2 / 2).mean().item(), rel=1e-5)


def test_the_gradients_of_k2_and_corrected_k3_are_the_kl_s_and_k3_s_is_the_reverse_one():
    torch.manual_seed(0)
    ref_logps = torch.randn(6).double().log_softmax(0)
    table = torch.randn(6).double().requires_grad_()
    logps = table.log_softmax(0)
    p = logps.detach().exp()

    def gradient(value):
        return torch.autograd.grad(value, table, retain_graph=True)[0]

    forward = gradient((logps.exp() * (logps - ref_logps)).sum())
    reverse = gradient((ref_logps.exp() * (ref_logps - logps)).sum())
    k3, rho = kl_k3(logps, ref_logps), (logps - logps.detach()).exp()
    close(gradient((p * kl_k2(logps, ref_logps)).sum()), forward)
    close(gradient((p * k3 * rho).sum()), forward)
    close(gradient((p * k3).sum()), reverse)
    assert (forward - reverse).abs().max() > 0.05


# --- DPO ---

DPO = json.loads((GOLDEN / "dpo.json").read_text())
NAMES = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
PAIRS = [torch.tensor(DPO["sequence_logps"][name]) for name in NAMES]
TOKENS = torch.tensor(DPO["inputs"]["completion_mask"]).sum(1)
LENGTHS = TOKENS[:6], TOKENS[6:]


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_golden_dpo_variants(name):
    loss_type, beta, label_smoothing, per_token = name
    losses, _, _ = dpo_loss(*PAIRS, beta, label_smoothing, loss_type,
                            lengths=LENGTHS if per_token else None)
    close(losses, DPO_LOSSES[name])


def test_dpo_variants_by_hand():
    names = ("sigmoid", "robust", "hinge", "simpo")
    ours = {name: dpo_loss(*PAIRS, 0.5, 0.2 if name in names[:2] else 0.0, name,
                           lengths=LENGTHS if name == "simpo" else None,
                           target_margin=0.7 if name == "simpo" else 0.0) for name in names}
    for i in range(6):
        chosen, rejected, ref_chosen, ref_rejected = [logps[i].item() for logps in PAIRS]
        h = chosen - ref_chosen - (rejected - ref_rejected)
        right, wrong = math.log1p(math.exp(-0.5 * h)), math.log1p(math.exp(0.5 * h))
        per_token = chosen / LENGTHS[0][i].item() - rejected / LENGTHS[1][i].item()
        expected = {
            "sigmoid": 0.8 * right + 0.2 * wrong,
            "robust": (0.8 * right - 0.2 * wrong) / 0.6,
            "hinge": max(0.0, 1 - 0.5 * h),
            "simpo": math.log1p(math.exp(0.7 - 0.5 * per_token)),
        }
        for name, value in expected.items():
            assert ours[name][0][i].item() == pytest.approx(value, rel=1e-4), name
    close(ours["simpo"][1], 0.5 * PAIRS[0] / LENGTHS[0])  # its implicit reward


def test_robust_losses_are_right_on_average_over_flips():
    """Chowdhury et al.: the mean over labels of which a share is flipped is the loss of the clean
    label; conservative DPO's mean is not."""
    flipped = [PAIRS[1], PAIRS[0], PAIRS[3], PAIRS[2]]
    clean, _, _ = dpo_loss(*PAIRS, 0.5)
    for name, is_right in (("robust", True), ("sigmoid", False)):
        right, _, _ = dpo_loss(*PAIRS, 0.5, 0.2, name)
        wrong, _, _ = dpo_loss(*flipped, 0.5, 0.2, name)
        gap = (0.8 * right + 0.2 * wrong - clean).abs().max().item()
        assert (gap < 1e-5) == is_right


# --- as their users run them ---

TINY = ["--max-steps", 2, "--eval-prompts", 4, "--batch-size", 4]


@pytest.mark.parametrize("flags", [
    ["--baseline", "leave-one-out", "--no-scale", "--ratio", "sequence", "--kl", "reward",
     "--beta", 0.1],
    ["--baseline", "batch", "--kl", "k2", "--beta", 0.1, "--ratio", "cispo",
     "--loss-type", "dapo", "--samples-per-prompt", 1, "--updates-per-rollout", 2],
    ["--ratio", "gspo", "--updates-per-rollout", 2],
])
def test_grpo_variants_run(flags, tmp_path):
    status, _, errors = run("grpo", *TINY, "--eval-samples", 2, *flags, "--output-dir", tmp_path)
    assert (status, errors) == (0, "")
    rows = [row for row in metrics_of(tmp_path) if row["phase"] == "train"]
    assert rows[0]["ratio_first"] == 1.0 and all(row["grad_norm"] > 0 for row in rows)
    assert ("kl" in rows[0]) == ("--beta" in flags)


@pytest.mark.parametrize("flags", [
    ["--loss-type", "hinge"],
    ["--loss-type", "robust", "--label-smoothing", 0.1, "--length-normalized"],
    ["--loss-type", "simpo", "--beta", 2, "--target-margin", 1],
])
def test_dpo_variants_run(flags, tmp_path):
    status, _, errors = run("dpo", *TINY, "--max-new-tokens", 8, *flags, "--output-dir", tmp_path)
    assert (status, errors) == (0, "")
    first = metrics_of(tmp_path)[0]
    if "hinge" in flags:
        assert first["eval_loss"] == pytest.approx(1, abs=1e-6)
    if "robust" in flags:
        assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if "simpo" in flags:  # it has no reference, and starts anywhere
        assert abs(first["eval_loss"] - math.log1p(math.e)) > 0.001
        assert abs(first["eval_chosen_reward"]) < 2 * math.log(512)  # per token


@pytest.mark.parametrize("script, flags, named", [
    (grpo, dict(samples_per_prompt=1), "--samples-per-prompt"),
    (grpo, dict(samples_per_prompt=1, baseline="leave-one-out"), "--samples-per-prompt"),
    (grpo, dict(baseline="leave-one-out"), "--no-scale"),
    (grpo, dict(kl="k2"), "--beta"),
    (grpo, dict(kl="reward"), "--beta"),
    (grpo, dict(kl_correction=True), "--beta"),
    (grpo, dict(kl="k2", kl_correction=True, beta=0.1), "--kl k2"),
    (grpo, dict(kl="reward", kl_correction=True, beta=0.1), "--kl reward"),
    (grpo, dict(ratio="gspo", kl_correction=True, beta=0.1), "gspo"),
    (grpo, dict(ratio="sequence", loss_type="dapo"), "dapo"),
    (dpo, dict(loss_type="robust"), "--label-smoothing"),
    (dpo, dict(loss_type="ipo", label_smoothing=0.1), "ipo"),
    (dpo, dict(loss_type="hinge", label_smoothing=0.1), "hinge"),
    (dpo, dict(target_margin=1.0), "--target-margin"),
])
def test_combinations_without_sense_are_refused(script, flags, named):
    with pytest.raises(UserError) as error:
        script.check_args(script.Args(**flags))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_they_are_refused_on_the_command_line():
    status, _, errors = run("grpo", "--baseline", "leave-one-out")
    assert status == 2 and errors.startswith("grpo.py: error: ") and errors.count("\n") == 1
    status, _, errors = run("dpo", "--loss-type", "robust")
    assert status == 2 and errors.startswith("dpo.py: error: ") and errors.count("\n") == 1
