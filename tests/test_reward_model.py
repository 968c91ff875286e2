"""The losses exactly, TRL's numbers, scores that do not depend on padding or batching, and the script as it is run."""

import copy
import itertools
import json
import math
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import harness
from common import UserError, encode_row, head_scores, load_model, load_tokenizer, pad_rows, save_model, states_at_end
from conftest import ROOT
from harness import ASSETS, Example, load_rows, reward_from_model, score_all
from reward_model import (Args, add_head, calibration, centre, evaluation_metrics, pairs_of, pairwise_loss,
                          plackett_luce_loss, rank_correlation, ranking_loss, wilson_interval)
from test_runs import kill_at, metrics_of, run
from tiny import ARCHITECTURES, byte_level

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "reward.json").read_text())
CLASSIFIER = transformers.AutoModelForSequenceClassification


def scores(model, rows):
    return head_scores(model, states_at_end(model, [common.Row(*row) for row in rows]))


# ----------------------------------------------------------------------------------------------- other people's numbers


def test_golden_text_to_rewards_to_gradient():
    model = load_model(str(GOLDEN / "rm"), kind=CLASSIFIER)
    tokenizer = load_tokenizer(str(GOLDEN / "rm"))
    pairs = [[encode_row(tokenizer, row["prompt"], row[name], [2]) for name in ("chosen", "rejected")]
             for row in EXPECTED["text"]]
    rows = [row for column in zip(*pairs) for row in column]
    assert [ids for ids, _ in rows] == [[i for i, m in zip(ids, mask) if m] for ids, mask in
                                        zip(EXPECTED["inputs"]["input_ids"], EXPECTED["inputs"]["attention_mask"])]
    chosen, rejected = scores(model, rows).view(2, -1)
    torch.testing.assert_close(chosen, torch.tensor(EXPECTED["rewards_chosen"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rejected, torch.tensor(EXPECTED["rewards_rejected"]), rtol=1e-5, atol=1e-5)
    expected = EXPECTED["expected"]
    with_margin = pairwise_loss(chosen, rejected, torch.tensor(EXPECTED["margin"]))
    assert with_margin.item() == pytest.approx(expected["margin"]["loss"], abs=1e-5)
    loss = pairwise_loss(chosen, rejected)
    assert loss.item() == pytest.approx(expected["plain"]["loss"], abs=1e-5)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(expected["plain"]["grad_norm"], rel=1e-4)
    gradients = load_file(GOLDEN / "grads_reward.safetensors")
    largest = max(g.abs().max() for g in gradients.values())
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * largest.item())


# ---------------------------------------------------------------------------------------------------- exact: the losses


def minimise(loss, *parameters):
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_pairwise_loss_recovers_the_bradley_terry_rewards():
    """A free score for each of 6 answers, and how often each wins against each: the rewards, up to a constant."""
    true = torch.tensor([-2.0, -0.5, 0.0, 0.3, 1.0, 2.5], dtype=torch.float64)
    free = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    i, j = (~torch.eye(6, dtype=torch.bool)).nonzero().T
    wins = torch.sigmoid(true[i] - true[j])

    def loss():  # each pair in either order, as often as it occurs
        return sum(w * pairwise_loss(free[a:a + 1], free[b:b + 1]) for w, a, b in zip(wins, i, j))

    minimise(loss, free)
    torch.testing.assert_close(free.detach() - free.detach().mean(), true - true.mean(), rtol=0, atol=1e-5)


def test_a_margin_is_asked_for_in_addition():
    chosen, rejected, margin = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.5, 1.0])
    expected = (math.log(2) + math.log1p(math.exp(2.0))) / 2
    assert pairwise_loss(chosen, rejected, margin).item() == pytest.approx(expected, abs=1e-6)
    assert pairwise_loss(chosen, rejected, torch.zeros(2)) == pairwise_loss(chosen, rejected)


def test_a_ranking_of_two_is_a_comparison():
    rewards = torch.randn(8)
    for loss in (ranking_loss, plackett_luce_loss):
        torch.testing.assert_close(loss(rewards, [2] * 4), pairwise_loss(*rewards.view(-1, 2).T))


def test_ranking_loss_averages_pairs_within_a_prompt_first():
    rewards, sizes = torch.randn(9), [4, 2, 3]
    expected = []
    for own in rewards.split(sizes):
        pairs = [-torch.nn.functional.logsigmoid(a - b) for a, b in itertools.combinations(own, 2)]
        expected.append(sum(pairs) / len(pairs))
    torch.testing.assert_close(ranking_loss(rewards, sizes), sum(expected) / 3)
    i, j = pairs_of(sizes)
    assert (rewards[i] - rewards[j]).tolist() == [(a - b).item() for own in rewards.split(sizes) for a, b in
                                                  itertools.combinations(own, 2)]


def test_plackett_luce_sums_to_1_over_all_orders():
    rewards = torch.randn(4, dtype=torch.float64)
    orders = [rewards[list(order)] for order in itertools.permutations(range(4))]
    probabilities = [torch.exp(-plackett_luce_loss(order, [4])) for order in orders]
    assert sum(probabilities).item() == pytest.approx(1.0, abs=1e-12)
    assert plackett_luce_loss(torch.cat(orders), [4] * 24).item() == pytest.approx(
        -sum(p.log() for p in probabilities).item() / 24, abs=1e-10)
    best_first = rewards.sort(descending=True).values
    assert max(probabilities) == torch.exp(-plackett_luce_loss(best_first, [4]))


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss])
def test_both_recover_the_rewards_from_rankings(loss):
    """All orders of 3 answers with their Plackett-Luce probabilities. Of pairs of one ranking each is Bradley-Terry."""
    true, free = (torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64),
                  torch.zeros(3, dtype=torch.float64, requires_grad=True))
    orders = [list(order) for order in itertools.permutations(range(3))]
    weights = [torch.exp(-plackett_luce_loss(true[order], [3])) for order in orders]
    minimise(lambda: sum(w * loss(free[order], [3]) for w, order in zip(weights, orders)), free)
    torch.testing.assert_close(free.detach() - free.detach().mean(), true - true.mean(), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------- scores and batches

ROWS = [([1, 5, 7, 9, 2], [0, 0, 1, 1, 1]), ([1, 8, 2], [0, 0, 1]),
        ([1, 5, 5, 2, 11, 12, 13, 2], [0, 0, 0, 0, 1, 1, 1, 1])]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox"])
def test_scores_do_not_depend_on_padding_or_batches(name):
    """Alone, in a batch, with more padding, and filled with EOS: the same; and the stock head's, padded on either
    side."""
    torch.manual_seed(0)
    model = CLASSIFIER.from_config(copy.deepcopy(ARCHITECTURES[name])).eval()
    tokenizer = type("", (), dict(eos_token_id=2, pad_token_id=3))()
    add_head(model, tokenizer)
    assert model.score.weight.std().item() == pytest.approx(33**-0.5, rel=0.5) and model.score.weight.shape == (1, 32)
    alone = torch.cat([scores(model, [row]) for row in ROWS])
    torch.testing.assert_close(scores(model, ROWS), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(model, [*ROWS, ([1] * 30, [0] * 29 + [1])])[:3], alone, rtol=0, atol=1e-5)
    for size in (1, 2, None):
        rows = [common.Row(*row) for row in ROWS]
        torch.testing.assert_close(score_all(model, rows, size), alone.detach(), rtol=0, atol=1e-5)
    for side in ("right", "left"):
        both = torch.full((2, 3, 12), 3)  # ids filled with pad; mask
        both[1] = 0
        for i, (ids, _) in enumerate(ROWS):
            where = slice(0, len(ids)) if side == "right" else slice(12 - len(ids), 12)
            both[0, i, where], both[1, i, where] = torch.tensor(ids), 1
        positions = (both[1].cumsum(1) - 1).clamp(min=0)
        stock = model(input_ids=both[0], attention_mask=both[1], position_ids=positions,
                      use_cache=False).logits.squeeze(1)
        torch.testing.assert_close(stock, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad", [None, "<|endoftext|>"])
def test_without_a_pad_of_its_own_a_model_gets_one(pad, tmp_path):
    """GPT-2 has no pad; many set it to EOS, and the stock head then reads the token before EOS. Saved and read by plain
    transformers, the scores are the same, in a batch that its own tokenizer pads on the right."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256,
                                     eos_token_id=256)
    tokenizer, model = byte_level(**({"pad_token": pad} if pad else {})), CLASSIFIER.from_config(config).eval()
    add_head(model, tokenizer)
    assert tokenizer.pad_token == "<pad>" and model.config.pad_token_id == 261 != tokenizer.eos_token_id
    texts = [("ab", " hello"), ("a", " b"), ("what a", " nice day it is")]
    ours = scores(model, [encode_row(tokenizer, *text, [tokenizer.eos_token_id]) for text in texts])
    save_model(model, tokenizer, tmp_path)
    stock, tokenizer = CLASSIFIER.from_pretrained(tmp_path).eval(), transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer([a + b + tokenizer.eos_token for a, b in texts], padding=True, padding_side="right",
                      return_tensors="pt")
    torch.testing.assert_close(stock(**batch).logits.squeeze(1), ours, rtol=0, atol=1e-5)
    examples = [Example(prompt=prompt) for prompt, _ in texts]
    from_common = reward_from_model(Args(device="cpu"), str(tmp_path))(examples, [b for _, b in texts])
    torch.testing.assert_close(from_common, ours.detach(), rtol=0, atol=1e-5)


def test_centring_after_a_layer_norm_is_an_exact_shift():
    torch.manual_seed(0)
    model = CLASSIFIER.from_config(copy.deepcopy(ARCHITECTURES["gpt2"])).eval()
    torch.nn.init.uniform_(model.transformer.ln_f.bias)
    torch.nn.init.uniform_(model.transformer.ln_f.weight, 0.5, 1.5)
    add_head(model, type("", (), dict(eos_token_id=2, pad_token_id=3))())
    rows = [common.Row([1, *torch.randint(4, 61, (n,)).tolist(), 2], [0, *[1] * (n + 1)])
            for n in range(2, 60) for _ in range(4)]
    before = scores(model, rows[::2]).detach(), scores(model, rows[1::2]).detach()
    centre(model, rows[::2], None)
    after = scores(model, rows[::2]).detach(), scores(model, rows[1::2]).detach()
    assert abs(before[0].mean()) > 0.05 and abs(after[0].mean()) < 1e-6
    for b, a in zip(before, after):
        torch.testing.assert_close(a, b - before[0].mean(), rtol=0, atol=2e-3 * abs(before[0].mean()))


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_a_score_that_is_no_number_names_its_row(monkeypatch):
    monkeypatch.setattr(harness, "score_all", lambda model, rows, size: torch.tensor([1.0, math.nan]))
    examples = [Example(prompt="a"), Example(prompt="b")]
    examples[1].where = "--dataset d.jsonl, row 7"
    reward = reward_from_model(Args(device="cpu"), str(ASSETS / "tiny-rm"))
    with pytest.raises(UserError, match="d.jsonl, row 7 is nan"):
        reward(examples, ["x", "y"])


def test_measures():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson (1927)
    a = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert rank_correlation(a, a**3) == pytest.approx(1.0) and rank_correlation(a, -a) == pytest.approx(-1.0)
    assert rank_correlation(a, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(-0.3162, abs=1e-4)  # scipy's
    differences = torch.tensor([2.0, 2.0, 2.0, -2.0])  # 88% sure, right in 75%
    error, table = calibration(differences)
    assert error == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item() - 0.75) and table[1][2:] == [0.75, 4]


def test_the_true_reward_is_calibrated_and_reaches_the_ceiling():
    """Judgements drawn from sigma(gold difference): the gold reward's own evaluation."""
    gold = torch.randn(40_000)
    wins = torch.rand(20_000) < torch.sigmoid(gold[::2] - gold[1::2])
    pairs = torch.where(wins[:, None], gold.view(-1, 2), gold.view(-1, 2).flip(1)).flatten()
    metrics = evaluation_metrics(pairs, pairs, [2] * 20_000)
    expected = torch.sigmoid((gold[::2] - gold[1::2]).abs()).mean().item()
    assert metrics["accuracy"] == metrics["bayes_accuracy"] == pytest.approx(expected, abs=0.01)
    assert (metrics["ece"] < 0.01 and metrics["log_loss"] == metrics["bayes_log_loss"]
            and metrics["rank_correlation"] > 0.9999)
    assert evaluation_metrics(2 * pairs, pairs, [2] * 20_000)["ece"] > 0.05  # twice as sure as it should be



def test_tiny_rm_is_what_it_promises():
    """Held-out judgements: within 2 points of what the true probabilities score, and the order of the gold reward."""
    sys.path.insert(0, str(ASSETS))
    from rewards import sentiment
    rows = load_rows(str(ASSETS / "data" / "comparisons_heldout.jsonl"))
    answers = [(row["prompt"], row[name]) for row in rows for name in ("chosen", "rejected")]
    prompts, completions = zip(*answers)
    examples = [Example(prompt=prompt) for prompt in prompts]
    rewards = reward_from_model(Args(device="cpu"), str(ASSETS / "tiny-rm"))(examples, completions)
    metrics = evaluation_metrics(rewards, torch.tensor(sentiment(prompts, completions)), [2] * len(rows))
    assert metrics["accuracy"] > metrics["bayes_accuracy"] - 0.02
    assert metrics["rank_correlation"] > 0.9 and abs(rewards.mean()) < 0.2
    assert sum(file.stat().st_size for file in (ASSETS / "tiny-rm").iterdir()) < 2_000_000
    model = CLASSIFIER.from_pretrained(ASSETS / "tiny-rm", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny-rm")
    texts = [p + c + tokenizer.eos_token for p, c in answers[:32]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, _ = pad_rows([encode_row(tokenizer, p, c, [tokenizer.eos_token_id]) for p, c in answers[:32]])
    # the text as a whole gives the same ids
    assert torch.equal(ids * (ids != 2), batch.input_ids * batch.attention_mask)
    torch.testing.assert_close(
        model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.squeeze(1).detach(),
        rewards[:32], rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- as it is run

QUICK = ["--max-steps", "6", "--batch-size", "8", "--eval-every", "2", "--save-every", "2",
         "--reward-fn", ROOT / "assets" / "rewards.py:sentiment"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward_model")
    for name in ("comparisons", "rankings"):
        lines = (ROOT / "assets" / "data" / f"{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[:64]))
        (directory / f"{name}_heldout.jsonl").write_text("\n".join(lines[64:96]))
    flags = [*QUICK, "--dataset", directory / "comparisons.jsonl",
             "--eval-dataset", directory / "comparisons_heldout.jsonl"]
    status, output, errors = run("reward_model", *flags, "--output-dir", directory / "run")
    assert status == 0 and errors == "", errors
    return directory, flags, output


def test_run_directory(finished):
    directory, _, output = finished
    rows = metrics_of(directory / "run")
    assert rows[0]["phase"] == "eval" and "log_loss" in rows[0] and [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    samples = [json.loads(line) for line in (directory / "run" / "samples.jsonl").read_text().splitlines()]
    assert ({s["step"] for s in samples} == {0, 2, 4, 6}
            and all({"prompt", "completion", "reward"} <= set(s) for s in samples))
    results = json.loads((directory / "run" / "results.json").read_text())
    assert set(results) >= {"accuracy", "accuracy_low", "accuracy_high", "log_loss", "ece", "bayes_accuracy",
                            "rank_correlation", "seconds"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    examples, completions = [], []
    for row in load_rows(str(directory / "comparisons.jsonl")):
        examples += [row, row]
        completions += [row["chosen"], row["rejected"]]
    scored = reward_from_model(Args(device="cpu"), str(directory / "run"))(examples, completions)
    assert abs(scored.mean()) < 1e-5  # those of the training judgements, from the files
    assert "predicted" in output
    model = CLASSIFIER.from_pretrained(directory / "run")
    assert model.num_labels == 1 and model.dtype == torch.float32 and model.config.pad_token_id == 2


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    directory, flags, _ = finished
    for lines in (5, 9):  # of metrics.jsonl: after one checkpoint, and after the last update
        kill_at(lines, "reward_model", *flags, directory=tmp_path)
    status, output, errors = run("reward_model", *flags, "--output-dir", tmp_path, "--resume")
    assert status == 0, errors
    assert "resuming" in output
    assert metrics_of(tmp_path) == metrics_of(directory / "run")
    assert (tmp_path / "samples.jsonl").read_bytes() == (directory / "run" / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (directory / "run", tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_micro_batches_change_nothing(finished, tmp_path):
    for size in (3, 8):
        status, _, errors = run("reward_model", *finished[1], "--output-dir", tmp_path / str(size), "--dropout", 0,
                                "--micro-batch-size", size)
        assert status == 0, errors
    for before, after in zip(metrics_of(tmp_path / "3"), metrics_of(tmp_path / "8")):
        assert before["loss"] == pytest.approx(after["loss"], abs=2e-4) if "loss" in before else True


@pytest.mark.parametrize("kind", ["pairs", "plackett-luce"])
def test_rankings(kind, finished, tmp_path):
    directory, _, _ = finished
    status, output, errors = run("reward_model", *QUICK, "--ranking-loss", kind,
                                 "--dataset", directory / "rankings.jsonl",
                                 "--eval-dataset", directory / "rankings_heldout.jsonl", "--output-dir", tmp_path)
    assert status == 0 and "192 held-out pairs" in output, errors  # 32 rankings of 4


ROW = {"prompt": "Review of The Lost King, a drama:", "chosen": " The plot is good.", "rejected": " The plot is bad."}
RANKING = {"prompt": ROW["prompt"], "responses": [" good.", " bad."]}
MISTAKES = {
    "a margin that is no number": ([{**ROW, "margin": "much"}], [], "margin"),
    "a margin in some rows only": ([{**ROW, "margin": 1.0}, ROW], [], "margin"),
    "a ranking of one": ([{**RANKING, "responses": [" good."]}], [], "at least two"),
    "a ranking of equal completions": ([{**RANKING, "responses": [" good.", " good."]}], [], "identical"),
    "a ranking without a prompt": ([{"responses": [" a", " b"]}], [], "prompt"),
    "responses that are no list": ([{**RANKING, "responses": "good"}], [], "responses"),
    "no judgements": ([{"prompt": "a", "completion": "b"}], [], "chosen"),
    "margins and rankings": ([{**ROW, "margin": 1.0, "responses": None},
                              {**RANKING, "responses": [" a", " b", " c"], "chosen": None, "rejected": None}], [],
                             "margin"),
    "no reward function": ([ROW, ROW], ["--reward-fn", "none.py:f"], "none.py"),
    "an unknown loss": ([ROW, ROW], ["--ranking-loss", "listnet"], "listnet"),
    "a missing model": ([ROW, ROW], ["--model", "nobody/nothing"], "nobody/nothing"),
    "a diverging learning rate": ([ROW] * 40, ["--learning-rate", "1e30", "--save-every", "1"], "update"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, monkeypatch, capsys):
    import reward_model
    from harness import run_script
    rows, flags, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reward_model.py", "--dataset", "d.jsonl", "--eval-dataset", "d.jsonl", *flags])
    with pytest.raises(SystemExit) as stop:
        run_script(reward_model.main, reward_model.Args)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and what in errors, errors
    assert errors.count("\n") == 1 or name == "an unknown loss", errors  # which tyro prints, framed
