"""uvicorn's server, which says where it listens and, when it is told to end, waits for what runs and for no more."""
import asyncio
import time

import uvicorn

from transfusion.serve.engine import Engine

PAUSE = 0.1
UNREAD = 60.0
"""seconds that clients have, once the engine is done, to take what it made for them"""


class AnnouncedServer(uvicorn.Server):
    """A server that prints a line when it listens, and that no client holds who does not read."""

    def __init__(self, config: uvicorn.Config, line: str, engine: Engine):
        super().__init__(config)
        self.line, self.engine = line, engine

    async def startup(self, sockets=None) -> None:
        """As uvicorn's, which ends the process where the port cannot be had."""
        await super().startup(sockets)
        if self.started:
            print(self.line, flush=True)

    async def shutdown(self, sockets=None) -> None:
        """As uvicorn's, which would wait for a client that stopped reading without end; a second Ctrl-C does not."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # takes no more requests, and ends after the one that it answers
        since = time.monotonic()
        while self.server_state.connections and not self.force_exit and time.monotonic() - since < UNREAD:
            await asyncio.sleep(PAUSE)
            stats = self.engine.stats()
            if stats["running"] or stats["waiting"]:
                since = time.monotonic()
        self.config.timeout_graceful_shutdown = 1
        await super().shutdown(sockets)
