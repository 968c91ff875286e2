"""Text to ids and masks, token by token, for each tokenizer's quirk and each template's; and the
column conventions of data sets."""

import csv
import gzip
import json
import random
from types import SimpleNamespace

import pytest
from tokenizers import normalizers, processors

from common import (
    Row, UserError, encode_conversation, encode_prompt, encode_row, generate, load_model,
    load_tokenizer
)
from conftest import ROOT
from harness import (
    GOLD, Example, Limits, Skip, batches, comparison, encode_examples, hold_out, load_rows,
    messages_of, optimal_gain, tools_of
)
from tiny import byte_level, model_of, sentencepiece

# --- texts ---


def split(row):
    """-> (ids before the mask begins, ids under the mask)"""
    ids, mask = row
    start = mask.index(1)
    assert mask == [0] * start + [1] * (len(ids) - start)
    return ids[:start], ids[start:]


def tiny_sft():
    return load_tokenizer(str(ROOT / "assets" / "tiny-sft"))


def normalizing():
    """SentencePiece that also rewrites characters, as T5's: a text is not what it decodes to."""
    tokenizer = sentencepiece()
    before = tokenizer.backend_tokenizer.normalizer
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), before])
    return tokenizer


TEXTS = [("the", " the low"), ("the ", "the low"), ("a:\n", "the\nb"), ("abc", "he"),
         ("the low!", " é?"), ("the", ""), ("", "the"), ("the \n", "\n\n he"), ("a", "\t 漢😀")]


@pytest.mark.parametrize("prompt, completion", TEXTS)
@pytest.mark.parametrize("make", [sentencepiece, byte_level, tiny_sft])
def test_a_row_is_prompt_plus_completion(make, prompt, completion):
    tokenizer = make()
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    row = encode_row(tokenizer, prompt, completion, [eos])
    prompt_ids, completion_ids = split(row)
    assert prompt_ids == encode_prompt(tokenizer, prompt)  # what generation starts from
    assert completion_ids.count(eos) == 1 and completion_ids[-1] == eos
    if bos not in (None, eos):
        assert row.ids.count(bos) == 1 and row.ids[0] == bos
    text = tokenizer.decode(row.ids, skip_special_tokens=True)
    assert text == prompt + completion  # no dummy space in the middle


def test_a_dummy_space_is_not_put_into_the_completion():
    tokenizer = sentencepiece()
    space = tokenizer.convert_tokens_to_ids("▁")
    ids = tokenizer("low", add_special_tokens=False).input_ids
    assert space in ids  # what SentencePiece does to every text
    completion = split(encode_row(tokenizer, "the", "low", [2]))[1]
    assert completion == [*tokenizer.convert_tokens_to_ids(["lo", "w"]), 2]


@pytest.mark.parametrize("completion, decoded", [("low…", "low..."), ("ﬁt", "fit")])
def test_nor_where_the_tokenizer_rewrites_characters(completion, decoded):
    tokenizer = normalizing()
    ids = encode_row(tokenizer, "the", completion, [2]).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the" + decoded


def test_a_completion_is_the_text_that_it_adds():
    """Decoded alone, SentencePiece would drop the space in front of the completion."""
    model, tokenizer = model_of("llama"), sentencepiece()
    model.resize_token_embeddings(len(tokenizer))
    prompts = ["the", "a low"]
    rollout = generate(model, tokenizer, prompts, 100, 5, temperature=100.0)
    for i, (ids, _) in enumerate(rollout.rows):
        ids = ids[:-1] if rollout.ended[i] else ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert prompts[i // 100] + rollout.completions[i] == text
    assert any(completion.startswith(" ") for completion in rollout.completions)


def test_a_tokenizer_that_adds_eos_by_itself():
    tokenizer = byte_level()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", eos)])
    plain = tokenizer("abc", add_special_tokens=False).input_ids
    assert encode_prompt(tokenizer, "abc") == plain
    assert encode_row(tokenizer, "a", "b", [eos]).ids.count(eos) == 1


def test_pad_may_equal_eos_or_be_missing():
    """The EOS at the end of a completion is learnt, whatever pad is: the mask goes by position."""
    for kwargs in ({}, {"pad_token": "<|endoftext|>"}):
        tokenizer = byte_level(**kwargs)
        ids, mask = encode_row(tokenizer, "ab", "he", [tokenizer.eos_token_id])
        assert ids[-1] == tokenizer.eos_token_id and mask[-1] == 1


# --- conversations ---

CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
          "{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
NO_SYSTEM = ("{% if messages[0]['role'] == 'system' %}"
             "{{ raise_exception('System role not supported') }}"
             "{% endif %}" + CHATML)
COUNTED = "{{ messages | length }}" + CHATML
TOOLS = "{% for tool in tools or [] %}{{ tool['function']['name'] + '\n' }}{% endfor %}" + CHATML
# Phi-3 closes a conversation that is finished.
PHI = CHATML.replace("{% endif %}", "{% else %}{{ '<|endoftext|>' }}{% endif %}")
# Llama 2 has no beginning of an assistant's turn.
INST = ("{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + ' <|im_end|>' }}"
        "{% else %}{{ '[' + m['role'] + '] ' + m['content'] + ' [/]' }}{% endif %}{% endfor %}")
# Qwen3 writes the reasoning of turns after the last question, empty if need be, and no other.
QWEN3 = """{%- set at = namespace(question=-1) -%}
{%- for m in messages if m.role == 'user' %}{% set at.question = messages.index(m) %}{% endfor -%}
{%- for m in messages -%}
{%- set parts = m.content.split('</think>') -%}
{%- set reasoning = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' -%}
{{- '<|im_start|>' + m.role + '\n' -}}
{%- if m.role != 'assistant' -%}{{- m.content -}}
{%- elif loop.index0 > at.question -%}
{{- '<think>\n' + reasoning + '\n</think>\n\n' + parts[-1].lstrip('\n') -}}
{%- else -%}{{- parts[-1].lstrip('\n') -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
# DeepSeek-R1 drops all reasoning, and begins a turn with an open think tag.
R1 = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
      "{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}"
      "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
PLAIN = ("{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}")


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATION = [message("user", "he"), message("assistant", "ab"),
                message("user", "x"), message("assistant", "y")]
USER, GOOD, BAD = message("user", "u"), message("assistant", "g"), message("assistant", "b")


def chat_tokenizer(template=CHATML, **kwargs):
    tokenizer = byte_level(**{"eos_token": "<|im_end|>", **kwargs})
    tokenizer.chat_template = template
    return tokenizer


def rows_of(tokenizer, messages, **kwargs):
    """-> [(text before the mask begins, [texts under it])]: one for each row."""
    shown = []
    for ids, mask in encode_conversation(tokenizer, messages, [tokenizer.eos_token_id], **kwargs):
        start, runs = mask.index(1), []
        for i in range(start, len(ids)):
            if mask[i]:
                runs = runs if mask[i - 1] and runs else [*runs, []]
                runs[-1].append(ids[i])
        shown.append((tokenizer.decode(ids[:start]), [tokenizer.decode(run) for run in runs]))
    return shown


def test_chat_masks_token_by_token():
    tokenizer = chat_tokenizer()
    stops = [tokenizer.eos_token_id]
    (row,) = encode_conversation(tokenizer, CONVERSATION, stops)
    shown = [(tokenizer.decode([i]), m) for i, m in zip(*row)]
    user = [("<|im_start|>", 0), *[(c, 0) for c in "user\n"]]
    assistant = [("<|im_start|>", 0), *[(c, 0) for c in "assistant\n"]]
    assert shown == [
        *user, ("he", 0), ("<|im_end|>", 0), ("\n", 0),
        *assistant, ("ab", 1), ("<|im_end|>", 1), ("\n", 0),
        *user, ("x", 0), ("<|im_end|>", 0), ("\n", 0),
        *assistant, ("y", 1), ("<|im_end|>", 1),
    ]
    # Prompt and completion: only the last turn, and before it what generation would see.
    before, said = split(encode_row(tokenizer, CONVERSATION[:3], CONVERSATION[3:], stops))
    assert before == encode_prompt(tokenizer, CONVERSATION[:3])
    assert tokenizer.decode(said) == "y<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM])
def test_system_messages_with_and_without_a_system_role(template):
    tokenizer = chat_tokenizer(template)
    messages = [message("system", "be"), *CONVERSATION[:2]]
    ((before, said),) = rows_of(tokenizer, messages)
    expected = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhe<|im_end|>"
    if template == NO_SYSTEM:
        expected = "<|im_start|>user\nbe\n\nhe<|im_end|>"
    assert before == expected + "\n<|im_start|>assistant\n" and said == ["ab<|im_end|>"]


def test_any_stop_token_ends_a_turn_and_a_missing_one_is_added():
    """Gemma ends turns with a token that is not the tokenizer's EOS; some templates write none."""
    tokenizer = chat_tokenizer(eos_token="<|endoftext|>")  # the template's end is <|im_end|>
    eos, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    row = encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:2], [eos, end_of_turn])
    assert tokenizer.decode(split(row)[1]) == "ab<|im_end|>"
    row = encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:2], [eos])
    assert tokenizer.decode(split(row)[1]) == "ab<|im_end|>\n<|endoftext|>"


def test_nothing_follows_the_first_stop_token_of_a_text():
    tokenizer = chat_tokenizer(eos_token="<|endoftext|>")
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for text in ("ab", "ab<|im_end|>", "ab<|im_end|> and more<|endoftext|>"):
        row = encode_row(tokenizer, "he", text, stops)
        end = "<|im_end|>" if "<|im_end|>" in text else "<|endoftext|>"
        assert tokenizer.decode(split(row)[1]) == f"ab{end}"


def test_a_template_that_rewrites_the_past():
    """Each turn is a row of its own, behind what generation would see."""
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert rows_of(chat_tokenizer(COUNTED), CONVERSATION) == [
        ("1" + user.format("he"), ["ab<|im_end|>"]),
        ("3" + user.format("he") + "ab<|im_end|>\n" + user.format("x"), ["y<|im_end|>"]),
    ]


def test_no_chat_template():
    with pytest.raises(UserError, match="--chat-template"):
        encode_prompt(byte_level(), CONVERSATION[:1])


REASONING = [message("user", "he"), message("assistant", "<think>\nwhy\n</think>\n\nab"),
             message("user", "x"), message("assistant", "<think>\nso\n</think>\n\ny")]


def test_a_template_that_drops_earlier_reasoning():
    """Qwen3: the reasoning of each turn is learnt, in the turn that it belongs to."""
    user = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    think = "<think>\n{}\n</think>\n\n{}<|im_end|>"
    tokenizer = chat_tokenizer(QWEN3)
    assert rows_of(tokenizer, REASONING) == [
        (user.format("he"), [think.format("why", "ab")]),
        (user.format("he") + "ab<|im_end|>\n" + user.format("x"), [think.format("so", "y")]),
    ]
    ((_, said),) = rows_of(tokenizer, CONVERSATION[:2])
    assert said == [think.format("", "ab")]
    # Two calls after one question keep their reasoning: the text only grows, in one row.
    tool = message("tool", "4")
    messages = [REASONING[0], REASONING[1], tool, REASONING[3]]
    ((before, said),) = rows_of(tokenizer, messages)
    assert before == user.format("he")
    assert said == [think.format("why", "ab"), think.format("so", "y")]


def test_a_template_that_opens_a_think_tag():
    """DeepSeek-R1: the tag is in the prompt, and the reasoning is learnt behind it."""
    user = "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n"
    tokenizer = chat_tokenizer(R1)
    assert rows_of(tokenizer, REASONING) == [
        (user.format("he") + "<think>\n", ["why\n</think>\n\nab<|im_end|>"]),
        (user.format("he") + "\n\nab<|im_end|>" + user.format("x") + "<think>\n",
         ["so\n</think>\n\ny<|im_end|>"]),
    ]
    # A turn whose words also stand in the marks around it.
    for words in ("e", "im_end", "assistant", "", "<"):
        ((_, said),) = rows_of(tokenizer, [CONVERSATION[0], message("assistant", words)])
        assert said == [words + "<|im_end|>"]


def test_a_template_that_closes_a_finished_conversation():
    """Phi-3: what closes it is not part of a turn that another one follows."""
    tokenizer = chat_tokenizer(PHI)
    ((_, said),) = rows_of(tokenizer, CONVERSATION)
    assert said == ["ab<|im_end|>", "y<|im_end|>"]
    tokenizer = chat_tokenizer(PHI, eos_token="<|endoftext|>")  # turns end without a stop token
    first, second = rows_of(tokenizer, CONVERSATION)
    assert first[1] == ["ab<|im_end|>\n<|endoftext|>"]
    assert second[0].count("<|endoftext|>") == 0 and second[1] == ["y<|im_end|>\n<|endoftext|>"]


@pytest.mark.parametrize("words", ["ab", "s", "assistant", "", " he"])
def test_a_conversation_that_begins_with_the_assistant(words):
    """What precedes its words is the template's."""
    tokenizer = chat_tokenizer()
    messages = [message("assistant", words), *CONVERSATION[:2]]
    ((before, said),) = rows_of(tokenizer, messages)
    assert before == "<|im_start|>assistant\n"
    assert said == [f"{words}<|im_end|>", "ab<|im_end|>"]
    ((_, said),) = rows_of(chat_tokenizer(QWEN3), REASONING[1:2])
    assert said[0].endswith("why\n</think>\n\nab<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, TRIMMED, COUNTED, QWEN3, R1, INST])
def test_a_turn_that_the_prompt_begins(template):
    """The prompt's last message is the assistant's: it is continued, not closed."""
    tokenizer = chat_tokenizer(template)
    prompt = [message("user", "x"), message("assistant", "he is")]
    completion = [message("assistant", " ab")]
    row = encode_row(tokenizer, prompt, completion, [tokenizer.eos_token_id])
    before, said = split(row)
    assert before == encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(before).endswith("he is")
    end = " <|im_end|>" if template == INST else "<|im_end|>"
    assert tokenizer.decode(said) == " ab" + end


def test_a_turn_that_is_continued_is_one_message():
    tokenizer = chat_tokenizer()
    with pytest.raises(UserError, match="one message"):
        encode_row(tokenizer, CONVERSATION[:2], [GOOD, USER, GOOD], [tokenizer.eos_token_id])


def test_reasoning_that_the_prompt_begins():
    tokenizer = chat_tokenizer(R1)  # drops it from turns that are finished
    prompt = [message("user", "x"), message("assistant", "<think>\nwell")]
    completion = [message("assistant", ", so\n</think>\n\ny")]
    row = encode_row(tokenizer, prompt, completion, [tokenizer.eos_token_id])
    before, said = split(row)
    assert tokenizer.decode(before).endswith("assistant\n<think>\nwell")
    assert tokenizer.decode(said) == ", so\n</think>\n\ny<|im_end|>"


def test_a_prompt_that_begins_with_one_character_is_not_said_again():
    tokenizer = chat_tokenizer(R1)
    prompt = [message("user", "x"), message("assistant", "<")]
    completion = [message("assistant", "think>\nz</think>\n\ny")]
    _, said = split(encode_row(tokenizer, prompt, completion, [tokenizer.eos_token_id]))
    assert tokenizer.decode(said) == "think>\nz</think>\n\ny<|im_end|>"


def test_turns_with_weight_0_are_not_learnt():
    first = [CONVERSATION[0], {**CONVERSATION[1], "weight": 0}, *CONVERSATION[2:]]
    ((before, said),) = rows_of(chat_tokenizer(), first)
    assert "ab<|im_end|>" in before and said == ["y<|im_end|>"]
    last = [*CONVERSATION[:3], {**CONVERSATION[3], "weight": 0}]
    ((before, said),) = rows_of(chat_tokenizer(), last)
    assert "ab" not in before and said == ["ab<|im_end|>"]


def test_tools_reach_the_template():
    tokenizer = chat_tokenizer(TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    row = Example(tools=json.dumps(tools))
    assert tools_of(row) == tools_of(Example(tools=tools)) == tools
    assert tools_of(Example(tools="")) is None and tools_of(Example()) is None
    prompt = encode_prompt(tokenizer, CONVERSATION[:1], tools)
    assert tokenizer.decode(prompt).startswith("add\n<|im_start|>user")
    ((before, _),) = rows_of(tokenizer, CONVERSATION, tools=tools)
    assert before == tokenizer.decode(prompt)
    row = encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:2], [0], tools)
    assert split(row)[0] == prompt


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_no_token_spans_the_end_of_a_template_without_special_tokens(make):
    """"... a" + "b" is one token of the whole text, and " " + "the" another; generation would never
    write either. Turns end without a stop token: each is a row of its own, which ends with EOS."""
    tokenizer = make()
    tokenizer.chat_template = PLAIN
    messages = [message("user", "a"), message("assistant", "the wo"),
                message("user", "he"), message("assistant", "abc")]
    rows = encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])
    texts = ["u a\na the wo\n", "u a\na the wo\nu he\na abc\n"]
    assert len(rows) == 2
    for row, turn, text, words in zip(rows, (1, 3), texts, ("the wo\n", "abc\n")):
        before, said = split(row)
        assert before == encode_prompt(tokenizer, messages[:turn])
        assert said[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == text
        begun = len(tokenizer.decode(before, skip_special_tokens=True))
        assert tokenizer.decode(row.ids, skip_special_tokens=True)[begun:] == words


def test_a_conversation_without_an_answer_has_no_row():
    assert encode_conversation(chat_tokenizer(), CONVERSATION[:1], [0]) == []


def test_a_completion_is_one_turn():
    tokenizer = chat_tokenizer(COUNTED)
    with pytest.raises(UserError, match="one turn per completion"):
        encode_row(tokenizer, CONVERSATION[:1], CONVERSATION[1:], [tokenizer.eos_token_id])


# --- random conversations ---


def parts_of(content):
    """-> (reasoning, answer) of a turn"""
    reasoning, end, answer = content.rpartition("</think>")
    return (reasoning.split("<think>")[-1].strip("\n"), answer) if end else ("", content)


def qwen3_turn(content):
    reasoning, answer = parts_of(content)
    return f"<think>\n{reasoning}\n</think>\n\n" + answer.lstrip("\n") + "<|im_end|>"


def chatml_turn(content):
    return content + "<|im_end|>"


TURNS = {  # template, and what it has the assistant write between its beginning and the stop token
    "chatml": (CHATML, chatml_turn),
    "trimmed": (TRIMMED, lambda content: content.strip() + "<|im_end|>"),
    "no system": (NO_SYSTEM, chatml_turn),
    "counted": (COUNTED, chatml_turn),
    "tools": (TOOLS, chatml_turn),
    "phi": (PHI, chatml_turn),
    "inst": (INST, lambda content: f" {content} <|im_end|>"),
    "qwen3": (QWEN3, qwen3_turn),
    "r1": (R1, lambda content: content.removeprefix("<think>\n") + "<|im_end|>"),
    "plain": (PLAIN, lambda content: content + "\n<|im_end|>"),
}
KEEP_THE_TEXT = ("chatml", "no system", "tools", "inst")  # what is written once stays as it is
PIECES = ["he", "ab", "a", "e", "s", "im_end", "assistant", "user", "x y", " ", "  ", "\n", "\n\n",
          "\t", ".", "é", "e\u0301", "漢字", "😀", "\u200b", "\u00a0", "½", "<", "|>", "{{ x }}",
          "{% if %}", "'", '"', "\\n", "0", "№", "\r\n"]


def random_conversation(draw):
    def words():
        return "".join(draw.choices(PIECES, k=draw.choice([0, 1, 1, 2, 5])))

    def turn(reasons):
        return f"<think>\n{words().strip()}\n</think>\n\n{words()}" if reasons else words()

    reasons = draw.random() < 0.4
    messages = [message("system", words())] if draw.random() < 0.5 else []
    if not messages and draw.random() < 0.2:
        messages.append(message("assistant", words()))
    for _ in range(draw.randint(1, 4)):
        role = "tool" if len(messages) > 1 and draw.random() < 0.2 else "user"
        messages += [message(role, words()), message("assistant", turn(reasons))]
    return messages


def runs_of(row):
    """-> [(start, end)] of the stretches under the mask"""
    edges = [i for i, (a, b) in enumerate(zip([0, *row.mask], [*row.mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize("name", TURNS)
def test_random_conversations(name):
    """What a row says is the template's text; the mask covers what the assistant says, and the stop
    token; before it stand the ids that generation would start from."""
    (template, written), draw = TURNS[name], random.Random(name)
    tokenizer = chat_tokenizer(template)
    stop = tokenizer.eos_token_id
    for _ in range(60):
        messages = random_conversation(draw)
        rows = encode_conversation(tokenizer, messages, [stop])
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        found = [(row, run) for row in rows for run in runs_of(row)]
        assert len(found) == len(turns)
        for (row, (start, end)), turn in zip(found, turns):
            said, content = row.ids[start:end], messages[turn]["content"]
            assert said.index(stop) == len(said) - 1
            text = tokenizer.decode(said)
            if turn:
                assert text == written(content), (messages, turn)
                assert row.ids[:start] == encode_prompt(tokenizer, messages[:turn])
            else:  # nothing is generated without a message: its beginning is the template's
                assert written(content).endswith(text) and parts_of(content)[1].strip() in text
        if name in KEEP_THE_TEXT:
            text = render(tokenizer, messages)
            assert len(rows) == 1 and text.startswith(tokenizer.decode(rows[0].ids))
            assert text[len(tokenizer.decode(rows[0].ids)):].strip() == ""


def render(tokenizer, messages):
    """By transformers alone."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # no system role
        content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return render(tokenizer, [message(messages[1]["role"], content), *messages[2:]])


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_random_conversations_without_special_tokens(make):
    """Whatever the tokenizer does at the start of a text, a turn is the text that it adds."""
    draw, tokenizer = random.Random(0), make()
    tokenizer.chat_template = PLAIN
    for _ in range(60):
        messages = random_conversation(draw)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        rows = encode_conversation(tokenizer, messages, [tokenizer.eos_token_id])
        assert len(rows) == len(turns)
        for row, turn in zip(rows, turns):
            before, said = split(row)
            text = tokenizer.decode(row.ids[:-1])
            assert text == render(tokenizer, messages[:turn + 1])
            if turn:
                assert before == encode_prompt(tokenizer, messages[:turn])
            content = messages[turn]["content"]
            assert text == tokenizer.decode(before) + content + "\n"
            assert said[-1] == tokenizer.eos_token_id


# --- data sets ---


def example(**columns):
    row = Example(columns)
    row.where = "--dataset d.jsonl, row 7"
    return row


def test_comparisons_in_every_form():
    assert comparison(example(prompt="p", chosen="a", rejected="b")) == ("p", "a", "b")
    assert comparison(example(prompt="p", chosen="", rejected="b")) == ("p", "", "b")
    hh = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More?\n\nAssistant:"
    row = example(chosen=hh + " To be", rejected=hh + " Then")
    assert comparison(row) == (hh, " To be", " Then")
    row = example(chosen="one two three", rejected="one two thirty")
    assert comparison(row) == ("one two", " three", " thirty")
    expected = ([USER], [GOOD], [BAD])
    assert comparison(example(prompt=[USER], chosen=[GOOD], rejected=[BAD])) == expected
    assert comparison(example(chosen=[USER, GOOD], rejected=[USER, BAD])) == expected
    # UltraFeedback repeats the prompt; a text among messages is a turn.
    assert comparison(example(prompt="u", chosen=[USER, GOOD], rejected=[USER, BAD])) == expected
    assert comparison(example(prompt=[USER], chosen="g", rejected="b")) == expected


@pytest.mark.parametrize("columns, what", [
    (dict(chosen="x", rejected="y"), "share no prompt"),
    (dict(prompt="p"), "no 'chosen'"),
    (dict(prompt="p", chosen="a"), "no 'rejected'"),
    (dict(prompt="p", chosen="a", rejected=[GOOD]), "both"),
    (dict(prompt="p", chosen=3, rejected=4), "'chosen' is '3'"),
    (dict(prompt=[{"role": "user"}, {"content": "x"}], chosen="a", rejected="b"), "needs a role"),
])
def test_comparisons_that_are_wrong(columns, what):
    with pytest.raises(UserError, match=what):
        comparison(example(**columns))


@pytest.mark.parametrize("columns, what", [
    (dict(prompt="p", chosen="a", rejected="a"), "identical"),
    (dict(chosen=[USER, GOOD], rejected=[USER, GOOD, USER]), "no assistant turn"),
    (dict(prompt=[], chosen="a", rejected="b"), "empty"),
])
def test_comparisons_that_cannot_teach(columns, what):
    with pytest.raises(Skip, match=what):
        comparison(example(**columns))


def test_messages_in_every_form():
    expected = [message("user", "u"), message("assistant", "g")]
    share_gpt = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "g"}]
    parts = [message("user", [{"type": "text", "text": "u"}]), message("assistant", "g", name=None)]
    for value in (expected, share_gpt, parts, json.dumps(expected), tuple(expected)):
        assert messages_of(value, "messages") == expected
    assert messages_of(expected[0], "prompt") == expected[:1]
    for text in ("[1] is a footnote", '[{"name": "a text that is JSON"}]', "[{'role': 'user'}]"):
        assert messages_of(text, "completion") == text
    image = [message("user", [{"type": "image"}])]
    with pytest.raises(UserError, match="only texts"):
        messages_of(image, "prompt")


def test_every_file_type_and_directories(tmp_path):
    import datasets
    rows = [{"prompt": f"{i}", "completion": f"c, {i}\n\"é\""} for i in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "disk")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    (tmp_path / "folder" / "test.jsonl").write_text(json.dumps(rows[0]))
    for name in ("a.jsonl", "lines.json", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "disk",
                 "folder"):
        found = load_rows(str(tmp_path / name))
        assert found == rows, name
        assert found[2].where.startswith(f"--dataset {tmp_path / name}"), name
        assert found[2].where.endswith(", row 3"), name
    assert load_rows(str(tmp_path / "folder"), "test", "--eval-dataset") == rows[:1]


def test_splits_and_parts_of_them(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(10)]
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory = str(tmp_path)
    assert load_rows(directory, "train") == rows + rows
    assert load_rows(directory, "test[:2]") == rows[:2]
    assert load_rows(directory, "test[-3:]") == rows[-3:]
    assert load_rows(directory, "test[20%:50%]") == rows[2:5]
    only = str(tmp_path / "test.jsonl")
    assert load_rows(only, "train") == load_rows(only, "test") == rows  # a file is all splits
    for name, split, what in ((directory, "validation", "choose one of test, train"),
                              (directory, "train[:x]", "no split"),
                              (directory, "test[5:5]", "no rows"),
                              (str(tmp_path / "none.jsonl"), "train", "no such file")):
        with pytest.raises(UserError, match=what) as error:
            load_rows(name, split, "--eval-dataset")
        assert str(error.value).startswith(f"--eval-dataset {name}")


def test_a_row_is_named_by_its_line(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "margin": null}\n\n{"prompt": "b"}\n')
    first, second = load_rows(str(tmp_path / "d.jsonl"))
    assert (first, second) == ({"prompt": "a"}, {"prompt": "b"})
    assert second.where.endswith("d.jsonl, row 3")


def test_rows_too_long_are_skipped_or_truncated_and_counted(capsys):
    def encode(row):
        return [Row([1] * row["n"] + [2] * 3, [0] * row["n"] + [1] * 3)]

    limits = Limits(max_length=7, vocabulary=10)
    kept = encode_examples([example(n=3), example(n=9), example(n=5)], encode, limits)
    lengths = [(row["n"], len(ids), sum(mask)) for row, [(ids, mask)] in kept]
    assert lengths == [(3, 6, 3), (5, 7, 2)]
    output = capsys.readouterr().out
    assert "1 rows skipped" in output and "--max-length" in output and "row 7" in output
    assert "1 rows are truncated at 7 tokens" in output
    with pytest.raises(UserError, match="no row is left to learn from: 1 rows skipped"):
        encode_examples([example(n=9)], encode, limits)
    with pytest.raises(UserError, match="row 7: token 2 is none of the model's 2"):
        encode_examples([example(n=3)], encode, Limits(7, 2))
    prompts = encode_examples([example(n=3), example(n=4)],
                              lambda row: [Row([1] * row["n"], [0] * row["n"])], limits, room=4)
    assert [len(ids) for _, [(ids, _)] in prompts] == [3]  # 4 + 4 tokens are too many


def test_batches_are_a_function_of_the_seed():
    plan = batches(10, 4, 2.0, None, seed=3)
    assert plan == batches(10, 4, 2.0, None, seed=3) != batches(10, 4, 2.0, None, seed=4)
    order = sum(plan, [])
    assert len(plan) == 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert len(batches(10, 4, 1.0, 7, seed=0)) == 7


def test_no_prompt_is_on_both_sides_of_the_held_out_tenth():
    encoded = [(Example(prompt=f"p{i // 3}"), i) for i in range(150)]  # three rows per prompt
    train, held_out = hold_out(encoded, seed=0)
    assert len(held_out) == 15 and train + held_out != encoded
    assert sorted(i for _, i in train + held_out) == list(range(150))
    assert not {row["prompt"] for row, _ in train} & {row["prompt"] for row, _ in held_out}
    with pytest.raises(UserError, match="--eval-dataset"):
        hold_out(encoded[:3], seed=0)


# --- the embedded world ---


def test_the_embedded_world_is_what_its_readme_says():
    from assets.rewards import correct_sum, sentiment
    superb = " The plot is very superb. I hated the cast. It is superb."
    assert sentiment(None, [superb]) == [1.5 * 1.5 - 1.5]
    assert sentiment(None, [" not bad and rather dull.", ""]) == [0.5 - 0.5, 0.0]
    assert correct_sum(None, [" 95", " 95.", "95 "], answer=["95", "95", "95"]) == [1.0, 0.0, 1.0]
    data = ROOT / "assets" / "data"
    rows = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in data.glob("*.jsonl")}
    assert len(rows["comparisons"]) == 4000 and len(rows["comparisons_heldout"]) == 1000
    for name in ("demonstrations", "comparisons", "rankings", "sum_prompts"):
        prompts, held_out = ({row["prompt"] for row in rows[name + part]}
                             for part in ("", "_heldout"))
        assert not prompts & held_out
    sizes = [path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file()]
    assert sum(sizes) < 10e6
    chosen, rejected = (sentiment(None, [row[side] for row in rows["comparisons"]])
                        for side in ("chosen", "rejected"))
    better = sum(a > b for a, b in zip(chosen, rejected))
    assert 0.65 < better / 4000 < 0.85  # noisy, not random


def test_the_frontier_has_the_slope_that_the_optimum_must_have():
    """Along pi* the last nat of KL buys beta of reward: d reward / d KL = beta."""
    points = json.loads((ROOT / "assets" / "frontier.json").read_text())["points"]
    for a, b in zip(points[::3], points[3::3]):
        slope = (b["reward"] - a["reward"]) / (b["kl"] - a["kl"])
        assert 0.9 * b["beta"] < slope < 1.1 * a["beta"]


def test_the_optimum_is_read_between_the_points_of_the_frontier():
    table = json.loads((ROOT / "assets" / "frontier.json").read_text())
    points = table["points"]
    args = SimpleNamespace(model=str(ROOT / "assets" / "tiny-sft"), reward_fn=GOLD, temperature=1.0)
    for point in points:
        gain = point["reward"] - table["reward_ref"]
        assert optimal_gain(args, point["kl"]) == pytest.approx(gain)
    low, high = points[2]["kl"], points[3]["kl"]
    assert low < high
    between = optimal_gain(args, (low + high) / 2)
    assert optimal_gain(args, low) < between < optimal_gain(args, high)
    assert optimal_gain(args, points[-1]["kl"] + 1) is None  # beyond what is known
    args.reward_fn = [GOLD]
    assert optimal_gain(args, low) is not None
    others = dict(temperature=0.7, model=str(ROOT / "assets" / "tiny-base"), reward_fn=None)
    for name, value in others.items():  # another reference, or another reward
        assert optimal_gain(SimpleNamespace(**{**vars(args), name: value}), low) is None


def test_tiny_sft_ends_its_completions():
    name = str(ROOT / "assets" / "tiny-sft")
    rows = load_rows(str(ROOT / "assets" / "data" / "review_prompts_heldout.jsonl"))[:400]
    prompts = [row["prompt"] for row in rows]
    rollout = generate(load_model(name), load_tokenizer(name), prompts, 1, 64)
    assert rollout.ended.float().mean() >= 0.99
