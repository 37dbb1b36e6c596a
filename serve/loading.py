"""Loads what the engine runs: the model, its tokenizer, and what reads parts of messages that are no text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from attnzoo.checkpoint import find_checkpoint, load_tokenizer
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.checkpoint.load import check_fit
from attnzoo.clinical.trained_sensors import holds_sensors, load_sensors
from attnzoo.clinical.trained_sensors import named_language_model as of_sensors
from attnzoo.files import user_path
from attnzoo.loading import load_for_inference, pack_for_inference
from attnzoo.models import DecoderLM
from attnzoo.tokenizer.chat_tokens import ChatEncoder, new_mark
from attnzoo.types import parse_dtype
from attnzoo.vision.trained_pictures import TrainedPictures, holds_pictures, load_pictures
from attnzoo.vision.trained_pictures import named_language_model as of_pictures
from attnzoo.vision.turns import chat_tokenizer
from serve.config import ADAPTERS, EngineConfig, without_adapter
from serve.modalities.base import Modality
from serve.modalities.images import ImageModality
from serve.modalities.sensors import SensorModality
from serve.prompt_dtype import apply_prompt_dtype

if TYPE_CHECKING:
    from attnzoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedParts:
    """What an engine runs. modalities: by the kind of part that they read. pictures: the model of pictures, whose turns
    conversations have; None for others."""

    model: DecoderLM
    tokenizer: "Tokenizer"
    modalities: Mapping[str, Modality] = field(default_factory=dict)
    pictures: TrainedPictures | None = None


@dataclass(frozen=True)
class Sources:
    """Where things are: the language model, and the adapter's directory in front of it by the setting that names it.
    own: the directory of a model of pictures that has its own language model."""

    checkpoint: str
    sensors: str | None = None
    pictures: str | None = None
    own: bool = False


def load_parts(config: EngineConfig, model: DecoderLM | None, tokenizer: "Tokenizer | None") -> LoadedParts:
    """Model and tokenizer that are None are read from the checkpoint. Raises ValueError if a file is damaged, the
    tokenizer has more tokens than the model, an adapter does not belong to the model, or `prompt_dtype` is not
    possible. A given model is neither packed nor measured."""
    found = sources(config)
    directory, given = find_checkpoint(found.checkpoint), model
    dtype = check_adapter(config, found)
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
    # Adapters compare weights, so before they are packed.
    frozen = FrozenLM(model, tokenizer, found.checkpoint, dtype or "float32")
    if found.sensors is not None:
        _check_chat(tokenizer, found.checkpoint)
        modalities.append(SensorModality(load_sensors(found.sensors, frozen)))
    pictures = None
    if found.pictures is not None:
        pictures = load_pictures(found.pictures, frozen)
        tokenizer = _chat_of(pictures)
        modalities.append(ImageModality(pictures, config))
    if given is None:
        pack_for_inference(model, config.pack_weights)
    if given is None or config.prompt_dtype != "auto":
        apply_prompt_dtype(model, config.prompt_dtype)
    return LoadedParts(model, tokenizer, {modality.kind: modality for modality in modalities}, pictures)


def _chat_of(pictures: TrainedPictures) -> "Tokenizer":
    """The tokenizer with a chat template of the turns that the model has learned. Raises ValueError for turns that a
    chat template writes otherwise."""
    tokenizer = chat_tokenizer(pictures.language_model.tokenizer, pictures.turns)
    chat = ChatEncoder.of(tokenizer)
    assert chat is not None
    mark, asked = new_mark(), "how many?"
    before, after = chat.encode_around(chat.template.render([{"role": "user", "content": mark + asked}]), [mark])
    token = pictures.model.image_token
    if [*before, *[token] * pictures.pictures.config.tokens, *after] != pictures.reader.prompt(asked):
        raise ValueError(
            "task.texts: a tokenizer of this kind writes the turns of this model otherwise after a picture; ask it by "
            "attnzoo.vision.trained_pictures"
        )
    return tokenizer


def sources(config: EngineConfig) -> Sources:
    """What is served. Raises ValueError for two adapters, for `sensors` and `pictures` that are none, and as
    `without_adapter`."""
    checkpoint, adapter = without_adapter(config.checkpoint)
    own = holds_pictures(user_path(checkpoint, "checkpoint")) if adapter is None and checkpoint else None
    given = {name: value for name in ADAPTERS if (value := getattr(config, name)) is not None}
    found = dict([adapter]) if adapter else {} if own is None else {"pictures": str(own)}
    for name, value in given.items():
        if found:
            first = next(iter(found))
            raise ValueError(
                f"checkpoint={config.checkpoint!r} is {ADAPTERS[first]}, and so is {name}={value!r}; give its language "
                f"model as checkpoint, or leave {name} out"
            )
    if len(given) > 1:
        raise ValueError("sensors and pictures are both given; one server has one of them")
    if "sensors" in given and not holds_sensors(user_path(given["sensors"], "sensors")):
        raise ValueError(
            f"sensors={config.sensors!r} holds no sensor adapter; give the run or export directory of a training run "
            "with task.kind=sensor-lm"
        )
    if "pictures" in given and not holds_pictures(user_path(given["pictures"], "pictures")):
        raise ValueError(
            f"pictures={config.pictures!r} holds no model of pictures; give the run or export directory of a training "
            "run with task.kind=pictures"
        )
    return Sources(checkpoint, **{**found, **given}, own=own is not None)


def check_adapter(config: EngineConfig, found: Sources) -> str | None:
    """The dtype of the weights: that of the frozen language model that the server's adapter was trained with, or
    `config.dtype` without one. Raises ValueError for an adapter that is damaged or needs another dtype than `config`
    asks for."""
    named = None
    if found.sensors is not None:
        named = of_sensors(found.sensors)
    elif found.pictures is not None and not found.own:
        named = of_pictures(found.pictures)
        if named is None:
            raise ValueError(
                f"pictures={found.pictures!r} has its own language model; give it as checkpoint, and leave pictures out"
            )
    if named is None:
        return config.dtype
    dtype = named[1]
    if config.dtype is not None and parse_dtype(config.dtype) != parse_dtype(dtype):
        raise ValueError(
            f"dtype={config.dtype!r}: the adapter in {found.sensors or found.pictures!r} was trained with a language "
            f"model in {dtype}; leave dtype out"
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
    found = sources(config)
    check_adapter(config, found)
    if found.sensors is not None:
        _check_chat(load_tokenizer(find_checkpoint(found.checkpoint)), found.checkpoint)


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


def in_effect(model: DecoderLM, config: EngineConfig) -> dict[str, Any]:
    """What the model computes with, as `/v1/models` tells it."""
    weights = str(model.embedding.weight.dtype).removeprefix("torch.")
    wide = model.many_rows is not None
    return {
        "dtype": weights,
        "prompt_dtype": "float32" if wide else weights,
        "threads": config.threads or torch.get_num_threads(),
        "compile_decode": config.compile_decode,
        "prompt_lookup": config.prompt_lookup,
    }
