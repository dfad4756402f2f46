"""Whatever order streams, workers and watcher choose, results are those of the layers alone.

CI runs a few hundred programs; for a thorough run:

    HYPOTHESIS_PROFILE=thorough python -m pytest tests/streams/test_hand_over.py
"""

from __future__ import annotations

from hypothesis import given

from tests.streams.programs import Program, programs


@given(programs())
def test_any_program_in_any_order(program: Program) -> None:
    program.run()
