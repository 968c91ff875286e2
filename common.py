"""What every script needs and none is about: models, log-probabilities, sampling, data, the run directory, errors.

Nothing here is algorithmic. Conventions, for all of it:

* A row is (ids, mask): prompt tokens, then completion tokens up to and including the stop token; the mask is 1 on the
  completion's. Rows of a batch are padded on the right to [B, T]: `input_ids`, `completion_mask`. Positions decide what
  is masked, never token ids: pad may equal EOS or be missing, and what fills the padding is never read.
* `logps` [B, T] holds at t the log-probability of the token *at* t given those before it (nats), 0 outside the mask.
* Master weights and reductions are fp32; on a GPU the forward passes run under bf16 autocast. Dropout is always off.
* Under torchrun every process runs the whole script on the same plan with the same random numbers. micro_batches() and
  generate() give each its rows, summed() puts the parts together, and all go on with equal numbers.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import threading
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import safetensors
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          DynamicCache)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

transformers.utils.logging.disable_progress_bar()
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    # glibc gives large tensors back to the kernel, and pays for each page of the next one: let it keep them, up to half
    # of LOGITS_AT_ONCE. Larger ones leave holes that nothing fits: memory would grow with vocabulary x length.
    for threshold, size in ((-3, 2**27), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(threshold, size)

ASSETS = Path(__file__).resolve().parent / "assets"  # the embedded world; a copied script runs without it

# ------------------------------------------------------------------------------------------------- command line, errors


class UserError(Exception):
    """A mistake of the user's, told in one line that names the thing, the row and the mend. Exit status 2."""


def run_script(main, args_class) -> None:
    """Parse the command line into `args_class`, call main(args), and tell a user's mistake in one line on stderr."""
    try:
        args = parse_args(args_class)
        join_processes()
        main(args)
        if torch.cuda.is_available():
            print(f"peak GPU memory of a process: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except UserError as error:
        message = str(error)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, a read-only directory
        message = f"{error} (writing to --output-dir?): free the space, or choose another directory"
    except torch.OutOfMemoryError:
        message = "out of GPU memory: lower --micro-batch-size or --max-length, or pass --gradient-checkpointing"
    except KeyboardInterrupt:
        message = "interrupted: the same command with --resume goes on from the last checkpoint"
    except RuntimeError as error:
        if world()[1] == 1 or not re.search("gloo|nccl|onnection|imed out", f"{type(error)} {error}"):
            raise
        message = LOST
    if int(os.environ.get("RANK", 0)) > 0:  # process 0 mostly says the same, and torchrun then ends this one
        time.sleep(3)
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # the others may never answer a farewell
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def parse_args(args_class):
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args = tyro.cli(args_class, description=sys.modules[args_class.__module__].__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        # tyro prints a title, a rule, what is wrong, a rule, and help: framed where the terminal can
        text = " ".join(line.strip("│ ") for line in box.getvalue().splitlines())
        blocks = re.split(r"(?:─{2,}|-{10,})\W*", text)
        raise UserError(f"{blocks[1]} (--help lists the flags)")
    for name in ("learning_rate", "batch_size", "micro_batch_size", "epochs", "max_steps", "max_length", "eval_prompts",
                 "max_grad_norm", "max_new_tokens", "temperature", "beta", "eval_every", "save_every", "replicas"):
        value = getattr(args, name, None)
        zero_too = name in getattr(args_class, "may_be_zero", ()) and value == 0
        if value is not None and not 0 < value < math.inf and not zero_too:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number greater than 0")
    return args


# ---------------------------------------------------------------------------------------------------- models, tokenizer


def load_model(name: str, device="auto", dtype="auto", gradient_checkpointing=False, kind=AutoModelForCausalLM):
    """A Hub id or directory -> fp32 master weights, dropout off."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}: use cpu, cuda or cuda:N")
    with model_errors(name):
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(config, key, 0.0)  # a policy with dropout is not the policy that sampled
        model = kind.from_pretrained(name, config=config, dtype=torch.float32, use_safetensors=True).eval()
    model.own_device = device
    if world()[1] == 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model.to(device)  # of many processes, none may have room for all of it: see shard()
    dtype = {"auto": "bfloat16" if device.type == "cuda" else "float32"}.get(dtype, dtype)
    model.autocast_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only
    return model


def save_model(model, tokenizer, directory) -> None:
    """Write Hugging Face files, in fp32 as the weights were trained: bf16, the dtype that most models come in, cannot
    hold the small updates of a real model's training."""
    weights = whole(in_parts(model).state_dict())
    if world()[0] == 0:
        model.config.dtype = torch.float32
        model.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)


def load_tokenizer(name: str, chat_template: str | None = None):
    with model_errors(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no EOS token, so that no completion could end: name one as "
                        "eos_token in its tokenizer_config.json")
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise UserError(f"--chat-template {chat_template}: no such file; give a file with a Jinja template")
        tokenizer.chat_template = Path(chat_template).read_text()
    return tokenizer


@contextlib.contextmanager
def model_errors(name: str):
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if Path(name).is_dir():
            raise UserError(f"model {name}: cannot be loaded ({cause}): the directory must hold config.json, "
                            "*.safetensors and a tokenizer")
        raise UserError(f"model {name}: no such directory, and not to be had from the Hub ({cause}): check the name, "
                        "the network and HF_HUB_OFFLINE")


def autocast(model):
    dtype = getattr(model, "autocast_dtype", None)
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: generation_config may list several (<|eot_id|>, <|im_end|> ...)."""
    configured = model.generation_config.eos_token_id
    return sorted({*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id} - {None})


def learning_rate_at(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to 0."""
    warmup = max(1, round(0.1 * total_steps))
    return peak * min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))


# ------------------------------------------------------------------------------------------------------- many processes

LOST = ("another process of this job ended or cannot be reached, its own message is above: the same command with "
        "--resume goes on from the last checkpoint, with as many processes as you like")


def world() -> tuple[int, int]:
    """-> (rank of this process, number of processes): (0, 1) unless torchrun started more."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes() -> None:
    """Find the other processes that torchrun started. Only the first one prints."""
    if not dist.is_torchelastic_launched():
        return
    if os.environ["RANK"] == "0":  # which may be waiting for the others, and not for signals, when torchrun sends one
        def tell():
            signal.sigwait({signal.SIGTERM})
            print(f"{Path(sys.argv[0]).name}: error: {LOST}", file=sys.stderr, flush=True)
            os._exit(2)

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=tell, daemon=True).start()
    else:
        sys.stdout = open(os.devnull, "w")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def shard(model, args):
    """FSDP2: each process keeps a part of the weights, of their gradients and of the optimizer's state, and has a
    layer's weights whole while it computes with it. --replicas of the whole, such as one a node, make it HSDP. To be
    called before an optimizer is made; with one process, nothing changes. With bfloat16 the whole forward pass is in
    it, where autocast on one GPU leaves norms and the residual stream in fp32."""
    can_pack(model)  # asks base_model, which alone must not be called once it is sharded
    size = world()[1]
    if size == 1:
        return model
    if size % args.replicas:
        raise UserError(f"--replicas {args.replicas}: {size} processes cannot be divided equally among so many copies")
    policy = MixedPrecisionPolicy(param_dtype=model.autocast_dtype, reduce_dtype=torch.float32)
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise UserError(f"{model.config.model_type}: transformers does not say what its layers are: use one process")
    mesh = device_mesh(model.own_device.type, args.replicas, size // args.replicas)
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by what the batches of all processes count
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.base_states = types.MethodType(base_states, model)
    register_fsdp_forward_method(model, "base_states")
    return model


@functools.cache
def device_mesh(kind: str, copies: int, parts: int):
    if copies == 1:
        return dist.init_device_mesh(kind, (parts,))
    return dist.init_device_mesh(kind, (copies, parts), mesh_dim_names=("copies", "parts"))


@contextlib.contextmanager
def unsharded(model):
    """All weights whole, on every process: each samples as long as its own rows need, and none waits for another."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]  # the model itself comes first
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def in_parts(model):
    """The model with its own parts for parameters: FSDP leaves some whole after a forward pass without gradient."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def whole(state):
    """A state_dict, each tensor put together from its parts, on the CPU of the first process (None on the others)."""
    def gather(x):
        if not isinstance(x, DTensor):
            return x
        x = x.full_tensor()
        return x.cpu() if world()[0] == 0 else None
    return tree_map(gather, state)


def own_part(x, parameter):
    """What this process keeps of a whole tensor that belongs to `parameter`."""
    if not isinstance(parameter, DTensor) or x.shape != parameter.shape:
        return x
    return distribute_tensor(x.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place: each has computed its rows, and has 0 at the others'."""
    if world()[1] > 1:
        dist.all_reduce(x)
    return x


def raise_together(message: str | None) -> None:
    """A UserError on every process where one of them has a message: none waits for another that has stopped."""
    messages = [message] * world()[1]
    if len(messages) > 1:
        dist.all_gather_object(messages, message)
    for message in filter(None, messages):
        raise UserError(message)


def clip_gradients(model, max_norm: float) -> float:
    """-> the norm of the gradient of all parameters, before it was clipped to max_norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---------------------------------------------------------------------------------------------------- log-probabilities

LOGITS_AT_ONCE = 2**26  # elements of [rows, vocabulary] alive at a time: 256 MB in fp32


def token_logprobs(model, input_ids, attention_mask, completion_mask, temperature=1.0):
    """log p(token t | tokens < t) at the given temperature, for completion tokens -> [B, T] fp32, 0 elsewhere.

    input_ids, completion_mask [B, T]. attention_mask [B, T] may be None for rows padded on the right: they are then
    packed (see packed_rows), which is faster. With a mask, positions count from each row's first real token.

    Logits exist only where a completion token is predicted, and only LOGITS_AT_ONCE of them at a time: a pre-hook takes
    the hidden states away from the model's head, which is then applied to the wanted ones, chunk by chunk, and again in
    the backward pass. Soft-capping and logit scales (Gemma 2, Cohere, Granite ...) are applied as the model would; that
    is checked against its own logits once.
    """
    wanted = completion_mask.bool().clone()
    wanted[:, 0] = False  # nothing predicts the first token
    head, states = model.get_output_embeddings(), []

    def take_hidden_states(module, inputs):
        states.append(inputs[0])
        return (inputs[0][:1, :1],)

    needed = wanted.flip(1).cumsum(1).flip(1) > wanted.long()  # a wanted token comes after
    hook = head.register_forward_pre_hook(take_hidden_states)
    try:
        with packed_rows(model, input_ids, needed, attention_mask) as (inputs, place), autocast(model):
            own_logits = model(**inputs).logits[0, 0]  # [V]
    finally:
        hook.remove()
    if not getattr(model, "head_is_checked", False):
        with torch.no_grad(), autocast(model):
            error = (own_logits - logits_of(model, states[0][0, 0])).abs().max()
        if not error <= (1e-3 if own_logits.dtype == torch.float32 else 0.03) * (1 + own_logits.abs().max()):
            raise UserError(f"{model.config.model_type}: this architecture changes its logits in a way that "
                            "logits_of() in common.py does not know: add it there")
        model.head_is_checked = True

    def chunk_logprobs(hidden, targets):  # [n, D], [n] -> [n]
        with autocast(model):
            logits = logits_of(model, hidden)
        return TargetLogprobs.apply(logits.float(), targets, temperature)

    hidden = F.embedding(place[:, :-1][wanted[:, 1:]], states[0].flatten(0, 1))  # [N, D]: what predicts the targets
    targets = input_ids[wanted]  # [N]
    at_once = LOGITS_AT_ONCE if targets.is_cuda or torch.is_grad_enabled() else LOGITS_AT_ONCE // 16  # fits the caches
    rows = max(1, at_once // head.weight.shape[0])
    with autocast(model):  # around all chunks: it casts the head once
        if len(targets) <= rows:
            logps = chunk_logprobs(hidden, targets)
        else:
            logps = torch.cat([checkpoint(chunk_logprobs, h, t, use_reentrant=False)
                               for h, t in zip(hidden.split(rows), targets.split(rows))])
    return torch.zeros(input_ids.shape, device=logps.device).masked_scatter(wanted, logps)


@contextlib.contextmanager
def packed_rows(model, input_ids, needed, attention_mask=None):
    """-> (forward's arguments, place [B, T]: where each needed token's state stands in its flattened result, [N, D]).

    Rows [B, T] are packed into one, [1, N]: without their padding, and a start that is equal to the row's before (the
    prompt of a pair, of a group) only once. Attention alone sees rows, [B, T] again; all else in a transformer works
    token by token. Values and gradients stay the same. Rows stay rows where there is a mask, under gradient
    checkpointing, beyond a sliding window, and where an architecture mixes tokens otherwise (tried once).
    """
    (B, T), config = input_ids.shape, model.config.get_text_config()
    windows = [getattr(config, name, None) or T for name in ("sliding_window", "attention_chunk_size")]
    if attention_mask is not None or model.training or T > min(windows) or not can_pack(model):
        inputs = {"input_ids": input_ids, "use_cache": False}
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            inputs |= {"attention_mask": attention_mask, "position_ids": positions}
        yield inputs, torch.arange(B * T, device=input_ids.device).view(B, T)
        return
    rows, columns = torch.arange(B, device=input_ids.device), torch.arange(T, device=input_ids.device)
    needed = needed | ((rows[:, None] == 0) & (columns == 0))  # at least one token
    shared = torch.zeros_like(needed)
    shared[1:] = ((input_ids[1:] == input_ids[:-1]) & needed[:-1]).cumprod(1).bool()
    own = needed & ~shared
    source = torch.where(own, rows[:, None], 0).cummax(0).values  # the row that computes what row b shares with it
    place = (own.flatten().cumsum(0) - 1).view(B, T).gather(0, source).clamp(min=0)
    back = own.flatten().nonzero().squeeze(1)  # [N]

    def attention(module, query, key, value, mask, *args, **kwargs):  # [1, heads, N, head size]
        query, key, value = (F.embedding(place, x[0].transpose(0, 1).flatten(1)).unflatten(2, (x.shape[1], x.shape[3]))
                             .transpose(1, 2) for x in (query, key, value))  # [B, heads, T, head size]
        output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, *args, **kwargs)
        return F.embedding(back, output.flatten(2).flatten(0, 1)).unflatten(1, output.shape[2:])[None], None

    before, ALL_ATTENTION_FUNCTIONS["packed_rows"] = config._attn_implementation, attention
    config._attn_implementation = "packed_rows"
    try:
        packed = {"input_ids": input_ids[own][None], "position_ids": columns.expand(B, T)[own][None]}
        yield {**packed, "use_cache": False}, place
    finally:
        config._attn_implementation = before


@torch.no_grad()
def can_pack(model) -> bool:
    """Are the states of three rows, two of which share their start, the same packed as each alone?"""
    if not hasattr(model, "packs"):
        model.packs, base = True, model.base_model
        rows = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 9, 8], [8, 7, 6, 5, 5]], device=model.device)
        rows = rows % base.get_input_embeddings().num_embeddings
        try:
            alone = torch.cat([base(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])
            with packed_rows(model, rows, torch.ones_like(rows, dtype=torch.bool)) as (inputs, place):
                packed = base(**inputs).last_hidden_state[0][place.flatten()]
            model.packs = torch.allclose(packed, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
        except Exception:  # whatever an architecture does that does not know such attention
            model.packs = False
    return model.packs


def last_states(model, input_ids, needed):
    """-> the last layer's states [N, D] of at least the needed tokens, and place [B, T]: which row of them is whose."""
    with packed_rows(model, input_ids, needed) as (inputs, place), autocast(model):
        states = getattr(model, "base_states", types.MethodType(base_states, model))(**inputs)
    return states.flatten(0, 1), place


def base_states(model, **inputs):
    return model.base_model(**inputs).last_hidden_state


def states_at_end(model, input_ids, completion_mask) -> torch.Tensor:
    """The last layer's state at the last completion token of each row, found by its index: [B, T] -> [B, D]."""
    last = completion_mask.shape[1] - 1 - completion_mask.flip(1).argmax(1)
    needed = torch.arange(input_ids.shape[1], device=last.device) <= last[:, None]
    states, place = last_states(model, input_ids, needed)
    return states[place[torch.arange(len(last)), last]]


def head_scores(model, states) -> torch.Tensor:
    """The one-label head in fp32: in bf16 many scores would be equal. [..., D] -> [...]"""
    return F.linear(states.float(), model.score.weight.float()).squeeze(-1)


class TargetLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) [n, V] at targets [n] -> [n], all in the memory of `logits`, which is lost, and
    its gradient, (1 at the target - softmax) / temperature: another [n, V] would take longer than its arithmetic."""

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        logits = logits.detach()  # no operation of logits_of() reads its own result in the backward pass
        if temperature != 1:
            logits.div_(temperature)
        torch.log_softmax(logits, 1, out=logits)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, targets)
        return logits.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):  # [n]
        logps, targets = ctx.saved_tensors
        gradient = gradient[:, None] / ctx.temperature
        return logps.exp_().mul_(-gradient).scatter_add_(1, targets[:, None], gradient), None, None


def logits_of(model, hidden):
    """The head on [..., D], then what the architecture does to its logits -> [..., V]."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    scale, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)  # Cohere, Granite
    logits = logits * scale if scale else logits
    logits = logits / divisor if divisor else logits
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def cache_arguments(model, cache) -> dict:
    """A cache for forward(), which calls it `cache` since transformers 5.24 and called it `past_key_values` before."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def pad_rows(rows: list[tuple[list[int], list[int]]], device="cpu"):
    """[(ids, mask)] -> input_ids, completion_mask [B, T], padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    both = torch.tensor([[values + [0] * (longest - len(values)) for values in row] for row in rows])  # [B, 2, T]
    return both.to(device).unbind(1)


def micro_batches(lengths: list[int], micro_batch_size: int | None, tokens: int = 4096, together=False):
    """Row numbers, sorted by length so that little is padding, in groups for one forward pass each: `micro_batch_size`
    of them, or (None) as many as fit into `tokens` tokens, padding included. Of many processes each gets its share of
    every group, so that they make equally many passes, as FSDP demands: every so manieth row, which makes the shares
    equally long, or (`together`) neighbours, which may have their prompt in common."""
    (rank, size), groups = world(), []
    if len(lengths) < size:
        raise UserError(f"{len(lengths)} rows for {size} processes: give at least one for each (--batch-size, "
                        "--eval-prompts ...)")
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        fits = groups and (len(groups[-1]) < micro_batch_size * size if micro_batch_size else
                           (len(groups[-1]) + 1) * lengths[row] <= tokens * size)
        if fits or groups and len(groups[-1]) < size:
            groups[-1].append(row)
        else:
            groups.append([row])
    if len(groups[-1]) < size:
        groups[-2:] = [groups[-2] + groups[-1]]
    if together:
        return [group[len(group) * rank // size:len(group) * (rank + 1) // size] for group in groups]
    return [group[rank::size] for group in groups]


@torch.no_grad()
def sequence_logprobs(model, rows, micro_batch_size=None, temperature=1.0) -> torch.Tensor:
    """log pi(completion | prompt) of each row: the sum over its masked tokens -> [len(rows)] fp32, on the CPU."""
    sums = torch.zeros(len(rows))
    for group in micro_batches([len(ids) for ids, _ in rows], micro_batch_size):
        input_ids, completion_mask = pad_rows([rows[i] for i in group], model.device)
        sums[group] = token_logprobs(model, input_ids, None, completion_mask, temperature).sum(1).cpu()
    return summed(sums)


# ------------------------------------------------------------------------------------------------------------- sampling


GRAPH_DEVICES = {"cuda"}  # where a decoding step is recorded once and replayed


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
    """`num_samples` completions of each prompt (a text, a list of messages, or token ids); temperature 0 is greedy.

    Each prompt is encoded once and its cache copied to its samples; finished rows are dropped when a quarter is idle.
    Pure sampling: top-k or top-p would make `logps` those of another policy. (Greedy `logps` are at temperature 1.)
    """
    encoded = [p if p and isinstance(p[0], int) else encode_prompt(tokenizer, p) for p in prompts]
    stops = stop_ids(model, tokenizer)
    draws = torch.rand(len(encoded), num_samples, max_new_tokens)  # a number for each token, whoever computes it when
    shape, (rank, size) = (len(encoded), num_samples), world()
    tokens = torch.zeros(*shape, max_new_tokens, dtype=torch.long, device=model.device)
    logps = torch.zeros(*shape, max_new_tokens, device=model.device)
    lengths = torch.zeros(shape, dtype=torch.long, device=model.device)
    rows_at_once = min(rows_at_once, 2**17 // (max(map(len, encoded)) + max_new_tokens))  # a cache has so many tokens
    own, per_pass = range(rank, len(encoded), size), max(1, rows_at_once // num_samples)
    with unsharded(model), autocast(model):
        for start in range(0, len(own), per_pass):
            here = list(own[start:start + per_pass])
            sampled = sample_rows(model, [encoded[i] for i in here], draws[here].flatten(0, 1).to(model.device),
                                  temperature, torch.tensor(stops, device=model.device))
            for all_rows, rows in zip((tokens, logps, lengths), sampled):
                all_rows[here] = rows.unflatten(0, (len(here), num_samples))
    tokens, logps, lengths = (summed(x).flatten(0, 1) for x in (tokens, logps, lengths))  # [B, ...]
    completions = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    rows = [make_row(encoded[i // num_samples], ids) for i, ids in enumerate(completions)]
    input_ids, completion_mask = pad_rows(rows, model.device)
    ended = [ids[-1] in stops for ids in completions]
    # SentencePiece drops the first space of a text, so a completion's text is what it adds to its prompt's.
    texts = [ids[:-1] if end else ids for (ids, _), end in zip(rows, ended)]
    texts = tokenizer.batch_decode(texts, skip_special_tokens=True)
    heads = [len(text) for text in tokenizer.batch_decode(encoded, skip_special_tokens=True)]
    texts = [text[heads[i // num_samples]:] for i, text in enumerate(texts)]
    sampled = torch.arange(max_new_tokens, device=model.device) < lengths[:, None]  # [B, max_new_tokens]
    logps = torch.zeros(input_ids.shape, device=model.device).masked_scatter(completion_mask.bool(), logps[sampled])
    return Rollout(rows, input_ids, completion_mask, logps, texts, torch.tensor(ended))


def sample_rows(model, prompts, draws, temperature, stops):
    """Token ids of P prompts, draws [B, max_new_tokens] from [0, 1), B a multiple of P -> sampled tokens [B,
    max_new_tokens], their log-probabilities, lengths [B] up to the stop token."""
    longest, device, max_new_tokens = max(map(len, prompts)), model.device, draws.shape[1]
    input_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(max_new_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    out = model(input_ids=input_ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=1, **cache_arguments(model, cache))
    row = torch.arange(len(prompts), device=device).repeat_interleave(len(draws) // len(prompts))
    cache.reorder_cache(row)  # each prompt's keys and values, once for each of its samples
    logits, mask = out.logits[row, -1], F.pad(mask[row], (0, max_new_tokens))  # [B, V], [B, longest + max_new_tokens]
    live = torch.arange(len(row), device=device)  # which sample each row of the cache belongs to
    running = torch.ones(len(row), dtype=torch.bool, device=device)
    tokens = torch.zeros(len(row), max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(len(row), max_new_tokens, device=device)
    lengths = torch.full((len(row),), max_new_tokens, device=device)
    graphs, step = device.type in GRAPH_DEVICES, None
    for t in range(max_new_tokens):
        token, logp = sample_token(logits, temperature, draws[live, t])
        tokens[live, t], logps[live, t] = token, logp
        stopped = running & torch.isin(token, stops)
        lengths[live] = torch.where(stopped, t + 1, lengths[live])
        running = running & ~stopped
        if t + 1 == max_new_tokens:
            break
        if not graphs or t % 8 == 0:  # to ask a GPU is to wait for it
            left = int(running.sum())
            if left == 0:
                break
            # At every finish, copying the cache would cost more than the idle rows; a graph is for one number of rows.
            if left <= (0.5 if graphs else 0.75) * len(running):
                keep, step = running.nonzero().squeeze(1), None
                cache.reorder_cache(keep)
                live, token, mask, running = live[keep], token[keep], mask[keep], running[keep]
        mask[:, longest + t] = 1
        if step is None:
            step = captured_step(model, cache, token, mask, longest + t) if graphs else DecodingStep(model, cache)
        logits = step(token, mask, longest + t)
    return tokens, logps, lengths


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, with room for the tokens to come: DynamicLayer copies all it has at every token.
    With a `column`, a tensor, a token goes there and all columns come back, as a CUDA graph wants it."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.length, self.buffers, self.column = room, 0, None, None

    def update(self, keys, values, *args, **kwargs):  # [B, heads, new tokens, head size]
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.buffers = [x.new_zeros(*x.shape[:2], x.shape[2] + self.room, x.shape[3], dtype=values.dtype)
                            for x in (keys, values)]  # under autocast rotary positions make fp32 keys
        if self.column is not None:
            return [x.index_copy_(2, self.column, new.to(x.dtype)) for x, new in zip(self.buffers, (keys, values))]
        first, self.length = self.length, self.length + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, first:self.length] = new
        self.keys, self.values = (buffer[:, :, :self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, rows):
        self.column, self.buffers = None, [buffer[rows] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, :self.length] for buffer in self.buffers)


class DecodingStep:
    """A token for each row into the cache: token [B], mask [B, columns], where the token stands -> logits [B, V]."""

    def __init__(self, model, cache):
        self.model, self.cache_arguments = model, cache_arguments(model, cache)

    def __call__(self, token, mask, column):
        return self.forward(token[:, None], mask[:, :column + 1], mask.sum(1, keepdim=True) - 1)

    def forward(self, token, mask, positions):
        return self.model(input_ids=token, attention_mask=mask, position_ids=positions,
                          **self.cache_arguments).logits[:, -1]


class StaticStep(DecodingStep):
    """The same in memory that stays where it is, so that it can be recorded once, as a CUDA graph, and replayed: a
    model's hundreds of small kernels take longer to launch than to run."""

    def __init__(self, model, cache, mask):
        super().__init__(model, cache)
        self.token, self.positions, self.column = (mask.new_zeros(size) for size in ((len(mask), 1), (len(mask), 1), 1))
        self.mask, self.graph = torch.zeros_like(mask, dtype=torch.bool)[:, None, None], None  # [B, 1, 1, columns]

    def __call__(self, token, mask, column):
        self.token.copy_(token[:, None])
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        self.mask.copy_(mask[:, None, None])
        self.column.fill_(column)
        if self.graph is None:
            return self.forward(self.token, self.mask, self.positions)
        self.graph.replay()
        return self.logits

    def capture(self):
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            torch.cuda.set_sync_debug_mode("error")  # a model that asks the host is found out before it spoils a graph
            self.forward(self.token, self.mask, self.positions)
            torch.cuda.set_sync_debug_mode("default")
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.forward(self.token, self.mask, self.positions)
            self.graph = graph
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.set_stream(stream)


def captured_step(model, cache, token, mask, column):
    """A step as a CUDA graph, or, where the model does not allow that or would then compute otherwise, a plain one."""
    plain, static = DecodingStep(model, cache), StaticStep(model, cache, mask)

    def use(column_tensor):
        for layer in cache.layers:
            layer.column, layer.length = column_tensor, column

    roomy = all(type(layer) is RoomyLayer for layer in cache.layers)
    if roomy and getattr(model, "decodes_statically", not isinstance(model, FSDPModule)):
        try:
            use(None)
            expected = None if hasattr(model, "decodes_statically") else plain(token, mask, column)
            use(static.column)
            logits = static(token, mask, column)  # also the warm-up that a capture needs
            if expected is not None:
                model.decodes_statically = bool((logits - expected).abs().max() <= 0.02 * expected.abs().max())
            static.capture()
        except Exception:  # whatever an architecture asks the host in the middle of a step
            model.decodes_statically = False
        if model.decodes_statically:
            return static
        use(None)
    return plain


def sample_token(logits, temperature, draw):
    """logits [B, V], draw [B] from [0, 1) -> token [B], distributed as softmax(logits / temperature), and its
    log-probability [B] (nats)."""
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:  # by the inverse of the distribution function; the factor keeps the draw below its last value
        cdf = logps.exp().cumsum(-1)
        token = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:] * (1 - 2**-23), right=True).squeeze(1)
    return token, logps.gather(1, token[:, None]).squeeze(1)


# ------------------------------------------------------------------------------------------------------- text to tokens


def make_row(prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[int], list[int]]:
    return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)


def encode_prompt(tokenizer, prompt) -> list[int]:
    """A text, or a list of {"role", "content"} through the chat template -> the ids that generation starts from."""
    prompt = with_prefix(prompt, own_prefix(tokenizer))
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers add an EOS
    else:
        ids = from_template(tokenizer, prompt, add_generation_prompt=True, tokenize=True)
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def own_prefix(tokenizer) -> str:
    """What a policy of reward_conditioning.py wants in front of every prompt; its tokenizer_config.json keeps it."""
    return getattr(tokenizer, "init_kwargs", {}).get("prompt_prefix", "")


def with_prefix(prompt, prefix: str):
    """The prefix in front of a text, or of what the user says first."""
    if isinstance(prompt, str) or not prefix:
        return prefix + prompt if prefix else prompt
    first = next((n for n, message in enumerate(prompt) if message["role"] == "user"), 0)
    return [{**m, "content": prefix + m["content"]} if n == first else m for n, m in enumerate(prompt)]


def encode_row(tokenizer, prompt, completion, stops: list[int]) -> tuple[list[int], list[int]]:
    """-> (ids, mask). The prompt's ids are those that generation starts from; no token spans the boundary, there is no
    second BOS, and all ids together decode to exactly prompt + completion. The last one is a stop token."""
    if not isinstance(completion, str):
        return encode_conversation(tokenizer, list(prompt) + list(completion), stops, first=len(prompt))
    return make_row(encode_prompt(tokenizer, prompt),
                    encode_continuation(tokenizer, completion) + [tokenizer.eos_token_id])


def encode_continuation(tokenizer, text: str) -> list[int]:
    """Ids of a text that continues another: no BOS, and not the space that SentencePiece puts before every text."""
    def ids_of(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    if not hasattr(tokenizer, "adds_a_space"):
        tokenizer.adds_a_space = tokenizer.decode(ids_of("a") + ids_of("b")) == "a b" and len(ids_of("\n")) > 0
    return ids_of("\n" + text)[len(ids_of("\n")):] if tokenizer.adds_a_space else ids_of(text)


def encode_conversation(tokenizer, messages, stops: list[int], first: int = 0) -> tuple[list[int], list[int]]:
    """-> (ids, mask): 1 on what the assistant says in messages[first:], from the end of the generation prompt up to and
    including the stop token (the newline that many templates write after it was never generated)."""
    spoken = with_prefix(messages, own_prefix(tokenizer))
    ids, mask, text = [], [], ""
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant":
            continue
        before = from_template(tokenizer, spoken[:turn], add_generation_prompt=True)
        until = from_template(tokenizer, spoken[:turn + 1])
        if not (before.startswith(text) and until.startswith(before)):
            raise UserError("the chat template writes earlier turns differently once an answer follows: give a "
                            "--chat-template whose text only grows")
        prompt = (encode_continuation(tokenizer, before[len(text):]) if ids else
                  encode_prompt(tokenizer, messages[:turn]))
        answer, text = encode_continuation(tokenizer, until[len(before):]), until
        end = next((t + 1 for t, token in enumerate(answer) if token in stops), len(answer))
        ids += prompt + answer
        mask += [0] * len(prompt) + [1] * end + [0] * (len(answer) - end)
    if 1 not in mask:
        raise UserError("no assistant turn to learn from: delete the row")
    end = len(mask) - mask[::-1].index(1)
    ids, mask = ids[:end], mask[:end]
    return (ids, mask) if ids[-1] in stops else (ids + [tokenizer.eos_token_id], mask + [1])


def from_template(tokenizer, messages, add_generation_prompt=False, tokenize=False):
    """A conversation through the chat template -> text, or ids."""
    if tokenizer.chat_template is None:
        raise UserError("conversations need a chat template, and the tokenizer has none: give one with --chat-template")
    if not messages:
        return [] if tokenize else ""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize,
                                             return_dict=False)
    except Exception as error:  # a template raises what it likes
        if messages[0].get("role") == "system" and len(messages) > 1:  # Gemma's knows no system role
            first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
            return from_template(tokenizer, [first, *messages[2:]], add_generation_prompt, tokenize)
        raise UserError(f"the chat template refuses {json.dumps(messages)[:80]} ({error}): mend row or template")


# ----------------------------------------------------------------------------------------------------------------- data


def load_rows(name: str, split: str | None = "train") -> list[dict]:
    """A Hub id, `id:config`, or a local .jsonl/.json/.csv/.parquet file or directory -> its rows. split None: the split
    "test" if there is one."""
    import datasets  # here, because it is slow to import
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told below, in one line
    path = Path(name)
    kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(path.suffix)
    if kind and not path.exists():
        raise UserError(f"--dataset {name}: no such file")
    try:
        if path.is_dir() and any((path / file).exists() for file in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, dict) and split else rows
        elif path.is_file():
            rows = datasets.load_dataset(kind, data_files=name, split=split)
        else:
            rows = datasets.load_dataset(*([name] if path.is_dir() else name.split(":", 1)), split=split)
        rows = list(rows.get("test", rows[next(iter(rows))]) if isinstance(rows, dict) else rows)
    except Exception as error:  # datasets raises many kinds
        lines = path.read_text(errors="replace").splitlines() if path.suffix == ".jsonl" else []
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line or "{}")
            except json.JSONDecodeError as bad:
                raise UserError(f"--dataset {name}, line {number}: not JSON ({bad}): mend or delete the line")
        cause = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"--dataset {name}, --split {split}: cannot be read ({cause}): give a Hub id, id:config, or a "
                        ".jsonl, .json, .csv or .parquet file or directory, and a split that it has")
    if not rows:
        raise UserError(f"--dataset {name}: has no rows")
    return rows


def hold_out(rows: list, seed: int, most: int = 500) -> tuple[list, list]:
    """Set aside one row in ten, at most `most`, for evaluation -> (train, held out)."""
    if len(rows) < 2:
        raise UserError("the data set has one row, and one must be held out: give more rows, or an --eval-dataset")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    size = max(1, min(most, len(rows) // 10))
    return [rows[i] for i in order[size:]], [rows[i] for i in order[:size]]


def column(row: dict, name: str):
    """row[name], which must be there and say something."""
    if row.get(name) is None:
        raise UserError(f"no {name!r} (columns: {', '.join(k for k, v in row.items() if v is not None)}): rename the "
                        "column that holds it")
    if not row[name] or (isinstance(row[name], str) and not row[name].strip()):
        raise UserError(f"{name!r} is empty: fill it or delete the row")
    return row[name]


def comparison(row: dict):
    """-> (prompt, chosen, rejected), each a text or a list of messages. Without a prompt column, or where conversations
    repeat it, the prompt is what chosen and rejected share: whole messages, a text up to its last "\\n\\nAssistant:"
    (Anthropic's HH), or whole words."""
    chosen, rejected = column(row, "chosen"), column(row, "rejected")
    if type(chosen) is not type(rejected):
        raise UserError("'chosen' and 'rejected' must both be texts or both be lists of messages: mend the row")
    if row.get("prompt") is not None and (isinstance(row["prompt"], list) or isinstance(chosen, str)):
        return column(row, "prompt"), chosen, rejected
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        turn = chosen[:shared].rfind("\n\nAssistant:")
        shared = turn + len("\n\nAssistant:") if turn >= 0 else max(chosen[:shared].rfind(space) for space in " \n")
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise UserError("'chosen' and 'rejected' do not continue a shared prompt differently: add a 'prompt' column")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def encode_all(rows: list[dict], name: str, encode, max_length: int) -> list:
    """-> [(row, encode(row))]; encode gives one or more (ids, mask), which are cut at max_length. Rows whose prompt is
    that long are dropped, and counted aloud."""
    kept, cut, dropped = [], 0, []
    for number, row in enumerate(rows, 1):
        try:
            encoded = encode(row)
        except UserError as error:
            raise UserError(f"{name}, row {number}: {error}")
        if all(any(mask[:max_length]) for _, mask in encoded):
            kept.append((row, [(ids[:max_length], mask[:max_length]) for ids, mask in encoded]))
            cut += any(len(ids) > max_length for ids, _ in encoded)
        else:
            dropped.append((number, min(mask.index(1) for _, mask in encoded)))
    if not kept:
        raise UserError(f"{name}: no row fits: the prompt of row {dropped[0][0]} has {dropped[0][1]} tokens, "
                        f"--max-length is {max_length}: raise it if the model's window allows, or shorten the prompts")
    if dropped or cut:
        print(f"{Path(name).name}: {len(rows)} rows; {len(dropped)} dropped, their prompts alone reach --max-length "
              f"{max_length}; {cut} completions cut there")
    return kept


def load_prompts(args, model, tokenizer):
    """-> training rows, each with its prompt's ids, [(row, ids)], and held-out rows; all leave room for an answer."""
    max_length = max_row_length(model, args.max_length)
    rows = load_rows(args.dataset, args.split)
    rows, eval_rows = (rows, load_rows(args.eval_dataset, None)) if args.eval_dataset else hold_out(rows, args.seed)

    def encode(row):
        row["prompt"] = column(row, args.prompt_column)
        return [make_row(encode_prompt(tokenizer, row["prompt"]), [0])]  # a token in the place of the completion

    eval_rows = [row for row, _ in encode_all(eval_rows, args.eval_dataset or args.dataset, encode, max_length)]
    eval_rows = prompts_that_fit(eval_rows, tokenizer, args.max_new_tokens, max_length)[: args.eval_prompts]
    rows = encode_all(rows, args.dataset, encode, max_length - args.max_new_tokens + 1)
    return [(row, ids[:-1]) for row, ((ids, _),) in rows], eval_rows


def max_row_length(model, max_length: int | None) -> int:
    """--max-length, which must fit into the model's window; by default the window, or 1,024 tokens."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    if max_length is not None and max_length > window:
        raise UserError(f"--max-length {max_length}: the model's window is {window} tokens: choose at most that")
    return max_length or min(window, 1024)


def batches(num_rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> list[list[int]]:
    """The row numbers of every update, shuffled anew each epoch: by the seed alone, so a resumed run sees the same."""
    steps = max_steps or max(1, round(epochs * num_rows / batch_size))
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < steps * batch_size:
        order += torch.randperm(num_rows, generator=generator).tolist()
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


# -------------------------------------------------------------------------------------------------------------- rewards


def load_reward(args, wrap=lambda function: function):
    """--reward-fn, with `wrap` around it, or --reward-model -> reward(prompts, completions, rows) -> [n] fp32; None
    where neither is given."""
    if args.reward_fn and args.reward_model:
        raise UserError("--reward-fn and --reward-model: give one of them")
    if args.reward_model:
        return reward_from_model(args.reward_model, args)
    return reward_from_function(args.reward_fn, wrap) if args.reward_fn else None


def as_answer(prompt, completion: str):
    return completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]


def load_function(flag: str, spec: str):
    """`FILE.py:function` -> the function."""
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"{flag} {spec}: no such file: give FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return getattr(module, name)
    except Exception as error:
        raise UserError(f"{flag} {spec}: {type(error).__name__}: {error}: mend the file")


def reward_from_function(spec: str, wrap=lambda function: function):
    """`FILE.py:function`, called in TRL's convention: f(prompts=..., completions=..., **columns) -> list of floats.
    `wrap` is put around it."""
    function = wrap(load_function("--reward-fn", spec))

    def call(prompts, completions, rows):
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
        return torch.tensor([float(r) for r in function(prompts=prompts, completions=completions, **columns)])

    def checked(prompts, completions, rows):
        try:
            rewards = call(prompts, completions, rows)
        except Exception as whole_error:  # which none of them need raise alone
            error, where = whole_error, ""
            for p, c, row in zip(prompts, completions, rows):  # which one was it?
                try:
                    call([p], [c], [row])
                except Exception as single_error:
                    error, where = single_error, f" on prompt {str(p)[:80]!r}, completion {str(c)[:80]!r}"
                    break
            raise UserError(f"--reward-fn {spec} raised {type(error).__name__}: {error}{where}: mend the function")
        if len(rewards) != len(prompts):
            raise UserError(f"--reward-fn {spec} returned {len(rewards)} rewards for {len(prompts)} completions, the "
                            f"first on prompt {str(prompts[0])[:80]!r}: return one for each")
        for p, c, r in zip(prompts, completions, rewards.tolist()):
            if not math.isfinite(r):
                raise UserError(f"--reward-fn {spec} returned {r} for prompt {str(p)[:80]!r}, completion "
                                f"{str(c)[:80]!r}: return finite numbers")
        return rewards

    def reward(prompts, completions, rows):
        rewards, (rank, size), message = torch.zeros(len(prompts)), world(), None
        completions = [as_answer(p, c) for p, c in zip(prompts, completions)]
        own = prompts[rank::size], completions[rank::size], rows[rank::size]
        try:
            rewards[rank::size] = checked(*own) if own[0] else torch.zeros(0)
        except UserError as error:
            message = str(error)
        raise_together(message)
        return summed(rewards)

    return reward


def reward_from_model(name: str, args):
    """A sequence-classification model with one label and its own tokenizer. The score is read at the last token, by
    index: the stock head searches for pad, and finds the token before EOS where pad equals EOS."""
    model = load_model(name, args.device, args.dtype, kind=AutoModelForSequenceClassification)
    tokenizer = load_tokenizer(name)
    if model.config.num_labels != 1:
        raise UserError(f"--reward-model {name}: has {model.config.num_labels} labels: a reward model has one")
    if not hasattr(model, "score"):
        raise UserError(f"--reward-model {name}: {model.config.model_type} has no head `score` on its last states: "
                        "take a decoder")
    shard(model, args)

    @torch.no_grad()
    def reward(prompts, completions, rows):
        stops = [tokenizer.eos_token_id]
        encoded = [encode_row(tokenizer, p, as_answer(p, c), stops) for p, c in zip(prompts, completions)]
        rewards = torch.zeros(len(encoded))
        for group in micro_batches([len(ids) for ids, _ in encoded], args.micro_batch_size):
            input_ids, mask = pad_rows([encoded[i] for i in group], model.device)
            rewards[group] = head_scores(model, states_at_end(model, input_ids, mask)).cpu()
        rewards = summed(rewards)
        if not rewards.isfinite().all():
            bad = int(rewards.isfinite().long().argmin())
            raise UserError(f"--reward-model {name}: not a finite score for prompt {str(prompts[bad])[:80]!r}, "
                            f"completion {str(completions[bad])[:80]!r}: train it with a lower --learning-rate")
        return rewards

    return reward


# ----------------------------------------------------------------------------------------------------------- evaluation


def prompts_that_fit(rows, tokenizer, max_new_tokens: int, max_length: int) -> list[dict]:
    """Rows with distinct prompts that leave room for max_new_tokens."""
    fitting = [row for row in {str(row["prompt"]): row for row in rows}.values()
               if len(encode_prompt(tokenizer, row["prompt"])) + max_new_tokens <= max_length]
    if not fitting:
        raise UserError(f"--max-new-tokens {max_new_tokens}: no held-out prompt leaves so much room in {max_length} "
                        "tokens: lower it")
    return fitting


@torch.no_grad()
def evaluate_policy(model, tokenizer, rows, reward, reference_samples, args, step: int,
                    prefix="", reference=None) -> tuple[dict, list[dict]]:
    """One fresh sample for each row's prompt -> (metrics, samples): KL(pi || pi_ref) in nats a completion and, where
    there is a reward, its mean and the win rate against the reference's samples (None: these are the reference's).
    With a prefix in front of the policy's prompts the KL is that of pi(. | prefix, x) to pi_ref(. | x)."""
    prompts = [row["prompt"] for row in rows]
    with torch.random.fork_rng(devices=[]):  # an evaluation must not change what training draws
        torch.manual_seed(args.seed + 1000 * step)
        prefixed = [with_prefix(prompt, prefix) for prompt in prompts]
        rollout = generate(model, tokenizer, prefixed, 1, args.max_new_tokens, args.temperature)
    ref_rows = rollout.rows if not prefix else [make_row(encode_prompt(tokenizer, prompt), ids[mask.index(1):])
                                                for prompt, (ids, mask) in zip(prompts, rollout.rows)]
    log_ratios = sequence_logprobs(model, rollout.rows, args.micro_batch_size, args.temperature)
    # Where training needs no reference, one is read for a moment.
    ref_model = reference or shard(load_model(args.model, args.device, args.dtype), args)
    log_ratios -= sequence_logprobs(ref_model, ref_rows, args.micro_batch_size, args.temperature)
    if reference is None:
        del ref_model
        gc.collect()  # FSDP's modules know each other in circles
    metrics = {"ended": rollout.ended.float().mean().item()}
    metrics["kl"], metrics["kl_se"] = mean_and_se(log_ratios)
    samples = [{"step": step, "prompt": p, "completion": c, "ended": e}
               for p, c, e in zip(prompts, rollout.completions, rollout.ended.tolist())]
    if reward:
        rewards = reward(prompts, rollout.completions, rows)
        samples = [{**sample, "reward": r} for sample, r in zip(samples, rewards.tolist())]
        ref_rewards = torch.tensor([sample["reward"] for sample in reference_samples or samples])
        metrics["reward"], metrics["reward_se"] = mean_and_se(rewards)
        wins = (rewards > ref_rewards) + 0.5 * (rewards == ref_rewards)
        metrics["win_rate"], metrics["win_rate_se"] = mean_and_se(wins)
        best = optimal_gain(args, metrics["kl"])
        if best:
            metrics["share_of_optimum"] = (metrics["reward"] - ref_rewards.mean().item()) / best
    return metrics, samples


def optimal_gain(args, kl: float) -> float | None:
    """The most that any policy with this KL gains in reward over the reference: known in the embedded world, where
    assets/make.py computed it from pi* = pi_ref exp(r / beta) / Z. Linear between its points; None beyond them."""
    gold = str(ASSETS / "rewards.py") + ":sentiment"
    given = [str(Path(name or "").resolve()) for name in (args.model, args.reward_fn)]
    if (*given, args.temperature) != (str(ASSETS / "tiny-sft"), gold, 1.0):
        return None
    table = json.loads((ASSETS / "frontier.json").read_text())
    points = [(0.0, 0.0)] + [(point["kl"], point["reward"] - table["reward_ref"]) for point in table["points"]]
    for (kl_0, gain_0), (kl_1, gain_1) in zip(points, points[1:]):
        if kl_0 < kl <= kl_1:
            return gain_0 + (gain_1 - gain_0) * (kl - kl_0) / (kl_1 - kl_0)
    return None


def report(run, evaluation: dict, samples: list[dict], reference_samples: list[dict]) -> None:
    """Write results.json, and print five samples of reference and trained policy, and the table that compares them."""
    before, after = ["reference", "-", "0", "-", "-", "-"], ["trained", "-", "-", "-", "-", "-"]
    before[4] = f"{sum(sample['ended'] for sample in reference_samples) / len(samples):.1%}"
    after[4] = f"{evaluation['ended']:.1%}"
    after[2] = f"{evaluation['kl']:.2f} ± {evaluation['kl_se']:.2f}"
    if "share_of_optimum" in evaluation:
        after[-1] = f"{evaluation['share_of_optimum']:.1%}"
    if "reward" in evaluation:
        ref_rewards = torch.tensor([sample["reward"] for sample in reference_samples])
        evaluation = {**evaluation, "reward_ref": ref_rewards.mean().item(), "reward_ref_sd": ref_rewards.std().item()}
        before[1], before[3] = f"{evaluation['reward_ref']:.2f} (sd {evaluation['reward_ref_sd']:.2f})", "50%"
        after[1] = f"{evaluation['reward']:.2f} ± {evaluation['reward_se']:.2f}"
        after[3] = f"{evaluation['win_rate']:.1%} ± {evaluation['win_rate_se']:.1%}"
    run.write_results(**evaluation)
    for pair in list(zip(reference_samples, samples))[:5]:
        prompt = pair[0]["prompt"]
        print(f"\n{prompt[-300:] if isinstance(prompt, str) else prompt[-1]['content'][-300:]}")
        for who, sample in zip(("reference", "trained"), pair):
            reward = f"{sample['reward']:+.2f} " if "reward" in sample else ""
            print(f"  {who:9} {reward}|{sample['completion'][:400]}")
    print(f"\n{len(samples)} held-out prompts, one sample each:")
    print_table([["policy", "reward", "KL, nats", "win rate", "ended", "of the optimum"], before, after])
    print(f"saved to {run.dir}")


def mean_and_se(values: torch.Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


def print_table(rows: list[list]) -> None:
    """Rows of cells, the first one the header."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        print("  ".join([f"  {first:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(others, widths[1:]))]))


def progress_bar(name: str, start: int, total: int) -> tqdm:
    interval = 0.5 if sys.stdout.isatty() else 10
    return tqdm(range(start, total), initial=start, total=total, desc=name, file=sys.stdout, mininterval=interval)


# -------------------------------------------------------------------------------------------------------- run directory


class Run:
    """--output-dir: args.json, metrics.jsonl, samples.jsonl, results.json, checkpoint/. A run killed at any moment and
    started again with --resume writes what the uninterrupted run would have written."""

    def __init__(self, args):
        self.args, self.dir, self.started = args, Path(args.output_dir), time.time()
        self.checkpoint, self.files, self.tensorboard = self.dir / "checkpoint" / "state.pt", {}, None
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            (self.dir / "metrics.jsonl").touch()
        except OSError as error:
            raise UserError(f"--output-dir {self.dir}: {error.strerror}: choose a directory that can be written")
        if args.resume and self.checkpoint.exists():
            before = json.loads((self.dir / "args.json").read_text())
            for name, value in asdict(args).items():
                free = ("resume", "device", "tensorboard", "output_dir", "micro_batch_size", "gradient_checkpointing",
                        "replicas", "reward_timeout")  # what an error line may ask to change
                if name not in free and before.get(name, value) != value:
                    raise UserError(f"--resume: {self.dir} was started with --{name.replace('_', '-')} {before[name]}, "
                                    f"now it is {value}: give the same flags, or another --output-dir")
        if args.tensorboard and world()[0] == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: that package is not installed: pip install tensorboard")
            self.tensorboard = SummaryWriter(self.dir)

    def start(self, model, optimizer) -> tuple[int, dict]:
        """-> (updates done, the `memory` given to save_checkpoint), with model, optimizer, random states and files as
        they were then; (0, {}) at the beginning. Only here is an earlier run in the same directory cleared away."""
        state, first = {"step": 0, "memory": {}, "lengths": {"metrics": 0, "samples": 0}}, world()[0] == 0
        if self.args.resume and self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=world()[1] > 1)
            model.load_state_dict({name: own_part(state["model"][name], x) for name, x in model.state_dict().items()})
            moments = state["optimizer"].get("state", {})  # of the parameters that have been updated, by number
            for number, parameter in enumerate(model.parameters()):
                if number in moments:
                    moments[number] = {name: own_part(x, parameter) for name, x in moments[number].items()}
            optimizer.load_state_dict(state["optimizer"])
            set_random_state(state["random"])
            print(f"resuming {self.dir} after update {state['step']}", flush=True)
        elif first:
            self.checkpoint.unlink(missing_ok=True)
            (self.dir / "results.json").unlink(missing_ok=True)
            write_atomically(self.dir / "args.json", json.dumps(asdict(self.args), indent=1).encode())
        for name, length in state["lengths"].items():
            self.files[name] = open(self.dir / f"{name}.jsonl" if first else os.devnull, "ab")
            self.files[name].truncate(length) if first else None
        return state["step"], state["memory"]

    def log(self, step: int, **metrics) -> None:
        self.write("metrics", {"step": step, **metrics})
        for name, value in metrics.items() if self.tensorboard else ():
            self.tensorboard.add_scalar(name, value, step)

    def write(self, name: str, *rows: dict) -> None:
        self.files[name].write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self.files[name].flush()

    def save_checkpoint(self, step: int, model, optimizer, memory: dict) -> None:
        weights, moments = whole(in_parts(model).state_dict()), whole(optimizer.state_dict())
        state = {"step": step, "memory": memory, "model": weights, "optimizer": moments, "random": random_state(),
                 "lengths": {name: file.tell() for name, file in self.files.items()}}
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def write_results(self, **results) -> None:
        results["seconds"] = time.time() - self.started
        write_atomically(self.dir / "results.json", json.dumps(results, indent=1).encode())

    def check_finite(self, step: int, loss: float, grad_norm: float, rows: list[int]) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            saved = f"last good checkpoint: {self.checkpoint}" if self.checkpoint.exists() else "no checkpoint yet"
            raise UserError(f"update {step + 1}: loss {loss}, gradient norm {grad_norm}, training rows {rows[:8]} ...; "
                            f"{saved}: lower --learning-rate")


def random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0].clone())
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1])


def write_atomically(path: Path, data) -> None:
    """Bytes, or what writes them into a file: it is there whole or not at all, after a power cut too. Of many processes
    the first writes."""
    if world()[0] > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        try:
            data(file) if callable(data) else file.write(data)
        except RuntimeError as error:  # what torch.save calls a full disk
            raise OSError(f"{path}: {error}")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
