"""Whatever order streams, workers and watcher choose, results are those of the layers alone.

Each case runs a few hundred programs. Ten thousand in all:

    python -m pytest tests/streams/test_hand_over.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.streams.programs import programs


@pytest.mark.parametrize("deferred", [0, 1])
@pytest.mark.parametrize("flags", [True, False], ids=["flags", "host functions"])
@given(st.data())
def test_any_program_in_any_order(flags: bool, deferred: int, data: st.DataObject) -> None:
    data.draw(programs(flags=flags, deferred=deferred)).run()
