"""attnzoo: attention variants written once, trained under DeepSpeed, served on Ray Serve.

    import attnzoo

    layer = attnzoo.attention("rcmha", model_dim=256, num_heads=8)    # y = layer(x), x of [batch, tokens, 256]
    lm = attnzoo.load("smollm2")
    print(lm.generate("The capital of France is", max_new_tokens=16, cache="d2o", keep_ratio=0.5).text)

What a user needs first is named here; each name is loaded when it is first used.
"""

TYPE_CHECKING = False  # as typing's, which takes its time to import
if TYPE_CHECKING:
    from typing import Any

    from attnzoo.attention import attention
    from attnzoo.generation import Continuation, Generation, GenerationStream
    from attnzoo.language_model import LanguageModel
    from attnzoo.loading import load
    from attnzoo.models import CacheUse, GenerationConfig

__version__ = "0.1.0"
__all__ = [
    "CacheUse",
    "Continuation",
    "Generation",
    "GenerationConfig",
    "GenerationStream",
    "LanguageModel",
    "__version__",
    "attention",
    "caches",
    "load",
    "variants",
]

_WHERE = {
    "CacheUse": "attnzoo.models",
    "Continuation": "attnzoo.generation",
    "Generation": "attnzoo.generation",
    "GenerationConfig": "attnzoo.models",
    "GenerationStream": "attnzoo.generation",
    "LanguageModel": "attnzoo.language_model",
    "load": "attnzoo.loading",
}


def variants() -> list[str]:
    """Names of the attention variants, those of ATTNZOO_PLUGINS included: what `attention` takes.

    Raises ValueError for a plug-in that cannot be imported.
    """
    from attnzoo.attention import ATTENTION

    return ATTENTION.names()


def caches() -> list[str]:
    """Names of the cache policies: what `LanguageModel.generate` takes as cache."""
    from attnzoo.kvcache import CACHES

    return CACHES.names()


def __getattr__(name: str) -> "Any":
    import importlib

    if name == "attention":  # the package, which is callable: importing it binds it to this name in any case
        return importlib.import_module("attnzoo.attention")
    if name not in _WHERE:
        raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")
    found = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
