"""The configuration of the model type "attnzoo"."""

from typing import Any

from transformers import PreTrainedConfig

from attnzoo.models import DecoderConfig

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tie_embeddings",
}
"""Attributes that transformers expects of every language model, and their fields in `decoder`."""


class AttnzooConfig(PreTrainedConfig):
    """`decoder`: fields of `DecoderConfig`, checked and completed. The sizes below repeat its values. `plugins`: the
    sources of plug-in variants, `attnzoo.checkpoint.sources.plugin_sources`.

    Raises ValueError for fields that `DecoderConfig` refuses and for a size that contradicts it.
    """

    model_type = "attnzoo"

    decoder: dict[str, Any] | None = None
    plugins: dict[str, Any] | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.decoder is None:  # transformers builds one without arguments, to compare with defaults
            return
        self.decoder = DecoderConfig.from_dict(self.decoder).to_dict()
        for name, field in SIZES.items():
            given, value = getattr(self, name), self.decoder[field]
            if given is not None and given != value:
                raise ValueError(f"{name}={given!r} contradicts decoder.{field}={value!r}; give `decoder` alone")
            setattr(self, name, value)

    def decoder_config(self) -> DecoderConfig:
        """`decoder` as a `DecoderConfig`. Raises ValueError where it is None."""
        if self.decoder is None:
            raise ValueError("decoder=None: give the fields of DecoderConfig, as DecoderConfig.to_dict() writes them")
        return DecoderConfig.from_dict(self.decoder)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "AttnzooConfig":
        """Returns itself: transformers would take the field `decoder` for a configuration of its own."""
        return self
