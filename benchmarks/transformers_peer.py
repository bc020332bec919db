"""transformers' own `generate` on the same weights: one left-padded static batch, float32."""

from __future__ import annotations

import time

import torch
import transformers
from lmesh_kernels.text.resolve import ModelFiles
from transformers import AutoModelForCausalLM
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


class TransformersPeer:
    """Runs a workload as one padded batch; it goes on to the longest output, as a static batch must."""

    def __init__(self, files: ModelFiles, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load_reference(files)
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def run(self, jobs: list[Job]) -> list[float]:
        """Seconds to the first token of each job."""
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
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        begin = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=steps,
                stopping_criteria=transformers.StoppingCriteriaList([FirstToken()]),
            )
        if out.shape[1] != longest + steps:
            raise RuntimeError(f"generated {out.shape[1] - longest} tokens, wanted {steps}")
        return [first[0] - begin] * len(jobs)

    def close(self) -> None:
        """Nothing to stop."""
