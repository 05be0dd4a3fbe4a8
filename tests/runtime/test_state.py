import numpy as np
from toy_engine import CAPACITY, RING, WIDTH, toy_manifest

from v4graph_runtime.state import ALIGNMENT, Positions, StateTensor, state_tensors


def test_state_tensors_follow_the_manifest() -> None:
    window, compressed = state_tensors(toy_manifest(), batch=2)
    assert window == StateTensor("state.0.window", "next.0.window", (2, RING, WIDTH), "float32")
    assert compressed.shape == (2, CAPACITY, WIDTH)
    assert compressed.nbytes == 2 * CAPACITY * WIDTH * 4


def test_buffers_are_aligned_zeros_of_their_own() -> None:
    tensor = StateTensor("a", "b", (3, 5, 7), "float32")
    buffers = [tensor.allocate() for _ in range(4)]
    for buffer in buffers:
        assert (buffer.shape, buffer.dtype) == ((3, 5, 7), np.float32)
        assert buffer.ctypes.data % ALIGNMENT == 0
        assert not buffer.any()
        buffer[:] = 1


def test_a_large_buffer_takes_no_memory_before_it_is_written() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    buffer = StateTensor("a", "b", (1, 1 << 20, 64), "float32").allocate()
    assert buffer.nbytes == 1 << 28
    assert resident() - before < 1 << 24


def test_rolling_back_and_going_on_keeps_the_highest_position() -> None:
    positions = Positions(1, capacity=100, slack=4)
    ids, one = np.arange(10)[None], np.ones(1, np.int64)
    positions.advance(ids, 10 * one.astype(np.int32), range(1))
    for _ in range(3):
        positions.rollback(4 * one)
        positions.advance(ids, 4 * one.astype(np.int32), range(1))
    assert positions.tokens.tolist() == [10]
