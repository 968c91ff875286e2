"""How cost grows when one size doubles, and the memory of the log-probabilities.

    python benchmarks/scaling.py    # minutes on 1 CPU core; writes benchmarks/results/scaling.json

A random Llama of 4 layers, width 128 and 8,192 words. Cost: processor seconds of one rollout
(common.generate), and of the log-probabilities with their backward pass (common.token_logprobs) on
what it wrote, the least of 3, when prompts, samples per prompt, new tokens or width double, 1x to
8x; growth is the mean factor per doubling, and the last. Work grows twofold with the first three
(below: what every step costs whatever its size, and a prompt that its samples share), and between
twofold (head) and fourfold (layers) with width.

Memory: what the log-probabilities with their backward pass, in micro-batches of token_budget()
tokens, add to the peak of a process of its own, as vocabulary x completion tokens grow past 2**28
logits (1 GiB in float32). `trunk` is what the model without its head adds on the same
micro-batches: activations, in proportion to their tokens. The difference is the head's: a few times
the logits of one micro-batch, where all logits would need 4 bytes x vocabulary x tokens.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
BASE = {"prompts": 2, "samples": 4, "new_tokens": 16, "width": 128}
ROWS = 32
MEMORY = [(8192, 2048), (16384, 2048), (32768, 2048), (65536, 2048), (65536, 4096), (65536, 8192)]


def make_model(width: int, vocabulary: int):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width,
                         num_hidden_layers=4, num_attention_heads=width // 64,
                         max_position_embeddings=16384, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def cost(prompts: int, samples: int, new_tokens: int, width: int) -> dict:
    """Processor seconds of a rollout and of an update on it."""
    import torch

    from common import generate, load_tokenizer, token_logprobs
    model, tokenizer = make_model(width, 8192), load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    tokenizer.eos_token_id = 10**6  # nothing ends early
    ids = torch.randint(3, 512, (prompts, 64)).tolist()
    seconds = {"rollout": [], "update": []}
    for _ in range(4):
        began = time.process_time()
        rollout = generate(model, tokenizer, ids, samples, new_tokens)
        sampled = time.process_time()
        token_logprobs(model, rollout.input_ids, rollout.completion_mask).sum().backward()
        seconds["rollout"].append(sampled - began)
        seconds["update"].append(time.process_time() - sampled)
    return {name: min(values[1:]) for name, values in seconds.items()}


def memory(part: str, vocabulary: int, length: int) -> None:
    """MB that `logprobs`, or the `trunk` alone, adds to this process's peak, with the backward
    pass."""
    import torch

    from common import micro_batches, token_budget, token_logprobs
    from versus_trl import peak_mb
    torch.set_num_threads(1)
    model = make_model(64, vocabulary)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def work(ids):
        for group in micro_batches([ids.shape[1]] * len(ids), None, token_budget(model)):
            if part == "trunk":
                states = model.base_model(input_ids=ids[group], use_cache=False).last_hidden_state
                states.sum().backward()
            else:
                mask = torch.ones_like(ids[group])
                token_logprobs(model, ids[group], mask).sum().backward()

    ids = torch.randint(3, 512, (ROWS, length // ROWS))
    work(ids[:, :4])  # libraries are loaded
    before = peak_mb()
    work(ids)
    print(peak_mb() - before)


def added_mb(part: str, vocabulary: int, length: int) -> float:
    command = [sys.executable, __file__, part, str(vocabulary), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    import torch
    torch.set_num_threads(1)
    results = {"cost": [], "memory": [], "device": "cpu, 1 thread"}
    for name in BASE:
        costs = [cost(**{**BASE, name: BASE[name] * 2**i}) for i in range(4)]
        for phase in ("rollout", "update"):
            seconds = [c[phase] for c in costs]
            row = {"doubled": name, "phase": phase, "from": BASE[name], "cpu_seconds": seconds,
                   "growth": (seconds[-1] / seconds[0]) ** (1 / 3),
                   "last_growth": seconds[-1] / seconds[-2]}
            results["cost"].append(row)
            print(f"{name:10} {phase:8} {' '.join(f'{s:.3f}' for s in seconds)}  "
                  f"x {row['growth']:.2f} per doubling, x {row['last_growth']:.2f} the last",
                  flush=True)
    for vocabulary, length in MEMORY:
        row = {"vocabulary": vocabulary, "tokens": length,
               "added_mb": added_mb("logprobs", vocabulary, length),
               "trunk_mb": added_mb("trunk", vocabulary, length),
               "all_logits_mb": 4 * vocabulary * length / 2**20}
        results["memory"].append(row)
        print(f"vocabulary {vocabulary:6} x {length:5} tokens: {row['added_mb']:6.0f} MB added, "
              f"trunk {row['trunk_mb']:4.0f}, head {row['added_mb'] - row['trunk_mb']:4.0f}; "
              f"all logits {row['all_logits_mb']:5.0f}", flush=True)
    path = ROOT / "benchmarks" / "results" / "scaling.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()

