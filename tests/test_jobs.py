"""Work that is done ahead comes in order, and no more of it is done than was asked for."""

import concurrent.futures
import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.jobs import map_ahead


@settings(deadline=None)
@given(st.lists(st.floats(0, 2e-3), max_size=20), st.integers(1, 4), st.integers(0, 5))
def test_results_come_in_order(seconds, threads, ahead):
    def work(job):
        time.sleep(job[1])
        return job[0]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        assert list(map_ahead(pool, work, enumerate(seconds), ahead=ahead)) == list(range(len(seconds)))


def test_of_endless_jobs_only_a_few_are_begun():
    begun, taken = [], itertools.count()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = map_ahead(pool, begun.append, taken, ahead=3)
        assert next(results) is None and next(results) is None
        results.close()
    assert next(taken) == 2 + 3 and len(begun) <= 5


def test_what_waits_is_dropped_with_the_results():
    go_on, done = threading.Event(), []
    def work(job):
        assert job == 0 or go_on.wait(10)
        done.append(job)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        results = map_ahead(pool, work, itertools.count(), ahead=4)
        next(results)
        results.close()
        go_on.set()
    assert set(done) <= {0, 1}


def test_an_error_is_that_of_the_job():
    with concurrent.futures.ThreadPoolExecutor(2) as pool, pytest.raises(ZeroDivisionError):
        list(map_ahead(pool, lambda job: 1 // job, [1, 0, 1], ahead=2))
