"""One HTML file that shows the attention of a decoder language model for a text: every layer, every query head.

`read_maps` reads the weights of a model, `page` writes them as a file that needs nothing else.
"""

from attnzoo.attention_page.encoding import Token, page_bytes, tokens_of
from attnzoo.attention_page.maps import HeadMaps, ModelMaps, Selection, check_maps, read_maps, select
from attnzoo.attention_page.page import page

__all__ = [
    "HeadMaps",
    "ModelMaps",
    "Selection",
    "Token",
    "check_maps",
    "page",
    "page_bytes",
    "read_maps",
    "select",
    "tokens_of",
]
