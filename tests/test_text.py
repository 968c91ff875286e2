"""Text to ids and masks, token by token, for each tokenizer's quirk; and the column conventions of data sets."""

import json

import pytest

from common import (UserError, batches, comparison, encode_all, encode_conversation, encode_prompt, encode_row,
                    generate, hold_out, load_rows, load_tokenizer)
from conftest import ROOT
from tiny import byte_level, model_of, sentencepiece

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             + CHATML)


def split(row):
    """-> (ids before the mask begins, ids under the mask)"""
    ids, mask = row
    return [i for i, m in zip(ids, mask) if not m], [i for i, m in zip(ids, mask) if m]


TEXTS = [("the", " the low"), ("the ", "the low"), ("a:\n", "the\nb"), ("abc", "he"), ("the low!", " é?")]


@pytest.mark.parametrize("prompt, completion", TEXTS)
@pytest.mark.parametrize("make", [sentencepiece, byte_level, lambda: load_tokenizer(str(ROOT / "assets" / "tiny-sft"))])
def test_a_row_is_prompt_plus_completion(make, prompt, completion):
    tokenizer = make()
    ids, mask = encode_row(tokenizer, prompt, completion, [tokenizer.eos_token_id])
    prompt_ids, completion_ids = split((ids, mask))
    assert prompt_ids == encode_prompt(tokenizer, prompt)  # what generation starts from
    assert mask == [0] * len(prompt_ids) + [1] * len(completion_ids)
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion  # no dummy space in the middle


def test_a_dummy_space_is_not_put_into_the_completion():
    tokenizer = sentencepiece()
    space = tokenizer.convert_tokens_to_ids("▁")
    assert space in tokenizer("low", add_special_tokens=False).input_ids  # what SentencePiece does to every text
    assert split(encode_row(tokenizer, "the", "low", [2]))[1] == [*tokenizer.convert_tokens_to_ids(["lo", "w"]), 2]


def test_a_completion_is_the_text_that_it_adds():
    """Decoded alone, SentencePiece would drop the space in front of the completion."""
    model, tokenizer = model_of("llama"), sentencepiece()
    model.resize_token_embeddings(len(tokenizer))
    rollout = generate(model, tokenizer, ["the", "a low"], 100, 5, temperature=100.0)
    for i, (ids, mask) in enumerate(rollout.rows):
        ids = ids[:-1] if rollout.ended[i] else ids
        assert ["the", "a low"][i // 100] + rollout.completions[i] == tokenizer.decode(ids, skip_special_tokens=True)
    assert any(c.startswith(" ") for c in rollout.completions)


def test_a_tokenizer_that_adds_eos_by_itself():
    from tokenizers import processors
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)])
    assert encode_prompt(tokenizer, "abc") == tokenizer("abc", add_special_tokens=False).input_ids
    assert encode_row(tokenizer, "a", "b", [eos])[0].count(eos) == 1


def test_pad_may_equal_eos_or_be_missing():
    """The EOS at the end of a completion is learnt, whatever pad is: the mask goes by position."""
    for kwargs in ({}, {"pad_token": "<|endoftext|>"}):
        tokenizer = byte_level(**kwargs)
        ids, mask = encode_row(tokenizer, "ab", "he", [tokenizer.eos_token_id])
        assert ids[-1] == tokenizer.eos_token_id and mask[-1] == 1


CONVERSATION = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "ab"},
                {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def chat_tokenizer(template=CHATML):
    tokenizer = byte_level(eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_chat_masks_token_by_token():
    tokenizer = chat_tokenizer()
    ids, mask = encode_conversation(tokenizer, CONVERSATION, [tokenizer.eos_token_id])
    shown = [(tokenizer.decode([i]), m) for i, m in zip(ids, mask)]
    user = [("<|im_start|>", 0), *[(c, 0) for c in "user\n"]]
    assistant = [("<|im_start|>", 0), *[(c, 0) for c in "assistant\n"]]
    assert shown == [*user, ("he", 0), ("<|im_end|>", 0), ("\n", 0),
                     *assistant, ("ab", 1), ("<|im_end|>", 1), ("\n", 0),
                     *user, ("x", 0), ("<|im_end|>", 0), ("\n", 0), *assistant, ("y", 1), ("<|im_end|>", 1)]
    # A comparison or a prompt with completion: only the last answer, and what generation would see before it.
    ids, mask = encode_row(tokenizer, CONVERSATION[:3], CONVERSATION[3:], [tokenizer.eos_token_id])
    assert ids[:len(ids) - 2] == encode_prompt(tokenizer, CONVERSATION[:3]) and mask == [0] * (len(ids) - 2) + [1, 1]


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_system_messages_with_and_without_a_system_role(template):
    tokenizer = chat_tokenizer(template)
    messages = [{"role": "system", "content": "be"}, *CONVERSATION[:2]]
    text = tokenizer.decode(encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])[0])
    if template == CHATML:
        assert text.startswith("<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhe")
    else:
        assert text.startswith("<|im_start|>user\nbe\n\nhe<|im_end|>")


def test_any_stop_token_ends_a_turn_and_a_missing_one_is_added():
    """Gemma ends turns with a token that is not the tokenizer's EOS; some templates write no stop token at all."""
    tokenizer = byte_level()  # EOS is <|endoftext|>, the template ends turns with <|im_end|>
    tokenizer.chat_template = CHATML
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:2], [tokenizer.eos_token_id, end_of_turn])
    assert split(row)[1][-1] == end_of_turn
    ids, mask = encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:2], [tokenizer.eos_token_id])
    assert ids[-1] == tokenizer.eos_token_id and mask[-1] == 1


def test_templates_that_rewrite_the_past_are_refused():
    tokenizer = chat_tokenizer("{{ messages|length }}" + CHATML)
    with pytest.raises(UserError, match="only grows"):
        encode_conversation(tokenizer, CONVERSATION, [tokenizer.eos_token_id])
    with pytest.raises(UserError, match="--chat-template"):
        encode_prompt(byte_level(), CONVERSATION[:1])


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_no_token_spans_the_end_of_a_template_without_special_tokens(make):
    """"... a" + "b" is one token of the whole text, and " " + "the" another; generation would never write either."""
    tokenizer = make()
    tokenizer.chat_template = ("{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '\n' }}{% endfor %}"
                               "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the wo"},
                {"role": "user", "content": "he"}, {"role": "assistant", "content": "abc"}]
    ids, mask = encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])
    prompt = encode_prompt(tokenizer, messages[:1])
    assert ids[:len(prompt)] == prompt and mask[:len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "u a\na the wo\nu he\na abc\n"
    answers = [i for i, m in zip(ids, mask) if m]
    assert tokenizer.decode(answers, skip_special_tokens=True).split() == ["the", "wo", "abc"]


def test_a_conversation_without_an_answer_is_refused():
    with pytest.raises(UserError, match="no assistant turn"):
        encode_conversation(chat_tokenizer(), CONVERSATION[:1], [0])


# ------------------------------------------------------------------------------------------------------------ data sets


def test_comparisons_in_every_form():
    assert comparison({"prompt": "p", "chosen": "a", "rejected": "b"}) == ("p", "a", "b")
    hh = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant:"
    assert comparison({"chosen": hh + " To be", "rejected": hh + " Then"}) == (hh, " To be", " Then")
    assert comparison({"chosen": "one two three", "rejected": "one two thirty"}) == ("one two", " three", " thirty")
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "u"), ("assistant", "g"), ("assistant", "b")))
    expected = ([user], [good], [bad])
    assert comparison({"prompt": [user], "chosen": [good], "rejected": [bad]}) == expected
    assert comparison({"chosen": [user, good], "rejected": [user, bad]}) == expected
    assert comparison({"prompt": "u", "chosen": [user, good], "rejected": [user, bad]}) == expected  # UltraFeedback
    for row, what in (({"chosen": "x", "rejected": "y"}, "prompt"),
                      ({"prompt": "p", "chosen": "", "rejected": "b"}, "'chosen' is empty"),
                      ({"prompt": "p"}, "no 'chosen'"),
                      ({"prompt": "p", "chosen": "a", "rejected": [good]}, "both")):
        with pytest.raises(UserError, match=what):
            comparison(row)


def test_every_file_type_and_directories(tmp_path):
    import datasets
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_csv(tmp_path / "a.csv")
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "disk")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "folder" / "test.jsonl").write_text(json.dumps(rows[0]))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "disk", "folder"):
        assert load_rows(str(tmp_path / name)) == rows, name
    assert load_rows(str(tmp_path / "a.jsonl"), "train[:2]") == rows[:2]
    assert load_rows(str(tmp_path / "folder"), None) == rows[:1]  # held-out data: the test split, where there is one


def test_rows_too_long_are_dropped_and_counted(capsys):
    rows = [{"n": 3}, {"n": 9}, {"n": 5}]
    kept = encode_all(rows, "data", lambda row: [([1] * row["n"] + [2] * 3, [0] * row["n"] + [1] * 3)], 7)
    assert [(row["n"], len(ids), sum(mask)) for row, [(ids, mask)] in kept] == [(3, 6, 3), (5, 7, 2)]
    assert "1 dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match="prompt of row 1 has 3 tokens"):
        encode_all(rows[:1], "data", lambda row: [([1] * 3 + [2], [0] * 3 + [1])], 3)


def test_batches_are_a_function_of_the_seed():
    plan = batches(10, 4, 2.0, None, seed=3)
    assert plan == batches(10, 4, 2.0, None, seed=3) != batches(10, 4, 2.0, None, seed=4)
    order = sum(plan, [])
    assert len(plan) == 5 and sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert len(batches(10, 4, 1.0, 7, seed=0)) == 7
    train, held_out = hold_out(list(range(50)), seed=0)
    assert len(held_out) == 5 and sorted(train + held_out) == list(range(50))


def test_the_embedded_world_is_what_its_readme_says():
    from assets.rewards import correct_sum, sentiment
    assert sentiment(None, [" The plot is very superb. I hated the cast. It is superb."]) == [1.5 * 1.5 - 1.5]
    assert sentiment(None, [" not bad and rather dull.", ""]) == [0.5 - 0.5, 0.0]
    assert correct_sum(None, [" 95", " 95.", "95 "], answer=["95", "95", "95"]) == [1.0, 0.0, 1.0]
    data = ROOT / "assets" / "data"
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in data.glob("*.jsonl")}
    assert len(rows["comparisons"]) == 4000 and len(rows["comparisons_heldout"]) == 1000
    for name in ("demonstrations", "comparisons", "rankings"):
        assert not {r["prompt"] for r in rows[name]} & {r["prompt"] for r in rows[f"{name}_heldout"]}
    assert not {r["prompt"] for r in rows["sum_prompts"]} & {r["prompt"] for r in rows["sum_prompts_heldout"]}
    assert sum(path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file()) < 10e6
    better = sum(sentiment(None, [r["chosen"]]) > sentiment(None, [r["rejected"]]) for r in rows["comparisons"])
    assert 0.65 < better / 4000 < 0.85  # noisy, not random


def test_the_frontier_has_the_slope_that_the_optimum_must_have():
    """Along pi* the last nat of KL buys beta of reward: d reward / d KL = beta. optimal_gain reads between points."""
    from types import SimpleNamespace

    from common import ASSETS, optimal_gain
    table = json.loads((ROOT / "assets" / "frontier.json").read_text())
    points = table["points"]
    for a, b in zip(points[::3], points[3::3]):
        slope = (b["reward"] - a["reward"]) / (b["kl"] - a["kl"])
        assert 0.9 * b["beta"] < slope < 1.1 * a["beta"]
    gold = SimpleNamespace(model=str(ASSETS / "tiny-sft"), reward_fn=f"{ASSETS}/rewards.py:sentiment", temperature=1.0)
    for point in points:
        assert optimal_gain(gold, point["kl"]) == pytest.approx(point["reward"] - table["reward_ref"])
    assert points[2]["kl"] < points[3]["kl"]
    between = optimal_gain(gold, (points[2]["kl"] + points[3]["kl"]) / 2)
    assert optimal_gain(gold, points[2]["kl"]) < between < optimal_gain(gold, points[3]["kl"])
    gold.temperature = 0.7
    assert optimal_gain(gold, 1.0) is None  # another reference
    gold.temperature = 1.0
    assert optimal_gain(gold, points[-1]["kl"] + 1) is None  # beyond what is known


def test_tiny_sft_ends_its_completions():
    model_name = str(ROOT / "assets" / "tiny-sft")
    from common import load_model
    prompts = [row["prompt"] for row in load_rows(str(ROOT / "assets" / "data" / "review_prompts_heldout.jsonl"))[:400]]
    assert generate(load_model(model_name), load_tokenizer(model_name), prompts, 1, 64).ended.float().mean() >= 0.99
