"""Reward conditioning: labels by hand, tokenizers that ask for a label, the loss against its sums,
and the law that it must reach where all completions are listed; run directory, resume, mistakes."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing

from common import (
    adapters_of, encode, encode_prompt, encode_row, generate, load_model, load_policy,
    load_tokenizer, make_row, pad_rows, sequence_logprobs, token_logprobs
)
from conftest import ROOT
from harness import Example
from reward_conditioning import (
    Args, add_gradients, conditioning_loss, labelled_pool, quantile_labels, vocabulary_logprobs,
    with_label, without_label
)
from test_runs import kill_at, metrics_of, run
from test_text import CHATML, CONVERSATION, NO_SYSTEM, chat_tokenizer, message
from tiny import ARCHITECTURES, byte_level, model_of, saved_language, sentencepiece

# --- labels ---


def test_quantile_labels_by_hand():
    assert quantile_labels(torch.tensor([0.3, -1.0, 2.0, 0.5]), 2).tolist() == [1, 1, 2, 2]
    assert quantile_labels(torch.arange(6.0).flip(0), 3).tolist() == [3, 3, 2, 2, 1, 1]
    assert quantile_labels(torch.zeros(4), 2).tolist() == [1, 1, 2, 2]  # equal: by order
    assert quantile_labels(torch.arange(3.0), 5).tolist() == [1, 2, 4]  # more labels than rewards
    labels = quantile_labels(torch.randn(1003), 5)
    assert {n.item() for n in torch.bincount(labels)[1:]} == {200, 201}


def adding(tokenizer, template: str):
    """The tokenizer with its special tokens around every text."""
    tokens = [token for token in template.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens])
    return tokenizer


def gpt_neox():
    """Its class writes a post-processor of its own whenever it is loaded."""
    vocabulary = byte_level().get_vocab()
    return transformers.GPTNeoXTokenizer(vocab=vocabulary, merges=[("h", "e"), ("a", "b")])


TOKENIZERS = {
    "tiny-sft": lambda: load_tokenizer(str(ROOT / "assets" / "tiny-sft")),
    "BOS and a dummy space": sentencepiece,
    "no BOS": byte_level,
    "BOS": lambda: adding(byte_level(bos_token="<|im_start|>"), "<|im_start|> $A"),
    "BOS and EOS": lambda: adding(sentencepiece(), "<s> $A </s>"),
    "its own class": gpt_neox,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_saved_tokenizer_puts_the_label_before_texts(name, tmp_path):
    """In stock transformers too: BOS, the label's ids, the ids that the text has by itself."""
    tokenizer, label, text = TOKENIZERS[name](), "Quality 5 of 5. ", "Review of"
    labelled = with_label(tokenizer, label)
    labelled.save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    added = tokenizer("").input_ids  # BOS, EOS, both or neither
    ids = encode(tokenizer, label) + encode(tokenizer, text)
    if "BOS" in name and name != "no BOS" or name == "tiny-sft":
        ids = [added[0], *ids]
    assert encode_prompt(saved, text) == encode_prompt(labelled, text) == ids
    assert saved(text).input_ids == ids + ([added[1]] if name == "BOS and EOS" else [])
    assert saved([text, "a"]).input_ids[0] == saved(text).input_ids
    assert encode(saved, text) == encode(tokenizer, text)  # a completion has no label
    assert saved.eos_token_id == tokenizer.eos_token_id
    again = with_label(saved, "x")  # of a reference that asks for a label already
    assert encode_prompt(again, text) == ids[:-len(encode(tokenizer, text))] + encode(
        tokenizer, "x") + encode(tokenizer, text)


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_the_saved_template_puts_the_label_before_what_the_user_says_first(template, tmp_path):
    tokenizer, label = chat_tokenizer(template), 'So "good"\\ as\n漢😀: '
    with_label(tokenizer, label).save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    system = message("system", "be")
    for messages in (CONVERSATION[:1], CONVERSATION[:3], [system, *CONVERSATION[:3]]):
        at = 0 if template == NO_SYSTEM else messages.index(CONVERSATION[0])
        words = "be\n\nhe" if template == NO_SYSTEM and system in messages else "he"
        asked = [*messages[:at], message("user", label + words)]
        asked += messages[messages.index(CONVERSATION[0]) + 1:]
        assert encode_prompt(saved, messages) == encode_prompt(tokenizer, asked)
        if words == "he":
            ids = saved.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert ids == encode_prompt(tokenizer, asked)
    assert messages[1] == message("user", "he")  # as it was


def test_only_the_prompt_changes_with_the_label():
    """A completion of two turns behind the label, and the same without it."""
    tokenizer = chat_tokenizer()
    labelled, stops = with_label(tokenizer, "Quality 2. "), [tokenizer.eos_token_id]
    for prompt, completion in ((CONVERSATION[:1], CONVERSATION[1:]), ("ab", "he")):
        row = encode_row(labelled, prompt, completion, stops)
        expected = encode_row(tokenizer, prompt, completion, stops)
        assert without_label(tokenizer, Example(prompt=prompt), row) == expected != row


# --- loss ---


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
    """Position by position the same token, each under its own prompt; and the model's own
    log-probabilities."""
    model = model_of(name)
    completions = [[5, 9, 2], [7, 2], [11, 12, 13, 2]]
    with_label = [make_row([1, 20, 21, *range(30, 33 + n)], c) for n, c in enumerate(completions)]
    without = [make_row([1, *range(30, 33 + n)], c) for n, c in enumerate(completions)]
    targets = []
    for rows in (with_label, without):
        logps, target = vocabulary_logprobs(model, rows, 0.7)
        targets.append(target)
        input_ids, mask = pad_rows(rows)
        expected = token_logprobs(model, input_ids, mask, 0.7)[mask.bool()]
        found = logps.gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logps.exp().sum(1), torch.ones(len(logps)))
    assert targets[0].tolist() == targets[1].tolist() == sum(completions, [])


@pytest.mark.parametrize("beta", [0.3, 0.0])
def test_the_reference_reads_no_label(beta, tmp_path):
    saved_language(tmp_path, 1)
    tokenizer, reference = load_tokenizer(str(tmp_path)), load_model(str(tmp_path))
    labelled, example, args = with_label(tokenizer, "b"), Example(prompt="a"), Args(temperature=0.7)
    assert encode_prompt(labelled, "a") == [0, 3, 2] and encode_prompt(tokenizer, "a") == [0, 2]
    completions = [[4, 5, 1], [1], [2, 2]]
    batch = [(example, make_row([0, 3, 2], completion)) for completion in completions]
    with torch.no_grad():
        rows = [make_row([0, 2], completion) for completion in completions]
        ref_logps, _ = vocabulary_logprobs(reference, rows, 0.7)
    args.beta, gradients = beta, []
    for args.micro_batch_size in (None, 1):
        torch.manual_seed(1)
        policy = load_model(str(tmp_path))
        with torch.no_grad():
            policy.lm_head.weight += torch.randn_like(policy.lm_head.weight)
        found = add_gradients(policy, reference, tokenizer, batch, args)
        gradients.append([parameter.grad for parameter in policy.parameters()])
        logps, targets = vocabulary_logprobs(policy, [row for _, row in batch], 0.7)
        kl = (ref_logps.exp() * (ref_logps - logps)).sum().item() / 6  # 6 tokens
        nll = -logps[range(6), targets].sum().item() / 6
        assert found["loss"] == pytest.approx(nll + beta * kl, rel=1e-5)
        assert ("kl_per_token" in found) == (beta > 0)
        if beta:
            assert found["kl_per_token"] == pytest.approx(kl, rel=1e-5) and kl > 0.01
    for whole, cut in zip(*gradients):  # however the batch is cut
        torch.testing.assert_close(whole, cut, rtol=1e-4, atol=1e-6)


def test_with_adapters_the_reference_is_the_policy_without_them(tmp_path):
    saved_language(tmp_path, 1)
    tokenizer, reference = load_tokenizer(str(tmp_path)), load_model(str(tmp_path))
    batch = [(Example(prompt="a"), make_row([0, 3, 2], [4, 5, 1]))]
    args = Args(model=str(tmp_path), beta=0.3, lora_rank=2, device="cpu")
    policy = load_policy(args)
    for adapter in adapters_of(policy).values():
        torch.nn.init.normal_(adapter.lora_B)
    found = add_gradients(policy, policy, tokenizer, batch, args)
    assert found == add_gradients(policy, reference, tokenizer, batch, args)
    assert found["kl_per_token"] > 0.01


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_policy_given_a_label_becomes_the_law_of_its_quantile(tmp_path):
    """20,000 samples of a listed language, cut into three parts by reward. With beta 0 the fixed
    point is the part's own law, for the best label among them; with a large beta the reference."""
    listed = saved_language(tmp_path, 1)
    tokenizer, reference = load_tokenizer(str(tmp_path)), load_model(str(tmp_path))
    rollout = generate(reference, tokenizer, ["a"] * 20_000, 1, 2, rows_at_once=8192)
    rewards = torch.arange(31.0).mul(7).remainder(31)
    drawn = torch.tensor([listed.index(ids[2:]) for ids, _ in rollout.rows])
    labelled = {1: with_label(tokenizer, "b"), 2: with_label(tokenizer, "c"),
                3: with_label(tokenizer, "d")}
    pool = [{"example": 0, "completion": listed[i], "reward": rewards[i].item()}
            for i in drawn.tolist()]
    rows = labelled_pool(pool, [Example(prompt="a")], labelled)
    labels = quantile_labels(rewards[drawn], 3)
    assert [row.ids for _, row in rows] == [  # <s> label a
        [0, 2 + k, 2, *listed[i]] for k, i in zip(labels.tolist(), drawn.tolist())]
    counts = torch.stack([torch.bincount(drawn[labels == k], minlength=31) for k in (1, 2, 3)])
    found = counts.nonzero().tolist()  # [label - 1, completion] of what was drawn
    with_labels = [make_row([0, 3 + k, 2], listed[i]) for k, i in found]
    without = [make_row([0, 2], listed[i]) for k, i in found]
    weights = torch.cat([counts[k, i].expand(len(listed[i])) for k, i in found]) / len(drawn)
    with torch.no_grad():
        ref_logps, _ = vocabulary_logprobs(reference, without, 1.0)
    for beta, target in ((0.0, "part"), (100.0, "reference")):
        model = load_model(str(tmp_path))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        loss_of_token = torch.vmap(
            lambda logp, ref, y: conditioning_loss(logp[None], ref[None], y[None], beta)[0])
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
            logps, targets = vocabulary_logprobs(model, with_labels, 1.0)
            (loss_of_token(logps, ref_logps, targets) * weights).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        best = sequence_logprobs(model, [make_row([0, 5, 2], c) for c in listed]).exp()
        ref = sequence_logprobs(reference, [make_row([0, 2], c) for c in listed]).exp()
        expected = counts[2] / counts[2].sum() if target == "part" else ref
        assert 0.5 * (best - expected).abs().sum() < 0.05, target
        assert target == "reference" or 0.5 * (ref - expected).abs().sum() > 0.4


# --- as it is run ---

REWARD = f"{ROOT / 'assets' / 'rewards.py'}:sentiment"
QUICK = ["--rounds", "2", "--samples-per-prompt", "2", "--prompts-per-round", "12",
         "--batch-size", "4", "--max-steps", "3", "--save-every", "2", "--eval-prompts", "20",
         "--max-new-tokens", "12", "--eval-every", "2", "--split", "train[:100]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward_conditioning")
    for method in ("quark", "binary"):
        status, output, errors = run("reward_conditioning", *QUICK, "--method", method,
                                     "--output-dir", directory / method)
        assert status == 0 and errors == "", errors
        assert "win rate" in output
    return directory


@pytest.mark.parametrize("method, steps", [("quark", [0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6]),
                                           ("binary", [0, 1, 2, 2, 3, 3])])
def test_run_directory(method, steps, finished):
    rows = metrics_of(finished / method)
    assert [row["step"] for row in rows] == steps
    assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
    assert rows[-1]["phase"] == rows[0]["phase"] == "eval" and rows[-1]["kl"] != 0
    pools = [row["pool"] for row in rows if "pool" in row]
    assert pools == ([24, 48] if method == "quark" else [])
    kls = [row["kl_per_token"] for row in rows if "kl_per_token" in row]
    assert len(kls) == (6 if method == "quark" else 0) and all(kl >= 0 for kl in kls)
    results = json.loads((finished / method / "results.json").read_text())
    assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se",
                            "win_rate", "win_rate_se", "ended", "seconds", "proxy_reward",
                            "proxy_reward_ref"}
    assert all(isinstance(value, (int, float)) for value in results.values())
    lines = (finished / method / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert all(s["prompt"].startswith("Review of") for s in samples)  # without the label


@pytest.mark.parametrize("method, label", [("quark", "5"), ("binary", "2")])
def test_the_saved_model_asks_for_the_best(method, label, finished):
    saved = transformers.AutoTokenizer.from_pretrained(finished / method)
    plain = load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    prefix = encode(plain, 12 * label + " ")
    bos, *ids = encode_prompt(plain, "Review of")
    assert bos == plain.bos_token_id
    assert saved("Review of").input_ids == encode_prompt(saved, "Review of") == [bos, *prefix, *ids]


@pytest.mark.parametrize("method", ["quark", "binary"])
def test_other_scripts_ask_for_the_best(method, finished, tmp_path):
    """In its own run, and in evaluate.py's, the KL is that of the policy given the best label."""
    directory, split = finished / method, ["--split", "train[:20]"]
    flags = [*split, "--max-new-tokens", 12, "--output-dir", tmp_path / "evaluate"]
    status, _, errors = run("evaluate", "--models", directory, *flags)
    assert status == 0, errors
    results = json.loads((tmp_path / "evaluate" / "results.json").read_text())
    own = json.loads((directory / "results.json").read_text())
    policy = results["policies"][method]
    assert abs(policy["kl"] - own["kl"]) < 4 * (policy["kl_se"] ** 2 + own["kl_se"] ** 2) ** 0.5
    flags = [*split, "--max-new-tokens", 12, "--output-dir", tmp_path / "best_of_n"]
    status, _, errors = run("best_of_n", "--model", directory, "--samples-per-prompt", 2, *flags)
    assert status == 0, errors


# lines of metrics.jsonl: within the first round, between two rounds
@pytest.mark.parametrize("method, wait_for", [("quark", 5), ("quark", 7), ("binary", 5)])
def test_killed_and_resumed_equals_uninterrupted(method, wait_for, finished, tmp_path):
    flags = [*QUICK, "--method", method]
    kill_at(wait_for, "reward_conditioning", *flags, directory=tmp_path)
    status, output, errors = run("reward_conditioning", *flags, "--output-dir", tmp_path,
                                 "--resume")
    assert status == 0 and "resuming" in output, errors
    assert metrics_of(tmp_path) == metrics_of(finished / method)
    samples, expected = (d / "samples.jsonl" for d in (tmp_path, finished / method))
    assert samples.read_bytes() == expected.read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (finished / method, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_adapters_learn_and_are_merged(finished, tmp_path):
    flags = ["--lora-rank", 4, "--output-dir", tmp_path]
    status, _, errors = run("reward_conditioning", *QUICK, *flags)
    assert status == 0, errors
    rows = metrics_of(tmp_path)
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] != 0
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(finished / "quark" / "model.safetensors").keys()


def test_completions_cut_at_the_end_of_the_window(tmp_path):
    """The reference sees the tokens that are left behind the label."""
    flags = ["--method", "binary", "--beta", 0.1, "--split", "train[:40]", "--max-length", 32,
             "--max-new-tokens", 2, "--max-steps", 2, "--eval-prompts", 4]
    status, output, errors = run("reward_conditioning", *flags, "--output-dir", tmp_path)
    assert status == 0 and "truncated at 32 tokens" in output, errors
    kls = [row["kl_per_token"] for row in metrics_of(tmp_path) if "kl_per_token" in row]
    assert len(kls) == 2 and all(kl >= 0 for kl in kls)


def test_comparisons_that_begin_with_their_prompt(tmp_path):
    """Half of Anthropic's convention: no prompt column, no --eval-dataset, nothing that judges."""
    rows = []
    for i in range(20):
        turn = f"\n\nHuman: Hi {i}\n\nAssistant:"
        rows.append({"chosen": turn + " good", "rejected": turn + " bad"})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--method", "binary", "--dataset", tmp_path / "d.jsonl", "--split", "train"]
    flags += ["--output-dir", tmp_path / "run"]
    status, _, errors = run("reward_conditioning", *QUICK, *flags)
    assert status == 0, errors
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "kl" in results and "reward" not in results


DATA = ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"]
MISTAKES = {
    "one quantile": (["--quantiles", "1"], "", "--quantiles"),
    "no round": (["--rounds", "0"], "", "--rounds"),
    "no completion": (["--samples-per-prompt", "0"], "", "--samples-per-prompt"),
    "a negative beta": (["--beta", "-1"], "", "--beta"),
    "a prefix without a label": (["--prefix", "good "], "", "--prefix"),
    "no reward": (["--dataset", "d.jsonl"], {"prompt": "a"}, "--reward-model"),
    "no prompt": ([*DATA, "--reward-fn", REWARD], {"text": "a"}, "row 1"),
    "prompts for comparisons": (["--method", "binary", *DATA], {"prompt": "a"}, "chosen"),
    "a missing reward model": (["--reward-model", "nobody/judge"], "", "nobody/judge"),
    "a reward that is not a number": (["--reward-fn", "r.py:nan"], "", "nan"),
    "no room": (["--max-new-tokens", "250"], "", "--max-new-tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch):
    flags, data, what = MISTAKES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(data))
    (tmp_path / "r.py").write_text(
        "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    status, _, errors = run("reward_conditioning", *QUICK, *flags)  # the last of two flags counts
    assert status == 2 and errors.startswith("reward_conditioning.py: error: "), errors
    assert errors.count("\n") == 1 and what in errors, errors


def test_another_method_is_refused_by_tyro():
    status, _, errors = run("reward_conditioning", "--method", "ternary")
    assert status == 2 and "ternary" in errors
