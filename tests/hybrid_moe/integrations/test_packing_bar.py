"""The bar adds up to what it expects, and says bytes a second and the time left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.integrations.transformers.packing_bar import PackingBar


@given(nbytes=st.integers(0, 10**12), total=st.integers(1, 300))
def test_even_parts_add_up(nbytes: int, total: int) -> None:
    added: list[int] = []
    with PackingBar("", shown=False) as bar:
        bar.add = added.append  # type: ignore[method-assign]
        progress = bar.each(nbytes)
        for done in range(1, total + 1):
            progress(done, total)
    assert sum(added) == nbytes and max(added) - min(added) <= 1


def test_what_it_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with PackingBar("Loading weights", shown=True) as bar:
        bar.expect(4 * 10**9)
        bar.add(10**9)
        bar._bar.refresh()
    assert "1.00G/4.00G" in (said := capsys.readouterr().err) and "B/s]" in said
