"""The loop with real files: resumes bit for bit, hands stage 1 to stage 2, refuses what does not fit."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from data_cases import data_config, tokenizer, write_data_set
from data_pipelines.config import GroupConfig
from irg_jax.checkpoints.model import Model, load_model, save_model
from irg_jax.config import TrainConfig
from irg_jax.models.config import LLMConfig, ModelConfig, VAEConfig, ViTConfig
from irg_jax.models.functional import Functional
from irg_jax.models.irg import IRG, make_autoencoder
from irg_jax.parallel.sharding import MeshConfig
from irg_jax.training.loop import train
from irg_jax.training.losses import LossConfig
from irg_jax.training.metrics import Progress
from irg_jax.training.optimizer import OptimizerConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny model checkpoint and a data set."""
    folder = tmp_path_factory.mktemp("loop")
    tokens = tokenizer()
    model = ModelConfig(
        LLMConfig(tokens.vocab_size, 32, 64, 2, 4, 2), ViTConfig(32, 48, 2, 2),
        VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=2), max_latent_size=8,
        vit_max_num_patch_per_side=8)
    params = Functional(lambda rngs: IRG(model, rngs=rngs)).init(0)
    vae = Functional(lambda rngs: make_autoencoder(model, rngs=rngs)).init(1)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    save_model(folder / "base", Model(model, tokens, host(params), host(vae)))
    write_data_set(folder / "data", counts={"full": 12, "improving": 12})
    return folder


def config(base, **fields) -> TrainConfig:
    groups = (GroupConfig("full", 1.0, True), GroupConfig("improving", 1.0))
    return TrainConfig(**({
        "stage": "stage1", "init_from": str(base / "base"), "total_steps": 5, "save_every": 2,
        "dtype": "float32", "remat": "none", "mesh": MeshConfig(fsdp=1, context=8),
        "loss": LossConfig(vae_batch=4), "optimizer": OptimizerConfig(learning_rate=1e-3),
        "data": data_config(source=str(base / "data"), groups=groups, packs_per_step=4)} | fields))


def metrics(folder) -> dict[int, tuple]:
    """Step -> losses; the last line of a step counts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["ce"], line["mse"], line["grad_norm"]) for line in lines}


def signal_after(number: int, monkeypatch) -> None:
    """SIGTERM comes while this step is told of."""
    tell = Progress.tell
    def tell_then_signal(self, step, *args):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        tell(self, step, *args)
    monkeypatch.setattr(Progress, "tell", tell_then_signal)


@pytest.fixture(scope="module")
def undisturbed(base):
    assert train(config(base), base / "run") == 5
    return metrics(base / "run" / "stage1")


def test_losses_fall_into_the_log(undisturbed, base):
    assert sorted(undisturbed) == [0, 1, 2, 3, 4]
    assert (base / "run" / "stage1" / "tensorboard").is_dir()
    saved = json.loads((base / "run" / "stage1" / "config.json").read_text())
    assert saved["total_steps"] == 5


def test_a_signal_saves_and_the_same_command_resumes_bit_for_bit(undisturbed, base, monkeypatch):
    signal_after(1, monkeypatch)
    reached = train(config(base), base / "interrupted")
    assert 1 < reached < 5
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"stopped at step {reached} of 5"):
        train(config(base, stage="stage2", init_from="stage1:ema"), base / "interrupted")
    assert train(config(base), base / "interrupted") == 5
    assert metrics(base / "interrupted" / "stage1") == undisturbed
    one, other = (load_model(base / run / "stage1").params for run in ("run", "interrupted"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_finished_stage_is_left_alone(undisturbed, base, capsys):
    assert train(config(base), base / "run") == 5
    assert "already at step 5" in capsys.readouterr().out


def test_stage_two_starts_from_the_ema_of_stage_one(undisturbed, base):
    # A learning rate of zero leaves the weights where they started: stage 2 must end where stage 1's EMA is.
    still = OptimizerConfig(learning_rate=0.0)
    train(config(base, stage="stage2", init_from="stage1:ema", total_steps=1, optimizer=still), base / "run")
    one, two = (load_model(base / "run" / stage).params for stage in ("stage1", "stage2"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


def test_a_damaged_checkpoint_is_not_used_and_the_run_goes_on_from_the_one_before(undisturbed, base, caplog):
    shutil.copytree(base / "run" / "stage1", base / "damaged" / "stage1")
    newest = base / "damaged" / "stage1" / "checkpoints" / "5"
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 2] ^= 4
    data.write_bytes(whole)
    assert train(config(base), base / "damaged") == 5
    assert "checkpoints/5 is not used: state/" in caplog.text and (newest.parent / "5.bad").is_dir()
    assert metrics(base / "damaged" / "stage1") == undisturbed
    one, other = (load_model(base / run / "stage1").params for run in ("run", "damaged"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_other_data_on_resume_are_refused(undisturbed, base):
    changed = config(base, total_steps=7)
    changed = dataclasses.replace(changed, data=dataclasses.replace(changed.data, seed=1))
    with pytest.raises(ValueError, match="step 5 was saved"):
        train(changed, base / "run", accepted=["total_steps"])


@pytest.mark.parametrize("fields, message", [
    ({"init_from": "nowhere"}, "nowhere"),
    ({"init_from": "stage1:weights", "stage": "other"}, "'<stage>:ema'"),
    ({"init_from": "absent:ema", "stage": "other"}, "absent"),
])
def test_a_start_that_cannot_be_is_refused(base, fields, message):
    with pytest.raises(ValueError, match=message):
        train(config(base, **fields), base / "refused")


def test_a_model_of_another_shape_is_refused(base):
    wrong = dataclasses.replace(config(base).data, max_latent_size=16, vit_max_side=9)
    with pytest.raises(ValueError, match="max_latent_size is 16.*; data.vit_max_side is 9"):
        train(config(base, data=wrong), base / "refused")


def test_packs_that_cannot_be_dealt_are_refused(base):
    with pytest.raises(ValueError, match="is 4; it must be a multiple of mesh.data \\* mesh.fsdp = 8"):
        train(config(base, mesh=MeshConfig()), base / "refused")


def test_steps_that_are_not_finite_change_nothing_and_too_many_stop_the_run(base, caplog):
    broken = OptimizerConfig(learning_rate=1e30, clip=1e30)
    with pytest.raises(FloatingPointError, match=r"in 2 steps in a row .* full \d+ \(.*parquet.*row") as told:
        train(config(base, optimizer=broken, total_steps=20, max_skipped=2), base / "broken")
    log = (base / "broken" / "stage1" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines))) and len(lines) < 5
    assert all(np.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in lines)
    assert caplog.text.count("changed nothing: loss is") == 2
    assert f"at step {len(lines) + 1};" in str(told.value)
