"""What people really have: a table of cases for each rule about files, rows, templates, weights, runs, messages,
reward functions and numbers. No case trains for longer than two updates."""

import asyncio
import contextlib
import gzip
import importlib.metadata
import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import common
import dpo
import harness
import ppo_rlhf
import sft
from common import UserError, encode_prompt, encode_row, load_model, load_tokenizer
from conftest import ROOT
from harness import Example, Limits, Skip, comparison, encode_examples, hold_out, load_rows, messages_of
from tiny import byte_level, model_of, sentencepiece

TINY = str(ROOT / "assets" / "tiny-sft")
DATA = ROOT / "assets" / "data"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def run(script, *flags):
    """-> exit status, stdout, stderr of a script in this process."""
    output, errors = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", [f"{script.__name__}.py", *map(str, flags)]),
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors)):
        try:
            harness.run_script(script.main, script.Args)
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, output.getvalue(), errors.getvalue()


# --- rule 1: local files are read as they are written ---

ROWS = [{"prompt": "a", "completion": "1.10"}, {"prompt": "b", "completion": "2024-01-02"}]
CSV = "prompt,completion\na,1.10\nb,2024-01-02\n"
FILES = {
    "jsonl": ("d.jsonl", "\n".join(map(json.dumps, ROWS)), ROWS),
    "blank lines": ("d.jsonl", "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n", ROWS),
    "a line separator inside a text": ("d.jsonl", '{"prompt": "a\u2028b"}', [{"prompt": "a\u2028b"}]),
    "upper case": ("D.JSONL", "\n".join(map(json.dumps, ROWS)), ROWS),
    "a byte-order mark": ("d.jsonl", "\ufeff" + json.dumps(ROWS[0]), ROWS[:1]),
    "gzip": ("d.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode()), ROWS[:1]),
    "json": ("d.json", json.dumps(ROWS, indent=1), ROWS),
    "json that is lines": ("d.json", "\n".join(map(json.dumps, ROWS)), ROWS),
    "csv: digits and dates stay texts": ("d.csv", CSV, ROWS),
    "csv with a byte-order mark": ("d.csv", "\ufeff" + CSV, ROWS),
    "csv: a cell of two lines": ("d.csv", 'prompt,completion\n"a\nb",007\n', [{"prompt": "a\nb", "completion": "007"}]),
    "csv.gz": ("d.CSV.GZ", gzip.compress(CSV.encode()), ROWS),
    "csv: the word null is a text": ("d.csv", "prompt,completion\nnull,NA\n", [{"prompt": "null", "completion": "NA"}]),
    "a path like a pattern": ("data [1]*/d.jsonl", json.dumps(ROWS[0]), ROWS[:1]),
    "a column that is null in some rows": ("d.jsonl", '{"a": "x", "b": null}\n{"a": "y", "b": "z"}',
                                           [{"a": "x"}, {"a": "y", "b": "z"}]),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    file, content, expected = FILES[name]
    assert load_rows(write(tmp_path / file, content)) == expected


BAD_FILES = {
    "broken JSON": ("d.jsonl", json.dumps(ROWS[0]) + "\n\n{'prompt'\n", "line 3"),
    "a row that is a list": ("d.jsonl", '{"a": 1}\n[1, 2]', "row 2"),
    "too many fields": ("d.csv", "a,b\n1,2\n1,2,3\n", "row 2"),
    "an open quote": ("d.csv", 'a,b\n1,"2\n', "quotes"),
    "not UTF-8": ("d.jsonl", '{"a": "é"}'.encode("latin-1"), "UTF-8"),
    "empty": ("d.jsonl", "", "no rows"),
    "another format": ("d.txt", "a", ".jsonl"),
    "half a gzip": ("d.jsonl.gz", gzip.compress(b'{"a": 1}' * 100)[:30], "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line(name, tmp_path):
    file, content, what = BAD_FILES[name]
    with pytest.raises(UserError, match=what):
        load_rows(write(tmp_path / file, content))


def test_no_split_is_guessed(tmp_path):
    for name in ("train", "validation"):
        write(tmp_path / "d" / f"{name}.jsonl", [{"prompt": name}] * 3)
    assert load_rows(str(tmp_path / "d"), "validation[:2]") == [{"prompt": "validation"}] * 2
    with pytest.raises(UserError, match="no split 'test': choose one of train, validation"):
        load_rows(str(tmp_path / "d"), "test", "--eval-dataset")
    assert len(load_rows(write(tmp_path / "e.jsonl", ROWS), "test")) == 2  # a file is one split
    assert [row["n"] for row in load_rows(write(tmp_path / "f.jsonl", [{"n": n} for n in range(10)]), "train[50%:-1]")
            ] == [5, 6, 7, 8]


def test_a_row_is_named_by_its_place_in_the_file(tmp_path):
    """After blank lines, a slice and a hold-out too."""
    rows = [json.dumps({"prompt": f"p{n}", "completion": "c"}) for n in range(20)]
    path = write(tmp_path / "d.jsonl", "\n\n".join(rows))
    loaded = load_rows(path, "train[5:]")
    assert [row.where for row in loaded] == [f"--dataset {path}, row {2 * n + 1}" for n in range(5, 20)]
    train, held_out = hold_out([(row, None) for row in loaded], 0)
    assert all(row.where.endswith(f"row {2 * int(row['prompt'][1:]) + 1}") for row, _ in train + held_out)


# --- rule 2: one function turns a row into a checked example ---

SYSTEM, USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("system", "s"), ("user", "u"), ("assistant", "g"), ("assistant", "b")))
MESSAGES = {
    "ShareGPT": ([{"from": "human", "value": "u"}, {"from": "gpt", "value": "g"}], [USER, GOOD]),
    "JSON text, as in a CSV": (json.dumps([USER, GOOD]), [USER, GOOD]),
    "parts of text": ([{"role": "user", "content": [{"type": "text", "text": "u"}]}], [USER]),
    "None in a message": ([{**USER, "name": None, "tool_calls": None}], [USER]),
    "None as content": ([{"role": "assistant", "content": None, "tool_calls": [1]}],
                        [{"role": "assistant", "content": "", "tool_calls": [1]}]),
    "one message": (USER, [USER]),
    "a text in brackets": ("[u] said", "[u] said"),
    "a text that looks like JSON": ("[{not json", "[{not json"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    value, expected = MESSAGES[name]
    assert messages_of(value, "messages") == expected


@pytest.mark.parametrize("value", [[{"role": "user", "content": [{"type": "image"}]}], [{"content": "u"}], 3, ["u"],
                                   [{"role": "user", "content": 3}]])
def test_what_is_no_conversation_is_refused(value):
    with pytest.raises(UserError, match="messages"):
        messages_of(value, "messages")


COMPARISONS = {
    "texts": ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b")),
    "a prompt text beside messages": ({"prompt": "u", "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
    "UltraFeedback": ({"prompt": "u", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
    "an implicit prompt": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
    "messages beside texts": ({"prompt": [USER], "chosen": "g", "rejected": "b"}, ([USER], [GOOD], [BAD])),
    "an empty completion is EOS alone": ({"prompt": "p", "chosen": "", "rejected": "b"}, ("p", "", "b")),
    "a system message that only the completions have": (
        {"prompt": "u", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, ([SYSTEM, USER], [GOOD], [BAD])),
    "a prompt that is None": ({"prompt": None, "chosen": "one two", "rejected": "one six"}, ("one", " two", " six")),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name):
    row, expected = COMPARISONS[name]
    assert comparison(Example(row)) == expected


def encode_pair(example):
    prompt, chosen, rejected = comparison(example)
    return [encode_row(byte_level(), prompt, c, [256]) for c in (chosen, rejected)]


def test_what_cannot_teach_is_skipped_counted_and_named(capsys, tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"},
            {"prompt": "p" * 30, "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "", "rejected": ""},
            {"prompt": "p", "chosen": "a" * 40, "rejected": "b"}]
    path = write(tmp_path / "d.jsonl", rows)
    kept = encode_examples(load_rows(path), encode_pair, Limits(20, 261))
    said = capsys.readouterr().out
    assert [example["chosen"][:1] for example, _ in kept] == ["a", "a"] and len(kept[1][1][0].ids) == 20
    assert f"2 rows skipped: chosen and rejected are identical (first: --dataset {path}, row 2)" in said
    assert f"1 rows skipped: the prompt leaves no room within --max-length (20 tokens) (first: --dataset {path}, row 3)" in said
    assert "1 rows are truncated at 20 tokens" in said
    with pytest.raises(UserError, match="no row is left .*identical"):
        encode_examples(load_rows(path)[1:2], encode_pair, Limits(20, 261))


def test_what_is_wrong_is_one_line_with_its_row(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}])
    with pytest.raises(UserError, match="row 2: no 'rejected' .columns: prompt, chosen."):
        encode_examples(load_rows(path), encode_pair, Limits(20, 261))


def demonstrations(tmp_path, rows, tokenizer=None, **flags):
    """What sft.py trains on -> [(decoded ids, ids under the mask)]."""
    args = sft.Args(dataset=write(tmp_path / "d.jsonl", rows), eval_dataset=write(tmp_path / "e.jsonl", rows), **flags)
    tokenizer = tokenizer or load_tokenizer(TINY)
    train, _ = sft.load_demonstrations(args, load_model(TINY), tokenizer)
    return [row for _, row in train]


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def chat_tokenizer(template=CHATML):
    tokenizer = byte_level(eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def test_sharegpt_conversations_train(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "he"}, {"from": "gpt", "value": "ab"}]}]
    tokenizer = chat_tokenizer()
    (row,) = demonstrations(tmp_path, rows, tokenizer)
    assert tokenizer.decode(row.ids) == "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\nab<|im_end|>"
    assert tokenizer.decode([i for i, m in zip(*row) if m]) == "ab<|im_end|>"


def test_a_turn_of_weight_0_has_no_loss(tmp_path):
    turns = [USER, {**GOOD, "weight": 0}, USER, BAD]
    (row,) = demonstrations(tmp_path, [{"messages": turns}], tokenizer := chat_tokenizer())
    assert tokenizer.decode([i for i, m in zip(*row) if m]) == "b<|im_end|>"


# --- rule 3: templates and special tokens ---


def completion_of(row):
    return [i for i, m in zip(*row) if m]


def test_a_text_with_bos_or_eos_gets_no_second_one():
    tokenizer = sentencepiece()
    assert encode_prompt(tokenizer, "<s>the").count(1) == 1
    row = encode_row(tokenizer, "the", " low</s>", [2])
    assert row.ids.count(2) == 1 and row.ids[-1] == 2 and completion_of(row) == completion_of(
        encode_row(tokenizer, "the", " low", [2]))


def test_add_prefix_space_adds_no_space():
    from tokenizers import pre_tokenizers
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for completion in ("he", " he", "\nhe", "", "é x"):
        row = encode_row(tokenizer, "ab", completion, [tokenizer.eos_token_id])
        assert tokenizer.decode(row.ids[:-1]) == " ab" + completion


def test_tools_reach_the_template(tmp_path):
    template = "{% if tools %}{{ 'tools:' + (tools | tojson) }}{% endif %}" + CHATML
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool])):
        (row,) = demonstrations(tmp_path, [{"messages": [USER, GOOD], "tools": tools}], t := chat_tokenizer(template))
        assert t.decode(row.ids).startswith('tools:[{"type": "function"')


def test_a_template_file_is_utf_8_in_any_locale(tmp_path):
    path = write(tmp_path / "t.jinja", "{{ 'é' }}" + CHATML)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from common import load_tokenizer;"
            "print(ascii(load_tokenizer(sys.argv[2], sys.argv[3]).chat_template[:8]))")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run([sys.executable, "-c", code, str(ROOT), TINY, path], env=environment, text=True,
                         capture_output=True)
    assert out.stdout.strip() == ascii("{{ 'é' }"), out.stderr


def test_a_reward_model_without_a_template_uses_the_policys():
    args = dpo.Args(device="cpu")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    reward = harness.reward_from_model(args, str(ROOT / "assets" / "tiny-rm"), template)
    example = Example(prompt=[{"role": "user", "content": "Review of The Lost King, a drama:"}])
    plain = harness.reward_from_model(args, str(ROOT / "assets" / "tiny-rm"))
    text = Example(prompt="Review of The Lost King, a drama:")
    torch.testing.assert_close(reward([example], [" It is superb."]), plain([text], [" It is superb."]))


# --- rule 4: weights are what the files say ---


def damaged(tmp_path, change, source=TINY):
    """A copy of a model whose weights went through change(state)."""
    path = tmp_path / "model"
    shutil.copytree(source, path)
    state = load_file(path / "model.safetensors")
    state = change(state) or state
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def with_nan(state):
    state["model.norm.weight"][3] = math.nan


WEIGHTS = {
    "a weight is missing": (lambda s: {k: v for k, v in s.items() if "layers.1.mlp.up" not in k}, "missing"),
    "a weight too many": (lambda s: {**s, "model.extra.weight": torch.zeros(2)}, "model.extra.weight"),
    "torch.compile's prefix": (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "_orig_mod."),
    "DDP's prefix": (lambda s: {f"module.{k}": v for k, v in s.items()}, "module."),
    "not a number": (with_nan, "not finite"),
    "another shape": (lambda s: {**s, "model.norm.weight": torch.ones(7)}, "model"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights_are_one_line(name, tmp_path):
    change, what = WEIGHTS[name]
    with pytest.raises(UserError, match=what):
        load_model(damaged(tmp_path, change))


def test_models_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="score"):
        harness.reward_from_model(dpo.Args(device="cpu"), TINY)  # a policy has no head of a reward model
    with pytest.raises(UserError, match="score"):
        load_model(str(ROOT / "assets" / "tiny-rm"))
    write(tmp_path / "adapter_config.json", "{}")
    with pytest.raises(UserError, match="merge it first"):
        load_model(str(tmp_path))


def test_half_precision_and_shards_are_read_exactly(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], x.float()) for name, x in model.state_dict().items())


def test_ids_beyond_the_embeddings_and_rows_beyond_a_window():
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens(["<new>"])

    def encode(example):
        return [encode_row(tokenizer, example["prompt"], example["completion"], [2])]

    example = Example(prompt="a", completion="<new>")
    example.where = "--dataset d.jsonl, row 7"
    with pytest.raises(UserError, match="row 7: token 512 .*512"):
        encode_examples([example], encode, Limits.of(sft.Args(), load_model(TINY)))
    reward = harness.reward_from_model(dpo.Args(device="cpu"), str(ROOT / "assets" / "tiny-rm"))
    with pytest.raises(UserError, match="window .*--max-new-tokens"):
        reward([Example(prompt="long " * 200)], ["x"])


# --- rule 5: a run knows what it depends on ---

QUICK = ["--max-steps", 2, "--batch-size", 2, "--max-new-tokens", 4, "--save-every", 1, "--eval-prompts", 3]


def sft_flags(tmp_path, rows=8):
    lines = (DATA / "demonstrations.jsonl").read_text().splitlines()[:rows]
    data = write(tmp_path / "data.jsonl", "\n".join(lines))
    return [*QUICK, "--dataset", data, "--eval-dataset", data, "--output-dir", tmp_path / "run"]


def one_line(result, what):
    status, _, errors = result
    assert status == 2 and errors.count("\n") == 1 and "Traceback" not in errors and what in errors, errors


def test_a_run_directory_is_one_runs_alone(tmp_path):
    flags = sft_flags(tmp_path)
    holder = harness.Run(sft.Args(output_dir=str(tmp_path / "run"), dataset="none"))
    one_line(run(sft, *flags), "another run writes there")
    holder.lock.close()
    assert run(sft, *flags)[0] == 0
    one_line(run(sft, *flags, "--model", tmp_path / "run"), "read from there")
    one_line(run(sft, *flags, "--output-dir", tmp_path), "--dataset")


def test_a_new_run_clears_the_old_ones_model(tmp_path):
    flags = sft_flags(tmp_path)
    assert run(sft, *flags)[0] == 0
    write(tmp_path / "run" / "notes.txt", "mine")
    with mock.patch.object(sft, "batch_loss", side_effect=KeyboardInterrupt):
        assert run(sft, *flags)[0] == 2
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & {"model.safetensors", "results.json", "config.json"} and "notes.txt" in left


def test_resume_refuses_what_has_changed(tmp_path):
    flags = sft_flags(tmp_path)
    one_line(run(sft, *flags, "--resume"), "holds no checkpoint")
    assert run(sft, *flags)[0] == 0
    data = tmp_path / "data.jsonl"
    text = data.read_text()
    os.utime(data, (1, 1))
    assert run(sft, *flags, "--resume")[0] == 0  # the time of a file is nothing
    data.write_text("\n".join(text.splitlines()[1:]))
    one_line(run(sft, *flags, "--resume"), "data.jsonl has changed")
    data.write_text(text)
    one_line(run(sft, *flags, "--resume", "--learning-rate", 1e-3), "--learning-rate")
    checkpoint, metrics = tmp_path / "run" / "checkpoint" / "state.pt", tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole[:100])
    one_line(run(sft, *flags, "--resume"), "metrics.jsonl is shorter")
    metrics.write_bytes(whole)
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    one_line(run(sft, *flags, "--resume"), "cannot be read")


def test_resume_refuses_other_starting_weights(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    flags = [*sft_flags(tmp_path), "--model", model]
    assert run(sft, *flags)[0] == 0
    shutil.copy(ROOT / "assets" / "tiny-base" / "model.safetensors", model)
    one_line(run(sft, *flags, "--resume"), "has changed")


# --- rule 6: one cause, one message ---

CAUSES = {
    "a full disk": (OSError(28, "No space left on device"), "free the space"),
    "a missing file": (FileNotFoundError(2, "No such file or directory", "x"), "No such file"),
    "memory of a CPU": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "memory of Python": (MemoryError(), "out of memory"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_causes(name):
    error, what = CAUSES[name]
    message = harness.explain(error)
    assert what in message and ("free the space" in message) == (name == "a full disk")
    assert ("--micro-batch-size" in message) == ("memory" in name)


def test_a_fault_of_the_program_keeps_its_traceback():
    assert harness.explain(RuntimeError("shape mismatch")) is None


NUMBERS = [(dpo, "--beta", 0), (dpo, "--beta", "nan"), (dpo, "--learning-rate", "inf"), (dpo, "--label-smoothing", 0.5),
           (dpo, "--batch-size", -1), (dpo, "--lora-rank", -1), (sft, "--epochs", 0), (sft, "--max-grad-norm", 0),
           (ppo_rlhf, "--gamma", 1.5), (ppo_rlhf, "--clip-value", -1), (ppo_rlhf, "--missing-eos-penalty", "nan")]


@pytest.mark.parametrize("script, flag, value", NUMBERS)
def test_every_number_is_checked_where_it_enters(script, flag, value):
    one_line(run(script, flag, value), f"{flag} {float(value) if isinstance(value, str) else value}")


def test_advice_only_where_the_cause_is_known(tmp_path):
    flags = sft_flags(tmp_path)
    one_line(run(sft, *flags, "--learning-rate", 1e30), "training diverged: lower --learning-rate")
    with mock.patch.object(sft, "batch_loss", return_value=math.nan):
        status, _, errors = run(sft, *flags)
    assert status == 2 and "row" in errors and "--learning-rate" not in errors


def test_a_closed_pipe_and_an_ascii_locale_end_quietly(tmp_path):
    flags = " ".join(map(str, sft_flags(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    command = f"{sys.executable} {ROOT / 'sft.py'} {flags} | head -n 1"
    result = subprocess.run(command, shell=True, env=environment, text=True, capture_output=True)
    assert result.stderr == "" and result.stdout.count("\n") == 1


# --- rules 7 and 8: the reward function ---

EXAMPLES = [Example(prompt=f"p{n}", answer=n) for n in range(4)]
TEXTS = ["a", "bb", "ccc", "dddd"]
IMPORTS = "import asyncio, os, random, time\nimport numpy, torch\n"


def reward_of(tmp_path, body, optional=False, timeout=5.0, head="def f(prompts, completions, **columns):"):
    file = write(tmp_path / f"reward_{os.urandom(4).hex()}.py", f"{IMPORTS}{head}\n    {body}\n")
    args = SimpleNamespace(reward_timeout=timeout)
    function = harness.reward_from_function(args, f"{file}:f", optional)
    return function(EXAMPLES, TEXTS, [[1], [2], [3], [4]])


LENGTHS = [1.0, 2.0, 3.0, 4.0]
REWARDS = {
    "a list": ("return [len(c) for c in completions]", {}),
    "numpy numbers": ("return numpy.array([len(c) for c in completions])", {}),
    "a tensor": ("return torch.tensor([float(len(c)) for c in completions])", {}),
    "a tuple of numpy scalars": ("return tuple(numpy.float32(len(c)) for c in completions)", {}),
    "booleans": ("return [len(c) > n for n, c in enumerate(completions, 0)]", {"values": [1.0] * 4}),
    "a column": ("return [a + 1 for a in answer]", {"head": "def f(prompts, completions, answer):"}),
    "no prompts": ("return [len(c) for c in completions]", {"head": "def f(completions, **kwargs):"}),
    "completion ids": ("return [ids[0] for ids in completion_ids]", {"head": "def f(prompts, completion_ids, **kw):"}),
    "a trainer state that is not needed": ("return [len(c) for c in completions]",
                                           {"head": "def f(prompts, completions, trainer_state, **kw):"}),
    "async": ("await asyncio.sleep(0)\n    return [len(c) for c in completions]",
              {"head": "async def f(prompts, completions, **columns):"}),
    "its inputs are copies": ("out = [len(c) for c in completions]\n    completions.clear()\n    columns.clear()\n"
                              "    return out", {}),
    "a process pool": ("from concurrent.futures import ProcessPoolExecutor\n    from multiprocessing import get_context"
                       "\n    with ProcessPoolExecutor(1, get_context('fork')) as pool:\n"
                       "        return list(pool.map(len, completions))", {}),
}


@pytest.mark.parametrize("name", REWARDS)
def test_reward_functions(name, tmp_path):
    body, more = REWARDS[name]
    expected = more.pop("values", LENGTHS) if "values" in more else LENGTHS
    head = more.get("head")
    assert reward_of(tmp_path, body, **({"head": head} if head else {})).tolist() == expected


def test_none_is_not_applicable(tmp_path):
    rewards = reward_of(tmp_path, "return [None, 1, 2, None]", optional=True)
    assert rewards.isnan().tolist() == [True, False, False, True]
    import grpo
    both = torch.stack([rewards, torch.tensor([5.0, 6.0, 7.0, 8.0])], 1)
    assert grpo.weighted_sum(both, torch.tensor([1.0, 0.5]), EXAMPLES).tolist() == [2.5, 4.0, 5.5, 4.0]
    with pytest.raises(UserError, match="None"):
        grpo.weighted_sum(both[:, :1], torch.tensor([1.0]), EXAMPLES)


MISTAKES = {
    "a dict": ("return {c: 1.0 for c in completions}", "a dict"),
    "a number": ("return 1.0", "a float"),
    "a text": ("return 'good'", "a str"),
    "None": ("return None", "NoneType"),
    "a generator": ("return (1.0 for c in completions)", "generator"),
    "too few": ("return [1.0]", "1 numbers for 4 completions"),
    "texts": ("return ['1'] * 4", "'1'"),
    "NaN": ("return [1, 2, float('nan'), 4]", "nan"),
    "infinity": ("return [1, 2, float('inf'), 4]", "inf"),
    "None in a script with one reward": ("return [1, 2, None, 4]", "None"),
    "an exception": ("raise ValueError('no judge')", "ValueError: no judge"),
    "a closed pipe of its own": ("raise BrokenPipeError('judge is gone')", "BrokenPipeError"),
    "sleep": ("time.sleep(60)", "--reward-timeout"),
    "a loop": ("while True: pass", "--reward-timeout"),
    "a timeout swallowed": ("while True:\n        try:\n            time.sleep(60)\n        except Exception: pass",
                            "--reward-timeout"),
    "every timeout swallowed, twice": ("for _ in range(2):\n        try:\n            time.sleep(60)\n"
                                       "        except BaseException: pass\n    time.sleep(60)", "--reward-timeout"),
    "an alarm cancelled": ("import signal\n    signal.alarm(0)\n    time.sleep(60)", "--reward-timeout"),
    "async that waits": ("import asyncio\n    asyncio.run(asyncio.sleep(60))", "--reward-timeout"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_reward_functions(name, tmp_path):
    body, what = MISTAKES[name]
    with pytest.raises(UserError, match=what.replace("(", ".")):
        reward_of(tmp_path, body, timeout=0.2 if "timeout" in what else 5.0)


def test_a_guest_changes_nothing(tmp_path):
    states = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state(), os.getcwd()
    reward_of(tmp_path, "random.seed(1); numpy.random.seed(1); torch.manual_seed(1)\n    os.chdir('/')\n"
                        "    torch.set_grad_enabled(False)\n    return [1.0] * 4")
    assert random.getstate() == states[0] and (numpy.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2]) and os.getcwd() == states[3] and torch.is_grad_enabled()


def test_a_reward_file_is_a_module_with_siblings(tmp_path):
    """Sibling imports, dataclasses, and `import evaluate`, which means the library and not our script."""
    write(tmp_path / "my" / "sibling.py", "BONUS = 2.0\n")
    write(tmp_path / "library" / "evaluate.py", "LIBRARY = 3.0\n")
    file = write(tmp_path / "my" / "judge.py", "from __future__ import annotations\nfrom dataclasses import dataclass\n"
                 "from sibling import BONUS\nimport evaluate\n@dataclass\nclass Score:\n    value: float\n"
                 "def f(prompts, completions):\n    return [Score(BONUS + evaluate.LIBRARY).value] * len(prompts)\n")
    script = ("import sys; sys.path.append(sys.argv[2]); import harness; from types import SimpleNamespace;"
              "f = harness.reward_from_function(SimpleNamespace(reward_timeout=9.0), sys.argv[1] + ':f');"
              "print(f([harness.Example(prompt='p')], ['c']).item())")
    result = subprocess.run([sys.executable, "-c", script, file, str(tmp_path / "library")], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.stdout.strip() == "5.0", result.stderr


# --- rule 9: numbers are numbers ---


def test_numbers():
    assert harness.mean_and_se(torch.tensor([3.0])) == (3.0, None)
    assert harness.wins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])).tolist() == [0.5, 0.0, 1.0]
    one = ppo_rlhf.whiten(torch.tensor([[5.0, 0.0]]), torch.tensor([[1, 0]]))
    assert one.tolist() == [[0.0, 0.0]]
    assert harness.without_nan({"a": [math.nan, 1.0], "b": (math.inf,), "c": "x"}) == {"a": [None, 1.0], "b": [None],
                                                                                     "c": "x"}
    assert json.loads(json.dumps(harness.without_nan(vars(ppo_rlhf.Args())), allow_nan=False))["clip_value"] is None


def test_all_rows_of_a_prompt_are_held_out_together():
    examples = [(Example(prompt=f"p{n % 20}", n=n), None) for n in range(100)]
    train, held_out = hold_out(examples, 0)
    assert len(held_out) == 10 and len(train) == 90
    assert not {e["prompt"] for e, _ in train} & {e["prompt"] for e, _ in held_out}
    with pytest.raises(UserError, match="same prompt"):
        hold_out(examples[:1], 0)


def test_conversations_that_begin_alike_are_held_out_together(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{n % 10}"}, {"role": "assistant", "content": f"a{n}"}]}
            for n in range(40)]
    args = sft.Args(dataset=write(tmp_path / "d.jsonl", rows))
    train, held_out = sft.load_demonstrations(args, load_model(TINY), chat_tokenizer())
    asked = [{example["prompt"][0]["content"] for example, _ in part} for part in (train, held_out)]
    assert len(held_out) == 4 and len(asked[1]) == 1 and not asked[0] & asked[1]


# --- rule 10: the versions tested are the versions required ---


def test_requirements_are_what_is_tested():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, version = line.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version
