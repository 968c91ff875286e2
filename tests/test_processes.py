"""Two gloo processes under torchrun, FSDP2 on a CPU: they compute what one process computes, and outlive each other."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import processes
from conftest import ROOT
from processes import FLAGS, prepare

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LONG = {"max_steps": 20, "save_every": 2, "eval_every": 100}


def torchrun(directory, **scripts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "tests" / "processes.py"), "--directory", str(directory), "--scripts", json.dumps(scripts)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def two_processes(directory, **scripts):
    process = torchrun(directory, **scripts)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(directory):
    return torch.load(directory / "checkpoint" / "state.pt", weights_only=True)["model"]


def assert_equal_runs(one, two, but=()):
    lines = list(zip(metrics_of(one), metrics_of(two), strict=True))
    for a, b in lines:
        assert a.keys() == b.keys()
        for name in a.keys() - set(but):
            if "per_s" not in name and not isinstance(a[name], str):
                assert math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-5), (a["step"], name, a[name], b[name])
    a, b = weights_of(one), weights_of(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    one, two = (prepare(tmp_path_factory.mktemp(name)) for name in ("one", "two"))
    process = torchrun(two, **{script: {} for script in FLAGS})
    for script in FLAGS:
        processes.run(script, one)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return one, two


@pytest.mark.parametrize("script", FLAGS)
def test_two_processes_are_one(script, places):
    """Metrics and weights after five updates, to 1e-5; what is sampled is the same to the letter. An implicit reward is
    exactly 0 before the first update, and which of two is the larger then is rounding."""
    one, two = (place / script for place in places)
    assert_equal_runs(one, two, but=["accuracy"] if script == "dpo" else [])
    a, b = (json.loads((place / "results.json").read_text()) for place in (one, two))
    assert a.keys() == b.keys() and all(math.isclose(x, b[name], rel_tol=1e-5, abs_tol=1e-5)
                                        for name, x in a.items() if isinstance(x, float) and name != "seconds")
    samples = [(place / "samples.jsonl").read_text().splitlines() for place in (one, two)]
    for a, b in zip(*samples, strict=True):
        assert json.loads(a)["completion"] == json.loads(b)["completion"]
    names = [sorted(file.name for file in place.iterdir()) for place in (one, two)]
    assert names[0] == names[1] and "results.json" in names[0]
    if script in ("best_of_n", "evaluate"):
        return
    # tied: written once
    assert (one / "model.safetensors").stat().st_size == (two / "model.safetensors").stat().st_size
    saved = [transformers.AutoModel.from_pretrained(place).state_dict() for place in (one, two)]
    for name, value in saved[0].items():  # bfloat16: the next one, where a difference of 1e-5 crosses the middle
        torch.testing.assert_close(value.float(), saved[1][name].float(), rtol=2**-7, atol=1e-5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = prepare(tmp_path_factory.mktemp("uninterrupted"))
    processes.run("sft", directory, **LONG)
    return directory


def test_a_killed_process_ends_the_job_and_one_process_goes_on(tmp_path, uninterrupted):
    process = torchrun(prepare(tmp_path), sft=LONG)
    while not (tmp_path / "sft" / "checkpoint" / "state.pt").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert sum("another process of this job ended" in line for line in errors.splitlines()) == 1
    assert not (tmp_path / "sft" / "results.json").exists()
    processes.run("sft", tmp_path, resume=True, **LONG)
    assert_equal_runs(uninterrupted / "sft", tmp_path / "sft")


def test_two_replicas_go_on_where_one_process_stopped(tmp_path, uninterrupted, monkeypatch):
    import common
    save_checkpoint = common.Run.save_checkpoint

    def save_and_stop(run, step, *state):
        save_checkpoint(run, step, *state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            processes.run("sft", prepare(tmp_path), **LONG)
    two_processes(tmp_path, sft=LONG | {"resume": True, "replicas": 2})
    assert_equal_runs(uninterrupted / "sft", tmp_path / "sft")


def test_mistakes_are_told_once(tmp_path):
    process = torchrun(prepare(tmp_path), sft={"batch_size": 1})
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("error: 1 rows for 2 processes") == 1
