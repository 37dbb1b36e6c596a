"""Measures retrieval with a cache policy: accuracy by task, condition and seed."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from attnzoo.kvcache import CachePolicy
from attnzoo.models import DecoderLM
from attnzoo.tasks.examples import Example
from scripts.caches.protocol import CONDITIONS, ask

Maker = Callable[[str, int], Example]
"""(task, seed) -> example; all seeds of a task give contexts of one length."""
Batches = dict[tuple[str, int], list[list[Example]]]
"""(task, seed of the benchmark) -> batches of examples whose tensors have the same shapes."""
SEED_STRIDE = 1_000_000
"""Difference between the examples' seeds of two seeds of the benchmark."""


@dataclass
class Score:
    """right: answers by (task, condition, seed). nbytes, peak_nbytes: of one sequence, the most of all examples (a peak
    of 0 was not measured). tokens, seconds: of decoding."""

    right: dict[tuple[str, str, int], list[bool]] = field(default_factory=lambda: defaultdict(list))
    nbytes: int = 0
    peak_nbytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def accuracy(self, task: str | None = None, condition: str | None = None, seed: int | None = None) -> float:
        """Fraction of right answers for a task, condition and seed (None: for all). All tasks and conditions have equal
        weight. NaN if there are no answers."""
        groups = defaultdict(list)
        for (one, where, number), answers in self.right.items():
            if task in (None, one) and condition in (None, where) and seed in (None, number):
                groups[one, where].extend(answers)
        if not groups:
            return float("nan")
        return sum(sum(answers) / len(answers) for answers in groups.values()) / len(groups)


def make_batches(make: Maker, tasks: Iterable[str], seeds: int, count: int, batch: int) -> Batches:
    """`count` examples of each task and seed, grouped by shape into batches of at most `batch`."""
    batches: Batches = {}
    for task in tasks:
        for seed in range(seeds):
            examples = [make(task, (seed + 1) * SEED_STRIDE + number) for number in range(count)]
            batches[task, seed] = _batched(examples, batch)
    return batches


def _batched(examples: Iterable[Example], batch: int) -> list[list[Example]]:
    groups: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in examples:
        groups[_shape(example)].append(example)
    return [group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)]


def _shape(example: Example) -> tuple[int, ...]:
    asked = example.questions[:2]
    return (len(example.body), *(len(part) for q in asked for part in (q.prompt, q.lead, q.answer)))


def ask_all(model: DecoderLM, batches: Batches, policy: CachePolicy, chunk: int, tick: Callable[[int], None]) -> Score:
    """Asks all questions with a policy; prompts are read in chunks of `chunk` tokens. tick: called with the number of
    finished examples."""
    result = Score()
    for (task, seed), groups in batches.items():
        for examples in groups:
            told = ask(model, examples, policy, chunk=chunk)
            for answer in told.answers:
                result.right[task, answer.condition, seed].append(answer.right)
            result.nbytes = max(result.nbytes, told.nbytes)
            result.peak_nbytes = max(result.peak_nbytes, told.peak_nbytes)
            result.tokens += told.tokens
            result.seconds += told.seconds
            tick(len(examples))
    return result


def keep_answered(batches: Batches, full: Score, count: int, batch: int) -> Batches:
    """For each task and seed, the first `count` examples that the full cache answers under all conditions, in batches.

    full: the full cache's answers to `batches`. Tasks with fewer such examples for any seed are left out.
    """
    kept: Batches = {}
    for (task, seed), groups in batches.items():
        examples = [example for group in groups for example in group]
        right = zip(*(full.right[task, where, seed] for where in CONDITIONS), strict=True)
        answered = [example for example, all_of in zip(examples, right, strict=True) if all(all_of)]
        if len(answered) >= count:
            kept[task, seed] = _batched(answered[:count], batch)
    seeds = {seed for _, seed in batches}
    return {key: cut for key, cut in kept.items() if all((key[0], seed) in kept for seed in seeds)}


def solved_tasks(full: Score, tasks: Iterable[str], least: float) -> list[str]:
    """Tasks whose accuracy with the full cache is at least `least` under every condition. On others a compressed cache
    could not do worse."""
    return [task for task in tasks if all(full.accuracy(task, where) >= least for where in CONDITIONS)]
