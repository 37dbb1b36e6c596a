"""A decoder language model over any causal attention variant."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnzoo.attention import Cost, build_attention
from attnzoo.kvcache.state import State
from attnzoo.models.blocks import MLP, Block, build_norm
from attnzoo.models.config import DecoderConfig


@dataclass
class DecoderState(State):
    """One state a layer."""

    layers: tuple[State, ...]


class DecoderLM(nn.Module):
    """Embedding, pre-norm blocks, final norm, output head (tied to the embedding if asked).

    Weights are normal(0, init_std); the outputs of attention and MLP, which add up along the residual stream, are
    smaller by 1/sqrt(2 * num_layers) (GPT-2's initialisation). Raises ValueError for a variant that is not causal:
    it would see the tokens it is to predict.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.model_dim)
        self.blocks = nn.ModuleList(self._block(layer) for layer in range(config.num_layers))
        self.norm = build_norm(config.norm, config.model_dim)
        self.head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def _block(self, layer: int) -> Block:
        config = self.config
        kind, options = config.layer_attention(layer)
        attention = build_attention(kind, options, "model.attention")
        if not attention.traits.causal:
            raise ValueError(
                f"model.attention: {kind!r} is not causal, and a decoder language model needs a causal variant"
            )
        mlp = MLP(config.mlp, config.model_dim, config.hidden_width())
        return Block(attention, mlp, config.norm, config.model_dim)

    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.blocks))

    def reset_parameters(self) -> None:
        """Initialises all weights from torch's global random state."""
        std = self.config.init_std
        output_std = std / (2 * self.config.num_layers) ** 0.5
        nn.init.normal_(self.embedding.weight, std=std)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=std)
        for block in self.layers():
            block.attention.reset_parameters(std, output_std)
            block.mlp.reset_parameters(std, output_std)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """logits_BTV of the parallel form."""
        return self.logits(self.hidden(tokens_BT))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """hidden_BTD after the final norm."""
        x_BTD = self.embedding(tokens_BT)
        for block in self.layers():
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, use_reentrant=False)
            else:
                x_BTD = block(x_BTD)
        out: Tensor = self.norm(x_BTD)
        return out

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """logits of any rows of hidden states."""
        out: Tensor = self.head(hidden_BTD)
        return out

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross entropy in nats over targets; -100 marks targets that do not count."""
        logits_BTV = self(tokens_BT).float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=-100)

    def init_state(
        self,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DecoderState:
        """Empty state of `batch` sequences with room for `capacity` tokens each."""
        return DecoderState(
            tuple(block.attention.init_state(batch, capacity, device=device, dtype=dtype) for block in self.layers())
        )

    def extend(
        self, tokens_BT: Tensor, state: DecoderState, counts_B: Tensor | None = None
    ) -> tuple[Tensor, DecoderState]:
        """Continues sequences by a chunk: (logits_BTV, new state). `counts_B` as in `Attention.extend`."""
        hidden_BTD, state = self.extend_hidden(tokens_BT, state, counts_B)
        return self.logits(hidden_BTD), state

    def extend_hidden(
        self, tokens_BT: Tensor, state: DecoderState, counts_B: Tensor | None = None
    ) -> tuple[Tensor, DecoderState]:
        """`extend` up to the final norm, for callers that need the logits of few rows."""
        x_BTD = self.embedding(tokens_BT)
        layers = []
        for block, layer_state in zip(self.layers(), state.layers, strict=True):
            x_BTD, layer_state = block.extend(x_BTD, layer_state, counts_B)
            layers.append(layer_state)
        return self.norm(x_BTD), DecoderState(tuple(layers))

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
