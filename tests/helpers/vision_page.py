"""The page at /vision with a trained diffusion model.

python -m tests.helpers.vision_page docs/vision.png runs/diffusion-emoji      # a picture of a composition on it
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.vision.trained_diffusion import load_diffusion
from tests.helpers.browser import Browser, browser
from tests.helpers.diffusion_models import app_of, data_url
from tests.helpers.http_server import serving
from train.experiments.composition.cases import make_cases, world_of

WIDTH, HEIGHT = 1280, 820


def drop(page: Browser, selector: str, pixels: np.ndarray, name: str = "a.png") -> None:
    """Lets go a file over an element."""
    content = data_url(pixels).partition(",")[2]
    page.value(
        f"(() => {{ const bytes = Uint8Array.from(atob({content!r}), (each) => each.charCodeAt(0)); "
        f"const files = new DataTransfer(); files.items.add(new File([bytes], {name!r}, {{type: 'image/png'}})); "
        f"document.querySelector({selector!r}).dispatchEvent(new DragEvent('drop', "
        "{dataTransfer: files, bubbles: true, cancelable: true})); })()"
    )


def put(page: Browser, **values: Any) -> None:
    """Types into fields as a change by the keyboard would."""
    for name, value in values.items():
        page.value(
            f"(() => {{ const e = document.querySelector('#{name}'); e.value = {json.dumps(value)}; "
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); })()"
        )


def composed(path: Path, run: Path, style: str = "painting") -> None:
    """Composes a case of a style on the page, and writes what is seen."""
    data = load_diffusion(run).data
    case = make_cases(world_of(data), [style], 1, 3)[2]
    left, top, side = case.square
    placement = case.placement
    fields = {"left": left, "top": top, "width": side, "height": side, "object-words": placement.words}
    fields |= {"background-prompt": placement.background_caption, "prompt": placement.caption, "steps": 20}
    with serving(app_of(run), lifespan="auto") as url, browser() as page:
        page.open(f"{url}/vision", WIDTH, HEIGHT)
        page.wait("!document.querySelector('#draw').disabled")
        drop(page, "#stage", placement.background)
        drop(page, "#object", placement.thing)
        page.wait(f"document.querySelector('#object').width === {side}")
        put(page, **fields)
        page.click("#compose")
        page.wait("!document.querySelector('#keep').hidden")
        page.value("window.scrollTo(0, 0)")
        page.picture(path)


if __name__ == "__main__":
    composed(Path(sys.argv[1]), Path(sys.argv[2]))
