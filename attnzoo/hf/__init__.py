"""Models of this project in transformers: the model type "attnzoo".

    import attnzoo.hf
    model = AutoModelForCausalLM.from_pretrained(directory)

Importing registers the type with AutoConfig and AutoModelForCausalLM. It is for models that no family of transformers
computes; `attnzoo.checkpoint.export_model` writes others so that they load without this project.
"""

try:
    import transformers  # noqa: F401
except ImportError:
    raise ImportError("attnzoo.hf needs transformers: pip install 'attnzoo[hf]'") from None

from transformers import AutoConfig, AutoModelForCausalLM

from attnzoo.hf.cache import DecoderCache
from attnzoo.hf.config import AttnzooConfig
from attnzoo.hf.export import export_model
from attnzoo.hf.modeling import AttnzooForCausalLM

AutoConfig.register(AttnzooConfig.model_type, AttnzooConfig)
AutoModelForCausalLM.register(AttnzooConfig, AttnzooForCausalLM)

__all__ = ["AttnzooConfig", "AttnzooForCausalLM", "DecoderCache", "export_model"]
