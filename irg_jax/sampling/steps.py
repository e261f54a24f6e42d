"""Trajectories one by one, and the steps that those of one kind take together.

A `Job` is one trajectory. What it does is written for it alone, as a generator that yields `Step`s and gets
back what comes of each; `advance` takes the next step of several jobs as one batch, from whatever batches their
contexts come.
"""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from collections.abc import Generator as Coroutine
from typing import Any, NamedTuple

import jax
import numpy as np

from irg_jax.sampling import cache
from irg_jax.sampling.config import FlowConfig, TextConfig
from irg_jax.sampling.trajectory import Generator, State, Text

Results = Sequence[Any]


class Step(NamedTuple):
    """What a trajectory does next."""

    run: Callable[..., tuple[State, Results]]   # of generator, state, arguments, statics: after it, and results
    argument: Any = None                        # one of `arguments`
    statics: tuple[Hashable, ...] = ()
    shape: Hashable = None                      # what arguments of one call share


class Batch(NamedTuple):
    """A state, whose first `size` trajectories are somebody's."""

    state: State
    size: int


class Job:
    """A trajectory under way; `step` is its next, None when it is over, and `answer` then what it came to."""

    def __init__(self, steps: Coroutine[Step, Any, Any]):
        self._steps, self.answer = steps, None
        self.batch, self.place = None, 0    # where its context lies
        self.take(None)

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind can take their next step together."""
        run, _, statics, shape = self.step
        state = self.batch and self.batch.state
        return run, statics, shape, state and (state.turn, len(state.unread))

    def take(self, result: Any) -> None:
        """Goes on to its next step, with what came of the one before."""
        try:
            self.step = self._steps.send(result)
        except StopIteration as end:
            self.step, self.batch, self.answer = None, None, end.value


def group(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that are not over by their kind, in the order of the first of each."""
    groups = collections.defaultdict(list)
    for job in jobs:
        if job.step is not None:
            groups[job.kind].append(job)
    return list(groups.values())


def run_jobs(generator: Generator, jobs: Sequence[Job], *, size: int | None = None) -> list[Any]:
    """What jobs come to; the largest group goes first, so that others catch up with it.

    Args: size is that of every batch; None takes the least that holds those that go on.
    """
    while groups := group(jobs):
        largest = max(groups, key=len)
        advance(generator, largest, size or generator.fit_batch(len(largest)))
    return [job.answer for job in jobs]


def advance(generator: Generator, jobs: Sequence[Job], size: int) -> None:
    """Takes the next step of jobs of one kind, in a batch filled up to `size` with the last of them."""
    run, _, statics, _ = jobs[0].step
    batches = {id(job.batch): job.batch for job in jobs}
    jobs = [job for batch in batches for job in jobs if id(job.batch) == batch]
    padded = [*jobs, *[jobs[-1]] * (size - len(jobs))]
    places = [[job.place for job in padded if job.batch is batch] for batch in batches.values()]
    state = None if jobs[0].batch is None else _gather(generator, list(batches.values()), places)
    state, results = run(generator, state, [job.step.argument for job in padded], *statics)
    batch = Batch(state, len(jobs))
    for place, (job, result) in enumerate(zip(jobs, results)):
        job.batch, job.place = batch, place
        job.take(result)


def _gather(generator: Generator, batches: Sequence[Batch], places: Sequence[Sequence[int]]) -> State:
    """Chosen contexts of batches as one state: that of a single batch if all are chosen that are somebody's."""
    (state, size), *others = batches
    whole = [*range(size), *[size - 1] * (len(state.seeds) - size)]
    if not others and list(places[0]) == whole:
        return state
    return gather([batch.state for batch in batches], places, generator.mesh)


def gather(states: Sequence[State], places: Sequence[Sequence[int]], mesh: jax.sharding.Mesh) -> State:
    """Trajectories of several states as one state with a cache of its own, on the devices of a mesh.

    Args: places are which trajectories of each state; the states have equally many turns and texts behind them.
    """
    unasked, unseen = (cache.gather_views([getattr(state, name) for state in states], places, mesh)
                       for name in ("unasked", "unseen"))
    unread = zip(*(state.unread for state in states), strict=True)
    seeds = np.concatenate([state.seeds[which] for state, which in zip(states, places)])
    return State(cache.gather([state.main for state in states], places, mesh), unasked, unseen,
                 tuple(_gather_texts(texts, places) for texts in unread), seeds, states[0].turn)


def _gather_texts(texts: Sequence[Text], places: Sequence[Sequence[int]]) -> Text:
    width = max(text.tokens.shape[1] for text in texts)
    rows = [np.pad(text.tokens[which], ((0, 0), (0, width - text.tokens.shape[1])))
            for text, which in zip(texts, places)]
    lengths = [text.lengths[which] for text, which in zip(texts, places)]
    return Text(np.concatenate(rows), np.concatenate(lengths))


def start(generator: Generator, state: None, seeds: list[int], system: bool) -> tuple[State, Results]:
    """Nothing is said yet but the system prompt if `system`. Result: none."""
    return _none(generator.start(seeds, system=system))


def ask(generator: Generator, state: State, texts: list[str]) -> tuple[State, Results]:
    """Reads what the user says. Result: none."""
    return _none(generator.ask(state, texts))


def see(generator: Generator, state: State, images: list[np.ndarray], use_vae: bool) -> tuple[State, Results]:
    """Reads images that the user shows; guidance does not leave them out. Result: none."""
    state = generator.look(state, images, use_vae=use_vae)
    return _none(dataclasses.replace(state, unasked=state.main.view))


def look(generator: Generator, state: State, images: list[np.ndarray]) -> tuple[State, Results]:
    """Reads images that the model drew. Result: none."""
    return _none(generator.look(state, images))


def write(generator: Generator, state: State, settings: list[TextConfig]) -> tuple[State, Results]:
    """Writes the next text. Result: it, and whether it ended by itself."""
    written = generator.write(state, settings=settings)
    return state, list(zip(generator.decode(written), np.asarray(written.is_done).tolist(), strict=True))


def think(generator: Generator, state: State, texts: list[str]) -> tuple[State, Results]:
    """Reads a text as the model's own. Result: none."""
    return _none(generator.think(state, texts)[1])


def recall(generator: Generator, state: State, texts: list[str], turn: int) -> tuple[State, Results]:
    """Reads a text as that of a turn, though some before it are left out. Result: none."""
    return think(generator, dataclasses.replace(state, turn=turn), texts)


def add(generator: Generator, state: State, texts: list[str]) -> tuple[State, Results]:
    """Reads a text as the model's own that guidance leaves out. Result: none."""
    return _none(dataclasses.replace(state, main=generator.append_text(state.main, texts)))


def draw(generator: Generator, state: State, _: list, flow: FlowConfig, height: int,
         width: int) -> tuple[State, Results]:
    """Draws the next image. Result: it."""
    return state, generator.draw(state, flow=flow, height=height, width=width)


def _none(state: State) -> tuple[State, Results]:
    return state, [None] * len(state.seeds)
