"""common.token_logprobs and common.generate against the usual way to do the same work.

    python benchmarks/core.py       # 10 minutes on 2 CPU cores; writes benchmarks/results/core.json

* log-probs, forward and backward: ours against log_softmax over the full logits and a gather
* rollouts, 8 samples for each of 8 prompts: ours against model.generate on the prompts repeated 8
  times

Each measurement is a process of its own, which warms up once and takes the median of 3; the two
ways alternate, 5 times, and the ratio is the median over the 5 pairs. Peak memory is what the work
adds to the process. Shapes: tiny is assets/tiny-sft with its own reviews (0.9M parameters,
vocabulary 512, completions end by themselves); 15M is a random Llama of 288 x 6, vocabulary 32,000,
with prompts and completions of 64 to 128 tokens, which never end.

A rollout's share of the limit is the time that its steps need at least, divided by the time that it
took. A step's limit is the longer of two times, as if they overlapped: its FLOPs at the rate of a
2048^3 product, and reading all weights and every row's keys and values (float32) at the bandwidth
of a sum over as many numbers as the model has weights, which a cache may hold. Both are measured in
the same process right after the rollouts. The first step encodes each prompt once; after it there
are as many rows as have not ended. The limit has no sampling (an exponential and a running sum over
the vocabulary), no norms and no Python.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
THREADS, SAMPLES = 2, 8


def load(shape):
    """-> model, tokenizer, rows, prompts (ids), new tokens"""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from common import encode_prompt, encode_row, load_model, load_tokenizer, make_row
    from harness import load_rows
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    tokenizer = load_tokenizer(str(ROOT / "assets" / "tiny-sft"))
    if shape == "tiny":
        model = load_model(str(ROOT / "assets" / "tiny-sft"))
        data = load_rows(str(ROOT / "assets" / "data" / "comparisons_heldout.jsonl"))
        rows = [encode_row(tokenizer, row["prompt"], row["chosen"], [1]) for row in data[:64]]
        prompts = [encode_prompt(tokenizer, row["prompt"]) for row in data[:8]]
        return model, tokenizer, rows, prompts, 64
    config = LlamaConfig(vocab_size=32000, hidden_size=288, intermediate_size=768,
                         num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=6,
                         max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    rows, prompts = [], []
    for lengths in torch.randint(64, 129, (8, 2)).tolist():
        prompt, completion = [torch.randint(3, 32000, (n,)).tolist() for n in lengths]
        prompts.append(prompt)
        rows.append(make_row(prompt, completion))
    return model, tokenizer, rows, prompts, 64


def work(task, way, model, tokenizer, rows, prompts, new_tokens):
    """-> a function that does the work once and returns how many tokens each row or sample has"""
    import torch

    from common import generate, micro_batches, pad_rows, token_budget, token_logprobs
    row_lengths = [len(row.ids) for row in rows]

    def logprobs():
        groups = [range(len(rows))]
        if way == "ours":
            groups = micro_batches(row_lengths, None, token_budget(model))
        for group in groups:
            input_ids, mask = pad_rows([rows[i] for i in group])
            if way == "ours":
                logps = token_logprobs(model, input_ids, mask)
            else:
                logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
                logps = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
                logps = logps * mask[:, 1:]
            logps.sum().backward()
        return row_lengths

    def rollouts():
        if way == "ours":
            rollout = generate(model, tokenizer, prompts, SAMPLES, new_tokens)
            return rollout.completion_mask.sum(1).tolist()
        repeated = [p for p in prompts for _ in range(SAMPLES)]
        longest = max(map(len, repeated))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in repeated])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in repeated])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True,
                             top_k=0, pad_token_id=0)
        return (out[:, longest:].flip(1).cumsum(1) > 0).sum(1).tolist()  # without its padding

    return logprobs if task == "log-probs" else rollouts


def decoding_limit(model, prompts, lengths, flops, bandwidth):
    """Seconds, at least, for completions of these lengths, FLOP/s and bytes/s. The embedding is the
    head."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    trunk = weights - config.vocab_size * config.hidden_size
    # numbers per token: in queries, and in keys
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    cached = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    encoded = [len(prompt) for prompt in prompts]
    pairs = sum(n**2 for n in encoded) / 2  # causal
    work = 2 * trunk * sum(encoded) + 4 * attention * pairs
    seconds = max(work / flops, 4 * weights / bandwidth)
    for t in range(1, max(lengths)):
        contexts = [encoded[i // SAMPLES] + t for i, length in enumerate(lengths) if length > t]
        work = 2 * weights * len(contexts) + 4 * attention * sum(contexts)
        seconds += max(work / flops, 4 * (weights + 2 * cached * sum(contexts)) / bandwidth)
    return seconds


def read_rate(size):
    """Bytes/s of a sum over `size` float32 numbers, the median of 50."""
    import torch
    numbers, seconds = torch.ones(size), []
    for _ in range(55):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return 4 * size / statistics.median(seconds[5:])


def measure(task, way, shape):
    import torch

    from versus_trl import gemm_rate
    model, tokenizer, rows, prompts, new_tokens = load(shape)
    weights = sum(parameter.numel() for parameter in model.parameters())
    run = work(task, way, model, tokenizer, rows, prompts, new_tokens)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    runs = []
    for _ in range(3):
        began = time.perf_counter()
        lengths = run()
        runs.append((time.perf_counter() - began, lengths))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens_per_s = statistics.median(sum(lengths) / seconds for seconds, lengths in runs)
    result = {"tokens_per_s": tokens_per_s, "peak_mb": (peak - before) / 1024}
    if task == "rollouts":
        flops, bandwidth = gemm_rate()["gemm"], read_rate(weights)
        shares = [decoding_limit(model, prompts, lengths, flops, bandwidth) / seconds
                  for seconds, lengths in runs]
        result |= {"gemm_gflops": flops / 1e9, "bandwidth_gb_per_s": bandwidth / 1e9,
                   "share_of_limit": statistics.median(shares)}
    print(json.dumps(result))


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
            row = {"task": task, "shape": shape, "device": "cpu", "threads": THREADS,
                   "ratio": ratio}
            for key in runs["ours"][0]:
                row |= {f"{key}_{way}": median(way, key) for way in runs}
            results.append(row)
            shown = (f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items())
            print(" ".join(shown), flush=True)
    path = ROOT / "benchmarks" / "results" / "core.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(*sys.argv[1:])
    else:
        main()

