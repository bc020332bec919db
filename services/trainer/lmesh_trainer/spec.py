"""What a job is told: one struct, read from YAML, JSON or a message, every field checked."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import yaml

from lmesh_trainer.errors import JobError


def _at_least(spec: msgspec.Struct, least: int, *names: str) -> None:
    for name in names:
        if getattr(spec, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(spec, name)}")


class DatasetSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where rows come from and how long they may be."""

    source: str  # a file, or hub:owner/name
    split: str = "train"
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text"] = "auto"
    max_length: int = 0  # tokens of a row; 0: the model's context
    length_policy: Literal["error", "drop", "split", "truncate-left", "truncate-right"] = "error"
    ignore_columns: tuple[str, ...] = ()
    eval_rows: int = 0  # held out for evaluation; of a stream the first
    streaming: bool = False  # read while it is trained on, never held whole; begins again where it ends
    shuffle_buffer_size: int = 0  # rows of a stream held to draw from; 0: 1,000; 1: in its own order

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_length", "eval_rows", "shuffle_buffer_size")
        if self.shuffle_buffer_size and not self.streaming:
            raise ValueError("shuffle_buffer_size needs streaming: a dataset that is held whole is shuffled whole")


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter's shape, in PEFT's names."""

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[Literal["embed_tokens", "lm_head"], ...] = ()  # trained whole beside the adapter
    start: str = ""  # folder of an adapter to go on from; its own shape is taken

    def __post_init__(self) -> None:
        _at_least(self, 1, "r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, not {self.lora_alpha}")


class OptimiserSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW, its course and its bounds."""

    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # of all steps, where warmup_steps is 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping

    def __post_init__(self) -> None:
        _at_least(self, 0, "warmup_steps", "weight_decay", "max_grad_norm")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1 and self.adam_epsilon > 0):
            raise ValueError("adam_beta1 and adam_beta2 must lie in [0, 1), and adam_epsilon be positive")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), not {self.warmup_ratio}")


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job."""

    model: str  # as lmesh_kernels.text.resolve knows it
    dataset: DatasetSpec
    method: Literal["lora", "full"] = "lora"
    lora: LoraSpec = LoraSpec()
    add_tokens: tuple[str, ...] = ()  # to the vocabulary, embedding and head trained for them
    add_special_tokens: tuple[str, ...] = ()  # as those, left out of an answer's text
    optimiser: OptimiserSpec = OptimiserSpec()
    epochs: float = 1.0
    max_steps: int = 0  # 0: as many as the epochs have
    batch_size: int = 8  # rows an update, over all ranks
    micro_tokens: int = 0  # tokens run at once; 0: planned
    load_in_4bit: bool = False  # the frozen base in NF4 with double quantisation (QLoRA); always, where it is stored so
    precision: Literal["auto", "float32", "bf16", "bf16-pure"] = "auto"
    recompute: Literal["auto", "none", "selective", "full", "offload"] = "auto"
    parallelism: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each has the model whole, or its part of it
    nodes: int = 1  # trainers that run it together
    world: int = 1  # ranks on all of them, as the trainer says
    device: str = "auto"
    threads: int = 0
    seed: int = 0
    eval_steps: int = 0  # 0: at the end of each epoch, where rows are held out
    save_steps: int = 0  # 0: at the end of each epoch
    keep_checkpoints: int = 2
    early_stop_patience: int = 0  # evaluations without a better loss; 0: never stop early
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where the numbers go besides

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_steps", "micro_tokens", "threads", "seed", "eval_steps", "save_steps")
        _at_least(self, 0, "early_stop_patience")
        _at_least(self, 1, "batch_size", "keep_checkpoints", "nodes", "world")
        if self.load_in_4bit and self.method == "full":
            raise ValueError("load_in_4bit needs method lora: quantised weights are not trained")
        if self.load_in_4bit and self.parallelism == "fsdp":
            raise ValueError("load_in_4bit needs parallelism ddp: quantised weights stay whole on every rank")
        _check_texts(self.add_tokens + self.add_special_tokens)
        if self.epochs <= 0:
            raise ValueError(f"epochs must be positive, not {self.epochs}")
        if self.dataset.streaming and not self.max_steps:
            raise ValueError("dataset.streaming needs max_steps: how long a stream is, is not known before its end")
        if self.early_stop_patience and not self.dataset.eval_rows:
            raise ValueError("early_stop_patience needs dataset.eval_rows")

    @property
    def makes_adapter(self) -> bool:
        """What it trains fits an adapter; else it makes a whole model."""
        return self.method == "lora" and not self.modules_to_save

    @property
    def modules_to_save(self) -> frozenset[str]:
        """Modules that are trained whole beside an adapter; added tokens need both."""
        both = ("embed_tokens", "lm_head") if self.add_tokens or self.add_special_tokens else ()
        return frozenset((*self.lora.modules_to_save, *both))


def _check_texts(texts: tuple[str, ...]) -> None:
    if bad := [text for text in texts if not text.strip()]:
        raise ValueError(f"add_tokens and add_special_tokens must hold more than spaces, not {bad[0]!r}")
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ValueError(f"add_tokens and add_special_tokens must name each token once, not {twice[0]!r} twice")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 as PyYAML reads it, with 2e-4 a number, as it is in YAML 1.2, in JSON and to whoever writes one."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_spec(text: str | bytes) -> JobSpec:
    """A spec from YAML or JSON. Raises JobError BAD_SPEC, whose message names the field and what would be right."""
    try:
        return make_spec(yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError("BAD_SPEC", str(error)) from error


def make_spec(told: Any) -> JobSpec:  # noqa: ANN401 - whatever a client or a file says
    """A spec from plain values by field names; what is not told has its default. Raises JobError BAD_SPEC."""
    try:
        return msgspec.convert(told, type=JobSpec)
    except msgspec.ValidationError as error:
        raise JobError("BAD_SPEC", str(error)) from error
