"""sft_loss and the path that leads to it, against TRL's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from common import encode_row, load_model, load_tokenizer, pad_rows, token_logprobs
from conftest import ROOT
from sft import Args, encode_demonstration, sft_loss

GOLDEN = ROOT / "tests" / "golden"
EXPECTED = json.loads((GOLDEN / "sft.json").read_text())


@pytest.mark.parametrize("which", ["completion_only", "full_sequence"])
def test_golden_text_to_loss_to_gradient(which):
    model, tokenizer = load_model(str(GOLDEN / "policy")), load_tokenizer(str(GOLDEN / "policy"))
    args = Args(train_on_prompt=which == "full_sequence")
    rows = [encode_demonstration(row, tokenizer, [2], args)[0] for row in EXPECTED["text"]]
    input_ids, mask = pad_rows(rows)
    completion_only = which == "completion_only"
    labels = torch.tensor(EXPECTED["inputs"]["labels"] if completion_only else EXPECTED["labels_full_sequence"])
    labels[:, 0] = -100  # nothing predicts the first token
    assert torch.equal(torch.where(mask.bool(), input_ids, -100), labels)
    loss = sft_loss(token_logprobs(model, input_ids, None, mask), mask)
    loss.backward()
    assert loss.item() == pytest.approx(EXPECTED["expected"][which]["loss"], abs=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(EXPECTED["expected"][which]["grad_norm"], rel=1e-4)
    if which == "completion_only":
        gradients = load_file(GOLDEN / "grads_sft.safetensors")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_a_mean_over_masked_tokens():
    logps = torch.tensor([[9.0, -1.0, -2.0], [9.0, 9.0, -6.0]])
    assert sft_loss(logps, torch.tensor([[0, 1, 1], [0, 0, 1]])).item() == 3.0


def test_one_row_at_a_time_gives_the_same_gradient():
    """1 x 8 = 8 x 1: the mean is over the tokens of the batch, not over rows or micro-batches."""
    model = load_model(str(GOLDEN / "policy"))
    tokenizer = load_tokenizer(str(GOLDEN / "policy"))
    rows = [encode_row(tokenizer, row["prompt"], row["completion"], [2]) for row in EXPECTED["text"]]
    gradients = []
    for size in (len(rows), 1):
        model.zero_grad()
        tokens = sum(sum(mask) for _, mask in rows)
        for start in range(0, len(rows), size):
            input_ids, mask = pad_rows(rows[start:start + size])
            (sft_loss(token_logprobs(model, input_ids, None, mask), mask) * (mask.sum() / tokens)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
