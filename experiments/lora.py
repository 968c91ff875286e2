"""LoRA in the embedded world: what adapters of rank 8 reach, and which weights a method changes.

    python experiments/lora.py            # ten runs, one after the other; finished runs are kept

DPO and GRPO with all weights, with adapters of rank 8 at several learning rates, and with a part of
the weights at the learning rate of full training: only the linear layers of the trunk, which is
what adapters change, or only the embeddings, which are the head too (they are tied).
Writes experiments/results/lora.json.
"""

import importlib
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

from runs import RESULTS, ROOT

RUNS = ROOT / "runs" / "lora"
ALL, TRUNK, EMBEDDINGS = "", r"_proj\.weight", "embed_tokens"
COMMANDS = {  # method, what is trained: (pattern of the trained weights, flags)
    ("dpo", "all weights"): (ALL, []),
    ("dpo", "rank 8, learning rate 1e-3"): (ALL, ["--lora-rank", "8", "--learning-rate", "1e-3"]),
    ("dpo", "rank 8, learning rate 3e-3"): (ALL, ["--lora-rank", "8", "--learning-rate", "3e-3"]),
    ("dpo", "rank 8, learning rate 5e-3"): (ALL, ["--lora-rank", "8", "--learning-rate", "5e-3"]),
    ("dpo", "the trunk's linear layers"): (TRUNK, []),
    ("dpo", "the embeddings"): (EMBEDDINGS, []),
    ("grpo", "all weights"): (ALL, []),
    ("grpo", "rank 8, learning rate 1e-2"): (ALL, ["--lora-rank", "8", "--learning-rate", "1e-2"]),
    ("grpo", "rank 8, learning rate 2e-2"): (ALL, ["--lora-rank", "8", "--learning-rate", "2e-2"]),
    ("grpo", "the trunk's linear layers"): (TRUNK, []),
}


def train(script: str, pattern: str, directory: Path, flags: list[str]) -> None:
    """The script's main(), where only weights whose names match the pattern are trained."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    load_policy, counts = module.load_policy, []

    def load_part(args):
        policy = load_policy(args)
        for name, parameter in policy.named_parameters():
            trained = parameter.requires_grad and re.search(pattern, name) is not None
            parameter.requires_grad = trained
        counts.append(sum(p.numel() for p in policy.parameters() if p.requires_grad))
        return policy

    module.load_policy = load_part
    sys.argv = [f"{script}.py", *flags, "--eval-every", "1000", "--output-dir", str(directory)]
    importlib.import_module("harness").run_script(module.main, module.Args)
    results = json.loads((directory / "results.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    results |= {"trained_parameters": counts[0], "peak_mb": peak}
    (directory / "lora.json").write_text(json.dumps(results))


def main() -> None:
    rows = []
    for (script, what), (pattern, flags) in COMMANDS.items():
        directory = RUNS / f"{script}_{what}".replace(" ", "_")
        if not (directory / "lora.json").exists():
            command = [sys.executable, __file__, script, pattern, directory, *flags]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        results = json.loads((directory / "lora.json").read_text())
        gain = results["reward"] - results["reward_ref"]
        rows.append({"script": script, "trained": what, "gain": gain} | results)
        print(f"{script} {what:28} gain {gain:.2f} ± {results['reward_se']:.2f}, KL "
              f"{results['kl']:.2f}, {results['trained_parameters']:,} parameters, "
              f"{results['peak_mb']:.0f} MB", flush=True)
    (RESULTS / "lora.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        name, weights, folder, *others = sys.argv[1:]
        train(name, weights, Path(folder), others)
    else:
        main()
