"""prompt -> think1 -> image1 -> (look at it) -> think2 -> image2 -> ..., for many prompts at once.

    generator = Generator(load_model("runs/shapes/stage2"), config)
    for turns in generator.trajectories(["two red circles"], seeds=[0]):
        turns[1].text, turns[1].image

A trajectory is a `State` that steps make a new one of: `begin`, `think`, `draw`, `look`. States are
values: one can be kept, branched, or continued with another text or image than the model's own.

Axes: B prompts, H and W pixels, G latent tokens, Z values of a latent token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.images import grid_position, patchify, resize
from data_pipelines.system_prompts import load_system_prompt
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Params
from irg_jax.sampling import cache, programs
from irg_jax.sampling.cache import Context
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.flow import Branches
from irg_jax.sampling.text import Written

NOISE, TEXT, POSTERIOR = range(3)  # what a random number is for


class LoadedModel(Protocol):
    """What `irg_jax.checkpoints` loads; `tokenizer` is a `data_pipelines.tokenizer.Tokenizer`."""

    config: ModelConfig
    tokenizer: Any
    params: Params
    vae: Params


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn made: a think text (empty if none was asked for), an image uint8 [H, W, 3]."""

    text: str
    image: np.ndarray


@dataclasses.dataclass(frozen=True)
class State:
    """B trajectories on their way; the contexts are what the next text or image is made after.

    For guidance two more are kept: `unasked` lacks what the next image is to follow (turn 1: all
    but the system prompt; later: the newest think text), `unseen` has every text and no image.
    """

    main: Context
    unasked: Context
    unseen: Context
    seeds: np.ndarray  # uint32 [B]
    turn: int = 0      # images looked at so far


def draw_noise(seeds: np.ndarray, turn: int, shape: tuple[int, int]) -> jax.Array:
    """float32 [B, G, Z]: the noise of a prompt depends on its seed and turn alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(seeds, turn, NOISE))


class Generator:
    """Draws with one model. Raises ValueError if the configured size does not suit the model."""

    def __init__(self, model: LoadedModel, config: SamplingConfig, *,
                 draw_noise: Callable[[np.ndarray, int, tuple[int, int]], jax.Array] = draw_noise):
        """Args: draw_noise replaces the initial noise of images; its arguments are its own's."""
        dtype = jnp.dtype(config.dtype)
        to_device = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        self.model_config, self.config, self.tokenizer = model.config, config, model.tokenizer
        self._weights = programs.Weights(to_device(model.params), to_device(model.vae))
        self._draw_noise = draw_noise
        self._brackets = np.array([self.tokenizer.start_of_image, self.tokenizer.end_of_image],
                                  np.int32)
        self._check_transforms()
        self._latent_position(config.height, config.width)
        self._empty = cache.make_empty(model.config, 1, config.cache_multiple, dtype)
        prompt = load_system_prompt(config.system_prompt)
        self._system = self.append_text(self._empty, [prompt]) if prompt else self._empty

    def trajectories(self, prompts: Sequence[str], *, seeds: Sequence[int],
                     num_turns: int | None = None) -> list[tuple[Turn, ...]]:
        """The turns of each prompt; `num_turns` as configured if None. One turn is self-CoT."""
        state, turns = self.begin(prompts, seeds=seeds), []
        num_turns = num_turns or self.config.num_turns
        for number in range(num_turns):
            texts, state = self.think(state)
            images = self.draw(state)
            turns.append([Turn(text, image) for text, image in zip(texts, images, strict=True)])
            if number + 1 < num_turns:
                state = self.look(state, images)
        return list(zip(*turns, strict=True))

    def text_to_image(self, prompts: Sequence[str], *, seeds: Sequence[int]) -> list[Turn]:
        """Plain drawing: no system prompt, no thinking, guided away from an empty context."""
        state = self.begin(prompts, seeds=seeds, system=False)
        return [Turn("", image) for image in self.draw(state)]

    def start(self, seeds: Sequence[int], *, system: bool = True) -> State:
        """Nothing is said yet but the system prompt if `system`."""
        context = cache.repeat(self._system if system else self._empty, len(seeds))
        return State(context, context, context, np.asarray(seeds, np.uint32))

    def ask(self, state: State, texts: Sequence[str]) -> State:
        """Reads what the user says."""
        return self._read(state, texts, unasked=state.main)

    def begin(self, prompts: Sequence[str], *, seeds: Sequence[int], system: bool = True) -> State:
        """Reads the prompts, after the system prompt if `system`."""
        return self.ask(self.start(seeds, system=system), prompts)

    def think(self, state: State, texts: Sequence[str] | None = None) -> tuple[list[str], State]:
        """Writes a text for each prompt, or takes `texts` as written; then reads them."""
        texts = self.decode(self.write(state)) if texts is None else list(texts)
        return texts, self._read(state, texts, unasked=state.main if state.turn else state.unasked)

    def draw(self, state: State, *, flow: FlowConfig | None = None, height: int | None = None,
             width: int | None = None) -> np.ndarray:
        """Images uint8 [B, H, W, 3]; settings of the turn and the configured size if not given."""
        height, width = height or self.config.height, width or self.config.width
        latent = self.draw_latent(state, flow=flow, height=height, width=width)
        rows = height // self.model_config.pixels_per_token
        image = programs.decode(self._weights, latent, config=self.model_config, height=rows)
        return np.asarray(image)

    def look(self, state: State, images: Sequence[np.ndarray], *, use_vae: bool = True) -> State:
        """Reads images uint8 [H, W, 3] of one size: clean latents if `use_vae`, then by the ViT."""
        main = state.main
        if use_vae:
            main = self._append_latents(main, images, state)
        main = self._append_patches(main, images)
        return dataclasses.replace(state, main=main, turn=state.turn + 1)

    def write(self, state: State, *, settings: TextConfig | None = None, want_logits: bool = False) -> Written:
        """The next text as ids, see `text.Written`; the state is as it was. Settings as configured if None."""
        settings = settings or self.config.text
        context = self._reserve(state.main, settings.max_length)
        return programs.write(self._weights, context, _keys(state.seeds, state.turn, TEXT),
                              config=self.model_config, bos=self.tokenizer.bos,
                              eos=self.tokenizer.eos, settings=settings, want_logits=want_logits)

    def draw_latent(self, state: State, *, flow: FlowConfig | None = None, height: int,
                    width: int) -> jax.Array:
        """Finished latents float32 [B, G, Z]."""
        config = self.model_config
        position = self._latent_position(height, width)
        noise = self._draw_noise(state.seeds, state.turn, (len(position), config.latent_channels))
        branches = Branches(state.main, state.unasked, state.unseen)
        return programs.draw(self._weights, branches, noise, position, self._brackets,
                             config=config, settings=flow or self.config.flow(state.turn))

    def _read(self, state: State, texts: Sequence[str], *, unasked: Context) -> State:
        main = self.append_text(state.main, texts)
        # Until the first image both are the same context, and stay one.
        unseen = main if state.unseen is state.main else self.append_text(state.unseen, texts)
        return dataclasses.replace(state, main=main, unseen=unseen, unasked=unasked)

    def append_text(self, context: Context, texts: Sequence[str]) -> Context:
        """One context more, with a text after each of its rows."""
        ids = [[self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos]
               for text in texts]
        lengths = np.array([len(row) for row in ids], np.int32)
        tokens = np.zeros((len(ids), _round_up(lengths.max(), self.config.text_multiple)), np.int32)
        for row, values in zip(tokens, ids):
            row[:len(values)] = values
        return self._append(programs.read_text, context, tokens.shape[1], tokens, lengths)

    def _append_latents(self, context: Context, images, state: State) -> Context:
        pixels = np.stack([resize(image, self.config.vae_transform) for image in images])
        position = self._latent_position(*pixels.shape[1:3])
        is_sampled = self.config.posterior == "sample"
        keys = _keys(state.seeds, state.turn, POSTERIOR) if is_sampled else None
        return self._append(programs.read_image, context, len(position) + len(self._brackets),
                            pixels, keys, position, self._brackets)

    def _append_patches(self, context: Context, images) -> Context:
        pixels = [resize(image, self.config.vit_transform) for image in images]
        patch, side = self.model_config.vit.patch_size, self.model_config.vit_max_num_patch_per_side
        position = grid_position(*(size // patch for size in pixels[0].shape[:2]), side)
        patches = np.stack([patchify(image, patch) for image in pixels])
        return self._append(programs.read_patches, context, len(position) + len(self._brackets),
                            patches, position, self._brackets)

    def _append(self, program: Callable[..., Context], context: Context, num_tokens: int,
                *arguments: Any) -> Context:
        context = self._reserve(context, num_tokens)
        after = program(self._weights, context, *arguments, config=self.model_config)
        # The host knows the length; reading it back would wait for the device.
        return after._replace(length=context.length + num_tokens)

    def _reserve(self, context: Context, num_tokens: int) -> Context:
        capacity = _round_up(context.length + num_tokens, self.config.cache_multiple)
        return cache.enlarge(context, capacity)

    def decode(self, written: Written) -> list[str]:
        """What was written, as texts."""
        ids, lengths = np.asarray(written.ids), np.asarray(written.lengths)
        return [self.tokenizer.decode(row[1:length]) for row, length in zip(ids, lengths)]

    def _check_transforms(self) -> None:
        patches = {"vae_transform": self.model_config.pixels_per_token,
                   "vit_transform": self.model_config.vit.patch_size}
        for name, patch in patches.items():
            stride = getattr(self.config, name).stride
            if stride % patch:
                raise ValueError(f"{name}.stride is {stride}; it must be a multiple of the model's "
                                 f"patch of {patch} pixels")

    def _latent_position(self, height: int, width: int) -> np.ndarray:
        """int32 [G] of an image; ValueError if its size is none the model can draw."""
        pixels, side = self.model_config.pixels_per_token, self.model_config.max_latent_size
        if height % pixels or width % pixels or max(height, width) > side * pixels:
            raise ValueError(f"an image of {height} x {width} pixels does not suit the model; use "
                             f"multiples of {pixels} up to {side * pixels}")
        return grid_position(height // pixels, width // pixels, side)


def _keys(seeds: np.ndarray, turn: int, purpose: int) -> jax.Array:
    """Random keys [B] that no other prompt, turn or purpose shares."""
    data = jnp.uint32(3 * turn + purpose)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), data))(seeds)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
