"""Waiting for child processes without polling. Source: pidfd_open(2)."""

import asyncio
import os


async def exited(pid: int) -> None:
    """Return when the process has ended, at once when there is none."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
