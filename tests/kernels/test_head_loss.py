"""Head and loss together against plain torch in float64: value and gradients, in chunks and at once."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.head_loss import CHUNK_BYTES, head_loss, head_loss_reference
from lmesh_kernels.ops.trained import Trained
from torch import Tensor

TOKENS, WIDTH, VOCAB = 37, 24, 101
CHUNKS = {"at once": CHUNK_BYTES, "in chunks": 5 * 4 * VOCAB, "a row each": 1}
ROUND = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def drawn(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, head, targets, weights), a third of the weights 0 and the others neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    head = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    weights = torch.rand(TOKENS, generator=generator) + 0.5
    weights[::3] = 0.0
    return hidden, head, torch.randint(VOCAB, (TOKENS,), generator=generator), weights


def wanted(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradients of hidden and head) of the reference on float64 copies."""
    rows, matrix = hidden.double().requires_grad_(), head.double().requires_grad_()
    loss = head_loss_reference(rows, matrix, targets, weights)
    loss.backward()
    assert rows.grad is not None and matrix.grad is not None
    return loss.detach(), rows.grad, matrix.grad


def logit_errors(hidden: Tensor, head: Tensor) -> Tensor:
    """[T, 1]: how far a row's logits may lie from their exact values: the sum's roundings, and the stored one."""
    sizes = hidden.double().abs() @ head.double().abs().t()
    stored = ROUND[hidden.dtype] if hidden.dtype != torch.float32 else 0.0
    return (((WIDTH + 1) * ROUND[torch.float32] + stored) * sizes).amax(dim=1, keepdim=True)


def loss_bound(hidden: Tensor, head: Tensor, weights: Tensor) -> float:
    """Loss is 1-Lipschitz in the logits' largest error, twice: the target's and the sum's. Then a sum over V, a
    logarithm, and an addition of numbers as large as the logits, in float32.
    """
    largest = (hidden.double().abs() @ head.double().abs().t()).amax(dim=1)
    own = ROUND[torch.float32] * (VOCAB + 8 + 4 * largest)
    return float(((2 * logit_errors(hidden, head)[:, 0] + own) * weights.double()).sum())


def gradient_bounds(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of d hidden [T, D] and d head [V, D]. A probability errs by a factor of exp(twice the logits' error), by the
    roundings of an exponential, a sum over V and a quotient, and as it is stored; products then add up over V or T.
    """
    errors, unit = logit_errors(hidden, head), ROUND[torch.float32]
    logits = hidden.double() @ head.double().t()
    p = logits.softmax(dim=1)
    largest = (hidden.double().abs() @ head.double().abs().t()).amax(dim=1, keepdim=True)
    relative = (2 * errors).expm1() + unit * (VOCAB + 8 + 2 * largest)
    stored = ROUND[hidden.dtype]
    shares = weights.double()[:, None]
    exact = (p - torch.nn.functional.one_hot(targets, VOCAB)).abs() * shares
    off = p * shares * relative + 2 * stored * (exact + p * shares * relative)
    rows = off @ head.double().abs() + ((VOCAB + 1) * unit + 2 * stored) * ((exact + off) @ head.double().abs())
    matrix = off.t() @ hidden.double().abs() + (2 * TOKENS + 1) * unit * ((exact + off).t() @ hidden.double().abs())
    return rows, matrix


def within(found: Tensor, exact: Tensor, bound: Tensor) -> bool:
    return bool(((found.double() - exact).abs() <= bound).all())  # never true of NaN


@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_value_and_gradients(dtype: torch.dtype, chunk_bytes: int, trained: bool) -> None:
    hidden, head, targets, weights = drawn(dtype)
    loss, rows, matrix = wanted(hidden, head, targets, weights)
    begun = torch.ones(VOCAB, WIDTH)  # a sum that others have added to
    leaf = hidden.clone().requires_grad_()
    sums = head_loss(leaf, Trained(head, begun) if trained else head, targets, weights, chunk_bytes=chunk_bytes)
    sums.loss.backward()
    assert sums.loss.dtype == torch.float64 and leaf.grad is not None and leaf.grad.dtype == dtype
    assert abs(float(sums.loss.detach() - loss)) <= loss_bound(hidden, head, weights)
    row_bound, matrix_bound = gradient_bounds(hidden, head, targets, weights)
    assert within(leaf.grad, rows, row_bound)
    assert not leaf.grad[weights == 0].any()
    if trained:
        # Each chunk's product is rounded again as it is added to the sum.
        added = (TOKENS + 1) * ROUND[torch.float32] * (1 + matrix.abs())
        assert within(begun, matrix + 1, matrix_bound + added)
    else:
        assert torch.equal(begun, torch.ones(VOCAB, WIDTH))


def test_the_bounds_would_notice() -> None:
    """Targets one off, weights not as told, a chunk that is skipped: each is far outside of what rounding does."""
    hidden, head, targets, weights = drawn(torch.bfloat16)
    loss, rows, matrix = wanted(hidden, head, targets, weights)
    skipped = weights.clone()
    skipped[-7:-2] = 0.0
    for told in (((targets + 1) % VOCAB, weights), (targets, weights.clamp(max=1.0)), (targets, skipped)):
        other = wanted(hidden, head, *told)
        assert abs(float(other[0] - loss)) > loss_bound(hidden, head, weights)
        row_bound, matrix_bound = gradient_bounds(hidden, head, targets, weights)
        assert not within(other[1], rows, row_bound) and not within(other[2], matrix, matrix_bound)


def test_a_tied_matrix_gathers_both_of_its_gradients() -> None:
    """The embedding's rows are read as hidden, and the same sum takes the head's: the two must add up."""
    _, head, targets, weights = drawn(torch.float32)
    ids = torch.arange(TOKENS) * 2 % VOCAB
    matrix = head.double().requires_grad_()
    head_loss_reference(matrix[ids], matrix, targets, weights).backward()
    trained = Trained(head, torch.zeros(VOCAB, WIDTH))
    leaf = head[ids].clone().requires_grad_()
    head_loss(leaf, trained, targets, weights, chunk_bytes=CHUNKS["in chunks"]).loss.backward()
    assert leaf.grad is not None and matrix.grad is not None
    trained.grad.index_add_(0, ids, leaf.grad)
    row_bound, matrix_bound = gradient_bounds(head[ids], head, targets, weights)
    both = matrix_bound.index_add(0, ids, row_bound)
    assert within(trained.grad, matrix.grad, both + (TOKENS + 1) * ROUND[torch.float32] * (1 + matrix.grad.abs()))


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_correct_counts_weighted_tokens_alone(chunk_bytes: int) -> None:
    hidden, head, targets, weights = drawn(torch.float32)
    likeliest = (hidden @ head.t()).argmax(dim=1)
    targets = torch.where(torch.arange(TOKENS) % 2 == 0, likeliest, targets)
    expected = int(((targets == likeliest) & (weights != 0)).sum())
    assert 0 < expected < int((weights != 0).sum()) < TOKENS
    assert int(head_loss(hidden, head, targets, weights, chunk_bytes=chunk_bytes).correct) == expected


def test_nothing_with_a_weight_is_a_loss_of_zero() -> None:
    hidden, head, targets, weights = drawn(torch.float32)
    trained, leaf = Trained(head, torch.zeros(VOCAB, WIDTH)), hidden.clone().requires_grad_()
    sums = head_loss(leaf, trained, targets, torch.zeros_like(weights))
    sums.loss.backward()
    assert leaf.grad is not None and not leaf.grad.any() and not trained.grad.any()
    assert float(sums.loss.detach()) == 0.0 and int(sums.correct) == 0


def test_without_a_gradient_nothing_is_added() -> None:
    """As an evaluation runs it: the same value, and a trained head's sum stays as it is."""
    hidden, head, targets, weights = drawn(torch.float32)
    trained = Trained(head, torch.zeros(VOCAB, WIDTH))
    with torch.no_grad():
        found = head_loss(hidden, trained, targets, weights).loss
    assert abs(float(found - wanted(hidden, head, targets, weights)[0])) <= loss_bound(hidden, head, weights)
    assert not trained.grad.any()


def test_logits_of_any_size_stay_finite() -> None:
    hidden, head, targets, weights = drawn(torch.float32)
    hidden = hidden * 1e3
    loss, rows, _ = wanted(hidden, head, targets, weights)
    leaf = hidden.clone().requires_grad_()
    sums = head_loss(leaf, head, targets, weights)
    sums.loss.backward()
    assert leaf.grad is not None
    assert float(sums.loss.detach()) == pytest.approx(float(loss), rel=1e-5)
    assert float((leaf.grad - rows).norm()) <= 1e-2 * float(rows.norm())
