"""Memory asked for before it is read, by a program that still waits for the kernel ahead (PDL)."""

from __future__ import annotations

import triton
import triton.language as tl

LINE_BYTES = tl.constexpr(128)  # of the cache that all processors share


@triton.jit
def into_cache(places):
    """Asks for the line of each pointer to be brought into the cache; nothing waits for it. CUDA alone.

    The cache is the one where all processors' writes arrive, so a line may be asked for before it is written.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [places.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
