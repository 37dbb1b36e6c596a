"""PH-LLM's sensor adapter: numbers of a person's sensors become virtual tokens that a frozen language model reads.

Source: "Towards a Personal Health Large Language Model" (Cosentino et al. 2024, arXiv 2406.06474): 40 numbers, the
means and variances of 20 daily sensors over 15 days, standardised, go through

    h = ReLU(W_i h), i = 1..4, of width 40,     virtual tokens = W h, M rows of the language model's width

and stand between the texts of a prompt. A yes/no question is answered by the log likelihoods of its two answers:

    score = log P(yes | before, virtual tokens, after) - log P(no | before, virtual tokens, after).

The language model is any `DecoderLM`, and its weights stay as they are: gradients only pass through it. What stands
before the virtual tokens does not depend on the adapter, so its state is computed once (`PromptedLM`).

Differs from the paper: the virtual tokens are in units of the root mean square of the language model's embeddings, so
that they begin at the size of tokens whatever the model; the loss is the cross entropy of the two answers alone.

Letters: N rows, F numbers, M virtual tokens, Q questions, A answers, R sequences that are read at once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.models.decoder_lm import DecoderLM, DecoderState
from attnzoo.types import CheckedConfig, build_config


@dataclass(frozen=True, kw_only=True)
class SensorConfig(CheckedConfig):
    """Sizes of a `SensorAdapter`. numbers: of a row. width: of the language model's embeddings. tokens: virtual tokens.
    hidden, layers: width and number of the maps with ReLU. dropout: after each of them."""

    numbers: int
    width: int
    tokens: int = 10
    hidden: int = 40
    layers: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("numbers", "width", "tokens", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SensorConfig":
        """Reads what `to_dict` wrote. Raises ValueError for unknown keys."""
        return build_config(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)


class SensorAdapter(nn.Module):
    """virtual_NMD of numbers_NF, in units of the language model's embeddings."""

    def __init__(self, config: SensorConfig) -> None:
        super().__init__()
        self.config = config
        width, maps = config.numbers, []
        for _ in range(config.layers):
            maps += [nn.Linear(width, config.hidden), nn.ReLU(), nn.Dropout(config.dropout)]
            width = config.hidden
        self.hidden = nn.Sequential(*maps)
        self.output = nn.Linear(width, config.tokens * config.width)
        for module in self.hidden:
            if isinstance(module, nn.Linear):  # numbers keep their size on the way, and tokens differ from the start
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.output.weight, std=width**-0.5)
        nn.init.zeros_(self.output.bias)

    def forward(self, numbers_NF: Tensor) -> Tensor:
        """Raises ValueError for another number of numbers."""
        config = self.config
        if numbers_NF.dim() != 2 or numbers_NF.shape[1] != config.numbers:
            raise ValueError(f"numbers_NF has shape {tuple(numbers_NF.shape)}; give {config.numbers} numbers a row")
        out: Tensor = self.output(self.hidden(numbers_NF))
        return out.view(-1, config.tokens, config.width)


def embedding_unit(lm: DecoderLM) -> float:
    """The root mean square of a language model's embeddings."""
    return float(lm.embedding.weight.float().square().mean().sqrt())


def as_embeddings(virtual_NMD: Tensor, lm: DecoderLM, unit: float) -> Tensor:
    """Virtual tokens, which are in units of `embedding_unit`, as the language model reads them."""
    return (virtual_NMD * unit).to(lm.embedding.weight.dtype)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a question: what stands before the virtual tokens, what stands after them, and every answer."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.before:
            raise ValueError("a prompt has no token before the virtual ones; begin it with a text or a begin token")
        if len(self.answers) < 2 or not all(self.answers):
            raise ValueError(f"answers={self.answers}: give at least two answers, of at least one token each")
        if len(set(self.answers)) < len(self.answers):
            raise ValueError(
                f"answers={self.answers}: two answers have the same tokens, so nothing can tell them apart"
            )

    def tails(self) -> list[tuple[int, ...]]:
        """What the model reads after the virtual tokens to tell each answer's probability; its last token is only
        predicted. Answers of one token have the same."""
        return [(*self.after, *answer[:-1]) for answer in self.answers]


class PromptedLM:
    """A frozen language model that reads virtual tokens inside prompts.

    The state of what stands before the virtual tokens is kept, [Q] sequences. Not a module: whoever trains an adapter
    neither trains, stores nor moves the language model with it. Raises ValueError for prompts of different numbers of
    answers.
    """

    def __init__(self, lm: DecoderLM, prompts: Sequence[Prompt]) -> None:
        self.lm, self.prompts = lm.eval().requires_grad_(False), tuple(prompts)
        counts = {len(prompt.answers) for prompt in self.prompts}
        if len(counts) != 1:
            raise ValueError(f"prompts have {sorted(counts)} answers; give one or more prompts with equally many")
        (self.answers,) = counts
        self.unit = embedding_unit(lm)
        self._sequences: list[tuple[int, tuple[int, ...]]] = []
        """(question, tail) of every sequence that is read for a row."""
        places: list[tuple[int, int, tuple[int, ...]]] = []
        """(sequence, tokens of its tail before the answer, the answer) of every question and answer."""
        for question, prompt in enumerate(self.prompts):
            for tail, answer in zip(prompt.tails(), prompt.answers, strict=True):
                if (question, tail) not in self._sequences:
                    self._sequences.append((question, tail))
                places.append((self._sequences.index((question, tail)), len(prompt.after), answer))
        self._places = places
        self._prefixes = self._read_prefixes()

    @torch.no_grad()
    def _read_prefixes(self) -> DecoderState:
        """The state after each question's first part."""
        device, before = self.lm.embedding.weight.device, [prompt.before for prompt in self.prompts]
        lengths = torch.tensor([len(ids) for ids in before], device=device)
        longest = int(lengths.max())
        ids_QT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in before], device=device)
        state = self.lm.init_state(len(before), longest)
        even = all(len(ids) == longest for ids in before)
        return self.lm.extend_hidden(ids_QT, state, None if even else lengths)[1]

    def to(self, device: torch.device) -> "PromptedLM":
        """Moves the language model to a device, if it is on another."""
        if self.lm.embedding.weight.device != device:
            self.lm.to(device)
            self._prefixes = self._prefixes.map(lambda _, tensor: tensor.to(device))
        return self

    def check_length(self, tokens: int) -> None:
        """Raises ValueError if a prompt with so many virtual tokens is longer than the model's context."""
        longest = max(len(self.prompts[q].before) + tokens + len(tail) + 1 for q, tail in self._sequences)
        if longest > self.lm.config.max_positions:
            raise ValueError(
                f"a prompt with {tokens} virtual tokens and its answer takes {longest} tokens; the language model's "
                f"context is {self.lm.config.max_positions}"
            )

    def log_likelihoods(self, virtual_NMD: Tensor) -> Tensor:
        """[N, Q, A], float32: the log probability of each answer after each question's prompt."""
        rows, tokens, _ = virtual_NMD.shape
        self.check_length(tokens)
        hidden_NRTD = self._hidden(virtual_NMD)
        # For every question and answer: the sequence it is told by, and the places whose next tokens it is made of.
        longest = max(len(answer) for _, _, answer in self._places)
        at = [
            [(sequence, tokens + after - 1 + min(i, len(answer) - 1)) for i in range(longest)]
            for sequence, after, answer in self._places
        ]
        wanted = sorted({place for places in at for place in places})
        sequence_P, token_P = (torch.tensor(x, device=hidden_NRTD.device) for x in zip(*wanted, strict=True))
        needed_PD = hidden_NRTD[:, sequence_P, token_P].flatten(0, 1)
        log_probs_NPV = self.lm.logits(needed_PD).float().log_softmax(-1).view(rows, len(wanted), -1)
        found = []
        for places, (_, _, answer) in zip(at, self._places, strict=True):
            terms = [log_probs_NPV[:, wanted.index(place), token] for place, token in zip(places, answer, strict=False)]
            found.append(torch.stack(terms).sum(0))
        return torch.stack(found, 1).view(rows, len(self.prompts), self.answers)

    def _hidden(self, virtual_NMD: Tensor) -> Tensor:
        """hidden_NRTD of virtual tokens and tails, continued from the kept states."""
        rows, _, width = virtual_NMD.shape
        count, device = len(self._sequences), virtual_NMD.device
        tails = [tail for _, tail in self._sequences]
        x_NRTD = as_embeddings(virtual_NMD, self.lm, self.unit)[:, None].expand(-1, count, -1, -1)
        if (longest := max(map(len, tails))) > 0:
            ids_RT = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=device)
            x_NRTD = torch.cat([x_NRTD, self.lm.embed(ids_RT).expand(rows, -1, -1, -1)], dim=2)
        order = torch.tensor([question for question, _ in self._sequences] * rows, device=device)
        state = self._prefixes.map(lambda _, tensor: tensor[order])
        # Padding stands behind what is read, and the states are not kept.
        hidden_BTD, _ = self.lm.extend_hidden(x_NRTD.flatten(0, 1), state)
        return hidden_BTD.view(rows, count, -1, width)


def answer_scores(log_likelihoods_NQA: Tensor) -> Tensor:
    """[N, Q]: log P(yes) - log P(no); the first answer of a prompt is no, the second yes."""
    return log_likelihoods_NQA[..., 1] - log_likelihoods_NQA[..., 0]
