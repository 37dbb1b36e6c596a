"""What every attention variant must keep; `verify_contract` checks all of it."""

from collections.abc import Callable

from tests.contract.cases import Build
from tests.contract.forms import (
    check_by_hand,
    check_causality,
    check_defaults,
    check_gradients,
    check_low_precision,
    check_packing,
    check_reference,
    check_shift,
)
from tests.contract.promises import check_cost, check_empty, check_implementations, check_refusals, check_storage
from tests.contract.saved import check_saved
from tests.contract.seeing import ITEMS as SEEING
from tests.contract.served import check_served
from tests.contract.streaming import (
    check_batch,
    check_empty_chunk_keeps_state,
    check_partitions,
    check_rows,
    check_saved_state,
    check_state,
    check_unequal_batch,
)

ITEMS: dict[str, Callable[[Build], None]] = {
    "defaults": check_defaults,
    "reference": check_reference,
    "by_hand": check_by_hand,
    "state": check_state,
    "low_precision": check_low_precision,
    "partitions": check_partitions,
    "saved_state": check_saved_state,
    "causality": check_causality,
    "unequal_batch": check_unequal_batch,
    "empty_chunk": check_empty_chunk_keeps_state,
    "packing": check_packing,
    "rows": check_rows,
    "gradients": check_gradients,
    "shift": check_shift,
    **SEEING,
    "cost": check_cost,
    "storage": check_storage,
    "batch": check_batch,
    "refusals": check_refusals,
    "implementations": check_implementations,
    "empty": check_empty,
    "saved": check_saved,
    "served": check_served,
}


def verify_contract(build: Build) -> None:
    """Raises AssertionError at the first promise that the variant made by `build` does not keep."""
    for check in ITEMS.values():
        check(build)
