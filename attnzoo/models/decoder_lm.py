"""A decoder language model over any causal attention variant."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.attention import Cost, build_attention, streaming
from attnzoo.attention.cached import ByteModel, cached_state, compress_layers, joinable_layers, streams
from attnzoo.attention.edits import (
    EditPlan,
    EditRuns,
    Edits,
    LayerPlan,
    TokenLayout,
    check_rows,
    check_runs,
    layer_plans,
    layer_sizes,
)
from attnzoo.attention.edits.plan import MAX_BYTES
from attnzoo.attention.segment_memory import SegmentMemory
from attnzoo.derived_memory import PassMemory, in_sequence, pass_memory
from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.full import compressing
from attnzoo.kvcache.options import check_lengths
from attnzoo.kvcache.state import STATIC, State
from attnzoo.kvcache.succession import check_current
from attnzoo.models.blocks import MLP, Block, build_norm, step_of
from attnzoo.models.config import DecoderConfig
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.common.step_inputs import StepInputs


@dataclass
class DecoderState(State):
    """One state per layer. model: the model that the state belongs to, which files of it name."""

    layers: tuple[State, ...]
    model: Any = field(default=None, repr=False, compare=False, metadata=STATIC)


class DecoderLM(nn.Module):
    """Embedding, pre-norm blocks, final norm, output head (tied to the embedding if asked).

    Wherever a method takes token ids tokens_BT, it also takes embeddings [B, T, model_dim] in their place: those of
    tokens (`embed`), or any others, as the virtual tokens of `attnzoo.models.sensor_lm`.

    Weights are normal(0, init_std); the outputs of attention and MLP, which add up along the residual stream, are
    smaller by 1/sqrt(2 * num_layers) (GPT-2's initialisation). Raises ValueError for a variant that is not causal:
    it would see the tokens it is to predict.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.many_rows: int | None = None
        """Chunks of so many tokens are computed in another dtype than shorter ones (`widen_products`); None: none."""
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(self._block(layer) for layer in range(config.num_layers))
        self.norm = build_norm(config.norm, config.model_dim, config.norm_eps)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def _block(self, layer: int) -> Block:
        config = self.config
        kind, options = config.layer_attention(layer)
        attention = build_attention(kind, options, "model.attention")
        try:
            attention.impl = config.attention_impl
        except ValueError as error:
            raise ValueError(f"model.attention_impl: {error}") from None
        if not attention.traits.causal:
            raise ValueError(
                f"model.attention: {kind!r} is not causal, and a decoder language model needs a causal variant"
            )
        mlp = MLP(config.mlp, config.model_dim, config.hidden_width(), config.mlp_bias)
        return Block(streaming(attention), mlp, config.norm, config.model_dim, config.norm_eps)

    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.blocks))

    def reset_parameters(self) -> None:
        """Initialises all weights from torch's global random state."""
        std = self.config.init_std
        output_std = std / (2 * self.config.num_layers) ** 0.5
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_size)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        for block in self.layers():
            block.attention.reset_parameters(std, output_std)
            block.mlp.reset_parameters(std, output_std)

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None = None, *, edits: EditRuns | None = None) -> Tensor:
        """logits_BTV of the parallel form; `starts_BT` as in `Mask`. edits: what is read and changed of each row's
        attention (`plan_edits`); activations are then not checkpointed, and a row holds one document: what `starts_BT`
        says of it beside is padding."""
        return self.logits(self.hidden(tokens_BT, starts_BT, edits=edits))

    def hidden(self, tokens_BT: Tensor, starts_BT: Tensor | None = None, *, edits: EditRuns | None = None) -> Tensor:
        """hidden_BTD after the final norm. Raises ValueError for `starts_BT` where a variant is not varlen."""
        if starts_BT is not None:
            for block in self.layers():
                if not block.attention.traits.varlen:
                    raise ValueError(
                        f"starts_BT: {type(block.attention).__name__} cannot keep documents of one row apart "
                        "(trait varlen); give it one document per row"
                    )
        mask = None if starts_BT is None else Mask(starts_BT=starts_BT)
        x_BTD = self.embed(tokens_BT)
        if edits is not None:
            batch, tokens, _ = x_BTD.shape
            check_rows(edits, batch, tokens, starts_BT, len(self.blocks))
        for block, plan in zip(self.layers(), self._plans(edits), strict=True):
            if plan is not None:
                x_BTD = block(x_BTD, mask, plan)
            elif edits is None and self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, mask, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, mask)
        out: Tensor = self.norm(x_BTD)
        return out

    def _plans(self, edits: EditRuns | None) -> list[LayerPlan | None]:
        """What each layer does of edits in one call."""
        return [None for _ in self.blocks] if edits is None else layer_plans(edits, range(len(self.blocks)))

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """x_BTD of token ids; embeddings are returned as they are. Raises ValueError for no sequences, no tokens,
        embeddings of another width, and on a CPU for ids out of range."""
        if not isinstance(tokens_BT, Tensor):
            raise ValueError(f"tokens_BT is a {type(tokens_BT).__name__}; give a tensor of token ids or of embeddings")
        if tokens_BT.dim() == 3 and tokens_BT.is_floating_point():
            return self._given(tokens_BT)
        if tokens_BT.dim() != 2 or 0 in tokens_BT.shape:
            raise ValueError(f"tokens_BT has shape {tuple(tokens_BT.shape)}; give at least one sequence and one token")
        try:
            x_BTD: Tensor = self.embedding(tokens_BT)
        except IndexError:
            raise ValueError(
                f"tokens_BT holds ids from {int(tokens_BT.min())} to {int(tokens_BT.max())}; the vocabulary has "
                f"{self.config.vocab_size}"
            ) from None
        except RuntimeError as error:
            if tokens_BT.dtype in (torch.int32, torch.int64):
                raise
            raise ValueError(f"tokens_BT is of {tokens_BT.dtype}; token ids are torch.long") from error
        return x_BTD

    def _given(self, x_BTD: Tensor) -> Tensor:
        """Embeddings that came in place of token ids."""
        width, dtype = self.config.model_dim, self.embedding.weight.dtype
        if 0 in x_BTD.shape or x_BTD.shape[2] != width:
            raise ValueError(
                f"embeddings of shape {tuple(x_BTD.shape)} in place of tokens_BT; give at least one sequence and one "
                f"token, with {width} numbers (model_dim) a token"
            )
        return x_BTD.to(dtype)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """logits of any rows of hidden states."""
        out: Tensor = self.head(hidden_BTD)
        return out

    def loss(
        self, tokens_BT: Tensor, targets_BT: Tensor, starts_BT: Tensor | None = None, count: Tensor | None = None
    ) -> Tensor:
        """Mean cross entropy in nats over targets; -100 marks targets that do not count. Without a target it is 0.

        count: divides the sum instead of the number of these targets, for a batch that is part of a larger one.
        """
        return _cross_entropy(self(tokens_BT, starts_BT).float(), targets_BT, count)

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache: CachePolicy | None = None,
    ) -> DecoderState:
        """Empty state of `batch` sequences with room for `capacity` tokens each, by default on the model's device, in
        its dtype.

        cache: the policy for keys and values (`attnzoo.kvcache.build_cache`), None: the full cache; layers whose state
        has constant size keep it. Raises ValueError where no layer has keys to compress, a layer has a window or lacks
        what the policy needs, an option counts more tokens than max_positions, or batch is below 1.
        """
        if batch < 1 or capacity < 0:
            raise ValueError(f"batch={batch} must be at least 1, capacity={capacity} at least 0")
        device, dtype = device or self.embedding.weight.device, dtype or self.embedding.weight.dtype
        attentions = [block.attention for block in self.layers()]
        cache = compressing(cache)
        if cache is None:
            exact = [each.init_state(batch, capacity, device=device, dtype=dtype) for each in attentions]
            return DecoderState(tuple(exact), self)
        check_lengths(cache.config, self.config.max_positions)
        # Where no layer has keys, `cached_state` raises and says why.
        some = any(attention.traits.growth != "O(1)" for attention in attentions)
        return DecoderState(
            tuple(
                attention.init_state(batch, capacity, device=device, dtype=dtype)
                if some and attention.traits.growth == "O(1)"
                else cached_state(attention, batch, capacity, cache, device=device, dtype=dtype)
                for attention in attentions
            ),
            self,
        )

    @torch.no_grad()
    def compress(self, state: DecoderState, joinable: bool = False) -> DecoderState:
        """Compresses the state by its cache policy, over all layers together, once the prompts have ended.

        The given state is consumed; without a policy it is returned as it is. joinable: in the form that `State.joined`
        can put into one batch with other sequences of the policy. Raises ValueError for a state that has been
        compressed already, and for one without a token.
        """
        attentions = [block.attention for block in self.layers()]
        layers = compress_layers(attentions, state.layers, final=True)
        return replace(state, layers=joinable_layers(attentions, layers) if joinable else layers)

    def byte_model(self, cache: CachePolicy) -> ByteModel:
        """The bytes that sequences take under a cache policy. Raises ValueError as `init_state`."""
        attentions = [block.attention for block in self.layers()]
        return ByteModel.of(cache, attentions, self.init_state(1, 1, device="meta", cache=cache).layers)

    def plan_edits(
        self,
        edits: Edits,
        layout: TokenLayout,
        new_tokens: int = 0,
        *,
        max_bytes: int = MAX_BYTES,
        streams: bool = True,
    ) -> EditPlan:
        """What reads and edits mean in this model, for a sequence of this layout and up to `new_tokens` tokens after
        its prompt; an `EditRun` of it goes with one pass over the sequence. Raises ValueError as `Edits.plan`."""
        if not isinstance(edits, Edits):
            raise ValueError(f"edits is a {type(edits).__name__}; give Edits(...) of reads and edits")
        sizes = [layer_sizes(block.attention) for block in self.layers()]
        return edits.plan(sizes, layout, new_tokens, max_bytes=max_bytes, streams=streams)

    def extend(
        self,
        tokens_BT: Tensor,
        state: DecoderState,
        counts_B: Tensor | None = None,
        *,
        edits: EditRuns | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """Continues sequences by a chunk: (logits_BTV, new state). `counts_B` as in `Attention.extend`, `edits` as in
        `forward`."""
        hidden_BTD, state = self.extend_hidden(tokens_BT, state, counts_B, edits=edits)
        return self.logits(hidden_BTD), state

    def extend_hidden(
        self,
        tokens_BT: Tensor,
        state: DecoderState,
        counts_B: Tensor | None = None,
        *,
        edits: EditRuns | None = None,
        step: StepInputs | None = None,
    ) -> tuple[Tensor, DecoderState]:
        """`extend` up to the final norm, for callers that need the logits of few rows. step: what a caller who knows
        the lengths hands down, in place of counts_B; None: it is made from the state.

        Raises ValueError for a chunk without tokens, for another number of sequences than the state has, and for a step
        of others."""
        x_BTD = self.embed(tokens_BT)
        rows = len(getattr(state.layers[0], "lengths_B", tokens_BT))
        if len(tokens_BT) != rows:
            raise ValueError(
                f"tokens_BT has shape {tuple(tokens_BT.shape)}, the state holds {rows} sequences; give one row of "
                "tokens for each"
            )
        if not torch.compiler.is_compiling():
            for layer_state in state.layers:  # all of them before the first is written to
                check_current(layer_state)
        if edits is not None:
            check_runs(edits, rows, len(self.blocks))
        step = step_of(state.layers, x_BTD, counts_B, step)
        counts_B = counts_B if step is None else step.counts_B
        layers = []
        for block, layer_state, plan in zip(self.layers(), state.layers, self._plans(edits), strict=True):
            x_BTD, layer_state = block.extend(x_BTD, layer_state, counts_B, plan, step)
            layers.append(layer_state)
        after = tuple(layers)
        if streams(after):
            after = compress_layers([block.attention for block in self.layers()], after, final=False)
        return self.norm(x_BTD), replace(state, layers=after)

    def init_memory(self, batch: int, length: int) -> tuple[SegmentMemory, ...]:
        """Transformer-XL's memory of `length` tokens per layer, empty. Raises ValueError for a length below 1."""
        like = self.embedding.weight
        return tuple(
            SegmentMemory.empty(batch, length, self.config.model_dim, device=like.device, dtype=like.dtype)
            for _ in self.blocks
        )

    def segment(self, tokens_BT: Tensor, memory: tuple[SegmentMemory, ...]) -> tuple[Tensor, tuple[SegmentMemory, ...]]:
        """(logits_BTV, new memory) of a segment that also attends to the memory (see attention/segment_memory.py).

        Gradients end at the memory. Unlike `extend`, the past is bounded, and what a token sees of it depends on where
        segments end.
        """
        x_BTD, after = self.embed(tokens_BT), []
        for block, remembered in zip(self.layers(), memory, strict=True):
            x_BTD, remembered = block.segment(x_BTD, remembered)
            after.append(remembered)
        return self.logits(self.norm(x_BTD)), tuple(after)

    def describe(self) -> str:
        """Identifies the model in files: its configuration, and a digest of the first values of its weights (without
        linear maps, which may be packed)."""
        digest = hashlib.sha256()
        for name, module in self.named_modules():
            for parameter in () if isinstance(module, nn.Linear) else module.parameters(recurse=False):
                some = parameter.detach().reshape(-1)[:64].double().cpu().numpy()
                digest.update(name.encode() + some.tobytes())
        return f"{json.dumps(self.config.to_dict(), sort_keys=True)} with weights {digest.hexdigest()[:16]}"

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of weights, a tied head counted once; without `embeddings`, neither embedding nor head."""
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        return total - sum(p.numel() for p in {self.embedding.weight, self.head.weight})

    def matrix_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Weights of linear maps inside blocks: what an optimiser for matrices (Muon) may take.

        Convolution kernels and position tables have two or more axes as well, but are no linear maps.
        """
        return [
            (f"blocks.{name}.weight", cast(nn.Parameter, module.weight))
            for name, module in self.blocks.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def cost(self, batch: int, tokens: int, context: int) -> Cost:
        """Cost of `tokens` new tokens up to length `context`; training costs three times the FLOPs."""
        width = self.embedding.weight.element_size()
        attention = sum((b.attention.cost(batch, tokens, context) for b in self.layers()), Cost())
        others = self.num_parameters() - attention.parameters
        head_flops = 2 * batch * tokens * self.head.weight.numel()
        mlp_flops = sum(block.mlp.flops(batch, tokens) for block in self.layers())
        activations = batch * tokens * (self.config.model_dim + self.config.vocab_size)
        # An embedding's unread rows are not moved; a tied table is read whole by the head.
        unread = 0 if self.config.tie_embeddings else self.embedding.weight.numel()
        return attention + Cost(
            flops=head_flops + mlp_flops,
            bytes_moved=width * (others - unread + activations),
            parameters=others,
        )

    def training_memory(self, batch: int, tokens: int, dtype: torch.dtype | None = None) -> PassMemory:
        """What `loss` and its backward pass hold; `dtype` of weights and activations, None: that of the weights.

        Derived part by part, layers of one kind once. Raises ValueError as `attnzoo.derived_memory.pass_memory`.
        """
        dtype, checkpointing = dtype or self.embedding.weight.dtype, self.activation_checkpointing
        tokens_BT = torch.empty(batch, tokens, dtype=torch.long, device="meta")
        parts = [pass_memory(self.embedding, tokens_BT, dtype=dtype, inner=True)]
        kinds: dict[str, PassMemory] = {}
        for layer, block in enumerate(self.layers()):
            kind = repr(self.config.layer_attention(layer))
            if kind not in kinds:
                kinds[kind] = block.training_memory(batch, tokens, dtype, checkpointing)
            parts.append(kinds[kind])
        body = in_sequence(parts)
        if self.config.tie_embeddings:  # the head's gradient of the table waits for the embedding's
            body = replace(body, backward=body.backward + self.embedding.weight.numel() * dtype.itemsize)
        hidden_BTD = torch.empty(batch, tokens, self.config.model_dim, dtype=dtype, device="meta")
        end = nn.ModuleList([self.norm, self.head])
        return in_sequence([body, pass_memory(end, hidden_BTD, tokens_BT, run=_loss, dtype=dtype, inner=True)])


def _loss(end: nn.ModuleList, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    norm, head = end
    return _cross_entropy(head(norm(hidden_BTD)).float(), targets_BT, None)


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, count: Tensor | None) -> Tensor:
    total = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100, reduction="sum")
    return total / ((targets_BT != -100).sum().clamp_min(1) if count is None else count)
