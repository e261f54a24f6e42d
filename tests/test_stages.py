"""Two stages as one command: the second starts from the first's EMA, and both ends are drawn and exported."""

import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from PIL import Image

from data_pipelines.config import from_config_dict, load_config
from irg_jax.checkpoints.bagel import import_folder
from irg_jax.checkpoints.bundle import latest_step
from irg_jax.checkpoints.model import load_model
from irg_jax.evaluation.samples import SampleConfig, Samples
from irg_jax.parallel.hosts import Hosts
from irg_jax.sampling.config import SamplingConfig
from irg_jax.train import export, main, merge, read_stages
from irg_jax.training.interrupt import Interrupt
from irg_jax.training.loop import train
from test_distributed import launch
from test_loop import base, config  # noqa: F401 (a fixture)

STAGE = """{{
    "total_steps": {steps}, "save_every": 2, "dtype": "float32", "remat": "none", "loss": {{"vae_batch": 4}},
    "init_from": {init!r}, "optimizer": {{"learning_rate": 1e-3, "eps": 1e-4}},
    "samples": {{"prompts": ("two red circles", "a blue square"), "sampling": {{
        "height": 32, "width": 48, "dtype": "float32", "text": {{"max_length": 6}},
        "turn1": {{"num_timesteps": 3}}, "turn2": {{"num_timesteps": 3}},
        "vae_transform": {{"stride": 16, "max_size": 64, "min_size": 16}},
        "vit_transform": {{"stride": 14, "max_size": 56, "min_size": 14}}}}}},
    "draw_every": 2, "export": "bagel",
    "data": {{
        "source": "elsewhere",
        "groups": {{"full": {{"weight": 1.0, "is_mandatory": True}}, "improving": {{"weight": 1.0}}}},
        "packs_per_step": 2, "text_tokens": 160, "vit_tokens": 48, "latent_tokens": 48, "images": 6,
        "max_latent_size": 8, "vit_max_side": 8, "vae_dropout": 0.0,
        "vae_transform": {{"stride": 16, "max_size": 64, "min_size": 16}},
        "vit_transform": {{"stride": 14, "max_size": 56, "min_size": 14}},
    }}}}"""


@pytest.fixture(scope="module")
def job(base):  # noqa: F811
    one, two = STAGE.format(steps=3, init=str(base / "base")), STAGE.format(steps=2, init="first:ema")
    path = base / "job.py"
    path.write_text("import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({"
                    f"'stages': {{'first': {one}, 'second': {two}}}}})\n")
    return path


@pytest.fixture(scope="module")
def run(job, base):  # noqa: F811
    [(code, output)] = launch(job, base / "job", 1, 1, f"--config.data.source={base / 'data'}")
    assert code == 0, output
    return base / "job"


def test_both_stages_are_trained_drawn_and_exported(run):
    for stage, steps in (("first", (2, 3)), ("second", (2,))):
        names = sorted(path.name for path in (run / stage / "samples").iterdir())
        assert names == sorted(f"step_{step:06d}.{kind}" for step in steps for kind in ("json", "png"))
        told = json.loads((run / stage / "samples" / f"step_{steps[-1]:06d}.json").read_text())
        assert told["prompts"] == ["two red circles", "a blue square"] and len(told["turns"]) == 2
        assert all(len(turns) == 2 for turns in told["turns"])
        picture = np.asarray(Image.open(run / stage / "samples" / f"step_{steps[-1]:06d}.png"))
        assert picture.std() > 5
        exported, kept = import_folder(run / stage / "export"), load_model(run / stage)
        for one, other in zip(*(model.params["decoder"]["norm"]["scale"] for model in (exported, kept))):
            np.testing.assert_allclose(one, other, rtol=1e-2)


@pytest.mark.slow
def test_two_hosts_draw_and_export_the_same(job, run, base):  # noqa: F811
    """The first draws alone, on its own two devices; moments and EMA lie in the hosts' memory."""
    done = launch(job, base / "hosts", 2, 2, f"--config.data.source={base / 'data'}", "--config.mesh.fsdp=2",
                  "--config.mesh.tensor=2", "--config.on_host=('moments','ema')")
    assert all(code == 0 for code, _ in done), done
    assert sum(output.count("exported") for _, output in done) == 2 and "exported" in done[0][1]
    for stage, step in (("first", 3), ("second", 2)):
        one, other = (folder / stage / "samples" / f"step_{step:06d}" for folder in (run, base / "hosts"))
        told, found = (json.loads(path.with_suffix(".json").read_text()) for path in (one, other))
        assert found == told
        pictures = [np.asarray(Image.open(path.with_suffix(".png")), np.int16) for path in (one, other)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2
        kept = [import_folder(folder / stage / "export").params for folder in (run, base / "hosts")]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=5e-3), *kept)


def test_a_signal_at_a_stages_end_begins_nothing_else(job, base, tmp_path, monkeypatch, capsys):  # noqa: F811
    mesh = {"mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}
    config = load_config(str(job), overrides={"data.source": str(base / "data")} | mesh)
    signal_at = lambda self, model, step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    monkeypatch.setattr(Samples, "__call__", signal_at)
    main(types.SimpleNamespace(
        config=config, workdir=str(tmp_path), topology="", dry_run=False, accept_changes=[], distributed=False,
        coordinator_address="", num_processes=None, process_id=None, start_timeout=300))
    assert latest_step(tmp_path / "first") == 3
    assert "first: stopped when it was trained" in capsys.readouterr().out
    assert not (tmp_path / "first" / "export").exists() and not (tmp_path / "second").exists()


def test_several_hosts_number_their_calls_from_one_over_all_stages(monkeypatch):
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda call: asked.append(call))
    interrupt = Interrupt(Hosts(0, ("one", "two")))
    for _ in range(3):
        interrupt.reached()
    assert asked == [1, 2, 3]    # JAX's service compares for equality, from 0 on


def test_a_finished_job_is_left_alone(job, run, base):  # noqa: F811
    times = lambda: {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    before = times()
    [(code, output)] = launch(job, run, 1, 1, f"--config.data.source={base / 'data'}")
    assert code == 0
    assert "first: already at step 3 of 3" in output and "second: already at step 2 of 2" in output
    changed = {path for path, when in times().items() if when != before.get(path)}
    assert changed <= {run / stage / "lock" for stage in ("first", "second")}


def test_an_export_is_made_again_once_the_stage_has_gone_on(job, run, base):  # noqa: F811
    stage = read_stages(load_config(str(job), overrides={"data.source": str(base / "data")}))[1]
    target = run / "second" / "export"
    made = target.stat().st_ino
    export(stage, run)
    assert target.stat().st_ino == made
    os.utime(target, (0, 0))
    export(stage, run)
    assert target.stat().st_mtime > 1 and import_folder(target)


@pytest.mark.parametrize("fields, message", [
    ({"height": 40}, "40 x 1024 pixels does not suit the model"),
    ({"system_prompt": "@nowhere.txt"}, "nowhere.txt"),
])
def test_samples_that_cannot_be_drawn_are_refused_at_once(base, tmp_path, fields, message):  # noqa: F811
    samples = Samples(SampleConfig(("a red circle",), SamplingConfig(**fields)), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(config(base, stage="drawn"), base / "run", draw=samples)
    assert not (base / "run" / "drawn").exists()


def test_what_stands_beside_the_stages_holds_for_all():
    stage = {"init_from": "x", "total_steps": 3, "data": {"source": "here"}}
    with pytest.raises(ValueError, match="stages.one.data.groups"):
        read_stages({"stages": {"one": stage}})
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {"a": {"b": 3, "c": 2}, "d": 4}


@pytest.mark.parametrize("path", ["configs/irgl.py", "configs/shapes.py", "configs/shapes.py:quick"])
def test_the_configs_of_both_stages_are_sound(path):
    one, two = read_stages(load_config(path, overrides={"data.source": "elsewhere", "mesh.context": 2}))
    assert (one.stage, two.stage, two.init_from) == ("stage1", "stage2", "stage1:ema")
    for stage in (one, two):
        assert stage.data.source == "elsewhere" and stage.mesh.context == 2 and stage.export == "bagel"
        assert from_config_dict(SampleConfig, stage.samples).prompts


@pytest.mark.parametrize("config, message", [
    ({"stages": 3}, "expected stages by name"),
    ({"stages": {"one": {"init_from": "x", "total_stepz": 3}}}, "stages.one.total_stepz.*'total_steps'"),
    ({"total_stepz": 3}, "'total_stepz'"),
])
def test_a_config_that_is_none_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        read_stages(config)
