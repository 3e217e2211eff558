"""A small server on loopback that does not always behave."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATA = os.urandom(256) * 5000
DIGEST = hashlib.sha256(DATA).hexdigest()
COMMIT = "a" * 40


class Server:
    """Serves DATA at every path; what goes wrong is set by its attributes. seen: (method, path, first byte)."""

    def __init__(self):
        self.seen, self.data, self.breaks, self.says_more, self.ranges = [], DATA, 0, 0, True
        self.digest, self.pause, self.elsewhere, self.tokens = DIGEST, 0.0, None, {}
        self.commit, self.meet = COMMIT, None

    def answer(self, http, body):
        start = int((http.headers.get("Range") or "bytes=0-")[6:-1]) if self.ranges else 0
        self.seen.append((http.command, http.path, start))
        self.tokens[http.path] = http.headers.get("Authorization")
        if "nonsense" in http.path:
            return http.wfile.write(b"nonsense\r\n\r\n")
        if "gone" in http.path:
            return http.send_error(404)
        if self.elsewhere and "resolve" in http.path and body:
            http.send_response(302)
            http.send_header("Location", self.elsewhere)
            return http.end_headers()
        if start > len(self.data):
            return http.send_error(416)
        http.send_response(206 if start else 200)
        http.send_header("Content-Length", str(len(self.data) - start + self.says_more))
        http.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        http.send_header("ETag", f'"{self.digest}"')
        if self.commit:
            http.send_header("X-Repo-Commit", self.commit)
        http.end_headers()
        if not body:
            return
        if self.meet:
            self.meet.wait(60)
        part = self.data[start:]
        if self.breaks:
            self.breaks -= 1
            part = part[: len(part) // 2]
        with suppress(ConnectionError):  # of a client that was killed
            for i in range(0, len(part), 2**16):
                http.wfile.write(part[i : i + 2**16])
                time.sleep(self.pause)


@contextmanager
def serving() -> Iterator[Server]:
    """A server with its `url`."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.answer(self, True)

        def do_HEAD(self):
            state.answer(self, False)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        try:
            yield state
        finally:
            http.shutdown()
