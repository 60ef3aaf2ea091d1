import threading
import time

import numpy as np
import pytest

from mlm.data import prefetch
from mlm.errors import UserError


class Count:
    """A stream of 1, 2, 3... that can be paused and can end in an error."""

    epoch = 0

    def __init__(self, *, error=None, after=0):
        self.n = 0
        self.error = error
        self.after = after
        self.resume = threading.Event()
        self.resume.set()

    def __iter__(self):
        return self

    def __next__(self):
        assert self.resume.wait(30)
        if self.error is not None and self.n == self.after:
            raise self.error
        self.n += 1
        return np.full((2, 3), self.n, np.int32)

    def state_dict(self):
        return {"n": self.n}

    @property
    def counters(self):
        return {"documents": self.n}


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "mlm-prefetch"]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_batches_come_in_order_with_their_own_state():
    with prefetch.Prefetcher(Count(), depth=3) as batches:
        for n in range(1, 20):
            batch = next(batches)
            assert batch.tokens.tolist() == [[n] * 3] * 2
            assert (batch.state, batch.counters, batch.epoch) == ({"n": n}, {"documents": n}, 0)
    assert threads() == []


def test_at_most_depth_batches_are_made_ahead():
    stream = Count()
    with prefetch.Prefetcher(stream, depth=3) as batches:
        wait_until(lambda: stream.n == 4)  # Three in the queue, one about to be put there.
        time.sleep(0.05)
        assert stream.n == 4
        next(batches)
        wait_until(lambda: stream.n == 5)


def test_waiting_time_is_measured():
    stream = Count()
    stream.resume.clear()
    with prefetch.Prefetcher(stream, depth=1) as batches:
        threading.Timer(0.2, stream.resume.set).start()
        next(batches)
        assert 0.15 < batches.wait_seconds < 5
        waited = batches.wait_seconds
        wait_until(lambda: stream.n == 3)
        next(batches)  # It is ready.
        assert batches.wait_seconds - waited < 0.1


@pytest.mark.parametrize("error", [UserError("the dataset is empty"), OSError(5, "disk"), KeyboardInterrupt()])
def test_an_error_reaches_the_caller_after_the_batches_before_it(error):
    with prefetch.Prefetcher(Count(error=error, after=2), depth=4) as batches:
        assert [next(batches).state["n"] for _ in range(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(type(error)) as raised:
                next(batches)
            assert raised.value is error
    assert threads() == []


def test_a_stream_that_ends_ends_the_iteration():
    assert [batch.state["n"] for batch in prefetch.Prefetcher(Count(error=StopIteration(), after=3), depth=1)] == [
        1,
        2,
        3,
    ]


def test_closing_is_prompt_with_a_full_queue():
    stream = Count()
    batches = prefetch.Prefetcher(stream, depth=2)
    wait_until(lambda: stream.n == 3)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 1
    assert threads() == []
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_closing_abandons_a_read_that_hangs():
    stream = Count()
    stream.resume.clear()
    batches = prefetch.Prefetcher(stream, depth=2)
    start = time.monotonic()
    batches.close(timeout=0.1)
    assert time.monotonic() - start < 1
    stream.resume.set()
    wait_until(lambda: threads() == [])


def test_an_error_in_the_loop_stops_the_thread():
    def loop():
        with prefetch.Prefetcher(Count(), depth=2) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert threads() == []


def test_an_error_of_on_wait_ends_the_wait():
    def interrupt():
        raise KeyboardInterrupt

    stream = Count()
    stream.resume.clear()
    with prefetch.Prefetcher(stream, depth=1, on_wait=interrupt) as batches:
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        stream.resume.set()
