"""common.token_logprobs and common.generate against the usual way to do the same work.

    python benchmarks/core.py            # about 10 minutes on 2 CPU cores; writes benchmarks/results/core.json

* log-probs, forward and backward: ours against log_softmax over the full logits and a gather
* rollouts, 8 samples for each of 8 prompts: ours against model.generate on the prompts repeated 8 times

Each measurement is a process of its own, which warms up once and takes the median of 3; the two ways alternate, 5
times, and the ratio is the median over the 5 pairs. Peak memory is what the work adds to the process. Shapes: tiny is
assets/tiny-sft with its own reviews (0.9M parameters, vocabulary 512, completions end by themselves); 15M is a random
Llama of 288 x 6, vocabulary 32,000, with prompts and completions of 64 to 128 tokens, which never end.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
THREADS = 2


def load(shape):
    """-> model, tokenizer, rows of (ids, mask), prompts (ids), new tokens"""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common import encode_prompt, encode_row, load_model, load_rows, load_tokenizer, make_row
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    if shape == "tiny":
        model = load_model(str(ROOT / "assets" / "tiny-sft"))
        data = load_rows(str(ROOT / "assets" / "data" / "comparisons_heldout.jsonl"))
        rows = [encode_row(tokenizer, row["prompt"], row["chosen"], [1]) for row in data[:64]]
        return model, tokenizer, rows, [encode_prompt(tokenizer, row["prompt"]) for row in data[:8]], 64
    config = LlamaConfig(vocab_size=32000, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
                         num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512,
                         tie_word_embeddings=True, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    lengths = torch.randint(64, 129, (8, 2)).tolist()
    rows = [make_row(*(torch.randint(3, 32000, (length,)).tolist() for length in pair)) for pair in lengths]
    return model, tokenizer, rows, [ids[:p] for (ids, _), (p, _) in zip(rows, lengths)], 64


def work(task, way, shape):
    """-> a function that does the work once and returns the number of tokens it is about"""
    import torch

    from common import generate, micro_batches, pad_rows, token_logprobs
    model, tokenizer, rows, prompts, new_tokens = load(shape)

    def logprobs():
        for group in micro_batches([len(ids) for ids, _ in rows], None) if way == "ours" else [range(len(rows))]:
            input_ids, mask = pad_rows([rows[i] for i in group])
            if way == "ours":
                logps = token_logprobs(model, input_ids, None, mask)
            else:
                logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2) * mask[:, 1:]
            logps.sum().backward()
        return sum(len(ids) for ids, _ in rows)

    def rollouts():
        if way == "ours":
            return int(generate(model, tokenizer, prompts, 8, new_tokens).completion_mask.sum())
        repeated = [p for p in prompts for _ in range(8)]
        longest = max(map(len, repeated))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in repeated])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in repeated])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True, top_k=0,
                             pad_token_id=0)
        new = out[:, longest:]  # as much of a row as is not padding
        return int((new.flip(1).cumsum(1) > 0).sum()) if shape == "tiny" else new.numel()

    return logprobs if task == "log-probs" else rollouts


def measure(task, way, shape):
    run = work(task, way, shape)
    import torch
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        rates.append(run() / (time.perf_counter() - began))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"tokens_per_s": statistics.median(rates), "peak_mb": (peak - before) / 1024}))


def main():
    results = []
    for shape in ("tiny", "15M"):
        for task in ("log-probs", "rollouts"):
            runs = {"ours": [], "naive": []}
            for repeat in range(5):
                for way in ("ours", "naive") if repeat % 2 else ("naive", "ours"):
                    command = [sys.executable, __file__, task, way, shape]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs[way].append(json.loads(done.stdout))

            def median(way, key):
                return statistics.median(run[key] for run in runs[way])

            ratio = statistics.median(ours["tokens_per_s"] / naive["tokens_per_s"]
                                      for ours, naive in zip(runs["ours"], runs["naive"]))
            results.append({"task": task, "shape": shape, "device": "cpu", "threads": THREADS, "ratio": ratio,
                            **{f"tokens_per_s_{way}": median(way, "tokens_per_s") for way in runs},
                            **{f"peak_mb_{way}": median(way, "peak_mb") for way in runs}})
            shown = (f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in results[-1].items())
            print(" ".join(shown), flush=True)
    (ROOT / "benchmarks" / "results" / "core.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
