"""What threads note down where somebody traces, see `cpu_kernels.trace`.

Off, a submission, a wait and a task cost one load each, of a word of the group that nobody writes,
and a branch. On, they read the clock twice and fill a line of memory: some 0.1 us.

    word         released by  acquired by           what it hands over
    Group.trace  Python       begin_span, end_span  a trace that is ready, and stays for good
    written      end_span     Python                the span
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import (
    driver,
    fetch_add,
    load_acquire,
    nanoseconds,
    store_release,
    system_call,
)
from hybrid_moe.cpu_kernels.drivers.records import Group, Trace

CALLER = -1
"""The thread that calls, in place of a worker's number."""


@driver
def begin_span(group: Group) -> int:
    """When a span begins, or 0 if nobody traces."""
    if load_acquire(group.trace) == 0:
        return 0
    return nanoseconds()


@driver
def end_span(
    group: Group, begin: int, kind: int, worker: int, sequence: int, detail: int, label: int
) -> None:
    """Note a span that ends now. `begin` is that of `begin_span`, and not 0."""
    address = load_acquire(group.trace)
    if address == 0:  # stopped in between
        return
    end = nanoseconds()
    trace = Trace.at(address)
    place = fetch_add(trace.taken, 1)
    if place >= trace.room:
        return
    thread = worker
    if worker == CALLER:
        thread = system_call(trace.gettid, 0, 0, 0, 0)
    span = trace.spans[place]
    span.begin = begin
    span.end = end
    span.kind = kind
    span.thread = thread
    span.sequence = sequence
    span.detail = detail
    span.label = label
    store_release(span.written, 1)  # for Python
