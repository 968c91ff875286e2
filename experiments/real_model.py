r"""A real chat model through sft, reward_model, dpo, best_of_n, ppo_rlhf, grpo and evaluate.

    python experiments/real_model.py                               # on a GPU, from the Hub
    python experiments/real_model.py --model DIRECTORY --pairs FILE.jsonl     # on a laptop, offline
    python experiments/real_model.py --stages grpo grpo_seed_1     # some of the stages

Two data sets. The first three stages learn from Anthropic's helpful comparisons (Bai et al. 2022),
texts of the form "\n\nHuman: ... \n\nAssistant: ...", which become lists of messages here; long
ones are left out. The others learn the rule of one_sentence.py, which can be checked.

Each stage is one command line of the scripts, which is printed, and takes at most twenty minutes
on two CPU cores. A stage that has finished is not repeated. Writes
experiments/results/real_model.json: results, seconds, tokens per second and peak memory.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import tyro

from runs import RESULTS, ROOT, metrics_of, write_rows

RULE = f"{ROOT / 'experiments' / 'one_sentence.py'}:one_sentence"
QUESTIONS = ROOT / "experiments" / "data"


@dataclass
class Args:
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Hub id or directory of a chat model"""
    pairs: str = "Anthropic/hh-rlhf"
    """comparisons with `chosen` and `rejected` texts: Hub id or .jsonl file"""
    train_pairs: int = 900
    """comparisons to learn from"""
    held_out_pairs: int = 300
    """comparisons to be judged by"""
    longest: int = 800
    """characters per conversation"""
    stages: tuple[str, ...] = ()
    """names of stages; default: all"""
    output_dir: Path = ROOT / "runs" / "real_model"
    """directory of the runs"""


# --- data ---


def turns_of(text: str) -> list[dict]:
    """Anthropic's text form -> a list of messages."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": words.strip()}
            for speaker, words in zip(parts[0::2], parts[1::2])]


def load_comparisons(args: Args) -> list[dict]:
    if Path(args.pairs).is_file():
        rows = [json.loads(line) for line in open(args.pairs, encoding="utf-8")]
    else:
        import datasets
        rows = datasets.load_dataset(args.pairs, data_dir="helpful-base", split="train")
    comparisons = []
    for row in rows:
        chosen, rejected = turns_of(row["chosen"]), turns_of(row["rejected"])
        short = max(len(row["chosen"]), len(row["rejected"])) <= args.longest
        if short and chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1]:
            comparisons.append({"prompt": chosen[:-1], "chosen": chosen[-1:],
                                "rejected": rejected[-1:]})
    return comparisons


def write_data(args: Args, folder: Path) -> None:
    """pairs.jsonl and pairs_heldout.jsonl."""
    comparisons = load_comparisons(args)
    held_out = comparisons[:args.held_out_pairs]
    train = comparisons[args.held_out_pairs:][:args.train_pairs]
    for name, rows in (("pairs", train), ("pairs_heldout", held_out)):
        write_rows(folder / f"{name}.jsonl", rows)


# --- stages ---


def commands(args: Args) -> dict[str, list]:
    """Each stage's name -> its command line."""
    data, runs, model = args.output_dir / "data", args.output_dir, ["--model", args.model]
    pairs = ["--dataset", data / "pairs.jsonl", "--eval-dataset", data / "pairs_heldout.jsonl"]
    lora = ["--lora-rank", 16, "--lora-alpha", 32]
    rule = ["--reward-fn", RULE, "--max-new-tokens", 48]
    questions = ["--dataset", QUESTIONS / "questions.jsonl",
                 "--eval-dataset", QUESTIONS / "questions_heldout.jsonl", "--eval-prompts", 100]
    held_out_questions = ["--dataset", QUESTIONS / "questions_heldout.jsonl", "--split", "train"]
    grpo = ["grpo.py", *model, *questions, *rule, "--batch-size", 8, "--samples-per-prompt", 8,
            "--max-steps", 30, "--learning-rate", 2e-5, "--beta", 0.04, "--eval-samples", 2]
    return {
        "sft": ["sft.py", *model, *pairs, "--completion-column", "chosen", "--batch-size", 16,
                "--learning-rate", 2e-5, "--max-steps", 25, "--eval-prompts", 100],
        "reward_model": ["reward_model.py", *model, *pairs, *lora, "--batch-size", 8,
                         "--learning-rate", 2e-4, "--epochs", 1, "--eval-prompts", 300],
        "dpo": ["dpo.py", "--model", runs / "sft", *pairs, *lora, "--batch-size", 8,
                "--max-steps", 60, "--learning-rate", 1e-4, "--beta", 0.1, "--eval-prompts", 300,
                "--reward-model", runs / "reward_model", "--max-new-tokens", 48,
                "--eval-every", 100],
        "best_of_n": ["best_of_n.py", *model, *held_out_questions, *rule,
                      "--samples-per-prompt", 16],
        "ppo_rlhf": ["ppo_rlhf.py", *model, *questions, *rule, "--batch-size", 64,
                     "--max-steps", 30, "--beta", 0.04, "--learning-rate", 2e-5,
                     "--value-learning-rate", 1e-4, "--eval-every", 100],
        "grpo": [*grpo, "--seed", 0],
        "grpo_seed_1": [*grpo, "--seed", 1],
        "evaluate": ["evaluate.py", "--models", runs / "ppo_rlhf", runs / "grpo",
                     "--reference", args.model, *held_out_questions, *rule],
    }


def run(name: str, command: list, directory: Path) -> dict:
    """-> results, seconds, tokens per second and peak memory; from the disk where the same command
    has finished before."""
    script, *flags = map(str, command)
    saved, line = directory / "stage.json", " ".join(["python", script, *flags])
    if saved.exists() and json.loads(saved.read_text())["command"] == line:
        return json.loads(saved.read_text())
    print(f"\n{line}", flush=True)
    process = subprocess.Popen([sys.executable, ROOT / script, *flags, "--output-dir", directory])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: ended with status {os.waitstatus_to_exitcode(status)}")
    rows = metrics_of(directory)
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    stage = {
        "command": line,
        "before": next((row for row in rows if row["phase"] == "eval"), None),
        "results": json.loads((directory / "results.json").read_text()),
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "tokens_per_s": median(speeds) if speeds else None,
        "peak_gib": usage.ru_maxrss / 2**20,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    saved.write_text(json.dumps(stage, indent=1))
    return stage


def main(args: Args) -> None:
    write_data(args, args.output_dir / "data")
    stages = {}
    for name, command in commands(args).items():
        directory = args.output_dir / name
        if not args.stages or name in args.stages:
            stages[name] = run(name, command, directory)
        elif (directory / "stage.json").exists():
            stages[name] = json.loads((directory / "stage.json").read_text())
    (RESULTS / "real_model.json").write_text(json.dumps(stages, indent=1) + "\n")
    for name, stage in stages.items():
        speed = stage["tokens_per_s"]
        minutes = stage["processor_seconds"] / 60
        speed = f", {speed:.0f} tokens/s" if speed else ""
        print(f"{name:13} {minutes:5.1f} processor minutes, {stage['peak_gib']:.1f} GiB{speed}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
