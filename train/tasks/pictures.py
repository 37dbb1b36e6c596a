"""Language models that look at pictures: questions about scenes of emoji, answered by one or a few tokens.

The language model is trained from the beginning with the pictures' tower (`model.decoder`), or it is a frozen one
(`model.language_model`): that one is neither in checkpoints nor in the export, which name it. With adapters (`lora`) it
is in both, in the export with the adapters merged.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.checkpoint import existing_checkpoint, load_tokenizer, open_checkpoint
from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.files import user_path
from attnzoo.models import DecoderConfig, DecoderLM, MultimodalLM, PictureEncoder
from attnzoo.models.sensor_lm import embedding_unit
from attnzoo.tokenizer import Tokenizer
from attnzoo.types import build_config
from attnzoo.vision import Baselines, Scene, SceneQuestion, SceneWorld, evaluation_questions
from attnzoo.vision.questions import KINDS
from attnzoo.vision.trained_pictures import TrainedPictures, check_target, load_pictures, save_pictures
from attnzoo.vision.turns import Turns, padded
from train.config import Config
from train.data.base import IGNORED, Batch
from train.data.scenes import SceneStream, asked_about, pictures
from train.lora import add_adapters, merge_adapters
from train.tasks.base import TASKS, Task
from train.tasks.picture_options import (
    LOSSES,
    PictureModel,
    QuestionOptions,
    check_adapters,
    check_data,
    check_questions,
    check_tokenizer,
    scene_options,
)
from train.tasks.scene_heads import WithSceneHeads
from train.tokenizer import TokenizerConfig, train_tokenizer

LEARNED_FROM = 1500
"""Training scenes whose questions train the tokenizer and are what baselines know."""
EVALUATED = tuple(KINDS)


@TASKS.register("pictures")
class PictureTask(Task):
    """Batches are (images_BCHW uint8, tokens_BT, targets_BT, groups_B), in training with kinds_BP and named_BT (as
    `SceneStream` says). A target of -100 does not count; a group is the number of a split and kind of question in
    `groups`, -1 in training.
    """

    ROW = UNIT = "image"
    METRICS = ("loss", "accuracy", *EVALUATED, "majority", "blind")
    UNUSED: ClassVar[tuple[str, ...]] = (
        "sample",
        "checkpoint.adopt_model",
        "train.activation_checkpointing",
        "eval.below_ngrams",
    )
    NEXT = "; attnzoo.vision.trained_pictures.load_pictures('{run}') answers"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.options = build_config(QuestionOptions, config.task, "task")
        self.parts = build_config(PictureModel, config.model, "model")
        self.scenes = scene_options(config.data)
        self._tokenizer_config = build_config(TokenizerConfig, config.tokenizer, "tokenizer")
        self.preparing = "the tokenizer and the scenes"
        self.tokenizer: Tokenizer | None = None
        self.evaluated: list[tuple[Scene, SceneQuestion]] = []

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: check_questions(config),
            "model": lambda: build_config(PictureModel, config.model, "model"),
            "data": lambda: check_data(config),
            "tokenizer": lambda: check_tokenizer(config),
            "lora": lambda: check_adapters(config),
        }

    # --- before anything is prepared ----------------------------------------------------------------------------

    def check(self) -> None:
        """Looks for the fonts and the language model, and whether a question fits."""
        try:
            _ = self.world
        except ValueError as error:
            raise ValueError(f"data.{error}") from None
        if self.parts.language_model is not None:
            self._turns(load_tokenizer(existing_checkpoint(self.parts.language_model)))
        elif self._tokenizer_config.path is not None:
            self._turns(load_tokenizer(user_path(self._tokenizer_config.path, "tokenizer.path")))
        if self.config.checkpoint.init_from is not None:
            self._initial()

    @cached_property
    def world(self) -> SceneWorld:
        """What is in scenes."""
        return SceneWorld(self.scenes)

    def _turns(self, tokenizer: Tokenizer) -> Turns:
        decoder, places = self._decoder_config(tokenizer.vocab_size), self.parts.pictures(1, 1.0).tokens
        try:
            return Turns(
                tokenizer,
                self.options.format(),
                image_token=decoder.vocab_size,
                places=places,
                longest=decoder.max_positions,
            )
        except ValueError as error:
            raise ValueError(f"model, task.texts: {error}") from None

    def _decoder_config(self, vocab_size: int) -> DecoderConfig:
        if self.parts.language_model is not None:
            return open_checkpoint(existing_checkpoint(self.parts.language_model)).config
        return build_config(DecoderConfig, {**(self.parts.decoder or {}), "vocab_size": vocab_size}, "model.decoder")

    # --- data ---------------------------------------------------------------------------------------------------

    def prepare(self, is_main: bool) -> None:
        """Trains the tokenizer, if it is not in the cache, and asks the validation questions."""
        if self.parts.language_model is not None:
            self.tokenizer = self.language_model.tokenizer
        else:
            self.tokenizer = load_tokenizer(self._tokenizer_path())
        options = self.options
        self.train = SceneStream(
            self.world,
            self.reader,
            self.config.seed,
            turns=options.turns,
            text_share=options.text_share,
            side=self.parts.pictures(1, 1.0).vision.side,
        )
        each = [evaluation_questions(self.world, split, kind, options.questions) for split, kind in self.groups]
        # One after another through all groups, so that the first ones are of all.
        self.evaluated = [group[i] for i in range(options.questions) for group in each]

    def _tokenizer_path(self) -> Path:
        config = self._tokenizer_config
        if config.path is not None:
            return user_path(config.path, "tokenizer.path")
        key = hashlib.sha256(f"{self.world.digest} {asdict(config)} {self.options.format()}".encode()).hexdigest()[:16]
        path = self.config.cache_path / "tokenizers" / f"{key}.model"
        if not path.is_file():
            texts = self.options.format()
            lines = [
                texts.ask.replace("{question}", q.text) + texts.reply.replace("{answer}", q.answer)
                for q in self.learned
            ]
            train_tokenizer([texts.before, texts.between, *lines], config.vocab_size, path)
        return path

    @cached_property
    def learned(self) -> list[SceneQuestion]:
        """Questions about training scenes that no run trains on."""
        scenes = (self.world.scene("train", 1 << 40, index) for index in range(LEARNED_FROM))
        return [q for scene in scenes for q in asked_about(self.world, scene, self.options.turns, 0.35)]

    @cached_property
    def groups(self) -> list[tuple[Any, str]]:
        """(split, kind) of the validation questions; words alone are the same in every split."""
        kinds = [kind for kind in EVALUATED if kind != "text"]
        return [(split, kind) for split in self.scenes.splits for kind in kinds] + [("standard", "text")]

    @cached_property
    def reader(self) -> Turns:
        """Makes tokens of questions."""
        assert self.tokenizer is not None
        return self._turns(self.tokenizer)

    @cached_property
    def language_model(self) -> FrozenLM:
        """The frozen one, read once on every rank."""
        assert self.parts.language_model is not None
        frozen = FrozenLM.load(self.parts.language_model, self.parts.dtype)
        frozen.model.eval().requires_grad_(False)
        return frozen

    @cached_property
    def _validation(self) -> Batch:
        scenes, questions = zip(*self.evaluated, strict=True)
        tokens_BT, targets_BT = padded([self.reader.sequence([question]) for question in questions])
        groups_B = torch.arange(len(self.groups)).repeat(self.options.questions)
        return pictures(self.world, scenes), tokens_BT, targets_BT, groups_B

    def validation(self, most: int | None = None) -> Batch:
        """All questions, or the first `most` of them, which are of all groups."""
        return tuple(tensor[:most] for tensor in self._validation)

    def content(self) -> dict[str, Any]:
        """All options, and digests of the emoji, the tokenizer and the language model."""
        assert self.tokenizer is not None
        options = {**asdict(self.options), "texts": asdict(self.options.format())}
        frozen = {} if self.parts.language_model is None else {"language model (content)": self.language_model.digest}
        return {
            **{f"task.{key}": value for key, value in options.items()},
            **{f"model.{key}": value for key, value in asdict(self.parts).items()},
            **{f"data.{key}": value for key, value in asdict(self.scenes).items()},
            "data (content)": self.world.digest,
            "tokenizer (content)": self.tokenizer.fingerprint(),
            **frozen,
        }

    # --- model and loss -----------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """New weights, or those of checkpoint.init_from."""
        made = self._new()
        if self.config.checkpoint.init_from is not None:
            initial = self._initial()
            if self.parts.language_model is None:
                made.load_state_dict(initial.model.state_dict())
            else:
                encoder = made.pictures if isinstance(made, MultimodalLM) else made
                encoder.vision.load_state_dict(initial.pictures.vision.state_dict())
        return self._with_heads(made)

    def _with_heads(self, made: MultimodalLM | PictureEncoder) -> nn.Module:
        losses = {name: getattr(self.options, name) for name in LOSSES}
        if not any(losses.values()):
            return made
        return WithSceneHeads(made, names=[self._word(name) for name in self.world.names], **losses)

    def _word(self, name: str) -> list[int]:
        """Tokens of a word inside a sentence; none before there is a tokenizer, when nothing is trained."""
        if self.tokenizer is None:
            return []
        return self.tokenizer.encode(f"a {name}")[len(self.tokenizer.encode("a")) :]

    def add_adapters(self, model: nn.Module) -> None:
        """In the language model alone."""
        add_adapters(self.whole(model).decoder, self.config.lora)

    def rebuilt(self, model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        """Whether or not what the run began with is still there; adapters are merged."""
        with torch.random.fork_rng(devices=[]):
            made = self._with_heads(self._new())
            if self._adapted:
                self.add_adapters(made)
        made.load_state_dict(state)
        if self._adapted:
            merge_adapters(self.whole(made).decoder)
        return made.eval()

    @property
    def _adapted(self) -> bool:
        return self.config.lora.rank is not None

    def _new(self) -> MultimodalLM | PictureEncoder:
        """A `MultimodalLM`; in front of a frozen language model without adapters the `PictureEncoder` alone."""
        if self.parts.language_model is None:
            vocab_size = self.tokenizer.vocab_size if self.tokenizer is not None else self._tokenizer_config.vocab_size
            config = self._decoder_config(vocab_size)
            encoder = PictureEncoder(self.parts.pictures(config.model_dim, config.embedding_size))
            return MultimodalLM(encoder, DecoderLM(config))
        config = open_checkpoint(existing_checkpoint(self.parts.language_model)).config
        encoder = PictureEncoder(self.parts.pictures(config.model_dim, embedding_unit(self.language_model.model)))
        return MultimodalLM(encoder, copy.deepcopy(self.language_model.model)) if self._adapted else encoder

    def _initial(self) -> TrainedPictures:
        """The export to begin with. Raises ValueError where its tower, or what else is taken, is another one."""
        name = str(self.config.checkpoint.init_from)
        try:
            found = load_pictures(user_path(name, "checkpoint.init_from"))
        except ValueError as error:
            raise ValueError(f"checkpoint.init_from={name}: {error}") from None
        mine = self.parts.pictures(1, 1.0)
        if found.pictures.config.vision != mine.vision:
            raise ValueError(f"checkpoint.init_from={name} has another tower: set model.vision to the export's")
        if self.parts.language_model is None:
            theirs = found.language_model.model.config
            same = found.pictures.config.projector == mine.projector and found.own
            if not same or theirs != self._decoder_config(theirs.vocab_size):
                raise ValueError(f"checkpoint.init_from={name} has another projector or decoder: set them to its own")
            mark = found.language_model.tokenizer.fingerprint()
            if self.tokenizer is not None and self.tokenizer.fingerprint() != mark:
                raise ValueError(f"checkpoint.init_from={name} has another tokenizer; set tokenizer.path={name}")
        return found

    def whole(self, model: nn.Module) -> MultimodalLM:
        """The model that answers: what is trained, with the frozen language model if there is one."""
        if isinstance(model, WithSceneHeads):
            model = model.trained
        if isinstance(model, MultimodalLM):
            return model
        encoder = cast(PictureEncoder, model)
        device = encoder.output.weight.device
        return MultimodalLM(encoder, self.language_model.model.to(device))

    def count(self, batch: Batch) -> int:
        """Targets that are not -100."""
        return int((batch[2] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch, count: Tensor) -> Tensor:
        """Cross entropy of the answers' tokens in nats, and what else is learned (`WithSceneHeads`)."""
        if not isinstance(model, WithSceneHeads):
            logits_AV, targets_A = self.whole(model).target_logits(batch[1], batch[2], batch[0])
            return F.cross_entropy(logits_AV.float(), targets_A, reduction="sum") / count
        logits_AV, targets_A, other = model.answered(self.whole(model), batch)
        answers = F.cross_entropy(logits_AV.float(), targets_A, reduction="sum") / count
        # `count` is of the whole batch; the rest is a mean over these pictures.
        return answers + other * (len(batch[0]) / self.config.train.batch_size)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, 2]: the sum of the losses of an answer's tokens, and whether each of them is the likeliest."""
        logits_AV, targets_A = self.whole(model).target_logits(batch[1], batch[2], batch[0])
        losses_A = F.cross_entropy(logits_AV.float(), targets_A, reduction="none")
        rows_A = torch.nonzero(batch[2] != IGNORED)[:, 0]
        sums_B = torch.zeros(len(batch[1]), device=losses_A.device).index_add(0, rows_A, losses_A)
        wrong_A = (logits_AV.argmax(-1) != targets_A).to(losses_A.dtype)
        wrong_B = torch.zeros_like(sums_B).index_add(0, rows_A, wrong_A)
        return torch.stack([sums_B, (wrong_B == 0).to(sums_B.dtype)], dim=1)

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: mean over tokens. The rest are shares of right answers: of each kind on pictures as in training, and
        their mean (accuracy); means of the other splits, by name; and what baselines have right (`baselines`)."""
        if not bool(torch.isfinite(measured).all()):
            return dict.fromkeys(self.METRICS, float("nan"))
        groups_B, right_B = batch[3], measured[:, 1].double()
        shares: dict[str, dict[str, float]] = {}
        for number, (split, kind) in enumerate(self.groups):
            if bool((groups_B == number).any()):
                shares.setdefault(split, {})[kind] = float(right_B[groups_B == number].mean())
        standard = shares.pop("standard", {})
        known = [values for kind, values in self.baselines.items() if kind != "text"]
        return {
            "loss": float(measured[:, 0].double().sum()) / self.count(batch),
            "accuracy": float(np.mean([share for kind, share in standard.items() if kind != "text"] or [0.0])),
            **standard,
            **{split: float(np.mean(list(kinds.values()))) for split, kinds in shares.items()},
            **{name: float(np.mean([values[name] for values in known])) for name in ("majority", "blind")},
        }

    @cached_property
    def baselines(self) -> dict[str, dict[str, float]]:
        """For each kind of question the shares that the most frequent answer, and the best answer to the text alone,
        have right, on pictures as in training."""
        baselines = Baselines(self.learned)
        found: dict[str, dict[str, float]] = {}
        for number, (split, kind) in enumerate(self.groups):
            if split == "standard":
                asked = [question for _, question in self.evaluated[number :: len(self.groups)]]
                found[kind] = {
                    "majority": float(np.mean([baselines.majority(q) == q.answer for q in asked])),
                    "blind": float(np.mean([baselines.blind(q) == q.answer for q in asked])),
                }
        return found

    def score(self, metrics: dict[str, float]) -> float:
        """The accuracy."""
        return metrics["accuracy"]

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of pictures is replaced."""
        check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """As `attnzoo.vision.trained_pictures.load_pictures` reads it."""
        whole, own = self.whole(model), self.parts.language_model is None or self._adapted
        assert self.tokenizer is not None
        frozen = FrozenLM(whole.decoder, self.tokenizer, "", "float32") if own else self.language_model
        made = TrainedPictures(whole.pictures, frozen, own, self.options.format(), asdict(self.scenes), metadata)
        save_pictures(directory, made)

    def summary(self) -> dict[str, Any]:
        """What is asked, and what can be answered without looking."""
        return {"validation_questions": len(self.evaluated), "data": {"baselines": self.baselines}}
