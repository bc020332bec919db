"""What an adapter's folder holds, seen without the model that it is for."""

from __future__ import annotations

import re
from pathlib import Path

from lmesh_kernels.lora.factors import content_digest
from lmesh_kernels.lora.peft_config import AdapterFilesError, read_config
from lmesh_kernels.lora.peft_files import WEIGHTS_FILE, read_adapter
from lmesh_kernels.models.config import ModelConfig
from safetensors import SafetensorError, safe_open

_FACTOR = re.compile(r".*model\.layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight")
# Which size of the model a factor shows: A is [rank, inputs], B is [outputs, rank].
_SIZES = {
    ("q", "A"): "hidden", ("q", "B"): "q", ("k", "A"): "hidden", ("k", "B"): "kv", ("v", "A"): "hidden",
    ("v", "B"): "kv", ("o", "A"): "q", ("o", "B"): "hidden", ("gate", "A"): "hidden", ("gate", "B"): "wide",
    ("up", "A"): "hidden", ("up", "B"): "wide", ("down", "A"): "wide", ("down", "B"): "hidden",
}  # fmt: skip


def digest_of_folder(folder: Path) -> str:
    """Content digest of the adapter in a folder in PEFT's layout, the one that it has with its model at hand.

    Raises AdapterFilesError as `read_adapter` does; what only its model could tell is not noticed.
    """
    read_config(folder)
    return content_digest(read_adapter(folder, _model_of(folder / WEIGHTS_FILE)))


def _model_of(path: Path) -> ModelConfig:
    """The smallest model that the adapter's tensors fit: all that reading needs."""
    sizes, layers = {"hidden": 1, "q": 1, "kv": 1, "wide": 1}, 0
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                match = _FACTOR.fullmatch(name)
                if match is None or (match[2], match[3]) not in _SIZES:
                    continue
                shape = file.get_slice(name).get_shape()
                layers = max(layers, int(match[1]) + 1)
                sizes[_SIZES[match[2], match[3]]] = shape[-1 if match[3] == "A" else 0] if shape else 1
    except (OSError, SafetensorError) as error:
        raise AdapterFilesError("NO_WEIGHTS", f"{path.name} cannot be read: {error}") from error
    return ModelConfig(
        architecture="llama",
        vocab_size=1,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["wide"],
        num_layers=layers,
        num_heads=sizes["q"],
        num_kv_heads=sizes["kv"],
        head_dim=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=1,
    )
