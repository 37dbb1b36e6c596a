"""Language models: tokens of a corpus, cross entropy of the next token, bits per byte of text."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnzoo.checkpoint import find_checkpoint, save_model
from attnzoo.checkpoint.native import check_target
from attnzoo.files import user_path
from attnzoo.models import DecoderConfig, DecoderLM, Sampling, build_shapes, generate, materialise
from attnzoo.ops.common.masks import marked_starts
from attnzoo.planner.fits import Setup, training_memory
from attnzoo.report import format_table
from attnzoo.tokenizer import Tokenizer, load_tokenizer
from attnzoo.types import build_config
from train.config import Config
from train.data import IGNORED, Batch, DataConfig, TextData, prepare
from train.data.tokens import bits_per_byte
from train.lora import add_adapters, merge_adapters
from train.plot import plot_losses
from train.tasks.base import TASKS, Task, TaskOptions
from train.tasks.initial import adopted_model, init_from
from train.tasks.language_checks import (
    check_adapters,
    check_data,
    check_init,
    check_length,
    check_model,
    check_model_section,
)
from train.tokenizer import TokenizerConfig, ensure_tokenizer

MIB = 2**20


@TASKS.register("language")
class LanguageTask(Task):
    """A `DecoderLM` on packed blocks of tokens. Batches are (tokens_BT, targets_BT), int64; a target of -100 does not
    count.

    document_start: the token id that begins a document, if attention must not cross documents in a row; else None.
    """

    ROW, UNIT = "sequence", "token"
    METRICS = ("loss", "bits_per_byte")
    NEXT = "; attnzoo serve --checkpoint {run} serves it"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._adopts = config.checkpoint.adopt_model and config.checkpoint.init_from is not None
        self._data_config = build_config(DataConfig, {"seed": config.seed, **config.data}, "data")
        self._tokenizer_config = build_config(TokenizerConfig, config.tokenizer, "tokenizer")
        self.units_per_row = self._data_config.sequence_length
        self.preparing = f"the tokenizer and the tokens of data.source={self._data_config.source!r}"
        self.data: TextData | None = None
        self.tokenizer: Tokenizer | None = None
        self.document_start: int | None = None

    @classmethod
    def sections(cls, config: Config) -> Mapping[str, Callable[[], object]]:
        """The classes that define the sections' keys."""
        return {
            "task": lambda: build_config(TaskOptions, config.task, "task"),
            "model": lambda: check_model_section(config),
            "data": lambda: build_config(DataConfig, config.data, "data"),
            "tokenizer": lambda: build_config(TokenizerConfig, config.tokenizer, "tokenizer"),
            "lora": lambda: check_adapters(config),
        }

    # --- before anything is prepared ----------------------------------------------------------------------------

    def check(self) -> None:
        """As `train.tasks.language_checks` says."""
        planned = self._model_config()
        check_length(self.config, planned)
        check_data(self._data_config)
        if self._tokenizer_config.path is not None and not self._adopts:
            self._given_tokenizer()
        check_model(self.config, planned)
        check_init(self.config, planned)

    def shapes(self) -> DecoderLM:
        """The model without storage."""
        return build_shapes(self._model_config())

    def plan(self, model: nn.Module, world: int) -> tuple[str, str]:
        """Weights with and without embeddings; a table of memory with a row for each ZeRO stage."""
        lm = cast(DecoderLM, model)
        sizes = f"{lm.num_parameters():,} in all, {lm.num_parameters(embeddings=False):,} without embeddings"
        rows = format_table([_memory(self.config, lm, stage, world) for stage in range(4)])
        lora = " all weights trained, with lora.rank it is less" if self.config.lora.rank is not None else ""
        return sizes, f"MiB a rank, by a model (chosen: zero.stage={self.config.zero.stage}):{lora}\n{rows}"

    # --- data ---------------------------------------------------------------------------------------------------

    def prepare(self, is_main: bool) -> None:
        """Trains the tokenizer and writes the tokens to the cache, if they are not there."""
        tokenizer_config, cache = self._tokenizer_config, self.config.cache_path
        if self._adopts:
            tokenizer_config = replace(tokenizer_config, path=str(find_checkpoint(self._init_from)))
        path = ensure_tokenizer(tokenizer_config, self._data_config, cache)
        self.data = prepare(self._data_config, path, cache, is_main=is_main, progress=is_main)
        self.train = self.data.train
        self.tokenizer = load_tokenizer(path)
        self.document_start = self.tokenizer.bos_id if self._data_config.isolate_documents else None

    def content(self) -> dict[str, Any]:
        """The model's options, the section `data`, and digests of tokenizer and tokens."""
        data, tokenizer = self._prepared()
        return {
            **{f"model.{key}": value for key, value in self._model_config().to_dict().items()},
            **{f"data.{key}": value for key, value in self.config.data.items()},
            "tokenizer (content)": tokenizer.fingerprint(),
            "data (content)": data.digest,
        }

    def validation(self, most: int | None = None) -> Batch:
        """(tokens_NT, targets_NT), spread evenly over the text."""
        return self._prepared()[0].validation_blocks(most)

    def _prepared(self) -> tuple[TextData, Tokenizer]:
        assert self.data is not None
        assert self.tokenizer is not None
        return self.data, self.tokenizer

    # --- model and loss -----------------------------------------------------------------------------------------

    def model(self) -> DecoderLM:
        """A new model, or the weights of checkpoint.init_from."""
        model_config = self._model_config()
        check_length(self.config, model_config)
        model = DecoderLM(model_config)
        model.activation_checkpointing = self.config.train.activation_checkpointing
        if self.config.checkpoint.init_from is not None:
            init_from(model, self._init_from, self._prepared()[1])
        return model

    def flops(self, model: nn.Module) -> int:
        """Three times those of the forward pass: the backward pass takes twice as many."""
        length = self.config.sequence_length
        return int(3 * cast(DecoderLM, model).cost(self.config.train.batch_size, length, length).flops)

    def rebuilt(self, model: nn.Module, state: dict[str, Tensor]) -> DecoderLM:
        """Built without storage first, and with adapters merged."""
        made, lora = build_shapes(cast(DecoderLM, model).config), self.config.lora
        if lora.rank is not None:
            add_adapters(made, lora)
        materialise(made, state, "cpu", torch.float32)
        return merge_adapters(made).eval() if lora.rank is not None else made.eval()

    def count(self, batch: Batch) -> int:
        """Targets that are not -100."""
        return int((batch[1] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch, count: Tensor | None) -> Tensor:
        """Cross entropy in nats. count None: the mean over the batch's own targets."""
        tokens_BT, targets_BT = batch
        starts_BT = None if self.document_start is None else marked_starts(tokens_BT, self.document_start)
        return cast(DecoderLM, model).loss(tokens_BT, targets_BT, starts_BT, count)

    # --- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """[1]: the sum of the targets' losses in nats."""
        return self.loss(model, batch, torch.ones((), device=batch[0].device))[None]

    def metrics(self, batch: Batch, measured: Tensor) -> dict[str, float]:
        """loss: mean over targets in nats; bits_per_byte: the same in bits per byte of the targets' text."""
        assert self.data is not None
        loss = float(measured.double().sum()) / self.count(batch)
        return {"loss": loss, "bits_per_byte": bits_per_byte(loss, self.data.bytes_per_token(batch[1]))}

    def samples(self, model: nn.Module, seed: int) -> list[str]:
        """Each prompt of `sample.prompts` with a generated continuation."""
        tokenizer, config = self.tokenizer, self.config.sample
        assert tokenizer is not None
        prompts = [tokenizer.encode(prompt, bos=True) for prompt in config.prompts]
        outputs = generate(
            cast(DecoderLM, model),
            prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
            seed=seed,
            stop_token=tokenizer.eos_id,
        )
        return [tokenizer.decode(p + out) for p, out in zip(prompts, outputs, strict=True)]

    # --- results ------------------------------------------------------------------------------------------------

    def check_target(self, directory: Path) -> None:
        """Only an earlier model of the project's format is replaced."""
        check_target(directory)

    def save(self, directory: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """Weights, config.json and the tokenizer, as `attnzoo.load` reads them."""
        save_model(directory, cast(DecoderLM, model), tokenizer=self.tokenizer, metadata=metadata)

    def summary(self) -> dict[str, Any]:
        """Bytes of text for each training token; the counts of files and documents."""
        return {"train_bytes_per_token": self._train_bytes_per_token(), "data": self._prepared()[0].account}

    def figure(self) -> Path:
        """Bits per byte over steps."""
        return plot_losses(self.config.run_path, self._train_bytes_per_token(), self.config.name)

    def _train_bytes_per_token(self) -> float:
        data, _ = self._prepared()
        return data.num_train_bytes / data.num_train_tokens

    # --- configuration ------------------------------------------------------------------------------------------

    @property
    def _init_from(self) -> str:
        assert self.config.checkpoint.init_from is not None
        return self.config.checkpoint.init_from

    def _model_config(self) -> DecoderConfig:
        """Of the model that will be trained. Before `prepare` it reads the size of the vocabulary from the options, or
        from the tokenizer that they name."""
        if self._adopts:
            return adopted_model(self._init_from, self.config.model.get("attention_impl", "auto"))
        if self.tokenizer is not None:
            return self.config.model_config(self.tokenizer.vocab_size)
        if self._tokenizer_config.path is None:
            return self.config.model_config(self._tokenizer_config.vocab_size)
        return self.config.model_config(self._given_tokenizer().vocab_size)

    def _given_tokenizer(self) -> Tokenizer:
        return load_tokenizer(user_path(str(self._tokenizer_config.path), "tokenizer.path"))


def _memory(config: Config, model: DecoderLM, stage: int, world: int) -> dict[str, int | float]:
    """Memory of a rank by part, in MiB."""
    setup = Setup(
        stage=stage,
        ranks=world,
        micro_batch=config.train.micro_batch_size,
        tokens=config.sequence_length,
        # Under autocast, weights, gradients and most activations are float32.
        precision="bf16" if config.precision == "bf16" else "fp32",
        optimizer="muon" if config.optim.name == "muon" else "adamw",
        checkpointing=config.train.activation_checkpointing,
        accumulate=config.train.batch_size > config.train.micro_batch_size * world,
        gpu=torch.cuda.is_available(),
    )
    memory = training_memory(model, setup)
    parts = {name: round(size / MIB, 1) for name, size in vars(memory).items()}
    return {"stage": stage, **parts, "sum": round(memory.total / MIB, 1)}
