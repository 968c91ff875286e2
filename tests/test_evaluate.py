"""Evaluation: KL against the sum over all completions, Elo against bt_bandit.fit_bt, pairs by hand;
run directory, mistakes."""

import json
import random

import pytest
import torch
from tokenizers import processors

from bt_bandit import covariance, fit_bt
from common import (
    encode_continuation, encode_prompt, load_model, load_tokenizer, make_row, sequence_logprobs
)
from conftest import ROOT
from harness import load_different_prompts
from evaluate import (
    Args, Policy, distinct_n, fit_elo, outcomes_by_judge, read_policy, sample_policy
)
from harness import Example, HeldOut, UserError, evaluate_policy, wins
from test_runs import kill_at, metrics_of, run
from tiny import byte_level, saved_language

# --- KL by enumeration ---

ROWS = {"policy": [0, 4, 5, 2, 3], "reference": [0, 2, 3]}  # <s> c d a b, <s> a b


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """A policy whose tokenizer puts "c d" before each prompt, and a reference whose does not ->
    directories, exact KL for "a b"."""
    directory = tmp_path_factory.mktemp("languages")
    completions = saved_language(directory / "reference", 1, std=0.6)
    saved_language(directory / "policy", 2, prefix="c d ", std=0.6)

    def logps_of(name, prompt_ids):
        rows = [make_row(prompt_ids, completion) for completion in completions]
        return sequence_logprobs(load_model(str(directory / name)), rows).double()

    logps, ref_logps = [logps_of(name, ids) for name, ids in ROWS.items()]
    assert all(abs(x.exp().sum() - 1) < 1e-5 for x in (logps, ref_logps))
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    wrong = logps_of("reference", ROWS["policy"])
    assert exact > 0.3 and abs((logps.exp() * (logps - wrong)).sum() - exact) > 0.2
    return directory, exact


def test_a_prefix_is_before_prompts_and_before_nothing_else(languages):
    """Read back from its files; a completion's ids have none."""
    for name, ids in ROWS.items():
        tokenizer = load_tokenizer(str(languages[0] / name))
        assert encode_prompt(tokenizer, "a b") == ids
        assert encode_continuation(tokenizer, "a b") == [2, 3]


def test_the_kl_of_a_policy_with_a_prefix_is_to_the_reference_without(languages):
    directory, exact = languages
    args = Args(reference=str(directory / "reference"), max_new_tokens=2)
    reference = read_policy(args.reference, args)
    prompts = [(Example(prompt="a b"), ROWS["reference"])] * 4000
    source = str(directory / "policy")
    samples, log_ratios = sample_policy(source, reference, prompts, args, 1)
    assert len(samples) == 4000 and set(samples[0]) == {"prompt", "completion", "ended"}
    assert abs(log_ratios.mean() - exact) < 4 * log_ratios.std() / 4000**0.5
    _, log_ratios = sample_policy(args.reference, reference, prompts[:50], args, 1)
    assert log_ratios.abs().max() < 1e-5


def test_evaluate_policy_measures_the_same_kl(languages):
    """The training scripts' way: policy and reference are given ids of their own."""
    directory, exact = languages
    args = Args(max_new_tokens=2)
    reference = read_policy(str(directory / "reference"), args)
    prompts = [(Example(prompt="a b"), ROWS["reference"])] * 4000
    held_out = HeldOut(prompts, None, reference.model, reference.tokenizer)
    policy = load_model(str(directory / "policy"))
    found, samples = evaluate_policy(policy, held_out, args, 1, [ROWS["policy"]] * 4000)
    assert abs(found["kl"] - exact) < 4 * found["kl_se"] and samples[0]["prompt"] == "a b"


def test_no_kl_to_a_reference_with_other_tokens(languages):
    directory, _ = languages
    args = Args(reference=str(directory / "reference"), max_new_tokens=2)
    reference = read_policy(args.reference, args)
    reference = Policy(reference.model, byte_level())
    prompts = [(Example(prompt="a b"), ROWS["reference"])] * 3
    samples, log_ratios = sample_policy(str(directory / "policy"), reference, prompts, args, 1)
    assert len(samples) == 3 and log_ratios is None


# --- pairs, Elo ---


def some_battles(seed=0, players=5, prompts=40):
    torch.manual_seed(seed)
    strength, battles = torch.randn(players), []
    for n in range(prompts):
        for i in range(players):
            for j in range(i + 1, players):
                p = torch.sigmoid(strength[i] - strength[j]).item()
                outcome = int(torch.multinomial(torch.tensor([p, 0.3, 1 - p]), 1))
                battles.append((i, j, [1.0, 0.5, 0.0][outcome], n))
    i, j, mu, n = zip(*battles)
    return torch.tensor(i), torch.tensor(j), torch.tensor(mu, dtype=torch.float64), torch.tensor(n)


def test_elo_is_bt_bandits_fit():
    """Each battle on a prompt of its own, so independent: the covariance is the plain sandwich."""
    i, j, mu, _ = some_battles()
    rewards, V = fit_elo(i, j, mu, torch.arange(len(mu)), 5)
    fit = fit_bt(i, j, mu, 5)
    torch.testing.assert_close(rewards, fit.rewards, rtol=0, atol=1e-8)
    p = torch.sigmoid(fit.rewards[i] - fit.rewards[j])
    squares = torch.zeros(5, 5, dtype=torch.float64)  # of the scores, summed
    for a, b, square in zip(i, j, (mu - p) ** 2):
        squares[[a, b], [a, b]] += square
        squares[[a, b], [b, a]] -= square
    A = covariance(fit)
    torch.testing.assert_close(V, A @ squares @ A, rtol=0, atol=1e-8)


def test_elo_from_far_away():
    """999 of 1,000 are won."""
    i, j = torch.tensor([0, 0, 1, 1] * 500), torch.tensor([1, 1, 2, 2] * 500)
    mu = torch.ones(2000, dtype=torch.float64)
    mu[[0, 2]] = 0.0
    rewards, _ = fit_elo(i, j, mu, torch.arange(2000), 3)
    torch.testing.assert_close(rewards, fit_bt(i, j, mu, 3).rewards, rtol=0, atol=1e-8)


def test_battles_that_share_a_prompt_are_not_new_evidence():
    """Every battle twice: on new prompts the variances halve, on the same ones they stay."""
    i, j, mu, n = some_battles()
    twice = [torch.cat([x, x]) for x in (i, j, mu)]
    once = fit_elo(i, j, mu, n, 5)[1]
    torch.testing.assert_close(fit_elo(*twice, torch.cat([n, n]), 5)[1], once)
    torch.testing.assert_close(fit_elo(*twice, torch.cat([n, n + 40]), 5)[1], once / 2)


def test_the_intervals_hold_for_another_draw_of_prompts():
    """Completions of four players for 60 prompts, judged by their quality: over 1,000 draws, the
    rating differences spread as the covariance says. Independent battles would spread less."""
    torch.manual_seed(1)
    found, variances = [], []
    i, j = torch.combinations(torch.arange(4)).T
    for _ in range(1000):
        quality = torch.randn(60, 4) + torch.tensor([0.0, 0.2, 0.4, 0.8])
        mu = wins(quality[:, i], quality[:, j]).flatten()
        prompt = torch.arange(60).repeat_interleave(6)
        rewards, V = fit_elo(i.repeat(60), j.repeat(60), mu, prompt, 4)
        found.append(rewards)
        variances.append(V.diagonal())
    spread, variances = torch.stack(found).var(0), torch.stack(variances).mean(0)
    assert ((variances / spread - 1).abs() < 0.2).all(), (variances, spread)


def test_no_finite_elo():
    i, j, mu = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2]), torch.tensor([1.0, 1.0, 0.5])
    assert fit_elo(i, j, mu.double(), torch.arange(3), 3) is None
    mu[1] = 0.5  # a tie makes a path back
    assert fit_elo(i, j, mu.double(), torch.arange(3), 3) is not None


def test_pairs_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    assert wins(a, b).tolist() == [0.5, 0.0, 1.0]
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5 and distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) == 0.0


# --- judges ---


def outcomes(judge, prompts, a, b):
    examples = [Example(prompt=prompt, hint=n) for n, prompt in enumerate(prompts)]
    return outcomes_by_judge(Args(judge_fn="j.py:judge"), judge, examples, a, b).tolist()


def test_a_judge_sees_both_sides_and_cannot_favour_one():
    seen = []

    def first_is_better(prompts, completions_a, completions_b, hint):
        seen.extend(zip(prompts, completions_a, completions_b, hint))
        return [1] * len(prompts)

    def larger(completions_a, completions_b):
        return [float(a > b) for a, b in zip(completions_a, completions_b)]

    prompts = ["0", "1", "2", "3"]
    assert outcomes(first_is_better, prompts, ["x"] * 4, ["y"] * 4) == [1, 0, 1, 0]
    assert seen[:2] == [("0", "x", "y", 0), ("1", "y", "x", 1)]
    assert outcomes(larger, prompts, ["x"] * 4, ["y"] * 4) == [0, 0, 0, 0]


def test_a_judge_of_conversations_is_given_messages():
    def judge(prompts, completions_a, completions_b):
        turns = [side[0][0] for side in (completions_a, completions_b)]
        assert turns == [{"role": "assistant", "content": text} for text in "xy"]
        return [0.5]

    assert outcomes(judge, [[{"role": "user", "content": "q"}]], ["x"], ["y"]) == [0.5]


def test_a_judge_is_a_guest():
    """What it does to its arguments and to random states has no effect outside of it."""
    a = ["x", "x"]

    def judge(prompts, completions_a, completions_b):
        completions_a.clear()
        random.seed(1)
        torch.manual_seed(1)
        return [0, 0]

    states = random.getstate(), torch.get_rng_state()
    assert outcomes(judge, ["0", "1"], a, ["y", "y"]) == [0, 1]
    assert a == ["x", "x"] and random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_judge_has_a_time_limit():
    def judge(completions_a):
        while True:
            pass

    args = Args(judge_fn="j.py:judge", reward_timeout=0.2)
    with pytest.raises(UserError, match="--judge-fn j.py:judge: no result within 0.2 seconds"):
        outcomes_by_judge(args, judge, [Example(prompt="0")], ["x"], ["y"])


# --- as it is run ---

BASE, SFT = ROOT / "assets" / "tiny-base", ROOT / "assets" / "tiny-sft"
NAMES = ["base", "again", "praise", "csv"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """tiny-base, tiny-sft at another draw, a file in which each completion praises, and another in
    which the first ones are those that count."""
    directory = tmp_path_factory.mktemp("evaluate")
    path = ROOT / "assets" / "data" / "review_prompts_heldout.jsonl"
    prompts = [json.loads(line)["prompt"] for line in path.open()][:30]
    texts = [" The plot is awful.", *[" What a superb film."] * 29]
    rows = [{"prompt": p, "completion": text} for p, text in zip(prompts, texts)]
    (directory / "praise.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [f'"{prompt}"," I liked the {what}."' for what in ("cast", "plot") for prompt in prompts]
    (directory / "likes.csv").write_text("\n".join(["prompt,completion", *rows]))
    flags = ["--models", BASE, SFT, directory / "praise.jsonl", directory / "likes.csv",
             "--names", *NAMES, "--split", "train[:30]", "--max-new-tokens", "16"]
    status, output, errors = run("evaluate", *flags, "--output-dir", directory / "run")
    assert status == 0 and errors == "", errors
    return directory / "run", flags, output


def test_run_directory(finished):
    directory, _, output = finished
    rows = metrics_of(directory)
    assert [row["policy"] for row in rows] == ["tiny-sft", *NAMES]
    assert {row["phase"] for row in rows} == {"eval"}
    results = json.loads((directory / "results.json").read_text())
    policies = results["policies"]
    assert results["prompts"] == 30 and results["battles"] == 10 * 30 and results["seconds"] > 0
    assert abs(policies["tiny-sft"]["kl"]) < 1e-6 and policies["base"]["kl"] > 1
    assert "kl" not in policies["praise"]
    assert policies["again"]["reward"] != policies["tiny-sft"]["reward"]  # another draw
    assert policies["praise"]["reward"] == pytest.approx((29 * 1.5 - 1.5) / 30)
    assert policies["praise"]["distinct_1"] == 8 / 120
    samples = [json.loads(line) for line in (directory / "samples.jsonl").open()]
    of_csv = [sample for sample in samples if sample["policy"] == "csv"]
    assert {sample["completion"] for sample in of_csv} == {" I liked the cast."}
    assert "30 rows skipped: an earlier row has the same prompt" in output
    rewards = {name: [s["reward"] for s in samples if s["policy"] == name] for name in policies}
    for name in NAMES:  # the win rate against the reference, prompt by prompt
        won = [(a > b) + 0.5 * (a == b) for a, b in zip(rewards[name], rewards["tiny-sft"])]
        mean = sum(won) / 30
        se = (sum((w - mean) ** 2 for w in won) / 29 / 30) ** 0.5
        assert policies[name]["win_rate"] == pytest.approx(mean)
        assert policies[name]["win_rate_se"] == pytest.approx(se)
    assert all(f"\n  {name}" in output for name in policies)


def test_the_battles_are_those_of_bt_arena(finished, tmp_path):
    directory, _, output = finished
    battles = directory / "battles.jsonl"
    assert output.endswith(f"\n  python bt_arena.py --dataset {battles}\n")
    flags = ["--dataset", battles, "--bootstrap", "0", "--output-dir", tmp_path]
    status, _, errors = run("bt_arena", *flags)
    assert status == 0, errors
    lines = (tmp_path / "ratings.csv").read_text().splitlines()[1:]
    ratings = dict(line.split(",")[:2] for line in lines)
    policies = json.loads((directory / "results.json").read_text())["policies"]
    assert set(ratings) == set(policies)
    for name, rating in ratings.items():
        assert policies[name]["elo"] == pytest.approx(float(rating), abs=1e-6)


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    directory, flags, _ = finished
    kill_at(2, "evaluate", *flags, directory=tmp_path)
    status, output, errors = run("evaluate", *flags, "--output-dir", tmp_path, "--resume")
    assert status == 0 and "resuming" in output, errors
    for name in ("metrics.jsonl", "samples.jsonl", "battles.jsonl"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_one_prompt_has_no_standard_errors(tmp_path):
    flags = ["--split", "train[:1]", "--max-new-tokens", "4", "--output-dir", tmp_path]
    status, _, errors = run("evaluate", *flags)
    assert status == 0, errors
    policies = json.loads((tmp_path / "results.json").read_text())["policies"]
    for name in ("reward_se", "kl_se", "win_rate_se"):
        assert policies["tiny-base"][name] is None


def test_prompts_that_are_left_out_are_counted(tmp_path, capsys):
    prompts = ["a", "b", "a", "long " * 200]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    args = Args(dataset=str(path), split="train")
    found = load_different_prompts(args, load_model(str(SFT)), load_tokenizer(str(SFT)))
    assert [example["prompt"] for example, _ in found] == ["a", "b"]
    said = capsys.readouterr().out
    assert "1 rows skipped: an earlier row has the same prompt" in said and "row 3)" in said
    assert "1 rows skipped: the prompt leaves no room" in said and "row 4)" in said


def test_a_judge_decides_instead_of_the_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "j.py").write_text(
        "def longer(prompts, completions_a, completions_b):\n"
        "    pairs = zip(completions_a, completions_b)\n"
        "    return [1 if len(a) > len(b) else 0 for a, b in pairs]")
    rows = [json.dumps({"prompt": f"Q: 1{n}+2?"}) for n in range(10)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    flags = ["--dataset", "p.jsonl", "--split", "train", "--judge-fn", "j.py:longer",
             "--max-new-tokens", "12", "--seed", "1"]
    status, output, errors = run("evaluate", *flags)
    assert status == 0, errors
    results = json.loads((tmp_path / "runs" / "evaluate" / "results.json").read_text())
    base = results["policies"]["tiny-base"]
    assert base["win_rate"] == 1.0 and "reward" not in base  # it hardly ever stops
    assert "elo" not in base and "no finite ratings" in output and "--l2 0.01" in output


JUDGE = "def judge(completions_a, completions_b):\n    return "
BY_JUDGE, DATA = ["--judge-fn", "j.py:judge"], ["--dataset", "d.jsonl", "--split", "train"]
MISTAKES = {
    "names for others": (["--names", "a", "b"], {}, "--names"),
    "the same name twice": (["--models", BASE, BASE], {}, "--names"),
    "a missing model": (["--models", "nobody/nothing"], {}, "nobody/nothing"),
    "a missing reference": (["--reference", "nobody/nothing"], {}, "nobody/nothing"),
    "a missing file": (["--models", "a.jsonl"], {}, "--models a.jsonl: no such file"),
    "one completion too few": (["--models", "a.jsonl"],
                               {"a.jsonl": {"prompt": "a", "completion": "b"}}, "no completion"),
    "no completion": (["--models", "a.jsonl"], {"a.jsonl": {"prompt": "a"}}, "row 1"),
    "nothing that judges": (DATA, {"d.jsonl": {"prompt": "a"}}, "--judge-fn"),
    "no prompt": ([*DATA, *BY_JUDGE], {"d.jsonl": {"text": "a"}, "j.py": JUDGE + "[]"}, "row 1"),
    "no judge": (["--judge-fn", "none.py:judge"], {}, "none.py"),
    "another judge": (["--judge-fn", "j.py:jury"], {"j.py": JUDGE + "[]"}, "jury"),
    "a judge that raises": (BY_JUDGE, {"j.py": JUDGE + "[1 / 0]"}, "ZeroDivision"),
    "too few judgements": (BY_JUDGE, {"j.py": JUDGE + "[1.0]"}, "1 numbers for 3 pairs"),
    "a judgement of 0.7": (BY_JUDGE, {"j.py": JUDGE + "[0.7] * 3"}, "0.7 for --dataset"),
    "a judgement in words": (BY_JUDGE, {"j.py": JUDGE + "['A'] * 3"}, "'A' for --dataset"),
    "no room": (["--max-new-tokens", "512"], {}, "--max-new-tokens"),
    "no room in a policy": (["--max-length", "64", "--models", "longer"], {}, "longer"),
    "greedy": (["--temperature", "0"], {}, "--temperature 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch):
    flags, files, what = MISTAKES[name]
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / file).write_text(text)
    if "longer" in flags:  # a policy whose label takes all the room
        tokenizer = load_tokenizer(str(SFT))
        tokenizer.backend_tokenizer.post_processor = label(encode_prompt(tokenizer, "long " * 60))
        load_model(str(SFT)).save_pretrained(tmp_path / "longer")
        tokenizer.save_pretrained(tmp_path / "longer")
    monkeypatch.chdir(tmp_path)
    quick = ["--max-new-tokens", "2"] if "--max-new-tokens" not in flags else []
    split = ["--split", "train[:3]"] if "--split" not in flags else []
    status, _, errors = run("evaluate", *flags, *quick, *split)
    assert status == 2 and errors.startswith("evaluate.py: error: "), errors
    assert errors.count("\n") == 1 and what in errors, errors


def label(ids):
    piece = {"id": "label", "ids": ids, "tokens": [str(i) for i in ids]}
    return processors.TemplateProcessing(single="label $A", special_tokens=[piece])
