"""The scripts as their users run them: run directory, resume after kill -9, and every mistake in one line."""

import contextlib
import importlib
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
from conftest import ROOT

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUICK = {
    "sft": ["--max-steps", "6", "--batch-size", "8", "--max-new-tokens", "8", "--eval-every", "2", "--save-every", "2"],
    "dpo": ["--max-steps", "6", "--batch-size", "8", "--max-new-tokens", "8", "--eval-every", "2", "--save-every", "2",
            "--eval-prompts", "20"],
}


def start(script, *flags, cwd=ROOT, **kwargs):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def run(script, *flags):
    """-> exit status, stdout, stderr. In this process: to import transformers anew for each run would take most of the
    suite's time."""
    module, output, errors = importlib.import_module(script), io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", [f"{script}.py", *map(str, flags)]), contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(errors)):
        try:
            common.run_script(module.main, module.Args)
            status = 0
        except SystemExit as stop:
            status = stop.code
    return status, output.getvalue(), errors.getvalue()


def small_data(directory):
    """The embedded data with few held-out rows, so that a run takes seconds."""
    flags = {}
    for script, name in (("sft", "demonstrations"), ("dpo", "comparisons")):
        lines = (ROOT / "assets" / "data" / f"{name}.jsonl").read_text().splitlines()
        (directory / f"{name}.jsonl").write_text("\n".join(lines[:64]))
        (directory / f"{name}_heldout.jsonl").write_text("\n".join(lines[64:96]))
        flags[script] = ["--dataset", directory / f"{name}.jsonl",
                         "--eval-dataset", directory / f"{name}_heldout.jsonl"]
    flags["dpo"] += ["--reward-fn", ROOT / "assets" / "rewards.py:sentiment"]
    return {script: QUICK[script] + flags[script] for script in flags}


def metrics_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    flags = small_data(directory)
    for script in flags:
        status, output, errors = run(script, *flags[script], "--output-dir", directory / script)
        assert status == 0 and errors == "", errors
    return directory, flags


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_run_directory(script, finished):
    directory = finished[0] / script
    rows = metrics_of(directory)
    assert rows[0]["step"] == 0 and "loss" in rows[0] and [r["step"] for r in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert json.loads((directory / "args.json").read_text())["batch_size"] == 8
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 2, 4, 6} and all(s["completion"] is not None for s in samples)
    results = json.loads((directory / "results.json").read_text())
    assert all(isinstance(value, (int, float)) for value in results.values())
    if script == "dpo":
        assert abs(rows[0]["loss"] - math.log(2)) < 1e-6 and abs(rows[0]["kl"]) < 1e-6 and rows[0]["win_rate"] == 0.5
        assert abs(rows[1]["loss"] - math.log(2)) < 1e-6  # the first batch, before its update
        assert set(results) >= {"reward_ref", "reward_ref_sd", "reward", "reward_se", "kl", "kl_se", "win_rate",
                                "win_rate_se", "ended", "seconds"}
        assert all("reward" in s for s in samples)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = model.generate(**tokenizer("Review of The Lost King, a drama:", return_tensors="pt"), max_new_tokens=5)
    assert len(tokenizer.decode(ids[0])) > 40
    assert model.dtype == torch.bfloat16  # as tiny-sft came


def kill_at(lines, script, *flags, directory):
    """Start a run, or go on with it, and kill it once metrics.jsonl has so many lines."""
    process, metrics = start(script, *flags, "--output-dir", directory, "--resume"), directory / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= lines):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# kills: at how many lines of metrics.jsonl, before any checkpoint, after one, after the last update
@pytest.mark.parametrize("script, kills", [("dpo", [1]), ("dpo", [5]), ("dpo", [9]), ("sft", [1, 5, 9])])
def test_killed_and_resumed_equals_uninterrupted(script, kills, finished, tmp_path):
    directory, flags = finished
    for lines in kills:
        kill_at(lines, script, *flags[script], directory=tmp_path)
    status, output, errors = run(script, *flags[script], "--output-dir", tmp_path, "--resume")
    assert status == 0, errors
    assert ("resuming" in output) == (kills[-1] > 3)
    assert metrics_of(tmp_path) == metrics_of(directory / script)
    assert (tmp_path / "samples.jsonl").read_bytes() == (directory / script / "samples.jsonl").read_bytes()
    before, after = (load_file(d / "model.safetensors") for d in (directory / script, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_the_embedded_defaults_can_be_resumed(script, tmp_path):
    flags = ["--output-dir", tmp_path, "--max-steps", "1", "--batch-size", "8", "--max-new-tokens", "2"]
    flags += ["--eval-prompts", "20"] if script == "dpo" else []
    for resume in ([], ["--resume"]):
        status, output, errors = run(script, *flags, *resume)
        assert status == 0 and ("resuming" in output) == bool(resume), errors


@pytest.mark.parametrize("script", ["sft", "dpo"])
def test_micro_batches_change_nothing(script, finished, tmp_path):
    directory, flags = finished
    status, _, errors = run(script, *flags[script], "--output-dir", tmp_path, "--micro-batch-size", 1)
    assert status == 0, errors
    for before, after in zip(metrics_of(directory / script), metrics_of(tmp_path)):
        assert before["loss"] == pytest.approx(after["loss"], abs=2e-4) if "loss" in before else True


def test_a_copied_script_runs_anywhere(finished, tmp_path):
    """dpo.py and common.py in an empty folder, with --model and --dataset; a conversation needs --chat-template."""
    directory, _ = finished
    for name in ("dpo.py", "common.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    flags = ["--model", ROOT / "assets" / "tiny-sft", "--max-steps", "2", "--batch-size", "4", "--max-new-tokens", "8"]
    data = tmp_path / "data.jsonl"
    user = {"role": "user", "content": "Hi"}
    good, bad = ({"role": "assistant", "content": content} for content in (" good", " bad"))
    data.write_text("\n".join(json.dumps({"chosen": [user, good], "rejected": [user, bad]}) for _ in range(20)))
    command = [sys.executable, "dpo.py", *map(str, flags), "--dataset", "data.jsonl", "--eval-prompts", "5"]
    kwargs = dict(cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True)
    result = subprocess.run(command, **kwargs)
    assert result.returncode == 2 and "--chat-template" in result.stderr
    template = ("{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    (tmp_path / "chat.jinja").write_text(template)
    result = subprocess.run([*command, "--chat-template", "chat.jinja"], **kwargs)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "dpo").chat_template is not None


# ------------------------------------------------------------------------------------------------------------- mistakes

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROW = {"prompt": "Review of The Lost King, a drama:", "chosen": " The plot is good.", "rejected": " The plot is bad."}
REWARD = "def reward(prompts, completions, **columns):\n    "
MISTAKES = {
    # name: (script, flags, files, what the line must name)
    "an unknown flag": ("dpo", ["--bta", "1"], {}, "--bta"),
    "a word for a number": ("dpo", ["--beta", "strong"], {}, "strong"),
    "an unknown choice": ("dpo", ["--loss-type", "hinge"], {}, "hinge"),
    "beta 0": ("dpo", ["--beta", "0"], {}, "--beta"),
    "a negative learning rate": ("sft", ["--learning-rate", "-1"], {}, "--learning-rate"),
    "a learning rate that is not a number": ("sft", ["--learning-rate", "nan"], {}, "--learning-rate"),
    "batch size 0": ("dpo", ["--batch-size", "0"], {}, "--batch-size"),
    "micro-batch size 0": ("sft", ["--micro-batch-size", "0"], {}, "--micro-batch-size"),
    "temperature 0": ("dpo", ["--temperature", "0"], {}, "--temperature"),
    "no epoch": ("sft", ["--epochs", "0"], {}, "--epochs"),
    "no step": ("sft", ["--max-steps", "-3"], {}, "--max-steps"),
    "no evaluation": ("dpo", ["--eval-every", "0"], {}, "--eval-every"),
    "no held-out prompt": ("dpo", ["--eval-prompts", "0"], {}, "--eval-prompts"),
    "no checkpoint": ("sft", ["--save-every", "0"], {}, "--save-every"),
    "no gradient": ("sft", ["--max-grad-norm", "0"], {}, "--max-grad-norm"),
    "no length": ("sft", ["--max-length", "0"], {}, "--max-length"),
    "no new token": ("dpo", ["--max-new-tokens", "0"], {}, "--max-new-tokens"),
    "a seed that is no number": ("dpo", ["--seed", "lucky"], {}, "lucky"),
    "an unknown dtype": ("sft", ["--dtype", "int8"], {}, "int8"),
    "every label flipped": ("dpo", ["--label-smoothing", "0.5"], {}, "--label-smoothing"),
    "a missing model": ("dpo", ["--model", "nobody/nothing"], {}, "nobody/nothing"),
    "a directory that is no model": ("dpo", ["--model", "."], {}, "config.json"),
    "pickled weights": ("dpo", ["--model", "pickled"], {"pickled": "pickled"}, "safetensors"),
    "a tokenizer without EOS": ("dpo", ["--model", "no_eos"], {"no_eos": "no_eos"}, "EOS"),
    "a missing data file": ("dpo", ["--dataset", "none.jsonl"], {}, "none.jsonl"),
    "a data set that is nowhere": ("sft", ["--dataset", "nobody/nothing"], {}, "nobody/nothing"),
    "a missing split": ("dpo", ["--dataset", "d.jsonl", "--split", "train[:x]"], {"d.jsonl": [ROW]}, "train[:x]"),
    "an empty file": ("dpo", ["--dataset", "d.jsonl"], {"d.jsonl": ""}, "d.jsonl"),
    "broken JSON": ("dpo", ["--dataset", "d.jsonl"], {"d.jsonl": json.dumps(ROW) + "\n{'prompt'\n"}, "line 2"),
    "a single row": ("dpo", ["--dataset", "d.jsonl"], {"d.jsonl": [ROW]}, "--eval-dataset"),
    "a missing column": ("dpo", ["--dataset", "d.jsonl"], {"d.jsonl": [{"prompt": "a", "good": "b"}] * 2}, "chosen"),
    "demonstrations for comparisons": ("dpo", ["--dataset", ROOT / "assets" / "data" / "demonstrations.jsonl"], {},
                                       "chosen"),
    "comparisons for demonstrations": ("sft", ["--dataset", ROOT / "assets" / "data" / "comparisons.jsonl"], {},
                                       "completion"),
    "an empty completion": ("dpo", ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                            {"d.jsonl": [ROW, {**ROW, "chosen": " "}]}, "row 2"),
    "no shared prompt": ("dpo", ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                         {"d.jsonl": [{"chosen": "x", "rejected": "y"}]}, "row 1"),
    "messages without a template": ("sft", ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                                    {"d.jsonl": [{"messages": TALK}]}, "--chat-template"),
    "messages without an answer": ("sft", ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                                   {"d.jsonl": [{"messages": TALK[:1]}]}, "no assistant turn"),
    "a missing template": ("dpo", ["--chat-template", "none.jinja"], {}, "none.jinja"),
    "a prompt longer than the window": ("dpo", ["--dataset", "d.jsonl", "--eval-dataset", "d.jsonl"],
                                        {"d.jsonl": [{**ROW, "prompt": "long " * 300}]}, "row 1"),
    "a length beyond the window": ("dpo", ["--max-length", "1000"], {}, "256"),
    "no room for samples": ("dpo", ["--max-new-tokens", "250"], {}, "--max-new-tokens"),
    "no reward file": ("dpo", ["--reward-fn", "none.py:reward"], {}, "none.py"),
    "no reward function": ("dpo", ["--reward-fn", "r.py:rewards"], {"r.py": REWARD + "return [0.0] * len(prompts)"},
                           "rewards"),
    "a reward function that raises": ("dpo", ["--reward-fn", "r.py:reward"], {"r.py": REWARD + "return [1 / 0]"},
                                      "ZeroDivision"),
    "too few rewards": ("dpo", ["--reward-fn", "r.py:reward"], {"r.py": REWARD + "return [0.0]"}, "1 rewards for"),
    "a reward that is not a number": ("dpo", ["--reward-fn", "r.py:reward"],
                                      {"r.py": REWARD + "return [float('nan')] * len(prompts)"}, "nan"),
    "two rewards": ("dpo", ["--reward-fn", "r.py:reward", "--reward-model", "m"], {}, "--reward-model"),
    "a missing reward model": ("dpo", ["--reward-model", "nobody/judge"], {}, "nobody/judge"),
    "a missing device": ("dpo", ["--device", "cuda:7"], {}, "cuda:7"),
    "a directory that cannot be written": ("dpo", ["--output-dir", "/proc/runs"], {}, "/proc/runs"),
    "a file for a directory": ("dpo", ["--output-dir", "file/runs"], {"file": "x"}, "file/runs"),
    "a diverging learning rate": ("sft", ["--learning-rate", "1e30", "--save-every", "1"], {}, "--learning-rate"),
    "other flags on resuming": ("dpo", ["--resume", "--beta", "0.3"], {"runs/dpo": "finished"}, "--beta"),
}


@pytest.fixture(scope="module")
def in_process():
    """The scripts, imported once: starting Python 40 times would take minutes."""
    import dpo
    import sft
    return {"dpo": dpo, "sft": sft}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_status_2_and_one_line(name, finished, in_process, tmp_path, monkeypatch, capsys):
    from common import run_script
    script, flags, files, what = MISTAKES[name]
    for file, content in files.items():
        path = tmp_path / file
        if content == "finished":
            path.mkdir(parents=True)
            (path / "checkpoint").mkdir()
            state = (finished[0] / "dpo" / "checkpoint" / "state.pt").read_bytes()
            (path / "checkpoint" / "state.pt").write_bytes(state)
            (path / "args.json").write_text((finished[0] / "dpo" / "args.json").read_text())
        elif content in ("pickled", "no_eos"):
            model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "tiny-sft")
            tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny-sft")
            tokenizer.eos_token = None if content == "no_eos" else tokenizer.eos_token
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            if content == "pickled":
                torch.save(model.state_dict(), path / "pytorch_model.bin")
                (path / "model.safetensors").unlink()
        else:
            path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    monkeypatch.chdir(tmp_path)
    quick = QUICK[script]
    kept = [x for pair in zip(quick[::2], quick[1::2]) if pair[0] not in flags for x in pair]
    defaults = [] if "--dataset" in flags or "--max-length" in flags else finished[1][script][len(QUICK[script]):]
    if any(flag in flags for flag in ("--reward-fn", "--reward-model")):
        defaults = defaults[:4]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, [*kept, *defaults, *flags])])
    with pytest.raises(SystemExit) as stop:
        run_script(in_process[script].main, in_process[script].Args)
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert errors.startswith(f"{script}.py: error: ") and errors.count("\n") == 1 and what in errors, errors
    assert "Traceback" not in errors and len(errors) < 500


def test_a_full_disk(finished, tmp_path):
    """Writes beyond 2 MB fail, as on a full disk: the checkpoint does not fit. What was logged stays."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    process = start("sft", *finished[1]["sft"], "--output-dir", tmp_path, preexec_fn=limit)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and errors.count("\n") == 1 and "free the space" in errors, errors
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 3


def test_the_last_good_checkpoint_is_named(finished, tmp_path):
    flags = ["--output-dir", tmp_path, "--learning-rate", "1e30", "--save-every", "1"]
    status, _, errors = run("sft", *finished[1]["sft"], *flags)
    assert status == 2 and "checkpoint" in errors and "update" in errors and "rows" in errors, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_evaluated_is_what_was_saved(dtype, tmp_path):
    """Rounded to the dtype that the model came in, but for the rotary frequencies, which no file holds."""
    from common import load_model, load_tokenizer, save_model, sequence_logprobs
    source, target = tmp_path / "source", tmp_path / "target"
    transformers.AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "tiny-sft", dtype=dtype).save_pretrained(source)
    tokenizer = load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    model = load_model(str(source))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    rows = [(list(range(10, 150)), [0] + [1] * 139)]
    save_model(model, tokenizer, target)
    loaded = load_model(str(target))
    assert loaded.saved_dtype == dtype and loaded.dtype == model.dtype == torch.float32
    assert torch.equal(sequence_logprobs(model, rows), sequence_logprobs(loaded, rows))
    assert "lm_head.weight" not in load_file(target / "model.safetensors")  # tied, as it was
