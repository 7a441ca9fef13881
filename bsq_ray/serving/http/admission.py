"""Authentication and admission control: checks that a request passes before anything is computed for it.

request ─token, host?─▶ body, as it arrives ─size, time, memory?─▶ slot ─free?─▶ work
401, 403 ◀──┘                 413, 408, 429 ◀──┘             429 ◀──┘
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from bsq_ray.serving.errors import ApiError, too_many_requests_error
from bsq_ray.serving.http.content_encoding import decode_content, parse_content_encoding
from bsq_ray.serving.service_config import Limits

_MB = 1_000_000


def hash_token(token: str) -> str:
    """Return the SHA-256 hash of a token, in hexadecimal; the token itself is not stored."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Return whether only this node can reach the address."""
    # A dot at the end marks a name as complete.
    host = host.lower().removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # Short, octal and hexadecimal forms, such as 127.1.
        if re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", host):
            return _is_loopback_number(host)
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_loopback_name(host: str) -> bool:
    # Browsers resolve names below .localhost to this node (RFC 6761), so DNS rebinding cannot use them.
    return is_loopback(host) or host.removesuffix(".").endswith(".localhost")


def _is_loopback_number(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.inet_aton(host)).is_loopback
    except OSError:
        return False


class AdmissionControl:
    """Admits requests to one replica of the ingress.

    Args:
        limits: limits of requests.
        token_hash: `hash_token` of the bearer token that requests must carry; None accepts every request.
        loopback_only: only this node can reach the service. Without a token, requests must then name a loopback host.
    """

    def __init__(self, limits: Limits, token_hash: str | None, loopback_only: bool) -> None:
        self._limits, self._token_hash, self._loopback_only = limits, token_hash, loopback_only
        self._buffered_bytes = 0
        self._num_active = 0
        # One body at a time, so that the memory reserved for decoding stays small.
        self._decoding_lock = asyncio.Lock()

    def authenticate(self, request: Request) -> None:
        """Reject a request without the token, or one that a foreign page sends through this node's browser.

        Raises:
            ApiError: 401 missing or wrong token; 403 the Host header names another host.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self._token_hash is None:
            if self._loopback_only and not _is_loopback_name(_requested_host(request)):
                raise ApiError(
                    403, "the service has no token, so it accepts requests to localhost, 127.0.0.1 or [::1] only"
                )
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(hash_token(token.strip()), self._token_hash):
            raise ApiError(401, "missing or wrong token; send the header 'Authorization: Bearer TOKEN'")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy a request slot while the block runs.

        Raises:
            ApiError: 429 all slots are occupied.
        """
        if self._num_active >= self._limits.max_ongoing_requests:
            raise too_many_requests_error()
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    @asynccontextmanager
    async def read_body(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body, decoded from its Content-Encoding; its memory counts towards the limit until the block ends.

        Raises:
            ApiError: 413 too large, 408 too slow, 429 no memory for further bodies, 400 the client disconnected, 415
                unsupported encoding, 422 the encoded body is damaged. The body is not read any further.
        """
        limits, body = self._limits, bytearray()
        encodings = parse_content_encoding(request.headers.get("content-encoding", ""))
        too_large = ApiError(413, f"the body exceeds {limits.max_body_mb:g} MB; send a smaller file")
        declared_length = request.headers.get("content-length", "")
        if declared_length.isdecimal() and int(declared_length) > limits.max_body_mb * _MB:
            raise too_large
        try:
            async with asyncio.timeout(limits.upload_timeout_s):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limits.max_body_mb * _MB:
                        raise too_large
                    if self._buffered_bytes + len(chunk) > limits.max_total_body_mb * _MB:
                        raise too_many_requests_error()
                    self._buffered_bytes += len(chunk)
                    body += chunk
            if encodings:
                await self._decode_in_place(body, encodings)
            yield bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.upload_timeout_s:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "the client disconnected before the body arrived") from None
        finally:
            self._buffered_bytes -= len(body)

    async def _decode_in_place(self, body: bytearray, encodings: list[str]) -> None:
        max_bytes = int(self._limits.max_body_mb * _MB)
        async with self._decoding_lock:
            if self._buffered_bytes + max_bytes > self._limits.max_total_body_mb * _MB:
                raise too_many_requests_error()
            self._buffered_bytes += max_bytes
            try:
                decoded = await asyncio.to_thread(decode_content, bytes(body), encodings, max_bytes)
            finally:
                self._buffered_bytes -= max_bytes
        self._buffered_bytes += len(decoded) - len(body)
        body[:] = decoded


def _requested_host(request: Request) -> str:
    """Return the Host header without its port: DNS rebinding can make a page's name resolve to this node."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
