"""TCP proxy in front of a server that breaks some connections, for tests of retries."""

import contextlib
import itertools
import socket
import threading
import time

DELAY_SECONDS = 3.0
"""Longer than the timeout of a client that is meant to time out."""


class FaultyProxy:
    """Every `every`-th connection is dropped, cut, delayed, or answered with 503."""

    def __init__(self, target: tuple[str, int], fault: str, every: int) -> None:
        self.target, self.fault, self.every = target, fault, every
        self.faults = 0
        self._count = itertools.count(1)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Clients keep connections alive: a fault may hit any of the requests of its connection."""
        faulty = next(self._count) % self.every == 0
        self.faults += faulty
        with client, contextlib.suppress(OSError), socket.create_connection(self.target) as server:
            if faulty and self.fault == "drop":
                return
            if faulty and self.fault == "delay":
                time.sleep(DELAY_SECONDS)
            if faulty and self.fault == "503":
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
            self._pump(server, client, 700 if faulty and self.fault == "truncate" else None)
            for side in (client, server):  # a close alone waits for the other thread's recv
                side.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while chunk := source.recv(65536):
                if most is not None and sent + len(chunk) > most:
                    target.sendall(chunk[: most - sent])
                    return
                target.sendall(chunk)
                sent += len(chunk)
