"""The page at `/ui` and the two paths that it alone reads; `serving/ui/` holds its files, which need no network.

Nothing in the page is secret, so its files are open even where keys are asked for; what it shows is not. Without keys, on
loopback, the page and its data are given only to a browser that asked for a loopback name: else a foreign site could point
a name of its own at 127.0.0.1 and read the answers.
"""

from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from loopfm_ray.serving.answering import Refusal
from loopfm_ray.serving.bodies import read_body, request_id_for
from loopfm_ray.serving.contract import ScoreRequest
from loopfm_ray.serving.explore import Explorer, explore, sample
from loopfm_ray.serving.exposure import is_loopback

__all__ = ["SECURITY_HEADERS", "Page"]

_FILES = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/page.css": ("page.css", "text/css; charset=utf-8"),
    "/ui/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/ui/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
}
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Page:
    """The page of one service.

    Attributes:
        explorer: what it looks into.
        asks_loopback: whether only browsers that asked for a loopback name are answered.
    """

    explorer: Explorer
    asks_loopback: bool = True

    @property
    def open_paths(self) -> tuple[str, ...]:
        """The paths that need no key."""
        return tuple(_FILES)

    def add_to(self, app: FastAPI) -> None:
        """Give `app` the page."""
        for path in _FILES:
            app.add_api_route(
                path, self._file, methods=["GET"], include_in_schema=False, response_class=Response
            )
        app.add_api_route(
            "/v1/models/{vm}/samples",
            self._samples,
            methods=["GET"],
            summary="Some known users and items, for the page",
        )
        app.add_api_route(
            "/v1/models/{vm}:explore",
            self._explore,
            methods=["POST"],
            summary="One request scored with and without its history, for the page",
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": ScoreRequest.model_json_schema()}},
                }
            },
        )

    async def _file(self, request: Request) -> Response:
        self._check_name(request)
        name, media_type = _FILES[request.scope["path"].removeprefix(request.scope["root_path"])]
        content = resources.files("loopfm_ray.serving").joinpath("ui", name).read_bytes()
        return Response(content, media_type=media_type, headers=SECURITY_HEADERS)

    async def _samples(self, request: Request, vm: str) -> Response:
        self._check_name(request)
        return JSONResponse(sample(self.explorer, vm).model_dump(), headers=SECURITY_HEADERS)

    async def _explore(self, request: Request, vm: str) -> Response:
        self._check_name(request)
        sent = await read_body(request, ScoreRequest)
        query = sent.to_query(request.app.state.clock())
        found = explore(self.explorer, vm, query, request_id_for(request))
        return JSONResponse(found.model_dump(), headers=SECURITY_HEADERS)

    def _check_name(self, request: Request) -> None:
        """Check that a browser asked for this machine by a loopback name.

        Raises:
            Refusal: 403, it asked for another.
        """
        if self.asks_loopback and not is_loopback(request.url.hostname or ""):
            raise Refusal(403, "open the page by 127.0.0.1 or localhost")
