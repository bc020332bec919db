"""A run's reports: numbered without a gap, sent again until acknowledged, bounded."""

from __future__ import annotations

from lmesh_trainer.events import CheckpointSaved, Ended, Outcome, StepDone
from lmesh_trainer.outbox import MOST_UNACKED, Outbox, Report


def step(number: int) -> StepDone:
    names = set(StepDone.__struct_fields__) - {"applied", "global_step"}
    return StepDone(global_step=number, **dict.fromkeys(names, 1))  # type: ignore[arg-type]


def sent(outbox: Outbox) -> list[Report]:
    found = []
    while (report := outbox.next()) is not None:
        found.append(report)
    return found


def test_what_is_not_acknowledged_is_sent_again_as_it_was() -> None:
    outbox = Outbox()
    for i in range(5):
        outbox.add(step(i))
    first = sent(outbox)
    assert [report.seq for report in first] == [1, 2, 3, 4, 5]
    outbox.acked(2)
    assert sent(outbox) == []
    outbox.restart()
    outbox.add(step(5))
    again = sent(outbox)
    assert again[:3] == first[2:] and [report.seq for report in again] == [3, 4, 5, 6]
    outbox.acked(6)
    assert outbox.empty


def test_acknowledged_while_it_is_being_sent_again() -> None:
    outbox = Outbox()
    for i in range(4):
        outbox.add(step(i))
    sent(outbox)
    outbox.restart()
    assert (outbox.next(), outbox.acked(3)) != (None, None)
    assert [report.seq for report in sent(outbox)] == [4]
    outbox.acked(2)  # late
    outbox.acked(4)
    assert outbox.empty


def test_a_scheduler_that_is_behind_is_not_sent_more() -> None:
    outbox = Outbox()
    for i in range(MOST_UNACKED + 10):
        outbox.add(step(i))
    assert len(sent(outbox)) == MOST_UNACKED
    outbox.acked(3)
    assert [report.seq for report in sent(outbox)] == [MOST_UNACKED + 1, MOST_UNACKED + 2, MOST_UNACKED + 3]


def test_only_the_oldest_steps_are_left_out_and_numbers_have_no_gap() -> None:
    outbox = Outbox(most_waiting=10)
    outbox.add(step(0))
    sent(outbox)
    for i in range(1, 50):
        outbox.add(step(i))
        if i % 10 == 0:
            outbox.add(CheckpointSaved(global_step=i, folder=""))
    outbox.add(Ended(outcome=Outcome.COMPLETED))
    found = sent(outbox)
    assert [report.seq for report in found] == list(range(2, 12))
    assert [r.event.global_step for r in found if isinstance(r.event, CheckpointSaved)] == [10, 20, 30, 40]
    assert [r.event.global_step for r in found if isinstance(r.event, StepDone)] == [45, 46, 47, 48, 49]
    assert isinstance(found[-1].event, Ended) and outbox.left_out == 44
