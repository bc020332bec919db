"""The sampler on a CUDA device at real vocabularies: the CPU's ids, in a captured graph, without a wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lmesh_kernels.ops.adjust import Adjustment, note_drawn_on_host
from lmesh_kernels.ops.sample import sample_rows
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams

from tests.kernels.test_sample_kernels import DEVICE, adjusting, check_ids, check_kept, drawn, kept_keys, mixed, there

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("vocab", [128256, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_and_kept_sets_equal_the_cpus(vocab: int, dtype: torch.dtype) -> None:
    logits, params = mixed(33, vocab)
    logits = logits.to(dtype)
    # Ranks of a few hundred beside those of the whole vocabulary.
    params = replace(params, top_k=params.top_k // torch.where(torch.arange(33) % 2 == 0, 1, 300).int())
    check_kept(kept_keys(logits.float(), params), logits.float(), params)
    ids, finite = drawn(logits, params)
    check_ids(ids, logits, params)
    assert finite.all()


def test_ties_by_the_thousand() -> None:
    logits, params = mixed(20, 128256, step=0.5)
    check_kept(kept_keys(logits, params), logits, params)
    check_ids(drawn(logits, params)[0], logits, params)


def test_a_row_alone_is_the_row_among_256() -> None:
    logits, params = mixed(256, 50304)
    together = drawn(logits, params)[0]
    for row in range(0, 256, 37):
        one = slice(row, row + 1)
        assert drawn(logits[one], params.rows(one))[0] == together[row]


def test_a_captured_graph_reads_its_parameters_anew_and_counts() -> None:
    rows, vocab = 24, 32003
    logits, params = mixed(rows, vocab)
    given = adjusting(rows, vocab)
    held, on_device = logits.to(DEVICE), Adjustment(**there(given))  # type: ignore[arg-type]
    columns = SampleParams(**there(params))  # type: ignore[arg-type]
    ids = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    finite = torch.empty(rows, dtype=torch.bool, device=DEVICE)

    def step() -> None:
        sample_rows(held, columns, SampleHints(), ids, finite, on_device)

    torch.cuda.synchronize()
    before = on_device.seen.clone()  # type: ignore[union-attr]
    side = torch.cuda.Stream()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            step()  # compiles; nothing of it waits for the device
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    on_device.seen.copy_(before)  # type: ignore[union-attr]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for turn in range(4):
        columns.position.fill_(1000 + turn)
        params = replace(params, position=torch.full((rows,), 1000 + turn))
        if turn == 2:
            columns.temperature.zero_()
            params = replace(params, temperature=torch.zeros(rows))
        graph.replay()
        check_ids(ids.cpu(), logits, params, given)
        note_drawn_on_host(given, ids.cpu())
        assert torch.equal(on_device.seen.cpu(), given.seen)  # type: ignore[union-attr]
