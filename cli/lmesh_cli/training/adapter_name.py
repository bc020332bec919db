"""How an adapter is written: name, name@version, or model:name@version."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lmesh_cli.training.records import Adapter

_WRITTEN = re.compile(r"(?:(?P<model>[^:@]+):)?(?P<name>[A-Za-z0-9._-]+)(?:@(?P<version>[1-9][0-9]*))?")


class AdapterNameError(ValueError):
    """A name that is none, or that does not say which adapter is meant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterName:
    """What was written; version 0 where none was."""

    model: str
    name: str
    version: int

    @staticmethod
    def read(text: str, model: str = "") -> AdapterName:
        """From its text; `model` is said beside it. Raises AdapterNameError."""
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise AdapterNameError(f"{text!r} is no adapter; write NAME, NAME@VERSION or MODEL:NAME@VERSION")
        if found["model"] and model and found["model"] != model:
            raise AdapterNameError(f"{text!r} is of another model than --model {model}")
        return AdapterName(model=found["model"] or model, name=found["name"], version=int(found["version"] or 0))

    def pick(self, adapters: Sequence[Adapter]) -> Adapter:
        """The one that is meant, its newest version where none was said. Raises AdapterNameError."""
        fitting = [a for a in adapters if a.name == self.name and self.model in ("", a.model)]
        if len(models := {adapter.model for adapter in fitting}) > 1:
            choices = ", ".join(f"{model}:{self.name}" for model in sorted(models))
            raise AdapterNameError(f"several models have {self.name}: say {choices}")
        fitting = [a for a in fitting if self.version in (0, a.version)]
        if not fitting:
            raise AdapterNameError(f"no adapter {self}; `lmesh adapters` lists them")
        return max(fitting, key=lambda adapter: adapter.version)

    def __str__(self) -> str:
        model = f"{self.model}:" if self.model else ""
        return f"{model}{self.name}{f'@{self.version}' if self.version else ''}"
