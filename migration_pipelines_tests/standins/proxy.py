"""What stands before a real server, so that it fails as it is told to: by HTTP requests or by connections."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from migration_pipelines_tests.standins.http import Reply, Request, Standin

_NOT_PASSED_ON = ("content-length", "transfer-encoding", "connection", "date", "server")


class Proxy(Standin):
    """Passes HTTP requests on to `url`, but for those that its faults are about."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def answer(self, request: Request) -> Reply:
        """What the server behind answers."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        url = request.path + (f"?{request.raw_query}" if request.raw_query else "")
        kept = {name: value for name, value in request.headers.items() if name not in ("host", "expect")}
        connection.request(request.method, url, body=request.body, headers=kept)
        reply = connection.getresponse()
        headers = {name: value for name, value in reply.getheaders() if name.lower() not in _NOT_PASSED_ON}
        body = reply.read()
        connection.close()
        if request.method == "HEAD":  # whose reply tells a length and has no body
            body = bytes(int(reply.getheader("content-length") or 0))
        return Reply(reply.status, body, headers)


class Gate:
    """Passes the bytes of connections on to a server; `port` is its own.

    `is_open`: whether connections are taken at all. `cut_after`: how many bytes of its replies a connection
    carries before it is reset; no limit if None. `porter`: answers in place of the server.
    """

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._open: list[socket.socket] = []
        self._listening: socket.socket | None = None
        self.port = 0
        self.cut_after: int | None = None
        self.porter: Callable[[socket.socket], None] | None = None

    @contextmanager
    def serving(self) -> Iterator[Gate]:
        """Serve on a free port of the loopback address."""
        self.open()
        try:
            yield self
        finally:
            self.close()

    def open(self) -> None:
        """Take connections, on the same port each time."""
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listening.getsockname()[1]
            threading.Thread(target=self._accept, args=[self._listening], daemon=True).start()

    def close(self) -> None:
        """Refuse connections, and break those that are there."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        while self._open:
            _reset(self._open.pop())

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            if self.porter is not None:
                threading.Thread(target=self._refuse, args=[client, self.porter], daemon=True).start()
                continue
            server = self._connect()
            self._open += [client, server]
            for pair in ((client, server, None), (server, client, self.cut_after)):
                threading.Thread(target=_pass_on, args=pair, daemon=True).start()

    def _refuse(self, client: socket.socket, porter: Callable[[socket.socket], None]) -> None:
        with client, contextlib.suppress(OSError, struct.error):
            porter(client)


def _pass_on(here: socket.socket, there: socket.socket, most: int | None) -> None:
    passed = 0
    try:
        while data := here.recv(65536):
            if most is not None and passed + len(data) > most:
                there.sendall(data[: most - passed])
                _reset(there)
                return
            there.sendall(data)
            passed += len(data)
        there.shutdown(socket.SHUT_WR)
    except OSError:  # one side broke: the other is told, or it would wait for good
        _reset(there)
        _reset(here)


def _reset(connection: socket.socket) -> None:
    """Break a connection as a server that dies does, without a farewell."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
