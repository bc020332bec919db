"""A query's process: `python -P -m lmesh_trainer.queries.process --folder FOLDER`; question and answer lie there."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import msgspec
from lmesh_chassis import lifecycle
from lmesh_kernels import platforms
from lmesh_kernels.lora.peft_config import AdapterFilesError
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.models.config import UnsupportedModelError, load_config
from lmesh_kernels.models.safetensors_folder import WeightsError
from lmesh_kernels.platforms.platform import PlatformError
from lmesh_kernels.text.resolve import ModelNotFoundError, resolve

from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.errors import JobError
from lmesh_trainer.events import DatasetReady, Event, PlanMade
from lmesh_trainer.export.exporter import ExportKind, export
from lmesh_trainer.job import check_job
from lmesh_trainer.manifest_file import read_manifest
from lmesh_trainer.queries import questions
from lmesh_trainer.queries.inspection import digest_of_folder
from lmesh_trainer.queries.questions import Question, Refused, Reply

log = logging.getLogger("lmesh_trainer.queries.process")


def answer(question: Question) -> Reply:
    """The answer; what a person can put right is a Refused with its reason, anything else is raised."""
    try:
        return _answer(question)
    except (JobError, DatasetError, UnsupportedModelError, WeightsError, AdapterFilesError) as error:
        return Refused(reason=error.reason, message=str(error))
    except ModelNotFoundError as error:
        return Refused(reason="MODEL_NOT_FOUND", message=str(error))
    except PlatformError as error:
        return Refused(reason="DEVICE_UNAVAILABLE", message=str(error))


def _answer(question: Question) -> Reply:
    match question:
        case questions.Probe():
            info = platforms.detect(question.device, threads=question.threads).describe()
            return questions.Probed(device=f"{info.kind}: {info.name}, {info.total_bytes / 2**30:.1f} GiB")
        case questions.Validate():
            return _validate(question)
        case questions.Inspect():
            folder = Path(question.folder)
            return questions.Inspected(adapter_digest=digest_of_folder(folder), manifest=read_manifest(folder))
        case questions.Export():
            return _export(question)


def _validate(question: questions.Validate) -> Reply:
    heard: list[Event] = []
    check_job(question.spec, heard.append)
    (dataset,) = (event for event in heard if isinstance(event, DatasetReady))
    (plan,) = (event for event in heard if isinstance(event, PlanMade))
    return questions.Validated(dataset=dataset, plan=plan)


def _export(question: questions.Export) -> Reply:
    files = resolve(question.source)
    adapter = read_adapter(Path(question.adapter), load_config(files)) if question.adapter else {}
    done = export(files, adapter, Path(question.target), ExportKind(question.kind), nf4=question.nf4)
    return questions.Exported(survival=done.survival)


def main() -> int:
    """Answers one question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    folder: Path = parser.parse_args().folder
    lifecycle.die_with_parent()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    question = msgspec.msgpack.decode((folder / questions.QUESTION_FILE).read_bytes(), type=Question)
    try:
        reply = answer(question)
    except Exception as error:  # the process's edge: the server is told, whatever it was
        log.exception("the query failed")
        reply = Refused(reason="QUERY_FAILED", message=f"{type(error).__name__}: {error}")
    draft = folder / f"{questions.REPLY_FILE}.draft"
    draft.write_bytes(msgspec.msgpack.encode(reply))
    draft.replace(folder / questions.REPLY_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
