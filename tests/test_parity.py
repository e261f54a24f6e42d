"""Module by module against the original's own values: `pytest tests/test_parity.py --golden DIR`.

Tolerances are those of tests/golden/README.md; nothing here knows the sizes of the first golden set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data_pipelines.batch import Rows, visible
from data_pipelines.config import ImageTransform
from data_pipelines.images import resize, target_size
from irg_jax.models.irg import unpack_latent
from irg_jax.sampling.config import TextConfig
from irg_jax.sampling.modes import infer
from irg_jax.sampling.modes import trajectories
from irg_jax.sampling.trajectory import Generator
from irg_jax.training.losses import encode_latents, token_losses
from irg_jax.training.optimizer import learning_rate, make_optimizer
from irg_jax.training.state import create_state
from irg_jax.training.step import make_gradient
from irg_jax.training.update import make_update
from parity_cases import (
    ParityCase,
    batched_rows,
    first_turn,
    flow,
    generator,
    grey_levels,
    numbers,
    relative,
    second_turn,
    thought,
    trajectory_generator,
)
from test_batch import dense_mask

MODULE, LOSS, LATENT = 1e-5, 1e-4, 1e-4


@pytest.fixture(scope="module")
def case(golden_dir) -> ParityCase:
    return ParityCase(golden_dir)


def nhwc(x: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def nchw(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


# ---- autoencoder --------------------------------------------------------------------------------

def test_vae_encode(case):
    mean, logvar = jax.jit(case.vae.encode)(nhwc(case.arrays["vae.image"]))
    relative("VAE encoder: mean", nchw(mean), case.arrays["vae.mean"], MODULE)
    relative("VAE encoder: log variance", nchw(logvar), case.arrays["vae.logvar"], MODULE)
    relative("VAE encoder: latent of mean", nchw(case.vae.scale(mean)), case.arrays["vae.latent_of_mean"],
             MODULE)


def test_vae_decode(case):
    decoded = jax.jit(case.vae.decode)(nhwc(case.arrays["vae.z"]))
    relative("VAE decoder", nchw(decoded), case.arrays["vae.decoded"], MODULE)


def test_packed_images_encode_as_they_do_alone(case):
    """The masked canvas of the training step, against the original's image-by-image encoding."""
    config, batch = case.step_config(), case.pack()
    latent = jax.jit(lambda b: encode_latents(case.vae, b, config.loss, config.canvas, jax.random.key(0),
                                              jnp.float32))(batch)
    table = zip(*(np.asarray(x)[0] for x in (batch.image_start, batch.image_height, batch.image_width)))
    for i, (start, height, width) in enumerate(row for row in table if row[1]):
        tokens = latent[:, start:start + height * width]
        image = unpack_latent(tokens, int(height), case.config.latent_patch_size)
        # uint8 pixels stand for the golden floats, hence not exactly the module tolerance of encode.
        relative("VAE encoder on a packed canvas", nchw(image)[0], case.arrays[f"train.latent.{i}"], MODULE)


# ---- vision ---------------------------------------------------------------------------------------

def test_vit_and_connector(case):
    lengths = case.arrays["vit.lengths"].tolist()
    rows = batched_rows(sum(lengths), lengths)
    patches = jnp.asarray(case.arrays["vit.patches"])[None]
    position = jnp.asarray(case.arrays["vit.position_ids"], jnp.int32)[None]
    hidden = jax.jit(case.irg.vit)(patches, position, rows)
    relative("SigLIP", hidden[0], case.arrays["vit.hidden"], MODULE)
    tokens = jax.jit(case.irg.embed_vit)(patches, position, rows)
    relative("SigLIP, connector and positions", tokens[0], case.arrays["vit.llm_tokens"], MODULE)


# ---- visibility -------------------------------------------------------------------------------------

def rows_of(split_lens: list[int], modes: list[str]) -> Rows:
    starts = np.cumsum([0, *split_lens[:-1]])
    order = np.arange(sum(split_lens))
    span, last, noised = order.copy(), order.copy(), np.zeros(len(order), bool)
    for start, length, mode in zip(starts, split_lens, modes):
        if mode != "causal":
            block = slice(start, start + length)
            span[block], last[block], noised[block] = start, start + length - 1, mode == "noise"
    return Rows(order, np.zeros_like(order), span, last, noised, order)


def test_visibility(case):
    for i, mask in enumerate(case.values["masks"]):
        rows = rows_of(mask["split_lens"], mask["attn_modes"])
        np.testing.assert_array_equal(visible(rows, rows), case.arrays[f"mask.{i}"].astype(bool))
        np.testing.assert_array_equal(dense_mask(mask["split_lens"], mask["attn_modes"]),
                                      case.arrays[f"mask.{i}"].astype(bool))


# ---- images -----------------------------------------------------------------------------------------

def test_resize_rule(case):
    for width, height, _, stride, largest, smallest, *expected in case.values["resize"]:
        transform = ImageTransform(stride, largest, smallest)
        assert list(target_size(width, height, transform)) == expected
    resized = resize(case.arrays["edit.image_uint8"], ImageTransform(*case.values["edit"]["vae_transform"]))
    np.testing.assert_array_equal(resized, case.arrays["edit.resized_uint8"])


# ---- training -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_packed_forward(case, remat):
    batch = case.pack()
    ce, error = jax.jit(lambda b, f: token_losses(case.irg, b, f, dtype=jnp.float32, remat=remat))(
        batch, case.flow(batch))
    relative("packed forward: CE a token", ce[0][batch.text_weight[0] > 0], case.arrays["train.ce"], LOSS)
    relative("packed forward: MSE a token", error[0][batch.latent_weight[0] > 0], case.arrays["train.mse"],
             LOSS)


@pytest.mark.parametrize("reweight", [False, True])
def test_losses(case, reweight):
    batch = case.pack(ce_reweight=reweight)
    gradient = make_gradient(case.network, case.step_config())
    (ce, mse, *_), _ = jax.jit(gradient)(case.params, batch, case.flow(batch))
    expected = case.values["train_loss"]
    relative("loss: CE", ce, expected["ce_reweighted" if reweight else "ce"], LOSS)
    relative("loss: MSE", mse, expected["mse"], LOSS)


def test_every_gradient(case):
    batch = case.pack()
    gradient = jax.jit(make_gradient(case.network, case.step_config(remat="none")))
    _, grads = gradient(case.params, batch, case.flow(batch))
    relative("gradient norm", optax.tree.norm(grads), case.values["grad_norm"], LOSS)
    torch = case.to_torch(grads)
    expected = {name[5:]: x for name, x in case.arrays.items() if name.startswith("grad/")}
    assert set(torch) == set(expected)
    largest = max(np.linalg.norm(x) for x in expected.values())
    for name, x in expected.items():
        # SigLIP's key bias moves all scores of a query alike: its gradient is zero but for rounding noise.
        if name.startswith("vit_model") and name.endswith("self_attn.k_proj.bias"):
            assert max(np.linalg.norm(torch[name]), np.linalg.norm(x)) < 1e-5 * largest, name
        else:
            relative("every gradient (largest error)", torch[name], x, LOSS)


def test_five_optimizer_steps(case):
    config, values = case.step_config(remat="none"), case.values["optim"]
    optimizer = make_optimizer(config.optimizer, config.total_steps)
    gradient = make_gradient(case.network, config)
    update = make_update(case.network, config.optimizer, optimizer)
    batch = case.pack()
    flow, rate = case.flow(batch), learning_rate(config.optimizer, config.total_steps)

    @jax.jit
    def step(state):
        (ce, mse, *_), grads = gradient(state.params, batch, flow)
        norm = optax.tree.norm(grads)
        return update(state, grads, norm, True)[0], (rate(state.step), ce, mse, norm)
    state = create_state(case.params, optimizer)
    for expected in values["trajectory"]:
        state, measured = step(state)
        for name, value in zip(("lr", "ce", "mse", "grad_norm"), measured):
            relative(f"optimiser steps: {name}", value, expected[name], LOSS)
    params, ema = map(case.to_torch, (state.params, state.ema))
    for name, x in case.arrays.items():
        kind, _, path = name.partition("/")
        if kind == "optim.param":
            relative("optimiser steps: parameters", params[path], x, MODULE)
        elif kind == "optim.ema":
            relative("optimiser steps: EMA", ema[path], x, MODULE)


# ---- generation ---------------------------------------------------------------------------------
# The public generator runs, with a tokenizer of numbers and the golden noise.

@pytest.fixture(scope="module")
def trajectory(case) -> Generator:
    return trajectory_generator(case)


def test_think_texts(case, trajectory):
    values = case.values["infer"]
    state = trajectory.begin([numbers(values["prompt"])], seeds=[0])
    assert thought(trajectory, state) == values["think1_raw"]
    assert thought(trajectory, second_turn(case, trajectory)) == values["think2_raw"]


@pytest.mark.parametrize("turn", [1, 2])
def test_image_of_a_turn(case, trajectory, turn):
    """Every guidance variant that the golden set names: turn1, turn1_channel, turn2_global, ..."""
    values, state = case.values["infer"], first_turn(case, trajectory)
    if turn == 2:
        _, state = trajectory.think(second_turn(case, trajectory), [numbers(values["think2"])])
    size = {"height": trajectory.config.height, "width": trajectory.config.width}
    variants = [name for name in values if name.partition("_")[0] == f"turn{turn}"]
    assert f"turn{turn}" in variants
    for variant in variants:
        settings = flow(values[variant])
        latent = trajectory.draw_latent(state, flow=settings, **size)
        relative(f"trajectory: latent of {variant}", latent[0],
                 case.arrays["infer.latent" + variant.removeprefix("turn")], LATENT)
    grey_levels(f"image of turn{turn}", trajectory.draw(state, flow=flow(values[f"turn{turn}"]))[0],
                case.arrays[f"infer.image{turn}_uint8"])


def test_whole_trajectory(case, trajectory):
    """Nothing given but the noise: the model's own texts and its own image as condition."""
    values = case.values["infer"]
    (turns,) = trajectories(trajectory, [numbers(values["prompt"])], seeds=[0])
    for number, turn in enumerate(turns, 1):
        assert turn.text == numbers(values[f"think{number}"])
        grey_levels(f"free trajectory: image {number}", turn.image,
                    case.arrays[f"infer.image{number}_uint8"])


def test_plain_text_to_image(case):
    values = case.values["t2i"]
    drawer = generator(case, ["t2i.noise"], {**case.values["infer"], **values},
                       turn1=flow(values["args"]))
    state = drawer.begin([numbers(values["prompt"])], seeds=[0], system=False)
    latent = drawer.draw_latent(state, height=values["height"], width=values["width"])
    relative("text-to-image: latent", latent[0], case.arrays["t2i.latent"], LATENT)


def test_editing(case, monkeypatch):
    values, noise = case.values["edit"], ["edit.noise"] * 2
    editor = generator(case, noise, values, turn2=flow(values["args"]))
    said = (case.arrays["edit.image_uint8"], numbers(values["instruction"]))
    show, latents = editor.show, []
    monkeypatch.setattr(editor, "show", lambda latent, height: latents.append(latent) or show(latent, height))
    ((answer,),) = infer(editor, [said], seeds=[0])
    assert answer.image.shape[:2] == (values["height"], values["width"])
    relative("editing: latent", latents[0][0], case.arrays["edit.latent"], LATENT)


def test_understanding(case):
    values, logits = case.values["chat"], case.arrays["chat.logits"]
    patch, side = case.config.vit.patch_size, case.config.vit_max_num_patch_per_side
    whole = [patch, side * patch, patch]  # the golden image is given in its final size
    chat = generator(case, [], {**case.values["infer"], "vit_transform": whole},
                     text=TextConfig(max_length=len(logits), do_sample=False))
    state = chat.look(chat.start([0], system=False), case.arrays["chat.image_uint8"][None], use_vae=False)
    state = chat.ask(state, [numbers(values["question"])])
    written = chat.write(state, want_logits=True)
    length = int(written.lengths[0])
    assert np.asarray(written.ids)[0, :length].tolist() == values["answer_raw"]
    relative("understanding: logits of each step", written.logits[0, :length], logits[:length], LATENT)
