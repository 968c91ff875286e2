"""The atlas of fixed points, in small: two prompts, three tokens, completions of up to three. Every
row lands where it says, and the saved one is what the documents show."""

import json
import sys

import pytest
import torch

from conftest import ROOT
from grpo import group_advantages

sys.path.insert(0, str(ROOT / "experiments"))

import fixed_points  # noqa: E402
from fixed_points import GRPO, OWN, ROWS, World, measured, optimum, total_variation  # noqa: E402

BETA = 0.6
SMALL = World(tokens=3, longest=3, prompts=2, seed=2)
SAVED = json.loads((ROOT / "experiments" / "results" / "fixed_points.json").read_text())
STEPS = {"GRPO": 300, "RLOO": 300, "REINFORCE++": 300, "PPO": 300, "SimPO": 350, "Quark": 25}
NAMES = [f"{row.method} {row.variant}".strip() for row in ROWS]


def test_the_language():
    assert SMALL.ref.shape == (2, 15) and World().ref.shape == (3, 121)
    torch.testing.assert_close(SMALL.ref.exp().sum(1), torch.ones(2, dtype=torch.float64))
    assert set(SMALL.lengths.tolist()) == {1, 2, 3}
    assert total_variation(SMALL.ref.exp(), torch.full((2, 15), 1 / 15)) > 0.2
    assert total_variation(SMALL.ref.exp(), optimum(SMALL, BETA)) > 0.3  # something to learn


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_every_row_lands_where_it_says(row):
    steps = STEPS.get(row.method, 200)
    policy = row.find(SMALL, BETA, steps=steps)
    found = measured(SMALL, row, BETA, policy)
    assert found["reward"] <= found["most_reward"] + 1e-6
    if row.lands_on == "pi*":
        assert found["tv"] < 0.02
    else:
        assert found["tv"] > 0.02, "this is pi*"
    if row.named:
        assert found["tv_named"] < 0.02
    else:  # nothing names it: then another start has to find it too
        assert row.lands_on == OWN
        start = SMALL.ref_table + torch.randn(SMALL.ref_table.shape).double()
        again = row.find(SMALL, BETA, start=start, steps=steps)
        assert total_variation(policy, again) < 0.02


def test_advantages_of_infinite_groups_are_those_of_large_ones():
    policy = SMALL.ref.exp()
    which = SMALL.counts(policy)
    rows = [torch.arange(15).repeat_interleave(count) for count in which]
    rewards = torch.stack([score[row] for score, row in zip(SMALL.rewards, rows)])
    for baseline in ("group", "leave-one-out", "batch"):
        for scale in (False, True):
            variant = GRPO | dict(baseline=baseline, scale=scale)
            exact = fixed_points.population_advantages(SMALL, SMALL.rewards, policy, variant)
            ours = group_advantages(rewards.flatten(), rewards.shape[1], scale, baseline)
            ours = ours.view_as(rewards)
            for x in range(2):
                torch.testing.assert_close(ours[x], exact[x][rows[x]], rtol=1e-3, atol=1e-3)


def test_no_policy_is_above_the_curve():
    for _ in range(20):
        table = SMALL.ref_table + 2 * torch.randn(SMALL.ref_table.shape).double()
        policy = SMALL.token_logps(table).sum(2).exp()
        reward, kl = fixed_points.reward_and_kl(SMALL, policy)
        assert reward <= fixed_points.most_reward(SMALL, kl) + 1e-6
    reward, kl = fixed_points.reward_and_kl(SMALL, optimum(SMALL, 0.4))
    assert fixed_points.most_reward(SMALL, kl) == pytest.approx(reward, abs=1e-9)


# --- what is saved and shown ---


def test_the_saved_atlas_has_every_row_and_all_hold():
    rows = SAVED["rows"]
    assert [(row["method"], row["variant"], row["beta"]) for row in rows] == [
        (row.method, row.variant, beta) for row in ROWS for beta in fixed_points.BETAS]
    for row in rows:
        assert row["reward"] <= row["most_reward"] + 1e-6, row
        assert row["lands_on"] != "pi*" or row["tv"] < 0.02, row
        assert row["tv_named"] is None or row["tv_named"] < 0.02, row
    fixed = {row["lands_on"] for row in rows}
    assert "pi*" in fixed and len(fixed) > 10


def test_the_documents_show_what_is_saved():
    text = (ROOT / "docs" / "results.md").read_text()
    assert fixed_points.markdown(SAVED["rows"]) in text
