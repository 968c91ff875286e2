"""The experiments: the curve against the exact one, shares and their errors, and small runs of the
real scripts."""

import json
import re
import shutil
import sys

import pytest
import torch

from common import generate, load_model, load_tokenizer, make_row, sequence_logprobs
from conftest import ROOT
from tiny import saved_language

sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "assets")]

import controlled_comparison  # noqa: E402
import frontier  # noqa: E402
import real_text  # noqa: E402
import runs  # noqa: E402
from make import optimum  # noqa: E402

# --- the curve ---


@pytest.fixture(scope="module")
def proposals(tmp_path_factory):
    """A language whose 31 completions are listed: their log-probabilities under the reference and
    another policy, and which of them 20,000 samples of each are."""
    tmp_path = tmp_path_factory.mktemp("proposals")
    completions = saved_language(tmp_path / "a", 1)
    saved_language(tmp_path / "b", 2)
    tokenizer = load_tokenizer(str(tmp_path / "a"))
    rows = [make_row([0, 2], completion) for completion in completions]
    torch.manual_seed(0)
    logps, drawn = [], []
    for policy in [load_model(str(tmp_path / name)) for name in "ab"]:
        logps.append(sequence_logprobs(policy, rows).double())
        rollout = generate(policy, tokenizer, ["a"] * 20_000, 1, 2, rows_at_once=8192)
        drawn += [completions.index(row.ids[2:]) for row in rollout.rows]
    return torch.stack(logps), torch.tensor(drawn)


@pytest.mark.parametrize("beta", [2.0, 1.0, 0.5, 0.3])
def test_the_curve_is_exact_to_a_hundredth(beta, proposals):
    """Samples weighted by the mixture of both policies: at the KL that they say, the gain that they
    say is pi*'s to 0.01, where the standard error of 40,000 samples is 0.003."""
    logps, drawn = proposals
    rewards = torch.linspace(-1, 1, 31).double()[torch.randperm(31)]
    pi_ref = logps[0].exp() / logps[0].exp().sum()

    def exact(beta):
        pi_star = (pi_ref.log() + rewards / beta).softmax(0)
        return (pi_star * (pi_star / pi_ref).log()).sum().item(), (pi_star @ rewards).item()

    mixture = logps.logsumexp(0) - torch.tensor(2.0).log()
    kl, reward, effective = optimum((logps[0] - mixture)[drawn][None], rewards[drawn][None], beta)
    low, high = 0.01, 100.0
    for _ in range(60):  # the KL falls as beta grows
        middle = (low + high) / 2
        low, high = (middle, high) if exact(middle)[0] > kl.item() else (low, middle)
    assert low == pytest.approx(beta, rel=0.05) and 50 < effective.item() <= 40_000
    reward_ref = (pi_ref @ rewards).item()
    assert reward.item() - reward_ref == pytest.approx(exact(low)[1] - reward_ref, abs=0.01)


CURVE = [(0.0, 0.0), (1.0, 2.0), (3.0, 3.0)]


def test_gain_and_slope_by_hand():
    assert frontier.gain_and_slope(CURVE, 0.5) == (1.0, 2.0)
    assert frontier.gain_and_slope(CURVE, 2.0) == (2.5, 0.5)
    assert frontier.gain_and_slope(CURVE, 3.1) is None
    assert frontier.gain_and_slope(CURVE, 0.0) is None


def test_the_error_of_a_share_is_the_spread_of_shares():
    """100,000 draws of the rewards and the KL around a point."""
    point = {"kl": 2.0, "kl_se": 0.05, "reward": 2.1, "reward_se": 0.04, "reward_ref": 0.1,
             "reward_ref_se": 0.03}
    found = frontier.judged(point, CURVE)
    assert found["share_of_optimum"] == pytest.approx(0.8) and not found["above"]
    reward, ref, kl = (point[name] + point[f"{name}_se"] * torch.randn(100_000)
                       for name in ("reward", "reward_ref", "kl"))
    shares = (reward - ref) / (2.0 + (kl - 1) / 2)
    assert found["share_se"] == pytest.approx(shares.std().item(), rel=0.02)


def test_a_point_above_the_optimum_is_marked():
    point = {"kl": 2.0, "kl_se": 0.0, "reward": 2.55, "reward_se": 0.04, "reward_ref": 0.0,
             "reward_ref_se": 0.0}
    assert frontier.judged(point, CURVE)["above"]
    assert not frontier.judged(point | {"reward": 2.53}, CURVE)["above"]
    beyond = frontier.judged(point | {"kl": 4.0}, CURVE)
    assert beyond["share_of_optimum"] is None and not beyond["above"]


def test_means_over_seeds():
    points = [{"method": "A", "setting": "n 2", "kl": 1.0, "reward": 2.0 + x,
               "share_of_optimum": 0.9 + x, "share_se": 0.01} for x in (-0.1, 0.1)]
    row, = frontier.summary(points)
    assert row["seeds"] == 2 and row["reward"] == 2.0
    assert row["share_of_optimum"] == pytest.approx(0.9)
    assert row["share_se"] == pytest.approx(0.1)  # their spread says more than their own errors
    row, = frontier.summary([{**point, "share_of_optimum": None} for point in points])
    assert row["share_se"] is None


# --- the runs ---

SCRIPT = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index('--output-dir') + 1])
json.dump({'seconds': 1, 'argv': sys.argv[1:]}, open(out / 'results.json', 'w'))
print('seen')
sys.exit('bad' in sys.argv)
"""


def test_finished_runs_are_not_run_again_and_others_continue(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    first = runs.run(tmp_path / "a", ["script.py", "--beta", 0.1])
    assert first["argv"][:2] == ["--beta", "0.1"] and "--resume" not in first["argv"]
    (tmp_path / "script.py").rename(tmp_path / "moved.py")
    assert runs.run(tmp_path / "a", ["script.py", "--beta", 0.1]) == first
    (tmp_path / "moved.py").rename(tmp_path / "script.py")
    # other flags: another run
    other = ["script.py", "--beta", 0.2]
    assert runs.run(tmp_path / "a", other)["argv"][:2] == ["--beta", "0.2"]
    (tmp_path / "a" / "results.json").unlink()  # interrupted, before its first checkpoint and after
    assert "--resume" not in runs.run(tmp_path / "a", other)["argv"]
    (tmp_path / "a" / "results.json").unlink()
    (tmp_path / "a" / "checkpoint").mkdir()
    (tmp_path / "a" / "checkpoint" / "state.pt").touch()
    assert "--resume" in runs.run(tmp_path / "a", other)["argv"]
    assert "--resume" not in runs.run(tmp_path / "a", ["script.py", "--beta", 0.3])["argv"]
    with pytest.raises(SystemExit, match="status 1: seen"):
        runs.run_all({tmp_path / "b": ["script.py", "bad"]}, 2)


def test_frontier_from_runs_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "RESULTS", tmp_path / "results")
    # matplotlib is not among the tests' requirements
    monkeypatch.setattr(frontier, "draw", lambda points, curve, path: None)
    short = ["--reward-fn", runs.GOLD, "--max-new-tokens", 12]
    rounds = ["--samples-per-prompt", 2, "--prompts-per-round", 16, "--max-steps", 2,
              "--rounds", 2, "--eval-prompts", 12]
    monkeypatch.setattr(frontier, "RUNS", {
        "best-of-n": {"n 64": ["best_of_n.py", "--split", "train[:3]", *short]},
        "expert iteration": {"n 2": ["expert_iteration.py", *rounds, *short]}})
    args = frontier.Args(seeds=[0], methods=list(frontier.RUNS), output_dir=str(tmp_path / "runs"))
    frontier.main(args)
    points = json.loads((tmp_path / "results" / "frontier.json").read_text())["points"]
    assert ([point["setting"] for point in points]
            == [f"n {2**k}" for k in range(1, 7)] + ["n 2, round 1", "n 2, round 2"])
    assert all(set(point) >= {"method", "kl", "kl_se", "reward", "reward_se", "share_of_optimum",
                              "share_se", "seed", "above"} for point in points)
    assert "expert iteration" in capsys.readouterr().out
    results = tmp_path / "runs" / "best-of-n_n_64_0" / "results.json"
    before = results.stat().st_mtime
    frontier.main(args)
    assert results.stat().st_mtime == before


def test_controlled_comparison_from_runs_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controlled_comparison, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(controlled_comparison, "draw", lambda rows, path: None)
    monkeypatch.setattr(controlled_comparison, "PROMPTS", 10)
    feedme = controlled_comparison.RUNS["binary FeedME"]
    monkeypatch.setattr(controlled_comparison, "RUNS", {
        "best-of-4": ["best_of_n.py", "--samples-per-prompt", 4, "--split", "train[:10]"],
        "binary FeedME": [*feedme[:feedme.index("--eval-dataset")], "--max-steps", 2,
                          "--split", "train[:50]"]})
    controlled_comparison.main(controlled_comparison.Args(
        seeds=[0], methods=list(controlled_comparison.RUNS), output_dir=str(tmp_path)))
    results = json.loads((tmp_path / "results" / "controlled_comparison.json").read_text())
    rows = {row["method"]: row for row in results["methods"]}
    assert set(rows) == {"base", "SFT", "best-of-4", "binary FeedME"}
    assert rows["SFT"]["win_rate"] == 0.5
    assert rows["best-of-4"]["win_rate"] > 0.5 and rows["best-of-4"]["kl"] > 0
    assert rows["binary FeedME"]["kl"] != 0
    assert "binary FeedME" in capsys.readouterr().out


def test_seeds_that_disagree_are_named():
    by_seed = {"A": [0.9, 0.9], "B": [0.91, 0.69], "C": [0.75, 0.83]}
    rows = [{"method": name, "win_rate": runs.mean(seeds), "win_rate_se": 0.01,
             "win_rate_by_seed": seeds} for name, seeds in by_seed.items()]
    # B and C are within two standard errors
    assert controlled_comparison.discordant(rows) == ["A and B"]



# --- real text ---


def test_real_text_from_stories_to_table(tmp_path, monkeypatch, capsys):
    """Every policy is the reference here, so no gain and no KL."""
    reviews = [json.loads(line) for line in open(runs.DATA / "comparisons.jsonl")][:300]
    stories = [{"text": review["prompt"] + review["chosen"]} for review in reviews]
    texts = tmp_path / "stories.jsonl"
    texts.write_text("".join(json.dumps(story) + "\n" for story in stories))
    monkeypatch.setattr(real_text, "RESULTS", tmp_path)
    monkeypatch.setattr(real_text, "draw", lambda points, curve, path: None)
    monkeypatch.setattr(real_text, "sentiment",
                        lambda prompts, completions: [float(len(text)) for text in completions])
    monkeypatch.setattr(real_text, "SAMPLES_OF_REFERENCE", 64)
    trained = []

    def copy_instead_of_training(directory, command):
        trained.append(command)
        shutil.copytree(runs.ASSETS / "tiny-sft", directory, dirs_exist_ok=True)
        return {"seconds": 1.0}

    monkeypatch.setattr(real_text, "run", copy_instead_of_training)
    real_text.main(real_text.Args(str(runs.ASSETS / "tiny-sft"), str(texts), train_prompts=12,
                                  held_out_prompts=6, rounds=2, output_dir=tmp_path / "runs"))
    results = json.loads((tmp_path / "real_text.json").read_text())
    assert len(trained) == len(results["points"]) == 9
    for point in results["points"]:
        assert point["kl"] == pytest.approx(0.0, abs=1e-4)
        assert abs(point["gain"]) < 5 * point["gain_se"]
    data = tmp_path / "runs" / "data"
    prompts = [json.loads(line)["prompt"] for line in open(data / "train.jsonl")]
    held_out = [json.loads(line)["prompt"] for line in open(data / "held_out.jsonl")]
    assert len(prompts) == 12 and len(held_out) == 6 and not set(prompts) & set(held_out)
    for prompt in prompts + held_out:
        rests = [story["text"].removeprefix(prompt) for story in stories
                 if story["text"].startswith(prompt)]
        assert prompt[-1] in ".!?" and any(not re.search(r"[.!?]\s", rest) for rest in rests)
    pairs = [json.loads(line) for line in open(data / "pairs.jsonl")]
    # characters as rewards: the longer one wins, but for a tie
    assert pairs and all(len(p["chosen"]) > len(p["rejected"]) - 3 for p in pairs)
    assert "of the optimum" in capsys.readouterr().out


def test_a_share_of_the_optimum_by_hand():
    curve = [(0.0, 0.0), (1.0, 2.0), (2.0, 3.0)]
    found = frontier.share_of_optimum(curve, gain=1.25, gain_se=0.3, kl=1.5, kl_se=0.8)
    # half of 2.5; the curve's slope is 1, so the KL's error counts half: 0.4 beside 0.3
    assert found == pytest.approx((0.5, 0.2))
    assert frontier.share_of_optimum(curve, 1.25, 0.3, 2.5, 0.8) == (None, None)
