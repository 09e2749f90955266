# SPDX-License-Identifier: Apache-2.0
"""Connections to upstreams and scorers, whose failures are all httpx errors."""

from __future__ import annotations

import httpx


class Network(httpx.AsyncHTTPTransport):
    """httpx's, with its one error mended that is none of its own: a server that dies in the moment in which a connection to it is
    made leaves a connection without a socket, of which anyio asks the peer's name (seen with httpcore 1.0 and anyio 4).
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except AttributeError as error:
            if error.obj is not None or error.name != "getpeername":
                raise
            raise httpx.ConnectError("the connection was closed when it was made", request=request) from error
