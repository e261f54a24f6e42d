"""Sixty-four hosts of a pod on one machine: how soon all have their first batch, and how even their load is.

    python -m benchmarks.hosts [--hosts 64] [--steps 200] [--records 300000]

Start: as many processes at once as there are hosts, each of which opens a built data set of so many records of
short texts, plans, and reads its own pack; until the last has its first batch. Python's imports are paid for
once (`forkserver`), as each host of a pod has cores of its own. Load: what each host's packs hold over the
steps, planned from the simulated lengths of IRGL-300K in the mixture of stage 1. Every pack has the same static
shape, so only the pairs of attention and the reading can differ at all. Planning and data only: no device.
Prints one JSON object last and writes it to benchmarks/results/hosts.json.
"""

import dataclasses
import multiprocessing
import pathlib
import tempfile
import time

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import data, machine
from data_pipelines import command
from data_pipelines.config import DataConfig, from_config_dict, load_config
from data_pipelines.pipeline import make_iterator
from data_pipelines.planning import Planner
from data_pipelines.simulation import simulate, useful_tokens
from data_pipelines.tokenizer import Tokenizer, train_tokenizer


def first_pack(host: int, config: DataConfig, tokenizer: Tokenizer) -> bytes:
    """What a host reads first: the ids of its pack."""
    iterator = make_iterator(config, tokenizer, rows=[host], keep_journal=host == 0)
    ids = next(iterator).text_ids
    iterator.close()
    return ids.tobytes()


def measure_start(config: DataConfig, tokenizer: Tokenizer, hosts: int) -> dict[str, float]:
    """Seconds until every host has its first batch, and whether all together have the whole of it."""
    begun, context = time.perf_counter(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.pipeline"])
    with context.Pool(hosts) as pool:
        found = pool.starmap(first_pack, [(host, config, tokenizer) for host in range(hosts)], chunksize=1)
        seconds = time.perf_counter() - begun
        pool.close()
        pool.join()
    iterator = make_iterator(config, tokenizer)
    whole = next(iterator).text_ids
    iterator.close()
    if b"".join(found) != whole.tobytes():
        raise ValueError("the hosts' packs together are not the step's batch")
    return {"start_seconds": seconds}


def measure_load(hosts: int, steps: int) -> dict[str, float]:
    """Largest deviation of a host from the mean, in percent: over all steps, and in the worst single step."""
    config = from_config_dict(DataConfig, load_config("configs/irgl_stage1.py").data)
    config = dataclasses.replace(config, packs_per_step=hosts)
    planner = Planner(config, simulate(config))
    packs = [planner[index] for index in tqdm(range(hosts * steps), "planned", leave=False, disable=None)]
    tokens = useful_tokens([pack.cost for pack in packs]).reshape(steps, hosts)
    records = np.array([len(pack.entries) for pack in packs]).reshape(steps, hosts)
    deviation = lambda loads: float(np.abs(loads / loads.mean(axis=-1, keepdims=True) - 1).max() * 100)
    return {"tokens_deviation_percent": deviation(tokens.sum(axis=0)),
            "tokens_deviation_of_one_step_percent": deviation(tokens),
            "records_deviation_percent": deviation(records.sum(axis=0))}


def main(values) -> None:
    result = {"benchmark": "hosts", **machine.describe("grain", "numpy", "array_record"), "hosts": values.hosts,
              "steps": values.steps, "records": values.records}
    tokenizer = train_tokenizer([" ".join(data.WORDS)] * 3, vocab_size=400)
    with tempfile.TemporaryDirectory() as name:
        parquet, built = data.write_texts(pathlib.Path(name), tokenizer, values.records)
        # A pack a host in every step; the plan's journal is kept, as on a disk that all see.
        config = dataclasses.replace(built, packs_per_step=values.hosts, index_dir=parquet.index_dir)
        result |= measure_start(config, tokenizer, values.hosts)
    result |= measure_load(values.hosts, values.steps)
    machine.keep(result, values.out)


if __name__ == "__main__":
    flags.DEFINE_integer("hosts", 64, "How many; each has one pack a step.", lower_bound=2)
    flags.DEFINE_integer("steps", 200, "Over which loads are added up.", lower_bound=1)
    flags.DEFINE_integer("records", 300_000, "Records that each host opens.", lower_bound=6)
    flags.DEFINE_string("out", str(machine.RESULTS / "hosts.json"), "The result file.")
    command.run(main)
