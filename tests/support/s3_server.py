"""Real S3 server on loopback that can be stopped and started again."""

import time
from pathlib import Path


class Server:
    """An S3 server; its objects survive a stop."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self._new, self.port = ThreadedMotoServer, 0
        self.start()

    def start(self) -> None:
        self.server = self._new(port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()

    def start_after(self, file: Path) -> None:
        """Start again when this file exists, or after five minutes."""
        deadline = time.monotonic() + 300
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.start()
