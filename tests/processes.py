"""Every script, five small steps each: what test_processes.py runs in one process and in two.

    torchrun --nproc-per-node 2 tests/processes.py --directory D --runs '{"sft": {"max_steps": 5}}'
"""

import importlib
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import rank
from harness import ASSETS, GOLD, run_script

DATA, REWARD_MODEL = ASSETS / "data", str(ASSETS / "tiny-rm")
SHORT = dict(max_new_tokens=12)  # rows, completions and prompts are never a multiple of two
SAMPLING = dict(dataset="review_prompts", reward_fn=GOLD, **SHORT)
ROUNDS = dict(batch_size=5, max_steps=3, rounds=2, prompts_per_round=7, **SAMPLING)
FLAGS = {
    "sft": dict(dataset="demonstrations", batch_size=7, **SHORT),
    "dpo": dict(dataset="comparisons", batch_size=7, reward_fn=GOLD, **SHORT),
    "reward_model": dict(dataset="comparisons", batch_size=7, dropout=0.0),
    "ppo_rlhf": dict(batch_size=9, critic_warmup=1, ppo_epochs=2, value_learning_rate=1e-4,
                     reward_model=REWARD_MODEL, **SAMPLING),
    "grpo": dict(batch_size=3, micro_batch_size=3, samples_per_prompt=5, beta=0.1, eval_samples=2,
                 updates_per_rollout=2, **SAMPLING | {"reward_fn": [GOLD]}),
    "expert_iteration": dict(samples_per_prompt=3, **ROUNDS),
    "reward_conditioning": dict(samples_per_prompt=2, **ROUNDS),
    "best_of_n": dict(batch_size=3, samples_per_prompt=3, save_every=1, reward_model=REWARD_MODEL,
                      **SAMPLING | {"dataset": "review_prompts_heldout"}),
    "evaluate": dict(models=[str(ASSETS / "tiny-base")],
                     **SAMPLING | {"dataset": "review_prompts_heldout"}),
}
for name in ("dpo", "grpo"):
    FLAGS[f"{name}-lora"] = FLAGS[name] | dict(lora_rank=4, learning_rate=3e-4)


def prepare(directory: Path) -> Path:
    """A few rows of the embedded data."""
    for name in ("demonstrations", "comparisons", "review_prompts"):
        for part, number in ((name, 37), (f"{name}_heldout", 5)):
            lines = (DATA / f"{part}.jsonl").read_text().splitlines(keepends=True)[:number]
            (directory / f"{part}.jsonl").write_text("".join(lines))
    return directory


def run(name: str, directory: Path, **more) -> None:
    script = name.partition("-")[0]  # sft-stopped: another run of sft.py
    module = importlib.import_module(script)
    flags = dict(learning_rate=3e-5, max_steps=5, micro_batch_size=2, device="cpu")
    flags |= FLAGS.get(name, FLAGS[script]) | dict(output_dir=str(directory / name)) | more
    data = flags["dataset"]
    flags["dataset"] = str(directory / f"{data}.jsonl")
    flags["eval_dataset"] = str(directory / f"{data}_heldout.jsonl")
    known = {field.name for field in fields(module.Args)}
    module.main(module.Args(**{name: value for name, value in flags.items() if name in known}))


@dataclass
class Args:
    directory: Path
    runs: str
    """JSON: further flags of each run"""
    device: str = "cpu"


def main(args: Args) -> None:
    (args.directory / f"{rank()}.pid").write_text(str(os.getpid()))
    for name, flags in json.loads(args.runs).items():
        run(name, args.directory, **flags)


if __name__ == "__main__":
    run_script(main, Args)
