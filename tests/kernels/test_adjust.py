"""Biases and penalties: vLLM's meaning, transformers' where both have it, and counts that are a function of the ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lmesh_kernels.ops.adjust import (
    MOST_DRAWN,
    Adjustment,
    adjust_on_host,
    adjust_reference,
    note_drawn_on_host,
    seen_entries,
    write_rows,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

VOCAB = 41
IDS, PROMPT_LEN = [3, 3, 7, 40, 3, 9, 9, 9, 7], 4


def table(rows: dict[int, tuple[list[int], int]], slots: int = 4, vocab: int = VOCAB) -> torch.Tensor:
    """`seen` with the given slots' ids and prompt lengths, over garbage."""
    seen = torch.full((slots, vocab), 77, dtype=torch.int16)
    found = {slot: seen_entries(ids, prompt_len) for slot, (ids, prompt_len) in rows.items()}
    places = np.concatenate([slot * vocab + ids for slot, (ids, _) in found.items()])
    values = np.concatenate([entries for _, entries in found.values()])
    write_rows(seen, torch.tensor(list(found)), torch.from_numpy(places), torch.from_numpy(values))
    return seen


def adjustment(rows: int, **given: object) -> Adjustment:
    """Of `rows` rows, off but for what is given."""
    defaults = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, "seen_row": -1, "bias_row": -1}
    columns = {name: torch.as_tensor(given.get(name, value)).expand(rows) for name, value in defaults.items()}
    tables = {name: given[name] for name in ("seen", "bias") if name in given}
    return Adjustment(**columns, **tables)  # type: ignore[arg-type]


def naive(logits: list[float], repetition: float, presence: float, frequency: float, bias: dict[int, float]) -> list:
    """One row of IDS, id by id in Python floats."""
    out = [x + bias.get(i, 0.0) for i, x in enumerate(logits)]
    for i in set(IDS):
        out[i] = out[i] / repetition if out[i] > 0 else out[i] * repetition
    for i in IDS[PROMPT_LEN:]:
        out[i] -= frequency
    for i in set(IDS[PROMPT_LEN:]):
        out[i] -= presence
    return out


def test_the_table_is_a_function_of_ids_and_prompt_length() -> None:
    row = table({2: (IDS, PROMPT_LEN)})[2].tolist()
    assert {i: (v >> 1, v & 1) for i, v in enumerate(row) if v} == {3: (1, 1), 7: (1, 1), 40: (0, 1), 9: (3, 0)}


def test_only_rows_that_are_written_change() -> None:
    seen = table({2: (IDS, PROMPT_LEN), 0: ([1], 1)})
    assert (seen[[1, 3]] == 77).all()
    assert seen[0].sum() == 1


@pytest.mark.parametrize("repetition", [0.5, 1.0, 1.3])
@pytest.mark.parametrize(("presence", "frequency"), [(0.0, 0.0), (0.7, 0.0), (0.0, -0.4), (-2.0, 2.0)])
@pytest.mark.parametrize("bias", [{}, {3: 2.5, 40: -100.0, 11: 0.25}])
def test_the_meaning_is_vllms(repetition: float, presence: float, frequency: float, bias: dict[int, float]) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    biases = torch.zeros(2, VOCAB)
    for i, value in bias.items():
        biases[1, i] = value
    given = adjustment(
        3,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        seen_row=torch.tensor([2, -1, 2]),
        bias_row=torch.tensor([1, -1, 0]),
        seen=table({2: (IDS, PROMPT_LEN)}),
        bias=biases,
    )
    out = adjust_reference(logits, given)
    for row, own in ((0, bias), (2, {})):
        expected = torch.tensor(naive(logits[row].tolist(), repetition, presence, frequency, own))
        assert torch.allclose(out[row], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(out[1], logits[1])
    assert torch.equal(adjust_on_host(logits, given), out)


def test_repetition_is_that_of_transformers() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    theirs = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([IDS, IDS]), logits.clone())
    given = adjustment(2, repetition=1.2, seen_row=0, seen=table({0: (IDS, PROMPT_LEN)}))
    assert torch.equal(adjust_on_host(logits, given), theirs)


def test_a_drawn_id_counts_as_if_it_had_been_there() -> None:
    seen = table({0: (IDS, PROMPT_LEN), 1: (IDS, PROMPT_LEN), 3: ([5], 1)})
    drawn = [9, 12, 40]
    given = adjustment(3, seen_row=torch.tensor([1, -1, 3]), seen=seen)
    note_drawn_on_host(given, torch.tensor(drawn))
    again = table({0: (IDS, PROMPT_LEN), 1: ([*IDS, 9], PROMPT_LEN), 3: ([5, 40], 1)})
    assert torch.equal(seen[[0, 1, 3]], again[[0, 1, 3]])


def test_counts_end_alike_whether_filled_or_drawn() -> None:
    many = [4] * (MOST_DRAWN + 5)
    filled = table({0: ([4, *many], 1)})
    assert filled[0, 4] == 2 * MOST_DRAWN + 1 > 0
    drawn = table({0: ([4, *many[: MOST_DRAWN - 1]], 1)})
    for _ in range(3):
        note_drawn_on_host(adjustment(1, seen_row=0, seen=drawn), torch.tensor([4]))
    assert torch.equal(filled[0], drawn[0])


def test_a_tiny_repetition_stays_finite_and_nothing_asked_copies_nothing() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    seen = table({0: (IDS, PROMPT_LEN)})
    assert adjust_on_host(logits, adjustment(2, repetition=1e-38, seen_row=0, seen=seen)).isfinite().all()
    assert adjust_on_host(logits, adjustment(2, repetition=1.5, seen=seen)) is logits
    assert adjust_on_host(logits, None) is logits
