"""What a run of a language model refuses before anything is prepared, so that errors come at once."""

import importlib.util

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnzoo.attention import try_forward
from attnzoo.checkpoint import find_checkpoint, open_checkpoint
from attnzoo.checkpoint.native import check_saveable
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from train.config import Config
from train.config_layers import ConfigError
from train.data import DataConfig
from train.data.corpora import fingerprint
from train.data.retrieval import SOURCE, check_tasks
from train.lora import add_adapters
from train.tasks.initial import check_same_model


def check_model_section(config: Config) -> None:
    """Raises ValueError for keys and values of `model` that no tokenizer would make right."""
    if "vocab_size" in config.model:
        raise ValueError(
            f"model.vocab_size={config.model['vocab_size']!r}: the vocabulary is the tokenizer's; set "
            "tokenizer.vocab_size"
        )
    config.model_config(1)  # any vocabulary size will do


def check_adapters(config: Config) -> None:
    """Raises ValueError for adapters (`lora`) of new weights."""
    if config.lora.rank is not None and config.checkpoint.init_from is None:
        raise ValueError("lora.rank needs checkpoint.init_from: adapters of random weights learn nothing")


def check_length(config: Config, model_config: DecoderConfig) -> None:
    """Raises ConfigError if sequences are longer than the model's context."""
    if config.sequence_length > model_config.max_positions:
        raise ConfigError(
            f"data.sequence_length={config.sequence_length} is longer than model.max_positions="
            f"{model_config.max_positions}; raise the latter"
        )


def check_data(data: DataConfig) -> None:
    """Raises ValueError for a source that is not there or does not fit the options."""
    if data.source.startswith("hub:"):
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(
                f"data.source={data.source!r} needs the package `datasets`, which is not installed; "
                "pip install 'attnzoo[train]', or give a local path"
            )
    elif data.source == SOURCE:
        check_tasks(data)
    else:
        fingerprint(data)  # raises if files are missing


def check_model(config: Config, model_config: DecoderConfig) -> None:
    """Raises ValueError for a model that cannot be saved, trained as the options say, or computed here."""
    shapes = build_shapes(model_config)
    try:
        check_saveable(shapes)  # now, not when the trained model is exported
        tried: set[str] = set()
        for layer, block in enumerate(shapes.layers()):
            kind = repr(model_config.layer_attention(layer))
            if kind not in tried:
                try_forward(block.attention)
            tried.add(kind)
    except ValueError as error:
        raise ConfigError(f"model.attention: {error}") from None
    if config.data.get("isolate_documents"):
        for block in shapes.layers():
            if not block.attention.traits.varlen:
                raise ConfigError(
                    f"data.isolate_documents=true: {type(block.attention).__name__} cannot keep documents of one row "
                    "apart; set it to false, or choose another model.attention"
                )
    if config.lora.rank is not None:
        add_adapters(shapes, config.lora)
    if model_config.attention_impl == "triton":
        _check_kernels(model_config)


def check_init(config: Config, model_config: DecoderConfig) -> None:
    """Raises ValueError if the model of checkpoint.init_from is missing or another one."""
    checkpoint = config.checkpoint.init_from
    if checkpoint is not None:
        theirs = open_checkpoint(find_checkpoint(checkpoint)).config
        if not config.checkpoint.adopt_model:
            check_same_model(theirs.to_dict(), model_config.to_dict(), checkpoint)


def _check_kernels(model_config: DecoderConfig) -> None:
    """Raises ConfigError if the kernels cannot be used here; a forward pass on fake tensors shows it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        model, tokens_BT = DecoderLM(model_config), torch.zeros(1, 2, dtype=torch.long)
        try:
            model(tokens_BT)
        except ValueError as error:
            raise ConfigError(f"model.attention_impl={model_config.attention_impl}: {error}") from None
        except Exception:  # a kernel was chosen, and cannot run without data
            return
