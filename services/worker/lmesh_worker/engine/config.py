"""What an engine is told; torch-free, so that the server process can write it."""

from __future__ import annotations

import msgspec


class ConfigError(ValueError):
    """A setting that cannot be; the message names it and says what would be right."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one engine. 0 (or "auto") leaves a choice to the platform and the memory plan."""

    device: str = "auto"  # auto | cpu | cuda | rocm | xpu
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str = "auto"  # auto (the checkpoint's own) | none | nf4
    load_format: str = "auto"  # auto (the checkpoint) | dummy (random weights, made on the device)
    block_size: int = 0  # tokens a KV block
    kv_blocks: int = 0  # overrides the plan
    kv_cache_bytes: int = 0  # overrides the plan, in bytes
    memory_fraction: float = 0.0  # of the device's free memory, for weights, activations and KV together
    max_seqs: int = 0  # sequences in one step
    max_step_tokens: int = 0  # tokens of one step: the chunk of a prefill
    max_model_len: int = 0  # longest prompt plus output; 0 takes the model's, as far as the pool holds it
    prefix_cache: bool = True
    enforce_eager: bool = False  # every step is launched as it is, none replayed from a graph
    batch_invariant: bool = False  # a row's bits do not depend on its batch; needs 16 bits on a CUDA device
    pipeline_depth: int = -1  # steps scheduled ahead of the device, 0 or 1; -1: one where the device can overlap
    threads: int = 0  # compute threads of a CPU engine
    weights_version: int = 1
    model_digest: str = ""  # computed from the files when empty
    max_adapter_bytes: int = 0  # of all live adapters; 0: planned

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be."""
        counts = ("kv_blocks", "kv_cache_bytes", "max_seqs", "max_step_tokens", "max_model_len", "threads")
        for name in (*counts, "max_adapter_bytes", "block_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction must lie in [0, 1], not {self.memory_fraction}")
        if self.pipeline_depth not in (-1, 0, 1):
            raise ConfigError(f"pipeline_depth must be 0, 1 or -1 (the platform chooses), not {self.pipeline_depth}")
        if self.quantization not in ("auto", "none", "nf4"):
            raise ConfigError(f"quantization must be auto, none or nf4, not {self.quantization!r}")
        if self.load_format not in ("auto", "dummy"):
            raise ConfigError(f"load_format must be auto or dummy, not {self.load_format!r}")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}")
