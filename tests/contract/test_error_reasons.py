"""Every error that a service can answer with: a reason of its own, in its own table of docs/errors.md."""

from __future__ import annotations

import importlib
import inspect
import re

import grpc
import pytest
from lmesh_chassis.errors import ServiceError

from tests.contract.sources import PACKAGES, ROOT, product_files, table, tree

PAGE = ROOT / "docs/errors.md"
SERVICES = {
    "lmesh_gateway": "Gateway",
    "lmesh_gateway.http": "Over HTTP only",
    "lmesh_scheduler": "Scheduler",
    "lmesh_worker": "Worker",
    "lmesh_chassis": "Every service",
}


def errors_of(package: str) -> list[type[ServiceError]]:
    """Error classes that a package's errors.py defines itself."""
    module = importlib.import_module(f"{package}.errors")
    classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, ServiceError)]
    return [c for c in classes if c.__module__ == module.__name__ and c is not ServiceError]


@pytest.mark.parametrize("package", SERVICES)
def test_reasons_are_unique_and_well_formed(package: str) -> None:
    errors = errors_of(package)
    reasons = [error.reason for error in errors]
    assert len(set(reasons)) == len(reasons)
    for error in errors:
        assert re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", error.reason), error
        assert isinstance(error.code, grpc.StatusCode)
        assert error.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN)
        assert inspect.getdoc(error) != inspect.getdoc(ServiceError), f"{error.__name__} does not say when it comes"


@pytest.mark.parametrize(("package", "heading"), SERVICES.items())
def test_reasons_are_documented(package: str, heading: str) -> None:
    rows = {row[0]: row[1:3] for row in table(PAGE, heading)}
    expected = {e.reason: (e.code.name, "yes" if e.retryable else "no") for e in errors_of(package)}
    assert rows == expected


def test_only_errors_modules_define_errors() -> None:
    """One place a service, so that the table above is all there is."""
    for path in product_files():
        if path.name == "errors.py" or path.is_relative_to(PACKAGES["lmesh_kernels"]):
            continue
        for node in tree(path).body:
            bases = [getattr(base, "id", getattr(base, "attr", "")) for base in getattr(node, "bases", [])]
            assert "ServiceError" not in bases, f"{path.relative_to(ROOT)} defines an error of its own"
