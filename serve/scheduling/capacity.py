"""Whether there is room for one more sequence: slots, groups and bytes, as integers."""

from collections.abc import Collection
from dataclasses import dataclass, field

from serve.scheduling.plan import Entry, Group


@dataclass(frozen=True)
class Capacity:
    """slots: sequences over all groups. groups: those besides `default_group` that may run at the same time. nbytes:
    limit of the sum of the demands; None: there is none. row_bytes: by group, the measured bytes of a row, which may be
    more than the demand."""

    slots: int
    groups: int
    nbytes: int | None
    default_group: Group
    row_bytes: dict[Group, int] = field(default_factory=dict)

    def fits(self, entry: Entry, running: Collection[Entry], ending: Collection[Entry] = ()) -> bool:
        """Whether the request may run beside those in `running`. ending: of these, prompts that are read whole in this
        step."""
        if len(running) >= self.slots:
            return False
        others = {other.group for other in running} - {self.default_group}
        if entry.group not in (*others, self.default_group) and len(others) >= self.groups:
            return False
        ending = (*ending, entry) if entry.left else ending
        return self.nbytes is None or self.taken((*running, entry), ending) <= self.nbytes

    def delays(self, entry: Entry, running: Collection[Entry]) -> bool:
        """Whether the request, if it ran, would take what another may wait for: the last slot, a group or memory."""
        takes_bytes = self.nbytes is not None and entry.demand.most > 0
        return self.slots - len(running) < 2 or entry.group != self.default_group or takes_bytes

    def exceeded(self, running: Collection[Entry]) -> bool:
        """Whether sequences that run take more than there is."""
        return self.nbytes is not None and self.taken(running) > self.nbytes

    def taken(self, running: Collection[Entry], ending: Collection[Entry] = ()) -> int:
        """Bytes of sequences that run. All rows of a group are as large as its largest row. Of the states of prompts in
        `ending`, which are read one after the other, only one exists at a time."""
        rows: dict[Group, int] = {}
        largest = dict(self.row_bytes)
        total = max((entry.demand.prompt_bytes for entry in ending), default=0)
        for entry in running:
            demand = entry.demand
            total += demand.own_bytes
            if entry.left and entry not in ending:
                total += demand.prompt_bytes
            rows[demand.group] = rows.get(demand.group, 0) + 1
            largest[demand.group] = max(largest.get(demand.group, 0), demand.row_bytes)
        return total + sum(count * largest[group] for group, count in rows.items())
