"""Templates in helper processes: what loops or eats memory ends alone, and helpers end with their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from lmesh_kernels.text.render_process import LONGEST_TEXT
from lmesh_kernels.text.sandbox import TemplateSandbox
from lmesh_kernels.text.template import TemplateError

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HELLO = "{{ messages[0].content }}"
# Long enough that a busy machine does not fail a template that does end.
PATIENT_S = 60.0


@pytest.fixture
async def sandbox() -> AsyncIterator[TemplateSandbox]:
    box = TemplateSandbox(processes=2, timeout_s=PATIENT_S)
    yield box
    await box.close()


@pytest.fixture
async def single() -> AsyncIterator[TemplateSandbox]:
    box = TemplateSandbox(processes=1, timeout_s=PATIENT_S)
    yield box
    await box.close()


@pytest.fixture
async def hasty() -> AsyncIterator[TemplateSandbox]:
    """Gives up at once, which only templates that never end may be given."""
    box = TemplateSandbox(processes=1, timeout_s=0.2)
    yield box
    await box.close()


async def rendered(box: TemplateSandbox, template: str, content: str = "hello", **options: Any) -> str:
    messages = [{"role": "user", "content": content}]
    return await box.render(template, messages=messages, add_generation_prompt=True, special_tokens={}, **options)


async def failure(box: TemplateSandbox, template: str) -> TemplateError:
    with pytest.raises(TemplateError) as caught:
        await rendered(box, template)
    return caught.value


def children(parent: int) -> set[int]:
    """Process ids of the living children of `parent`."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {int(child) for child in found if is_alive(int(child))}


def is_alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


async def until_dead(processes: set[int]) -> None:
    """Waits for their ends as the kernel reports them."""
    loop = asyncio.get_running_loop()
    for process in processes:
        try:
            handle = os.pidfd_open(process)
        except ProcessLookupError:
            continue
        ended = asyncio.Event()
        loop.add_reader(handle, ended.set)
        try:
            await asyncio.wait_for(ended.wait(), 30)
        finally:
            loop.remove_reader(handle)
            os.close(handle)


async def test_renders_as_the_function_does(sandbox: TemplateSandbox) -> None:
    template = "{{ messages[0].content }}|{{ tools | tojson }}|{{ mood }}|{{ add_generation_prompt }}"
    text = await rendered(sandbox, template, "h\u00e9 \U0001f600 \ud800", tools=[{"a": 1}], extra={"mood": "good"})
    assert text == 'h\u00e9 \U0001f600 \ud800|[{"a": 1}]|good|True'


async def test_errors_come_with_their_reasons(sandbox: TemplateSandbox) -> None:
    assert (await failure(sandbox, "{{ raise_exception('no') }}")).reason == "TEMPLATE_REFUSED"
    assert (await failure(sandbox, "{% if %}")).reason == "TEMPLATE_INVALID"
    assert (await failure(sandbox, "{{ nothing.more }}")).reason == "TEMPLATE_FAILED"
    assert await rendered(sandbox, HELLO) == "hello"


async def test_a_loop_is_stopped_and_its_process_replaced(hasty: TemplateSandbox) -> None:
    before = children(os.getpid())
    assert (await failure(hasty, LOOP)).reason == "TEMPLATE_TIMEOUT"
    looping = children(os.getpid()) - before
    assert (await failure(hasty, LOOP)).reason == "TEMPLATE_TIMEOUT"
    await until_dead(looping)


async def test_a_slot_comes_back_from_a_loop(single: TemplateSandbox) -> None:
    looping = asyncio.create_task(rendered(single, LOOP))
    waiting = asyncio.create_task(rendered(single, HELLO))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()  # there is one slot, and the loop has it
    looping.cancel()
    assert await waiting == "hello"
    with pytest.raises(asyncio.CancelledError):
        await looping


async def test_a_neighbour_of_a_loop_is_unharmed(sandbox: TemplateSandbox) -> None:
    looping = asyncio.create_task(rendered(sandbox, LOOP))
    texts = await asyncio.gather(*(rendered(sandbox, HELLO, str(n)) for n in range(20)))
    assert texts == [str(n) for n in range(20)]
    assert not looping.done()
    looping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looping


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10**10 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{{ range(99999) | map('string') | join('x' * 100000) }}",
    ],
)
async def test_a_memory_bomb_bursts_alone(sandbox: TemplateSandbox, bomb: str) -> None:
    neighbour = asyncio.create_task(rendered(sandbox, HELLO))
    assert (await failure(sandbox, bomb)).reason == "TEMPLATE_FAILED"
    assert await neighbour == "hello"
    assert await rendered(sandbox, HELLO) == "hello"


async def test_a_flood_of_text_is_refused_before_it_reaches_us(sandbox: TemplateSandbox) -> None:
    error = await failure(sandbox, f"{{{{ 'a' * {LONGEST_TEXT + 1} }}}}")
    assert error.reason == "TEMPLATE_FAILED" and str(LONGEST_TEXT) in error.message


async def test_a_long_prompt_fits_through(sandbox: TemplateSandbox) -> None:
    content = "\U0001f600" * (1 << 20)
    assert await rendered(sandbox, HELLO, content) == content


async def test_a_cancelled_call_leaves_nothing_for_the_next(single: TemplateSandbox) -> None:
    assert await rendered(single, HELLO, "first") == "first"
    for turns in range(5):
        cut = asyncio.create_task(rendered(single, HELLO, "stale" * 100000))
        for _ in range(turns):
            await asyncio.sleep(0)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)
        assert await rendered(single, HELLO, "fresh") == "fresh"


async def test_a_killed_helper_is_replaced(single: TemplateSandbox) -> None:
    before = children(os.getpid())
    assert await rendered(single, HELLO) == "hello"
    (helper,) = children(os.getpid()) - before
    looping = asyncio.create_task(rendered(single, LOOP))
    await asyncio.sleep(0)  # it has its helper now
    os.kill(helper, signal.SIGKILL)
    with pytest.raises(TemplateError, match="ended"):
        await looping
    assert await rendered(single, HELLO) == "hello"


async def test_close_ends_idle_helpers() -> None:
    before = children(os.getpid())
    box = TemplateSandbox(processes=2, timeout_s=PATIENT_S)
    await asyncio.gather(*(rendered(box, HELLO) for _ in range(2)))
    helpers = children(os.getpid()) - before
    assert helpers
    await box.close()
    await until_dead(helpers)


PARENT = f"""
import asyncio
from lmesh_kernels.text.sandbox import TemplateSandbox

async def main():
    box = TemplateSandbox(processes=2, timeout_s=600)
    ask = lambda t: box.render(t, messages=[], add_generation_prompt=False, special_tokens={{}})
    await asyncio.gather(ask("a"), ask("b"))  # both helpers run
    looping = asyncio.create_task(ask({LOOP!r}))
    print(await ask("idle"), flush=True)  # the other one has the loop by now
    await looping

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
async def test_helpers_end_when_their_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", PARENT, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    assert await parent.stdout.readline() == b"idle\n"
    helpers = children(parent.pid)
    assert len(helpers) == 2
    parent.kill()
    await parent.wait()
    await until_dead(helpers)
