"""What stands in front of the server's addresses: the key, how many bytes a request may have, and that they come."""
import asyncio
import hmac

from fastapi.responses import JSONResponse

from transfusion.serve.wire import ApiError

UNREAD = ("/health",)  # addresses that ask for nothing: what comes with them is not read, from whomever it comes
TOGETHER = 16  # times the bytes of the largest request that all requests may hold at a time
PATIENCE = 60  # seconds without a byte of a body: who waits for the rest of one cannot end, and holds what came of it


class Guard:
    """In front of everything: the key, how many bytes a request may have, and that they come."""

    def __init__(self, app, api_key: str | None, max_bytes: int):
        self.app, self.api_key, self.max_bytes = app, api_key, max_bytes
        self.held = 0  # bytes of all requests

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body, size = bytearray(), 0
        try:
            try:
                self._check_key(scope)
                if scope["path"] not in UNREAD and not await self._read(receive, body):
                    return None  # the client left
            except ApiError as error:
                return await error_response(error)(scope, receive, send)
            given, size = [{"type": "http.request", "body": bytes(body), "more_body": False}], len(body)
            body.clear()

            async def again():
                return given.pop() if given else await receive()

            return await self.app(scope, again, send)
        finally:
            self.held -= size or len(body)

    def _check_key(self, scope) -> None:
        if self.api_key is None or scope["path"] in UNREAD:
            return
        said = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(said, f"Bearer {self.api_key}".encode()):
            raise ApiError(401, "the key is missing or wrong; Authorization: Bearer and the server's --api-key fit")

    async def _read(self, receive, body: bytearray) -> bool:
        """Read a request's bytes into `body`; return whether its client is still there."""
        more = True
        while more:
            try:
                async with asyncio.timeout(PATIENCE):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"nothing more of the request came for {PATIENCE} seconds; send it again") from None
            if message["type"] == "http.disconnect":
                return False
            body += message.get("body", b"")
            self.held += len(message.get("body", b""))
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                raise ApiError(413, f"the request has more than {self.max_bytes} bytes; a smaller one fits")
            if self.held > TOGETHER * self.max_bytes:
                raise ApiError(503, "the requests that the server reads now fill its memory; ask again in a moment")
        return True


def error_response(error: ApiError) -> JSONResponse:
    """An error as it is answered."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse(error.body(), error.status, headers.get(error.status))
