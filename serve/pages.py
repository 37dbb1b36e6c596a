"""Pages of static files, for people who ask the server. No build step, and nothing from other servers.

The files are served to everybody, since a browser opens a page without an API key; they hold nothing of any request or
model. A page asks for the key and sends it with its requests.
"""

from pathlib import Path

from fastapi import FastAPI, Response

from serve.openai.errors import ApiError, short_name

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
PAGE = "page.html"


def add_page(app: FastAPI, path: str, *directories: Path) -> None:
    """Adds the page at `path`, which is `PAGE`, and its files below: of the directories, a later one's instead of an
    earlier one's of the same name. They are read once: what changes on the disk changes no running server."""
    found = {each.name: each for one in directories for each in sorted(one.iterdir()) if each.suffix in TYPES}
    files = {name: each.read_bytes() for name, each in found.items()}

    def response(name: str) -> Response:
        return Response(files[name], headers=HEADERS, media_type=TYPES[Path(name).suffix])

    @app.api_route(path, methods=["GET", "HEAD"])
    async def page() -> Response:
        return response(PAGE)

    @app.api_route(path + "/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {short_name(name)!r}", code="not_found")
        return response(name)
