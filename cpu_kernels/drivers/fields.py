"""Slots of the descriptors that Python fills in and compiled drivers read.

A descriptor is an array of int64; a slot holds an integer or an address. Python and drivers
both import these constants, so there is one list of them.
"""

from __future__ import annotations

MAX_POOLS = 8
MAX_TILE = 32  # tokens of the largest tile
STRIPS_AT_ONCE = 16  # of gate/up, before their activations
BATCH_TOKENS = 192  # of one expert that share a pass over its strips
UNPACK_GROUPS = 32  # groups of a strip that are unpacked at a time
SHARE_BYTES = 4096  # of the packed codes that come next, what each tile of a chunk fetches
LINE_SLOTS = 8  # int64 slots of a cache line


# How tokens of an expert are cut into tiles (`library.Tiling`), relative to L_DIRECT or L_TILED.

TILES_MOST = 0
TILES_UNIT = 1
TILES_GROUPS = 2
TILES_UNPACK = 3
TILES_KERNELS = 4  # [MAX_TILE]: by tokens, from 1
TILES_SLOTS = TILES_KERNELS + MAX_TILE

# Layer: constant once its experts are loaded.

L_EXPERTS = 0
L_HIDDEN = 1
L_INTERMEDIATE = 2
L_ENCODE = 3
L_GATHER = 4
L_ACTIVATE = 5
L_COMBINE = 6
L_CLEAR = 7
L_FINISH = 8
L_PARAMETERS = 9  # float32 [3]: limit, alpha, up offset
L_ENCODED_BYTES = 10  # of an encoded group
L_X_ROW_BYTES = 11  # encoded row of hidden inputs
L_H_ROW_BYTES = 12  # encoded row of intermediate inputs
L_TILED_FROM = 13  # tokens of an expert that are cut by L_TILED; fewer by L_DIRECT
L_GATE_BIAS = 14  # int64 [E]: address of float32 [intermediate, rounded up]
L_UP_BIAS = 15
L_DOWN_BIAS = 16
L_GATE_UP = 17  # int64 [pools][E]: address of the pool's gate/up strips, 0 = not resident
L_DOWN = 18
L_BLOCKS = 19  # int64 [pools + 1]: first 32-row block of the intermediate of each pool
L_STRIPS = 20  # int64 [pools + 1]: first strip of the hidden rows of each pool
L_ENTER = 21  # what a thread calls before its first and
L_LEAVE = 22  # after its last task of a job, or 0
L_GU_LAYOUT = 23  # of gate/up strips, LAYOUT_SLOTS slots
L_DN_LAYOUT = 26  # of down strips
L_DIRECT = 29  # TILES_SLOTS slots
L_TILED = L_DIRECT + TILES_SLOTS
L_WEIGH = L_TILED + TILES_SLOTS
L_ADD = L_WEIGH + 1
LAYER_SLOTS = L_ADD + 1

# A strip layout within a layer (`panels.StripLayout`), relative to L_GU_LAYOUT or L_DN_LAYOUT.

LAYOUT_GROUPS = 0  # K / 32
LAYOUT_GROUP_BYTES = 1
LAYOUT_STRIP_BYTES = 2
LAYOUT_SLOTS = 3

# Job: one forward of one layer. It lives in a slot of the group's ring and is reused, so every
# claim word carries the job's sequence number.

J_SEQUENCE = 0
J_LAYER = 1
J_TOKENS = 2
J_TOP_K = 3
J_POOLS = 4
J_X = 5  # bf16 [T][hidden], contiguous
J_IDS = 6  # int64 [T][k]
J_WEIGHTS = 7  # float32 [T][k]
J_SKIP = 8  # uint8 [E] or 0
J_OUT = 9  # bf16 [T][hidden]
J_COUNTS = 10  # int32 [E + 1] scratch of the router
J_ACTIVE_EXPERT = 11  # int32 [active]
J_ACTIVE_START = 12  # int32 [active + 1]: first pair of each active expert
J_PAIR_TOKEN = 13  # int32 [T * k], grouped by expert in ascending id
J_PAIR_WEIGHT = 14  # float32 [T * k]
J_PAIR_X = 15  # int64 [T * k]: address of the token's encoded row
J_X_ROWS = 17  # encoded inputs [T]
J_H_ROWS = 18  # encoded intermediates [T * k], in tiles of each expert's pairs
J_ACTIVE = 19  # results of routing: number of active experts,
J_MOST = 20  # most tokens of one expert,
J_IGNORED = 21  # ids out of range,
J_MISSING = 22  # 1 + an expert that is not loaded and not skipped, or 0
J_SCRATCH = 23  # base of the workers' scratch
J_SCRATCH_BYTES = 24  # of one worker
J_PAIR_ROWS = 26  # float32 [strips][pairs][64], what pairs add to the output, or 0
J_LAST_PHASE = 27  # whose tasks write the output
J_POOL_WORKERS = 28  # of a pool, at most
J_SCRATCH_SUMS = 29  # offsets within a worker's scratch
J_SCRATCH_X = 30  # gathered tiles of inputs
J_SCRATCH_UNPACKED = 31
J_SCRATCH_OUT = 32
J_INLINE_ENCODE = 33  # 1: the publisher encodes the inputs itself, phase 0 is empty
J_TASK_NS = 34  # what the largest task takes a slow thread, see `patience`

PHASES = 4
PHASE_ENCODE, PHASE_GATE_UP, PHASE_DOWN, PHASE_COMBINE = range(PHASES)
J_TOTAL = 40  # [PHASES]: tasks of a phase, all pools
J_TASKS = 48  # [PHASES][MAX_POOLS]
J_DONE = J_TASKS + PHASES * MAX_POOLS  # [PHASES] finished tasks, a cache line each
J_CLAIM = J_DONE + PHASES * LINE_SLOTS  # [PHASES][MAX_POOLS] claim words, a cache line each
JOB_SLOTS = J_CLAIM + PHASES * MAX_POOLS * LINE_SLOTS

CLAIM_BITS = 24
"""A claim word is sequence << CLAIM_BITS | next task."""

# Group control block: the ring of jobs and the words that threads wait on, a line each.

RING = 16
G_SUBMITTED = 0 * LINE_SLOTS
G_COMPLETED = 1 * LINE_SLOTS
G_WAKE = 2 * LINE_SLOTS  # futex word: bumped at every submission
G_DONE_WAKE = 3 * LINE_SLOTS  # futex word: bumped at every completion, and when worker 0 leaves
G_SLEEPERS = 4 * LINE_SLOTS  # workers that are about to sleep on G_WAKE
G_WAITERS = 5 * LINE_SLOTS  # threads that are about to sleep on G_DONE_WAKE
G_STOP = 6 * LINE_SLOTS
G_LOCK = 6 * LINE_SLOTS + 1  # of who fills the next ring slot: 1, or 2 if others sleep on it
G_ABANDONED = 6 * LINE_SLOTS + 2  # newest job whose waiter gave up: the pool is stuck until then
G_SPIN_NS = 7 * LINE_SLOTS  # how long an idle worker spins before it sleeps,
G_WAIT_SPIN_NS = G_SPIN_NS + 1  # and whoever waits for a phase, a job or the ring
G_FUTEX = G_SPIN_NS + 2  # number of the futex system call
G_TIMEOUT_NS = G_SPIN_NS + 3  # of one wait of a caller
G_TIMESPEC = G_SPIN_NS + 4  # struct timespec for it
G_PHASE_WAKE = 8 * LINE_SLOTS  # futex word: bumped when a phase ends for which others sleep
G_PHASE_SLEEPERS = 9 * LINE_SLOTS  # threads that are about to sleep on G_PHASE_WAKE
G_WORKER0 = 10 * LINE_SLOTS  # 1 while somebody is worker 0
G_RING = 11 * LINE_SLOTS
GROUP_SLOTS = G_RING + RING * JOB_SLOTS

NO_ROOM = -(1 << 62)
"""What `try_launch` returns when the ring is full."""

# Descriptor of a job slot of the CUDA path: what a captured graph replays.

H_GROUP = 0
H_TEMPLATE = 1  # a job descriptor that each launch copies into the ring
H_IGNORED_IDS = 2  # what ids out of range mean, one of:
IDS_PASS, IDS_COUNT, IDS_FAULT = range(3)  # nothing, add to C_IGNORED, are a fault as well
H_SEQUENCE = 3  # of the latest launch; 0 when it was not published
H_COUNTERS = 4  # address of the layer's counters
H_FOUND = 5  # ids out of range of the latest launch
H_TIMEOUT_NS = 6  # without any task of the group ended, beside J_TASK_NS
H_FAULTS = 7  # address of the process's words: faults, and among them runs of closed layers
H_DUMP = 8  # where a job that nobody waits for any more writes its output
H_MASK = 9  # address of the layer's mask, K_SLOTS slots and uint8 [E]
H_EPOCH = 10  # of the mask in the latest launch
H_ABANDONED = 11  # newest job that its waiter gave up
H_ENDED = 12  # visits of streams that are over: nothing of the slot is touched for them any more
H_CLOSED = 13  # 1: the layer is gone, and whoever replays the slot gets NaN
H_HIDDEN = 14  # of the layer
H_SEEN = 15  # how far the pool was when the visit under way last saw progress,
H_SINCE = 16  # and when that was, nanoseconds; or when its job was given up
HOST_SLOTS = 18

# What the runs of a layer's job slots have met. All only grow; several threads add.

C_IGNORED = 0  # ids out of range, of slots that count them
C_MISSING = 1  # runs that met an expert that is neither loaded nor skipped,
C_MISSING_EXPERT = 2  # the latest
C_ERRORS = 3  # runs that were given up
C_ERROR = 4  # why the latest was, one of:
ERROR_TIMEOUT, ERROR_STUCK, ERROR_STOPPED = range(1, 4)
C_WAITED_NS = 5  # how long the latest had waited in vain at least
COUNTER_SLOTS = LINE_SLOTS

# The mask of a layer as its latest launch saw it.

K_LOCK = 0  # as G_LOCK: of who launches a run of the layer, never while the pool is waited for
K_EPOCH = 1  # grows by one at every launch that finds the mask changed
K_LIVE = 2  # address of uint8 [E] that others change
K_EXPERTS = 3
K_SLOTS = 4  # and the bytes

# Mailbox: two words in pinned memory through which a GPU's stream hands over jobs.

M_POSTED = 0  # the GPU writes the address of a job slot; the watcher clears it
M_DONE = 1  # the watcher writes 1; the GPU clears it
MAILBOX_SLOTS = LINE_SLOTS  # a cache line each

# Watcher: the thread that reads mailboxes.

W_STOP = 0
W_COUNT = 1  # entries in use, released after an entry is filled in
W_FUTEX = 2
W_HOT_NS = 3  # how long to spin after the last sign of life,
W_NAP = 4  # struct timespec of the naps that follow
W_WORD = 6  # futex word of the naps
W_ENTRIES = 8
W_CAPACITY = 1024

E_MAILBOX = 0  # address, or 0: unused
E_HOST = 1  # job slot under way, or 0
E_SEQUENCE = 2  # its number, or 0 while the ring has no room
E_CODE = 3  # why the job is being given up, or 0
ENTRY_SLOTS = 8
WATCHER_SLOTS = W_ENTRIES + W_CAPACITY * ENTRY_SLOTS
