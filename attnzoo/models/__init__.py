"""Models that take any attention variant by configuration."""

from attnzoo.models.cache_use import CacheUse
from attnzoo.models.compiled import CompiledDecode
from attnzoo.models.config import DecoderConfig
from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.models.diffusion import DiffusionUNet
from attnzoo.models.diffusion_config import DiffusionConfig
from attnzoo.models.diffusion_infusion import Infusion
from attnzoo.models.ehr_config import EhrConfig
from attnzoo.models.ehr_encoder import EhrEncoder
from attnzoo.models.ehr_pretraining import EhrPretraining
from attnzoo.models.ehr_state import EhrMaps, EhrState
from attnzoo.models.embedded import Embedded, EmbeddedPrompt
from attnzoo.models.generate import generate
from attnzoo.models.generation_config import GenerationConfig
from attnzoo.models.ldam import Ldam, LdamInputs, LdamMaps
from attnzoo.models.ldam_config import LdamConfig
from attnzoo.models.multimodal_lm import MultimodalLM, PictureConfig, PictureEncoder, ProjectorConfig
from attnzoo.models.packing import can_pack, pack_weights
from attnzoo.models.sampling import Sampling, TokenLogprobs
from attnzoo.models.sensor_lm import Prompt, PromptedLM, SensorAdapter, SensorConfig
from attnzoo.models.sequences import Sequences
from attnzoo.models.shapes import buffer_dtype, build_shapes, materialise
from attnzoo.models.vit import VisionConfig, ViT
from attnzoo.models.widening import can_widen, widen_products

__all__ = [
    "CacheUse",
    "CompiledDecode",
    "DecoderConfig",
    "DecoderLM",
    "DiffusionConfig",
    "DiffusionUNet",
    "EhrConfig",
    "EhrEncoder",
    "EhrMaps",
    "EhrPretraining",
    "EhrState",
    "Embedded",
    "EmbeddedPrompt",
    "GenerationConfig",
    "Infusion",
    "Ldam",
    "LdamConfig",
    "LdamInputs",
    "LdamMaps",
    "MultimodalLM",
    "PictureConfig",
    "PictureEncoder",
    "ProjectorConfig",
    "Prompt",
    "PromptedLM",
    "Sampling",
    "SensorAdapter",
    "SensorConfig",
    "Sequences",
    "TokenLogprobs",
    "ViT",
    "VisionConfig",
    "buffer_dtype",
    "build_shapes",
    "can_pack",
    "can_widen",
    "generate",
    "materialise",
    "pack_weights",
    "widen_products",
]
