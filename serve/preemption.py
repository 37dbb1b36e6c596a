"""Sequences that make way for others, and go on later where they were.

Where the budget of `prefix_mib` has room for it, a sequence's state is kept: putting it back takes the time of a copy.
Otherwise its prompt is read anew, as far as it is not in the prefix cache, and its own tokens are given to the model
once more, one by one, as they were at first: read as a prompt they would round differently, and a cache that compresses
would keep others.
"""

from collections.abc import Mapping

from attnzoo.models.decoder_lm import DecoderState
from serve.faults import log
from serve.metrics import ServerMetrics
from serve.prefix import PrefixCache
from serve.request import Alone, Request
from serve.runner import Runner
from serve.scheduling import Scheduler

AHEAD = 256
"""Tokens for which memory is counted before they are generated. Counting all that a request may generate would keep
others away from memory that most requests never fill."""


class Preemption:
    """Sets sequences aside, and keeps account of what is kept of them."""

    def __init__(self, runner: Runner, prefixes: PrefixCache, metrics: ServerMetrics) -> None:
        self.runner, self.prefixes, self.metrics = runner, prefixes, metrics

    def make_room(self, scheduler: Scheduler, requests: Mapping[str, Request]) -> None:
        """Before a step: counts what sequences have grown, and sets aside whom the scheduler names."""
        for request in requests.values():
            self._grow(scheduler, request)
        for request_id in scheduler.victims():
            self.set_aside(scheduler, requests[request_id])

    def _grow(self, scheduler: Scheduler, request: Request) -> None:
        if request.room <= request.context:
            most = len(request.prompt) + request.params.max_tokens
            request.room = min(most, request.room + AHEAD)
            assert self.runner.full is not None
            scheduler.grows(request.request_id, self.runner.full.row_bytes(request.room))

    def set_aside(self, scheduler: Scheduler, request: Request) -> None:
        """Takes a running request out of its slot. Raises ValueError for one that does not run, or runs alone."""
        if isinstance(request.group, Alone):
            raise ValueError(f"request {request.request_id!r} reads or edits attention, and is never set aside")
        table = scheduler.tables[request.group]
        slot = table.slot_of(request.request_id)
        if slot < table.decoding and not request.repeats:
            request.aside = self._copied(request, slot)
        kept = request.aside is not None
        if not kept:
            self.prefixes.begin_again(request.request_id)
            request.known, request.generated = max(request.known, request.generated, key=len), []
        self.runner.release(request, scheduler.set_aside(request.request_id, kept=kept))
        self.metrics.preempted(kept=kept)

    def _copied(self, request: Request, slot: int) -> DecoderState | None:
        """The state of a sequence, for which the prefix cache has given memory; None where there is none."""
        nbytes = self.runner.held(request, slot)
        if not self.prefixes.tree.lend(nbytes):
            return None
        try:
            return self.runner.copy(request, slot)
        except Exception as failure:
            self.runner.check_device(failure)
            log("the state of a sequence could not be kept, and is computed anew", failure)
            self.prefixes.tree.take_back(nbytes)
            return None

    def forget(self, request: Request) -> None:
        """Gives up the kept state of a request, which has gone on or ended."""
        if request.aside is not None:
            self.prefixes.tree.take_back(request.aside.nbytes())
            request.aside = None
