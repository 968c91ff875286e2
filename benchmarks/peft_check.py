"""Does PEFT read the adapters that --lora-rank writes, and give the logits of the merged model?

    pip install peft
    python dpo.py --lora-rank 8 --output-dir runs/dpo_lora
    python benchmarks/peft_check.py --base assets/tiny-sft --run runs/dpo_lora

Prints the largest difference of logits between base + adapter (by PEFT) and the merged files.
"""

from dataclasses import dataclass

import torch
import tyro
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Args:
    base: str
    """directory or Hub id of the model that was trained"""
    run: str
    """output directory of a run with --lora-rank"""
    text: str = "Review of The Lost King, a drama:"
    """text that both models read"""


def main(args: Args) -> None:
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, f"{args.run}/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(args.run, dtype=torch.float32).eval()
    inputs = AutoTokenizer.from_pretrained(args.run)(args.text, return_tensors="pt")
    with torch.no_grad():
        difference = (adapted(**inputs).logits - merged(**inputs).logits).abs().max().item()
        with adapted.disable_adapter():
            moved = (adapted(**inputs).logits - merged(**inputs).logits).abs().max().item()
    print(f"largest difference of logits: {difference:.1e}; without the adapter: {moved:.1e}")
    assert difference < 1e-4 < moved


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
