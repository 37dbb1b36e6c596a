"""LDAM: notes and time series of a stay, read with the definitions of the labels that are to be predicted.

Source: "Label Dependent Attention Model for Disease Risk Prediction Using Multimodal Electronic Health Records" (2022,
arXiv 2201.06779). Words v_l, definitions c_k and descriptions d_i of variables come from one text encoder;

    beta^text = weights of v by c,   z_text = W sum_l beta_l v_l
    h_i = GRU_2(GRU_1(series of variable i)), both bidirectional and shared by the variables
    beta^series = weights of d by c, z_series = sum_i LN(beta_i h_i + h_i)
    logits = head(mean of z_text and z_series),   loss = BCE(logits) + CE(head(W c_k), k)

with the weights of `attnzoo/ops/label_attention`.

Differs from the paper: our token embeddings and blocks in place of BERT, c and d being means of their tokens; words,
hours and variables that do not exist take no part; the mean is over what a stay has, text, series or both; d_i is added
to h_i (`describe_series`); logits have no dropout. One map W_g projects tokens and labels before they are compared.
For little data, and off by default: a softmax where labels exclude one another (`exclusive`), weights of words for
each label by itself (`pooling="each"`), their mean beside the weighted sum (`mean`), a linear head on tf-idf weights
of the words (`skip`), words hidden in training (`hide_words`), and definitions told apart as if they were notes
(`read_definitions`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from attnzoo.attention import build_attention
from attnzoo.attention.base import streaming
from attnzoo.models.blocks import MLP, Block, build_norm
from attnzoo.models.ldam_config import LdamConfig, Texts
from attnzoo.ops.common.masks import Mask
from attnzoo.ops.label_attention import LabelWeights, label_attention


@dataclass(frozen=True, kw_only=True)
class LdamInputs:
    """What is known of N stays; a stay may have words, series, or both.

    words_NL: token ids of the notes; lengths_N: how many of them are real. cells_NTVC: the series, as
    `attnzoo.clinical.statistics` makes them; hours_N: how many hours are real; variables_NV (bool): which variables the
    source of a stay has, None: all. presence_NL: how much of each word there is, from 1 (the word) to 0 (an unknown
    one, id 0), None: all of it; explanations take words away with it. What stands where nothing is real does not
    matter.
    """

    words_NL: Tensor | None = None
    lengths_N: Tensor | None = None
    cells_NTVC: Tensor | None = None
    hours_N: Tensor | None = None
    variables_NV: Tensor | None = None
    presence_NL: Tensor | None = None


SKIP_SCALE = 10.0
"""Of the linear head on words, so that its weights are of the size of all others: Adam moves every number alike."""


@dataclass(frozen=True)
class LdamMaps:
    """Weights by word and by variable, with the scores by label they come from; None for what was not given.
    words_NKL: the weights with which words were summed for each label; the same for all unless `pooling="each"`."""

    words: LabelWeights | None
    variables: LabelWeights | None
    words_NKL: Tensor | None


class TextEncoder(nn.Module):
    """Vectors of tokens: embeddings, blocks of attention in both directions, a norm."""

    def __init__(self, config: LdamConfig) -> None:
        super().__init__()
        kind, options = config.text_attention()
        dim = config.model_dim
        self.embedding = nn.Embedding(config.vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.2)
        blocks = []
        for _ in range(config.num_layers):
            attention = streaming(build_attention(kind, options, "model.attention"))
            blocks.append(Block(attention, MLP("gelu", dim, config.mlp_dim, bias=True), "layernorm", dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = build_norm("layernorm", dim)

    def forward(self, ids_BL: Tensor, exist_BL: Tensor, presence_BL: Tensor | None = None) -> Tensor:
        x_BLD = look_up(self.embedding, ids_BL, exist_BL, presence_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, Mask.full(exist_BL))
        out: Tensor = self.norm(x_BLD)
        return out


def look_up(table: nn.Embedding, ids_BL: Tensor, exist_BL: Tensor, presence_BL: Tensor | None) -> Tensor:
    """The rows of a table; of a word that is there in part, between the unknown word's row and its own."""
    x_BLD: Tensor = table(ids_BL.masked_fill(~exist_BL, 0))
    if presence_BL is None:
        return x_BLD
    share_BL1 = presence_BL.masked_fill(~exist_BL, 0.0)[..., None].to(x_BLD.dtype)
    return torch.lerp(table.weight[0].expand_as(x_BLD), x_BLD, share_BL1)


def tf_idf(ids_NL: Tensor, exist_NL: Tensor, rarity_W: Tensor) -> Tensor:
    """Weights [N, L] of the tokens of texts: those of one word add up to (1 + log its number) times its rarity, and the
    squares of these sums to 1. Unknown words (id 0) have none."""
    known_NL = exist_NL & (ids_NL > 0)
    same_NLL = (ids_NL[:, :, None] == ids_NL[:, None]) & known_NL[:, None]
    number_NL = same_NLL.sum(-1).clamp(min=1).to(rarity_W.dtype)
    word_NL = (rarity_W[ids_NL] * (1.0 + number_NL.log())).masked_fill(~known_NL, 0.0)
    size_N1 = (word_NL.square() / number_NL).sum(1, keepdim=True).sqrt()
    return word_NL / number_NL / size_N1.where(size_N1 > 0, 1.0)


class LabelPooling(nn.Module):
    """Weights of tokens by labels, both projected by one map; without labels one learned vector is in their place."""

    def __init__(self, config: LdamConfig) -> None:
        super().__init__()
        labels, dim = len(config.definitions), config.model_dim
        self.project = nn.Linear(dim, dim, bias=False)
        self.vector: nn.Parameter | None = None
        if config.labels == "none":
            labels, self.vector = 1, nn.Parameter(torch.randn(1, dim))
        self.kernel = nn.Parameter(torch.full((labels, config.window), 1.0 / config.window))
        self.bias = nn.Parameter(torch.zeros(labels))

    def forward(self, tokens_BTD: Tensor, labels_KD: Tensor | None, exist_BT: Tensor | None) -> LabelWeights:
        labels_KE = self.vector if labels_KD is None else self.project(labels_KD)
        assert labels_KE is not None
        return label_attention(self.project(tokens_BTD), labels_KE, self.kernel, self.bias, exist_BT=exist_BT)


class SeriesEncoder(nn.Module):
    """h_NVD: what the series of each variable has become, by two bidirectional GRUs that the variables share."""

    def __init__(self, config: LdamConfig) -> None:
        super().__init__()
        dim = config.model_dim
        self.first = nn.GRU(config.channels, dim // 2, batch_first=True, bidirectional=True)
        self.second = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, cells_NTVC: Tensor, hours_N: Tensor) -> Tensor:
        """A stay without hours is read as one hour of zeros."""
        stays, hours, variables, _ = cells_NTVC.shape
        gone_NT = torch.arange(hours, device=hours_N.device) >= hours_N[:, None]
        cells_NTVC = F.pad(cells_NTVC.masked_fill(gone_NT[..., None, None], 0.0), (0, 0, 0, 0, 0, 0 if hours else 1))
        lengths = hours_N.clamp(min=1).repeat_interleave(variables).cpu()
        rows = pack_padded_sequence(
            cells_NTVC.transpose(1, 2).flatten(0, 1), lengths, batch_first=True, enforce_sorted=False
        )
        _, last_2BH = self.second(self.first(rows)[0])
        out: Tensor = last_2BH.transpose(0, 1).reshape(stays, variables, -1)
        return out


class Ldam(nn.Module):
    """Logits of every label, from notes, series, or both."""

    def __init__(self, config: LdamConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextEncoder(config)
        self.words = LabelPooling(config)
        self.value = nn.Linear(config.model_dim, config.model_dim)
        if config.variables:
            self.series = SeriesEncoder(config)
            self.variables = LabelPooling(config)
            self.series_norm = build_norm("layernorm", config.model_dim)
        if config.mean:
            self.mix = nn.Linear(2 * config.model_dim, config.model_dim)
        if config.skip:
            self.skip = nn.Embedding(config.vocab_size, len(config.definitions))
            nn.init.zeros_(self.skip.weight)
            self.register_buffer("rarity_W", torch.ones(config.vocab_size))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.model_dim, len(config.definitions))
        self._add_texts("definitions", config.definitions)
        self._add_texts("descriptions", config.variables)

    def _add_texts(self, name: str, texts: Texts) -> None:
        """Texts of the configuration as buffers: ids, and which of them exist."""
        longest = max((len(ids) for ids in texts), default=0)
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in texts]
        exist = [[i < len(ids) for i in range(longest)] for ids in texts]
        self.register_buffer(f"{name}_ids", torch.tensor(padded, dtype=torch.int64), persistent=False)
        self.register_buffer(f"{name}_exist", torch.tensor(exist, dtype=torch.bool), persistent=False)

    def _read_texts(self, name: str) -> Tensor:
        """The mean of each text's encoded tokens."""
        exist_BL = self.get_buffer(f"{name}_exist")
        x_BLD = self.text(self.get_buffer(f"{name}_ids"), exist_BL).masked_fill(~exist_BL[..., None], 0.0)
        out: Tensor = x_BLD.sum(1) / exist_BL.sum(1, keepdim=True)
        return out

    def forward(self, inputs: LdamInputs) -> Tensor:
        """logits [N, labels]. Raises ValueError for inputs that do not fit the configuration or one another."""
        return self._run(inputs, self._labels())[0]

    def loss(self, inputs: LdamInputs, targets_NK: Tensor) -> Tensor:
        """The cross entropy of the labels (binary of each, or of all where they are exclusive), and label_loss times
        the cross entropy that tells each definition from the others. targets_NK: 0 or 1."""
        labels_KD = self._labels()
        logits_NK, _ = self._run(inputs, labels_KD)
        told = self.cross_entropy(logits_NK, targets_NK)
        if labels_KD is None or not self.config.label_loss:
            return told
        own = torch.arange(len(labels_KD), device=labels_KD.device)
        if self.config.read_definitions:
            exist_KL = self.get_buffer("definitions_exist")
            texts = LdamInputs(words_NL=self.get_buffer("definitions_ids"), lengths_N=exist_KL.sum(1))
            of_definitions = self._run(texts, labels_KD)[0]
        else:
            of_definitions = self.head(self.value(labels_KD))  # [definitions, labels]: classes in the last axis
        return told + self.config.label_loss * F.cross_entropy(of_definitions, own)

    def cross_entropy(self, logits_NK: Tensor, targets_NK: Tensor) -> Tensor:
        """The mean over rows (and labels, where they are not exclusive). Raises ValueError."""
        if targets_NK.shape != logits_NK.shape:
            raise ValueError(f"targets_NK has shape {list(targets_NK.shape)}; it must be {list(logits_NK.shape)}")
        if self.config.exclusive:
            return F.cross_entropy(logits_NK, targets_NK.to(logits_NK.dtype))
        return F.binary_cross_entropy_with_logits(logits_NK, targets_NK.to(logits_NK.dtype))

    @torch.no_grad()
    def read_maps(self, inputs: LdamInputs) -> LdamMaps:
        """G, u and beta of words and of variables. Variables have the same rows for all stays, but for variables that a
        stay has not: they are weighed by their descriptions. Raises ValueError as `forward`."""
        return self._run(inputs, self._labels())[1]

    def _labels(self) -> Tensor | None:
        return None if self.config.labels == "none" else self._read_texts("definitions")

    def _run(self, inputs: LdamInputs, labels_KD: Tensor | None) -> tuple[Tensor, LdamMaps]:
        stays = self._check(inputs)
        sums_NKD = self.head.weight.new_zeros(stays, 1, self.config.model_dim)
        parts_N1 = sums_NKD.new_zeros(stays, 1)
        words = variables = words_NKL = None
        skipped_NK: Tensor | float = 0.0
        if inputs.words_NL is not None and inputs.lengths_N is not None:
            exist_NL = (
                torch.arange(inputs.words_NL.shape[1], device=inputs.lengths_N.device) < inputs.lengths_N[:, None]
            )
            presence_NL = self._presence(inputs.words_NL, inputs.presence_NL)
            text_NKD, words, words_NKL = self._text(inputs.words_NL, exist_NL, presence_NL, labels_KD)
            has_N1 = (inputs.lengths_N > 0)[:, None]
            sums_NKD, parts_N1 = sums_NKD + text_NKD.masked_fill(~has_N1[..., None], 0.0), parts_N1 + has_N1
            if self.config.skip:
                skipped_NK = self._skip(inputs.words_NL, exist_NL, presence_NL)
        if inputs.cells_NTVC is not None and inputs.hours_N is not None:
            series_ND, variables = self._series(inputs, labels_KD)
            has_N1 = (inputs.hours_N > 0)[:, None]
            sums_NKD = sums_NKD + series_ND.masked_fill(~has_N1, 0.0)[:, None]
            parts_N1 = parts_N1 + has_N1
        fused_NKD = self.dropout(sums_NKD / parts_N1.clamp(min=1.0)[..., None])
        logits_NK = (fused_NKD * self.head.weight).sum(-1) + self.head.bias + skipped_NK
        return logits_NK, LdamMaps(words, variables, words_NKL)

    def _skip(self, words_NL: Tensor, exist_NL: Tensor, presence_NL: Tensor | None) -> Tensor:
        """The linear head on tf-idf weights of words [N, K]."""
        ids_NL = words_NL.masked_fill(~exist_NL, 0)
        weights_NL = tf_idf(ids_NL, exist_NL, self.get_buffer("rarity_W"))
        if presence_NL is not None:
            weights_NL = weights_NL * presence_NL.masked_fill(~exist_NL, 0.0)
        out: Tensor = SKIP_SCALE * (weights_NL[:, None] @ self.skip(ids_NL))[:, 0]
        return out

    def _presence(self, words_NL: Tensor, given_NL: Tensor | None) -> Tensor | None:
        """In training some words are hidden."""
        if not self.training or not self.config.hide_words:
            return given_NL
        kept_NL = (torch.rand(words_NL.shape, device=words_NL.device) >= self.config.hide_words).float()
        return kept_NL if given_NL is None else kept_NL * given_NL

    def _text(
        self, words_NL: Tensor, exist_NL: Tensor, presence_NL: Tensor | None, labels_KD: Tensor | None
    ) -> tuple[Tensor, LabelWeights, Tensor]:
        """(z of each label, or one for all; the weights of words and what they come from; those of each label)."""
        v_NLD = self.dropout(self.text(words_NL, exist_NL, presence_NL))
        found = self.words(v_NLD, labels_KD, exist_NL)
        weights_NKL = found.weights_BT[:, None]
        if self.config.pooling == "each":
            evidence_NKL = found.evidence_BTK.mT.masked_fill(~exist_NL[:, None], torch.finfo(v_NLD.dtype).min)
            weights_NKL = evidence_NKL.softmax(-1).masked_fill(~exist_NL[:, None], 0.0)
        z_NKD = self.value(weights_NKL @ v_NLD)
        if self.config.mean:
            number_N1 = exist_NL.sum(1, keepdim=True).clamp(min=1)
            mean_N1D = (v_NLD.masked_fill(~exist_NL[..., None], 0.0).sum(1) / number_N1)[:, None]
            z_NKD = z_NKD + F.gelu(self.mix(torch.cat([mean_N1D.expand_as(z_NKD), z_NKD], dim=-1)))
        return z_NKD, found, weights_NKL.expand(-1, len(self.config.definitions), -1)

    def _series(self, inputs: LdamInputs, labels_KD: Tensor | None) -> tuple[Tensor, LabelWeights]:
        cells_NTVC, hours_N, exist_NV = inputs.cells_NTVC, inputs.hours_N, inputs.variables_NV
        assert cells_NTVC is not None
        assert hours_N is not None
        described_VD = self._read_texts("descriptions")
        described_NVD = described_VD.expand(len(cells_NTVC), -1, -1)
        if exist_NV is not None:
            cells_NTVC = cells_NTVC.masked_fill(~exist_NV[:, None, :, None], 0.0)
        h_NVD = self.dropout(self.series(cells_NTVC, hours_N))
        if self.config.describe_series:
            h_NVD = h_NVD + described_VD
        found = self.variables(described_NVD, labels_KD, exist_NV)
        z_NVD = self.series_norm(found.weights_BT[..., None] * h_NVD + h_NVD)
        if exist_NV is not None:
            z_NVD = z_NVD.masked_fill(~exist_NV[..., None], 0.0)
        return z_NVD.sum(1), found

    def _check(self, inputs: LdamInputs) -> int:
        """The number of stays. Raises ValueError."""
        words, cells, config = inputs.words_NL, inputs.cells_NTVC, self.config
        given = words if words is not None else cells
        if given is None:
            raise ValueError("inputs hold neither words_NL nor cells_NTVC; give one of them, or both")
        if cells is not None and not config.variables:
            raise ValueError("cells_NTVC is given, and variables=() describes none; describe them in the configuration")
        stays, variables = len(given), len(config.variables)
        tokens, hours = (0 if x is None or x.dim() < 2 else x.shape[1] for x in (words, cells))
        _check_shape("words_NL", words, (stays, tokens))
        _check_shape("cells_NTVC", cells, (stays, hours, variables, config.channels))
        _check_shape("variables_NV", inputs.variables_NV, (stays, variables))
        _check_shape("presence_NL", inputs.presence_NL, (stays, tokens))
        _check_counts("lengths_N", inputs.lengths_N, "words_NL", words, stays, tokens)
        _check_counts("hours_N", inputs.hours_N, "cells_NTVC", cells, stays, hours)
        if inputs.variables_NV is not None and cells is None:
            raise ValueError("variables_NV is given without cells_NTVC; give both, or none")
        if inputs.presence_NL is not None and words is None:
            raise ValueError("presence_NL is given without words_NL; give both, or none")
        if words is not None and inputs.lengths_N is not None:
            real_NL = torch.arange(tokens, device=words.device) < inputs.lengths_N[:, None]
            wrong = words[real_NL & ((words < 0) | (words >= config.vocab_size))]
            if len(wrong):
                raise ValueError(f"words_NL holds token id {int(wrong[0])}; it must be below {config.vocab_size}")
        return stays


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be {list(shape)}")


def _check_counts(name: str, counts: Tensor | None, of: str, counted: Tensor | None, stays: int, most: int) -> None:
    if (counts is None) != (counted is None):
        raise ValueError(f"{name} and {of} come together: give both, or neither")
    _check_shape(name, counts, (stays,))
    if counts is not None and bool(((counts < 0) | (counts > most)).any()):
        raise ValueError(f"{name}={counts.tolist()} must lie between 0 and {most}, the length of {of}")
