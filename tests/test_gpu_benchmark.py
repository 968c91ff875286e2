"""benchmarks/gpu.py on a CPU with tiny shapes: every section that needs nothing more runs, and
FLOPs are counted right."""

import json
import sys

import pytest
from transformers import Qwen2Config

import common
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402


@pytest.fixture(autouse=True)
def autocast_of_these_tests_alone(monkeypatch):
    monkeypatch.setattr(common, "AUTOCAST", {})


def test_every_section_gives_its_rows(tmp_path):
    output = tmp_path / "gpu.json"
    gpu.main(["--smoke", "--device", "cpu", "--output", str(output),
              "--sections", "machine", "training", "decoding", "scripts", "mixed"])
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert not [row for row in rows if "error" in row]
    assert [(row["section"], row["name"]) for row in rows] == (
        [("machine", "cpu")] + [("training", "dpo tiny")] * 2 + [("training", "reward tiny")] * 2
        + [("decoding", "tiny")] * 2 + [("scripts", "files")]
        + [("scripts", name) for name in ("dpo", "grpo", "ppo_rlhf") for _ in range(2)]
        + [("mixed", "sft"), ("mixed", "grpo")])
    for row in rows:
        if row["section"] == "training":
            assert row["packed"] and row["share_of_gemm"] > 0
            assert row["mfu"] is None  # no vendor's number for a CPU
        if row["name"] == "files":
            assert row["prompt_tokens"] == gpu.SMOKE["rollout"][0]
        if row["section"] == "scripts" and row["name"] != "dpo" and row["name"] != "files":
            shares = [row[f"share_{phase}"] for phase in ("rollout", "scoring", "update")]
            assert abs(sum(shares) - 1) < 1e-9


def test_what_fails_is_a_row_and_the_others_follow(tmp_path, monkeypatch):
    def broken(*inputs):
        raise MemoryError("none left")

    monkeypatch.setattr(gpu, "machine", broken)
    gpu.main(["--smoke", "--device", "cpu", "--sections", "machine", "training",
              "--output", str(tmp_path / "gpu.json")])
    first, *others = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert first["error"] == "MemoryError: none left" and len(others) == 4
    assert all("error" not in row and row["share_of_gemm"] is None for row in others)


def test_flops_by_hand():
    """Width 4, one layer of 2 heads of 2 (1 for keys and values), inner width 3, 5 words; a prompt
    of 2 tokens and completions of 2 and 4. Weights: 16 + 8 + 8 + 16 of attention, 36 of the MLP =
    84; the head's 20. Keys that the queries meet: 2 of the prompt, 4 + 2 and 8 + 8 of the
    completions = 24."""
    config = Qwen2Config(hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=3, vocab_size=5)
    assert gpu.weights_of(config) == (84, 20)
    # each token's products; queries by keys, and weights by values
    trunk = 2 * 84 * 8 + 2 * 2 * 4 * 24

    assert gpu.forward_flops(config, 2, [2, 4], head=False) == trunk
    assert gpu.forward_flops(config, 2, [2, 4], head=True) == trunk + 2 * 20 * 6


def test_weights_are_those_of_the_model():
    model = gpu.make_model("tiny", "cpu")
    matrices = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
    assert gpu.weights_of(model.config) == (matrices, model.lm_head.weight.numel())
