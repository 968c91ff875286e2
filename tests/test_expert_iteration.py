"""Expert iteration: a round lands on the law of best of n over a language whose completions are
listed; run directory, resume, mistakes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sft
from common import (
    Row, generate, load_model, load_tokenizer, make_row, pad_rows, sequence_logprobs, token_logprobs
)
from conftest import ROOT
from expert_iteration import Args, add_gradients, keep_best, sft_loss
from test_best_of_n import law
from test_runs import kill_at, metrics_of, run
from tiny import model_of, saved_language


def test_keep_best_by_hand():
    best, better = keep_best(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0], [5.0, 5.0, 5.0]]))
    assert best.tolist() == [1, 0, 0] and better.tolist() == [True, True, False]


def test_the_loss_is_sft_s():
    logps = torch.randn(3, 5)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0]])
    assert sft_loss(logps, mask) == sft.sft_loss(logps, mask)


def test_the_gradient_is_that_of_the_whole_batch_however_it_is_cut():
    rows = [make_row([1, 5], [7, 8, 2]), make_row([1], [9, 2]), make_row([1, 3, 4], [5] * 6 + [2])]
    input_ids, mask = pad_rows(rows)
    model = model_of("llama")
    expected = sft_loss(token_logprobs(model, input_ids, mask, 0.7), mask)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for size in (1, 2, None):
        model = model_of("llama")
        loss = add_gradients(model, rows, Args(micro_batch_size=size, temperature=0.7))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for parameter, gradient in zip(model.parameters(), gradients):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_a_round_lands_on_the_law_of_best_of_n(tmp_path):
    """20,000 prompts of 3 completions: what is kept follows best_of_n.py's equation (1), given that
    rewards differ; supervised learning of it makes it the policy's own law."""
    listed = saved_language(tmp_path, 1)
    model, tokenizer = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    rows = [make_row([0, 2], completion) for completion in listed]
    probabilities = sequence_logprobs(model, rows).double().exp()
    probabilities /= probabilities.sum()
    rewards = torch.arange(31.0).mul(7).remainder(5)  # many tie
    rollout = generate(model, tokenizer, ["a"] * 20_000, 3, 2, rows_at_once=8192)
    drawn = torch.tensor([listed.index(ids[2:]) for ids, _ in rollout.rows]).view(-1, 3)
    best, better = keep_best(rewards[drawn])
    kept = drawn[torch.arange(len(drawn)), best]
    exact, _, _ = law(probabilities, rewards.double(), 3)
    share = torch.bincount(kept, minlength=31) / len(kept)
    assert (share - exact).abs().max() < 4 * (0.25 / 20_000) ** 0.5

    conditional = exact.clone()
    for level in range(5):
        at = rewards == level
        mass = probabilities[at].sum()  # all three score alike with probability mass^3
        conditional[at] -= mass**3 * probabilities[at] / mass
    conditional /= conditional.sum()
    count = torch.bincount(kept[better], minlength=31).double()
    input_ids, mask = pad_rows(rows)
    weights = (count / count.sum()).float()[:, None] * mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        logps = token_logprobs(model, input_ids, mask)
        sft_loss(logps, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = sequence_logprobs(model, rows).double().exp()
    assert 0.5 * (conditional - probabilities).abs().sum() > 0.2  # there was something to learn
    assert 0.5 * (learnt - conditional).abs().sum() < 0.02


# --- as it is run ---

REWARD = f"{ROOT / 'assets' / 'rewards.py'}:sentiment"
QUICK = ["--rounds", "2", "--samples-per-prompt", "3", "--prompts-per-round", "16",
         "--batch-size", "4", "--max-steps", "3", "--save-every", "2", "--eval-prompts", "20",
         "--max-new-tokens", "12", "--split", "train[:100]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("expert_iteration")
    status, output, errors = run("expert_iteration", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory, output


def without_speeds(directory):
    rows = metrics_of(directory)
    for row in rows:
        row.pop("rollout_tokens_per_s", None)
    return rows


def test_run_directory(finished):
    directory, output = finished
    rows = metrics_of(directory)
    assert [row["step"] for row in rows] == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]
    phases = ["eval", *["train"] * 4, "eval", *["train"] * 4, "eval"]
    assert [row["phase"] for row in rows] == phases
    assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    rounds = [row for row in rows if "kept_reward" in row]
    assert len(rounds) == 2
    assert all(row["kept_reward"] > row["round_reward"] and row["kept"] > 0.8 for row in rounds)
    assert [row["round"] for row in rounds] == [1, 2]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates[1:] == sorted(rates[1:], reverse=True)  # the decay spans all rounds
    results = json.loads((directory / "results.json").read_text())
    assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se",
                            "win_rate", "win_rate_se", "ended", "seconds", "proxy_reward",
                            "proxy_reward_ref"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 3, 6} and len(samples) == 60
    assert "proxy reward" in output and "\n  2 " in output
    saved = transformers.AutoModelForCausalLM.from_pretrained(directory)
    assert saved.dtype == torch.float32


# lines of metrics.jsonl: before any checkpoint, within the first round, between two rounds
@pytest.mark.parametrize("wait_for", [2, 5, 7])
def test_killed_and_resumed_equals_uninterrupted(wait_for, finished, tmp_path):
    kill_at(wait_for, "expert_iteration", *QUICK, directory=tmp_path)
    resume = ["--resume"] if wait_for > 2 else []
    status, output, errors = run("expert_iteration", *QUICK, "--output-dir", tmp_path, *resume)
    assert status == 0 and ("resuming" in output) == (wait_for > 2), errors
    assert without_speeds(tmp_path) == without_speeds(finished[0])
    samples, expected = (d / "samples.jsonl" for d in (tmp_path, finished[0]))
    assert samples.read_bytes() == expected.read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished[0], tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_learn_and_are_merged(tmp_path):
    flags = ["--lora-rank", 4, "--reward-fn", REWARD, "--rounds", 1, "--output-dir", tmp_path]
    status, _, errors = run("expert_iteration", *QUICK, *flags)
    assert status == 0, errors
    rows = metrics_of(tmp_path)
    assert "proxy_reward" not in rows[0]  # the reward that judges is the one that chooses
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] != 0
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any("lora" in name for name in names)


DATA = ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"]
MISTAKES = {
    "one completion": (["--samples-per-prompt", "1"], "", "--samples-per-prompt 1"),
    "no round": (["--rounds", "0"], "", "--rounds"),
    "no prompt in a round": (["--prompts-per-round", "0"], "", "--prompts-per-round"),
    "no epoch": (["--epochs", "0"], "", "--epochs"),
    "no reward": (["--dataset", "d.jsonl"], {"prompt": "a"}, "--reward-model"),
    "no prompt": ([*DATA, "--reward-fn", REWARD], {"text": "a"}, "row 1"),
    "another column": (["--prompt-column", "question"], "", "question"),
    "a missing reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a policy for a judge": (["--reward-model", ROOT / "assets" / "tiny-sft"], "", "tiny-sft"),
    "nothing to choose from": ([*DATA, "--reward-fn", "r.py:same"], {"prompt": "a"}, "score alike"),
    "a reward that is not a number": (["--reward-fn", "r.py:nan"], "", "nan"),
    "no room": (["--max-new-tokens", "250"], "", "--max-new-tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch):
    flags, data, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(data))
    (tmp_path / "r.py").write_text(
        "def same(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n\n"
        "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    status, _, errors = run("expert_iteration", *QUICK, *flags)  # the last of two flags counts
    assert status == 2 and errors.startswith("expert_iteration.py: error: "), errors
    assert errors.count("\n") == 1 and what in errors, errors
