"""Buckets on the loopback: emulators behind a server that counts what passes through it and spoils some of it."""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback(ThreadingHTTPServer):
    """Passes requests on to an emulator.

    Attributes:
      requests: method, path without what follows the question mark, and header Range of each that came.
      faults: pairs of a pattern and what becomes of the next requests that match: a status, "reset", "reset in body",
        "cut" (the end of the body does not come), "stall" (nor does the connection end), "wait 0.5" (seconds);
        after "always ", of all that match.
      released: ends what stalls.
      outlasted: whether nobody gave up what stalled.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.lock = upstream, threading.Lock()
        self.clear()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def clear(self):
        self.requests, self.faults = [], []
        self.released, self.outlasted = threading.Event(), False

    def spoil(self, pattern, *faults):
        """Decide what becomes of the next requests whose line matches a pattern; afterwards they pass."""
        self.faults.append((pattern, list(faults)))

    def gets(self, end):
        """The ranges that were read of files whose names end so."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(end)]

    def handle_error(self, request, client_address):
        """Clients go away in the middle; that is what is tested."""

    def fault(self, line):
        with self.lock:
            for pattern, faults in self.faults:
                if faults and re.search(pattern, line):
                    return faults[0] if faults[0].startswith("always ") else faults.pop(0)
        return "ok"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = self.headers.get("Range") or ""
        with self.server.lock:
            self.server.requests.append((self.command, self.path.partition("?")[0], asked))
        fault = self.server.fault(f"{self.command} {self.path} {asked}").removeprefix("always ")
        if fault == "reset":
            return self._reset()
        if fault.isdigit() and len(fault) == 3:
            return self._answer(int(fault), {}, b"")
        if fault.startswith("wait "):
            time.sleep(float(fault.partition(" ")[2]))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _pass_on

    def _answer(self, status, headers, content, fault="ok"):
        names = ("connection", "transfer-encoding", "content-length", "date", "server")
        length = headers.get("Content-Length") if self.command == "HEAD" else len(content)
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in names:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault in ("cut", "reset in body", "stall"):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if fault == "stall":
                self.server.outlasted = not self.server.released.wait(30)
            if fault == "reset in body":
                time.sleep(0.05)  # for the half to be read
                return self._reset()
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        self.rfile = self.wfile = _Nothing()

    def log_message(self, *_):
        pass


class _Nothing:
    """What a closed connection reads and writes."""

    closed = True

    def flush(self):
        pass

    def close(self):
        pass


@contextlib.contextmanager
def serving(upstream):
    """A `Loopback` in front of the emulator on a port."""
    server = Loopback(upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
