"""What the README shows, by the numbers that experiments/ saved."""

import json

import pytest

from conftest import ROOT

RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(scope="module")
def frontier():
    return json.loads((RESULTS / "frontier.json").read_text())


def test_every_method_is_on_the_picture_three_times(frontier):
    seeds = {}
    for point in frontier["points"]:
        seeds.setdefault((point["method"], point["setting"]), set()).add(point["seed"])
    methods = {method for method, _ in seeds}
    assert methods == {"PPO", "GRPO", "DPO", "best-of-n", "expert iteration", "Quark"}
    assert all(len(found) >= 3 for found in seeds.values())


def test_no_method_is_above_the_optimum_by_more_than_its_standard_error(frontier):
    judged = [row for row in frontier["summary"] if row["share_of_optimum"] is not None]
    above = [row for row in judged if row["share_of_optimum"] - 1 > row["share_se"]]
    assert judged and not above, above


def test_policies_that_have_the_gold_reward_are_near_the_optimum_and_repeat_themselves(frontier):
    """They stay below it for a reason that is counted: pi* says no more words twice than tiny-sft,
    they do."""
    for method in ("PPO", "GRPO"):
        shares = [row["share_of_optimum"] for row in frontier["summary"] if row["method"] == method]
        assert min(shares) >= 0.8, (method, shares)
    policies = json.loads((RESULTS / "repeats.json").read_text())["policies"]
    repeats = {row["policy"]: row["repeats"] for row in policies}
    assert repeats["optimum, beta 0.7"] < 1.2 * repeats["tiny-sft"] < 0.5 * repeats["PPO, beta 0.5"]


def test_the_controlled_comparison_s_order_holds_over_seeds():
    results = json.loads((RESULTS / "controlled_comparison.json").read_text())
    assert results["prompts"] >= 500 and len(results["seeds"]) >= 3 and results["discordant"] == []
    assert {row["method"] for row in results["methods"]} == {
        "base", "SFT", "binary FeedME", "binary reward conditioning", "Quark", "expert iteration",
        "best-of-16", "PPO", "DPO", "GRPO"}

