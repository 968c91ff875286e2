"""What was trained is what is saved: in fp32, whatever the model came in; adapters merged, and in PEFT's format."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import common
import harness
from common import (Row, adapters_off, encode_row, load_model, load_tokenizer, prepare_for_training, save_model,
                    sequence_logprobs, token_logprobs)
from conftest import ROOT
from test_runs import metrics_of, run

TINY = ROOT / "assets" / "tiny-sft"
DATA = ROOT / "assets" / "data" / "demonstrations.jsonl"
ROWS = [Row(list(range(10, 10 + n)), [0] + [1] * (n - 1)) for n in (140, 30, 5)]


def base(directory, dtype, tied):
    """tiny-sft in another dtype, embeddings and head tied or apart."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.to(dtype).save_pretrained(directory)
    load_tokenizer(str(TINY)).save_pretrained(directory)
    return str(directory)


def flags(**more):
    return SimpleNamespace(**({"lora_rank": 0, "lora_alpha": None, "gradient_checkpointing": False, "replicas": 1,
                               "device": "cpu"} | more))


def updates(model, number=5, learning_rate=1e-6):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for _ in range(number):
        input_ids, mask = common.pad_rows(ROWS)
        (-token_logprobs(model, input_ids, mask).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_small_updates_of_any_model_are_saved(dtype, tied, tmp_path):
    name = base(tmp_path / "base", dtype, tied)
    model, tokenizer = load_model(name), load_tokenizer(name)
    before = sequence_logprobs(model, ROWS)
    updates(model)
    trained = sequence_logprobs(model, ROWS)
    save_model(model, tokenizer, tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    assert (trained - before).abs().max() > 1e-3  # it has moved, and what is saved with it
    torch.testing.assert_close(sequence_logprobs(loaded, ROWS), trained, rtol=0, atol=1e-6)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(x.dtype == torch.float32 for x in saved.values()) and ("lm_head.weight" in saved) == (not tied)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


def test_bfloat16_is_a_choice_that_says_what_it_costs(tmp_path, capsys):
    name = base(tmp_path / "base", torch.bfloat16, True)
    model, tokenizer = load_model(name), load_tokenizer(name)
    updates(model)
    save_model(model, tokenizer, tmp_path / "saved", "bfloat16", name)
    lost = float(capsys.readouterr().out.split("bfloat16: ")[1].split("%")[0])
    assert lost > 90  # of the updates of 5e-6, by rounding to 1/256 of a weight
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.bfloat16


def test_a_run_ends_with_what_it_trained(tmp_path):
    """A bf16 base and a learning rate of 1e-6: the evaluation of the files is that of the checkpoint's weights."""
    name = base(tmp_path / "base", torch.bfloat16, True)
    common_flags = ["--model", name, "--dataset", DATA, "--split", "train[:40]", "--max-steps", 4, "--batch-size", 4,
                    "--learning-rate", 1e-6, "--max-new-tokens", 4, "--eval-prompts", 8]
    status, _, errors = run("sft", *common_flags, "--output-dir", tmp_path / "run")
    assert status == 0, errors
    checkpoint = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["model"]
    saved = load_file(tmp_path / "run" / "model.safetensors")
    start = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(checkpoint[key], x) for key, x in saved.items())
    moved = torch.cat([(saved[key] != start[key].float()).flatten() for key in saved])
    assert moved.float().mean() > 0.9
    evaluations = [row["eval_loss"] for row in metrics_of(tmp_path / "run") if row["phase"] == "eval"]
    assert evaluations[0] != evaluations[-1]
    status, output, _ = run("sft", *common_flags, "--output-dir", tmp_path / "half", "--save-dtype", "bfloat16")
    assert status == 0 and "of the updates are lost" in output
    rounded = [row["eval_loss"] for row in metrics_of(tmp_path / "half") if row["phase"] == "eval"]
    assert rounded[-1] != evaluations[-1]  # what is evaluated is what was saved


# --- LoRA ---


def with_adapters(name=str(TINY), kind=transformers.AutoModelForCausalLM, **more):
    model = prepare_for_training(load_model(name, kind=kind), flags(lora_rank=4, **more))
    return model


def test_adapters_start_as_the_base_and_are_all_that_is_trained():
    plain, model = load_model(str(TINY)), with_adapters(lora_alpha=8.0)
    layers = [m for m in plain.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(common.adapters_of(model)) == len(layers) == 4 * 7
    assert torch.equal(sequence_logprobs(model, ROWS), sequence_logprobs(plain, ROWS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "lora_" in n}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    updates(model, 3, 1e-3)
    assert all(torch.equal(before[n], p) != (n in trained) for n, p in model.named_parameters())
    assert (sequence_logprobs(model, ROWS) - sequence_logprobs(plain, ROWS)).abs().max() > 0.1
    with adapters_off(model):  # bit for bit
        assert torch.equal(sequence_logprobs(model, ROWS), sequence_logprobs(plain, ROWS))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_adapted(tied, tmp_path):
    name = base(tmp_path / "base", torch.bfloat16, tied)
    model = with_adapters(name, lora_alpha=8.0)
    updates(model, 3, 1e-3)
    adapted = sequence_logprobs(model, ROWS)
    save_model(model, load_tokenizer(name), tmp_path / "saved", "float32", name)
    torch.testing.assert_close(sequence_logprobs(load_model(str(tmp_path / "saved")), ROWS), adapted, rtol=0, atol=1e-4)
    assert torch.equal(sequence_logprobs(model, ROWS), adapted)  # saving changes nothing


def test_the_adapter_is_in_peft_s_format(tmp_path):
    """Names, shapes and y = W x + alpha / r B A x as PEFT documents them, by hand; benchmarks/peft_check.py loads it."""
    model = with_adapters(lora_alpha=8.0)
    updates(model, 3, 1e-3)
    save_model(model, load_tokenizer(str(TINY)), tmp_path, "float32", TINY)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8.0
    assert set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    start, merged = load_file(TINY / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    layer = "model.layers.2.mlp.down_proj"
    A, B = (weights[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{layer}.weight"], start[f"{layer}.weight"].float() + 8 / 4 * B @ A)


def test_gradient_checkpointing_and_packing_change_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_adapters(gradient_checkpointing=checkpointing)
        assert common.uses_packing(model)
        input_ids, mask = common.pad_rows(ROWS)
        torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
        token_logprobs(model, input_ids, mask).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].norm() > 1
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_model_without_linear_layers_cannot_have_adapters():
    from tiny import model_of
    with pytest.raises(common.UserError, match="--lora-rank"):
        prepare_for_training(model_of("gpt2"), flags(lora_rank=2))


@pytest.mark.parametrize("script, more", [
    ("dpo", []), ("grpo", ["--beta", 0.1, "--samples-per-prompt", 2]), ("ppo_rlhf", ["--critic-warmup", 0]),
    ("sft", []), ("reward_model", [])])
def test_every_training_script_takes_adapters(script, more, tmp_path):
    """Step 0 is exactly the base, the adapters learn, and --resume continues with them."""
    quick = ["--max-steps", 2, "--batch-size", 4, "--save-every", 1, "--eval-prompts", 4, "--lora-rank", 4,
             "--learning-rate", 1e-3, *more]
    quick += ["--split", "train[:40]"] if script == "reward_model" else ["--max-new-tokens", 4]
    status, _, errors = run(script, *quick, "--output-dir", tmp_path)
    assert status == 0, errors
    rows = metrics_of(tmp_path)
    if script == "dpo":
        assert rows[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if script in ("ppo_rlhf", "grpo"):
        assert all(row["ratio_first"] == 1.0 for row in rows if row["phase"] == "train")
    if script not in ("sft", "reward_model"):
        assert rows[0]["kl"] == 0 and rows[-1]["kl"] != 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert run(script, *quick, "--output-dir", tmp_path, "--resume")[0] == 0
