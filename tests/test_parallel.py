"""Modules side by side: as many as are worth it, in order, and none after an error."""

import threading
import time
from collections import Counter

import pytest
import torch

from lora_opcm import parallel
from lora_opcm.parallel import parallel_map

WORTH = 10.0  # seconds of the clock


@pytest.fixture(params=[2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param  # as it was
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Every item says how long it worked. No thread is added because the machine is slow to wake one."""
    worked = threading.local()

    class Clock:
        @staticmethod
        def thread_time():
            return getattr(worked, "seconds", 0.0)

    def work(seconds):
        worked.seconds = Clock.thread_time() + seconds

    monkeypatch.setattr(parallel, "time", Clock)
    monkeypatch.setattr(parallel, "WORTH", WORTH)
    return work


def test_results_are_in_order_whatever_they_take(threads):
    def pause(i):
        time.sleep(0.002 * (i * 7 % 5))
        return i

    assert parallel_map(pause, range(40)) == list(range(40))
    assert parallel_map(pause, []) == []


def test_short_items_stay_in_the_thread_that_asks(threads, clock):
    where = []

    def short(i):
        clock(WORTH / 3)
        where.append(threading.current_thread())

    parallel_map(short, range(20))
    assert Counter(where[1:]) == {threading.main_thread(): 19}  # the first tells


def test_long_items_have_all_threads(threads, clock):
    now, most, lock = set(), [], threading.Lock()

    def long(i):
        with lock:
            now.add(i)
            most.append(len(now))
        time.sleep(0.01)
        clock(10 * threads * WORTH)
        now.remove(i)

    parallel_map(long, range(8 * threads))
    assert max(most) == threads


def test_short_items_have_all_threads_from_the_first_on_if_they_are_to(threads, clock):
    """Each waits for all the others of its round."""
    together = threading.Barrier(threads, timeout=20)
    assert len(parallel_map(lambda _: together.wait(), range(3 * threads), worth=0)) == 3 * threads


@pytest.mark.parametrize("seconds, expected", [(1.4 * WORTH, 1), (2.2 * WORTH, 2), (3.1 * WORTH, 3)])
def test_a_thread_more_for_every_so_many_seconds(seconds, expected, clock):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    now, most, lock = set(), {}, threading.Lock()

    def item(i):
        with lock:
            now.add(i)
            most[i] = len(now)
        time.sleep(0.003)
        clock(seconds)
        now.remove(i)

    try:
        parallel_map(item, range(30))
    finally:
        torch.set_num_threads(before)
    assert max(most[i] for i in range(10, 30)) == expected


def test_nobody_waits_for_a_first_item_that_takes_long(threads):
    others = threading.Event()

    def item(i):
        if i == 0:
            assert others.wait(10)
        else:
            others.set()
        return i

    assert parallel_map(item, range(5)) == list(range(5))


def test_an_error_is_raised_and_ends_the_rest(threads, clock):
    done = []

    def item(i):
        clock(10 * threads * WORTH)
        if i == 3:
            raise ValueError("of the fourth")
        time.sleep(0.002)
        done.append(i)

    with pytest.raises(ValueError, match="of the fourth"):
        parallel_map(item, range(200))
    assert len(done) < 100


def test_progress_sees_results_one_by_one(threads):
    seen = []

    def progress(results, total):
        for result in results:
            seen.append((result, total))
            yield result

    assert parallel_map(lambda i: i * i, range(6), progress) == [i * i for i in range(6)]
    assert seen == [(i * i, 6) for i in range(6)]
