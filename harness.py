"""What a reader of the scripts may skip: flags, errors, data, rewards, run directory, tables."""

import asyncio
import contextlib
import copy
import csv
import ctypes
import fcntl
import gzip
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_type_hints

import common  # first: it keeps transformers quiet
import numpy
import pyarrow.parquet  # comes with datasets
import torch
import torch.distributed as dist
import tyro
from common import UserError, all_reduce, encode_prompt, encode_row, load_model, load_tokenizer
from common import make_row, rank, window
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc gives large tensors back to the system, and then pays for every page of the next one:
    # a quarter of the time of a DPO update at 15M parameters. Up to 128 MB it shall keep them.
    ctypes.CDLL(None).mallopt(-3, 2**27)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

ASSETS = Path(__file__).resolve().parent / "assets"  # the embedded world; copied scripts lack it
GOLD = f"{ASSETS / 'rewards.py'}:sentiment"

# --- flags ---

POSITIVE = (lambda x: 0 < x < math.inf, "a number greater than 0")
Count = Annotated[int, POSITIVE]
Positive = Annotated[float, POSITIVE]
NonNegative = Annotated[float, (lambda x: 0 <= x < math.inf, "a number, at least 0")]
Share = Annotated[float, (lambda x: 0 <= x <= 1, "a number from 0 to 1")]


@dataclass
class RunArgs:
    """What is the same in every script."""

    output_dir: str = "runs"
    """directory for everything that the run writes"""
    max_length: Count | None = None
    """tokens per row, prompt and completion; default: the model's window, at most 1,024"""
    micro_batch_size: Count | None = None
    """rows (or pairs) per forward pass; default: as many as fit into 4,096 tokens"""
    reward_timeout: Positive = 300.0
    """seconds that one call of a reward function may take"""
    save_every: Count = 50
    """steps between checkpoints"""
    resume: bool = False
    """continue from the checkpoint in --output-dir"""
    seed: int = 0
    """seed of data order and sampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of forward passes; auto: bfloat16 autocast on GPUs, else float32"""
    replicas: Count = 1
    """under torchrun: copies of the model, each divided among as many processes"""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's chat template"""
    tensorboard: bool = False
    """also write TensorBoard events"""


@dataclass
class TrainArgs(RunArgs):
    """What is the same in every script that trains."""

    split: str = "train"
    """split of --dataset, or a part of it such as train[:1000]"""
    eval_dataset: str | None = None
    """held-out data of the same kind; default: a tenth of the prompts of --dataset, at most 500"""
    eval_split: str = "test"
    """split of --eval-dataset"""
    eval_prompts: Count = 500
    """held-out prompts (comparisons, demonstrations) per evaluation"""
    max_steps: Count | None = None
    """number of steps, whatever --epochs says"""
    max_grad_norm: Positive = 1.0
    """norm that gradients are clipped to"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    lora_rank: Annotated[int, (lambda x: x >= 0, "0 or a rank")] = 0
    """train adapters of this rank instead of all weights, at about ten times the learning rate"""
    lora_alpha: Positive | None = None
    """the adapters' output is multiplied by alpha / rank; default: the rank"""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the saved weights; bfloat16 loses most updates of a real model"""


def check_numbers(args) -> None:
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        for kind in (hint, *get_args(hint)):
            notes = getattr(kind, "__metadata__", ())
            for holds, what in (note for note in notes if isinstance(note, tuple)):  # not tyro's
                value = getattr(args, name)
                if value is not None and not holds(value):
                    raise UserError(f"--{name.replace('_', '-')} {value}: give {what}")


# --- errors ---


def run_script(main, args_class) -> None:
    """Parse the command line, call main(args), and print a user's mistake as one line."""
    fields = args_class.__dataclass_fields__
    for name in TrainArgs.__dataclass_fields__:  # --help lists the algorithm's flags first
        if name in fields:
            fields[name] = fields.pop(name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")  # whatever the locale
    store = None
    try:
        args = tyro.cli(args_class, description=sys.modules[args_class.__module__].__doc__)
        check_numbers(args)
        if hasattr(args, "device") and dist.is_torchelastic_launched():
            store = join_processes(args.device)
        main(args)
        if torch.cuda.is_available():
            print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        message = "interrupted: --resume continues from the last checkpoint"
    except Exception as error:
        message = explain(error)
        lost = store and store.add("mistakes", 0)  # another process has ended, and said why
        if message is None and not lost:
            raise
    if store is None or store.add("mistakes", 1) == 1:  # of many processes, the first to see it
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def explain(error: Exception) -> str | None:
    """What went wrong and how to fix it; None for a fault of the program's own."""
    smaller = "lower --micro-batch-size or --max-length, or pass --gradient-checkpointing"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {smaller}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return f"out of memory: {smaller}"
    for cause in (error, error.__context__):  # torch.save hides the cause behind its own error
        if any(what in str(cause) for what in ("No space left", "File too large", "quota")):
            return f"{cause}: free the space, or choose another --output-dir"
    return str(error) if isinstance(error, OSError) else None


def join_processes(device: str):
    """Find the other processes that torchrun started. Only the first one prints."""
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")
    gpu = common.pick_device(device).type == "cuda"
    store, own_rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=own_rank,
                            world_size=size)
    return store


def is_embedded(args) -> bool:
    """Whether the data is the embedded world's; its held-out rows are then the default."""
    if Path(args.dataset).resolve() != Path(type(args).dataset):
        return False
    args.eval_dataset = args.eval_dataset or args.dataset.replace(".jsonl", "_heldout.jsonl")
    return True


# --- data files ---


class Example(dict):
    """A data row, its columns by name. `where` it stands in the user's file begins every message
    about it."""

    where = "row"


FILES = r"(?i)\.(jsonl|json|csv|parquet)(\.gz)?$"


def load_rows(name: str, split: str = "train", flag: str = "--dataset") -> list[Example]:
    """A Hub id, id:config, or a local .jsonl, .json, .csv (also .gz) or .parquet file, or a
    directory -> the rows of a split, or of a part of it such as train[:100]."""
    parsed = re.fullmatch(r"([\w.-]*)(?:\[(-?\d*)(%?):(-?\d*)(%?)\])?", split)
    if parsed is None:
        raise UserError(f"{flag} {name}: {split!r} is no split: give one such as train[:100]")
    wanted, first, first_unit, last, last_unit = parsed.groups()
    splits = find_splits(Path(name), flag)
    if len(splits) == 1:
        wanted = next(iter(splits))
    if wanted not in splits:
        raise UserError(f"{flag} {name}: no split {wanted!r}: choose one of {', '.join(splits)}")
    if isinstance(splits[wanted], list):
        rows = [row for file in splits[wanted] for row in read_file(file, f"{flag} {file}")]
    else:
        rows = numbered(splits[wanted], f"{flag} {name}")
    bounds = []
    for bound, unit in ((first, first_unit), (last, last_unit)):
        bound = int(bound) if bound else None
        bounds.append(len(rows) * bound // 100 if bound is not None and unit else bound)
    rows = rows[slice(*bounds)]
    if not rows:
        raise UserError(f"{flag} {name}: has no rows in {split}")
    digest = hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()
    common.FINGERPRINTS[f"{flag} {name}"] = digest
    return rows


def find_splits(path: Path, flag: str) -> dict:
    """A path or a Hub id -> its splits by name, each a list of files or a datasets.Dataset."""
    if path.is_file() and re.search(FILES, path.name):
        return {"train": [path]}
    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    splits = defaultdict(list)
    if path.is_dir() and not saved:
        for file in sorted(path.iterdir()):  # train.jsonl, train-00000-of-00002.parquet ...
            if re.search(FILES, file.name):
                splits[re.split(r"[-_.]", file.name.lower())[0]].append(file)
    elif re.search(FILES, path.name):
        raise UserError(f"{flag} {path}: no such file")
    if splits:
        return splits
    import datasets  # here, because it is slow to import
    datasets.disable_progress_bars()
    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(*str(path).split(":", 1))
    except Exception as error:  # datasets raises many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{flag} {path}: cannot be read ({cause}): give a Hub id, id:config, or a "
                        ".jsonl, .json, .csv or .parquet file or directory")
    return found if isinstance(found, dict) else {"train": found}


def read_file(path: Path, where: str) -> list[Example]:
    """Its rows as they are written: no text becomes a number or a date."""
    kind = re.search(FILES, path.name)[1].lower()
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    csv.field_size_limit(2**31 - 1)
    try:
        if kind == "parquet":
            return numbered(pyarrow.parquet.read_table(path).to_pylist(), where)
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            if kind == "csv":
                return numbered(csv.DictReader(file, strict=True), where)
            text = file.read()
    except csv.Error as error:
        raise UserError(f"{where}: not a CSV file ({error}): check its quotes")
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:  # pyarrow's: ValueError
        raise UserError(f"{where}: cannot be read ({error}): write it anew, text as UTF-8")
    if kind == "json":
        with contextlib.suppress(json.JSONDecodeError):
            rows = json.loads(text)
            return numbered(rows if isinstance(rows, list) else [rows], where)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, line {number}: not JSON ({error}): fix or delete it")
    return numbered(rows, where)


def numbered(rows, where: str) -> list[Example]:
    examples = []
    for number, row in enumerate(rows, 1):
        if row is None:  # a blank line
            continue
        place = f"{where}, row {number}"
        if not isinstance(row, dict) or None in row:  # None: csv's name for fields too many
            raise UserError(f"{place}: {str(row)[:80]}: give every value the name of a column")
        example = Example({name: value for name, value in row.items() if value is not None})
        example.where = place
        examples.append(example)
    return examples


# --- rows to checked examples ---

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "observation": "tool", "function_response": "tool"}  # ShareGPT's


class Skip(Exception):
    """A row that cannot teach. It is left out and counted."""


def messages_of(value, name: str):
    """A text stays a text; messages (OpenAI's or ShareGPT's keys, or their JSON text) become
    [{"role", "content", ...}], contents as texts."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        with contextlib.suppress(json.JSONDecodeError):
            parsed = json.loads(value)
            if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in parsed):
                value = parsed
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(m, dict) for m in value):
        raise UserError(f"{name!r} is {str(value)[:40]!r}: give a text or a list of messages")
    if not value:
        raise Skip(f"{name!r} is empty")
    messages = []
    for message in value:
        message = {key: x for key, x in message.items() if x is not None}
        role = message.pop("from", None) or message.get("role")
        content = message.pop("value", None) or message.get("content", "")
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content):
                raise UserError(f"{name!r} has content that is no text: only texts can be read")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"a message of {name!r} needs a role and a text as content")
        messages.append({**message, "role": ROLES.get(role, role), "content": content})
    return messages


def column(row: Example, name: str):
    """The text or messages in a column, which must be there."""
    if row.get(name) is None:
        names = ", ".join(row) or "none"
        raise UserError(f"no {name!r} (columns: {names}): rename the column that holds it")
    return messages_of(row[name], name)


def conversational(prompt, *completions):
    """Prompt and completions, all texts or all messages: a text among messages is one turn."""
    if all(isinstance(x, str) for x in (prompt, *completions)):
        return prompt, *completions
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    as_turns = [[{"role": "assistant", "content": c}] if isinstance(c, str) else c
                for c in completions]
    if all(turns[:len(prompt)] == prompt for turns in as_turns):  # UltraFeedback repeats it
        as_turns = [turns[len(prompt):] for turns in as_turns]
    if not all(turns and turns[0]["role"] == "assistant" for turns in as_turns):
        raise Skip("no assistant turn")
    return prompt, *as_turns


def comparison(row: Example):
    """-> (prompt, chosen, rejected). Without a prompt column it is what both begin with: whole
    messages, a text up to its last "\\n\\nAssistant:" (Anthropic's HH), or whole words."""
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    if type(chosen) is not type(rejected):
        raise UserError("'chosen' and 'rejected' must both be texts or both be lists of messages")
    if chosen == rejected:
        raise Skip("chosen and rejected are identical")
    whole = isinstance(chosen, list) and chosen[:1] == rejected[:1] and isinstance(
        row.get("prompt"), (str, type(None)))  # both repeat the prompt, a system message before it
    if row.get("prompt") is not None and not whole:
        return conversational(column(row, "prompt"), chosen, rejected)
    pairs = enumerate(zip(chosen, rejected))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        turn = chosen[:shared].rfind("\n\nAssistant:")
        space = max(chosen[:shared].rfind(" "), chosen[:shared].rfind("\n"))
        shared = turn + len("\n\nAssistant:") if turn >= 0 else space
    if shared <= 0:
        raise UserError("'chosen' and 'rejected' share no prompt: add a 'prompt' column")
    return conversational(chosen[:shared], chosen[shared:], rejected[shared:])


def tools_of(row: Example):
    """The `tools` column, a list or its JSON text; None where it is absent or empty."""
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) and tools else tools) or None


@dataclass
class Limits:
    """What the model that reads the rows allows."""

    max_length: int
    vocabulary: int

    @classmethod
    def of(cls, args, model):
        max_length = args.max_length or min(window(model), 1024)
        if max_length > window(model):
            raise UserError(f"--max-length {max_length}: the window has {window(model)} tokens")
        return cls(max_length, model.get_input_embeddings().num_embeddings)

    def check(self, row, room: int):
        """The row, truncated where it is too long. room: tokens that must be left for sampling."""
        if max(row.ids) >= self.vocabulary:
            raise UserError(f"token {max(row.ids)} is none of the model's {self.vocabulary}: the "
                            "tokenizer is not the model's")
        first = row.mask.index(1) if 1 in row.mask else len(row.ids) + room - 1
        if first >= self.max_length:
            flag = "--max-length and --max-new-tokens" if room else "--max-length"
            raise Skip(f"the prompt leaves no room within {flag} ({self.max_length} tokens)")
        return type(row)(row.ids[:self.max_length], row.mask[:self.max_length])


def encode_examples(examples, encode, limits: Limits, room=0) -> list[tuple[Example, list]]:
    """-> [(example, rows)] by encode(example) -> rows. What cannot teach is skipped and counted;
    what is wrong is one line."""
    kept, skipped, truncated = [], {}, 0
    for example in examples:
        try:
            rows = encode(example)
            checked = [limits.check(row, room) for row in rows]
            kept.append((example, checked))
            truncated += rows != checked
        except Skip as reason:
            skipped.setdefault(str(reason), []).append(example.where)
        except UserError as error:
            raise UserError(f"{example.where}: {error}")
    reasons = [f"{len(places)} rows skipped: {reason} (first: {places[0]})"
               for reason, places in skipped.items()]
    if not kept:
        raise UserError(f"no row is left to learn from: {'; '.join(reasons)}")
    if truncated:
        reasons.append(f"{truncated} rows are truncated at {limits.max_length} tokens")
    for reason in reasons:
        print(reason, flush=True)
    return kept


def load_examples(args, encode, limits: Limits, room=0) -> tuple[list, list]:
    """-> training and held-out [(example, rows)]: --eval-dataset, or a tenth of the prompts of
    --dataset. No prompt is on both sides of that tenth."""
    encoded = encode_examples(load_rows(args.dataset, args.split), encode, limits, room)
    if not args.eval_dataset:
        return hold_out(encoded, args.seed)
    held_out = load_rows(args.eval_dataset, args.eval_split, "--eval-dataset")
    return encoded, encode_examples(held_out, encode, limits, room)


def hold_out(encoded: list, seed: int) -> tuple[list, list]:
    prompts = [json.dumps(example.get("prompt") or number, default=str)
               for number, (example, _) in enumerate(encoded)]
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise UserError("all rows have the same prompt, and one must be held out: give more rows, "
                        "or an --eval-dataset")
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed))
    size = max(1, min(500, len(different) // 10))
    chosen = {different[i] for i in order[:size].tolist()}
    train = [x for x, prompt in zip(encoded, prompts) if prompt not in chosen]
    return train, [x for x, prompt in zip(encoded, prompts) if prompt in chosen]


def load_prompts(args, model, tokenizer) -> tuple[list, list]:
    """-> training and held-out prompts that leave room for --max-new-tokens, [(example, ids)]."""
    def encode(example):
        example["prompt"] = column(example, args.prompt_column)
        ids = encode_prompt(tokenizer, example["prompt"], tools_of(example))
        return [make_row(ids, [])]

    train, held_out = load_examples(args, encode, Limits.of(args, model), args.max_new_tokens)
    train = [(example, row.ids) for example, (row,) in train]
    return train, different_prompts(held_out, args, model)


def load_different_prompts(args, model, tokenizer) -> list[tuple[Example, list[int]]]:
    """-> [(example, ids)] of --dataset; a prompt that occurs again is skipped and counted."""
    seen = set()

    def encode(example):
        example["prompt"] = column(example, "prompt")
        ids = encode_prompt(tokenizer, example["prompt"], tools_of(example))
        if tuple(ids) in seen:
            raise Skip("an earlier row has the same prompt")
        seen.add(tuple(ids))
        return [make_row(ids, [])]

    examples, limits = load_rows(args.dataset, args.split), Limits.of(args, model)
    encoded = encode_examples(examples, encode, limits, args.max_new_tokens)
    return [(example, row.ids) for example, (row,) in encoded]


def different_prompts(encoded, args, model) -> list[tuple[Example, list[int]]]:
    """The first --eval-prompts different prompts of [(example, rows)] that leave room for
    --max-new-tokens -> [(example, ids)]."""
    found, room = {}, window(model) - args.max_new_tokens
    for example, (row, *_) in encoded:
        ids = row.ids[:(row.mask + [1]).index(1)]  # a prompt alone has no 1
        if len(ids) <= room:
            found.setdefault(tuple(ids), (example, ids))
    if not found:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: no held-out prompt leaves so "
                        f"much room in the model's window of {window(model)} tokens: lower it")
    return list(found.values())[:args.eval_prompts]


def batches(num_rows: int, batch_size: int, epochs: float, max_steps, seed: int) -> list[list[int]]:
    """The indices of every update, shuffled anew each epoch: a function of the seed alone."""
    steps = max_steps or max(1, round(epochs * num_rows / batch_size))
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


# --- rewards ---


def load_function(flag: str, spec: str):
    """FILE.py:function -> the function. Its module sees its own directory first, and ours last:
    `import evaluate` then is the library."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"{flag} {spec}: no such file: give FILE.py:function")
    directory, stem, ours = Path(file).resolve().parent, Path(file).stem, ASSETS.parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ours] + [str(ours)]
    if directory != ours:
        sys.path.insert(0, str(directory))
    if stem in sys.modules:
        stem = f"user_{stem}"
    module_spec = importlib.util.spec_from_file_location(stem, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[stem] = module  # dataclasses and process pools look their module up
    try:
        with as_guest():
            module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise UserError(f"{flag} {spec}: {type(error).__name__}: {error}: fix the file")


@contextlib.contextmanager
def as_guest():
    """What a user's function changes is put back: random states, gradient mode, directory."""
    state, numpy_state = random.getstate(), numpy.random.get_state()
    grad_mode = torch.set_grad_enabled(torch.is_grad_enabled())
    try:
        with torch.random.fork_rng(devices=[]), grad_mode, contextlib.chdir("."):
            yield
    finally:
        random.setstate(state)
        numpy.random.set_state(numpy_state)


class TimedOut(BaseException):
    """Not an Exception: `except Exception` in a user's function must not swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float):
    """TimedOut in the main thread after so many seconds, and again until the function gives in."""
    finished, main = threading.Event(), threading.main_thread().ident

    def interrupt(*_):
        if not finished.is_set():
            raise TimedOut

    def watch(wait=seconds):
        while not finished.wait(wait):
            signal.pthread_kill(main, signal.SIGUSR1)
            wait = 0.1

    before, watcher = signal.signal(signal.SIGUSR1, interrupt), threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def call_user(flag: str, spec: str, function, arguments: dict, seconds: float) -> list:
    """A user's function on copies of its arguments -> its numbers, None for "not applicable"."""
    wanted = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in wanted):
        names = {p.name for p in wanted}
        arguments = {name: x for name, x in arguments.items() if name in names}
    try:
        with as_guest(), time_limit(seconds):
            values = function(**copy.deepcopy(arguments))
            if inspect.isawaitable(values):
                values = asyncio.run(values)
    except TimedOut:
        raise UserError(f"{flag} {spec}: no result within {seconds:g} seconds: make it faster, or "
                        "raise --reward-timeout")
    except Exception as error:
        raise UserError(f"{flag} {spec} raised {type(error).__name__}: {error}: fix the function")
    if isinstance(values, (torch.Tensor, numpy.ndarray)):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        kind = type(values).__name__
        raise UserError(f"{flag} {spec} returned a {kind}: return a list of numbers")
    return list(values)


def columns_of(examples: list[Example]) -> dict:
    """Further columns, which reach a user's function by their names."""
    reserved = {"prompt", "completion", "prompts", "completions", "completion_ids"}
    names = {name: None for example in examples for name in example if name not in reserved}
    return {name: [example.get(name) for example in examples] for name in names}


def as_turn(prompt, completion: str):
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def load_reward(args, spec=None, model_name=None, chat_template=None, optional=False):
    """-> reward(examples, completions, completion_ids=None) -> [n] fp32; None where neither a
    function nor a model is given. optional: NaN where the function says None."""
    if spec and model_name:
        raise UserError("--reward-fn and --reward-model: give one of them")
    if model_name:
        return reward_from_model(args, model_name, chat_template)
    return reward_from_function(args, spec, optional) if spec else None


def load_rewards(args, chat_template):
    """-> proxy, the reward that is trained on or chooses, and gold, which judges what that taught:
    --reward-model and --reward-fn, or twice the only one of them."""
    gold = load_reward(args, args.reward_fn)
    proxy = load_reward(args, None, args.reward_model, chat_template)
    if not (proxy or gold):
        raise UserError("no reward: give a --reward-model or a --reward-fn FILE.py:function")
    return proxy or gold, gold or proxy


def reward_from_function(args, spec: str, optional=False):
    """FILE.py:function in TRL's convention: f(prompts, completions, completion_ids, **columns) ->
    numbers. The first process calls it on the whole batch, so groups stay whole."""
    function, flag = load_function("--reward-fn", spec), "--reward-fn"

    def reward(examples, completions, completion_ids=None):
        if rank() > 0:
            return all_reduce(torch.zeros(len(examples)))
        prompts = [example["prompt"] for example in examples]
        turns = [as_turn(p, c) for p, c in zip(prompts, completions)]
        arguments = dict(columns_of(examples), prompts=prompts, completions=turns,
                         completion_ids=completion_ids, trainer_state=None)
        values = call_user(flag, spec, function, arguments, args.reward_timeout)
        if len(values) != len(examples):
            raise UserError(f"{flag} {spec} returned {len(values)} numbers for {len(examples)} "
                            "completions: return one for each")
        for i, (example, value) in enumerate(zip(examples, values)):
            if value is None and optional:
                values[i] = math.nan
            elif not isinstance(value, (int, float, numpy.number)) or not math.isfinite(value):
                raise UserError(f"{flag} {spec} returned {value!r} for {example.where}, completion "
                                f"{completions[i][:80]!r}: return a finite number")
        return all_reduce(torch.tensor(values, dtype=torch.float32))

    return reward


def reward_from_model(args, name: str, chat_template=None):
    """A sequence-classification model with one label and its own tokenizer. Its score is read at
    the last token by index: the stock head looks for pad, which may equal EOS."""
    model = load_model(name, args.device, args.dtype, AutoModelForSequenceClassification)
    tokenizer = load_tokenizer(name)
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise UserError(f"--reward-model {name}: has {model.config.num_labels} labels: a reward "
                        "model is a decoder with one, called `score`")
    common.shard(model, args)
    longest = window(model)

    @torch.no_grad()
    def reward(examples, completions, completion_ids=None):
        rows = []
        for example, completion in zip(examples, completions):
            prompt = example["prompt"]
            turn, stops = as_turn(prompt, completion), [tokenizer.eos_token_id]
            rows.append(encode_row(tokenizer, prompt, turn, stops, tools_of(example)))
            if len(rows[-1].ids) > longest:
                raise UserError(f"{example.where}: prompt and completion have {len(rows[-1].ids)} "
                                f"tokens, the window of --reward-model {name} is {longest}: lower "
                                "--max-length or --max-new-tokens")
        scores = score_all(model, rows, args.micro_batch_size)
        for example, score in zip(examples, scores.tolist()):
            if not math.isfinite(score):
                raise UserError(f"--reward-model {name}: its score of {example.where} is {score}")
        return scores

    return reward


@torch.no_grad()
def score_all(model, rows, micro_batch_size=None) -> torch.Tensor:
    """The scores of any number of rows -> [n] on the CPU."""
    scores, lengths = torch.zeros(len(rows), device=model.device), [len(row.ids) for row in rows]
    for group in common.micro_batches(lengths, micro_batch_size):
        states = common.states_at_end(model, [rows[i] for i in group])
        scores[group] = common.head_scores(model, states)
    return all_reduce(scores).cpu()


# --- evaluation ---


@dataclass
class HeldOut:
    """What policies are evaluated with: prompts, a judge, the reference and its completions."""

    prompts: list[tuple[Example, list[int]]]
    reward: object  # reward(examples, completions, completion_ids); None: only the KL is measured
    reference: torch.nn.Module
    tokenizer: object
    reference_samples: list[dict] | None = None  # of the first evaluation, before any update


def evaluate_policy(policy, held_out: HeldOut, args, step: int, policy_prompts=None):
    """One completion per held-out prompt -> (metrics, samples): KL(pi || pi_ref) in nats per
    completion and, where there is a reward, its mean and the win rate against the reference's
    completions. policy_prompts: ids for the policy, where it reads others than the reference."""
    examples, prompt_ids = zip(*held_out.prompts)
    with torch.random.fork_rng(devices=[]):  # an evaluation must not change what training draws
        torch.manual_seed(args.seed + 1000 * step)
        rollout = common.generate(policy, held_out.tokenizer, policy_prompts or prompt_ids, 1,
                                  args.max_new_tokens, args.temperature)
    ref_rows = [make_row(*ids) for ids in zip(prompt_ids, rollout.completion_ids)]
    how = args.micro_batch_size, args.temperature
    log_ratios = common.sequence_logprobs(policy, rollout.rows, *how)
    with common.adapters_off(held_out.reference):
        log_ratios -= common.sequence_logprobs(held_out.reference, ref_rows, *how)
    metrics = {"ended": rollout.ended.float().mean().item()}
    metrics["kl"], metrics["kl_se"] = mean_and_se(log_ratios)
    samples = []
    for example, text, ended in zip(examples, rollout.completions, rollout.ended.tolist()):
        prompt = example["prompt"]
        samples.append({"step": step, "prompt": prompt, "completion": text, "ended": ended})
    if held_out.reward:
        rewards = held_out.reward(examples, rollout.completions, rollout.completion_ids)
        for sample, reward in zip(samples, rewards.tolist()):
            sample["reward"] = reward
        before = [sample["reward"] for sample in held_out.reference_samples or samples]
        metrics["reward"], metrics["reward_se"] = mean_and_se(rewards)
        won = wins(rewards, torch.tensor(before))
        metrics["win_rate"], metrics["win_rate_se"] = mean_and_se(won)
        optimum = optimal_gain(args, metrics["kl"])
        if optimum:
            gain = metrics["reward"] - torch.tensor(before).mean().item()
            metrics["share_of_optimum"] = gain / optimum
    held_out.reference_samples = held_out.reference_samples or samples
    return metrics, samples


def optimal_gain(args, kl: float) -> float | None:
    """The most reward that any policy with this KL can gain, where assets/ knows it."""
    specs = args.reward_fn if isinstance(args.reward_fn, list) else [args.reward_fn or ""]
    gold = [str(Path(spec).resolve()) for spec in specs] == [GOLD]
    reference = Path(getattr(args, "reference", None) or args.model).resolve()
    if not gold or reference != ASSETS / "tiny-sft" or args.temperature != 1.0:
        return None
    from assets.frontier import gain_at
    return gain_at(kl)


def wins(rewards, others) -> torch.Tensor:
    """1 where the first has more, 1/2 for a tie."""
    return (rewards > others).double() + 0.5 * (rewards == others)


def mean_and_se(values: torch.Tensor) -> tuple[float, float | None]:
    """The standard error of one value is not known."""
    values, n = values.double(), len(values)
    return values.mean().item(), (values.std() / n**0.5).item() if n > 1 else None


def with_se(metrics: dict, name: str, form: str) -> str:
    if name not in metrics:
        return "-"
    error = metrics.get(f"{name}_se")
    return f"{metrics[name]:{form}}" + (f" ± {error:{form}}" if error is not None else "")


def report(run, evaluation: dict, samples: list[dict], held_out: HeldOut, who="trained") -> None:
    """Write results.json; print five pairs of completions, and reference and trained policy."""
    before, reward_ref = held_out.reference_samples, "-"
    ended = sum(sample["ended"] for sample in before) / len(before)
    if "reward" in evaluation:
        rewards = torch.tensor([sample["reward"] for sample in before]).double()
        sd = rewards.std().item() if len(rewards) > 1 else math.nan
        evaluation |= {"reward_ref": rewards.mean().item(), "reward_ref_sd": sd}
        reward_ref = f"{rewards.mean():.2f} (sd {sd:.2f})"
    table = {
        "policy": ("reference", who),
        "reward": (reward_ref, with_se(evaluation, "reward", ".2f")),
        "KL, nats": ("0", with_se(evaluation, "kl", ".2f")),
        "win rate": ("50%", with_se(evaluation, "win_rate", ".1%")),
        "ended": (f"{ended:.1%}", with_se(evaluation, "ended", ".1%")),
        "of the optimum": ("-", with_se(evaluation, "share_of_optimum", ".1%")),
    }
    known = {name: cells for name, cells in table.items() if cells[1] != "-"}
    run.write_results(**evaluation)
    for pair in list(zip(before, samples))[:5]:
        prompt = pair[0]["prompt"]
        print(f"\n{(prompt if isinstance(prompt, str) else prompt[-1]['content'])[-300:]}")
        for name, sample in zip(("reference", who), pair):
            reward = f"{sample['reward']:+.2f} " if "reward" in sample else ""
            print(f"  {name:9} {reward}|{sample['completion'][:400]}")
    print(f"\n{len(samples)} held-out prompts, one completion each:")
    print_table([list(known), *zip(*known.values())])
    print(f"saved to {run.dir}")


def print_table(rows: list[list]) -> None:
    """Rows of cells, the first one the header."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
             for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        padded = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print("  ".join([f"  {first:<{widths[0]}}", *padded]))


def speeds(rollout, times: list[float], updates: int = 1) -> dict:
    """Tokens per second of a step and its parts: times at the beginning, and after sampling,
    scoring and `updates` passes over the completions."""
    tokens = sum(len(ids) for ids, _ in rollout.rows)
    sampling, scoring, updating = [after - before for before, after in zip(times, times[1:])]
    return {
        "tokens_per_s": tokens / (times[-1] - times[0]),
        "rollout_tokens_per_s": rollout.completion_mask.sum().item() / sampling,
        "scoring_tokens_per_s": tokens / scoring,
        "update_tokens_per_s": tokens * updates / updating,
    }


def progress_bar(name: str, start: int, total: int) -> tqdm:
    return tqdm(range(start, total), initial=start, total=total, desc=name, file=sys.stdout,
                mininterval=0.5 if sys.stdout.isatty() else 10)


# --- run directory ---


class Run:
    """--output-dir: args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/, the model.
    A run that is killed and started again with --resume writes what it would have written."""

    LOGS = "metrics.jsonl", "samples.jsonl"
    WRITTEN = ("results.json", "config.json", "generation_config.json", "tokenizer.json",
               "tokenizer_config.json", "chat_template.jinja", "model*.safetensors*", "adapter/*",
               "best.jsonl", "pairs.jsonl", "battles.jsonl")
    FREE = ("resume", "device", "tensorboard", "output_dir", "micro_batch_size", "replicas",
            "gradient_checkpointing", "reward_timeout")  # flags that --resume may change

    def __init__(self, args):
        self.args, self.dir, self.started = args, Path(args.output_dir), time.time()
        self.checkpoint = self.dir / "checkpoint" / "state.pt"
        self.tensorboard, self.saved = None, None
        self.check_inputs()
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                self.lock = open(self.dir / ".lock", "w")
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output-dir {self.dir}: another run writes there: choose another")
        except OSError as error:
            raise UserError(f"--output-dir {self.dir}: {error.strerror}: choose one to write to")
        if args.resume:
            self.load_checkpoint()
        if args.tensorboard and rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: is not installed: pip install tensorboard")
            self.tensorboard = SummaryWriter(self.dir)

    def check_inputs(self) -> None:
        """The output directory is neither a model that is read, nor does it hold the data."""
        own = self.dir.resolve()
        for name, value in asdict(self.args).items():
            for path in value if isinstance(value, list) else [value]:
                if not isinstance(path, str) or name == "output_dir" or not os.path.exists(path):
                    continue
                inside = "dataset" in name and own in Path(path).resolve().parents
                if inside or own == Path(path).resolve():
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(f"--output-dir {self.dir}: {flag} {path} is read from there: "
                                    "choose another directory")

    def load_checkpoint(self) -> None:
        if not self.checkpoint.exists():
            raise UserError(f"--resume: {self.dir} holds no checkpoint: leave --resume out")
        before = json.loads((self.dir / "args.json").read_text())
        for name, value in without_nan(asdict(self.args)).items():
            if name not in self.FREE and before.get(name, value) != value:
                raise UserError(f"--resume: {self.dir} was started with --{name.replace('_', '-')} "
                                f"{before[name]}, now it is {value}: give the same flags")
        try:
            self.saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True,
                                    mmap=common.world_size() > 1)
        except Exception as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise UserError(f"--resume: {self.checkpoint} cannot be read ({cause}): start anew")

    def start(self, model, optimizer) -> tuple[int, dict]:
        """-> (steps done, the `memory` given to save_checkpoint), with model, optimizer, random
        states and files as they were then; (0, {}) at the beginning of a run."""
        state, self.saved = self.saved, None
        if state is None:
            if rank() == 0:
                for pattern in ("checkpoint/*", *self.WRITTEN):
                    for path in self.dir.glob(pattern):
                        path.unlink()
                for name in self.LOGS:
                    (self.dir / name).write_text("")
                write_json(self.dir / "args.json", asdict(self.args))
            return 0, {}
        for what, value in state["fingerprints"].items():
            if common.FINGERPRINTS.get(what, value) != value:
                raise UserError(f"--resume: {what} has changed since the run was started: "
                                "bring it back, or start anew")
        for name, length in state["lengths"].items():
            path = self.dir / name
            if rank() == 0 and (not path.exists() or path.stat().st_size < length):
                raise UserError(f"--resume: {path} is shorter than the checkpoint says: start anew")
            if rank() == 0:
                os.truncate(path, length)
        if optimizer:
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"], options=options)
            for name, parameter in model.named_parameters():
                if name not in state["optimizer"]["state"]:  # torch made its moments up
                    optimizer.state.pop(parameter, None)
        torch.set_rng_state(state["random"].clone())
        if "gpu_random" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["gpu_random"])
        print(f"resuming {self.dir} after step {state['step']}", flush=True)
        return state["step"], state["memory"]

    def log(self, step: int, phase: str, **metrics) -> None:
        self.write("metrics", {"step": step, "phase": phase, **metrics})
        if self.tensorboard:
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(f"{phase}/{name}", value, step)

    def write(self, name: str, *rows: dict) -> None:
        if rank() == 0:
            with open(self.dir / f"{name}.jsonl", "a") as file:
                file.writelines(json.dumps(without_nan(row)) + "\n" for row in rows)

    def save_checkpoint(self, step: int, model, optimizer, memory: dict) -> None:
        state = {"step": step, "memory": memory, "random": torch.get_rng_state(),
                 "fingerprints": dict(common.FINGERPRINTS)}
        if torch.cuda.is_available():
            state["gpu_random"] = torch.cuda.get_rng_state()
        if optimizer:
            common.reshard(model)
            options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True,
                                       cpu_offload=common.world_size() > 1)
            state["model"], state["optimizer"] = get_state_dict(model, optimizer, options=options)
        if rank() == 0:
            state["lengths"] = {name: (self.dir / name).stat().st_size for name in self.LOGS}
            write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def write_results(self, **results) -> None:
        results["seconds"] = time.time() - self.started
        if rank() == 0:
            write_json(self.dir / "results.json", results)

    def check_finite(self, step: int, metrics: dict, examples: list[Example]) -> None:
        numbers = {name: x for name, x in metrics.items() if "loss" in name or "grad_norm" in name}
        if all(math.isfinite(x) for x in numbers.values()):
            return
        saved = "there is no checkpoint yet"
        if self.checkpoint.exists():
            saved = f"the last good checkpoint is {self.checkpoint}"
        fix = "training diverged: lower --learning-rate" if step else "look at these rows"
        raise UserError(f"update {step + 1}: {numbers}, on {examples[0].where} and the "
                        f"{len(examples) - 1} others of its batch: {fix}; {saved}")


def without_nan(value):
    """As JSON has it, which knows neither NaN nor Infinity: null in their place."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def write_json(path: Path, value) -> None:
    write_atomically(path, json.dumps(without_nan(value), indent=1).encode())


def write_atomically(path: Path, data) -> None:
    """Bytes, or a function that writes them into a file: there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        if callable(data):
            data(file)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
