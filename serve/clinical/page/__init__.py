"""The page at /patients: static files, for people who ask `/v1/predict`. No build step, and nothing from other servers.

The files are served to everybody, since a browser opens a page without an API key; they hold nothing of any patient or
model. The page asks for the key and sends it with its requests.
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
DIRECTORY = Path(__file__).parent


def add_page(app: FastAPI) -> None:
    """Adds `/patients` and its files, which are read once: what changes on the disk changes no running server."""
    files = {path.name: path.read_bytes() for path in sorted(DIRECTORY.iterdir()) if path.suffix in TYPES}

    def response(name: str) -> Response:
        return Response(files[name], headers=HEADERS, media_type=TYPES[Path(name).suffix])

    @app.api_route("/patients", methods=["GET", "HEAD"])
    async def page() -> Response:
        return response("page.html")

    @app.api_route("/patients/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {short_name(name)!r}", code="not_found")
        return response(name)
