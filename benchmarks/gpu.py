"""One GPU: how near its limits training and decoding come, and where the time of a step goes.

    python benchmarks/gpu.py         # benchmarks/results/gpu.json and tables, in about --minutes 10
    python benchmarks/gpu.py --sections machine decoding --models 0.5B
    python benchmarks/gpu.py --smoke --output gpu.json    # tiny shapes, on a CPU too: does it run?

Models: the shapes of Qwen2.5 0.5B and 1.5B and of Qwen3 0.6B, random weights, made on the GPU. As
in the scripts: fp32 master weights, bf16 autocast, fused AdamW, no gradient checkpointing. Every clock waits for
the GPU, the scripts' too, which do not by themselves. Times are medians after a warm-up, peak_gib
is torch.cuda.max_memory_allocated of the row. A row that fails says why, and the others follow.

machine   FLOP/s of a bf16 product of two 8192^2 matrices; bytes/s of a copy (read and written) and
          of a sum (read) of 2 GiB: the measured limits. Beside them the vendor's dense bf16 and
          memory numbers, where the GPU is known.
training  updates of 8 pairs, a prompt of 512 tokens and two completions of 512 each, by what dpo.py
          (the reference's log-probabilities given) and reward_model.py (without its dropout) call:
          preferences() or batch_loss(), clipping, AdamW. share_of_gemm and mfu: NECESSARY FLOPs per
          second over the measured product's and over the vendor's. Necessary is 3 forward passes
          (the backward pass is 2) of

              2 x weights of the layers x tokens + 2 x weights of the head x completion tokens
              + causal attention

          where a pair's shared prompt counts once, because it is computed once: 1,536 tokens, not
          2,048. Look-ups of embeddings and the reward model's head are nothing. tokens_per_s is
          what a user sees and the scripts count: 2,048 per pair.
decoding  common.generate: prompts of 128 tokens (8 samples each from batch 64 on), no EOS, no text.
          A step is (time of 128 new tokens - time of 32) / 96: without prefill. Its limit: the bf16
          weights and the bf16 cache (of mean length) read once, at the measured bandwidth (the
          better of copy and sum) or the vendor's.
scripts   main() of dpo.py, of grpo.py with a reference (beta 0.04), of ppo_rlhf.py with a reward
          model and a critic: 0.5B, up to the first checkpoint, in micro-batches of the default size
          and larger. DPO: the pairs of training. GRPO: 32 prompts x 8 completions, PPO: 256 x 1;
          128 + 128 tokens. `seconds` is from a step's last AdamW to the next step's; rates are
          those of metrics.jsonl, shares are of the three phases' sum.
mixed     main() of sft.py and grpo.py with 0.6B and lengths as in chats, so that plans of kernels
          and padding are seen: SFT on 64 rows per update, GRPO on 32 prompts x 8 completions, both of a
          median of 350 tokens (rows lognormal with deviation 0.7; completions geometric, because
          one token in 505 is a stop token). mfu: necessary FLOPs of the updates, as above.
trl       TRL, if installed, on the same weights and batches: bf16, no gradient checkpointing, fused
          AdamW, generation by transformers, as many rows per pass as fit. DPO's reference is
          computed before training, and not counted, on both sides. ratio: its seconds over those
          of our faster micro-batches.
"""

import argparse
import contextlib
import gc
import importlib
import io
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from math import nan
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
import dpo
import reward_model
from common import clip_gradients, generate, make_row, micro_batches, token_budget
from harness import print_table

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # after common
from transformers import PreTrainedTokenizerFast, Qwen2Config

SECTIONS = ("machine", "training", "decoding", "scripts", "mixed", "trl")
MODELS = {  # width, layers, heads, of keys and values, width of a head, inner width, words
    "0.5B": (896, 24, 14, 2, 64, 4864, 151936),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
    "1.5B": (1536, 28, 12, 2, 128, 8960, 151936),
    "tiny": (32, 2, 4, 2, 8, 48, 512),
}
VENDOR = {  # dense bf16 FLOP/s, bytes/s
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}
FULL = dict(
    models=["0.5B", "1.5B"], script_model="0.5B", gemm=8192, floats=2**29, repeats=7,
    pair=(512, 512), pairs=8, passes={"0.5B": (None, 8), "1.5B": (None, 4)},
    decoding=(128, 32, 128), decoding_batches=(1, 64, 256),
    rollout=(128, 128), prompts=32, group=8, rollout_passes=(None, 64), steps=4,
    mixed_model="0.6B", rows=64, median=350, mixed_steps=8,
)
SMOKE = dict(
    models=["tiny"], script_model="tiny", gemm=64, floats=2**15, repeats=2,
    pair=(6, 5), pairs=4, passes={"tiny": (None, 2)},
    decoding=(6, 4, 24), decoding_batches=(1, 8),
    rollout=(6, 5), prompts=2, group=4, rollout_passes=(None, 4), steps=3,
    mixed_model="tiny", rows=4, median=6, mixed_steps=3,
)


# --- clock, model, FLOPs ---


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(function, repeats: int, warmup: int = 2) -> float:
    seconds = []
    for _ in range(warmup + repeats):
        began = now()
        function()
        seconds.append(now() - began)
    return statistics.median(seconds[warmup:])


def median_gap(times: list[float]) -> float:
    return statistics.median(after - before for before, after in zip(times, times[1:]))


@contextlib.contextmanager
def update_times():
    """-> a list that gets the time at which each AdamW step ended."""
    times = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(now()))
    try:
        yield times
    finally:
        hook.remove()


def make_model(name: str, device, kind=AutoModelForCausalLM):
    """Random weights, with all that common.load_model() sets."""
    width, layers, heads, kv_heads, head_dim, inner, words = MODELS[name]
    config = Qwen2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=head_dim,
                         intermediate_size=inner, vocab_size=words,
                         tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
                         bos_token_id=None, max_position_embeddings=2048, num_labels=1)
    torch.manual_seed(0)
    with torch.device(device):
        model = kind.from_config(config, dtype=torch.float32).eval()
    common.AUTOCAST[model.device.type] = torch.bfloat16
    common.uses_packing(model)  # as shard() asks
    return model


def weights_of(config) -> tuple[int, int]:
    """-> (weights of all layers' matrices, of the head)"""
    width, size = config.hidden_size, head_dim(config)
    projections = 2 * (config.num_attention_heads + config.num_key_value_heads) * size  # q, o; k, v
    layer = width * (projections + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer, width * config.vocab_size


def head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward_flops(config, prompt: int, completions: list[int], head: bool) -> float:
    """Of one prompt, computed once, and its completions, of so many tokens. Attention: half of the
    square; each completion sees the prompt too."""
    layers, head_weights = weights_of(config)
    keys = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in completions)  # that all queries meet
    return (2 * layers * (prompt + sum(completions))
            + 4 * config.num_hidden_layers * config.num_attention_heads * head_dim(config) * keys
            + 2 * head * head_weights * sum(completions))


# --- machine, training and decoding ---


def machine(shape, device) -> dict:
    size, options = shape["gemm"], {"device": device, "dtype": torch.bfloat16}
    a, b = torch.randn(size, size, **options), torch.randn(size, size, **options)
    x = torch.randn(shape["floats"], device=device)
    y = torch.empty_like(x)

    def seconds(work):
        return median_seconds(lambda: [work() for _ in range(10)], shape["repeats"]) / 10

    flops = 2 * size**3 / seconds(lambda: a @ b)
    copy, read = 8 * len(x) / seconds(lambda: y.copy_(x)), 4 * len(x) / seconds(lambda: x.sum())
    vendor_flops, vendor_bandwidth = VENDOR.get(device_name(device), (nan, nan))
    return {"gemm_tflops": flops / 1e12, "copy_tb_s": copy / 1e12, "read_tb_s": read / 1e12,
            "vendor_tflops": vendor_flops / 1e12, "vendor_tb_s": vendor_bandwidth / 1e12,
            "gemm_of_vendor": flops / vendor_flops,
            "bandwidth_of_vendor": max(copy, read) / vendor_bandwidth}


def device_name(device) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


def training(shape, device, limits, name: str, stage: str, pairs_a_pass: int | None) -> dict:
    is_dpo = stage == "dpo"
    kind = AutoModelForCausalLM if is_dpo else AutoModelForSequenceClassification
    model, (prompt, completion) = make_model(name, device, kind), shape["pair"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    size = (shape["pairs"], prompt + 2 * completion)
    pairs = []
    for ids in torch.randint(2, model.config.vocab_size, size).tolist():
        chosen = make_row(ids[:prompt], ids[prompt:-completion])
        pairs.append((chosen, make_row(ids[:prompt], ids[-completion:])))
    if is_dpo:
        batch = [dpo.Pair({}, chosen, rejected, 0.0, 0.0) for chosen, rejected in pairs]
    else:
        batch = [({"margin": None}, pair) for pair in pairs]
    args = (dpo if is_dpo else reward_model).Args(micro_batch_size=pairs_a_pass)

    def update():
        if is_dpo:
            dpo.preferences(model, batch, args, train=True)
        else:
            reward_model.batch_loss(model, batch, args)
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds(update, shape["repeats"])
    flops = 3 * len(pairs) * forward_flops(model.config, prompt, [completion] * 2, head=is_dpo)
    tokens = 2 * (prompt + completion)  # per pair
    budget = token_budget(model) if is_dpo else 4096
    groups = micro_batches([tokens] * len(pairs), pairs_a_pass, budget)
    return {"pairs_a_pass": len(groups[0]), "packed": common.uses_packing(model),
            "seconds": seconds, "tokens_per_s": len(pairs) * tokens / seconds,
            "necessary_tflop": flops / 1e12, "share_of_gemm": flops / seconds / limits["gemm"],
            "mfu": flops / seconds / limits["vendor_gemm"]}


def decoding(shape, device, limits, name: str, batch: int) -> dict:
    model, (prompt, few, many) = make_model(name, device), shape["decoding"]
    model.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(  # never ends
        eos_token_id=-1, batch_decode=lambda rows, **_: [""] * len(rows))
    samples = 8 if batch % 8 == 0 else 1
    prompts = torch.randint(2, model.config.vocab_size, (batch // samples, prompt)).tolist()

    def seconds(new_tokens):
        return median_seconds(lambda: generate(model, tokenizer, prompts, samples, new_tokens),
                              repeats=3, warmup=1)

    short, long = seconds(few), seconds(many)
    step, config = (long - short) / (many - few), model.config
    kv_width = head_dim(config) * config.num_key_value_heads
    per_token = 2 * 2 * config.num_hidden_layers * kv_width  # bytes of keys and values in bf16
    read = 2 * sum(weights_of(config)) + per_token * batch * (prompt + (few + many) / 2)
    return {"batch": batch, "step_ms": 1000 * step, "tokens_per_s": batch / step,
            "read_gb": read / 1e9, "tokens_per_s_with_prefill": batch * many / long,
            "share_of_bandwidth": read / step / limits["bandwidth"],
            "share_of_vendor": read / step / limits["vendor_bandwidth"]}


# --- whole scripts, ours and TRL ---


def word_tokenizer(size: int):
    """A word is a token."""
    pieces = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, size))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def random_text(words: int, length: int) -> str:
    return "".join(f" w{i}" for i in torch.randint(2, words, (length,)).tolist())


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(shape, device, where: Path) -> dict:
    """Policy, reward model and data, as the scripts read them."""
    size = MODELS[shape["script_model"]][-1]
    tokenizer = word_tokenizer(size)
    for name, kind in (("policy", AutoModelForCausalLM),
                       ("reward", AutoModelForSequenceClassification)):
        model = make_model(shape["script_model"], device, kind).to(torch.bfloat16)
        model.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)

    def write(name, number, **lengths):
        rows = [{column: random_text(size, length) for column, length in lengths.items()}
                for _ in range(number)]
        write_rows(where / f"{name}.jsonl", rows)

    prompt, completion = shape["pair"]
    both = dict(chosen=completion - 1, rejected=completion - 1)  # and EOS
    rollouts = shape["prompts"] * shape["group"]
    for suffix, pairs, prompts in (("", shape["pairs"], rollouts), ("_heldout", 2, 2)):
        write("dpo" + suffix, pairs * shape["steps"], prompt=prompt, **both)
        write("prompts" + suffix, prompts, prompt=shape["rollout"][0])
    with mock.patch.object(common, "AutoTokenizer", PreTrainedTokenizerFast):
        read = common.load_tokenizer(str(where / "policy"))
    row = json.loads((where / "prompts.jsonl").read_text().splitlines()[0])
    return {"prompt_tokens": len(common.encode_prompt(read, row["prompt"]))}


def sevens(prompts, completions, **columns) -> list[float]:
    """GRPO's reward."""
    return [text.count("7") / 100 for text in completions]


def run_main(name: str, **flags) -> tuple[list[float], list[dict]]:
    """The script's own main(), up to where it would save its only checkpoint -> when each AdamW
    step ended, and the lines of metrics.jsonl on training."""
    Enough, module = type("Enough", (Exception,), {}), importlib.import_module(name)
    flags |= dict(dtype="bfloat16", eval_every=10**6, save_every=10**6, eval_prompts=2,
                  learning_rate=1e-6)
    with (update_times() as times,
          mock.patch.object(module, "time", SimpleNamespace(perf_counter=now)),
          # beside a Qwen2 it expects Qwen's words
          mock.patch.object(common, "AutoTokenizer", PreTrainedTokenizerFast),
          mock.patch.object(module.Run, "save_checkpoint", side_effect=Enough),
          contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO())):
        module.main(module.Args(**flags))
    lines = (Path(flags["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return times, [line for line in map(json.loads, lines) if line["phase"] == "train"]


def script(shape, device, where: Path, name: str, a_pass: int | None) -> dict:
    steps = shape["steps"]
    data = "dpo" if name == "dpo" else "prompts"
    prompt, new = shape["rollout"]
    flags = dict(model=str(where / "policy"), dataset=str(where / f"{data}.jsonl"),
                 eval_dataset=str(where / f"{data}_heldout.jsonl"),
                 output_dir=str(where / f"{name}-{a_pass}"), device=device, max_steps=steps,
                 micro_batch_size=a_pass, max_new_tokens=new)
    if name == "dpo":
        flags |= dict(batch_size=shape["pairs"], max_new_tokens=4)
    if name == "grpo":
        flags |= dict(batch_size=shape["prompts"], samples_per_prompt=shape["group"], beta=0.04,
                      kl_correction=True, eval_samples=1,
                      reward_fn=[f"{Path(__file__).resolve()}:sevens"])
    if name == "ppo_rlhf":
        flags |= dict(batch_size=shape["prompts"] * shape["group"], critic_warmup=0,
                      reward_model=str(where / "reward"), value_learning_rate=1e-6)
    times, lines = run_main(name, **flags)
    lines = lines[1:]  # the first is warm-up
    updates = len(times) // steps  # PPO: of several mini-batches
    row = {"rows_a_pass": a_pass or "default", "seconds": median_gap(times[updates - 1::updates])}
    for key in lines[0]:
        if key.endswith("tokens_per_s"):
            row[key] = statistics.median(line[key] for line in lines)
    if name != "dpo":
        new = statistics.median(line["length"] for line in lines)
        counted = {"rollout": new, "scoring": prompt + new, "update": prompt + new}
        phases = {phase: n / row[f"{phase}_tokens_per_s"] for phase, n in counted.items()}
        row |= {f"share_{phase}": seconds / sum(phases.values())
                for phase, seconds in phases.items()}
    return row


def mixed(shape, device, limits, where: Path, name: str) -> dict:
    """Lengths as in chats: every update has rows, and kernels shapes, of its own."""
    words, steps, median = MODELS[shape["mixed_model"]][-1], shape["mixed_steps"], shape["median"]
    model = make_model(shape["mixed_model"], device)
    config = model.config
    # one token in 505 is a stop token, so lengths are geometric with this median
    stops = range(1, words, round(median / math.log(2)))
    model.generation_config.eos_token_id = list(stops)
    model.to(torch.bfloat16).save_pretrained(where / "mixed")
    word_tokenizer(words).save_pretrained(where / "mixed")
    del model
    flags = dict(model=str(where / "mixed"), dataset=str(where / f"mixed_{name}.jsonl"),
                 eval_dataset=str(where / "mixed_heldout.jsonl"), output_dir=str(where / name),
                 device=device, max_steps=steps, max_length=5 * median)
    lengths = torch.empty(shape["rows"] * steps).log_normal_(math.log(median), 0.7)
    lengths = lengths.clamp(4, 4 * median).long().tolist()
    rows = [{"prompt": random_text(words, n // 4), "completion": random_text(words, n - n // 4)}
            for n in lengths]
    write_rows(where / f"mixed_{name}.jsonl", rows)
    write_rows(where / "mixed_heldout.jsonl", rows[:2])
    if name == "sft":
        flags |= dict(batch_size=shape["rows"], max_new_tokens=4)
    else:
        flags |= dict(batch_size=shape["prompts"], samples_per_prompt=shape["group"],
                      max_new_tokens=4 * median, eval_samples=1,
                      reward_fn=[f"{Path(__file__).resolve()}:sevens"])
    times, lines = run_main(name, **flags)
    seconds = [after - before for before, after in zip(times, times[1:])]
    row = {"seconds": statistics.median(seconds),
           "slowest": max(seconds),  # a plan that is built, or a cache that grows
           "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines[1:])}
    if name == "sft":
        flops = sum(3 * forward_flops(config, n // 4, [n - n // 4 + 1], head=True) for n in lengths)
        row["mfu"] = flops / steps / statistics.mean(seconds) / limits["vendor_gemm"]
    else:
        for phase in ("rollout", "update"):
            key = f"{phase}_tokens_per_s"
            row[key] = statistics.median(line[key] for line in lines[1:])
        row["length"] = statistics.median(line["length"] for line in lines)
    return row


def trl(shape, device, where: Path, stage: str, passes: int) -> dict:
    import trl
    from datasets import Dataset
    whole = shape["pairs"] if stage == "dpo" else shape["prompts"] * shape["group"]
    flags = dict(output_dir=str(where / "trl"), per_device_train_batch_size=whole // passes,
                 use_cpu=device == "cpu", gradient_accumulation_steps=passes,
                 max_steps=shape["steps"], learning_rate=1e-6, max_grad_norm=1.0,
                 gradient_checkpointing=False, bf16=True, optim="adamw_torch_fused",
                 save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True)
    if stage == "dpo":
        trainer, config, more = trl.DPOTrainer, trl.DPOConfig, {}
        flags |= dict(precompute_ref_log_probs=True, max_length=sum(shape["pair"]))
    else:
        trainer, config, more = trl.GRPOTrainer, trl.GRPOConfig, {"reward_funcs": sevens}
        flags |= dict(num_generations=shape["group"], max_completion_length=shape["rollout"][1],
                      beta=0.04, loss_type="grpo", use_vllm=False)
    rows = (where / ("dpo.jsonl" if stage == "dpo" else "prompts.jsonl")).read_text().splitlines()
    rows = Dataset.from_list([json.loads(row) for row in rows])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(where / "policy")
    model = AutoModelForCausalLM.from_pretrained(where / "policy", dtype=torch.float32)
    with update_times() as times, contextlib.redirect_stdout(io.StringIO()):
        trainer(model=model, args=config(**flags), train_dataset=rows, processing_class=tokenizer,
                **more).train()
    return {"rows_a_pass": whole // passes, "seconds": median_gap(times)}


# --- all rows ---


def measure(results: dict, args, section: str, name: str, function, *inputs) -> dict:
    """One more row: what function(*inputs) returns, or its error."""
    row, began = {"section": section, "name": name}, time.time()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if began - args.began > 60 * args.minutes:
        row["error"] = f"left out: --minutes {args.minutes:g} are over"
    else:
        try:  # NaN: a limit is not known
            row |= {key: None if x != x else x for key, x in function(*inputs).items()}
        except (Exception, SystemExit) as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    row["took_s"] = time.time() - began
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after a kernel that failed
        torch.cuda.empty_cache()
    results["rows"].append(row)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{key} {shown(x)}" for key, x in row.items()), flush=True)
    return row


def shown(x) -> str:
    if not isinstance(x, float):
        return "-" if x is None else str(x)
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def tables(rows: list[dict]) -> None:
    for section in SECTIONS:
        good = [row for row in rows if row["section"] == section and "error" not in row]
        columns = list(dict.fromkeys(key for row in good for key in row if key != "section"))
        if good:
            print(f"\n{section}")
            print_table([columns, *([shown(row.get(key)) for key in columns] for row in good)])
    for row in rows:
        if "error" in row:
            print(f"\n{row['section']}, {row['name']}: {row['error']}")


def trl_section(results, args, shape, *inputs) -> None:
    results["trl"] = version("trl")
    for stage in ("dpo", "grpo"):
        for passes in (1, 2, 4, 8):  # until they fit into the memory
            row = measure(results, args, "trl", stage, trl, shape, *inputs, stage, passes)
            if "OutOfMemory" not in row.get("error", ""):
                break
        ours = [r["seconds"] for r in results["rows"]
                if (r["section"], r["name"]) == ("scripts", stage) and "seconds" in r]
        if ours and "seconds" in row:
            row["ratio"] = row["seconds"] / min(ours)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", choices=FULL["models"], default=FULL["models"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true",
                        help="tiny shapes, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=10,
                        help="after these, no further row is begun")
    parser.add_argument("--output", type=Path,
                        default=ROOT / "benchmarks" / "results" / "gpu.json")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.smoke:
        parser.error("no GPU: --smoke runs tiny shapes on a CPU")
    args.began, device = time.time(), args.device
    shape = SMOKE if args.smoke else FULL | {"models": args.models}
    results = {"device": device_name(device), "torch": torch.__version__,
               "transformers": version("transformers"), "shape": shape, "rows": []}
    limits = {"gemm": nan, "bandwidth": nan}
    limits["vendor_gemm"], limits["vendor_bandwidth"] = VENDOR.get(results["device"], (nan, nan))
    if "machine" in args.sections:
        row = measure(results, args, "machine", results["device"], machine, shape, device)
        if "error" not in row:
            limits["gemm"] = row["gemm_tflops"] * 1e12
            limits["bandwidth"] = max(row["copy_tb_s"], row["read_tb_s"]) * 1e12
    inputs = shape, device, limits
    for name in shape["models"]:
        wanted = itertools.product(("dpo", "reward"), shape["passes"][name])
        for stage, size in wanted if "training" in args.sections else ():
            measure(results, args, "training", f"{stage} {name}", training, *inputs, name, stage,
                    size)
    for name in shape["models"] if "decoding" in args.sections else ():
        for batch in shape["decoding_batches"]:
            measure(results, args, "decoding", name, decoding, *inputs, name, batch)
    with tempfile.TemporaryDirectory() as temporary:
        inputs = shape, device, Path(temporary)
        if {"scripts", "trl"} & set(args.sections):
            measure(results, args, "scripts", "files", prepare, *inputs)
        passes = {"dpo": (None, shape["pairs"]), "grpo": shape["rollout_passes"],
                  "ppo_rlhf": shape["rollout_passes"]}
        for name in passes if "scripts" in args.sections else ():
            for size in passes[name]:
                measure(results, args, "scripts", name, script, *inputs, name, size)
        for name in ("sft", "grpo") if "mixed" in args.sections else ():
            measure(results, args, "mixed", name, mixed, shape, device, limits, Path(temporary),
                    name)
        if "trl" in args.sections and importlib.util.find_spec("trl"):
            trl_section(results, args, *inputs)
        elif "trl" in args.sections:
            print("trl is not installed: no comparison with it")
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    tables(results["rows"])


if __name__ == "__main__":
    main()
