"""What a request must pass before anything is computed for it: token and host, room for its body, its turn.

request ─token, host?─▶ body, as it arrives ─size, time, memory?─▶ turn ─free?─▶ work
401, 403 ◀──┘                 413, 408, 429 ◀──┘            429 ◀──┘
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from bsq_ray.serving.errors import ApiError, too_many_requests
from bsq_ray.serving.service_config import Limits

_MB = 1_000_000


def hash_token(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class AdmissionControl:
    """Admits requests to one replica of the front.

    Args:
        limits: what they may cost.
        token_digest: `digest` of the bearer token they must carry; None admits everyone.
        loopback: whether only this machine can reach the service, so that without a token they must be meant for it.
    """

    def __init__(self, limits: Limits, token_hash: str | None, loopback_only: bool) -> None:
        self._limits, self._token_hash, self._loopback_only = limits, token_hash, loopback_only
        self._buffered_bytes = 0
        self._num_active = 0

    def authenticate(self, request: Request) -> None:
        """Refuses a request without the token, or one that a foreign page makes this machine's browser send.

        Raises:
            Refused: 401; 403 the host that is asked for is another one.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self._token_hash is None:
            if self._loopback_only and not is_loopback(_requested_host(request)):
                raise ApiError(
                    403, "this service has no token and takes requests to localhost, 127.0.0.1 or [::1] only"
                )
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(hash_token(token.strip()), self._token_hash):
            raise ApiError(401, "the request needs the header 'Authorization: Bearer TOKEN' with this service's token")

    @contextmanager
    def slot(self) -> Iterator[None]:
        """The time in which a request is worked on.

        Raises:
            Refused: 429 too many are under way.
        """
        if self._num_active >= self._limits.max_ongoing_requests:
            raise too_many_requests()
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    @asynccontextmanager
    async def read_body(self, request: Request) -> AsyncIterator[bytes]:
        """The body, cut off as soon as it is too large or too slow; its memory counts until the block is left.

        Raises:
            Refused: 413, 408; 429 the bodies of other requests take all the memory; 400 its sender went away.
        """
        limits, body = self._limits, bytearray()
        too_large = ApiError(413, f"the body is larger than the {limits.max_body_mb:g} MB that are taken")
        declared_length = request.headers.get("content-length", "")
        if declared_length.isdecimal() and int(declared_length) > limits.max_body_mb * _MB:
            raise too_large
        try:
            async with asyncio.timeout(limits.upload_timeout_s):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > limits.max_body_mb * _MB:
                        raise too_large
                    if self._buffered_bytes + len(chunk) > limits.max_total_body_mb * _MB:
                        raise too_many_requests()
                    self._buffered_bytes += len(chunk)
                    body += chunk
            yield bytes(body)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limits.upload_timeout_s:g} s") from None
        except ClientDisconnect:
            raise ApiError(400, "the body did not arrive") from None
        finally:
            self._buffered_bytes -= len(body)


def _requested_host(request: Request) -> str:
    """The host that the sender has asked for, without its port; a page's name can be made to lead to any address."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
