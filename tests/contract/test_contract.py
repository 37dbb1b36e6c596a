"""Every registered variant keeps the contract; `pytest tests/contract -k <kind>` runs one variant."""

import functools

import pytest

from tests.contract.cases import all_cases, build_case, case_name
from tests.contract.contract import ITEMS

CASES = [
    pytest.param(case, item, id=f"{case_name(*case)}-{item}")
    for case in all_cases()
    for item in ITEMS
    if not (case[1] and item == "defaults")  # it builds the variant without the case's options
]


@pytest.mark.parametrize(("case", "item"), CASES)
def test_contract(case: tuple[str, dict], item: str) -> None:
    ITEMS[item](functools.partial(build_case, *case))
