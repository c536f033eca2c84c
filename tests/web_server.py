"""A local web server whose downloads break off, change or stall, as a test sets it."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """The files and the behavior of the server, and the headers of the requests it received."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    version: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    break_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off, one number for each answer."""
    ranges: bool = True
    """Support ranges."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers, which replace those of the server."""
    chunked: bool = False
    """Send chunks instead of a length."""
    stall: bool = False
    """Send nothing for two seconds instead of breaking off."""
    requests: list[dict[str, str]] = field(default_factory=list)

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.address}/{name}"


@contextmanager
def serve(**files: bytes) -> Iterator[Site]:
    """Serve files, under their names with `.pth`, on a free local port."""
    site = Site(files={f"/{name}.pth": content for name, content in files.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.requests.append(dict(self.headers))
            self.close_connection = True
            content = site.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            start = self._start()
            if start >= len(content):
                self.send_error(416)
                return
            body = content[start:]
            self.send_response(206 if start else 200)
            headers = dict(site.version)
            if site.chunked:
                headers["Transfer-Encoding"] = "chunked"
            else:
                headers["Content-Length"] = str(len(body))
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            for name, value in (headers | site.headers).items():
                self.send_header(name, value)
            self.end_headers()
            broken = bool(site.break_after)
            body = body[: site.break_after.pop(0)] if broken else body
            if site.chunked:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
                self.wfile.write(b"" if broken else b"0\r\n\r\n")
            else:
                self.wfile.write(body)
            if broken and site.stall:
                time.sleep(2)

        def _start(self) -> int:
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            condition = self.headers.get("If-Range")
            if not wanted or not site.ranges or condition not in site.version.values():
                return 0
            return int(wanted[1])

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
