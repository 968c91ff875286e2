"""sft_loss and the path that leads to it, against TRL's numbers; and what carries loss in each form
of demonstration."""

import json

import pytest
import torch
from safetensors.torch import load_file

from common import Row, UserError, load_model, load_tokenizer, pad_rows, token_logprobs
from conftest import ROOT
from sft import Args, batch_loss, load_demonstrations, sft_loss
from test_text import CONVERSATION, COUNTED, TOOLS, chat_tokenizer
from tiny import model_of

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "sft.json").read_text())


def demonstrations(tmp_path, examples, model, tokenizer, **flags):
    """Written to a file and read as sft.py reads it -> [Row]"""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    args = Args(dataset=str(path), eval_dataset=str(path), **flags)
    train, held_out = load_demonstrations(args, model, tokenizer)
    assert train == held_out
    return [row for _, row in train]


# --- other people's numbers ---


@pytest.mark.parametrize("which", ["completion_only", "full_sequence"])
def test_golden_text_to_loss_to_gradient(which, tmp_path):
    model, tokenizer = (load(str(GOLDEN / "policy")) for load in (load_model, load_tokenizer))
    flags = dict(train_on_prompt=which == "full_sequence")
    rows = demonstrations(tmp_path, EXPECTED["text"], model, tokenizer, **flags)
    input_ids, mask = pad_rows(rows)
    labels = EXPECTED["inputs"]["labels"]
    if which == "full_sequence":
        labels = EXPECTED["labels_full_sequence"]
    labels = torch.tensor(labels)
    labels[:, 0] = -100  # nothing predicts the first token
    assert torch.equal(torch.where(mask.bool(), input_ids, -100), labels)

    expected = EXPECTED["expected"][which]
    with torch.no_grad():
        assert sft_loss(token_logprobs(model, input_ids, mask), mask).item() == pytest.approx(
            expected["loss"], abs=1e-5)
    loss = batch_loss(model, rows, Args(micro_batch_size=3), train=True)
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    if which == "completion_only":
        gradients = load_file(GOLDEN / "grads_sft.safetensors")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_mean_over_masked_tokens():
    logps = torch.tensor([[9.0, -1.0, -2.0], [9.0, 9.0, -6.0]])
    assert sft_loss(logps, torch.tensor([[0, 1, 1], [0, 0, 1]])).item() == 3.0


def test_one_row_at_a_time_gives_the_same_gradient(tmp_path):
    """1 x 8 = 8 x 1: the mean is over the tokens of the batch, not over rows or micro-batches."""
    model, tokenizer = (load(str(GOLDEN / "policy")) for load in (load_model, load_tokenizer))
    rows = demonstrations(tmp_path, EXPECTED["text"], model, tokenizer)
    assert len({sum(mask) for _, mask in rows}) > 2  # of different lengths, or nothing is tested
    gradients = []
    for size in (None, 1):
        model.zero_grad()
        batch_loss(model, rows, Args(micro_batch_size=size), train=True)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for together, apart in zip(*gradients):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)


# --- what carries loss ---


@pytest.fixture(scope="module")
def chat():
    """A model with a word for each of the tokenizer's"""
    tokenizer, model = chat_tokenizer(), model_of("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 128
    return model, tokenizer


def learnt(tokenizer, row):
    return tokenizer.decode([token for token, m in zip(*row) if m])


def test_every_turn_of_the_assistant_is_learnt(chat, tmp_path):
    model, tokenizer = chat
    share_gpt = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                 for m in CONVERSATION]
    forms = [{"messages": CONVERSATION}, {"conversations": share_gpt},
             {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}]
    rows = demonstrations(tmp_path, forms, model, tokenizer)
    assert rows == rows[:1] * 3
    assert learnt(tokenizer, rows[0]) == "ab<|im_end|>y<|im_end|>"


def test_turns_that_the_template_rewrites_are_rows_of_their_own(chat, tmp_path):
    model, tokenizer = chat[0], chat_tokenizer(COUNTED)
    rows = demonstrations(tmp_path, [{"messages": CONVERSATION}], model, tokenizer)
    assert [learnt(tokenizer, row) for row in rows] == ["ab<|im_end|>", "y<|im_end|>"]


def test_prompt_and_completion(chat, tmp_path):
    """Texts, messages, or a text as the one turn of an answer."""
    model, tokenizer = chat
    forms = [{"prompt": "he", "completion": "ab"},
             {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:2]},
             {"prompt": CONVERSATION[:1], "completion": "ab"}]
    text, turn, mixed = demonstrations(tmp_path, forms, model, tokenizer)
    assert tokenizer.decode(text.ids) == "heab<|im_end|>"
    assert {learnt(tokenizer, row) for row in (text, turn, mixed)} == {"ab<|im_end|>"}
    assert turn == mixed
    rows = demonstrations(tmp_path, [{"prompt": "he", "chosen": "ab"}], model, tokenizer,
                          completion_column="chosen")
    assert rows == [text]


def test_a_text_is_learnt_from_its_second_token(chat, tmp_path):
    model, tokenizer = chat
    forms = [{"text": "heab"}, {"text": "heab<|im_end|>"}]
    rows = demonstrations(tmp_path, forms, model, tokenizer)
    assert rows[0] == rows[1] and learnt(tokenizer, rows[0]) == "ab<|im_end|>"


def test_train_on_prompt_puts_the_loss_on_all_tokens(chat, tmp_path):
    model, tokenizer = chat
    forms = [{"messages": CONVERSATION}, {"prompt": "he", "completion": "ab"}]
    for row in demonstrations(tmp_path, forms, model, tokenizer, train_on_prompt=True):
        assert row == Row(row.ids, [0] + [1] * (len(row.ids) - 1))


def test_tools_stand_in_the_prompt(chat, tmp_path):
    model, tokenizer = chat[0], chat_tokenizer(TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    forms = [{"messages": CONVERSATION[:2], "tools": json.dumps(tools)},
             {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:2], "tools": tools}]
    for row in demonstrations(tmp_path, forms, model, tokenizer):
        assert tokenizer.decode(row.ids).startswith("add\n<|im_start|>user")


def test_what_cannot_teach_is_skipped_and_counted(chat, tmp_path, capsys):
    model, tokenizer = chat
    long = {"prompt": "x" * 200, "completion": "ab"}
    forms = [{"messages": CONVERSATION[:1]}, {"messages": CONVERSATION[:2]}, long, long]
    rows = demonstrations(tmp_path, forms, model, tokenizer)
    assert [learnt(tokenizer, row) for row in rows] == ["ab<|im_end|>"]
    output = capsys.readouterr().out
    path = tmp_path / "d.jsonl"
    assert f"1 rows skipped: no assistant turn (first: --dataset {path}, row 1)" in output
    assert "2 rows skipped: the prompt leaves no room within --max-length (128 tokens)" in output
    assert "row 3" in output
    with pytest.raises(UserError, match="no row is left to learn from"):
        demonstrations(tmp_path, forms[:1], model, tokenizer)


def test_an_empty_completion_is_learnt_as_its_end(chat, tmp_path):
    model, tokenizer = chat
    (row,) = demonstrations(tmp_path, [{"prompt": "he", "completion": ""}], model, tokenizer)
    assert learnt(tokenizer, row) == "<|im_end|>"
