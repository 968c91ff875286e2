"""Peak memory of full training against LoRA, per script, on a CPU.

    python benchmarks/lora_memory.py                                # from the Hub
    python benchmarks/lora_memory.py --model DIRECTORY --rank 16

Each run is two updates of a script, in a process of its own, whose peak resident memory the system
reports: two batches of 4 comparisons (demonstrations) of about 200 tokens, or of 4 prompts with 4
completions (PPO: 16 prompts) of at most 32 tokens. Evaluations are of two prompts. The peak covers
all of a run, also the end of it, where the saved model is read back. Writes
benchmarks/results/lora_memory.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RULE = f"{ROOT / 'experiments' / 'one_sentence.py'}:one_sentence"


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id or directory of a chat model"""
    rank: int = 16
    """rank of the adapters"""
    scripts: tuple[str, ...] = ("sft", "reward_model", "dpo", "grpo", "ppo_rlhf")
    """names of the scripts"""


def write_rows(path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(50))
    rows = [{"prompt": [{"role": "user", "content": f"{i}: {words}"}],
             "completion": [{"role": "assistant", "content": f"{words} {i}"}],
             "chosen": [{"role": "assistant", "content": f"{words} {i}"}],
             "rejected": [{"role": "assistant", "content": f"{i} {words}"}]} for i in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def flags_of(script: str) -> list:
    if script in ("sft", "reward_model", "dpo"):
        new = [] if script == "reward_model" else ["--max-new-tokens", 8]
        return ["--batch-size", 4, *new]
    flags = ["--reward-fn", RULE, "--max-new-tokens", 32]
    if script == "grpo":
        return [*flags, "--batch-size", 4, "--samples-per-prompt", 4, "--beta", 0.04,
                "--eval-samples", 1]
    return [*flags, "--batch-size", 16, "--critic-warmup", 0]


def peak_gb(script: str, args: Args, directory: Path, rank: int) -> float:
    command = [sys.executable, ROOT / f"{script}.py", "--model", args.model, "--device", "cpu",
               "--dataset", directory / "rows.jsonl", "--max-steps", 2, "--eval-prompts", 2,
               "--lora-rank", rank, *flags_of(script), "--output-dir", directory / "run"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{script}.py ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024 / 1e9


def main(args: Args) -> None:
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_rows(directory / "rows.jsonl")
        for script in args.scripts:
            full, lora = (peak_gb(script, args, directory, rank) for rank in (0, args.rank))
            results.append({"script": script, "full_gb": full, "lora_gb": lora})
            print(f"{script:13} all weights {full:.2f} GB, rank {args.rank} {lora:.2f} GB",
                  flush=True)
    saved = {"model": args.model, "rank": args.rank, "peaks": results}
    path = ROOT / "benchmarks" / "results" / "lora_memory.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
