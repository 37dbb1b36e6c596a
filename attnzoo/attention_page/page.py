"""Writes the page: one HTML file with its style, its script and its data, which asks for nothing from anywhere."""

import base64
import dataclasses
import hashlib
from html import escape
from importlib.resources import files
from string import Template

from attnzoo.attention_page.encoding import encoded_weights, in_script, readable
from attnzoo.attention_page.maps import ModelMaps


def page(maps: ModelMaps) -> str:
    """The file as text. Its policy lets no other script run than its own, and nothing be fetched."""
    style, script = _part("page.css"), _part("page.js")
    return Template(_part("page.html")).substitute(
        policy=f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}",
        title=escape(readable(f"Attention of {maps.model}")),
        style=style,
        script=script,
        data=in_script(_content(maps)),
    )


def _content(maps: ModelMaps) -> dict[str, object]:
    return {
        "model": maps.model,
        "num_layers": maps.num_layers,
        "notes": list(maps.notes),
        "tokens": [dataclasses.asdict(token) for token in maps.tokens],
        "layers": [
            {
                "layer": each.layer,
                "variant": each.variant,
                "heads": list(each.heads),
                "weights": encoded_weights(each.weights_NTT),
            }
            for each in maps.layers
        ],
    }


def _part(name: str) -> str:
    return files("attnzoo.attention_page").joinpath(name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    """How a policy names an element by what stands in it."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
