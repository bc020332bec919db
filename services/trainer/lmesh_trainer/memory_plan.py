"""What a job takes of its device's memory, line by line, before its first step; and what of it is left to choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.sites import sites
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.footprint import parameter_bytes, unfolded_bytes
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.ops.head_loss import CHUNK_BYTES

from lmesh_trainer.activations import Adapted, kept_bytes
from lmesh_trainer.errors import JobError

# Tokens run at once where nothing else is said: enough for products at their full rate, measured on a CPU of two cores
# (512 rows within 3 % of 4,096) and taken larger on a device whose launches cost more than they do there.
MICRO_TOKENS = {"cpu": 2048}
MICRO_TOKENS_DEVICE = 8192
_SHARE = 0.9  # of the free memory: allocators round up, and others allocate too


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Bytes by what they are for."""

    micro_tokens: int
    recompute: Recompute
    lines: dict[str, int]
    free: int

    @property
    def total(self) -> int:
        """Of all lines."""
        return sum(self.lines.values())


def plan_training(
    config: ModelConfig,
    *,
    precision: Precision,
    trained: int,
    frozen: bool,
    longest: int,
    free: int,
    device_type: str,
    micro_tokens: int = 0,
    recompute: Recompute | None = None,
    quantisation: Quantisation = "none",
    shards: int = 1,
    modules: int = 0,
    dora: bool = False,
    dropout: bool = False,
) -> TrainingPlan:
    """Chooses what is not stated so that it fits, least recomputing and most tokens first.

    `trained` numbers are trained; `frozen` says whether they come on top of the model, but for `modules` of them, which
    are its own; `longest` row in tokens, which a microbatch must hold; the model is held in `shards` parts. The adapter
    is a DoRA, and has dropout, where `dora` and `dropout` say so.
    Raises JobError OUT_OF_MEMORY with all lines when nothing fits.
    """
    wanted = max(longest, micro_tokens or MICRO_TOKENS.get(device_type, MICRO_TOKENS_DEVICE))
    sizes = [wanted] if micro_tokens else sorted({wanted, max(longest, wanted // 2), longest}, reverse=True)
    policies = [recompute] if recompute else list(Recompute)[: 2 if device_type == "cpu" else 4]
    if recompute is None and device_type == "cpu":
        policies.append(Recompute.FULL)
    adapted = Adapted(trained=trained - modules if frozen else 0, dora=dora, dropout=dropout)
    for policy in policies:
        # On a CPU the host's memory is the device's.
        here = Recompute.FULL if policy is Recompute.OFFLOAD and device_type == "cpu" else policy
        for size in sizes:
            lines = _lines(config, precision, trained, frozen, size, here, quantisation, shards, modules, adapted)
            plan = TrainingPlan(micro_tokens=size, recompute=policy, lines=lines, free=free)
            if plan.total <= _SHARE * free:
                return plan
    said = ", ".join(f"{name} {_mib(count)}" for name, count in plan.lines.items())
    hint = "lower dataset.max_length with a length_policy, the rank, or take recompute: full"
    needs = f"the job needs {_mib(plan.total)} at least and {_mib(int(_SHARE * free))} may be used"
    raise JobError("OUT_OF_MEMORY", f"{needs}: {said}; the longest row has {longest} tokens: {hint}")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _lines(
    config: ModelConfig,
    precision: Precision,
    trained: int,
    frozen: bool,
    tokens: int,
    policy: Recompute,
    quantisation: Quantisation,
    shards: int,
    modules: int,
    adapted: Adapted,
) -> dict[str, int]:
    size = precision.dtype.itemsize
    if shards > 1 and not frozen:
        trained = -(-trained // shards)
    values = (trained - modules) * size if frozen else 0
    masters = trained * 4 if precision is Precision.BF16 else 0
    vocabulary = 0 if frozen and not modules else config.vocab_size * config.hidden_size
    moments = 2 * trained * (size if precision is Precision.BF16_PURE else 4)
    sharded = {} if shards == 1 else {"gathered weights and gradients": _gathered_bytes(config, precision, frozen)}
    # A sharded job that trains the weights keeps their masters alone, and rounds them as it gathers them.
    kept = 0 if shards > 1 and masters and not frozen else 1
    return {
        "weights": kept * -(-parameter_bytes(config, precision.dtype, quantisation) // shards),
        **sharded,
        "unfolded weights": _unfolded(config, precision.dtype, policy, adapted) if quantisation == "nf4" else 0,
        "trained values and masters": values + masters,
        "gradient sums": trained * 4,
        "optimiser": moments,
        "kept activations": tokens * kept_bytes(config, precision.dtype, policy, adapted),
        "a layer at work": tokens * _working_bytes(config, precision.dtype),
        "head and loss": 2 * CHUNK_BYTES + vocabulary * 4,
    }


def _unfolded(config: ModelConfig, dtype: torch.dtype, policy: Recompute, adapted: Adapted) -> int:
    """Bytes of a quantised base's weights in the dtype of the pass. Autograd keeps all that DoRA has unfolded: of every
    layer until its backward pass, or of the one that is run again.
    """
    moment = unfolded_bytes(config, dtype)
    if not adapted.dora:
        return moment
    layers = config.num_layers if policy in (Recompute.NONE, Recompute.SELECTIVE) else 1
    layer = sum(shape.inputs * shape.outputs for shape in sites(config).values()) // config.num_layers
    return moment + layers * layer * dtype.itemsize


def _gathered_bytes(config: ModelConfig, precision: Precision, frozen: bool) -> int:
    """Bytes of what a rank has whole in a pass: embedding and head, a layer at work and the next one on its way; and
    where they are trained their gradients, and the sums of one layer on their way out.
    """
    shapes = Decoder(config, dtype=precision.dtype, device=torch.device("meta"))
    layer = sum(slot.numel() for slot in shapes.layers[0].buffers())
    outside = sum(
        slot.numel() for name, slot in shapes.named_buffers() if not name.startswith(("layers.", "rotations"))
    )
    gradients = 0 if frozen else 4 * (outside + 2 * layer)
    return precision.dtype.itemsize * (outside + 2 * layer) + gradients


def _working_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token that one layer holds for a moment in its backward pass, its kept ones again when recomputed."""
    wide = 2 * config.q_size + 2 * config.kv_size + 6 * config.intermediate_size + 6 * config.hidden_size
    return wide * dtype.itemsize + 4 * config.hidden_size * 4
