"""A trained model of pictures on disk: pictures.json and pictures.safetensors, written atomically.

A language model that was trained with them stands in the same directory, as `attnzoo.load` reads it. A frozen one is
only named, with a digest of its weights; with other weights it is refused. Loading cannot run code.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnzoo.attention.edits import EditRun, Edits, TokenLayout
from attnzoo.checkpoint import model_files
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.checkpoint.native import CONFIG, TOKENIZER, WEIGHTS, save_model
from attnzoo.checkpoint.target import check_native_target
from attnzoo.files import real_path, replace_directory, temporary_directory
from attnzoo.models import Embedded, EmbeddedPrompt, MultimodalLM, PictureConfig, PictureEncoder, generate
from attnzoo.types import build_config
from attnzoo.vision.turns import TurnFormat, Turns, padded

FORMAT = "attnzoo-pictures-1"
PICTURES, PICTURE_WEIGHTS = "pictures.json", "pictures.safetensors"
KEYS = ("format", "pictures", "language_model", "image_token", "turns", "data", "metadata")
"""Keys of pictures.json."""


@dataclass(frozen=True)
class TrainedPictures:
    """A tower and projector with the language model that reads through them. own: whether it was trained with them.
    data: the options of the scenes."""

    pictures: PictureEncoder
    language_model: FrozenLM
    own: bool
    turns: TurnFormat
    data: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> MultimodalLM:
        """Both as one model, in evaluation mode."""
        return MultimodalLM(self.pictures, self.language_model.model).eval()

    @cached_property
    def reader(self) -> Turns:
        """Makes tokens of questions."""
        return Turns(
            self.language_model.tokenizer,
            self.turns,
            image_token=self.model.image_token,
            places=self.pictures.config.tokens,
            longest=self.language_model.model.config.max_positions,
        )

    @torch.no_grad()
    def prompt(self, image: np.ndarray | Tensor, question: str) -> EmbeddedPrompt:
        """A prompt for whatever continues sequences of the language model: the 8-bit picture [height, width, channels],
        whose vectors are named "image", and a question."""
        (vectors_MD,) = self.pictures(_pixels(np.asarray(image)[None]))
        ids, begin = self.reader.prompt(question), len(self.reader.begin)
        return EmbeddedPrompt([ids[: begin - len(vectors_MD)], Embedded(vectors_MD, name="image"), ids[begin:]])

    def answers(
        self,
        images: np.ndarray | Tensor,
        question: str | Sequence[str],
        max_new_tokens: int = 8,
        edits: Edits | None = None,
    ) -> list[str]:
        """The likeliest text after a question about each picture, up to the text that ends an answer. question: one for
        all pictures, or one for each. edits: of the language model's attention, where "image" names the picture."""
        pictures = np.asarray(images)
        questions = [question] * len(pictures) if isinstance(question, str) else list(question)
        if len(questions) != len(pictures):
            raise ValueError(f"question has {len(questions)} texts for {len(pictures)} pictures; give one for each")
        prompts = [self.prompt(image, text) for image, text in zip(pictures, questions, strict=True)]
        model, tokenizer = self.language_model.model, self.language_model.tokenizer
        before, end = self.turns.lead, self.turns.end
        runs = None if edits is None else [self.plan(prompt, edits, max_new_tokens) for prompt in prompts]
        stop = next(iter(tokenizer.encode(end)), None)
        found = generate(model, prompts, max_new_tokens=max_new_tokens, stop_token=stop, edits=runs)
        return [tokenizer.decode(tokens).removeprefix(before) for tokens in found]

    def plan(self, prompt: EmbeddedPrompt, edits: Edits, max_new_tokens: int) -> EditRun:
        """A run of edits for one prompt and its continuation. Raises ValueError for edits that do not fit them."""
        layout = TokenLayout(len(prompt), prompt.spans)
        return EditRun(self.language_model.model.plan_edits(edits, layout, max_new_tokens))

    @torch.no_grad()
    def log_likelihoods(self, images: np.ndarray | Tensor, question: str, answers: Sequence[str]) -> np.ndarray:
        """float64 [I, A]: the log probability of each answer to one question about each of the 8-bit pictures
        [I, height, width, channels]."""
        pixels = _pixels(images)
        prompt, found = self.reader.prompt(question), []
        vectors_IMD = self.pictures(pixels)
        for answer in answers:
            reply = self.reader.reply(answer)
            targets = [-100] * (len(prompt) - 1) + reply
            tokens_BT, targets_BT = padded([([*prompt, *reply[:-1]], targets)] * len(pixels))
            log_probs = self.model.target_logits(tokens_BT, targets_BT, vectors_IMD)[0].double().log_softmax(-1)
            picked = log_probs.gather(1, torch.tensor(reply * len(pixels))[:, None])
            found.append(picked.view(len(pixels), -1).sum(1).numpy())
        return np.stack(found, axis=1)


def _pixels(images_IHWC: np.ndarray | Tensor) -> Tensor:
    """[I, channels, height, width]."""
    return torch.as_tensor(np.array(images_IHWC)).permute(0, 3, 1, 2)


def check_target(directory: Path) -> None:
    """Raises ValueError, naming what would be lost, unless `save_pictures` may write to `directory`."""
    names = (PICTURES, PICTURE_WEIGHTS, CONFIG, WEIGHTS, *TOKENIZER)
    check_native_target(directory, config=PICTURES, format=FORMAT, names=names)


def save_pictures(directory: Path, trained: TrainedPictures) -> Path:
    """Writes the model, replacing an earlier one; returns the directory. Raises ValueError as `check_target`."""
    directory = real_path(directory)
    check_target(directory)
    frozen, temporary = trained.language_model, temporary_directory(directory)
    try:
        if trained.own:
            save_model(temporary, frozen.model, tokenizer=frozen.tokenizer, metadata=trained.metadata)
        content = {
            "format": FORMAT,
            "pictures": trained.pictures.config.to_dict(),
            "language_model": None if trained.own else frozen.to_dict(),
            "image_token": trained.model.image_token,
            "turns": asdict(trained.turns),
            "data": trained.data,
            "metadata": trained.metadata,
        }
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in trained.pictures.state_dict().items()}
        save_file(tensors, str(temporary / PICTURE_WEIGHTS))
        (temporary / PICTURES).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        replace_directory(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _find(directory: Path | str) -> Path:
    """The directory of the export: this one, or `export` in a run directory."""
    path = Path(directory)
    return path / "export" if os.path.isfile(path / "export" / PICTURES) else path


def holds_pictures(directory: Path | str) -> Path | None:
    """The directory itself, or a run's export, if it holds what `save_pictures` wrote, damaged or not."""
    path = _find(directory)
    return path if os.path.isfile(path / PICTURES) else None  # unlike Path.is_file, whatever the name


def named_language_model(directory: Path | str) -> tuple[str, str] | None:
    """(checkpoint, dtype) of the frozen language model that a model of pictures names; None: it has its own. Raises
    ValueError as `load_pictures`, without reading any weights."""
    path = _find(directory)
    (content,) = model_files.read(path, FORMAT, KEYS, (), config=PICTURES)
    with model_files.damage(path):
        named = content["language_model"]
        return None if named is None else (str(named["checkpoint"]), str(named["dtype"]))


def load_pictures(directory: Path | str, language_model: FrozenLM | None = None) -> TrainedPictures:
    """The model in a directory that `save_pictures` wrote, or in a run directory with such an export.

    language_model: in place of loading the one that the export has or names. Raises ValueError that names the file if
    one is missing, damaged or of another format, and for a frozen language model with other weights than in training.
    """
    path = _find(directory)
    (content,) = model_files.read(path, FORMAT, KEYS, (), config=PICTURES)
    with model_files.damage(path):
        pictures = PictureEncoder(PictureConfig.from_dict(content["pictures"]))
        pictures.load_state_dict(load_file(path / PICTURE_WEIGHTS))
        pictures.eval()
        turns = build_config(TurnFormat, content["turns"], "turns")
        named = content["language_model"]
    own = named is None
    frozen = language_model or (FrozenLM.load(str(path)) if own else FrozenLM.load(named["checkpoint"], named["dtype"]))
    if not own and frozen.digest != named["digest"]:
        raise ValueError(
            f"{path} was trained with another language model than {frozen.checkpoint} in {frozen.dtype} (their digests "
            f"differ); give the weights of {named['checkpoint']} in {named['dtype']} that it was trained with"
        )
    parts = {name: dict(content.get(name, {})) for name in ("data", "metadata")}
    return TrainedPictures(pictures, frozen, own, turns, **parts)
