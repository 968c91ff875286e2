"""Evaluation: KL against the sum over all completions, Elo against bt_bandit.fit_bt, pairs by hand; run directory,
mistakes."""

import json
import sys

import pytest
import torch
import transformers

from bt_bandit import covariance, fit_bt
from common import encode_prompt, evaluate_policy, load_model, load_tokenizer, make_row, sequence_logprobs, with_prefix
from conftest import ROOT
from evaluate import Args, distinct_n, fit_elo, outcomes_by_judge, outcomes_by_reward, sample_policy
from test_runs import kill_at, metrics_of, run
from tiny import byte_level, saved_language

# ---------------------------------------------------------------------------------------------------- KL by enumeration


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """A policy that wants "c d" in front of each prompt, and a reference that does not -> directories, exact KL for
    "a b"."""
    directory = tmp_path_factory.mktemp("languages")
    answers = saved_language(directory / "reference", 1, std=0.6)
    saved_language(directory / "policy", 2, prefix="c d ", std=0.6)
    rows = {"policy": [0, 4, 5, 2, 3], "reference": [0, 2, 3]}  # <s> c d a b, <s> a b
    logps = [sequence_logprobs(load_model(str(directory / name)),
                               [make_row(ids, answer) for answer in answers]).double()
             for name, ids in rows.items()]
    assert all(abs(x.exp().sum() - 1) < 1e-5 for x in logps)
    exact = (logps[0].exp() * (logps[0] - logps[1])).sum().item()
    wrong = sequence_logprobs(load_model(str(directory / "reference")),
                              [make_row(rows["policy"], answer) for answer in answers])
    assert abs((logps[0].exp() * (logps[0] - wrong)).sum() - exact) > 0.2  # to the reference with the prefix
    return directory, exact


def test_the_kl_of_a_policy_with_a_prefix_is_to_the_reference_without(languages):
    directory, exact = languages
    reference, tokenizer = str(directory / "reference"), load_tokenizer(str(directory / "reference"))
    args, rows = Args(reference=reference, max_new_tokens=2), [{"prompt": "a b"}] * 4000
    samples, log_ratios = sample_policy(str(directory / "policy"), rows, load_model(reference), tokenizer, args, 5)
    assert len(samples) == 4000 and set(samples[0]) == {"prompt", "completion", "ended"}
    log_ratios = torch.tensor(log_ratios)
    assert exact > 0.3 and abs(log_ratios.mean() - exact) < 4 * log_ratios.std() / 4000**0.5
    _, log_ratios = sample_policy(reference, rows[:50], load_model(reference), tokenizer, args, 5)
    assert max(map(abs, log_ratios)) < 1e-5


def test_evaluate_policy_measures_the_same_kl(languages):
    """The training scripts' way: the tokenizer has no prefix yet, and the evaluation is told of it."""
    directory, exact = languages
    args = Args(max_new_tokens=2)
    args.model = str(directory / "reference")
    model, tokenizer = load_model(str(directory / "policy")), load_tokenizer(args.model)
    found, samples = evaluate_policy(model, tokenizer, [{"prompt": "a b"}] * 4000, None, None, args, 1, prefix="c d ")
    assert abs(found["kl"] - exact) < 4 * found["kl_se"] and samples[0]["prompt"] == "a b"


def test_a_prefix_in_front_of_texts_and_conversations(tmp_path):
    assert with_prefix("a b", "c ") == "c a b" and with_prefix("a b", "") == "a b"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "user", "content": "v"}]
    assert [m["content"] for m in with_prefix(chat, "c ")] == ["s", "c u", "v"] and chat[1]["content"] == "u"
    tokenizer = byte_level(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.init_kwargs["prompt_prefix"] = "x:"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(encode_prompt(tokenizer, "ab")) == tokenizer.decode(
        encode_prompt(tokenizer, chat[1:2])[:0] + encode_prompt(tokenizer, [{"role": "user", "content": "ab"}])
    ) == "x:ab"


# ----------------------------------------------------------------------------------------------------------- pairs, Elo


def some_battles(seed=0, players=5, prompts=40):
    torch.manual_seed(seed)
    strength, battles = torch.randn(players), []
    for n in range(prompts):
        for i in range(players):
            for j in range(i + 1, players):
                p = torch.sigmoid(strength[i] - strength[j]).item()
                battles.append((i, j, [1.0, 0.5, 0.0][int(torch.multinomial(torch.tensor([p, 0.3, 1 - p]), 1))], n))
    i, j, mu, n = zip(*battles)
    return torch.tensor(i), torch.tensor(j), torch.tensor(mu, dtype=torch.float64), torch.tensor(n)


def test_elo_is_bt_bandits_fit():
    i, j, mu, _ = some_battles()
    rewards, V = fit_elo(i, j, mu, torch.arange(len(mu)), 5)  # each battle on a prompt of its own: independent
    fit = fit_bt(i, j, mu, 5)
    torch.testing.assert_close(rewards, fit.rewards, rtol=0, atol=1e-8)
    torch.testing.assert_close(V, covariance(fit, i, j, mu, robust=True), rtol=0, atol=1e-8)


def test_elo_from_far_away():
    """999 of 1,000 are won."""
    i, j = torch.tensor([0, 0, 1, 1] * 500), torch.tensor([1, 1, 2, 2] * 500)
    mu = torch.ones(2000, dtype=torch.float64)
    mu[[0, 2]] = 0.0
    torch.testing.assert_close(fit_elo(i, j, mu, torch.arange(2000), 3)[0], fit_bt(i, j, mu, 3).rewards,
                               rtol=0, atol=1e-8)


def test_battles_that_share_a_prompt_are_not_new_evidence():
    """Every battle told twice: as new prompts the variances halve, as the same prompt's they stay what they were."""
    i, j, mu, n = some_battles()
    twice = [torch.cat([x, x]) for x in (i, j, mu)]
    once = fit_elo(i, j, mu, n, 5)[1]
    torch.testing.assert_close(fit_elo(*twice, torch.cat([n, n]), 5)[1], once)
    torch.testing.assert_close(fit_elo(*twice, torch.cat([n, n + 40]), 5)[1], once / 2)


def test_the_intervals_hold_for_another_draw_of_prompts():
    """Answers of four players to 60 prompts, judged by their quality: 1,000 draws. The rating differences spread as
    told, and twice the battles' own number would say too little."""
    torch.manual_seed(1)
    found, told = [], []
    i, j = torch.combinations(torch.arange(4)).T
    for _ in range(1000):
        quality = torch.randn(60, 4) + torch.tensor([0.0, 0.2, 0.4, 0.8])
        mu = outcomes_by_reward(quality[:, i], quality[:, j]).flatten()
        rewards, V = fit_elo(i.repeat(60), j.repeat(60), mu, torch.arange(60).repeat_interleave(6), 4)
        found.append(rewards)
        told.append(V.diagonal())
    spread, told = torch.stack(found).var(0), torch.stack(told).mean(0)
    assert ((told / spread - 1).abs() < 0.2).all(), (told, spread)


def test_no_finite_elo():
    i, j, mu = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1.0, 1.0, 0.5]).double()
    assert fit_elo(i, j, mu, torch.arange(3), 3) is None
    mu[1] = 0.5  # a tie makes a path back
    assert fit_elo(i, j, mu, torch.arange(3), 3) is not None


def test_pairs_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    assert outcomes_by_reward(a, b).tolist() == [0.5, 0.0, 1.0]
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5 and distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == 0.0


def test_a_judge_sees_both_sides_and_cannot_favour_one():
    rows = [{"prompt": str(n), "hint": n} for n in range(4)]
    seen = []

    def first_is_better(prompts, completions_a, completions_b, hint):
        seen.extend(zip(prompts, completions_a, completions_b, hint))
        return [1] * len(prompts)

    mu = outcomes_by_judge("", first_is_better, rows, ["x"] * 4, ["y"] * 4)
    assert mu.tolist() == [1, 0, 1, 0] and seen[0] == ("0", "x", "y", 0) and seen[1] == ("1", "y", "x", 1)
    mu = outcomes_by_judge("", lambda prompts, completions_a, completions_b, hint: [float(a > b) for a, b in zip(
        completions_a, completions_b)], rows, ["x"] * 4, ["y"] * 4)
    assert mu.tolist() == [0, 0, 0, 0]


# --------------------------------------------------------------------------------------------------------- as it is run

BASE, SFT = ROOT / "assets" / "tiny-base", ROOT / "assets" / "tiny-sft"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """tiny-base, tiny-sft at another draw, and a file in which each answer praises."""
    directory = tmp_path_factory.mktemp("evaluate")
    prompts = [json.loads(line) for line in (ROOT / "assets" / "data" / "review_prompts_heldout.jsonl").open()][:30]
    lines = [json.dumps({**row, "completion": " What a superb film." if n else " The plot is awful."})
             for n, row in enumerate(prompts)]
    (directory / "praise.jsonl").write_text("\n".join(lines))
    flags = ["--models", BASE, SFT, directory / "praise.jsonl", "--names", "base", "again", "praise",
             "--split", "train[:30]", "--max-new-tokens", "16"]
    status, output, errors = run("evaluate", *flags, "--output-dir", directory / "run")
    assert status == 0 and errors == "", errors
    return directory / "run", flags, output


def test_run_directory(finished):
    directory, _, output = finished
    assert [row["policy"] for row in metrics_of(directory)] == ["tiny-sft", "base", "again", "praise"]
    results = json.loads((directory / "results.json").read_text())
    policies = results["policies"]
    assert results["prompts"] == 30 and results["battles"] == 6 * 30 and results["seconds"] > 0
    assert abs(policies["tiny-sft"]["kl"]) < 1e-6 and policies["base"]["kl"] > 1 and "kl" not in policies["praise"]
    assert policies["again"]["reward"] != policies["tiny-sft"]["reward"]  # another draw of the same policy
    assert (policies["praise"]["reward"] == pytest.approx((29 * 1.5 - 1.5) / 30)
            and policies["praise"]["distinct_1"] == 8 / 120)
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    rewards = {name: [s["reward"] for s in samples if s["policy"] == name] for name in policies}
    for name in ("base", "again", "praise"):
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(rewards[name], rewards["tiny-sft"])]
        mean = sum(wins) / 30
        assert policies[name]["win_rate"] == pytest.approx(mean)
        assert policies[name]["win_rate_se"] == pytest.approx((sum((w - mean) ** 2 for w in wins) / 29 / 30) ** 0.5)
    assert all(f"\n  {name}" in output for name in policies)


def test_the_battles_are_bt_bandits(finished, tmp_path):
    directory, _, output = finished
    assert f"python bt_bandit.py --data {directory / 'battles.jsonl'}" in output
    status, _, errors = run("bt_bandit", "--data", directory / "battles.jsonl", "--bootstrap", "0",
                            "--output-dir", tmp_path)
    assert status == 0, errors
    ratings = dict(line.split(",")[:2] for line in (tmp_path / "ratings.csv").read_text().splitlines()[1:])
    policies = json.loads((directory / "results.json").read_text())["policies"]
    assert ({name: pytest.approx(float(rating), abs=1e-6) for name, rating in ratings.items()}
            == {n: m["elo"] for n, m in policies.items()})


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    directory, flags, _ = finished
    kill_at(2, "evaluate", *flags, directory=tmp_path)
    status, output, errors = run("evaluate", *flags, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "resuming" in output, errors
    for name in ("metrics.jsonl", "samples.jsonl", "battles.jsonl"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def call(monkeypatch, capsys, *flags):
    import evaluate
    from common import run_script
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    status = 0
    try:
        run_script(evaluate.main, evaluate.Args)
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr()


def test_a_judge_decides_instead_of_the_reward(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "j.py").write_text(
        "def longer(prompts, completions_a, completions_b):\n"
        "    return [1 if len(a) > len(b) else 0 for a, b in zip(completions_a, completions_b)]")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": f"Q: 1{n}+2?"}) for n in range(10)))
    status, said = call(monkeypatch, capsys, "--dataset", "p.jsonl", "--split", "train", "--judge-fn", "j.py:longer",
                        "--max-new-tokens", "12", "--seed", "1")
    assert status == 0, said.err
    results = json.loads((tmp_path / "runs" / "evaluate" / "results.json").read_text())["policies"]
    assert results["tiny-base"]["win_rate"] == 1.0 and "reward" not in results["tiny-base"]  # it hardly ever stops
    assert "elo" not in results["tiny-base"] and "no finite ratings" in said.out and "--l2 0.01" in said.out


JUDGE = "def judge(prompts, completions_a, completions_b):\n    "
MISTAKES = {
    "names for others": (["--names", "a", "b"], {}, "--names"),
    "the same name twice": (["--models", BASE, BASE], {}, "--names"),
    "a missing model": (["--models", "nobody/nothing"], {}, "nobody/nothing"),
    "a missing reference": (["--reference", "nobody/nothing"], {}, "nobody/nothing"),
    "missing answers": (["--models", "a.jsonl"], {}, "a.jsonl"),
    "an answer too few": (["--models", "a.jsonl"], {"a.jsonl": {"prompt": "a", "completion": "b"}}, "no answer"),
    "answers without a completion": (["--models", "a.jsonl"], {"a.jsonl": {"prompt": "a"}}, "row 1"),
    "nothing that judges": (["--dataset", "d.jsonl", "--split", "train"], {"d.jsonl": {"prompt": "a"}}, "--judge-fn"),
    "no prompt": (["--dataset", "d.jsonl", "--split", "train", "--judge-fn", "j.py:judge"], {"d.jsonl": {"text": "a"}},
                  "row 1"),
    "no judge": (["--judge-fn", "none.py:judge"], {}, "none.py"),
    "another judge": (["--judge-fn", "j.py:jury"], {"j.py": JUDGE + "return []"}, "jury"),
    "a judge that raises": (["--judge-fn", "j.py:judge"], {"j.py": JUDGE + "return [1 / 0]"}, "ZeroDivision"),
    "too few judgements": (["--judge-fn", "j.py:judge"], {"j.py": JUDGE + "return [1.0]"}, "1 outcomes"),
    "a judgement of 0.7": (["--judge-fn", "j.py:judge"], {"j.py": JUDGE + "return [0.7] * len(prompts)"}, "0.7"),
    "no room": (["--max-new-tokens", "256"], {}, "--max-new-tokens"),
    "no room in a policy": (["--max-length", "64", "--models", "longer"], {"longer": None}, "longer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch, capsys):
    flags, files, what = MISTAKES[name]
    for file, content in files.items():
        if content is None:  # a policy whose prefix takes all the room
            tokenizer = load_tokenizer(str(SFT))
            tokenizer.init_kwargs["prompt_prefix"] = "long " * 60
            load_model(str(SFT)).save_pretrained(tmp_path / file)
            tokenizer.save_pretrained(tmp_path / file)
        else:
            (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.chdir(tmp_path)
    quick = ["--max-new-tokens", "2"] if "--max-new-tokens" not in flags else []
    split = ["--split", "train[:3]"] if "--split" not in flags else []
    status, said = call(monkeypatch, capsys, *flags, *quick, *split)
    assert (status == 2 and said.err.startswith("evaluate.py: error: ") and said.err.count("\n") == 1
            and what in said.err), said.err
