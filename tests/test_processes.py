"""Two gloo processes under torchrun, FSDP2 on a CPU: they compute what one process computes."""

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
from safetensors.torch import load_file

import harness
import processes
from conftest import ROOT
from processes import FLAGS, prepare

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LONG = {
    "sft": {"max_steps": 20, "save_every": 2, "eval_every": 100},
    "ppo_rlhf": {"max_steps": 4, "save_every": 1, "critic_warmup": 2, "lora_rank": 4},
}
STOPPED = {  # after their first checkpoint, by one process, and continued by two
    "sft-stopped": LONG["sft"] | {"replicas": 2},
    # only the critic has learnt: the policy's optimizer knows nothing yet
    "ppo_rlhf-stopped": LONG["ppo_rlhf"],
}


def torchrun(directory, **runs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(ROOT / "tests" / "processes.py"),
               "--directory", str(directory), "--runs", json.dumps(runs)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_close(a: dict, b: dict, but=()):
    """Numbers to 1e-5; what is measured in seconds is left out."""
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        if isinstance(a[name], float) and "per_s" not in name and name != "seconds":
            close = math.isclose(a[name], b[name], rel_tol=1e-5, abs_tol=1e-5)
            assert close, (a.get("step"), name, a[name], b[name])


def assert_equal_tensors(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)


def assert_equal_runs(one, two, but=()):
    pairs = zip(lines_of(one / "metrics.jsonl"), lines_of(two / "metrics.jsonl"), strict=True)
    for a, b in pairs:
        assert (a["step"], a["phase"]) == (b["step"], b["phase"])
        assert_close(a, b, but)
    states = [torch.load(place / "checkpoint" / "state.pt", weights_only=True)
              for place in (one, two)]
    assert_equal_tensors(*(state.get("model", {}) for state in states))  # evaluate.py trains none


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """All runs of two processes in one job, beside those of one."""
    one, two = (prepare(tmp_path_factory.mktemp(name)) for name in ("one", "two"))
    save_checkpoint = harness.Run.save_checkpoint

    def save_and_stop(*state):
        save_checkpoint(*state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.Run, "save_checkpoint", save_and_stop)
        for name, flags in STOPPED.items():
            with pytest.raises(KeyboardInterrupt):
                processes.run(name, two, **flags | {"replicas": 1})
    continued = {name: flags | {"resume": True} for name, flags in STOPPED.items()}
    process = torchrun(two, **{name: {} for name in FLAGS}, **continued)
    for name in FLAGS:
        processes.run(name, one)
    for name, flags in LONG.items():
        processes.run(f"{name}-uninterrupted", one, **flags)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return one, two


@pytest.mark.parametrize("name", FLAGS)
def test_two_processes_are_one(name, places):
    """Metrics and weights after five updates, to 1e-5; what is sampled is the same to the letter.
    An implicit reward is exactly 0 before the first update, and which of two is the larger then is
    rounding."""
    one, two = (place / name for place in places)
    assert_equal_runs(one, two, ["accuracy", "eval_accuracy"] if name.startswith("dpo") else [])
    assert_close(*(json.loads((place / "results.json").read_text()) for place in (one, two)))
    samples = [lines_of(place / "samples.jsonl") for place in (one, two)]
    for a, b in zip(*samples, strict=True):
        assert a["completion"] == b["completion"]
    files = [sorted(file.name for file in place.iterdir()) for place in (one, two)]
    assert files[0] == files[1] and "results.json" in files[0]
    if name in ("best_of_n", "evaluate"):
        return
    # tied: written once
    sizes = [(place / "model.safetensors").stat().st_size for place in (one, two)]
    assert sizes[0] == sizes[1]
    saved = [transformers.AutoModel.from_pretrained(place) for place in (one, two)]
    assert_equal_tensors(*(model.state_dict() for model in saved))
    if name.endswith("lora"):
        file = "adapter/adapter_model.safetensors"
        assert_equal_tensors(load_file(one / file), load_file(two / file))


@pytest.mark.parametrize("name", LONG)
def test_two_processes_continue_where_one_stopped(name, places):
    one, two = places
    assert_equal_runs(one / f"{name}-uninterrupted", two / f"{name}-stopped")


def test_a_killed_process_ends_the_job_and_one_process_continues(tmp_path, places):
    process = torchrun(prepare(tmp_path), sft=LONG["sft"])
    while not (tmp_path / "sft" / "checkpoint" / "state.pt").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.01)
    os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "sft" / "results.json").exists()
    processes.run("sft", tmp_path, resume=True, **LONG["sft"])
    assert_equal_runs(places[0] / "sft-uninterrupted", tmp_path / "sft")


def test_a_mistake_is_printed_once(tmp_path):
    process = torchrun(prepare(tmp_path), sft={"batch_size": 1})
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and errors.count("error: 1 rows for 2 processes") == 1
