"""What a plan and an inspection need of the Hugging Face Hub: a reachable hub, or the published shape of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankllm_composer.errors import RunError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from rankllm_composer.options import ModelOptions

SECONDS_TO_ANSWER = 5

_MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
_ZEPHYR = _MISTRAL | {"vocab_size": 32000, "sliding_window": 4096, "rope_theta": 10000.0}
_QWEN3 = {
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL
    | {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "HuggingFaceH4/zephyr-7b-beta": _ZEPHYR,
    "runs/rank_zephyr_stage1/hf/epoch_2": _ZEPHYR,
    "Qwen/Qwen3-0.6B": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-8B": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.2-1B-Instruct": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    },
    "runs/smollm2/model": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "runs/demo/model": {
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 400,
        "sliding_window": None,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""The numbers of config.json that size and speed depend on, for the models of the shipped recipes, as published with
the models or as the commands that create these folders write them (the demo's vocabulary is rounded)."""


def published_shape(options: ModelOptions) -> PretrainedConfig | None:
    """The configuration of a model of the shipped recipes, without its config.json; None for any other model."""
    from transformers import AutoConfig

    known = SHAPES.get(options.name_or_path)
    if known is None or options.revision is not None:
        return None
    given = {name: value for name, value in known.items() if name != "model_type"}
    config: PretrainedConfig = AutoConfig.for_model(known["model_type"], **given)
    return config


def is_cached(name: str, file: str, repo_type: str | None = None) -> bool:
    """Whether a file of a hub repository is in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file, repo_type=repo_type), str)
    except ValueError:  # a name that no repository can have
        return False


def require_hub(key: str, name: str) -> None:
    """Raise RunError unless what a key names is a folder, or the hub answers.

    The hub's own client repeats a request for half a minute before it gives up.
    """
    if Path(name).exists():
        return
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except Exception as error:  # requests or httpx, and the client's own while HF_HUB_OFFLINE is set
        raise RunError(
            f"{key} is {name}, which is not on this machine, and there is no network to fetch it: {constants.ENDPOINT} "
            f"does not answer ({type(error).__name__}). Connect to the network, set HF_ENDPOINT to a mirror, or name a "
            "local file or folder."
        ) from error
