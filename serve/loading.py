"""Loads what the engine runs: the model, its tokenizer, and what reads parts of messages that are no text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnzoo.checkpoint import find_checkpoint, load_tokenizer
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.checkpoint.load import check_fit
from attnzoo.clinical.trained_sensors import holds_sensors, load_sensors, named_language_model
from attnzoo.files import user_path
from attnzoo.loading import load_for_inference, pack_for_inference
from attnzoo.models import DecoderLM
from attnzoo.types import parse_dtype
from serve.config import EngineConfig, without_adapter
from serve.modalities.base import Modality
from serve.modalities.sensors import SensorModality

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedParts:
    """What an engine runs. modalities: by the kind of part that they read."""

    model: DecoderLM
    tokenizer: "Tokenizer"
    modalities: Mapping[str, Modality] = field(default_factory=dict)


def load_parts(config: EngineConfig, model: DecoderLM | None, tokenizer: "Tokenizer | None") -> LoadedParts:
    """Model and tokenizer that are None are read from the checkpoint. Raises ValueError if a file is damaged, the
    tokenizer has more tokens than the model, or an adapter does not belong to the model."""
    checkpoint, sensors = sources(config)
    directory, given = find_checkpoint(checkpoint), model
    dtype = config.dtype if sensors is None else check_sensors(config)
    model = given or load_for_inference(
        directory,
        device=config.device,
        dtype=None if dtype is None else parse_dtype(dtype),
        check_finite=config.check_weights,
        pack=False,
    )
    tokenizer = tokenizer or load_tokenizer(directory)
    check_fit(model, tokenizer, str(directory))
    modalities: list[Modality] = []
    if sensors is not None:
        _check_chat(tokenizer, checkpoint)
        frozen = FrozenLM(model, tokenizer, checkpoint, dtype or "float32")
        modalities.append(SensorModality(load_sensors(sensors, frozen)))  # compares weights, so before they are packed
    if given is None:
        pack_for_inference(model, config.pack_weights)
    return LoadedParts(model, tokenizer, {modality.kind: modality for modality in modalities})


def sources(config: EngineConfig) -> tuple[str, str | None]:
    """(checkpoint of the language model, directory of the sensor adapter or None). Raises ValueError for two adapters,
    for `sensors` that is none, and as `without_adapter`."""
    checkpoint, sensors = without_adapter(config.checkpoint)
    if sensors is not None and config.sensors is not None:
        raise ValueError(
            f"checkpoint={config.checkpoint!r} is a sensor adapter, and so is sensors={config.sensors!r}; give its "
            "language model as checkpoint, or leave sensors out"
        )
    if config.sensors is not None and not holds_sensors(user_path(config.sensors, "sensors")):
        raise ValueError(
            f"sensors={config.sensors!r} holds no sensor adapter; give the run or export directory of a training run "
            "with task.kind=sensor-lm"
        )
    return checkpoint, sensors or config.sensors


def check_sensors(config: EngineConfig) -> str:
    """The dtype of the language model that the server's adapter was trained with. Raises ValueError for an adapter that
    is damaged or needs another dtype than `config` asks for."""
    _, sensors = sources(config)
    assert sensors is not None
    _, dtype = named_language_model(sensors)
    if config.dtype is not None and parse_dtype(config.dtype) != parse_dtype(dtype):
        raise ValueError(
            f"dtype={config.dtype!r}: the adapter in {sensors!r} was trained with a language model in {dtype}; leave "
            "dtype out"
        )
    return dtype


def _check_chat(tokenizer: "Tokenizer", checkpoint: str) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the language model {checkpoint!r} has no chat template, so no message could hold sensor data; take one "
            "that has, or leave sensors out"
        )


def check_served(config: EngineConfig) -> None:
    """Raises ValueError where the adapter of a configuration cannot be served; reads no weights."""
    checkpoint, sensors = sources(config)
    if sensors is not None:
        check_sensors(config)
        _check_chat(load_tokenizer(find_checkpoint(checkpoint)), checkpoint)


def max_model_len(config: EngineConfig, most: int) -> int:
    """The most tokens of a sequence. most: the model's max_positions. Raises ValueError if config.max_model_len exceeds
    it."""
    length = most if config.max_model_len is None else config.max_model_len
    if length > most:
        raise ValueError(
            f"max_model_len={length} is more than the model's max_positions={most}: it was made for positions below "
            f"that, and what it writes beyond them is noise; set max_model_len to {most} or less, or leave it out"
        )
    if length < 2:
        raise ValueError(f"max_model_len={length} leaves no room for a prompt and a token")
    return length
