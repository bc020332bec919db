"""transformers' own `generate` on the same weights: left-padded static batches."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.weights import bindings
from lmesh_kernels.text.resolve import ModelFiles
from transformers import AutoConfig, AutoModelForCausalLM
from workloads import Job


def load_reference(files: ModelFiles) -> transformers.PreTrainedModel:
    """transformers' model of `files` in float32 (GGUF weights dequantised on load)."""
    if files.format == "gguf":
        from transformers import GgufConfig

        return AutoModelForCausalLM.from_pretrained(
            files.path.parent,
            gguf_file=files.path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
    return AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32).eval()


def twin_of(decoder: Decoder, folder: Path) -> transformers.PreTrainedModel:
    """transformers' model with a decoder's own weights, on its device and in its dtype; `folder` has the config."""
    config = AutoConfig.from_pretrained(folder)
    with decoder.arena.device:
        model = AutoModelForCausalLM.from_config(config, dtype=decoder.dtype).eval()
    places, slots = bindings(decoder.config), dict(decoder.named_buffers())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = places[name]
            parameter.copy_(slots[place.slot][place.start : place.start + place.rows])
    return model


class TransformersPeer:
    """Runs jobs in padded batches; a batch goes on to its longest output, as a static batch must."""

    def __init__(self, model: transformers.PreTrainedModel, *, threads: int = 0, batch: int = 0) -> None:
        """`batch` requests at a time, in their order; 0 takes all at once."""
        if threads:
            torch.set_num_threads(threads)
        self._model, self._batch = model, batch
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def run(self, jobs: list[Job]) -> list[float]:
        """Seconds to the first token of each job, from when all were there."""
        begin, size = time.perf_counter(), self._batch or len(jobs)
        first: list[float] = []
        for at in range(0, len(jobs), size):
            part = jobs[at : at + size]
            first += [self._run_batch(part) - begin] * len(part)
        return first

    def _run_batch(self, jobs: list[Job]) -> float:
        """When the first token was there, by the clock of `perf_counter`."""
        longest, steps = max(len(j.prompt) for j in jobs), max(j.new_tokens for j in jobs)
        ids = torch.zeros(len(jobs), longest, dtype=torch.long)
        mask = torch.zeros(len(jobs), longest, dtype=torch.long)
        for row, job in enumerate(jobs):
            ids[row, longest - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, longest - len(job.prompt) :] = 1
        first: list[float] = []

        class FirstToken(transformers.StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
                if not first:
                    first.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=steps,
                stopping_criteria=transformers.StoppingCriteriaList([FirstToken()]),
            ).cpu()
        if out.shape[1] != longest + steps:
            raise RuntimeError(f"generated {out.shape[1] - longest} tokens, wanted {steps}")
        return first[0]

    def close(self) -> None:
        """Nothing to stop."""
