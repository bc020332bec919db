"""A job's numbers where people look at them besides: TensorBoard's event files, Weights & Biases.

Names are those of transformers' trainer: train/loss, train/grad_norm, train/learning_rate, eval/loss and so on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from lmesh_trainer import events
from lmesh_trainer.errors import JobError

_MODULES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}
Report = Callable[[events.Event], None]
_STEP = ("loss", "grad_norm", "learning_rate", "epoch", "mean_token_accuracy", "num_tokens", "tokens_per_second")


class Recorder(Protocol):
    """Somewhere to write numbers to."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of one step; one that is written again replaces what was there."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in the job's folder, `tensorboard/`; the package is an extra of lmesh-trainer."""

    def __init__(self, folder: Path, name: str) -> None:
        module = _extra(*_MODULES["tensorboard"])
        self._module, self._folder = module, folder / "tensorboard"
        self._writer: Any = None

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """See `Recorder.write`: a resumed job's first step purges what an earlier process wrote after it."""
        if self._writer is None:
            self._writer = self._module.SummaryWriter(self._folder, purge_step=step)
        for key, number in numbers.items():
            self._writer.add_scalar(key, number, step)

    def close(self) -> None:
        """See `Recorder.close`."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run under the job's id, with the settings of the trainer's own environment (WANDB_PROJECT and the like)."""

    def __init__(self, folder: Path, name: str) -> None:
        module = _extra(*_MODULES["wandb"])
        self._run = module.init(dir=str(folder), id=name, name=name, resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """See `Recorder.write`."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """See `Recorder.close`."""
        self._run.finish()


_KINDS: dict[str, Callable[[Path, str], Recorder]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Recorded:
    """A job's report with recorders beside it: they are told what it tells, first the report."""

    def __init__(self, report: Report, kinds: Iterable[str], folder: Path) -> None:
        """Raises JobError NOT_INSTALLED where a recorder's package is not there."""
        self._report = report
        self._recorders = [_KINDS[kind](folder, folder.name) for kind in dict.fromkeys(kinds)]

    def __call__(self, event: events.Event) -> None:
        """Tells one event."""
        self._report(event)
        if isinstance(event, events.StepDone):
            numbers = {f"train/{name}": float(getattr(event, name)) for name in _STEP}
            self._write(event.global_step, numbers)
        elif isinstance(event, events.Evaluated):
            told = {"eval/loss": event.eval_loss, "eval/mean_token_accuracy": event.eval_mean_token_accuracy}
            self._write(event.global_step, told)

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        for recorder in self._recorders:
            recorder.write(step, numbers)

    def close(self) -> None:
        """Closes all recorders."""
        for recorder in self._recorders:
            recorder.close()


def check_recorders(kinds: Iterable[str]) -> None:
    """Raises JobError NOT_INSTALLED where one's package is not there."""
    for kind in kinds:
        _extra(*_MODULES[kind])


def _extra(module: str, package: str) -> Any:  # noqa: ANN401 - a module that may not be there
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"report_to: this trainer has no {package}; install lmesh-trainer[{package}] there, or leave it out"
        raise JobError("NOT_INSTALLED", message) from error
