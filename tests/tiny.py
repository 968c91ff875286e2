"""Random models of each architecture, small enough to test everything exactly, and tokenizers with each known quirk."""

import copy

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SMALL = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
             pad_token_id=3)
WITHOUT_GROUPS = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(**SMALL),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen3": transformers.Qwen3Config(**SMALL),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=6),
    "gemma2": transformers.Gemma2Config(**SMALL, sliding_window=6, final_logit_softcapping=0.7,
                                        query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                                    eos_token_id=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": transformers.GPTNeoXConfig(**WITHOUT_GROUPS),
    "cohere": transformers.CohereConfig(**SMALL, logit_scale=0.3),
    "granite": transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
}


def model_of(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name])).eval()
    for parameter in model.parameters():  # far from uniform, so that a wrong position or scale shows
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class Ids:
    """A tokenizer over numbers, "5 7 9" <-> [5, 7, 9], with EOS 2 and no pad: all that generation needs."""

    eos_token_id, bos_token_id, pad_token_id, chat_template = 2, 1, None, None

    def __call__(self, text, add_special_tokens=True):
        ids = [int(word) for word in text.split()]
        return transformers.BatchEncoding({"input_ids": ids})

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(i) for i in ids)

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(ids) for ids in rows]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 is converted: BPE with byte fallback, BOS, and a dummy space before every text."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += ["▁"] + list("abcdehlortuwy.,:!") + ["▁t", "▁th", "▁the", "he", "re", "▁w", "lo"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("h", "e"), ("r", "e"), ("▁", "w"), ("l", "o")]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>",
                                     byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def byte_level(**kwargs) -> PreTrainedTokenizerFast:
    """As GPT-2: bytes and a few merges; no pad, and no BOS but EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "he", "ab"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e"), ("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False,
                                   **{"eos_token": "<|endoftext|>", **kwargs})


def saved_language(directory, seed: int, prefix: str = "", std: float = 0.3):
    """A Llama of six words, "." among them for EOS, in Hugging Face form. Its completions of at most two tokens are
    listed: -> [31 ids], of which each has probability exp(sequence_logprobs). Its tokenizer puts the prefix before
    every prompt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, ".": 1, "a": 2, "b": 3, "c": 4, "d": 5}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    before = ["<s>", *prefix.split()]  # of every prompt: a policy of reward_conditioning.py adds its label itself
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A"]), special_tokens=[(word, tokenizer.token_to_id(word)) for word in before])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=".", model_max_length=16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return [[1]] + [[first, second] for first in (0, 2, 3, 4, 5) for second in range(6)]
