"""Models, text -> ids, log-probabilities, sampling: what a reader of the scripts must understand.

* A Row is (ids, mask): prompt tokens, then completion tokens up to and including the stop token.
  The mask is 1 on the completion. It goes by position, never by id: pad may equal EOS.
* Batches of rows are padded on the right, input_ids and completion_mask [B, T], and stay on the
  CPU, where their indices are computed; the model's device gets what it needs in one copy.
* logps [B, T] holds at t the log-probability of the token *at* t given those before it (nats),
  0 outside the mask.
* Weights and reductions are fp32. On a GPU the forward passes run under bf16 autocast.
* Under torchrun every process runs the whole script with the same random numbers and computes
  its share of each batch (micro_batches, generate); all_reduce() puts the shares together.
"""

import contextlib
import json
import math
import os
import types
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# cuDNN's attention builds a plan for each new shape, up to a second each; packed rows are all new.
torch.backends.cuda.enable_cudnn_sdp(False)

AUTOCAST = {}  # kind of device -> dtype of the forward passes, as --dtype says
FINGERPRINTS = {}  # model or data file -> a number that changes when its content does, for --resume


class UserError(Exception):
    """A user's mistake: one line that names the thing, the row and the fix. Exit status 2."""


# --- models ---


def load_model(name, device="auto", dtype="auto", kind=AutoModelForCausalLM, new_head=False):
    """A Hub id or directory -> the model on its device: fp32 weights, no dropout.

    All weights must be in the files; new_head: all but those of a classification head.
    """
    device = pick_device(device)
    bf16 = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
    AUTOCAST[device.type] = torch.bfloat16 if bf16 else None
    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"model {name}: is a LoRA adapter: merge it first (peft: merge_and_unload)")
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        for key, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(config, key, 0.0)  # a policy with dropout is not the policy that sampled
        model, info = kind.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
    check_weights(name, model, info, new_head)
    if world_size() == 1:
        model.to(device)  # of many processes, none may have room for all of it: shard() moves it
    return model.eval()


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(0, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device
    except (RuntimeError, AssertionError) as error:
        cause, found = str(error).splitlines()[0], torch.cuda.device_count()
        raise UserError(f"--device {name}: {cause} ({found} GPUs found): use cpu, cuda or cuda:N, "
                        "and at most one process per GPU")


def check_weights(name: str, model, info: dict, new_head: bool) -> None:
    """The files hold this model's weights, all of them and no others, and numbers in each."""
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if new_head:
        missing = {key for key in missing if not key.startswith("score.")}
        unexpected = {key for key in unexpected if not key.startswith("lm_head.")}
    if missing or unexpected:
        raise UserError(
            f"model {name}: is no {type(model).__name__}: {len(missing)} weights are missing "
            f"({', '.join(sorted(missing)[:2])}), {len(unexpected)} are unknown "
            f"({', '.join(sorted(unexpected)[:2])}): give a model of the right kind, saved without "
            "a wrapper (torch.compile, DDP, peft)"
        )
    bits = 0
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"model {name}: {key} is not finite: use another checkpoint")
        bits += int(weight.detach().view(torch.int32).sum())
    FINGERPRINTS[f"model {name}"] = bits


def load_tokenizer(name: str, chat_template: str | None = None):
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no EOS token, so no completion can end: "
                        "name one as eos_token in its tokenizer_config.json")
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--chat-template {chat_template}: {error.strerror}: give a Jinja file")
    return tokenizer


@contextlib.contextmanager
def loading(name: str):
    """Whatever transformers raises while it loads, as one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        fix = "check the name, the network and HF_HUB_OFFLINE"
        if Path(name).is_dir():
            fix = "the directory must hold config.json, *.safetensors and a tokenizer"
        raise UserError(f"model {name}: cannot be loaded ({cause}): {fix}")


def autocast(model):
    dtype = AUTOCAST.get(model.device.type)
    return torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None)


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a completion: generation_config may list several."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({*configured, tokenizer.eos_token_id} - {None})


def window(model) -> int:
    """The longest row that the model has positions for; 1,024 where it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1024


def save_model(model, tokenizer, directory, dtype="float32", start=None) -> None:
    """Write Hugging Face files, adapters merged, in fp32 as the weights were trained.

    bfloat16 halves the files and loses every update below 1/256 of its weight, most of a real
    model's: the share is printed, by comparison with `start`, the model before training.
    """
    reshard(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # whole on the first process alone
    if rank() == 0:
        save_adapters(state, model, Path(directory) / "adapter", start)
        merge_adapters(state, model)
        if dtype == "bfloat16":
            before = type(model).from_pretrained(start, dtype=torch.float32).state_dict()
            pairs = [(x, before[name]) for name, x in state.items() if name in before]
            moved = sum(int((x != y).sum()) for x, y in pairs)
            kept = sum(int((x.bfloat16() != y.bfloat16()).sum()) for x, y in pairs)
            print(f"--save-dtype bfloat16: {1 - kept / max(1, moved):.1%} of the updates are lost")
        state = {name: x.to(getattr(torch, dtype)) for name, x in state.items()}
        for name in model.all_tied_weights_keys:
            state.pop(name, None)  # another name of a weight that is written already
        model.save_pretrained(directory, state_dict=state)
        model.config.dtype = getattr(torch, dtype)  # not the dtype of the model in memory
        model.config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    if world_size() > 1:
        dist.barrier()  # the others read the files next


# --- LoRA ---


class LoRALinear(torch.nn.Linear):
    """y = W x + (alpha / rank) B A x (Hu et al. 2021): W is frozen, and B is 0 at the start."""

    def __init__(self, linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.enabled = rank, alpha, True
        device = self.weight.device
        self.lora_A = torch.nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = torch.nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = super().forward(x)
        if self.enabled:
            y = y + self.alpha / self.rank * F.linear(F.linear(x, self.lora_A), self.lora_B)
        return y


def adapters_of(model) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_adapters(model, rank: int, alpha: float, dtype: torch.dtype) -> None:
    """Adapters on all linear layers of the trunk. A new head is trained, all else is frozen, in
    the dtype of the forward passes: nothing is ever added to it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("score.")
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for parent in list(model.base_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, LoRALinear(child, rank, alpha))
    if not adapters_of(model):
        raise UserError(f"--lora-rank: {model.config.model_type} has no torch.nn.Linear layers")


@contextlib.contextmanager
def adapters_off(model):
    """The model as it was before LoRA training: the reference. No change without adapters."""
    for adapter in adapters_of(model).values():
        adapter.enabled = False
    yield model
    for adapter in adapters_of(model).values():
        adapter.enabled = True


def merge_adapters(state: dict, model) -> None:
    """In place: W + (alpha / rank) B A."""
    for layer, adapter in adapters_of(model).items():
        change = state.pop(f"{layer}.lora_B") @ state.pop(f"{layer}.lora_A")
        weight = state[f"{layer}.weight"].float()
        state[f"{layer}.weight"] = weight + adapter.alpha / adapter.rank * change


def save_adapters(state: dict, model, directory: Path, start: str) -> None:
    """In PEFT's format: PeftModel.from_pretrained(start, directory) gives the same logits."""
    adapters = adapters_of(model)
    if not adapters:
        return
    head = ["score"] if hasattr(model, "score") else None
    names = [name for name in state if ".lora_" in name or name.startswith("score.")]
    names = {name: name if name.startswith("score.") else f"{name}.weight" for name in names}
    adapter = next(iter(adapters.values()))
    config = dict(
        peft_type="LORA",
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        base_model_name_or_path=str(start),
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=sorted({layer.rpartition(".")[2] for layer in adapters}),
        modules_to_save=head,
    )
    directory.mkdir(parents=True, exist_ok=True)
    weights = {f"base_model.model.{new}": state[old].contiguous() for old, new in names.items()}
    save_file(weights, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1))


# --- many processes ---


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place: each has computed its rows, and has 0 elsewhere."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def prepare_for_training(model, args):
    """Adapters, gradient checkpointing, shards: as the flags say, before the optimizer is made."""
    if args.lora_rank:
        dtype = AUTOCAST.get(pick_device(args.device).type) or torch.float32
        add_adapters(model, args.lora_rank, args.lora_alpha or args.lora_rank, dtype)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only
    return shard(model, args)


def shard(model, args):
    """FSDP2: each process keeps a part of weights, gradients and moments, and has a layer whole
    while it computes with it. --replicas copies, such as one per node, make it HSDP."""
    uses_packing(model)  # tried on the trunk alone, which must not be called once it is sharded
    if world_size() == 1:
        return model
    if world_size() % args.replicas:
        raise UserError(f"--replicas {args.replicas}: does not divide {world_size()} processes")
    device, shape = pick_device(args.device).type, (args.replicas, world_size() // args.replicas)
    mesh = dist.init_device_mesh(device, shape, mesh_dim_names=("replicas", "shards"))
    mesh = mesh if args.replicas > 1 else mesh["shards"]
    policy = MixedPrecisionPolicy(param_dtype=AUTOCAST[device], reduce_dtype=torch.float32)
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by the whole batch
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.trunk_states = types.MethodType(trunk_states, model)
    register_fsdp_forward_method(model, "trunk_states")
    return model


@contextlib.contextmanager
def unsharded(model):
    """All weights whole, on every process: each samples as long as its own rows need."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:  # the model itself comes first
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def reshard(model) -> None:
    """FSDP leaves some weights whole after a forward pass without gradient."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def mean_over_batch(totals: dict, count: int) -> dict[str, float]:
    """Sums over this process's rows -> means over the `count` rows of the whole batch."""
    sums = all_reduce(torch.stack([total.detach().float() for total in totals.values()]))
    return {name: total / count for name, total in zip(totals, sums.tolist())}


def to_floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars on the device -> numbers, for one wait of the host."""
    return dict(zip(values, torch.stack([x.float() for x in values.values()]).tolist()))


def load_policy(args):
    """--model, ready to be trained."""
    return prepare_for_training(load_model(args.model, args.device, args.dtype), args)


def load_reference(policy, args):
    """The policy before training: itself with its adapters off (adapters_off), or a second copy."""
    if args.lora_rank:
        return policy
    return shard(load_model(args.model, args.device, args.dtype), args)


def save_and_reload(model, tokenizer, directory, args, kind=AutoModelForCausalLM):
    """Save the trained model, and read the files back: they are what is evaluated at the end."""
    save_model(model, tokenizer, directory, args.save_dtype, args.model)
    return shard(load_model(str(directory), args.device, args.dtype, kind), args)


def set_learning_rate(optimizer, step: int, total_steps: int, *peaks: float) -> float:
    """Linear warm-up over the first tenth of the steps, then linear decay to 0. One peak for each
    group of parameters -> the first group's rate."""
    warmup = max(1, round(0.1 * total_steps))
    factor = min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup))
    for group, peak in zip(optimizer.param_groups, peaks):
        group["lr"] = peak * factor
    return peaks[0] * factor


def clip_gradients(model, max_norm: float) -> float:
    """-> the norm of the gradient of all parameters, before it was clipped to max_norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# --- text to ids ---


class Row(NamedTuple):
    ids: list[int]
    mask: list[int]  # 1 on the completion


def make_row(prompt_ids: list[int], completion_ids: list[int]) -> Row:
    mask = [0] * len(prompt_ids) + [1] * len(completion_ids)
    return Row(prompt_ids + completion_ids, mask)


def encode_prompt(tokenizer, prompt, tools=None) -> list[int]:
    """A text, or messages through the chat template -> the ids that generation starts from.

    Where the last message is the assistant's, it is continued.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        if ids[:2] == [bos, bos]:
            ids = ids[1:]  # the text began with one
        if ids[-1:] == [eos] != encode(tokenizer, prompt)[-1:] or ids[-2:] == [eos, eos]:
            ids = ids[:-1]  # some tokenizers end every text
    else:
        begun = prompt[-1]["role"] != "assistant"
        ids = encode(tokenizer, render(tokenizer, prompt, tools, begun, continued=not begun))
    return ids or [eos if bos is None else bos]


def encode_row(tokenizer, prompt, completion, stops: list[int], tools=None) -> Row:
    """-> the prompt's ids, as generation starts from them, then the completion's, the last one a
    stop token. No token spans the boundary; all together decode to prompt + completion."""
    if isinstance(completion, str):
        ids = up_to_stop(tokenizer, encode_continuation(tokenizer, completion), stops)
        return make_row(encode_prompt(tokenizer, prompt, tools), ids)
    if prompt[-1]["role"] == "assistant":  # begun in the prompt, continued by the completion
        if len(completion) > 1:
            raise UserError("the prompt's last message is the assistant's: its completion must be "
                            "one message, which continues it")
        before = render(tokenizer, prompt, tools, continued=True)
        words = prompt[-1]["content"] + completion[0]["content"]
        whole = [*prompt[:-1], {**completion[0], "content": words}]
        begun = len(prompt[-1]["content"])
        return encode_turn(tokenizer, before, whole, stops, tools, begun=begun)
    rows = encode_conversation(tokenizer, [*prompt, *completion], stops, tools, len(prompt))
    if len(rows) != 1:
        raise UserError(f"the completion has {len(rows)} turns of the assistant that the chat "
                        "template does not write as one text: give one turn per completion")
    return rows[0]


def encode_conversation(tokenizer, messages, stops, tools=None, first=0) -> list[Row]:
    """-> rows, the mask on what the assistant says in messages[first:] and on its stop tokens.

    Each turn stands behind the ids that generation would have started from: in one row where
    the text only grows, else (templates that drop earlier reasoning) in a row of its own.
    """
    rows = []
    for turn in range(first, len(messages)):
        if messages[turn]["role"] != "assistant" or messages[turn].get("weight") == 0:
            continue
        so_far = messages[:turn + 1]
        if turn > 0:
            before = render(tokenizer, messages[:turn], tools, begun=True)
        else:  # nothing to start from but what the template puts before the words
            texts = render(tokenizer, so_far, tools), render(tokenizer, blanked(so_far), tools)
            before = os.path.commonprefix(texts)
        row = encode_turn(tokenizer, before, so_far, stops, tools)
        if rows:
            ids, mask = rows[-1]
            if len(ids) <= row.mask.index(1) and row.ids[:len(ids)] == ids:
                rows.pop()
                row = Row(row.ids, mask + row.mask[len(mask):])
        rows.append(row)
    return rows


def encode_turn(tokenizer, before: str, messages, stops, tools=None, *, begun=0) -> Row:
    """The text that generation starts from, and a conversation that ends with the assistant -> the
    ids of both, the mask on what generation writes, up to and including the first stop token.
    begun: characters of the assistant's words that `before` is known to hold."""
    text = render(tokenizer, messages, tools)
    if text.startswith(before):
        said = text[len(before):]
    else:
        # The template begins a turn otherwise than it writes a finished one: DeepSeek-R1 opens a
        # think tag, and later drops the reasoning. Generation writes what `before` has not begun
        # of the content, then the turn's end.
        content = messages[-1]["content"]
        overlap = [n for n in range(2, len(content) + 1) if before.endswith(content[:n])]
        end = render(tokenizer, blanked(messages), tools).rpartition("\0")[2]
        said = content[begun or max(overlap, default=0):] + end
    ids = up_to_stop(tokenizer, encode_continuation(tokenizer, said), stops)
    return make_row(encode(tokenizer, before), ids)


def up_to_stop(tokenizer, ids: list[int], stops: list[int]) -> list[int]:
    """What generation would have written: up to and including a stop token, and nothing after."""
    stop_at = [t for t, token in enumerate(ids) if token in stops]
    return ids[:stop_at[0] + 1] if stop_at else [*ids, tokenizer.eos_token_id]


def blanked(messages) -> list[dict]:
    """A mark for the words of the last message: what surrounds it is the template's."""
    return [*messages[:-1], {**messages[-1], "content": "\0"}]


def render(tokenizer, messages, tools=None, begun=False, continued=False) -> str:
    """The chat template's text. begun: with the beginning of the assistant's turn; continued:
    without the end of the last one."""
    if tokenizer.chat_template is None:
        raise UserError("conversations need a chat template, and the tokenizer has none: give one "
                        "with --chat-template")
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                             add_generation_prompt=begun,
                                             continue_final_message=continued)
    except Exception as error:  # a template raises what it likes
        if len(messages) > 1 and messages[0]["role"] == "system":  # Gemma's knows no system role
            content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
            merged = [{**messages[1], "content": content}, *messages[2:]]
            return render(tokenizer, merged, tools, begun, continued)
        raise UserError(f"the chat template refuses {json.dumps(messages)[:80]} ({error}): change "
                        "the row or the template")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_continuation(tokenizer, text: str) -> list[int]:
    """A text that continues another: no BOS, and not the space that SentencePiece and
    add_prefix_space put before every text. It is cut off behind an anchor, where they do."""
    context = encode(tokenizer, "a")
    plain = tokenizer.decode(encode(tokenizer, text))  # some tokenizers rewrite characters
    spaces = text[:len(text) - len(text.lstrip(" "))]
    expected = tokenizer.decode(context) + spaces + plain.lstrip(" ")
    for anchor in ("", "\n", "a\n", "a:", "a"):
        start = encode(tokenizer, anchor)
        ids = encode(tokenizer, anchor + text)
        same_start, ids = ids[:len(start)] == start, ids[len(start):]
        if same_start and tokenizer.decode(context + ids) == expected:
            return ids
    return encode(tokenizer, text)


# --- batches ---


def pad_rows(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> input_ids, completion_mask [B, T], padded on the right with zeros, which are not read."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    completion_mask = torch.tensor([mask + [0] * (longest - len(mask)) for _, mask in rows])
    return input_ids, completion_mask


def token_budget(model) -> int:
    """Tokens per forward pass: 4,096, or so many that their logits take 1 GiB in fp32."""
    return min(4096, 2**28 // model.get_input_embeddings().num_embeddings)


def micro_batches(lengths, micro_batch_size=None, tokens=4096) -> list[list[int]]:
    """Indices of rows, sorted by length, in groups for one forward pass each: micro_batch_size
    rows per process, or (None) as many as fit into `tokens` tokens. Each process gets its share
    of every group, so that all make equally many passes, as FSDP demands."""
    size, groups = world_size(), [[]]
    if len(lengths) < size:
        raise UserError(f"{len(lengths)} rows for {size} processes: give each at least one "
                        "(--batch-size, --eval-prompts)")
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        most = micro_batch_size or tokens // max(1, lengths[index])
        if len(groups[-1]) >= size * max(1, most):
            groups.append([])
        groups[-1].append(index)
    if len(groups[-1]) < size:  # one for each is left
        last = groups.pop()
        groups[-1] += last
    return [g[len(g) * rank() // size:len(g) * (rank() + 1) // size] for g in groups]


def send(device, *tensors) -> list[torch.Tensor]:
    """Integers from the CPU to the device, in one copy that the host does not wait for."""
    together = torch.cat([x.flatten() for x in tensors])
    if device.type == "cuda":
        together = together.pin_memory()
    parts = together.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]


# --- log-probabilities ---


def token_logprobs(model, input_ids, completion_mask, temperature=1.0) -> torch.Tensor:
    """log p(token t | tokens < t) at the given temperature -> [B, T] fp32, 0 outside the mask.

    input_ids, completion_mask [B, T], padded on the right. Logits exist only where they predict
    a completion token, and the model itself scales and caps them.
    """
    input_ids, is_target = input_ids.cpu(), completion_mask.cpu().bool()
    is_target = is_target & (torch.arange(input_ids.shape[1]) > 0)  # nothing predicts the first
    predicts = F.pad(is_target[:, 1:], (0, 1))
    target_at = is_target.flatten().nonzero().squeeze(1)
    logits = logits_at(model, input_ids, predicts)  # [N, V]
    targets, target_at = send(logits.device, input_ids[is_target], target_at)
    logits = logits.float()
    if temperature != 1.0:  # a copy of them all, which takes its time
        logits = logits / temperature
    logps = -F.cross_entropy(logits, targets, reduction="none")
    zeros = torch.zeros(input_ids.numel(), device=logits.device)
    return zeros.index_copy(0, target_at, logps).view(input_ids.shape)


def logits_at(model, input_ids, predicts) -> torch.Tensor:
    """The logits at the marked positions [B, T], row by row -> [N, V]."""
    inputs, at = forward_inputs(model, input_ids, predicts)
    with autocast(model):
        if "attention_mask" in inputs:  # packed
            return model(**inputs, logits_to_keep=at).logits[0]
        return model(**inputs).logits.flatten(0, 1).index_select(0, at)


@torch.no_grad()
def sequence_logprobs(model, rows, micro_batch_size=None, temperature=1.0) -> torch.Tensor:
    """log pi(completion | prompt) of each row, the sum over its tokens -> [n] fp32, on the CPU."""
    sums = torch.zeros(len(rows), device=model.device)
    lengths = [len(ids) for ids, _ in rows]
    for group in micro_batches(lengths, micro_batch_size, token_budget(model)):
        input_ids, mask = pad_rows([rows[i] for i in group])
        sums[group] = token_logprobs(model, input_ids, mask, temperature).sum(1)
    return all_reduce(sums).cpu()


def states_at(model, input_ids, positions) -> torch.Tensor:
    """The last layer's states at the marked positions [B, T], row by row -> [N, D]."""
    inputs, at = forward_inputs(model, input_ids, positions)
    trunk = getattr(model, "trunk_states", types.MethodType(trunk_states, model))
    with autocast(model):
        return trunk(**inputs).flatten(0, 1).index_select(0, at)


def trunk_states(model, **inputs):
    return model.base_model(**inputs).last_hidden_state


def head_scores(model, states) -> torch.Tensor:
    """The one-label head in fp32: in bf16 many scores would be equal. [..., D] -> [...]"""
    with torch.autocast(states.device.type, enabled=False):
        return F.linear(states.float(), model.score.weight.float()).squeeze(-1)


def states_at_end(model, rows: list[Row]) -> torch.Tensor:
    """The last layer's state at the last token of each row, found by its index -> [B, D]."""
    input_ids, _ = pad_rows(rows)
    last = torch.tensor([len(ids) - 1 for ids, _ in rows])
    return states_at(model, input_ids, torch.arange(input_ids.shape[1]) == last[:, None])


# --- packing: rows without padding, and a shared prompt only once ---


def forward_inputs(model, input_ids, wanted) -> tuple[dict, torch.Tensor]:
    """-> forward()'s arguments, and where in its flattened result the wanted positions [B, T]
    stand [N]. Rows are packed into one, up to the last wanted position of each:

        rows   x y a b .      packed   x y a b c d e      packed_at   0 1 2 3 .
               x y c d e                                              0 1 4 5 6

    A start that equals the previous row's (the prompt of a pair) is not repeated. Attention alone
    needs the rows: packed_attention() reads them out by packed_at and writes back by came_from.
    All else in a transformer works token by token. Values and gradients stay the same.
    """
    input_ids, (B, T) = input_ids.cpu(), input_ids.shape
    config = model.config.get_text_config()
    sizes = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    sees_all = all(size is None or T <= size for size in sizes)
    if not (sees_all and uses_packing(model)):
        ids, at = send(model.device, input_ids, wanted.flatten().nonzero().squeeze(1))
        return dict(input_ids=ids, use_cache=False), at
    rows, columns = torch.arange(B)[:, None], torch.arange(T)
    needed = wanted.flip(1).cumsum(1).flip(1) > 0
    needed[0, 0] = True  # at least one token
    is_repeat = torch.zeros_like(needed)
    is_repeat[1:] = ((input_ids[1:] == input_ids[:-1]) & needed[:-1]).cumprod(1).bool()
    is_new = needed & ~is_repeat
    owner = torch.where(is_new, rows, 0).cummax(0).values  # the row in which a repeat was new
    packed_at = (is_new.flatten().cumsum(0) - 1).view(B, T).gather(0, owner).clamp(min=0)
    came_from = is_new.flatten().nonzero().squeeze(1)
    came_from = F.pad(came_from, (0, B * T - len(came_from))).view(B, T)
    # transformers hands a 4-D mask to the attention as it is: here it holds the pack's indices.
    ids, positions, mask, at = send(model.device, input_ids[is_new][None],
                                    columns.expand(B, T)[is_new][None],
                                    torch.stack([packed_at, came_from])[None], packed_at[wanted])
    inputs = dict(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    return inputs, at


def packed_attention(module, query, key, value, mask, **kwargs):
    """query [1, heads, N, D] -> [1, N, heads, D], each row of the pack seeing itself alone."""
    if mask is None or mask.dtype != torch.long:  # no pack
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    packed_at, came_from = mask[0, 0], mask[0, 1].flatten()[:query.shape[2]]

    def in_rows(x):  # [1, heads, N, D] -> [B, heads, T, D]
        tokens = x[0].transpose(0, 1).flatten(1).index_select(0, packed_at.flatten())
        return tokens.view(*packed_at.shape, *x.shape[1::2]).transpose(1, 2)

    rows = in_rows(query), in_rows(key), in_rows(value)
    output, _ = sdpa_attention_forward(module, *rows, None, **kwargs)  # [B, T, heads, D]
    tokens = output.flatten(2).flatten(0, 1).index_select(0, came_from)
    return tokens.view(1, -1, *output.shape[2:]), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)
PACKING = weakref.WeakKeyDictionary()  # model -> whether packing was found to change nothing


@torch.no_grad()
def uses_packing(model) -> bool:
    """Tried once: do three rows, two of which share a start, have the same states packed as each
    alone? Not where tokens mix without attention, or by an attention of the model's own."""
    if model not in PACKING:
        PACKING[model], before = True, model.config._attn_implementation
        rows = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 9, 8], [8, 7, 6, 5, 5]])
        rows = rows % model.get_input_embeddings().num_embeddings
        try:
            with autocast(model):
                ids = rows.to(model.device)
                alone = torch.cat([trunk_states(model, input_ids=row[None])[0] for row in ids])
                model.set_attn_implementation("packed")
                inputs, at = forward_inputs(model, rows, torch.ones_like(rows).bool())
                packed = trunk_states(model, **inputs)[0][at]
            error, size = (packed - alone).abs().max(), alone.abs().max()
            PACKING[model] = bool(error <= (0.05 if AUTOCAST.get(ids.device.type) else 1e-3) * size)
        except Exception:  # whatever an architecture does that does not know such attention
            PACKING[model] = False
        if not PACKING[model] and model.config._attn_implementation != before:
            model.set_attn_implementation(before)
    return PACKING[model]


# --- sampling ---


@dataclass
class Rollout:
    """Completions of a policy; those of prompt i are i * num_samples and what follows it."""

    rows: list[Row]  # train on these ids, never on text that is encoded again
    input_ids: torch.Tensor  # [B, T], padded on the right, on the CPU
    completion_mask: torch.Tensor  # [B, T], on the CPU: up to and including the stop token
    logps: torch.Tensor  # [B, T], on the device, at the sampling temperature
    completions: list[str]  # without the stop token
    ended: torch.Tensor  # [B] bool: stopped by itself, not truncated at max_new_tokens

    @property
    def completion_ids(self) -> list[list[int]]:
        return [ids[mask.index(1):] for ids, mask in self.rows]


@torch.no_grad()
def generate(
    model, tokenizer, prompts, num_samples=1, max_new_tokens=64, temperature=1.0, rows_at_once=None
) -> Rollout:
    """num_samples completions of each prompt (a text, messages, or ids); temperature 0 is greedy.

    Pure sampling: top-k or top-p would make `logps` those of another policy.
    """
    prompt_ids = [list(p) if p and isinstance(p[0], int) else encode_prompt(tokenizer, p)
                  for p in prompts]
    # A random number for each token: it does not matter which process computes it, or when.
    draws = torch.rand(len(prompt_ids), num_samples, max_new_tokens)
    tokens = torch.zeros_like(draws, dtype=torch.long, device=model.device)
    logps = torch.zeros_like(draws, device=model.device)
    longest = max(len(ids) for ids in prompt_ids) + max_new_tokens
    rows_at_once = rows_at_once or rows_in_cache(model, longest)
    own = list(range(rank(), len(prompt_ids), world_size()))
    per_pass = max(1, rows_at_once // num_samples)
    stops = torch.tensor(stop_ids(model, tokenizer), device=model.device)
    training = model.training
    model.eval()  # in training mode, GPT-2 and others drop the cache where they checkpoint
    with unsharded(model), autocast(model):  # outside the steps: weights are cast to bf16 once
        for start in range(0, len(own), per_pass):
            here = own[start:start + per_pass]
            sampled = sample(model, [prompt_ids[i] for i in here], draws[here], temperature, stops)
            tokens[here], logps[here] = sampled
    model.train(training)
    tokens, logps = [all_reduce(x).cpu().flatten(0, 1) for x in (tokens, logps)]

    is_stop = torch.isin(tokens, stops.cpu())
    ended = is_stop.any(1)
    lengths = (is_stop.cumsum(1) == 0).sum(1) + ended  # the stop token is part of the completion
    ids = [row[:n] for row, n in zip(tokens.tolist(), lengths.tolist())]
    prompt_of = [i // num_samples for i in range(len(ids))]
    rows = [make_row(prompt_ids[i], completion) for i, completion in zip(prompt_of, ids)]
    # SentencePiece drops the first space of a text: a completion is what it adds to its prompt.
    whole = [row.ids[:-1] if end else row.ids for row, end in zip(rows, ended)]
    whole = tokenizer.batch_decode(whole, skip_special_tokens=True)
    begun = [len(x) for x in tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)]
    completions = [text[begun[i]:] for i, text in zip(prompt_of, whole)]
    input_ids, mask = pad_rows(rows)
    is_token = torch.arange(max_new_tokens) < lengths[:, None]
    logps = torch.zeros(mask.shape).masked_scatter(mask.bool(), logps[is_token])
    return Rollout(rows, input_ids, mask, logps.to(model.device), completions, ended)


def rows_in_cache(model, length: int) -> int:
    """Rows of so many tokens that are decoded together: at most 512, and as many as have their
    keys and values in 8 GiB of a GPU, or 2 GiB of a CPU."""
    config, gpu = model.config.get_text_config(), model.device.type == "cuda"
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * 4  # bytes; rotary keys may be fp32
    return max(1, min(512, (2**33 if gpu else 2**31) // (per_token * length)))


def sample(model, prompts, draws, temperature, stops) -> tuple[torch.Tensor, ...]:
    """Ids of P prompts, draws [P, G, L] from [0, 1) -> tokens and their log-probabilities
    [P, G, L], of which none behind a stop token counts. Each prompt is encoded once, and finished
    rows are dropped when a quarter is idle."""
    (P, G, L), device, longest = draws.shape, model.device, max(map(len, prompts))
    pads = torch.tensor([longest - len(ids) for ids in prompts])
    ids = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = (torch.arange(longest) >= pads[:, None]).long()
    ids, mask, prompt_of = send(device, ids, mask, torch.arange(P).repeat_interleave(G))
    decode = Decoder(model, longest + L)
    logits = decode(ids, mask)[prompt_of]  # [P * G, V]
    decode.cache.reorder_cache(prompt_of)  # the prompt's keys and values for each completion
    mask = F.pad(mask[prompt_of], (0, L))
    draws = draws.to(device).view(P * G, L)
    tokens, logps = torch.zeros_like(draws, dtype=torch.long), torch.zeros_like(draws)
    live = torch.arange(P * G, device=device)  # whose completion each row of the cache is
    running = torch.ones(P * G, dtype=torch.bool, device=device)
    for t in range(L):
        token, logp = sample_token(logits, temperature, draws[live, t])
        tokens[live, t], logps[live, t] = token, logp
        running = running & ~torch.isin(token, stops)
        if t + 1 == L:
            break
        if device.type != "cuda" or t % 8 == 0:  # to ask a GPU is to wait for it
            left = int(running.sum())
            if left == 0:
                break
            if left <= 0.75 * len(running):  # at every finish, the copies would cost more
                keep = running.nonzero().squeeze(1)
                decode.cache.reorder_cache(keep)
                live, token, mask, running = live[keep], token[keep], mask[keep], running[keep]
        mask[:, longest + t] = 1
        seen = mask if decode.in_place else mask[:, :longest + t + 1]
        logits = decode(token[:, None], seen)
    return tokens.view(P, G, L), logps.view(P, G, L)


def sample_token(logits, temperature, draw) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [B, V], draw [B] from [0, 1) -> a token [B] distributed as softmax(logits /
    temperature), and its log-probability [B] (nats; of greedy tokens at temperature 1)."""
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:  # the inverse of the distribution function; the factor keeps draws below its last value
        cdf = logps.exp().cumsum(-1)
        draw = draw[:, None] * cdf[:, -1:] * (1 - 2**-23)
        token = torch.searchsorted(cdf, draw, right=True).squeeze(1)
    return token, logps.gather(1, token[:, None]).squeeze(1)


class Decoder:
    """Forward passes into one cache, which stays where it is in memory unless a layer has a
    sliding window."""

    def __init__(self, model, end: int):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.in_place = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        if self.in_place:
            self.cache = StaticCache(config=model.config, max_cache_len=end)

    def __call__(self, ids, mask):
        """ids [B, n] behind those in the cache, mask [B, columns] of all -> logits [B, V]."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        if mask.shape != ids.shape and self.in_place:
            mask = mask[:, None, None].bool()  # a 2-D mask is read by the host, for every token
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                         cache=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]
