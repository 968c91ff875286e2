"""Every training script, five small steps each: what tests/test_processes.py runs in one process and in two.

    torchrun --nproc-per-node 2 tests/processes.py --directory D --scripts '{"sft": {"max_steps": 5}}'
"""

import importlib
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ASSETS, run_script, world

DATA = ASSETS / "data"
GOLD = f"{ASSETS / 'rewards.py'}:sentiment"
SAMPLES = dict(max_new_tokens=12)  # rows, answers and prompts are never a multiple of two
FLAGS = {
    "sft": dict(dataset="demonstrations", batch_size=7, micro_batch_size=2, **SAMPLES),
    "dpo": dict(dataset="comparisons", batch_size=7, micro_batch_size=2, reward_fn=GOLD, **SAMPLES),
    "reward_model": dict(dataset="comparisons", batch_size=7, micro_batch_size=2, dropout=0.0),
    "ppo_rlhf": dict(dataset="review_prompts", batch_size=9, micro_batch_size=2, critic_warmup=1, ppo_epochs=2,
                     value_learning_rate=1e-4, reward_model=str(ASSETS / "tiny-rm"), reward_fn=GOLD, **SAMPLES),
    "grpo": dict(dataset="review_prompts", batch_size=3, micro_batch_size=3, group_size=5, beta=0.1,
                 updates_per_rollout=2, eval_samples=2, reward_fn=[GOLD], **SAMPLES),
    "expert_iteration": dict(dataset="review_prompts", batch_size=5, rounds=2, n=3, prompts_per_round=7,
                             reward_fn=GOLD, **SAMPLES),
    "best_of_n": dict(dataset="review_prompts_heldout", batch_size=3, n=3, save_every=1, reward_fn=GOLD,
                      reward_model=str(ASSETS / "tiny-rm"), **SAMPLES),
    "evaluate": dict(dataset="review_prompts_heldout", models=[str(ASSETS / "tiny-base")], reward_fn=GOLD, **SAMPLES),
    "reward_conditioning": dict(dataset="review_prompts", batch_size=5, rounds=2, samples=2, prompts_per_round=7,
                                reward_fn=GOLD, **SAMPLES),
}


def prepare(directory: Path) -> Path:
    """A few rows of the embedded data."""
    for name in ("demonstrations", "comparisons", "review_prompts"):
        for part, number in ((name, 37), (f"{name}_heldout", 5)):
            lines = (DATA / f"{part}.jsonl").read_text().splitlines(keepends=True)[:number]
            (directory / f"{part}.jsonl").write_text("".join(lines))
    return directory


def run(script: str, directory: Path, **more) -> None:
    module, flags = importlib.import_module(script), dict(FLAGS[script])
    data, names = flags["dataset"], {field.name for field in fields(module.Args)}
    flags = {"learning_rate": 3e-5, "max_steps": 3 if "rounds" in flags else 5, "output_dir": str(directory / script),
             "eval_dataset": str(directory / f"{data}_heldout.jsonl"), "split": "train", **flags,
             "dataset": str(directory / f"{data}.jsonl"), **more}
    module.main(module.Args(**{name: value for name, value in flags.items() if name in names}))


@dataclass
class Args:
    directory: Path
    scripts: str
    """JSON: flags of each script"""


def main(args: Args) -> None:
    (args.directory / f"{world()[0]}.pid").write_text(str(os.getpid()))
    for script, flags in json.loads(args.scripts).items():
        run(script, args.directory, **flags)


if __name__ == "__main__":
    run_script(main, Args)
