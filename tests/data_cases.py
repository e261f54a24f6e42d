"""What the data tests share: golden values, a tokenizer, and data sets small enough to read."""

import base64
import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from safetensors.numpy import load_file

from data_pipelines.config import DataConfig, GroupConfig, ImageTransform
from data_pipelines.samples import Item, Text, VAEImage, ViTImage
from data_pipelines.tokenizer import Tokenizer, train_tokenizer

WORDS = "a red circle left of blue square plan two green stars above one cross".split()


def golden_folder(request) -> pathlib.Path:
    """The folder of `pytest --golden DIR`, by default the copy in the repository."""
    default = pathlib.Path(__file__).parent / "golden" / "tiny_bagel"
    return pathlib.Path(request.config.getoption("--golden", None) or default)


class Golden:
    """Golden arrays and values, and the geometry they were computed with."""

    def __init__(self, folder: pathlib.Path):
        read = lambda name: json.loads((folder / name).read_text())
        self.arrays = load_file(folder / "expected.safetensors")
        self.values, self.config, self.vit = map(read, ("expected.json", "config.json",
                                                        "vit_config.json"))

    def data_config(self, **fields) -> DataConfig:
        # Fields of the autoencoder that are absent have the FLUX values: four levels.
        levels = len(self.config.get("vae_config", {}).get("ch_mult", (1, 2, 4, 4)))
        patch = self.config["latent_patch_size"] * 2 ** (levels - 1)
        return data_config(
            latent_patch=patch, vit_patch=self.vit["patch_size"],
            vae_transform=ImageTransform(patch, 64 * patch, patch),
            vit_transform=ImageTransform(*[self.vit["patch_size"] * sides for sides in (1, 64, 1)]),
            max_latent_size=self.config["max_latent_size"],
            vit_max_side=self.config["vit_max_num_patch_per_side"], **fields)

    def room(self, *, text: int = 5, vit: int = 3, latent: int = 7, images: int = 2) -> dict[str, int]:
        """Budgets that hold the golden training samples, with so much to spare."""
        count = sum(name.startswith("train.latent.") for name in self.arrays)
        return {"text_tokens": len(self.arrays["train.text_ids"]) + text,
                "vit_tokens": len(self.arrays["train.vit_indexes"]) + vit,
                "latent_tokens": len(self.arrays["train.vae_indexes"]) + latent, "images": count + images}

    def uint8(self, name: str) -> np.ndarray:
        """[3, H, W] in [-1, 1] -> uint8 [H, W, 3]."""
        grey = np.round((self.arrays[name] * 0.5 + 0.5) * 255)
        return grey.astype(np.uint8).transpose(1, 2, 0)

    def train_samples(self) -> list[list[Item]]:
        return [[self._item(item) for item in sample["items"]]
                for sample in self.values["train_samples"]]

    def _item(self, item: dict) -> Item:
        if item["type"] == "text":
            return Text(item["ids"], bool(item["loss"]))
        if item["type"] == "vit_image":
            return ViTImage(self.uint8(item["image"]))
        timestep = item["timestep_logit"]
        return VAEImage(self.uint8(item["image"]), bool(item["loss"]),
                        -np.inf if timestep is None else timestep)


class FakeTokenizer:
    """Control tokens of the golden set; the ids of a text are its character codes."""

    def __init__(self, special_tokens: dict[str, int] | None = None):
        special = special_tokens or dict(bos_token_id=900, eos_token_id=901, start_of_image=902,
                                         end_of_image=903)
        self.bos, self.eos = special["bos_token_id"], special["eos_token_id"]
        self.start_of_image, self.end_of_image = special["start_of_image"], special["end_of_image"]
        self.fingerprint = "fake"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 256 for letter in text]


def data_config(**fields) -> DataConfig:
    """A configuration for 16 to 64 pixel images."""
    defaults = dict(
        source="nowhere", groups=(GroupConfig("full"),), packs_per_step=4, text_tokens=160,
        vit_tokens=48, latent_tokens=48, images=6, max_latent_size=8, vit_max_side=8,
        vae_transform=ImageTransform(16, 64, 16), vit_transform=ImageTransform(14, 56, 14),
        vae_dropout=0.0)
    return DataConfig(**(defaults | fields))


def tokenizer() -> Tokenizer:
    return train_tokenizer([" ".join(WORDS)] * 3, vocab_size=300)


def encode_image(image: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format)
    return buffer.getvalue()


def image_part(rng: np.random.Generator, *, side: int = 32, **flags) -> dict:
    image = rng.integers(0, 256, (side, side, 3), np.uint8)
    return {"type": "image", "content": base64.b64encode(encode_image(image)).decode(), **flags}


def conversation(rng: np.random.Generator, mode: str) -> list[dict]:
    """A record of the mode full, improving or think, of random length."""
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 8)))
    part = lambda **flags: {"type": "text", "content": text(), **flags}
    parts = {
        "think": lambda: [part()],
        "full": lambda: [part(), image_part(rng, need_loss=True)],
        "improving": lambda: [part(need_loss=False), image_part(rng, need_vae=True, need_vit=True),
                              part(), image_part(rng, need_loss=True)],
    }[mode]()
    return [{"role": "user", "content": text()}, {"role": "assistant", "content": parts}]


def write_rows(path: pathlib.Path, rows: list, *, column: str = "conversation") -> pathlib.Path:
    """Rows that are not strings are written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    pyarrow.parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string())}),
                                path, row_group_size=4, write_page_checksum=True)
    return path


def write_data_set(folder: pathlib.Path, *, counts: dict[str, int], seed: int = 0) -> pathlib.Path:
    """<folder>/train/<mode>/*.parquet of random records, in two files a mode."""
    rng = np.random.default_rng(seed)
    for mode, count in counts.items():
        rows = [conversation(rng, mode) for _ in range(count)]
        half = max(1, count // 2)
        for number, part in enumerate((rows[:half], rows[half:])):
            if part:
                write_rows(folder / "train" / mode / f"{number:04d}.parquet", part)
    return folder
