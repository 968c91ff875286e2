"""What the experiments share: the scripts' command lines, run two at a time, and not again once they have finished."""

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
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # one thread each: the models are tiny


def run(directory: Path, command: list) -> dict:
    """[script, flag, value ...] -> its results.json, from the disk where the same command has finished before. One that
    was interrupted goes on from its checkpoint."""
    script, *flags = map(str, command)
    results, told = directory / "results.json", directory / "command.json"
    same = told.exists() and json.loads(told.read_text()) == [script, *flags]
    if not (same and results.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)
        told.write_text(json.dumps([script, *flags]))
        with open(directory / "log.txt", "w") as log:
            whole = [sys.executable, ROOT / script, *flags, "--output-dir", directory, *["--resume"] * same]
            status = subprocess.run(whole, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT).returncode
        if status:
            last = (directory / "log.txt").read_text().strip().splitlines()[-1:]
            raise SystemExit(f"{' '.join([script, *flags])}\n  ended with status {status}: {' '.join(last)}")
        print(f"{directory.name}: {json.loads(results.read_text())['seconds']:.0f} s", flush=True)
    return json.loads(results.read_text())


def run_all(commands: dict[Path, list], processes: int) -> dict[Path, dict]:
    """Directories and what is run in them -> directories and results."""
    with ThreadPoolExecutor(processes) as pool:
        futures = {directory: pool.submit(run, directory, command) for directory, command in commands.items()}
        try:
            return {directory: future.result() for directory, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def metrics_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def mean(values) -> float:
    return sum(values) / len(values)
