"""The main job's programs for NVIDIA's GPUs, on a machine that has none: nothing in them is for CPUs alone."""

import pathlib

import jax
import pytest

from configs import shapes_generate, shapes_stage1, shapes_stage2
from data_pipelines.config import from_config_dict
from irg_jax.checkpoints.bagel import read_config
from irg_jax.config import TrainConfig
from irg_jax.parallel.sharding import MeshConfig, make_mesh
from irg_jax.sampling.abstract import trace_draw, trace_token
from irg_jax.sampling.config import SamplingConfig
from irg_jax.training.abstract import trace_encoder, trace_step

MODEL = read_config(pathlib.Path(__file__).parent.parent / "assets" / "shapes_base")
SAMPLING = from_config_dict(SamplingConfig, shapes_generate.get_config())
STAGE1, STAGE2 = (from_config_dict(TrainConfig, one.get_config()) for one in (shapes_stage1, shapes_stage2))
BATCH = SAMPLING.batch_size
PROGRAMS = {
    "stage1": lambda mesh: trace_step(STAGE1, MODEL, mesh).traced,
    "stage2": lambda mesh: trace_step(STAGE2, MODEL, mesh).traced,
    "moments": lambda mesh: trace_encoder(STAGE1, MODEL),
    "draw": lambda mesh: trace_draw(MODEL, SAMPLING, mesh, images=BATCH, context=256).traced,
    "write": lambda mesh: trace_token(MODEL, SAMPLING, mesh, texts=BATCH, context=256).traced}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_main_job_lowers_for_cuda(name):
    program = PROGRAMS[name](make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    assert "custom_call" not in program.lower(lowering_platforms=("cuda",)).as_text()
