"""Best of n against its exact law on a model whose every completion is listed; the run directory,
resume, mistakes."""

import importlib
import itertools
import json
import math

import pytest
import torch
import transformers

from best_of_n import (
    Args, best_of_n_kl, best_of_n_metrics, best_of_n_weights, best_of_n_win_rate, kl_of_ties,
    score, tie_probability
)
from common import Row, generate, load_model, load_tokenizer, sequence_logprobs
from conftest import ROOT
from harness import load_different_prompts
from test_runs import kill_at, metrics_of, run
from tiny import Ids

# --- exact: every completion of a model ---


@pytest.fixture(scope="module")
def language():
    """A Llama with three tokens, EOS among them, and completions of at most three: all 15, with
    their probabilities."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    completions = [c for n in (1, 2, 3) for c in itertools.product(range(3), repeat=n)
                   if 2 not in c[:-1] and (c[-1] == 2 or n == 3)]
    rows = [Row([1, *c], [0] + [1] * len(c)) for c in completions]
    logps = sequence_logprobs(model, rows).double()
    assert len(completions) == 15 and abs(logps.exp().sum() - 1) < 1e-5
    return model, completions, logps


REWARDS = {  # of the 15 completions
    "no ties": torch.arange(15).double().mul(7).remainder(15),
    "ties": torch.tensor([0, 1, 1, 2, 3, 1, 0, 2, 2, 3, 1, 1, 0, 2, 3]).double(),
    "all tie": torch.zeros(15).double(),
}


def law(probabilities, rewards, n):
    """Equation (1): F(y)^n - F(<y)^n is the probability of y's score; the completions that have it
    share it as pi_ref does."""
    same, below = rewards[:, None] == rewards, rewards[:, None] > rewards
    low, mass = (below * probabilities).sum(1), (same * probabilities).sum(1)
    return ((low + mass) ** n - low**n) * probabilities / mass, low, mass


@pytest.mark.parametrize("case", REWARDS)
def test_weights_sample_the_exact_law(case, language):
    """2.5 million sets of N = 4 samples: to 1e-3, for each n."""
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
    rewards = torch.tensor([[0.3, -1.0, 0.3, 2.0, 0.3, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    for n in range(1, 7):
        expected = torch.zeros(2, 6, dtype=torch.float64)
        for row, subset in itertools.product(range(2), itertools.combinations(range(6), n)):
            highest = rewards[row, list(subset)].max()
            best = [i for i in subset if rewards[row, i] == highest]
            expected[row, best] += 1 / len(best) / math.comb(6, n)
        torch.testing.assert_close(best_of_n_weights(rewards, n), expected)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
@pytest.mark.parametrize("case", REWARDS)
def test_the_kl_bound_and_what_ties_take_away(case, n, language):
    """Equation (4) gives the exact KL; the bound is above it, and reached as the completions'
    probabilities go to 0."""
    probabilities = language[2].exp() / language[2].exp().sum()
    pi_n, low, mass = law(probabilities, REWARDS[case], n)
    exact = torch.special.xlogy(pi_n, pi_n / probabilities).sum().item()
    found = best_of_n_kl(n) - (pi_n * kl_of_ties(low / (low + mass), n)).sum().item()
    assert found == pytest.approx(exact, abs=1e-10)
    assert exact <= best_of_n_kl(n) + 1e-12 and (exact < best_of_n_kl(n) - 1e-3 or n == 1)
    fine = torch.full((100_000,), 1e-5, dtype=torch.float64)  # no ties, and tiny probabilities
    up_to = fine.cumsum(0).clamp(max=1.0)
    pi_n = up_to**n - (up_to - fine).clamp(min=0) ** n
    exact = torch.special.xlogy(pi_n, pi_n / fine).sum().item()
    assert exact == pytest.approx(best_of_n_kl(n), abs=1e-5)


@pytest.mark.parametrize("case", REWARDS)
def test_sampled_kl_reward_and_win_rate(case, language):
    """From 500 sets of 64 samples that the model itself generates: rewards, KL and win rate are
    the exact ones."""
    model, completions, logps = language
    number = {completion: i for i, completion in enumerate(completions)}
    rollout = generate(model, Ids(), [[1]] * 500, 65, 3, rows_at_once=8192)
    drawn = torch.tensor([number[tuple(row.ids[1:])] for row in rollout.rows]).view(500, 65)
    reference, drawn = drawn[:, 0], drawn[:, 1:]
    sampled_logps = rollout.logps.sum(1).view(500, 65)[:, 1:]
    torch.testing.assert_close(sampled_logps.double(), logps[drawn], rtol=0, atol=1e-5)
    is_first = [[a not in row[:j] for j, a in enumerate(row)] for row in drawn.tolist()]
    rewards, gold = REWARDS[case], REWARDS["no ties"]
    scores = {
        "proxy_reward": rewards[drawn],
        "reward": gold[drawn],
        "ended": torch.ones(500, 64),
        "tie": tie_probability(rewards[drawn], sampled_logps, torch.tensor(is_first)),
    }
    probabilities = logps.exp() / logps.exp().sum()
    wins = ((gold[:, None] > gold).double() + 0.5 * (gold[:, None] == gold)) @ probabilities
    for n in (1, 2, 4, 16, 64):
        found = best_of_n_metrics(n, scores, gold[reference][:, None])
        pi_n, _, _ = law(probabilities, rewards, n)
        for name, values in {"proxy_reward": rewards, "reward": gold, "win_rate": wins}.items():
            expected = pi_n @ values
            # Hoeffding's bound for a mean over subsets: the measured error is 0 where every set
            # holds the best completion.
            bound = (pi_n @ (values - expected) ** 2 * n / 64 / 500).sqrt().item()
            error = abs(found[name] - expected.item())
            assert error < 4 * max(found[f"{name}_se"], bound) + 1e-9
        exact = torch.special.xlogy(pi_n, pi_n / probabilities).sum().item()
        assert abs(found["kl"] - exact) < 3 * found["kl_se"] + (0.02 if n <= 16 else 0.1)
        assert found["kl"] <= found["kl_bound"] + 1e-9


def test_formulas():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(64) == pytest.approx(4.1589 - 63 / 64, abs=1e-4)
    assert best_of_n_win_rate(1) == 0.5 and best_of_n_win_rate(3) == 0.75
    rewards = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    wins = rewards[:, 1:].max(1).values > rewards[:, 0]
    assert wins.double().mean() == pytest.approx(best_of_n_win_rate(3), abs=0.01)
    best = torch.nn.functional.one_hot(rewards.argmax(1), 4).double()
    assert torch.equal(best_of_n_weights(rewards, 4), best)


def test_standard_errors_of_one_prompt_are_not_known():
    scores = {name: torch.rand(1, 4) for name in ("proxy_reward", "reward", "ended", "tie")}
    metrics = best_of_n_metrics(2, scores, torch.zeros(1, 1))
    for name in ("proxy_reward", "reward", "kl", "win_rate"):
        assert metrics[f"{name}_se"] is None
    assert math.isfinite(metrics["kl"])


def test_equal_completions_have_one_reward_and_groups_stay_whole(language):
    """A reward function sees all completions of a prompt, with its columns, and the ids that were
    sampled; where it is unsure of equal ones, the first reward counts."""
    calls = []

    def unsure(examples, completions, completion_ids):
        calls.append((examples, completions, completion_ids))
        return torch.arange(len(completions)).float()

    rollout = generate(language[0], Ids(), [[1], [1]], 40, 3)
    scores = score(rollout, ["a", "b"], unsure, unsure)
    (examples, completions, completion_ids), = calls  # once: what chooses also judges
    assert examples == ["a"] * 40 + ["b"] * 40 and completions == rollout.completions
    assert completion_ids == [row.ids[1:] for row in rollout.rows]
    for i, row in enumerate(scores["reward"].tolist()):
        texts = completions[40 * i:40 * i + 40]
        assert row == [40 * i + texts.index(text) for text in texts]


# --- as it is run ---

REWARD, SFT = ROOT / "assets" / "rewards.py", ROOT / "assets" / "tiny-sft"
QUICK = ["--n", "6", "--split", "train[:12]", "--batch-size", "3", "--max-new-tokens", "12",
         "--save-every", "1", "--reward-fn", f"{REWARD}:sentiment"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("best_of_n")
    status, output, errors = run("best_of_n", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory, output


def test_run_directory(finished):
    directory, output = finished
    rows = metrics_of(directory)
    assert [(row["step"], row["phase"]) for row in rows] == [(n, "eval") for n in range(5)]
    assert rows[0]["kl"] == 0 and rows[0]["win_rate"] == 0.5 and "reward" in rows[0]
    samples = lines_of(directory / "samples.jsonl")
    names = {"prompt", "completion", "reward", "ended"}
    assert len(samples) == 24 and all(names <= set(sample) for sample in samples)
    results = json.loads((directory / "results.json").read_text())
    assert set(results) >= {
        "reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
        "win_rate_se", "ended", "seconds", "proxy_reward", "proxy_reward_ref",
    }
    assert all(isinstance(value, (int, float)) for value in results.values())
    ns = [1, 2, 4, 6]
    rewards = [results[f"proxy_reward_n{n}"] for n in ns]
    assert rewards == sorted(rewards) and results["kl"] < results["kl_bound"] == best_of_n_kl(6)
    assert all(f"\n  {n} " in output for n in ns)
    args = json.loads((directory / "args.json").read_text())
    assert args["samples_per_prompt"] == 6  # --n is another name for it


def test_what_was_kept_feeds_sft_and_dpo(finished, tmp_path, monkeypatch):
    directory, _ = finished
    best, pairs = lines_of(directory / "best.jsonl"), lines_of(directory / "pairs.jsonl")
    assert len(best) == 12 and {tuple(row) for row in best} == {("prompt", "completion")}
    assert 8 <= len(pairs) <= 12 and all(pair["chosen"] != pair["rejected"] for pair in pairs)
    monkeypatch.syspath_prepend(ROOT / "assets")
    sentiment = importlib.import_module("rewards").sentiment
    for pair in pairs:
        chosen, rejected = sentiment(None, [pair["chosen"], pair["rejected"]])
        assert chosen >= rejected
    quick = ["--max-steps", "1", "--batch-size", "4", "--max-new-tokens", "8"]
    for script, name, more in (("sft", "best", ["--model", SFT]),
                               ("dpo", "pairs", ["--eval-prompts", "2"])):
        paths = ["--dataset", directory / f"{name}.jsonl", "--output-dir", tmp_path / script]
        status, _, errors = run(script, *paths, *quick, *more)
        assert status == 0, errors


# lines of metrics.jsonl at the kill: before and after the first checkpoint
@pytest.mark.parametrize("lines", [1, 3])
def test_killed_and_started_again_equals_uninterrupted(lines, finished, tmp_path):
    kill_at(lines, "best_of_n", *QUICK, directory=tmp_path)
    resume = ["--resume"] if (tmp_path / "checkpoint" / "state.pt").exists() else []
    assert resume or lines == 1
    status, output, errors = run("best_of_n", *QUICK, "--output-dir", tmp_path, *resume)
    assert status == 0, errors
    assert ("resuming" in output) == bool(resume)
    assert metrics_of(tmp_path) == metrics_of(finished[0])
    for name in ("samples.jsonl", "best.jsonl", "pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished[0] / name).read_bytes()


def test_prompts_that_are_left_out_are_counted(tmp_path, capsys):
    prompts = ["a", "b", "a", "long " * 200, "b"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    args = Args(dataset=str(path), split="train")
    found = load_different_prompts(args, load_model(str(SFT)), load_tokenizer(str(SFT)))
    assert [example["prompt"] for example, _ in found] == ["a", "b"]
    said = capsys.readouterr().out
    first = f"(first: --dataset {path}, row 3)"
    assert f"2 rows skipped: an earlier row has the same prompt {first}" in said
    assert "1 rows skipped: the prompt leaves no room" in said and "row 4)" in said


def test_one_sample_of_one_prompt(tmp_path):
    """No choice, no pair, no error bars: null in results.json."""
    flags = [*QUICK, "--n", 1, "--split", "train[:1]", "--output-dir", tmp_path]
    status, output, errors = run("best_of_n", *flags)
    assert status == 0 and "0 of 1 prompts in" in output, errors
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["kl"] == 0 and results["reward_se"] is None and results["win_rate_se"] is None
    assert len(lines_of(tmp_path / "best.jsonl")) == 1 and not lines_of(tmp_path / "pairs.jsonl")


def test_relative_paths_into_the_embedded_world_have_its_rewards(tmp_path, monkeypatch):
    """As in the commands of the docstring."""
    monkeypatch.chdir(ROOT)
    flags = ["--dataset", "assets/data/review_prompts.jsonl", "--split", "train[:2]", "--n", 2,
             "--max-new-tokens", 4, "--output-dir", tmp_path]
    status, _, errors = run("best_of_n", *flags)
    assert status == 0, errors
    args = json.loads((tmp_path / "args.json").read_text())
    assert args["reward_model"].endswith("tiny-rm") and args["reward_fn"].endswith("sentiment")


DATA = ["--dataset", "d.jsonl", "--split", "train"]
MISTAKES = {
    "no sample": (["--n", "0"], "", "--samples-per-prompt 0"),
    "no reward": (DATA, {"prompt": "a"}, "--reward-model"),
    "no prompt": ([*DATA, "--reward-fn", f"{REWARD}:sentiment"], {"text": "a"}, "row 1"),
    "no reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a policy for a judge": (["--reward-model", SFT], "", "tiny-sft"),
    "no room": (["--max-new-tokens", "512"], "", "--max-new-tokens"),
    "greedy": (["--temperature", "0"], "", "--temperature 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, monkeypatch):
    flags, data, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    status, _, errors = run("best_of_n", *flags)
    assert status == 2 and errors.startswith("best_of_n.py: error: "), errors
    assert what in errors and errors.count("\n") == 1, errors
