"""The layer around an ASGI application that opens a trace for each request."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loopfm_ray.serving.watch import Watch

__all__ = ["Watching"]

_UNWATCHED = ("/healthz", "/readyz", "/metrics")
_GONE = 499
"""Status of a request whose caller did not wait."""


class Watching:
    """Opens a trace for each request and closes it when it is answered."""

    def __init__(self, app: ASGIApp, watch: Watch) -> None:
        self._app, self._watch = app, watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have one request answered."""
        route = _route(scope)
        if route is None:
            await self._app(scope, receive, send)
            return
        trace = self._watch.begin(route, "http")
        for name, value in scope["headers"]:
            if name == b"traceparent":
                trace.traceparent = value.decode("latin-1")
            elif name == b"tracestate":
                trace.tracestate = value.decode("latin-1")

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except BaseException as error:  # the outermost layer answers, or the caller is gone
            trace.status = 500 if isinstance(error, Exception) else _GONE
            raise
        finally:
            trace.request_id = scope.get("state", {}).get("request_id", "")
            self._watch.end(trace)


def _route(scope: Scope) -> str | None:
    """Return one of few words for the path; None for what is not watched."""
    if scope["type"] != "http":
        return None
    path: str = scope["path"]
    if path in _UNWATCHED:
        return None
    for suffix in ("score", "batch"):
        if path.endswith(f":{suffix}"):
            return suffix
    return "models" if path.startswith("/v1/models") else "other"
