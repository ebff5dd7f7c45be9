"""Who waits for a place in flight gets one, whoever else leaves."""

from __future__ import annotations

import asyncio

from vlmray.engines.openai.flow import Flow
from vlmray.engines.openai.gate import Gate
from vlmray.engines.openai.shares import LocalKeeper


def test_one_that_leaves_the_line_as_its_turn_comes_takes_nobodys_place() -> None:
    async def visit(gate: Gate, name: str, inside: list[str], may_go: asyncio.Event) -> None:
        with gate.wanted():
            async with gate.place() as place:
                inside.append(name)
                await may_go.wait()
                place.end("answered")

    async def scenario() -> None:
        gate, inside, may_go = Gate(LocalKeeper(Flow(1))), list[str](), asyncio.Event()
        first, second, third = (asyncio.create_task(visit(gate, name, inside, may_go)) for name in "abc")
        async with asyncio.timeout(30):
            while not inside:
                await asyncio.sleep(0)
            may_go.set()  # the first ends before the second hears that it is cancelled
            second.cancel()
            await asyncio.gather(first, third)
        assert second.cancelled()
        assert inside == ["a", "c"]
        assert gate.num_in_flight == 0
        await gate.close()

    asyncio.run(scenario())
