"""Checks that `--dry-run` and a run make before anything is prepared, so that errors come at once."""

import importlib.util

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attnzoo.checkpoint import find_checkpoint, open_checkpoint
from attnzoo.checkpoint.native import check_saveable
from attnzoo.files import user_path
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.tokenizer import load_tokenizer
from attnzoo.types import build_config
from train.checkpoint import check_resume
from train.config import Config
from train.config_layers import ConfigError
from train.data import DataConfig, TrainingData
from train.data.corpora import fingerprint
from train.data.retrieval import SOURCE, check_tasks
from train.export import check_export, check_same_model
from train.lora import add_adapters
from train.metrics import read_metrics
from train.run_directory import check_directories
from train.tokenizer import TokenizerConfig


def check_run(config: Config, model_config: DecoderConfig) -> None:
    """Raises ValueError if the run could not be carried out. model_config: of the model that will be built."""
    check_length(config, model_config)
    _check_places(config)
    _check_data(config)
    _check_model(config, model_config)
    checkpoint = config.checkpoint.init_from
    if checkpoint is not None:
        theirs = open_checkpoint(find_checkpoint(checkpoint)).config
        if not config.checkpoint.adopt_model:
            check_same_model(theirs.to_dict(), model_config.to_dict(), checkpoint)


def check_length(config: Config, model_config: DecoderConfig) -> None:
    """Raises ConfigError if sequences are longer than the model's context."""
    if config.sequence_length > model_config.max_positions:
        raise ConfigError(
            f"data.sequence_length={config.sequence_length} is longer than model.max_positions="
            f"{model_config.max_positions}; raise the latter"
        )


def check_batches(config: Config, data: TrainingData) -> None:
    """Raises ValueError if the corpus is smaller than one global batch."""
    start = data.train.state()
    data.train.next(config.train.batch_size, 0, 1)
    data.train.load(start)


def _check_places(config: Config) -> None:
    """Raises ValueError for the run directory's content, and if the run may not write there."""
    check_directories(config)
    check_export(config.run_path / "export")
    check_resume(config.run_path / "checkpoints", config.checkpoint)
    read_metrics(config.run_path / "metrics.jsonl")


def _check_data(config: Config) -> None:
    data = build_config(DataConfig, {"seed": config.seed, **config.data}, "data")
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
    tokenizer = build_config(TokenizerConfig, config.tokenizer, "tokenizer")
    if tokenizer.path is not None and not config.checkpoint.adopt_model:
        load_tokenizer(user_path(tokenizer.path, "tokenizer.path"))


def _check_model(config: Config, model_config: DecoderConfig) -> None:
    shapes = build_shapes(model_config)
    try:
        check_saveable(shapes)  # now, not when the trained model is exported
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
