"""What an LDAM's prediction looked at, word by word, in the form of `attnzoo.clinical.explain`: a word is a cell of one
variable, and it is taken away by making it an unknown word, which training hides words as.

What is explained of each text is the log odds of one label against all others (of labels that exclude one another), or
its logit. Integrated gradients are those of the words' embeddings, on the straight line from the unknown word to each
word; their sum is the difference of the log odds of the text and of a text of unknown words as long. Attention is
called that: it speaks of what was looked at. `attnzoo.clinical.faithfulness` measures both.

Letters: N texts, L words (T of a map), V = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnzoo.clinical.evidence import ATTENTION, GRADIENTS, MapVerdict
from attnzoo.clinical.explain import BATCH, TOLERANCE, CellMap, completed, quadrature
from attnzoo.clinical.faithfulness import Ticking, faithfulness
from attnzoo.clinical.trained_ldam import TrainedLdam
from attnzoo.clinical.words import spans
from attnzoo.models import Ldam, LdamInputs
from attnzoo.models.ldam import tf_idf
from attnzoo.report import counted


@dataclass(frozen=True, eq=False)
class TextWords:
    """Texts as token ids; labels_N: the label of each text whose prediction is explained. cells_NTVC, hours_N: the
    series of the same stays, where the model reads them; they stay as they are, whatever word is taken away."""

    words_NL: Tensor
    lengths_N: Tensor
    labels_N: Tensor
    cells_NTVC: Tensor | None = None
    hours_N: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("lengths_N", self.lengths_N), ("labels_N", self.labels_N)):
            if tensor.shape != self.words_NL.shape[:1]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; words_NL has {len(self)} texts")

    def inputs(self, presence_NL: Tensor | None = None) -> LdamInputs:
        """What an `Ldam` takes. presence_NL: how much of each word there is, None: all."""
        return LdamInputs(
            words_NL=self.words_NL,
            lengths_N=self.lengths_N,
            cells_NTVC=self.cells_NTVC,
            hours_N=self.hours_N,
            presence_NL=presence_NL,
        )

    def __len__(self) -> int:
        return len(self.words_NL)

    @cached_property
    def observed(self) -> Tensor:
        """[N, L, 1]: the words that exist and are known; an unknown one has no part in an explanation."""
        exist_NL = torch.arange(self.words_NL.shape[1], device=self.words_NL.device) < self.lengths_N[:, None]
        return (exist_NL & (self.words_NL > 0))[..., None]

    def rows(self, rows: slice | Tensor) -> "TextWords":
        series = (None if tensor is None else tensor[rows] for tensor in (self.cells_NTVC, self.hours_N))
        return TextWords(self.words_NL[rows], self.lengths_N[rows], self.labels_N[rows], *series)

    def blocks(self, size: int) -> Iterator["TextWords"]:
        for start in range(0, len(self), size):
            yield self.rows(slice(start, start + size))


@dataclass(frozen=True, eq=False)
class LabelLogit:
    """The log odds of each text's label. model: in evaluation mode. before: called before the model is, to end what
    takes too long. Raises ValueError."""

    model: Ldam
    before: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.model.training:
            raise ValueError("model is in training mode, where it hides words by chance; call model.eval() first")

    def of(self, texts: TextWords, presence_NL: Tensor) -> Tensor:
        """[N]; presence_NL: how much of each word there is."""
        outputs = len(self.model.config.definitions)
        if len(texts) and not 0 <= int(texts.labels_N.min()) <= int(texts.labels_N.max()) < outputs:
            raise ValueError(f"labels_N={texts.labels_N.tolist()}: the model has labels 0 to {outputs - 1}")
        if self.before is not None:
            self.before()
        logits_NK = self.model(texts.inputs(presence_NL))
        chosen_N1 = texts.labels_N[:, None]
        of_N: Tensor = logits_NK.gather(1, chosen_N1)[:, 0]
        if not self.model.config.exclusive:
            return of_N
        return of_N - logits_NK.scatter(1, chosen_N1, -torch.inf).logsumexp(1)

    @torch.no_grad()
    def without(self, stays: TextWords, hidden_NTV: Tensor | None = None) -> Tensor:
        """Log odds [N] of texts in which the hidden words are unknown ones; None: none is hidden."""
        presence_NL = torch.ones_like(stays.words_NL, dtype=next(self.model.parameters()).dtype)
        if hidden_NTV is not None:
            presence_NL = presence_NL.masked_fill(hidden_NTV[..., 0], 0.0)
        found = [
            self.of(some, presence_NL[first : first + BATCH])
            for first, some in zip(range(0, len(stays), BATCH), stays.blocks(BATCH), strict=True)
        ]
        return torch.cat(found) if found else presence_NL.new_zeros(0)


def word_gradients(logit: LabelLogit, texts: TextWords, *, tolerance: float = TOLERANCE) -> CellMap:
    """Integrated gradients of the embeddings. Raises ValueError as `attnzoo.clinical.explain.integrated_gradients`."""
    everything = torch.ones_like(texts.observed)
    difference_N = logit.without(texts) - logit.without(texts, everything)
    start = torch.zeros(texts.observed.shape, dtype=difference_N.dtype, device=difference_N.device)

    def path(rows: Tensor, steps: int) -> Tensor:
        some = texts.rows(rows)
        slopes_NL = torch.zeros_like(start[rows, :, 0])
        for point, weight in quadrature(steps):
            presence_NL = torch.full_like(slopes_NL, point).requires_grad_()
            with torch.enable_grad():
                total = logit.of(some, presence_NL).sum()
            slopes_NL += weight * torch.autograd.grad(total, presence_NL)[0]
        return (slopes_NL[..., None]).masked_fill(~some.observed, 0.0)

    return CellMap(GRADIENTS, completed(difference_N, start, path, tolerance), signed=True)


def word_attention(model: Ldam, texts: TextWords) -> CellMap:
    """beta: the weights with which words were summed for the text's label; 0 for unknown words."""
    found = []
    for some in texts.blocks(BATCH):
        maps = model.read_maps(some.inputs())
        assert maps.words_NKL is not None
        found.append(maps.words_NKL[torch.arange(len(some)), some.labels_N][..., None] * some.observed)
    return CellMap(ATTENTION, torch.cat(found), signed=False)


def word_rarity(rarity_W: Tensor, texts: TextWords) -> CellMap:
    """tf-idf weights: what a map without any model would say. rarity_W: by word, of training texts."""
    exist_NL = torch.arange(texts.words_NL.shape[1], device=texts.words_NL.device) < texts.lengths_N[:, None]
    return CellMap("tf-idf", tf_idf(texts.words_NL, exist_NL, rarity_W)[..., None] * texts.observed, signed=False)


@dataclass(frozen=True, kw_only=True)
class WordFinding:
    """One word of a text in an explanation: where it stands (characters from start to end), and its number in a map."""

    word: str
    start: int
    end: int
    amount: float


def word_findings(cell_map: CellMap, trained: TrainedLdam, row: int, text: str, *, most: int = 8) -> list[WordFinding]:
    """The words of a text with the largest numbers, at most `most`, in reading order. text: the one of this row."""
    amount_L = cell_map.values_NTV[row, :, 0]
    places = spans(text)[: trained.longest]
    best = amount_L[: len(places)].abs().argsort(descending=True, stable=True)[:most].tolist()
    return [
        WordFinding(word=text[slice(*places[i])], start=places[i][0], end=places[i][1], amount=float(amount_L[i]))
        for i in sorted(best)
        if amount_L[i]
    ]


def judge_word_maps(model: Ldam, texts: TextWords, tick: Callable[[], object] = lambda: None) -> dict[str, MapVerdict]:
    """Whether each map points at what the model uses, on these texts. What is explained of each is the label that
    `texts` names. tick: as of `attnzoo.clinical.faithfulness.Ticking`."""
    logit, found = LabelLogit(model), dict[str, MapVerdict]()
    maps = [word_attention(model, texts)]
    try:
        maps.append(word_gradients(logit, texts))
    except ValueError as error:
        found[GRADIENTS] = MapVerdict(beats_random=None, words=f"{GRADIENTS} could not be measured: {error}")
    rarity_W = model.get_buffer("rarity_W") if model.config.skip else torch.ones(model.config.vocab_size)
    for name, one in faithfulness(Ticking(logit, tick), texts, maps, plain=word_rarity(rarity_W, texts)).items():
        words = one.words.replace("random cells", "random words").replace("at cells", "at words")
        found[name] = MapVerdict(beats_random=one.beats_random, words=f"On {counted(len(texts), 'text')} {words}")
    return {name: found[name] for name in (GRADIENTS, ATTENTION)}
