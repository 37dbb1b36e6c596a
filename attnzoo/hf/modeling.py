"""`DecoderLM` behind the interface of transformers: forward with labels and masks, generate, save and load."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from attnzoo.attention import unsaved_buffers
from attnzoo.checkpoint.native import saved_tensors
from attnzoo.checkpoint.sources import plugin_sources, warn_of_changes
from attnzoo.hf.cache import DecoderCache
from attnzoo.hf.config import AttnzooConfig
from attnzoo.models import DecoderLM
from attnzoo.models.shapes import fill_buffers, shared_parameters, tie_parameters


class AttnzooForCausalLM(PreTrainedModel, GenerationMixin):
    """Any `DecoderLM` as a model of transformers. decoder: an existing model to wrap, with its weights.

    Tokens with attention_mask 0 have no effect: a padded row gives the same logits as alone. Refused, not ignored:
    inputs_embeds, position_ids, attentions and hidden states, caches of other kinds.
    """

    config_class = AttnzooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012
    # Assisted generation removes tokens, which a state cannot do: transformers refuses it for stateful models.
    _is_stateful = True

    def __init__(self, config: AttnzooConfig, decoder: DecoderLM | None = None) -> None:
        super().__init__(config)
        self.model = DecoderLM(config.decoder_config()) if decoder is None else decoder
        warn_of_changes(config.plugins, str(config.name_or_path))
        _mark_filled(*self.model.parameters(), *self.model.buffers())
        named = self.model.named_parameters
        self._frozen = [name for name, parameter in named(remove_duplicate=False) if not parameter.requires_grad]
        self._shared = shared_parameters(self.model)
        self._shared.pop("head.weight", None)  # that one transformers ties, as its configuration says
        self.post_init()

    @classmethod
    def of(cls, decoder: DecoderLM) -> "AttnzooForCausalLM":
        """Wraps a model without copying it."""
        wrapped = cls(AttnzooConfig(decoder=decoder.config.to_dict(), plugins=plugin_sources(decoder) or None), decoder)
        wrapped.config.dtype = decoder.embedding.weight.dtype
        return wrapped.train(decoder.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: DecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, the loss of `labels`, and with `use_cache` or `cache` the cache for the next chunk.

        attention_mask: [B, T], or [B, columns of the cache + T] as `generate` gives it; 0 is padding, on any side.
        labels: [B, T], input_ids, with -100 at tokens that do not count; they are shifted here. Padding predicts
        nothing, so the first token of a left-padded row does not count. cache: consumed and returned; past_key_values
        is its older name. use_cache: None means True if a cache is given; without a cache the parallel form runs, which
        trains. Raises ValueError, naming the argument, for one that is not supported.
        """
        cache = _merge_names(cache, kwargs.pop("past_key_values", None))
        items = kwargs.pop("num_items_in_batch", None)
        self._check_arguments(input_ids, cache, labels, use_cache, logits_to_keep, kwargs)
        assert input_ids is not None
        if use_cache and cache is None:
            cache = DecoderCache()
        real_BT = _real_tokens(input_ids, attention_mask, cache)
        hidden_BTD = self._hidden(input_ids, real_BT, cache)
        logits_BTV = self.model.logits(slice_logits_to_keep(hidden_BTD, logits_to_keep))
        loss = None
        if labels is not None:
            if real_BT is not None:
                targets = labels[:, 1:].masked_fill(~real_BT[:, :-1], -100)
                labels = torch.cat([labels[:, :1], targets], dim=1)
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=logits_BTV.shape[-1], num_items_in_batch=items
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache)

    def _hidden(self, tokens_BT: Tensor, real_BT: Tensor | None, cache: DecoderCache | None) -> Tensor:
        """hidden_BTD of a chunk, zero at padding.

        Rows are reordered so that real tokens come first and padding last: every variant's streaming form requires it,
        and in the parallel form causality then keeps padding out.
        """
        order_BT, counts_B = None, None
        if real_BT is not None:
            order_BT, counts_B = torch.argsort((~real_BT).int(), dim=1, stable=True), real_BT.sum(1)
            tokens_BT = tokens_BT.gather(1, order_BT)
        if cache is None:
            hidden_BTD = self.model.hidden(tokens_BT)
        else:
            state = self.model.init_state(*tokens_BT.shape) if cache.state is None else cache.state
            hidden_BTD, state = self.model.extend_hidden(tokens_BT, state, counts_B)
            cache.append(state, torch.ones_like(tokens_BT, dtype=torch.bool) if real_BT is None else real_BT)
        if order_BT is None or real_BT is None:
            return hidden_BTD
        back_BTD = order_BT.argsort(1)[..., None].expand_as(hidden_BTD)
        return hidden_BTD.gather(1, back_BTD).masked_fill(~real_BT[..., None], 0.0)

    def _check_arguments(
        self,
        input_ids: Tensor | None,
        cache: Any,
        labels: Tensor | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
        others: dict[str, Any],
    ) -> None:
        """Raises ValueError, naming the argument, for any that would have to be ignored."""
        for name in ("output_hidden_states", "output_attentions"):
            asked = others.pop(name, None)
            if asked or (asked is None and getattr(self.config, name, False)):
                raise ValueError(f"{name}=True is not supported: variants do not show what is inside; leave it out")
        given = {name: value for name, value in others.items() if value is not None}
        if given:
            raise ValueError(f"{', '.join(given)}: not supported by AttnzooForCausalLM; leave it out")
        if input_ids is None or input_ids.dim() != 2:
            shape = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids has shape {shape}; give token ids of shape (batch, tokens)")
        if cache is not None and not isinstance(cache, DecoderCache):
            raise ValueError(
                f"cache is a {type(cache).__name__}; give attnzoo.hf.DecoderCache(), or use_cache=True for a new one"
            )
        if cache is not None and use_cache is False:
            raise ValueError("use_cache=False with a cache: leave one of them out")
        if cache is not None and cache.batch_size not in (-1, len(input_ids)):
            raise ValueError(
                f"input_ids has {len(input_ids)} rows and the cache {cache.batch_size}; repeat its rows with "
                "batch_repeat_interleave, or begin with a new cache"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; it must be {tuple(input_ids.shape)}")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels with logits_to_keep: the loss needs all logits; leave one of them out")

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises no weights, which `DecoderLM` does itself. Raises ValueError for weights and buffers that a
        checkpoint lacks. Fills the buffers that no checkpoint holds, which from_pretrained leaves uninitialised."""
        if any(_lost(buffer) for buffer in unsaved_buffers(module).values()):
            fill_buffers(self.model, self.device, self.dtype)
            _mark_filled(*unsaved_buffers(self.model).values())
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if _lost(tensor):
                where = next((path for path, found in self.named_modules() if found is module), "")
                raise ValueError(f"the checkpoint lacks {where}.{name}, or has it in another shape; is it complete?")

    def tie_weights(self, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
        """As transformers does for the head, and then the parameters that a variant uses under several names. Loading,
        which makes each parameter anew, also forgets which of them are not trained."""
        super().tie_weights(missing_keys, recompute_mapping)
        tie_parameters(self.model, self._shared)
        if not recompute_mapping:
            for name in self._frozen:
                self.model.get_parameter(name).requires_grad_(False)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[Any, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers does, with buffers and parameters that share memory, which it refuses, saved one by one."""
        if state_dict is None:
            state_dict = {f"model.{name}": tensor for name, tensor in saved_tensors(self.model).items()}
        return super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers={every_n_layers} is not supported; every layer is recomputed, or none")
        self.model.activation_checkpointing = enable

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` creates the cache, because only the model knows its variants' states."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        assert isinstance(new_embeddings, nn.Linear)
        self.model.head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"new_num_tokens={new_num_tokens}: the vocabulary of {self.config.vocab_size} is fixed; train a model "
                "with the larger vocab_size"
            )
        return self.model.embedding


def _mark_filled(*tensors: Tensor) -> None:
    """Tells them from what transformers puts in place without values, by the attribute that it uses itself."""
    for tensor in tensors:
        tensor._is_hf_initialized = not tensor.is_meta  # type: ignore[attr-defined]


def _lost(tensor: Tensor) -> bool:
    """Whether there is storage that neither the model nor a checkpoint has filled."""
    return not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)


def _merge_names(cache: Any, past_key_values: Any) -> Any:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are one argument; give cache")
    return past_key_values if cache is None else cache


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None, cache: DecoderCache | None) -> Tensor | None:
    """real_BT (bool): tokens of the chunk that are not padding; None: all. Raises ValueError for a mask that does not
    fit."""
    if attention_mask is None:
        return None
    batch, tokens = input_ids.shape
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape not in ((batch, tokens), (batch, past + tokens)):
        wanted = f"({batch}, {tokens})" if not past else f"({batch}, {tokens}) or ({batch}, {past + tokens})"
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {wanted}")
    mask = attention_mask.bool()
    seen_BS = None if cache is None else cache.real_BS
    if seen_BS is not None and mask.shape[1] > tokens and not torch.equal(mask[:, :past], seen_BS):
        raise ValueError("attention_mask hides or shows tokens that the cache holds; begin with a new cache")
    real_BT = mask[:, -tokens:]
    begun_B = real_BT.any(1) if seen_BS is None else real_BT.any(1) | seen_BS.any(1)
    if cache is not None and not bool(begun_B.all()):
        raise ValueError("attention_mask leaves a row without any token; begin it with the bos token")
    return None if bool(real_BT.all()) else real_BT
