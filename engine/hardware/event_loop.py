"""The event loop that engine and server run on."""

import asyncio

from tetrion.engine.hardware.standard_streams import hold_standard_descriptors


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one, else asyncio's own."""
    hold_standard_descriptors()
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
