"""A trace of a few steps, and what share of the devices' peak a step is."""

import pathlib

import jax

from data_pipelines.pipeline import Packs
from irg_jax.config import TrainConfig
from irg_jax.models.config import ModelConfig
from irg_jax.parallel.flops import count_flops
from irg_jax.parallel.topologies import peak_flops
from irg_jax.training.abstract import trace_encoder
from irg_jax.training.planned import count_passes, model_flops, plan_packs

_PLANNED = 16   # packs whose work is the mean


class Profiler:
    """Traces `profile_steps` steps from `profile_at` on into a folder, for TensorBoard or Perfetto."""

    def __init__(self, folder: pathlib.Path, config: TrainConfig):
        self._folder, self._first, self._count = folder, config.profile_at, config.profile_steps
        self._left = 0

    def before(self, step: int) -> None:
        """To be told before every step. Steps overlap their dispatch, so the edges are not sharp."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.profiler.stop_trace()
        elif self._first and step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._left = self._count

    def close(self) -> None:
        if self._left:
            jax.profiler.stop_trace()
            self._left = 0


def seconds_at_peak(config: TrainConfig, model: ModelConfig, packs: Packs) -> float | None:
    """What a step's useful operations take at the peak of all devices; None if that is not known."""
    kind = jax.devices()[0].device_kind
    peak = config.peak_tflops * 1e12 or peak_flops(kind)
    if not peak:
        return None
    data = config.data
    planned = plan_packs(data, tables=packs.tables, packs=_PLANNED)
    images = 0.0 if data.moments else (
        count_flops(trace_encoder(config, model).jaxpr).total * planned.latent / data.canvas**2)
    work = data.packs_per_step * model_flops(planned, model, images, count_passes(config))
    return work / (peak * jax.device_count())
