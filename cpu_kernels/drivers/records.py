"""The records that Python and compiled drivers share, see `jit.record`.

    Group  the control block of a pool group: what its threads wait for, and the ring of entries
    Entry  a job under way: a copy of the launched `Job`, and its phases
    Job    one forward of one layer, and what routing found  ->  Layer  its kernels and strips
    GraphJob  a job that a GPU's stream posts, over and over  ->  Job, Group, Mask, Counters
    Watcher   the thread that reads mailboxes: Post, a mailbox and what is under way there
    Trace  what a group's threads did, and when  ->  Span

Addresses that kernels get are plain integers (i64), and say what lies there. Words that one thread
writes while another may read are `shared`; those on which threads spin have a line to themselves.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.jit.record import (
    LINE,
    Record,
    array,
    f32,
    i32,
    i64,
    inline,
    pointer,
    shared,
    shared_line,
    u8,
)
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS

MAX_POOLS = 8
MAX_PHASES = 4
RING = 16
MAX_POSTS = 1024

CLAIM_BITS = 24
"""A claim word is sequence << CLAIM_BITS | next task."""

NO_ROOM = -(1 << 62)
"""What `try_launch` returns when the ring is full."""

ENCODE, GATE_UP, DOWN, DOWN_BY_PAIR, COMBINE, ZERO, LINEAR, ATTEND, MERGE = range(9)
"""Kinds of phases: what `phases.run_task` does."""

ATTENTION_SPLIT = 256
"""Keys that `kernels.attention_kernels` takes at a time, on which the bits of its results depend:
scores and weights of eight rows are 12 KB, and the partials that a split leaves are 1/27 of what it
reads (keys and values of 64 dimensions)."""

COMPUTED_HERE, ON_GPU, ELSEWHERE = range(3)
"""What a mask says of an expert."""

IDS_PASS, IDS_COUNT, IDS_FAULT = range(3)
"""What ids out of range mean: nothing, are counted, are a fault as well."""

ERROR_TIMEOUT, ERROR_STUCK, ERROR_STOPPED = range(1, 4)
"""Why a run was given up."""

SPAN_SUBMIT, SPAN_TASK, SPAN_WAIT = range(3)
"""What a thread did in a span of a trace."""

SPAN_KINDS = 16
"""A task's `Span.detail` is SPAN_KINDS * index of its phase + kind of the phase."""


class TilePlan(Record):
    """A `library.Tiling`: how tokens of an expert are cut into tiles."""

    most = i64  # tokens of a tile
    unit = i64  # of which all tiles but the last have a multiple
    groups = i64  # of a strip that several tiles meet in turn
    unpack = i64  # kernel that prepares these, or 0
    kernels = i64[MOST_BLOCK_TOKENS]  # dot kernels by tokens, from 1


class StripSizes(Record):
    """A `formats.strips.StripLayout`."""

    groups = i64  # K / 32
    strip_bytes = i64


class Products(Record):
    """How the strips of a projection meet encoded rows: its format's kernels and sizes."""

    strips = inline(StripSizes)
    direct = inline(TilePlan)
    tiled = inline(TilePlan)
    tiled_from = i64  # tokens of an expert that are cut by `tiled`; fewer by `direct`
    gather = i64  # kernel
    encoded_bytes = i64  # of an encoded group
    row_bytes = i64  # of an encoded row
    enter = (
        i64  # what a thread calls before it multiplies, or 0: where a layer's projections differ
    )


class Expert(Record):
    """A pool's share of an expert. That of pool 0 is the last to be written, and its `gate_up` the
    last word of all: whoever finds an address there finds the whole expert."""

    gate_up = shared  # address of the gate/up strips, 0: not loaded
    down = i64  # of the down strips
    # addresses of the float32 biases of row 0 of the expert, if the pool had that row: its own lie
    # behind its strips (strips/share.py), those of matrices without any in zeros for all rows
    gate_bias = i64
    up_bias = i64
    down_bias = i64


class Move(Record):
    """An expert's new entries in a layer's table and mask."""

    shares = array(inline(Expert))  # [pools], in the table
    entries = array(inline(Expert))  # [pools], what these become
    pools = i64
    mask = array(u8)  # its byte
    state = i64  # COMPUTED_HERE, ...
    applied = shared


class Split(Record):
    """A batch's routing, cut into the experts that run now and those that run later."""

    tokens = i64
    ids = array(i64)  # [T][k]
    scores = array(f32)  # [T][k]
    now = array(i64)  # [T][k]: ids, and -1 elsewhere
    later = array(i64)  # [T][k]
    top_k = i64
    experts = i64
    protected = i64  # slots of a token that must run now
    protects = array(u8)  # [experts], scratch


class MatrixShare(Record):
    """A pool's share of a dense layer's matrix, some of its strips."""

    units = i64  # strips of the pool in front of these, those of matrices before this one
    strips = i64  # address of the strips
    first = i64  # number of the first of them in the matrix
    rows = i64  # of the whole matrix
    column = i64  # of the output where row 0 goes: rows of the matrices before this one
    bias = i64  # address of float32 [64 * strips of the matrix]


class Layer(Record):
    """What does not change once a layer is ready, but for the tables of experts and some counters.
    One of experts, or a dense one: matrices that all tokens meet."""

    # Pairs of all launches so far: of experts that the mask puts on the GPU, and of those that are
    # computed here. Written at every launch, so away from what all workers read.
    hot = shared_line
    cold = shared_line
    # Of an expert layer likewise, for `use_counts`: launches, their tokens, and the experts that
    # they read, each once however many tokens use it. Of every layer: how long the pool was at it.
    launches = shared_line
    tokens = shared_line
    read_experts = shared_line
    busy_ns = shared_line
    label = i64  # what a trace calls its jobs, see `trace.label`
    experts = i64  # 0: a dense layer
    hidden = i64
    intermediate = i64
    encode = i64  # kernels
    activate = i64
    combine = i64
    weigh = i64
    add = i64
    clear = i64
    finish = i64
    finish_float = i64
    deliver = i64
    enter = i64  # what a thread calls before its first and
    leave = i64  # after its last task of a job, or 0
    parameters = i64  # float32 [3]: limit, alpha, up offset
    workers = array(i64)  # [pools]
    packed = array(inline(Expert))  # [E][pools]
    routed = array(shared)  # [E] pairs of all routings so far, wherever the expert is; or 0
    blocks = array(i64)  # [pools + 1] first 32-row block of the intermediate of each pool
    strips = array(i64)  # [pools + 1] first strip of the hidden rows of each pool
    gate_up = inline(Products)  # of a dense layer all its matrices
    down = inline(Products)
    matrices = i64  # of a dense layer
    shares = array(inline(MatrixShare))  # [pools][matrices + 1]; the last one's `units` is the sum


class Attention(Record):
    """Query tokens over cached keys and values, see `attention_tasks`. B sequences, Q query tokens,
    G query heads for each of H key heads. The query tokens are the last ones of the keys; a row is
    a query head and token of one key head. All states are bf16."""

    attend = i64  # kernels
    merge = i64
    workers = array(i64)  # [pools]
    key_dim = i64
    value_dim = i64
    partial_bytes = i64
    visible_bytes = i64  # of a worker's scratch, in front of the kernel's
    partials = i64  # [B][H][splits][rows]
    # of one call
    sequences = i64  # B
    key_heads = i64  # H
    queries = i64  # Q
    rows = i64  # G * Q
    keys = i64  # of each sequence, those of the query tokens among them
    splits = i64  # most of one sequence
    window = i64  # keys that a token sees at most, its own among them, or 0
    first = array(i64)  # [B] first key that is no padding, or 0
    scale = i64  # address of a float32
    sinks = i64  # address of the scores of H * G sinks,
    sink_bytes = i64  # each a bf16 or a float32; 0: there are none
    query_states = i64  # [B][H * G][Q][key_dim]
    key_states = i64  # of key 0 of head 0 of sequence 0, and bytes between
    key_sequence_bytes = i64
    key_head_bytes = i64
    key_bytes = i64
    value_states = i64
    value_sequence_bytes = i64
    value_head_bytes = i64
    value_bytes = i64
    out = i64  # [B][Q][H * G][value_dim]


class Job(Record):
    """One forward of one layer. T tokens, k ids each, E experts. Of the inputs only x is read after
    the launch, and that only where no `x_copy` has been taken."""

    layer = pointer(Layer)
    tokens = i64
    top_k = i64
    x = i64  # bf16 [T][hidden]
    ids = array(i64)  # [T][k]
    weights = array(f32)  # [T][k]
    skip = array(u8)  # [E] or 0: experts that contribute nothing here, see COMPUTED_HERE, ...
    out = shared  # address of the output [T][hidden]; elsewhere once the job is given up
    out_size = i64  # bytes of a value of it: 2 for bf16, 4 for float32
    out_tokens = i64  # of a dense layer: the output is [matrix][out_tokens][rows], and the job's
    out_first = i64  # first token is this one of it
    pools = i64
    # what routing works in and writes; "active" experts have pairs
    counts = array(i32)  # [E + 1]
    active_expert = array(i32)  # [active]
    active_start = array(i32)  # [active + 1] first pair of each active expert
    pair_token = array(i32)  # [T * k] grouped by expert in ascending id
    pair_weight = array(f32)  # [T * k]
    pair_x = array(i64)  # [T * k] address of the token's encoded row
    x_rows = i64  # encoded inputs [T]; of a dense layer in tiles
    h_rows = i64  # encoded intermediates [T * k], in tiles of each expert's pairs
    pair_rows = i64  # float32 [strips][pairs][64]: what each pair adds to the output; or 0
    # what tasks work in
    scratch = i64
    scratch_bytes = i64  # of one worker; in them:
    sums_offset = i64
    x_offset = i64  # gathered tiles of inputs
    unpacked_offset = i64
    out_offset = i64
    inline_encode = i64  # 1: the publisher encodes the inputs, which is no phase then
    x_copy = i64  # where the launch copies x to, unless it encodes it; 0: x stays as it is
    # what routing found
    active = i64  # number of active experts
    most = i64  # most tokens of one expert
    pairs = i64  # of all of them
    hot = i64  # pairs of experts that are on the GPU
    ignored = i64  # ids out of range
    missing = i64  # 1 + an expert that is not loaded and not skipped, or 0
    attention = pointer(Attention)  # or 0: a layer's job


class Phase(Record):
    """A part of a job: tasks that may run at the same time, behind all tasks of the phase before.

    A thread that the system has put aside for long may look at a phase of a later job. What it may
    see is shared; the rest is read by those who have claimed a task.
    """

    kind = i64  # ENCODE, ...
    units = i64[MAX_POOLS]  # which tasks share evenly
    tasks = shared[MAX_POOLS]
    total = shared  # tasks, all pools
    done = shared_line  # finished tasks
    claims = shared_line[MAX_POOLS]


class Entry(Record):
    """A place in the ring, which job after job uses: every claim word has the job's number."""

    sequence = shared
    phase_count = shared
    begun = shared  # when it was published, nanoseconds of CLOCK_MONOTONIC
    task_ns = shared  # what the largest task takes a slow thread, see `patience`
    job = inline(Job)
    phases = inline(Phase)[MAX_PHASES]  # the last one writes the output


class EventCount(Record):
    """Threads that sleep until something happens, see `worker`."""

    epoch = shared_line  # futex word: bumped when it happens
    sleepers = shared_line  # threads that are about to sleep on it


class Group(Record):
    """The control block of a pool group."""

    submitted = shared_line  # number of the newest job that is published,
    completed = shared_line  # and of the newest that is complete: they end in this order
    work = inline(EventCount)  # for workers: a job is there to work on
    done = inline(EventCount)  # for waiters: a job is complete, or worker 0 has left
    phase_done = inline(EventCount)  # for both: a phase is over
    stop = shared_line
    lock = shared_line  # of who fills the next entry, see `lock`
    abandoned = shared_line  # newest job that was given up: the group is stuck until it is complete
    worker0 = shared_line  # 1 while somebody is worker 0
    spin_ns = shared  # how long an idle worker spins before it sleeps,
    wait_spin_ns = i64  # and whoever waits for a phase, a job or a lock
    futex = i64  # number of the system call
    timeout_ns = i64  # of one wait of a caller,
    timeout = i64[2]  # and the same as a struct timespec
    trace = shared  # address of a `Trace`, or 0: nobody traces
    ended = (
        shared_line  # when the newest job that is complete ended; its one writer is who ended it
    )
    ring = inline(Entry)[RING]


class Span(Record, alignment=LINE):
    """What a thread did from when to when, nanoseconds of CLOCK_MONOTONIC."""

    begin = i64
    end = i64
    kind = i64  # SPAN_SUBMIT, ...
    thread = i64  # of a task its worker, else the number that the system gives the thread
    sequence = i64  # of the job
    detail = i64  # of a submission the job's tokens; of a task see SPAN_KINDS
    label = i64  # of a submission that of the job's layer
    written = shared  # 1 once all others are


class Trace(Record, alignment=LINE):
    """Where the threads of a group write what they do. Nobody waits for room."""

    taken = shared_line  # spans so far; those from `room` on are not kept
    room = i64
    gettid = i64  # number of the system call
    spans = array(inline(Span))


class Counters(Record, alignment=LINE):
    """What the runs of a layer's graph jobs have met. Counts only grow; several threads add."""

    ignored = shared  # ids out of range, of jobs that count them
    missing = shared  # runs that met an expert that is neither loaded nor skipped,
    missing_expert = shared  # the latest
    errors = shared  # runs that were given up,
    error = shared  # why the latest was: ERROR_TIMEOUT, ...
    waited_ns = shared  # how long that had waited in vain at least


class Faults(Record):
    """What a process's graph jobs have met; only grows."""

    runs = shared  # that went wrong,
    closed_runs = shared  # of them those of layers that were gone


class Mask(Record):
    """The mask of a layer as its latest launch saw it."""

    lock = shared  # of who launches a run of the layer, never while the pool is waited for
    epoch = i64  # grows by one at every launch that finds the mask changed
    experts = i64
    live = array(u8)  # [E], which others change at any time
    seen = array(u8)  # [E]


class GraphJob(Record):
    """A job over fixed buffers that a stream posts and awaits, in a graph over and over."""

    group = pointer(Group)
    job = pointer(Job)  # what each launch copies into the ring
    mask = pointer(Mask)  # the layer's
    counters = pointer(Counters)  # the layer's
    faults = pointer(Faults)  # the process's
    hidden = i64  # of the layer
    ignored_ids = i64  # IDS_PASS, ...
    timeout_ns = i64  # without any task of the group ended, beside Entry.task_ns
    dump = i64  # where a job that nobody waits for any more writes its output
    closed = i64  # 1: the layer is gone, and whoever replays the job gets NaN
    seen_progress = i64  # how far the pool was when the visit under way last saw progress,
    seen_at = i64  # and when that was, nanoseconds; or when its job was given up
    sequence = shared  # of the latest launch; 0 when it was not published
    abandoned = shared  # newest launch that its waiter gave up
    epoch = shared  # of the mask in the latest launch
    visits = shared  # of streams that are over: for them nothing here is touched any more


class Mailbox(Record, alignment=LINE):
    """Two words in pinned memory through which a GPU's stream hands over jobs."""

    posted = shared  # the GPU writes the address of a graph job; the watcher clears it
    done = shared  # the watcher writes 1; the GPU clears it


class Post(Record, alignment=LINE):
    """A mailbox of a watcher, and what is under way there."""

    mailbox = shared  # its address, or 0: unused
    graph_job = pointer(GraphJob)  # or 0: nothing
    sequence = i64  # of its launch, or 0 while the ring has no room
    error = i64  # why it is being given up, or 0


class Watcher(Record):
    """The thread that reads mailboxes."""

    stop = shared_line
    count = shared_line  # posts in use, released after one is filled in
    nap_word = shared_line  # futex word of naps, which nobody bumps
    futex = i64  # number of the system call
    hot_ns = i64  # how long to spin after the last sign of life,
    nap = i64[2]  # struct timespec of the naps that follow
    posts = inline(Post)[MAX_POSTS]
