"""A job as its file and the flags say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HUB, ARTIFACT = "hub:", "artifact:"
_DIGEST = re.compile(r"[0-9a-f]{64}")
PUBLISH_AS = "publish_as"  # the one key that is no part of the spec


class JobFileError(ValueError):
    """A job that cannot be what its file or flags say; the text names the key and says what would be right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFile:
    """A job before it is sent: its spec's values by name, and where its dataset lies."""

    values: dict[str, Any]
    publish_as: str
    dataset: Path | None  # a local file, which is uploaded first


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 as PyYAML reads it, with 2e-4 a number, and a key that is given twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml.SafeLoader."""
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_values(path: Path) -> dict[str, Any]:
    """A file's keys and values. Raises JobFileError."""
    try:
        told = yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise JobFileError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobFileError(f"{path}: no YAML: {error}") from None
    if told is None:
        return {}
    if not isinstance(told, dict):
        raise JobFileError(f"{path}: must hold keys such as model and dataset, not {type(told).__name__}")
    return told


def read_job(file: Path | None, flags: Mapping[str, Any]) -> JobFile:
    """The job of a file with what the flags say over it; flags go by the keys' paths, None means not given.

    A dataset's path in the file counts from the file's folder, one in a flag from here. Raises JobFileError.
    """
    values = {} if file is None else read_values(file)
    _from_folder(values, file)
    for path, value in flags.items():
        if value is not None:
            _put(values, path, value)
    publish_as = values.pop(PUBLISH_AS, "")
    if not isinstance(publish_as, str):
        raise JobFileError(f"{PUBLISH_AS}: must be a text, not {publish_as!r}")
    if not values.get("model"):
        raise JobFileError("model: say which one is trained: a served model's id, hub:owner/name or a folder")
    _check_start(values)
    return JobFile(values=values, publish_as=publish_as, dataset=_local(values))


def _put(values: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise JobFileError(f"{parent}: must be a mapping of keys, not {values!r}")
    values[last] = value


def _from_folder(values: dict[str, Any], file: Path | None) -> None:
    dataset = values.get("dataset")
    if file is None or not isinstance(dataset, dict):
        return
    source = dataset.get("source")
    if isinstance(source, str) and _is_local(source):
        dataset["source"] = str(file.parent / Path(source).expanduser())


def _is_local(source: str) -> bool:
    return bool(source) and not source.startswith((HUB, ARTIFACT))


def _local(values: dict[str, Any]) -> Path | None:
    dataset = values.get("dataset")
    source = dataset.get("source") if isinstance(dataset, dict) else None
    if dataset is None or (isinstance(dataset, dict) and not source):
        raise JobFileError("dataset.source: say what is trained on: a file, or hub:owner/name")
    if not isinstance(source, str) or not _is_local(source):
        return None  # whatever else is wrong with it is said of its type
    path = Path(source).expanduser()
    if not path.is_file():
        what = "a folder; name one file" if path.is_dir() else "no file that is there"
        raise JobFileError(f"dataset.source: {source} is {what}; of the Hugging Face hub it would be hub:owner/name")
    return path


def _check_start(values: dict[str, Any]) -> None:
    lora = values.get("lora")
    start = lora.get("start") if isinstance(lora, dict) else None
    if not isinstance(start, str) or not start or _DIGEST.fullmatch(start.removeprefix(ARTIFACT)):
        return
    publish = "publish a folder with `lmesh adapters publish NAME --folder PATH` and give its digest"
    raise JobFileError(
        f"lora.start: must be a published adapter's digest or artifact:<digest>, not {start!r}; {publish}"
    )
