"""Each training script side by side with TRL: benchmarks/results/versus_trl.json and a table.

    pip install -r requirements.txt -r benchmarks/requirements.txt    # TRL 1.16
    python benchmarks/versus_trl.py                                   # all but PPO, 5 repeats
    python benchmarks/versus_trl.py --stages dpo --shapes 15M --repeats 1 --updates 4
    python benchmarks/versus_trl.py --stages sft reward dpo --shapes gpt2 --sides ours trl

PPO is compared with TRL 1.12.0, the last release that has a PPOTrainer, which wants an environment
of its own:

    python -m venv trl-ppo
    trl-ppo/bin/pip install -r requirements.txt -r benchmarks/requirements-ppo.txt
    python benchmarks/versus_trl.py --stages ppo --ppo-python trl-ppo/bin/python

The same for both sides: the models' weights, the rows, their batches and order, the token ids, the
number of updates, float32, AdamW (fused), the clipping of the gradient (TRL's PPO clips none), the
threads. Shapes: `15M` is a Llama of 288 x 6 with random weights and 32,000 words, prompts and
completions of 64 to 128 tokens (GRPO and PPO write 64), 8 demonstrations, 4 pairs, 2 prompts x 8
completions or, for PPO, 8 prompts per update; `tiny` is assets/tiny-sft on its own data with the
scripts' batches (GRPO: 32 sums x 16; PPO: 64 reviews of at most 32 tokens, which end where they
end, on each side where its own draws do); `gpt2` is GPT-2 small, 124M random weights and 50,257
words, with 4 demonstrations or 2 pairs. GRPO has beta 0.04, so a reference, and one update per
rollout. PPO's reward model and critic have the policy's shape and start from the same weights
(tiny: assets/tiny-rm); a step is a rollout and 4 epochs of one mini-batch, TRL's default: 4 updates
of policy and critic.

What is timed: a process imports the script (or makes TRL's trainer) and runs its own main (or
train()); a hook on AdamW notes the time of each update, for PPO of each step's last. Between two of
them lies all that the loop does for one: batch, padding, rollout, rewards, reference, forward,
backward, clipping, AdamW, logging. The interval after the first is dropped as warm-up; the mean of
the others is a run's time. Start-up, loading and evaluations are outside. dpo.py computes the
reference's log-probabilities before training: that time, per pair, is added (one epoch: nothing is
saved by its being done once). Peak memory is VmHWM of the whole process from its start to its last
update: imports, models, and on our side the evaluation before training. The sides alternate, and
the ratio is the median of the ratios of neighbours; cpu_ratio is that of processor seconds,
steadier on a busy machine. SFT's and DPO's first losses, and DPO's first log-probabilities, must
agree to 0.1%: the work is the same. PPO's sides draw their own samples; at 15M all have 64 tokens
(one in 500 samples meets an EOS), so there the work is the same, too.

TRL's settings, the fastest that were found on a CPU: gradient_checkpointing=False (its default,
True, computes the forward pass twice), float32 (bfloat16, torch_compile, a static cache and
continuous batching were slower when tried), adamw_torch_fused, the whole batch in one forward pass,
DPO's reference in the step (precomputed it costs the same once), GRPO's generation by transformers
with its dynamic cache; vLLM and Liger kernels need a GPU. PPO's rollout, too, is one batch
(local_rollout_forward_batch_size), and it generates no samples to look at
(num_sample_generations=0). On CPUs TRL 1.16 scores all positions, on GPUs only the labelled ones;
`labelled` is TRL with that switch patched on for the CPU too (there is none for rewards and PPO).

share of peak: necessary FLOPs / time / the GEMM rate (2048^3, float32) that the same process
reached right afterwards; cpu_share: both in processor seconds, which mean something on one thread.
Necessary: each prompt through the trunk once for all its completions, each completion token through
trunk and head once, causal attention; a backward pass is two forward passes: SFT and reward are 3
forward passes in all, DPO 4 (reference), GRPO 5 (rollout, reference, update), PPO 14 of the policy
(rollout, reference, 4 epochs of 3) and 14 of a trunk without head (values, reward, 4 epochs of 3).
"""

import argparse
import importlib
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
STAGES, SHAPES = ("sft", "reward", "dpo", "grpo", "ppo"), ("15M", "tiny", "gpt2")
SIDES = ("ours", "trl", "trl_labelled")
BATCH = {"15M": {"sft": 8, "reward": 4, "dpo": 4, "grpo": 2, "ppo": 8},
         "tiny": {"sft": 64, "reward": 32, "dpo": 32, "grpo": 32, "ppo": 64},
         "gpt2": {"sft": 4, "reward": 2, "dpo": 2}}
GROUP = {"15M": 8, "tiny": 16}
NEW_TOKENS = {"15M": {"grpo": 64, "ppo": 64}, "tiny": {"grpo": 8, "ppo": 32}, "gpt2": {}}
WORDS = {"15M": 32000, "gpt2": 50257}
DATA = {"sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons",
        "grpo": "sum_prompts", "ppo": "review_prompts"}
FORWARD_PASSES = {"sft": 3, "reward": 3, "dpo": 4, "grpo": 5, "ppo": 14}
PPO_EPOCHS, EVAL_ROWS = 4, 8


# --- model and data ---


def make_model(directory: Path, shape: str) -> None:
    """Random weights, and a tokenizer for which each of WORDS words is a token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
    torch.manual_seed(0)
    ids = dict(vocab_size=WORDS[shape], bos_token_id=None, eos_token_id=1, pad_token_id=0)
    if shape == "gpt2":  # TRL's SFT leaves dropout on: none here, so that both sides do the same
        config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids)
    else:
        config = LlamaConfig(hidden_size=288, intermediate_size=768, num_hidden_layers=6,
                             num_attention_heads=6, num_key_value_heads=6,
                             max_position_embeddings=512, tie_word_embeddings=True, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    pieces = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, WORDS[shape]))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    words.save_pretrained(directory)


def make_reward_model(directory: Path, policy: Path) -> None:
    """PPO's: the policy's weights with a random head of one label."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(policy).save_pretrained(directory)


def make_rows(stage: str, shape: str, number: int) -> list[dict]:
    if shape == "tiny":
        rows = (ROOT / "assets" / "data" / f"{DATA[stage]}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in random.Random(0).sample(rows, number)]
    draw = random.Random(0)

    def text():
        length = draw.randrange(64, 129)
        return "".join(f" w{draw.randrange(2, WORDS[shape])}" for _ in range(length))

    columns = {"sft": ["completion"], "grpo": [], "ppo": []}.get(stage, ["chosen", "rejected"])
    return [{"prompt": text().strip(), **{column: text() for column in columns}}
            for _ in range(number)]


def even_words(prompts, completions, **columns) -> list[float]:
    """GRPO's reward at 15M: the share of words with an even number."""
    numbers = [[int(n) for n in re.findall(r"w(\d+)", text)] for text in completions]
    return [sum(n % 2 == 0 for n in row) / 64 for row in numbers]


def reward_spec(shape: str) -> str:
    if shape == "15M":
        return f"{__file__}:even_words"
    return f"{ROOT / 'assets' / 'rewards.py'}:correct_sum"


def prepare(stage: str, shape: str, updates: int, temporary: str) -> Path:
    """A directory with (links to) the model, for PPO a reward_model, train.jsonl and eval.jsonl."""
    where = Path(temporary) / f"{stage}-{shape}"
    where.mkdir()
    model = ROOT / "assets" / "tiny-sft" if shape == "tiny" else Path(temporary) / shape
    if not model.exists():
        make_model(model, shape)
    (where / "model").symlink_to(model)
    if stage == "ppo" and shape == "tiny":
        (where / "reward_model").symlink_to(ROOT / "assets" / "tiny-rm")
    elif stage == "ppo":
        make_reward_model(where / "reward_model", model)
    rows = make_rows(stage, shape, updates * BATCH[shape][stage] + EVAL_ROWS)
    for name, part in (("train", rows[:-EVAL_ROWS]), ("eval", rows[-EVAL_ROWS:])):
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return where


# --- one side, one process ---


def peak_mb() -> float:  # not ru_maxrss, which a process inherits from the one that started it
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Clock:
    """When each AdamW step of this process ended, in wall-clock and processor seconds, and the peak
    memory by then. every: PPO's steps are several of AdamW's, and only their last one is noted."""

    def __init__(self, every: int = 1):
        from torch.optim.optimizer import register_optimizer_step_post_hook
        self.times, self.peak_mb, self.every, self.ticks = [], 0.0, every, 0
        register_optimizer_step_post_hook(self.tick)

    def tick(self, *_):
        self.ticks += 1
        if self.ticks % self.every:
            return
        self.times.append((time.perf_counter(), time.process_time()))
        self.peak_mb = peak_mb()

    def result(self, before=(0.0, 0.0)) -> dict:
        """Means per update; `before`: what it needed before training."""
        means = [(last - first) / (len(self.times) - 2) + earlier
                 for first, last, earlier in zip(self.times[1], self.times[-1], before)]
        return {"seconds": means[0], "cpu_seconds": means[1], "peak_mb": self.peak_mb}


def run_ours(stage: str, shape: str, where: Path, updates: int) -> dict:
    name = {"reward": "reward_model", "ppo": "ppo_rlhf"}.get(stage, stage)
    script, batch = importlib.import_module(name), BATCH[shape][stage]
    flags = dict(model=str(where / "model"), dataset=str(where / "train.jsonl"),
                 eval_dataset=str(where / "eval.jsonl"), output_dir=str(where / "ours"),
                 batch_size=batch, max_steps=updates, eval_every=10**6, save_every=10**6,
                 learning_rate=1e-5, max_grad_norm=1.0, device="cpu", dtype="float32")
    if stage != "reward":  # SFT and DPO write only in their evaluations
        flags |= dict(max_new_tokens=NEW_TOKENS[shape].get(stage, 8))
    if stage == "grpo":
        flags |= dict(samples_per_prompt=GROUP[shape], beta=0.04, kl_correction=True,
                      eval_samples=2, reward_fn=[reward_spec(shape)])
    if stage == "ppo":
        flags |= dict(reward_model=str(where / "reward_model"), value_learning_rate=1e-5,
                      beta=0.05, ppo_epochs=PPO_EPOCHS, mini_batches=1, critic_warmup=0)
    of_reference = (0.0, 0.0)  # seconds and processor seconds per update
    if stage == "dpo":
        add_reference_logprobs = script.add_reference_logprobs

        def timed(reference, pairs, args):
            nonlocal of_reference
            add_reference_logprobs(reference, pairs[:4], args)  # kernels are loaded
            began, cpu_began = time.perf_counter(), time.process_time()
            add_reference_logprobs(reference, pairs, args)
            ended, cpu_ended = time.perf_counter(), time.process_time()
            updates_in_it = len(pairs) / batch
            of_reference = (ended - began) / updates_in_it, (cpu_ended - cpu_began) / updates_in_it

        script.add_reference_logprobs = timed
    clock = Clock(PPO_EPOCHS if stage == "ppo" else 1)
    script.main(script.Args(**flags))
    lines = (where / "ours" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    first, *others = [line for line in lines if line["phase"] == "train"]
    return {**clock.result(of_reference), "loss": first["loss"],
            "chosen_logps": first.get("chosen_logps"),
            "length": statistics.mean(line.get("length", 0) for line in others)}


def run_trl(stage: str, shape: str, where: Path, updates: int, labelled_only: bool) -> dict:
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from harness import batches
    if labelled_only:  # asked in one place of this module: whether to score labelled positions only
        trl.trainer.utils._use_triton = lambda device: True
    batch = BATCH[shape][stage]
    rows = [json.loads(line) for line in (where / "train.jsonl").read_text().splitlines()]
    plan = batches(len(rows), batch, 1, updates, seed=0)
    rows = [rows[i] for indices in plan for i in indices]  # in our order
    flags = dict(output_dir=str(where / "trl"), per_device_train_batch_size=batch,
                 max_steps=updates, learning_rate=1e-5, max_grad_norm=1.0,
                 gradient_checkpointing=False, bf16=False, use_cpu=True, optim="adamw_torch_fused",
                 train_sampling_strategy="sequential", dataloader_pin_memory=False,
                 save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True)
    if stage == "ppo":
        return run_trl_ppo(shape, where, rows, flags)
    more = {}
    if stage == "grpo":
        file, name = reward_spec(shape).rsplit(":", 1)
        spec = importlib.util.spec_from_file_location("rewards", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        more["reward_funcs"] = getattr(module, name)
        flags |= dict(num_generations=GROUP[shape], beta=0.04, loss_type="grpo",
                      per_device_train_batch_size=batch * GROUP[shape], shuffle_dataset=False,
                      max_completion_length=NEW_TOKENS[shape][stage])
    name = {"sft": "SFT", "reward": "Reward", "dpo": "DPO", "grpo": "GRPO"}[stage]
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    labels = {"num_labels": 1} if stage == "reward" else {}
    model = kind.from_pretrained(where / "model", dtype=torch.float32, **labels)
    tokenizer = AutoTokenizer.from_pretrained(where / "model")
    trainer, config = getattr(trl, name + "Trainer"), getattr(trl, name + "Config")
    trainer = trainer(model=model, args=config(**flags), train_dataset=Dataset.from_list(rows),
                      processing_class=tokenizer, **more)
    clock = Clock()
    trainer.train()
    first = trainer.state.log_history[0]
    return clock.result() | {"loss": first["loss"], "chosen_logps": first.get("logps/chosen"),
                             "trl": trl.__version__}


def run_trl_ppo(shape: str, where: Path, rows: list[dict], flags: dict) -> dict:
    import trl
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM as Policy
    from transformers import AutoModelForSequenceClassification as Score
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    tokenizer = AutoTokenizer.from_pretrained(where / "model", padding_side="left")
    rows = [{"input_ids": tokenizer(row["prompt"]).input_ids} for row in rows]
    batch, tokens = flags["per_device_train_batch_size"], NEW_TOKENS[shape]["ppo"]
    args = PPOConfig(**flags, total_episodes=len(rows), num_ppo_epochs=PPO_EPOCHS, kl_coef=0.05,
                     num_mini_batches=1, local_rollout_forward_batch_size=batch,
                     num_sample_generations=0, response_length=tokens, stop_token="eos",
                     missing_eos_penalty=1.0, temperature=1.0)
    policy, reference = [Policy.from_pretrained(where / "model", dtype="float32") for _ in range(2)]
    critic, reward = [Score.from_pretrained(where / "reward_model", dtype="float32")
                      for _ in range(2)]
    trainer = PPOTrainer(args=args, processing_class=tokenizer, model=policy, ref_model=reference,
                         reward_model=reward, value_model=critic, train_dataset=rows,
                         eval_dataset=rows[:1])
    # its own one shuffles
    trainer.dataloader = DataLoader(rows, batch_size=batch, collate_fn=trainer.data_collator)
    clock = Clock(PPO_EPOCHS)
    trainer.train()
    assert clock.ticks == PPO_EPOCHS * len(rows) // batch
    return clock.result() | {"trl": trl.__version__}


def gemm_rate() -> dict:
    """FLOP/s, and FLOP per processor second, of a product of two float32 matrices of 2048 x 2048:
    medians of 15."""
    import torch
    a, b, seconds, cpu_seconds = torch.randn(2048, 2048), torch.randn(2048, 2048), [], []
    for _ in range(18):
        began, cpu_began = time.perf_counter(), time.process_time()
        a @ b
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu_began)
    return {"gemm": 2 * 2048**3 / statistics.median(seconds[3:]),
            "cpu_gemm": 2 * 2048**3 / statistics.median(cpu_seconds[3:])}


def worker(side: str, stage: str, shape: str, where: str, updates: int) -> None:
    import torch
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if side == "ours":
        run = run_ours(stage, shape, Path(where), updates)
    else:
        run = run_trl(stage, shape, Path(where), updates, labelled_only=side == "trl_labelled")
    print("\n" + json.dumps(run | gemm_rate()))


# --- both, and tables ---


def necessary(stage: str, where: Path, length: float) -> tuple[float, float]:
    """-> (FLOPs, tokens) of all updates. length: of GRPO's and PPO's completions."""
    from common import encode_prompt, encode_row, load_tokenizer
    config = json.loads((where / "model" / "config.json").read_text())
    tokenizer = load_tokenizer(str(where / "model"))
    if "n_embd" in config:  # GPT-2, whose MLP has two matrices of 4 x width
        width, layers = config["n_embd"], config["n_layer"]
        attention_width, layer = width, 4 * width**2 + 8 * width**2
    else:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config.get("head_dim") or width // config["num_attention_heads"]
        attention_width = heads * config["num_attention_heads"]
        layer = (2 * width * attention_width + 2 * width * heads * config["num_key_value_heads"]
                 + 3 * width * config["intermediate_size"])
    head = 0 if stage == "reward" else width * config["vocab_size"]
    trunks = 2 if stage == "ppo" else 1
    group = GROUP[where.name.split("-")[1]] if stage == "grpo" else 1
    flops, tokens = 0.0, 0.0
    for line in (where / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = len(encode_prompt(tokenizer, row["prompt"]))
        lengths = [length] * group
        if stage not in ("grpo", "ppo"):
            names = [name for name in ("completion", "chosen", "rejected") if name in row]
            encoded = [encode_row(tokenizer, row["prompt"], row[name], []) for name in names]
            lengths = [sum(row.mask) for row in encoded]
        keys = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)  # that all queries meet
        trunk = 2 * layer * (prompt + sum(lengths)) + 4 * attention_width * keys
        flops += trunks * layers * trunk + 2 * head * sum(lengths)
        tokens += prompt * len(lengths) + sum(lengths)
    return flops * FORWARD_PASSES[stage], tokens


def measure(stage: str, shape: str, args, temporary: str) -> dict:
    sides = list(args.sides)
    if stage in ("reward", "ppo"):
        sides = [side for side in sides if side != "trl_labelled"]
    updates, runs = args.updates + 2, {side: [] for side in sides}
    where = prepare(stage, shape, updates, temporary)
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                   "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(side):
        python = args.ppo_python if (stage, side) == ("ppo", "trl") else sys.executable
        command = [python, __file__, "--worker", side, stage, shape, str(where), str(updates)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    for repeat in range(args.repeats):
        for side in sides[::-1] if repeat % 2 else sides:
            runs[side].append(run(side))
    for key in ("loss", "chosen_logps") if stage in ("sft", "dpo") else ():
        ours, theirs = runs["ours"][0][key], runs["trl"][0][key]
        agree = ours is None or abs(ours - theirs) <= 1e-3 * abs(theirs)
        assert agree, (stage, shape, key, ours, theirs)

    def median(side, key):
        return statistics.median(run[key] for run in runs[side])

    def ratios(side, key="seconds"):
        return [theirs[key] / ours[key] for ours, theirs in zip(runs["ours"], runs[side])]

    flops, tokens = necessary(stage, where, median("ours", "length"))

    def share(side, key, rate):
        return statistics.median(flops / updates / run[key] / run[rate] for run in runs[side])

    samples = BATCH[shape][stage] * (GROUP[shape] if stage == "grpo" else 1)
    row = {"stage": stage, "shape": shape, "trl": runs["trl"][0]["trl"],
           "device": f"cpu, {args.threads} threads", "ratio": statistics.median(ratios("trl")),
           "ratio_low": min(ratios("trl")), "ratio_high": max(ratios("trl")),
           "cpu_ratio": statistics.median(ratios("trl", "cpu_seconds"))}
    for side in sides:
        name = {"trl": "theirs", "trl_labelled": "theirs_labelled"}.get(side, side)
        seconds = median(side, "seconds")
        row |= {name: samples / seconds, f"tokens_per_s_{name}": tokens / updates / seconds,
                f"seconds_{name}": seconds, f"cpu_seconds_{name}": median(side, "cpu_seconds"),
                f"peak_mb_{name}": median(side, "peak_mb"),
                f"share_of_peak_{name}": share(side, "seconds", "gemm"),
                f"cpu_share_of_peak_{name}": share(side, "cpu_seconds", "cpu_gemm")}
    if "trl_labelled" in sides:
        row["ratio_labelled"] = statistics.median(ratios("trl_labelled"))
        row["cpu_ratio_labelled"] = statistics.median(ratios("trl_labelled", "cpu_seconds"))
    return row | {"gemm_gflops": median("ours", "gemm") / 1e9, "samples_an_update": samples,
                  "repeats": args.repeats, "updates": args.updates}


def table(rows: list[dict]) -> str:
    lines = ["| stage | shape | ours / TRL | range | ours / TRL labelled only "
             "| samples/s ours, TRL | tokens/s ours, TRL | peak MB ours, TRL "
             "| share of GEMM peak ours, TRL |", "|" + "---|" * 9]
    for row in rows:
        labelled = f"{row['ratio_labelled']:.2f}×" if "ratio_labelled" in row else "–"
        lines.append(f"| {row['stage']} | {row['shape']} | **{row['ratio']:.2f}×** "
                     f"| {row['ratio_low']:.2f}–{row['ratio_high']:.2f} | {labelled} "
                     f"| {row['ours']:.1f}, {row['theirs']:.1f} "
                     f"| {row['tokens_per_s_ours']:,.0f}, {row['tokens_per_s_theirs']:,.0f} "
                     f"| {row['peak_mb_ours']:,.0f}, {row['peak_mb_theirs']:,.0f} "
                     f"| {row['share_of_peak_ours']:.0%}, {row['share_of_peak_theirs']:.0%} |")
    return "\n".join(lines)


def main(args) -> None:
    from importlib.metadata import version
    path = args.output
    results = json.loads(path.read_text()) if path.exists() else {"versus_trl": []}
    results |= {name: version(name) for name in ("torch", "transformers", "trl")}
    if "ppo" in args.stages and not args.ppo_python:
        print("ppo: skipped: TRL 1.12.0 wants an environment of its own, see --help")
        args.stages.remove("ppo")
    with tempfile.TemporaryDirectory() as temporary:
        for stage in args.stages:
            for shape in (shape for shape in args.shapes if stage in BATCH[shape]):
                row = measure(stage, shape, args, temporary)
                for key, value in row.items():
                    print(key, f"{value:.4g}" if isinstance(value, float) else value, end=" ")
                print(flush=True)
                rows = [r for r in results["versus_trl"]
                        if (r["stage"], r["shape"]) != (stage, shape)]
                rows.append(row)
                rows.sort(key=lambda r: (STAGES.index(r["stage"]), r["shape"]))
                results["versus_trl"] = rows
                path.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + table(results["versus_trl"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:6], int(sys.argv[6]))
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["15M", "tiny"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES),
                        help="ours and trl at least")
    parser.add_argument("--ppo-python",
                        help="python of an environment with TRL 1.12.0; without it PPO is skipped")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=3,
                        help="timed updates per run; two more come before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path,
                        default=ROOT / "benchmarks" / "results" / "versus_trl.json")
    main(parser.parse_args())

