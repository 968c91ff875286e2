"""Reward conditioning: labels by hand, the loss against its sums, and the law that it must reach where all completions
are listed; run directory, resume, mistakes."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from common import (encode_prompt, generate, load_model, load_tokenizer, make_row, pad_rows, sequence_logprobs,
                    token_logprobs)
from conftest import ROOT
from reward_conditioning import Args, conditioning_loss, labelled_pool, quantile_labels, vocabulary_logprobs
from test_runs import kill_at, metrics_of, run
from tiny import ARCHITECTURES, model_of, saved_language


def test_quantile_labels_by_hand():
    assert quantile_labels(torch.tensor([0.3, -1.0, 2.0, 0.5]), 2).tolist() == [1, 1, 2, 2]
    assert quantile_labels(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]), 3).tolist() == [3, 3, 2, 2, 1, 1]
    assert quantile_labels(torch.zeros(4), 2).tolist() == [1, 1, 2, 2]  # equal rewards: the earlier get the lower label
    assert quantile_labels(torch.arange(3.0), 5).tolist() == [1, 2, 4]  # fewer answers than labels
    labels = quantile_labels(torch.randn(1003), 5)
    assert {n.item() for n in torch.bincount(labels)[1:]} == {200, 201}


def test_the_loss_by_its_sums():
    logps, ref_logps = torch.randn(2, 7, 5).log_softmax(-1)
    targets = torch.randint(5, (7,))
    loss, kl = conditioning_loss(logps, ref_logps, targets, 0.3)
    expected = (ref_logps.exp() * (ref_logps - logps)).sum()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(loss, -logps[range(7), targets].sum() + 0.3 * expected)
    loss, kl = conditioning_loss(logps, None, targets, 0.0)
    torch.testing.assert_close(loss, -logps[range(7), targets].sum())
    assert kl == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_with_and_without_a_label_line_up(name):
    """Position by position the same token, each under its own prompt; and the model's own log-probabilities."""
    model = model_of(name)
    completions = [[5, 9, 2], [7, 2], [11, 12, 13, 2]]
    with_label = [make_row([1, 20, 21, *range(30, 33 + n)], c) for n, c in enumerate(completions)]
    without = [make_row([1, *range(30, 33 + n)], c) for n, c in enumerate(completions)]
    targets = []
    for rows in (with_label, without):
        logps, target = vocabulary_logprobs(model, rows, 0.7)
        targets.append(target)
        input_ids, mask = pad_rows(rows)
        expected = token_logprobs(model, input_ids, None, mask, 0.7)[mask.bool()]
        torch.testing.assert_close(logps.gather(1, target[:, None])[:, 0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logps.exp().sum(1), torch.ones(len(logps)))
    assert targets[0].tolist() == targets[1].tolist() == sum(completions, [])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_policy_given_a_label_becomes_the_law_of_its_quantile(tmp_path):
    """20,000 samples of a listed language, cut into three parts by reward. With beta 0 the fixed point is the part's
    own law, for the best label among them; with a large beta it is the reference."""
    answers = saved_language(tmp_path, 1)
    tokenizer, reference = load_tokenizer(str(tmp_path)), load_model(str(tmp_path))
    rollout = generate(reference, tokenizer, ["a"] * 20_000, 1, 2, rows_at_once=8192)
    rewards = torch.arange(31.0).mul(7).remainder(31)
    drawn = torch.tensor([answers.index(ids[2:]) for ids, _ in rollout.rows])
    args = Args(prefix="{label} ", quantiles=3)
    pool = [{"prompt": "a", "ids": answers[i], "reward": rewards[i].item()} for i in drawn.tolist()]
    words = {1: "b", 2: "c", 3: "d"}
    rows = labelled_pool([{**answer} for answer in pool], _Renamed(tokenizer, words), args)
    assert {tuple(row[0][:3]) for row, _ in rows} == {(0, 3, 2), (0, 4, 2), (0, 5, 2)}  # <s> label a
    labels = quantile_labels(rewards[drawn], 3)
    for beta, target in ((0.0, "part"), (100.0, "reference")):
        model = load_model(str(tmp_path))
        counts = torch.stack([torch.bincount(drawn[labels == k], minlength=31) for k in (1, 2, 3)]).float()  # [3, 31]
        rounded = [(k, i) for k in range(3) for i in range(31) if counts[k, i]]
        with_label = [make_row([0, 3 + k, 2], answers[i]) for k, i in rounded]
        without = [make_row([0, 2], answers[i]) for k, i in rounded]
        weights = torch.tensor([counts[k, i] for k, i in rounded]) / len(drawn)
        per_token = torch.cat([weights[n].expand(len(answers[i])) for n, (k, i) in enumerate(rounded)])
        with torch.no_grad():
            ref_logps, _ = vocabulary_logprobs(reference, without, 1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
            logps, targets = vocabulary_logprobs(model, with_label, 1.0)
            one = torch.vmap(lambda logp, ref, y: conditioning_loss(logp[None], ref[None], y[None], beta)[0])
            (one(logps, ref_logps, targets) * per_token).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        best = sequence_logprobs(model, [make_row([0, 5, 2], answer) for answer in answers]).exp()
        ref = sequence_logprobs(reference, [make_row([0, 2], answer) for answer in answers]).exp()
        expected = counts[2] / counts[2].sum() if target == "part" else ref
        assert 0.5 * (best - expected).abs().sum() < 0.05, target
        assert target == "reference" or 0.5 * (ref - expected).abs().sum() > 0.4


class _Renamed:
    """A tokenizer that knows labels by one of its words."""

    chat_template, bos_token_id, eos_token_id = None, 0, 1

    def __init__(self, tokenizer, words):
        self.tokenizer, self.words = tokenizer, words

    def __call__(self, text):
        return self.tokenizer(" ".join(self.words.get(int(w), w) if w.isdigit() else w for w in text.split()))


# --------------------------------------------------------------------------------------------------------- as it is run

REWARD = f"{ROOT / 'assets' / 'rewards.py'}:sentiment"
QUICK = ["--rounds", "2", "--samples", "2", "--prompts-per-round", "12", "--batch-size", "4", "--max-steps", "3",
         "--save-every", "2", "--eval-prompts", "20", "--max-new-tokens", "12", "--eval-every", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward_conditioning")
    for method in ("quark", "binary"):
        status, output, errors = run("reward_conditioning", *QUICK, "--method", method,
                                     "--output-dir", directory / method)
        assert status == 0 and errors == "", errors
        assert "win rate" in output
    return directory


def without_speeds(directory):
    return [{name: value for name, value in row.items() if not name.endswith("tokens_per_s")}
            for row in metrics_of(directory)]


@pytest.mark.parametrize("method, steps", [("quark", [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]),
                                           ("binary", [0, 1, 2, 2, 3, 3])])
def test_run_directory(method, steps, finished):
    rows = metrics_of(finished / method)
    assert [row["step"] for row in rows] == steps and abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    assert [row["pool"] for row in rows if "pool" in row] == ([24, 48] if method == "quark" else [])
    assert all(row["kl_per_token"] >= 0 for row in rows if "kl_per_token" in row)
    results = json.loads((finished / method / "results.json").read_text())
    assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
                            "win_rate_se", "ended", "seconds", "proxy_reward", "proxy_reward_ref"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    samples = [json.loads(line) for line in (finished / method / "samples.jsonl").read_text().splitlines()]
    assert all(s["prompt"].startswith("Review of") for s in samples)  # without the label


@pytest.mark.parametrize("method, label", [("quark", "5"), ("binary", "2")])
def test_the_saved_model_asks_for_the_best(method, label, finished, tmp_path):
    import best_of_n
    import evaluate
    tokenizer, plain = load_tokenizer(str(finished / method)), load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    prefix = Args().prefix.replace("{label}", label)
    assert encode_prompt(tokenizer, "Review of") == encode_prompt(plain, prefix + "Review of")
    quick = {"split": "train[:4]", "max_new_tokens": 8}
    evaluate.main(evaluate.Args(models=[str(finished / method)], output_dir=str(tmp_path / "evaluate"), **quick))
    assert json.loads((tmp_path / "evaluate" / "results.json").read_text())["policies"][method]["kl"] != 0
    best_of_n.main(best_of_n.Args(model=str(finished / method), n=2, output_dir=str(tmp_path / "best_of_n"), **quick))


@pytest.mark.parametrize("method, wait_for", [("quark", 7), ("binary", 3)])
def test_killed_and_resumed_equals_uninterrupted(method, wait_for, finished, tmp_path):
    flags = [*QUICK, "--method", method]
    kill_at(wait_for, "reward_conditioning", *flags, directory=tmp_path)
    status, _, errors = run("reward_conditioning", *flags, "--output-dir", tmp_path, "--resume")
    assert status == 0, errors
    assert without_speeds(tmp_path) == without_speeds(finished / method)
    assert (tmp_path / "samples.jsonl").read_bytes() == (finished / method / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished / method, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_completions_cut_at_the_end_of_the_window(tmp_path):
    """The one behind a label is cut earlier; the reference sees the same tokens."""
    import reward_conditioning
    args = Args(method="binary", split="train[:40]", max_length=32, max_new_tokens=2, max_steps=2, eval_prompts=4,
                output_dir=str(tmp_path))
    reward_conditioning.main(args)
    assert all(row["kl_per_token"] >= 0 for row in metrics_of(tmp_path) if "kl_per_token" in row)


MISTAKES = {
    "one quantile": (["--quantiles", "1"], "", "--quantiles"),
    "no round": (["--rounds", "0"], "", "--rounds"),
    "no sample": (["--samples", "0"], "", "--samples"),
    "a negative beta": (["--beta", "-1"], "", "--beta"),
    "a prefix without a label": (["--prefix", "good "], "", "--prefix"),
    "another method": (["--method", "ternary"], "", "ternary"),
    "no reward": (["--dataset", "d.jsonl"], {"prompt": "a"}, "--reward-model"),
    "no prompt": (["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl", "--reward-fn", REWARD], {"text": "a"}, "row 1"),
    "prompts for comparisons": (["--method", "binary", "--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                                {"prompt": "a"}, "chosen"),
    "a missing reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a reward that is not a number": (["--reward-fn", "r.py:nan"], "", "nan"),
    "no room": (["--max-new-tokens", "250"], "", "--max-new-tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch, capsys):
    import reward_conditioning
    from common import run_script
    flags, row, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (tmp_path / "r.py").write_text(
        "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    kept = [x for pair in zip(QUICK[::2], QUICK[1::2]) if pair[0] not in flags for x in pair]
    monkeypatch.setattr(sys, "argv", ["reward_conditioning.py", *map(str, [*kept, *flags])])
    with pytest.raises(SystemExit) as stop:
        run_script(reward_conditioning.main, reward_conditioning.Args)
    errors = capsys.readouterr().err
    assert (stop.value.code == 2 and errors.startswith("reward_conditioning.py: error: ")
            and errors.count("\n") == 1), errors
    assert what in errors, errors
