"""Fingerprints: every bit of every word counts, whoever computes them."""

from __future__ import annotations

import multiprocessing

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.drivers.hash_memory import MULTIPLIER
from hybrid_moe.cpu_kernels.fingerprint import BLOCK, fingerprints

Words = npt.NDArray[np.int64]
WORD = st.integers(-(2**63), 2**63 - 1)


def of(*arrays: Words, threads: int = 1) -> list[tuple[int, ...]]:
    return fingerprints([(a.ctypes.data, a.nbytes) for a in arrays], threads)


def model(words: list[int]) -> int:
    """The documented function in Python's integers."""

    def signed(value: int) -> int:
        value &= 2**64 - 1
        return value - 2**64 if value >> 63 else value

    def mix(state: int, word: int) -> int:
        product = signed((state ^ word) * MULTIPLIER)
        return product ^ (product >> 32)

    whole = len(words) // 8 * 8
    lanes = list(range(1, 9))
    for i in range(whole):
        lanes[i % 8] = mix(lanes[i % 8], words[i])
    state = lanes[0]
    for value in [*lanes[1:], len(words), *words[whole:]]:
        state = mix(state, value)
    return state


@given(st.lists(WORD, max_size=40))
def test_compiled_code_computes_the_model(words: list[int]) -> None:
    assert of(np.array(words, np.int64)) == [(model(words),)]


@given(st.lists(WORD, min_size=1, max_size=40), st.data())
def test_a_change_is_seen(words: list[int], data: st.DataObject) -> None:
    before = np.array(words, np.int64)
    after = before.copy()
    changed = data.draw(st.sets(st.integers(0, len(words) - 1), min_size=1))
    bit = data.draw(st.integers(0, 63))
    after[list(changed)] ^= np.uint64(1 << bit).astype(np.int64)
    assert of(before) != of(after)


@pytest.mark.parametrize("bit", [15, 31, 47, 63])
@pytest.mark.parametrize("step", [1, 2, 8, 16])
def test_signs_that_turn_together_do_not_cancel(bit: int, step: int) -> None:
    words = np.zeros(64, np.int64)
    flipped = words.copy()
    flipped[::step] ^= np.uint64(1 << bit).astype(np.int64)
    assert of(words) != of(flipped)


def test_order_and_length_count() -> None:
    words = np.arange(64, dtype=np.int64)
    swapped = words.reshape(8, 8)[[1, 0, 2, 3, 4, 5, 6, 7]].copy()
    assert len({*of(words), *of(swapped), *of(words.reshape(8, 8).T.copy()), *of(words[:56])}) == 4
    assert of(np.zeros(0, np.int64)) != of(np.zeros(1, np.int64))


@pytest.mark.parametrize("size", [0, 8, BLOCK - 8, BLOCK, BLOCK + 8, 5 * BLOCK])
def test_threads_do_not_matter(size: int) -> None:
    rng = np.random.default_rng(size)
    arrays = [rng.integers(-(2**63), 2**63 - 1, size // 8) for _ in range(3)]
    alone = of(*arrays)
    assert [len(blocks) for blocks in alone] == [max(1, -(-size // BLOCK))] * 3
    for threads in (2, 3, 7):
        assert of(*arrays, threads=threads) == alone


def _in_child(expected: list[tuple[int, ...]], queue: multiprocessing.SimpleQueue[bool]) -> None:
    words = np.arange(5 * BLOCK // 8, dtype=np.int64)
    queue.put(of(words, threads=2) == expected)


def test_a_forked_child_has_threads_of_its_own() -> None:
    expected = of(np.arange(5 * BLOCK // 8, dtype=np.int64), threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(expected, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and queue.get()


@pytest.mark.parametrize("span", [(4096, 12), (4097, 16)])
def test_pieces_of_words_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        fingerprints([span], 1)
