"""What the experiments share: the scripts' command lines, each run until it has finished once."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
ASSETS, DATA = ROOT / "assets", ROOT / "assets" / "data"
GOLD = f"{ASSETS / 'rewards.py'}:sentiment"
# one thread per run: the models are tiny
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# GRPO's flags under which its fixed point is pi*, with beta G / (G - 1): see grpo.py
TO_PI_STAR = ["--no-scale", "--kl-correction", "--ratio", "sequence", "--samples-per-prompt", 8,
              "--max-new-tokens", 64, "--eval-samples", 1, "--batch-size", 32, "--epochs", 2,
              "--learning-rate", 5e-4]


def directory_of(folder: str, *names) -> Path:
    return Path(folder) / "_".join(map(str, names)).replace(" ", "_")


def run(directory: Path, command: list) -> dict:
    """[script, flag, value ...] -> its results.json, from the disk where the same command has
    finished before. An interrupted run continues from its checkpoint."""
    script, *flags = map(str, command)
    results, saved = directory / "results.json", directory / "command.json"
    same = saved.exists() and json.loads(saved.read_text()) == [script, *flags]
    if not (same and results.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
        saved.write_text(json.dumps([script, *flags]))
        whole = [sys.executable, ROOT / script, *flags, "--output-dir", directory]
        if same and (directory / "checkpoint" / "state.pt").exists():
            whole.append("--resume")
        with open(directory / "log.txt", "w") as log:
            status = subprocess.run(whole, env=ENVIRONMENT, stdout=log, stderr=log).returncode
        if status:
            last = (directory / "log.txt").read_text().strip().splitlines()[-1:]
            raise SystemExit(f"{' '.join([script, *flags])}\n  ended with status {status}: "
                             f"{' '.join(last)}")
        print(f"{directory.name}: {json.loads(results.read_text())['seconds']:.0f} s", flush=True)
    return json.loads(results.read_text())


def run_all(commands: dict[Path, list], processes: int) -> dict[Path, dict]:
    """Directories and the commands that write them -> directories and results."""
    with ThreadPoolExecutor(processes) as pool:
        futures = {directory: pool.submit(run, directory, command)
                   for directory, command in commands.items()}
        try:
            return {directory: future.result() for directory, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw_comparisons(prompts: list[str], completions: list[str], rewards: list[float]) -> list:
    """One comparison for each prompt between its two completions, which stand next to each other;
    the winner is drawn by the Bradley-Terry model on the rewards."""
    import torch
    first, second = torch.tensor(rewards).view(-1, 2).T
    first_wins = torch.rand(len(prompts)) < torch.sigmoid(first - second)
    pairs = []
    for n, prompt in enumerate(prompts):
        chosen, rejected = completions[2 * n:2 * n + 2][::1 if first_wins[n] else -1]
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def mean(values) -> float:
    return sum(values) / len(values)


def variance_of_mean(values) -> float:
    """By how much values that should be equal differ; 0 of one value."""
    squares = sum((value - mean(values)) ** 2 for value in values)
    return squares / max(1, len(values) - 1) / len(values)
