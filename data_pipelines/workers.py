"""Worker processes that never outlive the run, and a dead worker that ends it.

Grain's workers outlive a trainer that was killed by SIGKILL, together with the batches they hold in
shared memory. So each watches its parent. What is left in /dev/shm is removed by Python's resource
tracker, or, if that was killed with its whole process group, by a shell in a session of its own.
"""

import functools
import multiprocessing
import multiprocessing.shared_memory
import secrets
import subprocess

import grain
from absl import flags

from data_pipelines.jobs import end_with_parent


def prefetch(steps: grain.MapDataset, *, workers: int, threads: int, batches: int) -> grain.DatasetIterator:
    """Reads `steps` ahead, in order.

    Args:
        workers: processes that read; 0 reads in threads of this one.
        threads: that read, without workers; each worker has one.
        batches: held ready, over all workers.
    """
    if not workers:
        # Grain would keep 500 batches ready on 16 threads: gigabytes, where batches hold images.
        options = grain.ReadOptions(num_threads=min(threads, batches), prefetch_buffer_size=batches)
        return iter(steps.to_iter_dataset(options))
    if not flags.FLAGS.is_parsed():  # Grain reads flags of its own when it starts workers
        flags.FLAGS.mark_as_parsed()
    ahead = max(1, batches // workers)
    each = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    return iter(steps.to_iter_dataset(each).mp_prefetch(options, worker_init_fn=functools.partial(
        _start_worker, _name_shared_memory()[0])))


def explain_death(error: RuntimeError) -> ValueError | None:
    """The sentence for a worker that was killed; None for any other error."""
    if "Worker process was terminated" not in str(error):
        return None
    return ValueError(f"a data worker died ({str(error).split('. ')[0]}); if the machine ran out of memory, "
                      "lower data.workers, data.prefetch or data.cache_mib. The same command resumes")


@functools.cache
def _name_shared_memory() -> tuple[str, subprocess.Popen]:
    """What the names of this process's shared memory begin with, and who waits to remove it."""
    name = f"d{secrets.token_hex(3)}_"  # Python allows no longer one
    # Private names of Python's, here and in the workers: others would be random, and nobody could tell whose.
    multiprocessing.current_process()._config["semprefix"] = f"/{name}"
    # `cat` ends when this process does, however that is.
    clean = f"cat; sleep 1; rm -f /dev/shm/{name}* /dev/shm/sem.{name}*"
    return name, subprocess.Popen(["sh", "-c", clean], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, start_new_session=True)


def _start_worker(shared_name: str, index: int, count: int) -> None:
    multiprocessing.shared_memory._SHM_NAME_PREFIX = f"/{shared_name}"
    end_with_parent()
