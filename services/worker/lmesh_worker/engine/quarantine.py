"""The request-scoped error boundary: finds the sequence that a step fails on, and lets the others go on."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many
from typing import NamedTuple

from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.sequence import Sequence

log = logging.getLogger(__name__)

STEP_FAILED = "STEP_FAILED"


class EngineBrokenError(RuntimeError):
    """The device itself no longer works; the process must go."""


class Culprit(NamedTuple):
    """A sequence to fail, and the error that it fails by."""

    sequence: Sequence
    error: BaseException


def isolate(batcher: Batcher, plans: Many[StepPlan], error: BaseException) -> list[Culprit]:
    """Rolls failed steps back; their sequences run alone from here on, one after the other.

    `plans` are the failed step and those launched after it. Returns the sequence that is to fail now, if it failed
    alone: company is no proof, however often (who runs alone without harm has got on by a token, so even steps that
    fail only in company come to an end). Raises EngineBrokenError for a lost device.
    """
    if "CUDA error" in str(error) and "out of memory" not in str(error):
        raise EngineBrokenError(str(error)) from error
    alone = {row.sequence.key for row in plans[0].rows}
    affected = batcher.roll_back(plans)
    log.exception("a step of %d sequences failed; %d are run again alone", len(alone), len(affected), exc_info=error)
    culprits = []
    for sequence in affected:
        if len(alone) == 1 and sequence.key in alone:
            culprits.append(Culprit(sequence, error))
        elif sequence not in batcher.suspects:
            batcher.suspects.append(sequence)
    return culprits
