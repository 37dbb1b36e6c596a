"""What every page of the server keeps (`serve.pages`), and how a person gives it the API key."""

import httpx

from tests.helpers.browser import Browser


def check_open(url: str, path: str, policy: str) -> None:
    """Everybody gets the page and its files, and nothing else that lies beside them. policy: how it begins."""
    answer = httpx.get(url + path)
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (200, "nosniff")
    found = answer.headers["content-security-policy"]
    assert found.startswith(policy)
    assert "unsafe" not in found
    assert httpx.head(f"{url}{path}/page.js").status_code == 200
    for name in ("__init__.py", "..%2f__init__.py", "nothing.js"):
        assert httpx.get(f"{url}{path}/{name}").status_code == 404


def give_key(seen: Browser, url: str, path: str, key: str) -> None:
    """Opens the page, which asks for the key, and types it."""
    seen.open(url + path)
    seen.wait("document.querySelector('#server').textContent.includes('API key')")
    seen.value("document.querySelector('#key').focus()")
    seen.call("Input.insertText", text=key)
    seen.press("Tab")
