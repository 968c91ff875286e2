"""The scripts as their users run them: run directory, resume after kill -9, and every mistake in
one line."""

import contextlib
import fcntl
import importlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

import harness
from conftest import ROOT

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
ASSETS = ROOT / "assets"
EVERY_2 = ["--max-steps", "6", "--batch-size", "8", "--max-new-tokens", "8", "--eval-every", "2",
           "--save-every", "2"]


def run(script, *flags):
    """-> exit status, stdout, stderr. In this process: to import transformers anew for each run
    would take most of the suite's time."""
    module, output, errors = importlib.import_module(script), io.StringIO(), io.StringIO()
    command = [f"{script}.py", *map(str, flags)]
    with (mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(errors)):
        try:
            harness.run_script(module.main, module.Args)
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, output.getvalue(), errors.getvalue()


def fork(script, *flags, errors=os.devnull, largest_file=None) -> int:
    """The same in a copy of this process, which can be killed -> its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # makes the pool anew, before several threads race to do so
        tqdm.set_lock(threading.RLock())  # its own: who is killed holding ours would stop us
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        status, _, text = run(script, *flags)
        with open(errors, "w") as file:
            file.write(text)
    finally:
        os._exit(status)


def kill_at(lines, script, *flags, directory):
    """Start a run, or resume it, and kill it once metrics.jsonl has so many lines."""
    resume = ["--resume"] if (directory / "checkpoint" / "state.pt").exists() else []
    metrics, written, began = directory / "metrics.jsonl", 0, time.monotonic()
    child = fork(script, *flags, "--output-dir", directory, *resume, errors=directory / "errors")
    while written < lines and time.monotonic() < began + 120:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
        assert not ended, (directory / "errors").read_text()
        written = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert written >= lines and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def small_data(directory):
    """Flags of sft.py and dpo.py for a few rows of the embedded data."""
    flags = {}
    for script, name in (("sft", "demonstrations"), ("dpo", "comparisons")):
        lines = (ASSETS / "data" / f"{name}.jsonl").read_text().splitlines()
        files = [directory / f"{name}.jsonl", directory / f"{name}_heldout.jsonl"]
        files[0].write_text("\n".join(lines[:64]))
        files[1].write_text("\n".join(lines[64:96]))
        flags[script] = ["--dataset", files[0], "--eval-dataset", files[1]]
    flags["dpo"] += ["--reward-fn", ASSETS / "rewards.py:sentiment", "--eval-prompts", "20"]
    return flags


def metrics_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("tokens_per_s", None)
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """-> the directory of a finished run of sft.py and dpo.py, and their flags"""
    directory = tmp_path_factory.mktemp("runs")
    flags = {script: EVERY_2 + data for script, data in small_data(directory).items()}
    for script in flags:
        status, _, errors = run(script, *flags[script], "--output-dir", directory / script)
        assert status == 0 and errors == "", errors
    return directory, flags


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_run_directory(script, finished):
    directory = finished[0] / script
    rows = [strict_json(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    phases = ["eval", "train", "train", "eval", "train", "train", "eval", "train", "train", "eval"]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [row["phase"] for row in rows] == phases
    for row in rows:
        measured = {"eval_loss", "ended"} if row["phase"] == "eval" else {"loss", "grad_norm"}
        assert row.keys() >= measured and None not in row.values()
    assert strict_json((directory / "args.json").read_text())["batch_size"] == 8
    samples = [strict_json(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 2, 4, 6}
    assert all(sample.keys() >= {"prompt", "completion", "ended"} for sample in samples)
    results = strict_json((directory / "results.json").read_text())
    assert all(isinstance(value, (int, float)) for value in results.values())
    if script == "dpo":
        assert abs(rows[0]["eval_loss"] - math.log(2)) < 1e-6
        assert abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
        assert abs(rows[1]["loss"] - math.log(2)) < 1e-6  # the first batch, before its update
        assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se",
                                "win_rate", "win_rate_se", "ended", "seconds"}
        assert all("reward" in sample for sample in samples)


def test_what_is_saved_loads_without_us(finished):
    directory = finished[0] / "dpo"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer("Review of The Lost King, a drama:", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5)
    assert len(tokenizer.decode(ids[0])) > 40
    assert model.dtype == torch.float32


def assert_same_run(directory, other):
    assert metrics_of(directory) == metrics_of(other)
    assert (directory / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    weights, others = (load_file(d / "model.safetensors") for d in (directory, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


# kills, at how many lines of metrics.jsonl: before any checkpoint, after one, after the last update
@pytest.mark.parametrize("script, kills", [("dpo", [1]), ("dpo", [5]), ("dpo", [9]),
                                           ("sft", [1, 5, 9])])
def test_killed_and_resumed_equals_uninterrupted(script, kills, finished, tmp_path):
    directory, flags = finished
    for lines in kills:
        kill_at(lines, script, *flags[script], directory=tmp_path)
    resume = ["--resume"] if kills[-1] > 3 else []
    status, output, errors = run(script, *flags[script], "--output-dir", tmp_path, *resume)
    assert status == 0, errors
    assert ("resuming" in output) == bool(resume)
    assert_same_run(tmp_path, directory / script)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_the_embedded_defaults_can_be_resumed(script, tmp_path):
    flags = ["--output-dir", tmp_path, "--max-steps", "1", "--batch-size", "8",
             "--max-new-tokens", "2", "--eval-prompts", "20",
             "--split", "train[:40]", "--eval-split", "test[:20]"]
    for resume in ([], ["--resume"]):
        status, output, errors = run(script, *flags, *resume)
        assert status == 0 and ("resuming" in output) == bool(resume), errors


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_micro_batches_change_nothing(script, finished, tmp_path):
    directory, flags = finished
    more = ["--output-dir", tmp_path, "--micro-batch-size", 3]
    status, _, errors = run(script, *flags[script], *more)
    assert status == 0, errors
    before, after = metrics_of(directory / script), metrics_of(tmp_path)
    for name in ("loss", "eval_loss"):
        losses, others = ([row[name] for row in rows if name in row] for rows in (before, after))
        assert len(losses) > 3 and losses == pytest.approx(others, abs=2e-4)


TEMPLATE = ("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")


def test_a_copied_script_runs_anywhere(tmp_path):
    """dpo.py, common.py and harness.py in an empty folder, with --model and --dataset."""
    for name in ("dpo.py", "common.py", "harness.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    good, bad = ({"role": "assistant", "content": content} for content in (" good", " bad"))
    pairs = []
    for i in range(20):
        user = {"role": "user", "content": f"Hi {i}"}
        pairs.append({"chosen": [user, good], "rejected": [user, bad]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    flags = ["--model", ASSETS / "tiny-sft", "--dataset", "data.jsonl", "--chat-template",
             "chat.jinja", "--max-steps", 2, "--batch-size", 4, "--max-new-tokens", 8,
             "--eval-prompts", 5]
    result = subprocess.run([sys.executable, "dpo.py", *map(str, flags)], cwd=tmp_path,
                            env=ENVIRONMENT, text=True, capture_output=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "dpo")
    assert saved.chat_template == TEMPLATE


# --- mistakes ---

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROW = {"prompt": "Review of The Lost King, a drama:", "chosen": " The plot is good.",
       "rejected": " The plot is bad."}
LONG = {**ROW, "prompt": "long " * 300}
REWARD = "def reward(prompts, completions, **columns):\n    "
OWN_DATA = ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"]
OWN_REWARD = ["--reward-fn", "r.py:reward"]
WRONG_FLAGS = [  # that tyro finds, and prints in a frame
    ("dpo", ["--bta", "1"], "--bta"),
    ("dpo", ["--beta", "strong"], "strong"),
    ("dpo", ["--seed", "lucky"], "lucky"),
    ("dpo", ["--loss-type", "kto"], "kto"),
    ("sft", ["--dtype", "int8"], "int8"),
]
WRONG_NUMBERS = [
    ("dpo", ["--beta", "0"]),
    ("dpo", ["--label-smoothing", "0.5"]),
    ("dpo", ["--batch-size", "0"]),
    ("dpo", ["--temperature", "0"]),
    ("dpo", ["--eval-every", "0"]),
    ("dpo", ["--eval-prompts", "0"]),
    ("dpo", ["--max-new-tokens", "0"]),
    ("sft", ["--learning-rate", "-1"]),
    ("sft", ["--learning-rate", "nan"]),
    ("sft", ["--micro-batch-size", "0"]),
    ("sft", ["--epochs", "0"]),
    ("sft", ["--max-steps", "-3"]),
    ("sft", ["--save-every", "0"]),
    ("sft", ["--max-grad-norm", "0"]),
    ("sft", ["--max-length", "0"]),
]
MISTAKES = {
    # name: (script, flags, files, what the line must name)
    "a missing model": ("dpo", ["--model", "nobody/nothing"], {}, "nobody/nothing"),
    "a directory that is no model": ("dpo", ["--model", "."], {}, "config.json"),
    "pickled weights": ("dpo", ["--model", "pickled"], {}, "safetensors"),
    "a tokenizer without EOS": ("dpo", ["--model", "no_eos"], {}, "EOS"),
    "a missing template": ("dpo", ["--chat-template", "none.jinja"], {}, "none.jinja"),
    "a length beyond the window": ("dpo", ["--max-length", "1000"], {}, "256"),
    "a missing device": ("dpo", ["--device", "cuda:7"], {}, "cuda:7"),
    "a missing data file": ("dpo", ["--dataset", "none.jsonl"], {}, "none.jsonl"),
    "a data set that is nowhere": ("sft", ["--dataset", "nobody/nothing"], {}, "nobody/nothing"),
    "a split that is none": (
        "dpo", [*OWN_DATA, "--split", "train[:x]"], {"d.jsonl": [ROW]}, "train[:x]"),
    "an empty file": ("dpo", OWN_DATA, {"d.jsonl": ""}, "d.jsonl"),
    "broken JSON": ("dpo", OWN_DATA, {"d.jsonl": json.dumps(ROW) + "\n{'prompt'\n"}, "line 2"),
    "a single row": ("dpo", ["--dataset", "d.jsonl"], {"d.jsonl": [ROW]}, "--eval-dataset"),
    "a missing column": ("dpo", OWN_DATA, {"d.jsonl": [{"prompt": "a", "good": "b"}]}, "chosen"),
    "demonstrations for comparisons": (
        "dpo", ["--dataset", ASSETS / "data" / "demonstrations.jsonl"], {}, "chosen"),
    "comparisons for demonstrations": (
        "sft", ["--dataset", ASSETS / "data" / "comparisons.jsonl"], {}, "completion"),
    "identical pairs alone": (
        "dpo", OWN_DATA, {"d.jsonl": [{**ROW, "rejected": ROW["chosen"]}]}, "identical"),
    "no shared prompt": (
        "dpo", OWN_DATA, {"d.jsonl": [ROW, {"chosen": "x", "rejected": "y"}]}, "row 2"),
    "messages without a template": (
        "sft", OWN_DATA, {"d.jsonl": [{"messages": TALK}]}, "--chat-template"),
    "messages without an answer": (
        "sft", OWN_DATA, {"d.jsonl": [{"messages": TALK[:1]}]}, "no assistant turn"),
    "prompts longer than the window": ("dpo", OWN_DATA, {"d.jsonl": [LONG]}, "row 1"),
    "no room for completions": ("dpo", ["--max-new-tokens", "250"], {}, "--max-new-tokens 250"),
    "no reward file": ("dpo", ["--reward-fn", "none.py:reward"], {}, "none.py"),
    "no reward function": (
        "dpo", ["--reward-fn", "r.py:rewards"], {"r.py": REWARD + "return []"}, "rewards"),
    "a reward function that raises": (
        "dpo", OWN_REWARD, {"r.py": REWARD + "return [1 / 0]"}, "ZeroDivision"),
    "too few rewards": ("dpo", OWN_REWARD, {"r.py": REWARD + "return [0.0]"}, "1 numbers for"),
    "a reward that is not a number": (
        "dpo", OWN_REWARD, {"r.py": REWARD + "return [float('nan')] * len(prompts)"}, "row 1"),
    "two rewards": (
        "dpo", [*OWN_REWARD, "--reward-model", "m"], {"r.py": REWARD}, "--reward-model"),
    "a missing reward model": ("dpo", ["--reward-model", "nobody/judge"], {}, "nobody/judge"),
    "a directory that cannot be written": ("dpo", ["--output-dir", "/proc/runs"], {}, "/proc/runs"),
    "a file for a directory": ("dpo", ["--output-dir", "file/runs"], {"file": "x"}, "file/runs"),
    "nothing to resume": ("sft", ["--resume"], {}, "--resume: runs/sft holds no checkpoint"),
}


@pytest.mark.parametrize("script, flags, what", WRONG_FLAGS)
def test_wrong_flags_end_with_status_2(script, flags, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(script, *flags)
    assert status == 2 and what in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def assert_one_line(script, status, errors, what, longest=500):
    assert status == 2
    assert errors.startswith(f"{script}.py: error: ") and errors.count("\n") == 1, errors
    assert what in errors, errors
    assert len(errors) < longest, errors


@pytest.mark.parametrize("script, flags", WRONG_NUMBERS)
def test_wrong_numbers_end_with_status_2_and_one_line(script, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(script, *flags)
    assert_one_line(script, status, errors, " ".join(flags))
    assert list(tmp_path.iterdir()) == []


def bad_model(directory, kind):
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-sft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS / "tiny-sft")
    if kind == "no_eos":
        tokenizer.eos_token = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind == "pickled":
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, tmp_path, monkeypatch):
    script, flags, files, what = MISTAKES[name]
    for file, content in files.items():
        text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        (tmp_path / file).write_text(text)
    for kind in ("pickled", "no_eos"):
        if kind in flags:
            bad_model(tmp_path / kind, kind)
    (tmp_path / "data").mkdir()
    data = [] if "--dataset" in flags else small_data(tmp_path / "data")[script]
    if {"--reward-fn", "--reward-model"} & set(flags):
        data = data[:4]
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(script, *EVERY_2, *data, *flags)
    assert_one_line(script, status, errors, what)


def test_other_flags_on_resuming_are_refused(finished):
    directory, flags = finished
    more = ["--output-dir", directory / "dpo", "--resume", "--beta", "0.3"]
    status, _, errors = run("dpo", *flags["dpo"], *more)
    assert_one_line("dpo", status, errors, "--beta 0.1, now it is 0.3")


def test_two_runs_do_not_write_into_one_directory(finished, tmp_path):
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, _, errors = run("sft", *finished[1]["sft"], "--output-dir", tmp_path)
    assert_one_line("sft", status, errors, "another run writes there")


def test_the_last_good_checkpoint_is_named(finished, tmp_path):
    flags = ["--output-dir", tmp_path, "--learning-rate", "1e30", "--save-every", "1"]
    status, _, errors = run("sft", *finished[1]["sft"], *flags)
    checkpoint = tmp_path / "checkpoint" / "state.pt"
    assert_one_line("sft", status, errors, f"checkpoint is {checkpoint}", longest=900)
    assert "update 2" in errors and "row " in errors and "lower --learning-rate" in errors


def test_a_full_disk(finished, tmp_path):
    """Writes beyond 2 MB fail, as on a full disk: the checkpoint does not fit. What was logged
    stays."""
    child = fork("sft", *finished[1]["sft"], "--output-dir", tmp_path / "run",
                 errors=tmp_path / "errors", largest_file=2_000_000)
    _, status = os.waitpid(child, 0)
    errors = (tmp_path / "errors").read_text()
    assert_one_line("sft", os.WEXITSTATUS(status), errors, "free the space")
    assert len(metrics_of(tmp_path / "run")) >= 3


def test_what_cannot_teach_is_skipped_and_counted(tmp_path):
    """Identical pairs; an empty completion is EOS alone, which is learnt."""
    rows = [ROW, {**ROW, "rejected": ROW["chosen"]}, {**ROW, "rejected": ""}, LONG]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["--dataset", tmp_path / "d.jsonl", "--eval-dataset", tmp_path / "d.jsonl"]
    flags = ["--max-steps", 1, "--batch-size", 2, "--max-new-tokens", 2]
    status, output, errors = run("dpo", *data, *flags, "--output-dir", tmp_path / "run")
    assert status == 0, errors
    assert output.startswith("1 rows skipped: chosen and rejected are identical (first: --dataset")
    assert "d.jsonl, row 2)" in output and "d.jsonl, row 4)" in output
    assert "2 comparisons, 2 held out" in output
