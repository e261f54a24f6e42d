"""prompt -> think1 -> image1 -> (look at it) -> think2 -> image2 -> ..., for many prompts at once.

    generator = Generator(load_model("runs/shapes/stage2"), config)
    state = generator.begin(["two red circles"], seeds=[0])
    texts, state = generator.think(state)
    images = generator.draw(state)
    state = generator.look(state, images)

A trajectory is a `State` that steps make a new one of, with the model's own texts and images or with others;
whole trajectories are `modes.trajectories`. Steps that read use a state up, as they write its cache where it
lies; `fork` it first to go on from it twice.

Axes: B prompts, H and W pixels, G latent tokens, Z values of a latent token.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.images import grid_position, patchify, resize, target_size
from data_pipelines.system_prompts import load_system_prompt
from irg_jax.models.config import ModelConfig
from irg_jax.models.functional import Params
from irg_jax.parallel.sharding import BATCH_AXES, MeshConfig, make_mesh
from irg_jax.sampling import cache, programs
from irg_jax.sampling.cache import Context, View
from irg_jax.sampling.config import FlowConfig, SamplingConfig, TextConfig
from irg_jax.sampling.flow import Branches
from irg_jax.sampling.text import Written, begin_text

NOISE, TEXT, POSTERIOR = range(3)  # what a random number is for


class LoadedModel(Protocol):
    """What `irg_jax.checkpoints` loads; `tokenizer` is a `data_pipelines.tokenizer.Tokenizer`."""

    config: ModelConfig
    tokenizer: Any
    params: Params
    vae: Params


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one turn made: a text (empty if none was asked for), an image uint8 [H, W, 3] (or None)."""

    text: str
    image: np.ndarray | None
    has_ended: bool = True    # False of a text that was cut at its greatest length

    def change(self, last: "Turn") -> float:
        """Mean difference from an earlier image in grey levels; infinite if it has another size."""
        if self.image.shape != last.image.shape:
            return math.inf
        return float(np.abs(self.image.astype(np.int16) - last.image).mean())


@dataclasses.dataclass(frozen=True)
class Given:
    """What a user brings for a prompt: think texts of the first turns, None for the model's, and an image."""

    texts: tuple[str | None, ...] = ()
    image: np.ndarray | None = None    # uint8 [H, W, 3], in place of the first one drawn

    def text(self, turn: int) -> str | None:
        return self.texts[turn] if turn < len(self.texts) else None


class Text(NamedTuple):
    """Texts between their brackets, padded to one length."""

    tokens: np.ndarray    # int32 [B, T]
    lengths: np.ndarray   # int32 [B]


@dataclasses.dataclass(frozen=True)
class State:
    """B trajectories on their way; `main` is what the next text or image is made after.

    For guidance two moments of it are kept: `unasked` lacks what the next image is to follow (turn 1: all but
    the system prompt; later: the newest think text), `unseen` has every text and no image: what it was before
    the first one, and the texts since then, which are read when an image is drawn that asks for them.
    """

    main: Context
    unasked: View
    unseen: View
    unread: tuple[Text, ...]   # after `unseen`
    seeds: np.ndarray          # uint32 [B]
    turn: int = 0              # images looked at so far


def fork(state: State) -> State:
    """The same state once more, with a cache of its own."""
    return dataclasses.replace(state, main=cache.fork(state.main, state.main.view))


def draw_noise(seeds: np.ndarray, turn: int, shape: tuple[int, int]) -> jax.Array:
    """float32 [B, G, Z]: the noise of a prompt depends on its seed and turn alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(seeds, turn, NOISE))


class Generator:
    """Draws with one model. Raises ValueError if the configured size does not suit the model."""

    def __init__(self, model: LoadedModel, config: SamplingConfig, *, mesh: Mesh | None = None,
                 draw_noise: Callable[[np.ndarray, int, tuple[int, int]], jax.Array] = draw_noise):
        """Args: mesh is that of this process's devices to draw on, the first one alone by default.
            draw_noise replaces the initial noise of images; its arguments are its own's.
        """
        self.model_config, self.config, self.tokenizer = model.config, config, model.tokenizer
        self.mesh = mesh or _default_mesh()
        dtype = jnp.dtype(config.dtype)
        self._weights = programs.place(model.params, model.vae, model.config, dtype, self.mesh,
                                       quantized=config.weights)
        self._draw_noise = draw_noise
        self._brackets = np.array([self.tokenizer.start_of_image, self.tokenizer.end_of_image],
                                  np.int32)
        self._check_transforms()
        self._latent_position(config.height, config.width)
        # Of the contexts that all prompts begin with, one a shard of the batch.
        self._ways = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        empty = cache.make_empty(model.config, self._ways, config.cache_multiple, dtype)
        self._empty = self._system = cache.place(empty, self.mesh)
        if prompt := load_system_prompt(config.system_prompt):
            self._system = self.append_text(cache.fork(self._empty, self._empty.view), [prompt] * self._ways)

    def text_to_image(self, prompts: Sequence[str], *, seeds: Sequence[int]) -> list[Turn]:
        """Plain drawing: no system prompt, no thinking, guided away from an empty context."""
        state = self.begin(prompts, seeds=seeds, system=False)
        return [Turn("", image) for image in self.draw(state)]

    def fit_batch(self, size: int) -> int:
        """The least number of trajectories, from `size` and 1 on, that the mesh deals evenly."""
        return _round_up(max(size, 1), self._ways)

    def sizes_seen(self, image: np.ndarray | None) -> tuple[tuple[int, int], ...]:
        """At which sizes an image (None: one that is drawn) is looked at; those of one `look` are equal."""
        height, width = (self.config.height, self.config.width) if image is None else image.shape[:2]
        return tuple(target_size(width, height, transform)
                     for transform in (self.config.vae_transform, self.config.vit_transform))

    def context_bytes(self, *, said: int, num_turns: int, shown: int = 0) -> int:
        """What the context of one trajectory takes at most, in bytes.

        What texts and contexts are padded to comes on top.

        Args: said are tokens of the user's, and of what he gives in place of a text; shown are his images. They
            and those that are drawn count as large as any is looked at, texts of the model at full length.
        """
        looks = ((self.config.vae_transform, self.model_config.pixels_per_token),
                 (self.config.vit_transform, self.model_config.vit.patch_size))
        image = sum(min(transform.max_size ** 2, transform.max_pixels) // patch ** 2 + len(self._brackets)
                    for transform, patch in looks)
        texts = self._system.view.length + said + num_turns * max(self.config.text.max_length, said)
        tokens = texts + (shown + num_turns - 1) * image
        layers, _, heads, _, size = self._empty.kv.key.shape
        return 2 * layers * heads * size * self._empty.kv.key.dtype.itemsize * tokens

    def start(self, seeds: Sequence[int], *, system: bool = True) -> State:
        """Nothing is said yet but the system prompt if `system`.

        Raises: ValueError if the mesh does not deal so many trajectories evenly.
        """
        if len(seeds) % self._ways:
            raise ValueError(f"{len(seeds)} trajectories at once do not deal over {dict(self.mesh.shape)}; "
                             f"let batch_size be a multiple of data x fsdp = {self._ways}")
        context = cache.repeat(self._system if system else self._empty, len(seeds) // self._ways)
        return State(context, context.view, context.view, (), np.asarray(seeds, np.uint32))

    def ask(self, state: State, texts: Sequence[str]) -> State:
        """Reads what the user says."""
        return self._read(state, texts, unasked=state.main.view)

    def begin(self, prompts: Sequence[str], *, seeds: Sequence[int], system: bool = True) -> State:
        """Reads the prompts, after the system prompt if `system`."""
        return self.ask(self.start(seeds, system=system), prompts)

    def think(self, state: State, texts: Sequence[str] | None = None) -> tuple[list[str], State]:
        """Writes a text for each prompt, or takes `texts` as written; then reads them."""
        texts = self.decode(self.write(state)) if texts is None else list(texts)
        return texts, self._read(state, texts, unasked=state.main.view if state.turn else state.unasked)

    def draw(self, state: State, *, flow: FlowConfig | None = None, height: int | None = None,
             width: int | None = None) -> np.ndarray:
        """Images uint8 [B, H, W, 3]; settings of the turn and the configured size if not given."""
        height, width = height or self.config.height, width or self.config.width
        return self.show(self.draw_latent(state, flow=flow, height=height, width=width), height)

    def look(self, state: State, images: Sequence[np.ndarray], *, use_vae: bool = True) -> State:
        """Reads images uint8 [H, W, 3] of one size: clean latents if `use_vae`, then by the ViT."""
        main = state.main
        if use_vae:
            main = self._append_latents(main, images, state)
        main = self._append_patches(main, images)
        return dataclasses.replace(state, main=main, turn=state.turn + 1)

    def write(self, state: State, *, settings: Sequence[TextConfig] = (), want_logits: bool = False) -> Written:
        """The next text as ids, see `text.Written`; the state is as it was.

        Every token reads the whole cache, so that grows as texts do and not to their greatest length at once.

        Args: settings are those of each text, as configured if there are none.
        """
        keys, multiple = _keys(state.seeds, state.turn, TEXT), self.config.cache_multiple
        settings = settings or [self.config.text] * len(keys)
        longest = max(one.max_length for one in settings)
        writing = begin_text(settings, bos=self.tokenizer.bos, room=max(longest, self.config.text.max_length),
                             vocab_size=self.model_config.llm.vocab_size if want_logits else None)
        context = self._reserve(state.main, min(longest, -(-multiple // 2)))
        context = fork(state).main if context is state.main else context    # it is used up, the state is not
        while True:
            context, writing = self._run(programs.write, context, writing, keys, eos=self.tokenizer.eos)
            if not np.any(writing.is_going):
                return writing.written
            context = cache.enlarge(context, context.view.capacity + multiple)

    def draw_latent(self, state: State, *, flow: FlowConfig | None = None, height: int,
                    width: int) -> jax.Array:
        """Finished latents float32 [B, G, Z]."""
        flow, position = flow or self.config.flow(state.turn), self._latent_position(height, width)
        noise = self._draw_noise(state.seeds, state.turn, (len(position), self.model_config.latent_channels))
        unseen = self.without_images(state) if flow.needs_cfg_img else None
        branches = Branches(state.main, state.unasked, unseen)
        return self._run(programs.draw, branches, noise, position, self._brackets, settings=flow)

    def show(self, latent: jax.Array, height: int) -> np.ndarray:
        """Finished latents of images of `height` pixels as uint8 [B, H, W, 3]."""
        rows = height // self.model_config.pixels_per_token
        return np.asarray(self._run(programs.decode, latent, height=rows))

    def without_images(self, state: State) -> View | Context:
        """What was read but for all images: an earlier moment of the state's context, or one of its own."""
        if not state.unread:
            return state.unseen
        context = cache.fork(state.main, state.unseen)
        for text in state.unread:
            context = self._append_text(context, text)
        return context

    def _read(self, state: State, texts: Sequence[str], *, unasked: View) -> State:
        text = self._tokenize(texts)
        main = self._append_text(state.main, text)
        unseen, unread = (state.unseen, (*state.unread, text)) if state.turn else (main.view, ())
        return dataclasses.replace(state, main=main, unasked=unasked, unseen=unseen, unread=unread)

    def append_text(self, context: Context, texts: Sequence[str]) -> Context:
        """The contexts with a text after each."""
        return self._append_text(context, self._tokenize(texts))

    def _tokenize(self, texts: Sequence[str]) -> Text:
        ids = [[self.tokenizer.bos, *self.tokenizer.encode(text), self.tokenizer.eos]
               for text in texts]
        lengths = np.array([len(row) for row in ids], np.int32)
        tokens = np.zeros((len(ids), _round_up(lengths.max(), self.config.text_multiple)), np.int32)
        for row, values in zip(tokens, ids):
            row[:len(values)] = values
        return Text(tokens, lengths)

    def _append_text(self, context: Context, text: Text) -> Context:
        return self._append(programs.read_text, context, text.tokens.shape[1], *text)

    def _append_latents(self, context: Context, images, state: State) -> Context:
        pixels = _stack([resize(image, self.config.vae_transform) for image in images])
        position = self._latent_position(*pixels.shape[1:3])
        is_sampled = self.config.posterior == "sample"
        keys = _keys(state.seeds, state.turn, POSTERIOR) if is_sampled else None
        return self._append(programs.read_image, context, len(position) + len(self._brackets),
                            pixels, keys, position, self._brackets)

    def _append_patches(self, context: Context, images) -> Context:
        pixels = _stack([resize(image, self.config.vit_transform) for image in images])
        patch, side = self.model_config.vit.patch_size, self.model_config.vit_max_num_patch_per_side
        position = grid_position(*(size // patch for size in pixels[0].shape[:2]), side)
        patches = np.stack([patchify(image, patch) for image in pixels])
        return self._append(programs.read_patches, context, len(position) + len(self._brackets),
                            patches, position, self._brackets)

    def _append(self, program: Callable[..., Context], context: Context, num_tokens: int,
                *arguments: Any) -> Context:
        roomy = self._reserve(context, num_tokens)
        if roomy is not context:   # used up in any case
            jax.tree.map(lambda x: x.delete(), context.kv)
        after = self._run(program, roomy, *arguments)
        # The host knows the length; reading it back would wait for the device.
        return after._replace(view=after.view._replace(length=context.view.length + num_tokens))

    def _run(self, program: Callable[..., Any], *arguments: Any, **statics: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return program(self._weights, *arguments, config=self.model_config, **statics)

    def _reserve(self, context: Context, num_tokens: int) -> Context:
        capacity = _round_up(context.view.length + num_tokens, self.config.cache_multiple)
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

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the model cannot draw images of so many pixels."""
        pixels, side = self.model_config.pixels_per_token, self.model_config.max_latent_size
        if height < 1 or width < 1 or height % pixels or width % pixels or max(height, width) > side * pixels:
            raise ValueError(f"an image of {height} x {width} pixels does not suit the model; use "
                             f"multiples of {pixels} up to {side * pixels}")

    def _latent_position(self, height: int, width: int) -> np.ndarray:
        """int32 [G] of an image; ValueError if its size is none the model can draw."""
        self.check_size(height, width)
        pixels = self.model_config.pixels_per_token
        return grid_position(height // pixels, width // pixels, self.model_config.max_latent_size)


def _default_mesh() -> Mesh:
    """The one that is set, or the first device of this process."""
    mesh = jax.sharding.get_mesh()
    return make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1]) if mesh.empty else mesh


def _keys(seeds: np.ndarray, turn: int, purpose: int) -> jax.Array:
    """Random keys [B] that no other prompt, turn or purpose shares."""
    data = jnp.uint32(3 * turn + purpose)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), data))(seeds)


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images come out at {sorted(sizes)} (height, width); those of one call need one size")
    return np.stack(images)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
