"""Requests of files by HTTP: only safe schemes, with a timeout, from a given byte on."""

import os
import re
import sys
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch

from irpe_core.errors import CheckpointError

__all__ = ["append", "file_name", "reason_of", "request", "version_of"]

_TIMEOUT = 30.0  # seconds to wait for an answer or for more data
_CHUNK = 1 << 20  # bytes


def file_name(url: str) -> str:
    """Return the file name in a URL.

    Raises:
        CheckpointError: The URL has none, or is not one of HTTP.
    """
    try:
        parts = urlsplit(url)
        name, host = Path(parts.path).name, parts.hostname
    except ValueError:
        name = host = None
    if not host or parts.scheme not in ("http", "https") or name in ("", "..") or "\0" in url:
        raise CheckpointError(f"url must be the http:// or https:// URL of a file, got {url!r}")
    return name


class _Redirects(HTTPRedirectHandler):
    """Redirections, except from https to http and to another scheme."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """Return the next request."""
        target = urljoin(req.full_url, newurl)
        allowed = ("https",) if req.type == "https" else ("http", "https")
        if urlsplit(target).scheme not in allowed:
            wanted = " or ".join(f"{scheme}://" for scheme in allowed)
            raise URLError(f"the server redirects to {target}, which must be an {wanted} URL")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def version_of(response: HTTPResponse) -> str | None:
    """Return the value for `If-Range`: a strong entity tag, or else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def request(url: str, have: int, version: str | None) -> tuple[HTTPResponse, int, int | None]:
    """Request the missing bytes; return the response, its first byte and the length of the file."""
    headers = {"User-Agent": "irpe_core"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        response = build_opener(_Redirects).open(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:
            return request(url, 0, None)
        raise CheckpointError(
            f"cannot download {url}: the server answered {error.code} {error.reason}"
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(f"cannot download {url}: {reason_of(error)}") from error
    length = response.headers.get("Content-Length", "")
    if response.status == 206 and have:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if place and int(place[1]) == have:
            return response, have, int(place[2])
        response.close()
        return request(url, 0, None)
    problem = None
    if response.status != 200:
        problem = f"the server answered {response.status} {response.reason}"
    elif response.headers.get_content_type() == "text/html":
        problem = "the server sent a web page instead of a file"
    elif not (length.isdigit() and int(length) > 0) and not response.chunked:
        problem = "the server does not say how long the file is, or it is empty"
    if problem:
        response.close()
        raise CheckpointError(f"cannot download {url}: {problem}")
    return response, 0, None if response.chunked else int(length)


def append(
    response: HTTPResponse, file: BinaryIO, title: str, total: int | None, progress: bool
) -> tuple[int, str | None]:
    """Append the response to the file; return the new size, and the error that ended it or None."""
    size = file.seek(0, os.SEEK_END)
    bar = torch.hub.tqdm(
        total=total,
        initial=size,
        desc=title,
        disable=not (progress and sys.stderr.isatty()),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
    )
    bar.n = size  # torch's substitute for a missing tqdm ignores `initial`
    with bar:
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, HTTPException) as error:
                return size, reason_of(error)
            if not chunk:
                return size, None
            rest = memoryview(chunk)
            while rest:
                rest = rest[file.write(rest) :]
            size += len(chunk)
            bar.update(len(chunk))


def reason_of(error: Exception) -> str:
    """Return the reason of an error without error numbers and wrapping exceptions."""
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT:g} s"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
