"""From a model's files to a decoder with its weights in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmesh_kernels.models.config import LoadFormat, ModelConfig, Quantisation, load_config
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.dummy import fill_dummy
from lmesh_kernels.models.growth import Growth, grown_tensors
from lmesh_kernels.models.safetensors_folder import WeightsError, read_safetensors, stored_tensors
from lmesh_kernels.models.staged_reads import StagedReads
from lmesh_kernels.models.weights import bind
from lmesh_kernels.platforms.platform import Platform
from lmesh_kernels.quant.nf4 import Nf4Tensor

if TYPE_CHECKING:
    from lmesh_kernels.models.parameters import Precision
    from lmesh_kernels.models.sharded import ShardedHome
    from lmesh_kernels.text.resolve import ModelFiles


def load_model(
    files: ModelFiles,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: Quantisation | None = None,
    growth: Growth | None = None,
    load_format: LoadFormat = "auto",
    platform: Platform | None = None,
) -> Decoder:
    """Allocate the decoder on `device` in `dtype` and copy the checkpoint into it, or make random weights there.

    `quantisation` of the layers' products; None takes the checkpoint's own. `growth` gives it a larger vocabulary. With
    the `platform` of the device, files are read by several threads through its staging memory; without, and where the
    vocabulary grows, tensor by tensor.
    Raises UnsupportedModelError for what is not computed here and WeightsError for a checkpoint that does not fit.
    """
    if load_format == "dummy" and files.format == "gguf":
        raise WeightsError("DUMMY_OF_GGUF", f"{files.path.name}: load_format dummy takes a folder with a config.json")
    config = load_config(files)
    chosen = config.quantisation if quantisation is None else quantisation
    tensors = read_tensors(files, config)
    if growth is not None:
        config = growth.config(config)
        tensors = grown_tensors(tensors, growth, config.vocab_size)
    decoder = Decoder(config, dtype=dtype, device=device, quantisation=chosen).eval()
    if load_format == "dummy":
        fill_dummy(decoder)
    elif platform is None or platform.device.type == "cpu" or files.format == "gguf" or growth is not None:
        bind(decoder, tensors)
    else:
        with StagedReads(platform) as reads:
            bind(decoder, stored_tensors(files.path), reads)
    return decoder


def load_sharded(files: ModelFiles, *, precision: Precision, device: torch.device, trained: bool) -> ShardedHome:
    """As `load_model`, over all ranks: of each tensor a rank copies its own rows. Every rank calls it.

    `trained` says whether the weights are, or are frozen. Raises UnsupportedModelError and WeightsError.
    """
    from lmesh_kernels.models.sharded import ShardedHome

    config = load_config(files)
    home = ShardedHome(config, precision=precision, device=device, trained=trained)
    home.load(read_tensors(files, config))
    return home


def read_tensors(files: ModelFiles, config: ModelConfig) -> Iterator[tuple[str, Tensor | Nf4Tensor]]:
    """The checkpoint's tensors under Hugging Face names, one at a time."""
    if files.format == "gguf":
        from lmesh_kernels.models.gguf import read_gguf

        return read_gguf(files.path, config)
    return read_safetensors(files.path)
