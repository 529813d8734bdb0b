"""What the examples share: small built-in models, and text as fixed-length token blocks.

Nothing here needs a download: models come from Hugging Face configs with random weights, the
built-in text is the language reference that ships with Python, and its tokens are bytes.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    MixtralConfig,
    Mxfp4Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

BOS = 256  # the one token that is not a byte; starts every document
VOCAB_SIZE = 264  # 256 bytes and BOS, rounded up

_SHARED = dict(
    vocab_size=VOCAB_SIZE,
    bos_token_id=BOS,
    eos_token_id=None,
    pad_token_id=None,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    use_cache=False,
)


def _tiny_qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_SHARED,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )


def _tiny_mixtral() -> PreTrainedConfig:
    return MixtralConfig(
        **_SHARED, intermediate_size=128, num_local_experts=16, num_experts_per_tok=2
    )


def _tiny_deepseek_v3() -> PreTrainedConfig:
    return DeepseekV3Config(
        **_SHARED,
        intermediate_size=256,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
    )


BUILTIN_MODELS = {
    "tiny-qwen3-moe": _tiny_qwen3_moe,
    "tiny-mixtral": _tiny_mixtral,
    "tiny-deepseek-v3": _tiny_deepseek_v3,
}


def builtin_model(name: str, seed: int) -> torch.nn.Module:
    """A built-in model with random weights: the same on every rank that passes the same seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(BUILTIN_MODELS[name]())


def encode_bytes(text: str) -> list[int]:
    return [BOS, *text.encode()]


def read_documents(source: str) -> list[str]:
    """Documents of `source`: "builtin", a .txt file, or a .jsonl file with a "text" field."""
    if source == "builtin":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f'data must be "builtin", a .txt or a .jsonl file, got {source!r}')
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".txt":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{source}, line {number}: expected an object with a "text" string')
        documents.append(record["text"])
    return documents


def token_blocks(documents: list[str], encode, seq_len: int, seed: int) -> torch.Tensor:
    """All documents as shuffled blocks of `seq_len` tokens, shape [blocks, seq_len].

    The order depends on the arguments only, so every rank, and a resumed run, sees the same one.
    """
    tokens = [token for document in documents for token in encode(document)]
    starts = list(range(0, len(tokens) - seq_len + 1, seq_len))
    if not starts:
        raise ValueError(f"the data holds {len(tokens)} tokens, less than one block of {seq_len}")
    random.Random(seed).shuffle(starts)
    return torch.tensor([tokens[start : start + seq_len] for start in starts])


def load(name: str, seed: int) -> tuple[torch.nn.Module, Callable[[str], list[int]]]:
    """A built-in model or that of a Hugging Face path, and what turns text into its tokens.

    Under ZeRO-3 transformers partitions it meanwhile, if `TrainingArguments` or an `Accelerator`
    have told it so.
    """
    if name in BUILTIN_MODELS:
        return builtin_model(name, seed), encode_bytes
    model = AutoModelForCausalLM.from_pretrained(name, **dequantized(name))
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(name)
    return model, lambda text: tokenizer(text, verbose=False)["input_ids"]


def dequantized(name: str) -> dict:
    """What `from_pretrained` must be told to read weights that are published in MXFP4, as those of
    gpt-oss are, as weights that can be trained.
    """
    found = getattr(AutoConfig.from_pretrained(name), "quantization_config", None) or {}
    if found.get("quant_method") != "mxfp4":
        return {}
    return {"quantization_config": Mxfp4Config(dequantize=True)}


def on_gpu() -> bool:
    return get_accelerator().device_name() == "cuda"
