"""The sampler's Triton kernels: the plain way's ids, thresholds and counts, in the interpreter or on the device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lmesh_kernels.ops import truncate_kernels
from lmesh_kernels.ops.adjust import Adjustment, adjust_reference, note_drawn_on_host
from lmesh_kernels.ops.logit_pieces import LogitSource, Pieces
from lmesh_kernels.ops.noise import gumbel
from lmesh_kernels.ops.sample import sample, tempered, truncate_reference
from lmesh_kernels.ops.sample_kernels import sample_rows_triton
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASS_BOUND = 2.0**-18  # what truncate_kernels says of p


def mixed(rows: int, vocab: int, *, step: float = 0.0) -> tuple[Tensor, SampleParams]:
    """Greedy, plain and truncated rows of all sorts; logits on a grid of `step` where it is given, so that many tie."""
    generator = torch.Generator().manual_seed(rows * vocab)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    logits = torch.randn(rows, vocab, generator=generator) * uniform(0.1, 5)[:, None]
    logits = (logits / step).round() * step if step else logits
    index = torch.arange(rows)
    return logits, SampleParams(
        temperature=uniform(0.3, 1.6).masked_fill(index % 7 == 3, 0.0),
        top_p=uniform(0.05, 0.999).masked_fill(index % 3 == 1, 1.0),
        top_k=torch.randint(1, 2 * vocab, (rows,), generator=generator, dtype=torch.int32)
        .clamp(max=vocab + 3)
        .masked_fill(index % 4 < 2, 0),
        floor=uniform(-7, -0.05).masked_fill(index % 5 > 1, -torch.inf),
        seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        choice=index % 3,
        position=index * 977,
    )


def adjusting(rows: int, vocab: int, slots: int = 70) -> Adjustment:
    """Some rows with penalties, some with biases, some with both; slots in disorder."""
    generator = torch.Generator().manual_seed(rows)
    order, index = torch.randperm(slots, generator=generator)[:rows], torch.arange(rows)
    seen = torch.randint(0, 9, (slots, vocab), generator=generator, dtype=torch.int16)
    return Adjustment(
        repetition=torch.rand(rows, generator=generator) + 0.6,
        presence=torch.rand(rows, generator=generator) * 4 - 2,
        frequency=torch.rand(rows, generator=generator) * 4 - 2,
        seen_row=order.masked_fill(index % 3 == 0, -1),
        bias_row=order.flip(0).masked_fill(index % 4 == 1, -1),
        seen=seen.masked_fill(torch.rand(slots, vocab, generator=generator) < 0.7, 0),
        bias=torch.randn(slots, vocab, generator=generator),
    )


def there(values: SampleParams | Adjustment) -> dict[str, Tensor | None]:
    """Copies of the columns on the device that is tested."""
    fields = {name: getattr(values, name) for name in type(values).__slots__}
    return {name: None if value is None else value.to(DEVICE, copy=True) for name, value in fields.items()}


def drawn(
    logits: Tensor, params: SampleParams, hints: SampleHints | None = None, adjustment: Adjustment | None = None
) -> tuple[Tensor, Tensor]:
    """The kernels' ids and flags, into poisoned tensors."""
    rows = len(logits)
    ids = torch.full((rows,), -9, dtype=torch.int64, device=DEVICE)
    finite = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    params = SampleParams(**there(params))  # type: ignore[arg-type]
    sample_rows_triton(logits.to(DEVICE), params, hints or SampleHints(), ids, finite, adjustment)
    return ids.cpu(), finite.cpu()


def kept_keys(logits: Tensor, params: SampleParams) -> Tensor:
    """[R, V] bool: what the kernels' thresholds leave."""
    logits, params = logits.to(DEVICE), SampleParams(**there(params))  # type: ignore[arg-type]
    pieces = Pieces.of(logits)
    padded = torch.nn.functional.pad(logits, (0, pieces.count * pieces.size - logits.shape[1]), value=-torch.inf)
    cut = padded.view(len(logits), pieces.count, pieces.size)
    best, least = cut.amax(-1), cut.masked_fill(cut == -torch.inf, torch.inf).amin(-1).neg()
    work = torch.zeros(len(logits), truncate_kernels.ROW_WORDS, dtype=torch.int32, device=DEVICE)
    limit = truncate_kernels.thresholds(LogitSource.of(logits, None), params, pieces, best, least, work)
    keys = tempered(logits, params.temperature).abs().view(torch.int32)
    return (keys <= limit[:, None]).cpu()


def check_kept(kept: Tensor, logits: Tensor, params: SampleParams) -> None:
    """Equal to the reference, but for ids that have a mass before them so near p that a sum's last places decide."""
    scores = tempered(logits, params.temperature)
    expected = truncate_reference(scores, params).isfinite()
    for row in ((kept != expected).any(dim=1) & (params.temperature > 0)).nonzero()[:, 0].tolist():
        one = params.rows(slice(row, row + 1))
        left = truncate_reference(scores[row : row + 1], replace(one, top_p=torch.ones(1)))[0].double()
        masses = (left - left.logsumexp(0)).exp()
        for token in (kept[row] != expected[row]).nonzero()[:, 0].tolist():
            before = masses[left > left[token]].sum().item()
            assert abs(before - one.top_p.item()) < MASS_BOUND, (row, token, before)


def check_ids(ids: Tensor, logits: Tensor, params: SampleParams, adjustment: Adjustment | None = None) -> None:
    """Equal to the plain way's, but where two candidates lie within what a logarithm's last place may be."""
    expected = sample(logits.float(), params, adjustment=adjustment)
    adjusted = logits.float() if adjustment is None else adjust_reference(logits, adjustment)
    scores = truncate_reference(tempered(adjusted, params.temperature), params)
    noisy = scores + gumbel(params.keys(), torch.arange(scores.shape[1], dtype=torch.int32))
    for row in (ids != expected).nonzero()[:, 0].tolist():
        assert params.temperature[row] > 0
        assert abs(noisy[row, ids[row]] - noisy[row, expected[row]]) < 4e-6, row


@pytest.mark.parametrize(
    ("rows", "vocab", "step"),
    [(1, 1, 0.0), (3, 7, 0.25), (65, 33, 0.25), (7, 1023, 0.0), (7, 1023, 0.5), (2, 1025, 0.25), (5, 5003, 0.0)],
)
def test_ids_equal_the_plain_ways(rows: int, vocab: int, step: float) -> None:
    logits, params = mixed(rows, vocab, step=step)
    check_kept(kept_keys(logits, params), logits, params)
    ids, finite = drawn(logits, params)
    check_ids(ids, logits, params)
    assert finite.all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_not_rounded(dtype: torch.dtype) -> None:
    logits, params = mixed(9, 1501)
    logits = logits.to(dtype)
    check_ids(drawn(logits, params)[0], logits, params)


def test_hints_skip_only_what_is_not_there() -> None:
    logits, params = mixed(21, 1100, step=0.5)
    greedy = replace(params, temperature=torch.zeros(21))
    ids = drawn(logits, greedy, SampleHints(any_random=False, any_truncation=False))[0]
    assert torch.equal(ids, logits.argmax(-1))
    off = {"top_p": torch.ones(21), "top_k": torch.zeros(21, dtype=torch.int32), "floor": torch.full((21,), -math.inf)}
    plain = replace(params, **off)
    ids = drawn(logits, plain, SampleHints(any_truncation=False))[0]
    check_ids(ids, logits, plain)
    assert torch.equal(ids, drawn(logits, plain)[0])


@pytest.mark.parametrize("held", [1, 64])
def test_a_row_that_does_not_fit_is_searched_whole(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncate_kernels, "HELD", held)
    logits, params = mixed(12, 700, step=0.25)
    check_kept(kept_keys(logits, params), logits, params)


def test_flat_and_steep_rows() -> None:
    rows = torch.stack(
        [
            torch.zeros(2500),  # all alike: more ties than are set aside where those are few
            torch.arange(2500).float() * 3,  # one id has all the mass
            torch.cat([torch.zeros(1), torch.full((2499,), -200.0)]),
            torch.cat([torch.zeros(1200), torch.full((1300,), -torch.inf)]),
            torch.linspace(-1e-6, 0, 2500),
            torch.linspace(-1e38, 1e38, 2500),
        ]
    )
    count = len(rows)
    _, params = mixed(count, 2500)
    for top_p, top_k, floor in ((0.9, 0, -math.inf), (1.0, 7, -math.inf), (0.5, 1300, -3.0), (1e-30, 0, -math.inf)):
        params = replace(
            params,
            temperature=torch.ones(count),
            top_p=torch.full((count,), top_p),
            top_k=torch.full((count,), top_k, dtype=torch.int32),
            floor=torch.full((count,), floor),
        )
        check_kept(kept_keys(rows, params), rows, params)
        ids, finite = drawn(rows, params)
        assert ((ids >= 0) & (ids < 2500)).all() and ids[3] < 1200
        assert finite.tolist() == [True, True, True, False, True, True]


def test_rows_do_not_depend_on_each_other() -> None:
    logits, params = mixed(24, 3000)
    together = drawn(logits, params)[0]
    for row in range(0, 24, 5):  # alone a row is cut into more pieces
        one = slice(row, row + 1)
        assert drawn(logits[one], params.rows(one))[0] == together[row]
    assert Pieces.of(logits[:1]).count > 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_numbers_leave_the_others_alone(value: float) -> None:
    logits, params = mixed(10, 1200)
    expected = drawn(logits, params)[0]
    logits[4, 1100] = value
    logits[5] = value
    ids, finite = drawn(logits, params)
    fine = torch.ones(10, dtype=torch.bool)
    fine[4:6] = False
    assert torch.equal(finite, fine)
    assert torch.equal(ids[fine], expected[fine])
    assert ((ids >= 0) & (ids < 1200)).all()


def test_adjusted_rows_and_their_counts() -> None:
    logits, params = mixed(33, 1300)
    given = adjusting(33, 1300)
    on_device = Adjustment(**there(given))  # type: ignore[arg-type]
    ids, _ = drawn(logits, params, adjustment=on_device)
    check_ids(ids, logits, params, given)
    assert not torch.equal(ids, drawn(logits, params)[0])
    note_drawn_on_host(given, ids)
    assert on_device.seen is not None and given.seen is not None
    assert torch.equal(on_device.seen.cpu(), given.seen)
    greedy = replace(params, temperature=torch.zeros(33))
    ids, _ = drawn(logits, greedy, SampleHints(any_random=False), Adjustment(**there(given)))  # type: ignore[arg-type]
    assert torch.equal(ids, adjust_reference(logits, given).argmax(-1))


def test_what_does_not_fit_together_is_refused() -> None:
    logits, params = mixed(3, 64)
    with pytest.raises(ValueError, match="a table of 65 ids beside logits of 64"):
        drawn(logits, params, adjustment=Adjustment(**there(adjusting(3, 65))))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side by side"):
        LogitSource.of(logits.t(), None)


def test_no_rows_launch_nothing() -> None:
    logits, params = mixed(1, 64)
    ids, finite = drawn(logits[:0], params.rows(slice(0, 0)))
    assert len(ids) == len(finite) == 0
