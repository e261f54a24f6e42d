"""Trajectories that take their steps in whatever company, at whatever time, come out as alone."""

import random

import jax
import numpy as np
import pytest

from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.sampling.modes import ModeConfig, converse
from irg_jax.sampling.steps import Job, advance, group, run_jobs
from irg_jax.sampling.trajectory import Generator, Given
from sampling_cases import WIDE, make_model

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
IRG = ModeConfig(think=True, num_turns=2, do_sample=False)
ASKED = [
    (["a red circle"], IRG, {}),
    (["two blue squares and a star"], IRG, {}),
    (["blue"], IRG, {"given": Given(texts=(None, "a b c"))}),
    (["blue"], IRG, {"given": Given(texts=("a",), image=PICTURE)}),
    (["a star"], ModeConfig(), {}),
    ([PICTURE, "make it blue"], ModeConfig(), {}),
    (["a", PICTURE, "what is it?"], ModeConfig(understanding_output=True, do_sample=False), {}),
]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(make_model(), WIDE)


def make_jobs(generator: Generator, told: list[list]) -> list[Job]:
    return [Job(converse(generator, said, mode, seed=number, tell=lambda *event, told=told: told.append(event),
                         **more)) for number, ((said, mode, more), told) in enumerate(zip(ASKED, told))]


@pytest.fixture(scope="module")
def alone(generator):
    told = [[] for _ in ASKED]
    return [run_jobs(generator, [job])[0] for job in make_jobs(generator, told)], told


def same(image: np.ndarray | None, other: np.ndarray | None) -> bool:
    if image is None or other is None:
        return image is other
    return image.shape == other.shape and np.abs(image.astype(int) - other).max() <= 1


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_order_of_steps_comes_out_as_alone(generator, alone, seed):
    """Jobs begin when they like; each time some of one kind go on, in a batch that is filled up."""
    chance, told = random.Random(seed), [[] for _ in ASKED]
    jobs = make_jobs(generator, told)
    sizes = set()
    while groups := group(jobs):
        kind = chance.choice(groups)
        chosen = chance.sample(kind, chance.randint(1, min(len(kind), 4)))
        sizes.add(len(chosen))
        advance(generator, chosen, 4 if len(chosen) > 1 else chance.choice((1, 4)))
    assert len(sizes) > 1
    for job, events, answers, expected in zip(jobs, told, *alone, strict=True):
        assert [answer.text for answer in job.answer] == [answer.text for answer in answers]
        assert all(same(mine.image, its.image) for mine, its in zip(job.answer, answers, strict=True))
        assert [(turn, type(made)) for turn, made in events] == [(turn, type(made)) for turn, made in expected]


@pytest.mark.slow
def test_a_mesh_gathers_over_its_devices(alone):
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    generator, chance = Generator(make_model(), WIDE, mesh=mesh), random.Random(0)
    jobs = make_jobs(generator, [[] for _ in ASKED])
    while groups := group(jobs):
        chosen = max(groups, key=len)
        chosen = chance.sample(chosen, min(len(chosen), 3))    # one stays behind, and catches up
        advance(generator, chosen, generator.fit_batch(len(chosen)))
    for job, answers in zip(jobs, alone[0], strict=True):
        assert [answer.text for answer in job.answer] == [answer.text for answer in answers]
        assert all(same(mine.image, its.image) for mine, its in zip(job.answer, answers, strict=True))


def test_what_is_given_is_neither_written_nor_drawn(alone):
    answers, told = alone
    assert answers[2][1].text == "a b c" and answers[3][0].text == "a"
    np.testing.assert_array_equal(answers[3][0].image, PICTURE)
    kinds = [[(turn, isinstance(made, str)) for turn, made in events] for events in told]
    assert kinds[0] == [(0, True), (0, False), (1, True), (1, False)]
    assert kinds[4] == [(0, False)] and kinds[6] == [(0, True)]
