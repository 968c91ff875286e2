"""Best of n against its exact law on a model whose every completion is listed; the run directory, resume, mistakes."""

import itertools
import json
import math
import sys

import pytest
import torch
import transformers

from best_of_n import (best_of_n_kl, best_of_n_metrics, best_of_n_weights, best_of_n_win_rate, kl_of_ties,
                       tie_probability)
from common import generate, sequence_logprobs
from conftest import ROOT
from test_runs import kill_at, metrics_of, run
from tiny import Ids

# ----------------------------------------------------------------------------------- exact: every completion of a model


@pytest.fixture(scope="module")
def language():
    """A Llama with three tokens, EOS among them, and completions of at most three: all 15, with their probabilities."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    answers = [a for n in (1, 2, 3) for a in itertools.product(range(3), repeat=n)
               if 2 not in a[:-1] and (a[-1] == 2 or n == 3)]
    logps = sequence_logprobs(model, [([1, *a], [0] + [1] * len(a)) for a in answers]).double()
    assert len(answers) == 15 and abs(logps.exp().sum() - 1) < 1e-5
    return model, answers, logps


REWARDS = {  # of the 15 answers
    "no ties": torch.arange(15).double().mul(7).remainder(15),
    "ties": torch.tensor([0, 1, 1, 2, 3, 1, 0, 2, 2, 3, 1, 1, 0, 2, 3]).double(),
    "all tie": torch.zeros(15).double(),
}


def law(probabilities, rewards, n):
    """Equation (1): F(y)^n - F(<y)^n is the probability of y's score; its answers share it as pi_ref does."""
    same, below = rewards[:, None] == rewards, rewards[:, None] > rewards
    low, mass = (below * probabilities).sum(1), (same * probabilities).sum(1)
    return ((low + mass) ** n - low**n) * probabilities / mass, low, mass


@pytest.mark.parametrize("case", REWARDS)
def test_weights_sample_the_exact_law(case, language):
    """2.5 million sets of N = 4 samples: to 1e-3, for each n, and with the true best of n fresh draws beside it."""
    _, _, logps = language
    probabilities, rewards = logps.exp() / logps.exp().sum(), REWARDS[case]
    counts, sets = {n: torch.zeros(15, dtype=torch.float64) for n in (1, 2, 3, 4)}, 0
    for _ in range(5):
        drawn = torch.multinomial(probabilities, 2_000_000, replacement=True).view(-1, 4)
        sets += len(drawn)
        for n in counts:
            weights = best_of_n_weights(rewards[drawn], n)
            counts[n].scatter_add_(0, drawn.flatten(), weights.flatten())
    for n, count in counts.items():
        expected, _, _ = law(probabilities, rewards, n)
        assert (count / sets - expected).abs().max() < 1e-3


def test_weights_are_the_mean_over_all_subsets():
    scores = torch.tensor([[0.3, -1.0, 0.3, 2.0, 0.3, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    for n in range(1, 7):
        expected = torch.zeros(2, 6, dtype=torch.float64)
        for row, subset in itertools.product(range(2), itertools.combinations(range(6), n)):
            best = [i for i in subset if scores[row, i] == scores[row, list(subset)].max()]
            expected[row, best] += 1 / len(best) / math.comb(6, n)
        torch.testing.assert_close(best_of_n_weights(scores, n), expected)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
@pytest.mark.parametrize("case", REWARDS)
def test_the_kl_bound_and_what_ties_take_away(case, n, language):
    """Equation (4) gives the exact KL; the bound is above it, and reached as the answers' probabilities go to 0."""
    probabilities = language[2].exp() / language[2].exp().sum()
    pi_n, low, mass = law(probabilities, REWARDS[case], n)
    exact = torch.special.xlogy(pi_n, pi_n / probabilities).sum().item()
    assert best_of_n_kl(n) - (pi_n * kl_of_ties(low / (low + mass), n)).sum().item() == pytest.approx(exact, abs=1e-10)
    assert exact <= best_of_n_kl(n) + 1e-12 and (exact < best_of_n_kl(n) - 1e-3 or n == 1)
    fine = torch.full((100_000,), 1e-5, dtype=torch.float64)  # no ties, and no answer with a mass to speak of
    pi_n, low, mass = law_of_order(fine, n)
    exact = torch.special.xlogy(pi_n, pi_n / fine).sum().item()
    assert exact == pytest.approx(best_of_n_kl(n), abs=1e-5)


def law_of_order(probabilities, n):
    up_to = probabilities.cumsum(0).clamp(max=1.0)
    return up_to**n - (up_to - probabilities).clamp(min=0) ** n, up_to - probabilities, probabilities


@pytest.mark.parametrize("case", REWARDS)
def test_sampled_kl_reward_and_win_rate(case, language):
    """From 500 sets of 64 samples that the model itself generates: rewards, KL and win rate are the exact ones."""
    model, answers, logps = language
    number = {answer: i for i, answer in enumerate(answers)}
    rollout = generate(model, Ids(), [[1]] * 500, 65, 3, rows_at_once=8192)
    drawn = torch.tensor([number[tuple(ids[1:])] for ids, _ in rollout.rows]).view(500, 65)
    reference, drawn = drawn[:, 0], drawn[:, 1:]
    sampled_logps = rollout.logps.sum(1).view(500, 65)[:, 1:]
    torch.testing.assert_close(sampled_logps.double(), logps[drawn], rtol=0, atol=1e-5)
    first = torch.tensor([[a not in row[:j] for j, a in enumerate(row)] for row in drawn.tolist()])
    rewards, gold = REWARDS[case], REWARDS["no ties"]
    tie = tie_probability(rewards[drawn], sampled_logps, first)
    probabilities = logps.exp() / logps.exp().sum()
    for n in (1, 2, 4, 16, 64):
        found = best_of_n_metrics(n, rewards[drawn], gold[drawn], torch.ones(500, 64), tie, gold[reference])
        pi_n, _, _ = law(probabilities, rewards, n)
        wins = ((gold[:, None] > gold).double() + 0.5 * (gold[:, None] == gold)) @ probabilities
        for name, values in (("proxy_reward", rewards), ("reward", gold), ("win_rate", wins)):
            expected = pi_n @ values
            # Hoeffding's bound for a mean over subsets: the measured error is 0 where every set holds the best answer
            bound = (pi_n @ (values - expected) ** 2 * n / 64 / 500).sqrt().item()
            assert abs(found[name] - expected.item()) < 4 * max(found[f"{name}_se"], bound) + 1e-9
        exact = torch.special.xlogy(pi_n, pi_n / probabilities).sum().item()
        assert abs(found["kl"] - exact) < 3 * found["kl_se"] + (0.02 if n <= 16 else 0.1)
        assert found["kl"] <= found["kl_bound"] + 1e-9


def test_formulas():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(64) == pytest.approx(4.1589 - 63 / 64, abs=1e-4)
    assert best_of_n_win_rate(1) == 0.5 and best_of_n_win_rate(3) == 0.75
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, 4, generator=generator)
    wins = scores[:, 1:].max(1).values > scores[:, 0]
    assert wins.double().mean() == pytest.approx(best_of_n_win_rate(3), abs=0.01)
    weights = best_of_n_weights(scores, 4)
    assert torch.equal(weights, torch.nn.functional.one_hot(scores.argmax(1), 4).double())


# --------------------------------------------------------------------------------------------------------- as it is run

REWARD = ROOT / "assets" / "rewards.py"
QUICK = ["--n", "6", "--split", "train[:12]", "--batch-size", "3", "--max-new-tokens", "12", "--save-every", "1",
         "--reward-fn", f"{REWARD}:sentiment"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("best_of_n")
    status, output, errors = run("best_of_n", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory, output


def test_run_directory(finished):
    directory, output = finished
    rows = metrics_of(directory)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and rows[0]["kl"] == 0 and "reward" in rows[0]
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 24 and all({"prompt", "completion", "reward"} <= set(s) for s in samples)
    results = json.loads((directory / "results.json").read_text())
    assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
                            "win_rate_se", "ended", "seconds", "proxy_reward", "proxy_reward_ref"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    ns = [1, 2, 4, 6]
    rewards = [results[f"proxy_reward_n{n}"] for n in ns]
    assert rewards == sorted(rewards) and results["kl"] < results["kl_bound"] == best_of_n_kl(6)
    assert all(f"\n  {n} " in output for n in ns)


def test_what_was_kept_feeds_sft_and_dpo(finished, tmp_path):
    directory, _ = finished
    best = [json.loads(line) for line in (directory / "best.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (directory / "pairs.jsonl").read_text().splitlines()]
    assert len(best) == 12 and {tuple(row) for row in best} == {("prompt", "completion")} and 8 <= len(pairs) <= 12
    sys.path.insert(0, str(ROOT / "assets"))
    from rewards import sentiment
    for pair in pairs:
        chosen, rejected = sentiment(None, [pair["chosen"], pair["rejected"]])
        assert chosen >= rejected
    quick = ["--max-steps", "1", "--batch-size", "4", "--max-new-tokens", "8"]
    for script, name, more in (("sft", "best", ["--model", ROOT / "assets" / "tiny-sft"]),
                               ("dpo", "pairs", ["--eval-prompts", "2"])):
        paths = ["--dataset", directory / f"{name}.jsonl", "--output-dir", tmp_path / script]
        status, _, errors = run(script, *paths, *quick, *more)
        assert status == 0, errors


@pytest.mark.parametrize("wait_for", [1, 3])  # lines of metrics.jsonl: before and after the first checkpoint
def test_killed_and_resumed_equals_uninterrupted(wait_for, finished, tmp_path):
    kill_at(wait_for, "best_of_n", *QUICK, directory=tmp_path)
    status, output, errors = run("best_of_n", *QUICK, "--output-dir", tmp_path, "--resume")
    assert status == 0, errors
    assert wait_for == 1 or "resuming" in output
    assert metrics_of(tmp_path) == metrics_of(finished[0])
    for name in ("samples.jsonl", "best.jsonl", "pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


MISTAKES = {
    "no sample": (["--n", "0"], "", "--n"),
    "no reward": (["--dataset", "d.jsonl"], json.dumps({"prompt": "a"}), "--reward-model"),
    "no prompt": (["--dataset", "d.jsonl", "--reward-fn", f"{REWARD}:sentiment"], json.dumps({"text": "a"}), "row 1"),
    "no reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a policy for a judge": (["--reward-model", str(ROOT / "assets" / "tiny-sft")], "", "labels"),
    "no room": (["--max-new-tokens", "256"], "", "--max-new-tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, monkeypatch, capsys):
    import best_of_n
    from common import run_script
    flags, data, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(data)
    monkeypatch.chdir(tmp_path)
    split = [] if "--dataset" not in flags else ["--split", "train"]
    monkeypatch.setattr(sys, "argv", ["best_of_n.py", *flags, *split])
    with pytest.raises(SystemExit) as stop:
        run_script(best_of_n.main, best_of_n.Args)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and what in errors and errors.count("\n") == 1, errors
