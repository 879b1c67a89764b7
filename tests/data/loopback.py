"""A web server on 127.0.0.1 whose files are well, ill or slow, as a test asks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Loopback:
    """What the server serves: ``files`` by path, and by the first folder of the path, how (``/truncated/x``)."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.recover_after: int | None = None
        self.release = threading.Event()
        self.address = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests[handler.path] += 1
        _, manner, name = handler.path.split("/")
        data = self.files.get(name)
        if self.recover_after is not None and self.requests[handler.path] > self.recover_after:
            manner = "good"
        if manner == "redirect":
            handler.send_response(302)
            handler.send_header("Location", f"{self.address}/good/{name}")
            handler.end_headers()
            return
        if data is None or manner == "missing":
            handler.send_error(404)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if manner == "truncated":
            handler.wfile.write(data[: len(data) // 2])
        elif manner == "stalled":
            handler.wfile.write(data[: len(data) // 2])
            handler.wfile.flush()
            self.release.wait(30)
        elif manner == "corrupt":
            handler.wfile.write(data[:-1] + bytes([data[-1] ^ 1]))
        else:
            handler.wfile.write(data)


@contextmanager
def loopback() -> Iterator[Loopback]:
    """Run a server for as long as the context lasts."""
    served = Loopback()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield served
    finally:
        served.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
