"""What the kernels take and how a step is launched, without importing torch or Triton.

The kernels and the planner ask the same functions, so a plan knows which buffers a step allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_HEAD_SIZE = 256
# Float32 elements of one score block of the reference kernels: 16 MiB. Its exponentials and its mask are temporaries of
# that size too.
_BLOCK_ELEMENTS = 4 * 2**20
# Ways to pool scores over neighbouring keys, by the names of SnapKV's code.
POOLINGS = ("max", "avg")
# What a key's score is: the attention that the observers give it, or what their outputs would change by without it.
OUTPUT_CHANGE = "output_change"
SCORINGS = ("attention", OUTPUT_CHANGE)
# Of a row's attention, what one key must leave to the others for the change to be taken from the output. Where it
# leaves less, the output is nearly the value itself and their difference nearly all rounding: there the value counts.
LEAST_REST = 1 / 32
# Generations with both the bulk tensor copy engine and shared memory enough to feed it.
COPYING_MAJORS = (9, 10)
# Scores that a program which selects looks through at a time.
TILE = 2048
# Most rows (observing queries times heads of the group) of the kernel that compresses after another forward pass.
MOST_COMPRESSED_ROWS = 128

# What a multiprocessor does in a clock, for the comparisons below. Products: half of the dense bfloat16 peak that the
# A100, H100 and B200 data sheets give, per multiprocessor and clock; about what the kernels are estimated to reach.
# Moved bytes: half of the 64 bytes that a multiprocessor takes from the L2 cache. Clocks of a load that the next one
# waits for: an access of the L2 cache. Clocks between two launches in one stream: three microseconds. On an H100 the
# forward pass reached 1,900 to 2,140 FLOPs, at 1.98 to 1.76 GHz, and a selection took the clocks that loads foretell to
# a tenth (bench/results/kernel_timings-20261126-190450.json); the rest this project has not measured.
_FLOPS_PER_CLOCK = {8: 1024.0, 9: 2048.0, 10: 4096.0}
_MOVED_BYTES_PER_CLOCK = 32.0
_LOAD_CLOCKS = 700.0
_LAUNCH_CLOCKS = 5000.0


def head_size_supported(head_dim: int) -> bool:
    """Whether the Triton kernels take heads of `head_dim` dimensions: every size up to 256."""
    return 1 <= head_dim <= MAX_HEAD_SIZE


def rows_per_block(rows: int, elements_per_row: int) -> int:
    """How many of `rows` query rows, with so many scores each, the reference kernels take at once."""
    return min(rows, max(1, _BLOCK_ELEMENTS // max(1, elements_per_row)))


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and at least `least`."""
    return max(least, 1 << (size - 1).bit_length())


def attention_rows(head_dim: int, major: int) -> int:
    """Rows of queries that a program of the attention kernels owns, of 16-bit tensors that load in whole vectors.

    Generation 0 is the interpreter, which takes all tensors alike.
    """
    if major == 0:
        return 32
    return 64 if head_dim > 128 and major not in COPYING_MAJORS else 128


@dataclass(frozen=True, slots=True)
class StepSizes:
    """Sizes of one layer's step: rows of the batch, heads, queries, keys, head size, bytes per element, and so on.

    `observers` are the last queries, of which some vote; `keep` keys are kept per KV head.
    """

    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    element_size: int
    observers: int
    keep: int
    pool_kernel: int
    scoring: str = SCORINGS[0]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q_heads // self.kv_heads

    def product(self, rows: int, major: int) -> float:
        """Clocks of one product of a block of rows with one key."""
        flops = _FLOPS_PER_CLOCK.get(major, _FLOPS_PER_CLOCK[8])
        return 2.0 * rows * power_of_two(self.dim, least=16) / flops

    def scored(self, rows: int, major: int) -> float:
        """Clocks in which one program scores all keys: one product, and for changes one more with the values."""
        return (2 if self.scoring == OUTPUT_CHANGE else 1) * self.product(rows, major) * self.keys

    def read(self, times: int) -> float:
        """Clocks in which one program reads all scores of a KV head so many times."""
        return self.keys / TILE * times * _LOAD_CLOCKS

    @property
    def selected(self) -> float:
        """Clocks in which one program pools the scores, finds the threshold and places the kept keys.

        It reads them `pool_kernel` times to pool them, four times to find the threshold and once to place what is kept.
        """
        return self.read(self.pool_kernel + 5)

    @property
    def moved(self) -> float:
        """Clocks in which one program moves the kept keys and values of a KV head, read and written."""
        return 4.0 * self.keep * self.dim * self.element_size / _MOVED_BYTES_PER_CLOCK


def fused_step_fits(work: StepSizes, major: int) -> bool:
    """Whether the compiler has registers enough for one kernel that does a whole step.

    Not in float32, and not on sm_100 where changes of the output are scored. Where keys come by addresses only for head
    sizes that need no mask (with 96 on sm_80 it spills), above 64 only for four query heads per KV head (of 1, 3, 4, 7
    and 8 the one that does not spill), and above 128 not where changes are scored.
    """
    changes = work.scoring == OUTPUT_CHANGE
    if work.element_size != 2 or (major == 10 and changes):
        return False
    if major in COPYING_MAJORS:
        return True
    spills = work.dim > 64 and (work.group != 4 or (changes and work.dim > 128))
    return work.dim == power_of_two(work.dim) and not spills


def step_in_one_launch(work: StepSizes, block_rows: int, major: int, multiprocessors: int) -> bool:
    """Whether the observers of a KV head fit one program of `block_rows`, which is done before the rest of the device.

    The owner of a KV head's observers attends to all keys, multiplies with all of them once more, selects and moves: a
    chain of work for one multiprocessor. Meanwhile the others attend, on as many multiprocessors as there are. The
    chain is compared with all work shared out evenly: where it is longer, the step would wait for it, and separate
    launches spread scoring and moving over the device.

    Args:
        work: the sizes.
        block_rows: rows of queries that a program owns.
        major: generation of the chip.
        multiprocessors: of the chip.
    """
    block_queries = block_rows // work.group
    if block_queries == 0 or work.observers > block_queries or work.keep == 0:
        return False
    product = work.product(block_rows, major)
    scored = work.scored(block_rows, major)
    chain = 2.0 * product * work.keys + scored + work.selected + work.moved
    blocks = work.batch * work.kv_heads * -(-work.queries // block_queries)
    mean_keys = work.keys - work.queries / 2
    compression = work.batch * work.kv_heads * (scored + work.selected + work.moved)
    return chain <= (2.0 * product * mean_keys * blocks + compression) / multiprocessors


def compression_rows(work: StepSizes) -> int:
    """Rows of the block in which one program has all observers of a KV head."""
    return power_of_two(work.observers * work.group, least=16)


def compression_fits(work: StepSizes) -> bool:
    """Whether one program has registers enough for so many rows: fewer fit with two products of large heads."""
    most = MOST_COMPRESSED_ROWS // (2 if work.scoring == OUTPUT_CHANGE and work.dim > 128 else 1)
    return compression_rows(work) <= most


def compression_in_one_launch(work: StepSizes, major: int, multiprocessors: int) -> bool:
    """Whether one launch with a program per KV head compresses sooner than separate launches over the whole device.

    The chain of one program is compared with the same work shared out evenly, the gaps between the launches, and what
    the separate selection does alone too: it pools, and finds its threshold bit by bit in 32 passes.

    Args:
        work: the sizes.
        major: generation of the chip.
        multiprocessors: of the chip.
    """
    if not compression_fits(work) or work.keep == 0:
        return False
    rows = compression_rows(work)
    heads = work.batch * work.kv_heads
    scored = work.scored(rows, major)
    chain = (scored + work.selected + work.moved) * -(-heads // multiprocessors)
    pooled = work.read(work.pool_kernel) if work.pool_kernel > 1 else 0.0
    alone = pooled + 32 * _LOAD_CLOCKS + 3 * _LAUNCH_CLOCKS
    return chain <= (scored + work.moved) * heads / multiprocessors + alone
