"""Sampling: the right distribution, exact truncation, rows that know nothing of each other."""

from __future__ import annotations

import math

import pytest
import torch
from lmesh_kernels.ops import sample as ops_sample
from lmesh_kernels.ops.sample import sample, sample_reference, sample_rows, truncate_reference
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams, score_floor, seed_to_int64
from transformers.generation.logits_process import MinPLogitsWarper


def parameters(rows: int, **given: object) -> SampleParams:
    """Parameters of `rows` rows, each a given value or tensor."""
    kinds = {
        "temperature": (1.0, torch.float32),
        "top_p": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "floor": (-math.inf, torch.float32),
        "seed": (0, torch.int64),
        "choice": (0, torch.int64),
        "position": (0, torch.int64),
    }
    columns = {
        name: torch.as_tensor(given.get(name, default), dtype=dtype).expand(rows).contiguous()
        for name, (default, dtype) in kinds.items()
    }
    return SampleParams(**columns)


def naive_kept(scores: list[float], top_p: float, top_k: int, floor: float = -math.inf) -> set[int]:
    """What truncation leaves of one row, step by step in Python floats."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    order = [i for i in order if scores[i] >= scores[order[0]] + floor]
    if top_k > 0:
        last = scores[order[min(top_k, len(order)) - 1]]
        order = [i for i in order if scores[i] >= last]
    if top_p < 1:
        weights = [math.exp(scores[i] - scores[order[0]]) for i in order]
        reached, last = 0.0, scores[order[0]]
        for i, weight in zip(order, weights, strict=True):
            if reached >= top_p:
                break
            reached += weight / sum(weights)
            last = scores[i]
        order = [i for i in order if scores[i] >= last]
    return set(order)


def chi_square_excess(ids: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard deviations by which the counts' chi-square exceeds its mean (Wilson-Hilferty)."""
    counts = torch.bincount(ids, minlength=len(probabilities)).double()
    expected = probabilities * len(ids)
    assert counts[probabilities == 0].sum() == 0
    used = expected > 0
    assert expected[used].min() > 5, "too few draws for a chi-square"
    freedom = int(used.sum()) - 1
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize(
    ("along", "temperature", "top_p", "top_k"),
    [
        ("seed", 1.0, 1.0, 0),
        ("choice", 1.0, 1.0, 0),
        ("position", 0.6, 1.0, 0),
        ("seed", 1.7, 0.8, 0),
        ("choice", 0.7, 1.0, 12),
        ("position", 1.0, 0.9, 9),
    ],
)
def test_draws_follow_the_softmax(along: str, temperature: float, top_p: float, top_k: int) -> None:
    draws = 8000
    logits = torch.randn(37, generator=torch.Generator().manual_seed(3))
    arguments = parameters(draws, **{along: torch.arange(draws)}, temperature=temperature, top_p=top_p, top_k=top_k)
    ids = sample(logits.expand(draws, -1), arguments)
    kept = naive_kept((logits / temperature).tolist(), top_p, top_k)
    masked = torch.full((37,), -torch.inf, dtype=torch.float64)
    masked[list(kept)] = logits.double()[list(kept)] / temperature
    # Seeds are fixed, so this passes or fails for good: five deviations are one chance in some 10^6.
    assert chi_square_excess(ids, masked.softmax(-1)) < 5


def test_the_chi_square_sees_a_wrong_temperature() -> None:
    draws = 8000
    logits = torch.randn(37, generator=torch.Generator().manual_seed(3))
    ids = sample(logits.expand(draws, -1), parameters(draws, seed=torch.arange(draws), temperature=1.2))
    assert chi_square_excess(ids, logits.double().softmax(-1)) > 5


@pytest.mark.parametrize("vocab", [1, 2, 33, 257])
def test_truncation_is_exact(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 200
    # Steps of 1/4 make many ties; top_p off the sums' grid keeps rounding out of the comparison.
    logits = (torch.randn(rows, vocab, generator=generator) * 8).round() / 4
    top_p = torch.rand(rows, generator=generator) * 0.98 + 0.013
    top_p[::4] = 1.0
    top_k = torch.randint(0, vocab + 3, (rows,), generator=generator, dtype=torch.int32)
    top_k[1::4] = 0
    # Off the grid of the scores, as top_p is.
    floor = torch.rand(rows, generator=generator) * -6 - 0.01
    floor[::3] = -torch.inf
    kept = truncate_reference(logits, parameters(rows, top_p=top_p, top_k=top_k, floor=floor)).isfinite()
    for row in range(rows):
        expected = naive_kept(logits[row].tolist(), top_p[row].item(), top_k[row].item(), floor[row].item())
        assert set(kept[row].nonzero()[:, 0].tolist()) == expected


def mixed(rows: int, vocab: int) -> tuple[torch.Tensor, SampleParams]:
    """Greedy, plain and truncated rows, with ties."""
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator) * 16).round() / 8
    temperature = torch.rand(rows, generator=generator) + 0.3
    temperature[::3] = 0
    top_p = torch.rand(rows, generator=generator) * 0.9 + 0.1
    top_p[::2] = 1.0
    top_k = torch.randint(0, 40, (rows,), generator=generator, dtype=torch.int32)
    top_k[::5] = 0
    floor = torch.rand(rows, generator=generator) * -4 - 0.01
    floor[::7] = -torch.inf
    floor[1::6] = -torch.inf
    seed = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    position = torch.randint(0, 10**6, (rows,), generator=generator)
    return logits, parameters(
        rows, temperature=temperature, top_p=top_p, top_k=top_k, floor=floor, seed=seed, position=position
    )


@pytest.mark.parametrize("width", [4, 1024])
@pytest.mark.parametrize("vocab", [1, 7, 1001])
def test_the_cheap_ways_equal_the_plain_one(vocab: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the nucleus is wider than the best ids looked at first."""
    monkeypatch.setattr(ops_sample, "NUCLEUS_WIDTH", width)
    logits, arguments = mixed(160, vocab)
    assert torch.equal(sample(logits, arguments), sample_reference(logits, arguments))


def test_rows_are_independent() -> None:
    logits, arguments = mixed(32, 515)
    for draw in (sample, sample_reference):
        together = draw(logits, arguments)
        for row in range(32):
            alone = draw(logits[row : row + 1], arguments.rows(slice(row, row + 1)))
            assert alone[0] == together[row]


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(9, 101)
    greedy = parameters(9, temperature=0.0, top_p=0.5, top_k=3)
    assert torch.equal(sample(logits, greedy), logits.argmax(-1))
    hints = SampleHints.of([0.0] * 9, [0.5] * 9, [3] * 9, [0.1] * 9)
    assert hints == SampleHints(any_random=False, any_truncation=False)
    assert torch.equal(sample(logits, greedy, hints), logits.argmax(-1))


def test_a_tiny_temperature_is_nearly_argmax_and_never_nan() -> None:
    logits = torch.randn(50, 101) * 30
    ids = sample(logits, parameters(50, temperature=1e-30, seed=torch.arange(50)))
    assert torch.equal(ids, logits.argmax(-1))


def test_logits_are_left_alone_and_minus_infinity_is_never_drawn() -> None:
    logits, arguments = mixed(32, 64)
    logits[:, 5:] = -torch.inf
    before = logits.clone()
    assert (sample(logits, arguments) < 5).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("broken", [slice(3, 4), slice(None)])
def test_rows_that_are_not_numbers_leave_the_others_alone(broken: slice) -> None:
    logits, arguments = mixed(32, 64)
    expected = sample(logits, arguments)
    logits[broken] = torch.nan
    ids = sample(logits, arguments)
    fine = torch.ones(32, dtype=torch.bool)
    fine[broken] = False
    assert torch.equal(ids[fine], expected[fine])
    assert ((ids >= 0) & (ids < 64)).all()


def test_hints_tell_what_is_needed() -> None:
    off = ([1.0, 1.0], [0, 0], [0.0, 0.0])
    assert SampleHints.of([0.0, 1.0], *off) == SampleHints(any_random=True, any_truncation=False)
    for used in (([0.5, 0.5], *off[1:]), (off[0], [0, 4], off[2]), (*off[:2], [0.0, 0.1])):
        assert SampleHints.of([0.0, 1.0], *used) == SampleHints(any_random=True, any_truncation=True)
        assert SampleHints.of([0.0, 0.0], *used) == SampleHints(any_random=False, any_truncation=False)
    assert SampleHints() == SampleHints(any_random=True, any_truncation=True)


def test_seeds_keep_their_bits() -> None:
    assert [seed_to_int64(s) for s in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_is_that_of_transformers(min_p: float, temperature: float) -> None:
    logits = torch.randn(50, 301, generator=torch.Generator().manual_seed(1)) * 3
    scores = logits / temperature
    theirs = MinPLogitsWarper(min_p)(torch.zeros(50, 1, dtype=torch.int64), scores.clone()).isfinite()
    ours = truncate_reference(scores, parameters(50, floor=score_floor(min_p))).isfinite()
    assert torch.equal(ours, theirs)
    assert 0 < ours.sum() < ours.numel()


def test_rows_say_whether_they_were_finite() -> None:
    logits, arguments = mixed(6, 64)
    logits[1, 3], logits[2, 4], logits[3, 5] = torch.nan, torch.inf, -torch.inf
    ids, finite = torch.full((6,), -1), torch.zeros(6, dtype=torch.bool)
    sample_rows(logits, arguments, SampleHints(), ids, finite)
    assert finite.tolist() == [True, False, False, False, True, True]
    assert torch.equal(ids[finite], sample(logits, arguments)[finite])
