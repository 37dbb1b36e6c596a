"""Every registered variant keeps the contract; `pytest tests/contract -k <kind>` runs one variant."""

import functools

import pytest

from tests.contract.cases import all_cases, build_case, case_name
from tests.contract.contract import ITEMS


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case_name(*case))
def test_contract(case: tuple[str, dict], item: str) -> None:
    ITEMS[item](functools.partial(build_case, *case))
