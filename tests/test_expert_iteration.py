"""Expert iteration: a round lands on the law of best of n over a language whose completions are listed; run directory,
resume, mistakes."""

import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import sft
from common import generate, load_model, load_tokenizer, make_row, pad_rows, sequence_logprobs, token_logprobs
from conftest import ROOT
from expert_iteration import keep_best, sft_loss
from test_best_of_n import law
from test_runs import kill_at, metrics_of, run
from tiny import saved_language


def test_keep_best_by_hand():
    best, better = keep_best(torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.0, 0.0], [5.0, 5.0, 5.0]]))
    assert best.tolist() == [1, 0, 0] and better.tolist() == [True, True, False]


def test_the_loss_is_sft_s():
    logps, mask = torch.randn(3, 5), torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 0]])
    assert sft_loss(logps, mask) == sft.sft_loss(logps, mask)


def test_a_round_lands_on_the_law_of_best_of_n(tmp_path):
    """20,000 prompts of 3 answers: what is kept follows best_of_n.py's equation (1), given that answers differ;
    supervised learning of it makes it the policy's own law."""
    answers = saved_language(tmp_path, 1)
    model, tokenizer = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    logps = sequence_logprobs(model, [make_row([0, 2], answer) for answer in answers]).double()
    probabilities, rewards = logps.exp() / logps.exp().sum(), torch.arange(31.0).mul(7).remainder(5)  # many tie
    rollout = generate(model, tokenizer, ["a"] * 20_000, 3, 2, rows_at_once=8192)
    drawn = torch.tensor([answers.index(ids[2:]) for ids, _ in rollout.rows]).view(-1, 3)
    best, better = keep_best(rewards[drawn])
    kept = drawn[torch.arange(len(drawn)), best]
    exact, _, _ = law(probabilities, rewards.double(), 3)
    assert (torch.bincount(kept, minlength=31) / len(kept) - exact).abs().max() < 4 * (0.25 / 20_000) ** 0.5

    same = torch.stack([probabilities[rewards == level].sum() for level in range(5)]) ** 3  # all three score alike
    conditional = exact.clone()
    for level in range(5):
        conditional[rewards == level] -= (same[level] * probabilities[rewards == level]
                                          / probabilities[rewards == level].sum())
    conditional /= conditional.sum()
    count = torch.bincount(kept[better], minlength=31).double()
    input_ids, mask = pad_rows([make_row([0, 2], answer) for answer in answers])
    weights = (count / count.sum()).float()[:, None] * mask
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 300)
        logps = token_logprobs(model, input_ids, None, mask)
        sft_loss(logps, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = sequence_logprobs(model, [make_row([0, 2], answer) for answer in answers]).double().exp()
    assert 0.5 * (conditional - probabilities).abs().sum() > 0.2  # there was something to learn
    assert 0.5 * (learnt - conditional).abs().sum() < 0.02


# --------------------------------------------------------------------------------------------------------- as it is run

REWARD = f"{ROOT / 'assets' / 'rewards.py'}:sentiment"
QUICK = ["--rounds", "2", "--n", "3", "--prompts-per-round", "16", "--batch-size", "4", "--max-steps", "3",
         "--save-every", "2", "--eval-prompts", "20", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("expert_iteration")
    status, output, errors = run("expert_iteration", *QUICK, "--output-dir", directory)
    assert status == 0 and errors == "", errors
    return directory, output


def without_speeds(directory):
    return [{name: value for name, value in row.items() if not name.endswith("tokens_per_s")}
            for row in metrics_of(directory)]


def test_run_directory(finished):
    directory, output = finished
    rows = metrics_of(directory)
    assert [row["step"] for row in rows] == [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]
    assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    rounds = [row for row in rows if "kept_reward" in row]
    assert len(rounds) == 2 and all(row["kept_reward"] > row["round_reward"] and row["kept"] > 0.8 for row in rounds)
    assert [row["round"] for row in rows if "round" in row] == [0, 1, 2]
    results = json.loads((directory / "results.json").read_text())
    assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
                            "win_rate_se", "ended", "seconds", "proxy_reward", "proxy_reward_ref"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 3, 6} and len(samples) == 60
    assert "proxy reward" in output and "\n  2 " in output
    assert transformers.AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16  # as tiny-sft came


@pytest.mark.parametrize("wait_for", [2, 7])  # lines of metrics.jsonl: before any checkpoint, between two rounds
def test_killed_and_resumed_equals_uninterrupted(wait_for, finished, tmp_path):
    kill_at(wait_for, "expert_iteration", *QUICK, directory=tmp_path)
    status, output, errors = run("expert_iteration", *QUICK, "--output-dir", tmp_path, "--resume")
    assert status == 0 and ("resuming" in output) == (wait_for > 2), errors
    assert without_speeds(tmp_path) == without_speeds(finished[0])
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished[0] / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished[0], tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


MISTAKES = {
    "one answer": (["--n", "1"], "", "--n"),
    "no round": (["--rounds", "0"], "", "--rounds"),
    "no prompt in a round": (["--prompts-per-round", "0"], "", "--prompts-per-round"),
    "no epoch": (["--epochs", "0"], "", "--epochs"),
    "no reward": (["--dataset", "d.jsonl"], {"prompt": "a"}, "--reward-model"),
    "no prompt": (["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl", "--reward-fn", REWARD], {"text": "a"}, "row 1"),
    "another column": (["--prompt-column", "question"], "", "question"),
    "a missing reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a policy for a judge": (["--reward-model", ROOT / "assets" / "tiny-sft"], "", "labels"),
    "nothing to choose from": (["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl", "--reward-fn", "r.py:same"],
                               {"prompt": "a"}, "score alike"),
    "a reward that is not a number": (["--reward-fn", "r.py:nan"], "", "nan"),
    "no room": (["--max-new-tokens", "250"], "", "--max-new-tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch, capsys):
    import expert_iteration
    from common import run_script
    flags, row, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (tmp_path / "r.py").write_text(
        "def same(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n\n"
        "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    kept = [x for pair in zip(QUICK[::2], QUICK[1::2]) if pair[0] not in flags for x in pair]
    monkeypatch.setattr(sys, "argv", ["expert_iteration.py", *map(str, [*kept, *flags])])
    with pytest.raises(SystemExit) as stop:
        run_script(expert_iteration.main, expert_iteration.Args)
    errors = capsys.readouterr().err
    assert (stop.value.code == 2 and errors.startswith("expert_iteration.py: error: ")
            and errors.count("\n") == 1), errors
    assert what in errors, errors
