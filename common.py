"""What every script needs and none is about: models, log-probabilities, sampling, data, the run directory, errors.

Nothing here is algorithmic. Conventions, for all of it:

* A row is (ids, mask): prompt tokens, then completion tokens up to and including the stop token; the mask is 1 on the
  completion's. Rows of a batch are padded on the right to [B, T]: `input_ids`, `completion_mask`. Positions decide what
  is masked, never token ids: pad may equal EOS or be missing, and what fills the padding is never read.
* `logps` [B, T] holds at t the log-probability of the token *at* t given those before it (nats), 0 outside the mask.
* Master weights and reductions are fp32; on a GPU the forward passes run under bf16 autocast. Dropout is always off.
"""

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F
import transformers
import tyro
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

transformers.utils.logging.disable_progress_bar()

ASSETS = Path(__file__).resolve().parent / "assets"  # the embedded world; a copied script runs without it

# ------------------------------------------------------------------------------------------------- command line, errors


class UserError(Exception):
    """A mistake of the user's, told in one line that names the thing, the row and the mend. Exit status 2."""


def run_script(main, args_class) -> None:
    """Parse the command line into `args_class`, call main(args), and tell a user's mistake in one line on stderr."""
    try:
        main(parse_args(args_class))
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full disk, a read-only directory
        message = f"{error.filename or 'writing'}: {error.strerror or error}: free the space or choose another --output-dir"
    except torch.OutOfMemoryError:
        message = "out of GPU memory: lower --micro-batch-size or --max-length, or pass --gradient-checkpointing"
    except KeyboardInterrupt:
        message = "interrupted: the same command with --resume goes on from the last checkpoint"
    else:
        return
    print(f"{Path(sys.argv[0]).name}: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse_args(args_class):
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(args_class, description=sys.modules[args_class.__module__].__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        lines = [line.strip("│ ") for line in box.getvalue().splitlines() if line.startswith("│")]  # tyro's box, unframed
        raise UserError(" ".join(lines).split(" ──")[0] + " (see --help)")
    positive = ["learning_rate", "batch_size", "micro_batch_size", "epochs", "max_steps", "max_new_tokens", "eval_prompts",
                "temperature", "max_grad_norm"]
    bounds = {name: (0, math.inf) for name in positive} | {"max_length": (1, math.inf)}
    for name, value in vars(args).items():
        low, high = bounds.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low < value < high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number greater than {low}")
    return args


# ------------------------------------------------------------------------------------------------------ models, tokenizer


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}: use cpu, cuda or cuda:N")


def load_model(name: str, args, kind=AutoModelForCausalLM):
    """A Hub id or directory, as fp32 master weights on args.device, dropout off. It is saved in the dtype it came in."""
    device = pick_device(args.device)
    with hub_errors(f"--model {name}"):
        config = AutoConfig.from_pretrained(name)
        saved_dtype = config.dtype
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(config, key, 0.0)  # a policy with dropout is not the policy that sampled
        model = kind.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True)
    model.to(device).eval()
    model.saved_dtype = saved_dtype or torch.float32
    model.autocast_dtype = {"auto": torch.bfloat16 if device.type == "cuda" else None, "bfloat16": torch.bfloat16,
                            "float32": None}[args.dtype]
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only; every dropout is 0
    return model


def save_model(model, tokenizer, directory) -> None:
    """Write Hugging Face files, rounded to the dtype that the model came in; `model` keeps the rounded weights."""
    model.to(model.saved_dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model.float()


def load_tokenizer(name: str, chat_template: str | None = None):
    with hub_errors(f"--model {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no EOS token, so no completion could end: "
                        "set eos_token in its tokenizer_config.json")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"--chat-template {chat_template}: no such file; give a Jinja template")
        tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


@contextlib.contextmanager
def hub_errors(what: str):
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if isinstance(error, FileNotFoundError) or "local folder" in str(error) or "Hub" in str(error) or "hub" in str(error):
            raise UserError(f"{what}: neither a directory with what is needed here nor within reach on the Hub: check the name, "
                            "the network and HF_HUB_OFFLINE")
        raise UserError(f"{what}: cannot be loaded ({str(error).strip().splitlines()[0][:200]}): "
                        "a Hugging Face model with config.json, safetensors weights and tokenizer is needed")


def autocast(model):
    dtype = getattr(model, "autocast_dtype", None)
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: generation_config may list several (<|eot_id|>, <|im_end|> ...)."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, (list, tuple)) else [configured]
    return sorted({i for i in [*configured, tokenizer.eos_token_id] if i is not None})


def learning_rate_at(step: int, total_steps: int, peak: float, warmup: float = 0.1) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to 0."""
    warmup_steps = max(1, round(warmup * total_steps))
    return peak * min((step + 1) / warmup_steps, (total_steps - step) / max(1, total_steps - warmup_steps))


# ------------------------------------------------------------------------------------------------------ log-probabilities

LOGITS_AT_ONCE = 2**26  # elements of [rows, vocabulary] alive at a time: 256 MB in fp32


def token_logprobs(model, input_ids, attention_mask, completion_mask, temperature=1.0):
    """log p(token t | tokens < t) at the given temperature, for completion tokens -> [B, T] fp32, 0 elsewhere.

    input_ids, completion_mask [B, T]. attention_mask [B, T] may be None for rows padded on the right: causal attention
    then needs no mask, and the fast kernel is used. With a mask, positions count from each row's first real token.

    Logits exist only where a completion token is predicted, and only LOGITS_AT_ONCE of them at a time: a pre-hook takes
    the hidden states away from the model's head, which is then applied to the wanted ones, chunk by chunk, and again in
    the backward pass. Soft-capping and logit scales (Gemma 2, Cohere, Granite ...) are applied as the model would, which
    is checked against the model's own logits once.
    """
    wanted = completion_mask.bool().clone()
    wanted[:, 0] = False  # nothing predicts the first token
    head, states = model.get_output_embeddings(), []

    def take_hidden_states(module, inputs):
        states.append(inputs[0])
        return (inputs[0][:1, :1],)

    kwargs = {}
    if attention_mask is not None:
        kwargs = {"attention_mask": attention_mask, "position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}
    hook = head.register_forward_pre_hook(take_hidden_states)
    try:
        with autocast(model):
            own_logits = model(input_ids=input_ids, use_cache=False, **kwargs).logits[0, 0]  # [V]
    finally:
        hook.remove()
    if not getattr(model, "head_is_checked", False):
        with torch.no_grad(), autocast(model):
            if not torch.allclose(own_logits, logits_of(model, states[0][0, 0]), rtol=1e-3, atol=1e-3):
                raise UserError(f"{model.config.model_type}: this architecture changes its logits in a way that logits_of() "
                                "in common.py does not know: add it there")
        model.head_is_checked = True

    def chunk_logprobs(hidden, targets):  # [n, D], [n] -> [n]
        with autocast(model):
            logits = logits_of(model, hidden)
        return -F.cross_entropy(logits.float() / temperature, targets, reduction="none")

    hidden, targets = states[0][:, :-1][wanted[:, 1:]], input_ids[:, 1:][wanted[:, 1:]]  # [N, D], [N]
    rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(targets) <= rows:
        logps = chunk_logprobs(hidden, targets)
    else:
        logps = torch.cat([checkpoint(chunk_logprobs, h, t, use_reentrant=False)
                           for h, t in zip(hidden.split(rows), targets.split(rows))])
    return torch.zeros(input_ids.shape, device=logps.device).masked_scatter(wanted, logps)


def logits_of(model, hidden):
    """The head on [..., D], then what the architecture does to its logits -> [..., V]."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def pad_rows(rows: list[tuple[list[int], list[int]]], device="cpu"):
    """[(ids, mask)] -> input_ids, completion_mask [B, T], padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    both = torch.tensor([[values + [0] * (longest - len(values)) for values in row] for row in rows])  # [B, 2, T]
    return both.to(device).unbind(1)


def micro_batches(lengths: list[int], micro_batch_size: int | None, tokens: int = 4096) -> list[list[int]]:
    """Cut row numbers 0..len(lengths)-1, sorted by length so that little is padding, into groups for one forward pass each:
    of `micro_batch_size` rows, or (None) of at most `tokens` padded tokens."""
    groups = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        fits = groups and (len(groups[-1]) < micro_batch_size if micro_batch_size else
                           (len(groups[-1]) + 1) * lengths[row] <= tokens)
        if fits:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


@torch.no_grad()
def sequence_logprobs(model, rows, micro_batch_size=None, temperature=1.0) -> torch.Tensor:
    """log pi(completion | prompt) of each row: the sum over its masked tokens -> [len(rows)] fp32, on the CPU."""
    sums = torch.zeros(len(rows))
    for group in micro_batches([len(ids) for ids, _ in rows], micro_batch_size):
        input_ids, completion_mask = pad_rows([rows[i] for i in group], model.device)
        sums[group] = token_logprobs(model, input_ids, None, completion_mask, temperature).sum(1).cpu()
    return sums


# --------------------------------------------------------------------------------------------------------------- sampling


@dataclass
class Rollout:
    """Samples of a policy, prompt by prompt: rows i*num_samples ... (i+1)*num_samples - 1 answer prompt i."""

    rows: list[tuple[list[int], list[int]]]  # (ids, mask): train on these, never on re-tokenised text
    input_ids: torch.Tensor  # [B, T], padded on the right
    completion_mask: torch.Tensor  # [B, T]: 1 up to and including the stop token
    logps: torch.Tensor  # [B, T]: of the sampled tokens, at the sampling temperature
    completions: list[str]  # without the stop token
    ended: torch.Tensor  # [B] bool: stopped by itself, not cut at max_new_tokens


@torch.no_grad()
def generate(model, tokenizer, prompts, num_samples=1, max_new_tokens=64, temperature=1.0, rows_at_once=512) -> Rollout:
    """Sample `num_samples` completions of each prompt (a text, a list of messages, or token ids); temperature 0 is greedy.

    Each prompt is encoded once and its cache copied to its samples; finished rows are dropped when a quarter is idle.
    Pure sampling: top-k or top-p would make `logps` those of another policy. (Greedy `logps` are at temperature 1.)
    """
    encoded = [p if p and isinstance(p[0], int) else encode_prompt(tokenizer, p) for p in prompts]
    stops = torch.tensor(stop_ids(model, tokenizer), device=model.device)
    completions, logps = [], []
    per_pass = max(1, rows_at_once // num_samples)
    for start in range(0, len(encoded), per_pass):
        with autocast(model):
            tokens, token_logps, lengths = sample_rows(model, encoded[start:start + per_pass], num_samples, max_new_tokens,
                                                       temperature, stops)
        lengths = lengths.tolist()
        completions += [row[:n] for row, n in zip(tokens.tolist(), lengths)]
        logps += [row[:n] for row, n in zip(token_logps, lengths)]
    rows = [make_row(encoded[i // num_samples], ids) for i, ids in enumerate(completions)]
    input_ids, completion_mask = pad_rows(rows, model.device)
    ended = [ids[-1] in stops for ids in completions]
    # SentencePiece drops the first space of a text, so a completion's text is what it adds to its prompt's.
    texts = tokenizer.batch_decode([ids[:-1] if e else ids for (ids, _), e in zip(rows, ended)], skip_special_tokens=True)
    heads = [len(text) for text in tokenizer.batch_decode(encoded, skip_special_tokens=True)]
    return Rollout(rows, input_ids, completion_mask,
                   torch.zeros(input_ids.shape, device=model.device).masked_scatter(completion_mask.bool(), torch.cat(logps)),
                   [text[heads[i // num_samples]:] for i, text in enumerate(texts)], torch.tensor(ended))


def sample_rows(model, prompts, num_samples, max_new_tokens, temperature, stops):
    """Token ids -> sampled tokens [B, max_new_tokens], their log-probabilities, and lengths [B] up to the stop token."""
    longest, device = max(map(len, prompts)), model.device
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)
    out = model(input_ids=input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache, use_cache=True, logits_to_keep=1)
    row = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
    cache.reorder_cache(row)  # each prompt's keys and values, once for each of its samples
    logits, mask = out.logits[row, -1], mask[row]
    live = torch.arange(len(row), device=device)  # which sample each row of the cache belongs to
    running = torch.ones(len(row), dtype=torch.bool, device=device)
    tokens = torch.zeros(len(row), max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(len(row), max_new_tokens, device=device)
    lengths = torch.full((len(row),), max_new_tokens, device=device)
    for t in range(max_new_tokens):
        token, logp = sample_token(logits, temperature)
        tokens[live, t], logps[live, t] = token, logp
        stopped = running & torch.isin(token, stops)
        lengths[live[stopped]] = t + 1
        running = running & ~stopped
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= 0.75 * len(running):  # copying the cache at every finish would cost more than the idle rows
            keep = running.nonzero().squeeze(1)
            cache.reorder_cache(keep)
            live, token, mask, running = live[keep], token[keep], mask[keep], running[keep]
        mask = F.pad(mask, (0, 1), value=1)
        out = model(input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                    past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1]
    return tokens, logps, lengths


def sample_token(logits, temperature):
    """[B, V] -> token [B] drawn from softmax(logits / temperature), and its log-probability [B] (nats)."""
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:  # by the inverse of the distribution function; the factor keeps the draw below its last value
        cdf = logps.exp().cumsum(-1)
        draw = torch.rand(len(cdf), 1, device=cdf.device) * cdf[:, -1:] * (1 - 2**-23)
        token = torch.searchsorted(cdf, draw, right=True).squeeze(1)
    return token, logps.gather(1, token[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------------ text to tokens


def make_row(prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[int], list[int]]:
    return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)


def encode_prompt(tokenizer, prompt) -> list[int]:
    """A text, or a list of {"role", "content"} through the chat template -> the ids that generation starts from."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers add EOS by themselves
    else:
        ids = chat_ids(tokenizer, prompt, add_generation_prompt=True)
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def encode_row(tokenizer, prompt, completion, stops: list[int]) -> tuple[list[int], list[int]]:
    """-> (ids, mask). The prompt's ids are those that generation starts from; no token spans the boundary, there is no
    second BOS, and all ids together decode to exactly prompt + completion. The last one is a stop token."""
    if not isinstance(completion, str):
        return encode_conversation(tokenizer, list(prompt) + list(completion), stops, first=len(prompt))
    return make_row(encode_prompt(tokenizer, prompt), encode_continuation(tokenizer, completion) + [tokenizer.eos_token_id])


def encode_continuation(tokenizer, text: str) -> list[int]:
    """Ids of a text that continues another one: without BOS, and without the space that SentencePiece puts before a text."""
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    if not hasattr(tokenizer, "adds_a_space"):
        tokenizer.adds_a_space = tokenizer.decode(ids_of("a") + ids_of("b")) == "a b" and len(ids_of("\n")) > 0
    return ids_of("\n" + text)[len(ids_of("\n")):] if tokenizer.adds_a_space else ids_of(text)


def encode_conversation(tokenizer, messages, stops: list[int], first: int = 0) -> tuple[list[int], list[int]]:
    """-> (ids, mask): 1 on what the assistant says in messages[first:], from the end of the template's generation prompt up
    to and including the stop token (a newline that templates write after it was never generated)."""
    ids, mask = chat_ids(tokenizer, messages), []
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = chat_ids(tokenizer, messages[:turn], add_generation_prompt=True)
        until = chat_ids(tokenizer, messages[:turn + 1])
        if ids[:len(before)] != before or ids[:len(until)] != until:
            raise UserError("the chat template writes earlier turns differently once an answer follows: give a --chat-template "
                            "whose text only grows")
        end = next((t + 1 for t in range(len(before), len(until)) if ids[t] in stops), len(until))
        mask += [0] * (len(before) - len(mask)) + [1] * (end - len(before))
    ids = ids[:len(mask)]
    return (ids, mask) if ids[-1:] and ids[-1] in stops else (ids + [tokenizer.eos_token_id], mask + [1])


def chat_ids(tokenizer, messages, add_generation_prompt=False) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError("conversations need a chat template, and this tokenizer has none: give one with --chat-template FILE")
    if not messages:
        return []
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=True,
                                             return_dict=False)
    except Exception as error:  # a template raises what it likes
        if messages[0].get("role") == "system" and len(messages) > 1:  # Gemma's knows no system role: it joins the first turn
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return chat_ids(tokenizer, [first, *messages[2:]], add_generation_prompt)
        raise UserError(f"the chat template refuses {json.dumps(messages)[:80]}: {error}")


# ------------------------------------------------------------------------------------------------------------------- data


def load_rows(name: str, split: str = "train") -> list[dict]:
    """A Hub id, `id:config`, or a local .jsonl/.json/.csv/.parquet file or directory -> a list of rows."""
    import datasets  # here, because it is slow to import
    datasets.disable_progress_bars()
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    path = Path(name)
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(name) if (path / "state.json").exists() or (path / "dataset_dict.json").exists() \
                else datasets.load_dataset(name)
            rows = loaded[split] if isinstance(loaded, dict) else loaded
        elif path.suffix in kinds:
            if not path.is_file():
                raise UserError(f"--dataset {name}: no such file")
            rows = datasets.load_dataset(kinds[path.suffix], data_files=name, split=split)
        else:
            rows = datasets.load_dataset(*name.split(":", 1), split=split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many kinds
        if path.suffix == ".jsonl" and path.is_file():
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    json.loads(line or "{}")
                except json.JSONDecodeError as bad:
                    raise UserError(f"--dataset {name}, line {number}: not JSON ({bad}): mend or delete the line")
        cause = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise UserError(f"--dataset {name}, --split {split}: cannot be read ({cause}): give a Hub id, id:config, or a .jsonl, .json, "
                        ".csv or .parquet file or directory, and a split that it has")
    if len(rows) == 0:
        raise UserError(f"--dataset {name}: has no rows")
    return list(rows)


def hold_out(rows: list, seed: int, most: int = 500) -> tuple[list, list]:
    """Set aside one row in ten, at most `most`, for evaluation -> (train, held out)."""
    if len(rows) < 2:
        raise UserError("the data set has one row, and one must be held out: give more rows or an --eval-dataset")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, min(most, len(rows) // 10))
    return [rows[i] for i in order[size:]], [rows[i] for i in order[:size]]


def encode_all(rows: list[dict], name: str, encode, max_length: int) -> list:
    """encode(row) -> one or more (ids, mask), for every row; cut at max_length; rows of which no completion token is left are
    dropped. Says how many. -> [(row, [(ids, mask), ...])]"""
    kept, cut, dropped = [], 0, None
    for number, row in enumerate(rows, 1):
        try:
            encoded = encode(row)
        except UserError as error:
            raise UserError(f"{name}, row {number}: {error}")
        short = [(ids[:max_length], mask[:max_length]) for ids, mask in encoded]
        if all(any(mask) for _, mask in short):
            kept.append((row, short))
            cut += any(len(ids) > max_length for ids, _ in encoded)
        else:
            dropped = dropped or f"row {number}'s prompt has {min(mask.index(1) for _, mask in encoded)} tokens or more"
    if not kept:
        raise UserError(f"{name}: no row fits into --max-length {max_length} ({dropped}): raise it as far as the model's window allows")
    if dropped or cut:
        print(f"{Path(name).name}: of {len(rows)} rows {len(rows) - len(kept)} dropped, their prompt does not fit into --max-length "
              f"{max_length}, and {cut} completions cut there")
    return kept


def window(model, max_length: int | None, most: int = 1024) -> int:
    """The longest row: --max-length, which must fit the model; by default `most` tokens or the model's window."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or most
    if max_length is not None and max_length > limit:
        raise UserError(f"--max-length {max_length}: the model's window is {limit} tokens: choose at most that")
    return max_length or min(limit, most)


def column(row: dict, name: str):
    """row[name], which must be there and say something."""
    if row.get(name) is None:
        raise UserError(f"no {name!r} (columns: {', '.join(k for k, v in row.items() if v is not None)}): rename the column that holds it")
    if not row[name] or (isinstance(row[name], str) and not row[name].strip()):
        raise UserError(f"{name!r} is empty: delete the row or fill it")
    return row[name]


def comparison(row: dict):
    """-> (prompt, chosen, rejected), each a text or a list of messages. Without a prompt column (or where the prompt is repeated
    in both conversations) it is what chosen and rejected share: whole messages, Anthropic's "\\n\\nHuman: ...\\n\\nAssistant:",
    or whole words."""
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    if type(chosen) is not type(rejected):
        raise UserError("'chosen' and 'rejected' must both be texts or both be lists of messages")
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' are the same: delete the row, it says nothing")
    prompt = row.get("prompt")
    if prompt is not None and (isinstance(prompt, list) or isinstance(chosen, str)):
        return column(row, "prompt"), chosen, rejected
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        turn = chosen[:shared].rfind("\n\nAssistant:")
        shared = turn + len("\n\nAssistant:") if turn >= 0 else max(0, len(re.match(r"(.*(?=\s))?", chosen[:shared], re.S).group()))
    if shared in (0, len(chosen), len(rejected)):
        raise UserError("'chosen' and 'rejected' share no prompt: add a 'prompt' column")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def batches(num_rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> list[list[int]]:
    """The row numbers of every update, shuffled anew each epoch: a function of the seed, so that a resumed run sees the same."""
    steps = max_steps or max(1, round(epochs * num_rows / batch_size))
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


# ---------------------------------------------------------------------------------------------------------------- rewards


def load_reward(args, stops: list[int]):
    """--reward-fn or --reward-model -> reward(prompts, completions, rows) -> [n] fp32, or None where neither is given."""
    if args.reward_fn and args.reward_model:
        raise UserError("--reward-fn and --reward-model: choose one")
    if args.reward_model:
        return reward_from_model(args.reward_model, args)
    return reward_from_function(args.reward_fn) if args.reward_fn else None


def reward_from_function(spec: str):
    """`FILE.py:function`, called as f(prompts=..., completions=..., **columns) -> list of floats, TRL's convention."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"--reward-fn {spec}: no such file; give FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except Exception as error:
        raise UserError(f"--reward-fn {spec}: {type(error).__name__}: {error}")

    def call(prompts, completions, rows):
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        return list(function(prompts=prompts, completions=completions, **columns))

    def reward(prompts, completions, rows):
        completions = [c if isinstance(p, str) else [{"role": "assistant", "content": c}] for p, c in zip(prompts, completions)]
        try:
            values = call(prompts, completions, rows)
            rewards = torch.tensor([float(value) for value in values])
        except Exception as error:
            for p, c, row in zip(prompts, completions, rows):  # which one was it?
                try:
                    [float(value) for value in call([p], [c], [row])]
                except Exception as error:
                    raise UserError(f"--reward-fn {spec} raised {type(error).__name__}: {error}, on prompt {str(p)[:60]!r}, "
                                    f"completion {str(c)[:60]!r}: mend the function")
            raise UserError(f"--reward-fn {spec} raised {type(error).__name__}: {error}: mend the function")
        if len(rewards) != len(prompts):
            raise UserError(f"--reward-fn {spec} returned {len(rewards)} rewards for {len(prompts)} completions: return one for each")
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"--reward-fn {spec} returned {rewards[bad[0]].item()} for prompt {str(prompts[bad[0]])[:60]!r}, completion "
                            f"{str(completions[bad[0]])[:60]!r}: return finite numbers")
        return rewards

    return reward


def reward_from_model(name: str, args):
    """A sequence-classification model with one label, with its own tokenizer. The score is read at the last token, by index:
    the stock head searches for pad, and finds the token before EOS where pad equals EOS."""
    model, tokenizer = load_model(name, args, AutoModelForSequenceClassification), load_tokenizer(name, args.chat_template)
    if model.config.num_labels != 1:
        raise UserError(f"--reward-model {name}: has {model.config.num_labels} labels; a reward model has one")

    @torch.no_grad()
    def reward(prompts, completions, rows):
        encoded = [encode_row(tokenizer, p, c if isinstance(p, str) else [{"role": "assistant", "content": c}],
                              [tokenizer.eos_token_id]) for p, c in zip(prompts, completions)]
        rewards = torch.zeros(len(encoded))
        for group in micro_batches([len(ids) for ids, _ in encoded], args.micro_batch_size):
            input_ids, _ = pad_rows([encoded[i] for i in group], model.device)
            last = torch.tensor([len(encoded[i][0]) - 1 for i in group], device=model.device)
            with autocast(model):
                hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
                rewards[group] = model.score(hidden[torch.arange(len(group)), last]).squeeze(-1).float().cpu()
        return rewards

    return reward


# ------------------------------------------------------------------------------------------------------------- evaluation


def prompts_that_fit(rows, tokenizer, max_new_tokens: int, max_length: int) -> list[dict]:
    """Rows with distinct prompts that leave room for max_new_tokens."""
    fitting = [row for row in {str(row["prompt"]): row for row in rows}.values()
               if len(encode_prompt(tokenizer, row["prompt"])) + max_new_tokens <= max_length]
    if not fitting:
        raise UserError(f"--max-new-tokens {max_new_tokens}: no held-out prompt leaves so much room in {max_length} tokens: lower it")
    return fitting


@torch.no_grad()
def evaluate_policy(model, tokenizer, prompt_rows, reward, reference_samples, args, step: int) -> tuple[dict, list[dict]]:
    """One fresh sample for each held-out prompt: KL(pi || pi_ref) in nats a completion, and, where there is a reward, its mean
    and the win rate against the reference's samples (None: these are the reference's). -> (metrics, samples)"""
    prompts = [row["prompt"] for row in prompt_rows]
    with torch.random.fork_rng():  # evaluations must not change what training draws
        torch.manual_seed(args.seed + 1000 * step)
        rollout = generate(model, tokenizer, prompts, 1, args.max_new_tokens, args.temperature)
    reference = load_model(args.model, args)  # read again, for a moment: it takes no memory while the policy trains
    kl, kl_se = mean_and_se(sequence_logprobs(model, rollout.rows, args.micro_batch_size, args.temperature)
                            - sequence_logprobs(reference, rollout.rows, args.micro_batch_size, args.temperature))
    metrics = {"kl": kl, "kl_se": kl_se, "ended": rollout.ended.float().mean().item()}
    samples = [{"step": step, "prompt": p, "completion": c} for p, c in zip(prompts, rollout.completions)]
    if reward:
        rewards = reward(prompts, rollout.completions, prompt_rows)
        samples = [{**sample, "reward": value} for sample, value in zip(samples, rewards.tolist())]
        reference_rewards = torch.tensor([sample["reward"] for sample in reference_samples or samples])
        metrics["reward"], metrics["reward_se"] = mean_and_se(rewards)
        metrics["win_rate"], metrics["win_rate_se"] = mean_and_se((rewards > reference_rewards) + 0.5 * (rewards == reference_rewards))
    return metrics, samples


def report(run, evaluation: dict, samples: list[dict], reference_samples: list[dict]) -> None:
    """results.json, and on the terminal the reference against the trained policy, and five samples of each."""
    results = dict(evaluation)
    table = [["held-out prompts", "reward", "KL (nats)", "win rate", "ended"]]
    if "reward" in evaluation:
        rewards = torch.tensor([sample["reward"] for sample in reference_samples])
        results |= {"reward_ref": rewards.mean().item(), "reward_ref_sd": rewards.std().item()}

    def cell(name, digits=2):
        return f"{evaluation[name]:.{digits}f} ± {evaluation[name + '_se']:.{digits}f}" if name in evaluation else "-"

    run.write_results(**results)
    for before, after in list(zip(reference_samples, samples))[:5]:
        print(f"\n{str(before['prompt'])[-200:]}")
        for who, sample in (("reference", before), ("trained", after)):
            reward = f"{sample['reward']:+.2f} " if "reward" in sample else ""
            print(f"  {who:9} {reward}|{sample['completion'][:300]}")
    print()
    table += [["reference", f"{results['reward_ref']:.2f} (sd {results['reward_ref_sd']:.2f})" if "reward" in results else "-", "0",
               "50%" if "reward" in results else "-", ""],
              ["trained", cell("reward"), cell("kl"), cell("win_rate", 3), f"{evaluation['ended']:.1%}"]]
    print_table(table)
    print(f"saved to {run.dir}")


# ------------------------------------------------------------------------------------------------------------- run directory


class Run:
    """--output-dir: args.json, metrics.jsonl, samples.jsonl, results.json and checkpoint/. One more thing it promises: a run
    that is killed at any moment and started again with --resume writes what the uninterrupted run would have written."""

    def __init__(self, args):
        self.args, self.dir = args, Path(args.output_dir)
        self.checkpoint = self.dir / "checkpoint" / "state.pt"
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.started, self.files, self.tensorboard = time.time(), {}, None
        mine = {k: v for k, v in asdict(args).items() if k not in ("resume", "device", "tensorboard", "output_dir")}
        if args.resume and self.checkpoint.exists():
            theirs = json.loads((self.dir / "args.json").read_text())
            for key, value in mine.items():
                if theirs.get(key, value) != value:
                    raise UserError(f"--resume: {self.dir} was started with --{key.replace('_', '-')} {theirs[key]}, not {value}: give the "
                                    "same flags, or another --output-dir")
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: the package is not installed: pip install tensorboard, or leave the flag out")
            self.tensorboard = SummaryWriter(self.dir)

    def start(self, model, optimizer) -> tuple[int, dict]:
        """-> (updates done, the `memory` given to save_checkpoint), with model, optimizer, random states and files as they were
        then; (0, {}) at the beginning. Only here is an earlier run in the same directory cleared away."""
        state = {"step": 0, "memory": {}, "lengths": {"metrics": 0, "samples": 0}}
        if self.args.resume and self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            model.load_state_dict(state.pop("model"))
            optimizer.load_state_dict(state.pop("optimizer"))
            torch.set_rng_state(state.pop("rng"))
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(state.pop("cuda_rng"))
            print(f"resuming {self.dir} after step {state['step']}")
        else:
            self.checkpoint.unlink(missing_ok=True)
            (self.dir / "results.json").unlink(missing_ok=True)
            write_atomically(self.dir / "args.json", json.dumps(asdict(self.args), indent=1).encode())
        for name in ("metrics", "samples"):
            self.files[name] = open(self.dir / f"{name}.jsonl", "a+b")
            self.files[name].truncate(state["lengths"][name])
        return state["step"], state["memory"]

    def log(self, step: int, **metrics) -> None:
        self.write("metrics", {"step": step, **metrics})
        for name, value in metrics.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)

    def log_samples(self, samples: list[dict]) -> None:
        for sample in samples:
            self.write("samples", sample)

    def write(self, name: str, row: dict) -> None:
        self.files[name].write(json.dumps(row).encode() + b"\n")
        self.files[name].flush()

    def save_checkpoint(self, step: int, model, optimizer, memory: dict | None = None) -> None:
        buffer = io.BytesIO()
        torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all(),
                    "lengths": {name: file.tell() for name, file in self.files.items()}, "memory": memory or {}}, buffer)
        write_atomically(self.checkpoint, buffer.getbuffer())

    def write_results(self, **results) -> None:
        write_atomically(self.dir / "results.json", json.dumps({**results, "seconds": time.time() - self.started}, indent=1).encode())


def write_atomically(path: Path, data) -> None:
    """The file is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def check_finite(loss: float, grad_norm: float, run: Run, step: int, rows: list[int]) -> None:
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        saved = f"the last good checkpoint is {run.checkpoint}" if run.checkpoint.exists() else "there is no checkpoint yet"
        raise UserError(f"step {step}: loss {loss}, gradient norm {grad_norm}, on training rows {rows[:8]} ...; {saved}: lower "
                        "--learning-rate")


def mean_and_se(values: torch.Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


def progress_bar(name: str, start: int, total: int) -> tqdm:
    return tqdm(range(start, total), initial=start, total=total, desc=name, file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 10,
                dynamic_ncols=True)


def print_table(rows: list[list]) -> None:
    """Rows of cells, the first one the header."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  " + "  ".join(cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row)))
