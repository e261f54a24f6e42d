"""Conversations as a TFDS data set in ArrayRecord files, without TensorFlow.

    DIR/<mode>/dataset_info.json, features.json
    DIR/<mode>/conversations-train.array_record-00000-of-00004 ...
    DIR/<mode>/costs.npz

`tfds.builder_from_directory("DIR/<mode>").as_data_source("train")` reads it. An image is the bytes
that were in the source: TFDS' own Image feature would want TensorFlow to write it, and could not
hand a list of images back undecoded. Bytes with a checksum are also what `array_records` reads.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, naming, splits

from data_pipelines.layout import ROLES, SPLIT, TYPES
from data_pipelines.records import Record, TextPart
from data_pipelines.stored_costs import ITEM

FORMAT = "array_record"
# Images are compressed already: the fastest level is for texts. One record a chunk: random access.
WRITER_OPTIONS = "group_size:1,zstd:1"


def features() -> tfds.features.FeaturesDict:
    """What a record is made of.

    `parts` in order, `content` being UTF-8 or an encoded image; `costs` int32 [items, 5], the rows of the
    record in a cost table.
    """
    flag = tfds.features.Scalar(np.bool_)
    return tfds.features.FeaturesDict({
        "parts": tfds.features.Sequence({
            "role": tfds.features.ClassLabel(names=ROLES),
            "type": tfds.features.ClassLabel(names=TYPES),
            "content": tfds.features.Tensor(shape=(), dtype=np.object_),
            "need_loss": flag, "need_vae": flag, "need_vit": flag}),
        "costs": tfds.features.Tensor(shape=(None, ITEM), dtype=np.int32)})


def make_example(record: Record, roles: Sequence[str], costs: np.ndarray) -> dict[str, Any]:
    """A record as the features want it.

    Args:
        roles: of each part.
        costs: int32 [items, 5], see `samples.measure`.
    """
    parts = []
    for part, role in zip(record.parts, roles, strict=True):
        is_text = isinstance(part, TextPart)
        parts.append({"role": role, "type": "text" if is_text else "image",
                      "content": part.text.encode() if is_text else part.data, "need_loss": part.need_loss,
                      "need_vae": not is_text and part.need_vae, "need_vit": not is_text and part.need_vit})
    return {"parts": parts, "costs": costs}


def make_serializer() -> Callable[[Mapping[str, Any]], bytes]:
    """An example -> the bytes of its record, the same in every process."""
    structure = features()
    serializer = example_serializer.ExampleSerializer(structure.get_serialized_info())

    def serialize(example: Mapping[str, Any]) -> bytes:
        # TFDS leaves the order of a proto's map to chance; a resumed build must repeat its bytes.
        message = serializer.get_tf_example(structure.encode_example(example))
        return message.SerializeToString(deterministic=True)
    return serialize


class Conversations(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of one mode. `build` writes its shards in parallel; alone, it works in one process."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos: Mapping[str, Any] = {}  # nothing is downloaded; TFDS would search this package for a list

    def __init__(self, *, mode: str = "", examples: Iterable[Mapping[str, Any]] = (), **kwargs: Any):
        """Args: examples as `make_example` gives them, once; kwargs of TFDS."""
        self._mode, self._examples = mode, examples
        super().__init__(file_format=FORMAT, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=features(), disable_shuffling=True,
            description=f"Records of interleaved texts and images, mode {self._mode!r}.")

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        yield from enumerate(self._examples)


def shard_name(index: int, count: int) -> str:
    """The file name of a shard, as TFDS expects it."""
    return f"{Conversations.name}-{SPLIT}.{FORMAT}-{index:05d}-of-{count:05d}"


def write_info(folder: pathlib.Path, *, mode: str, lengths: Sequence[int], num_bytes: int) -> None:
    """Writes the files that make finished shards a TFDS data set.

    Args:
        lengths: records of each shard.
        num_bytes: of all records.
    """
    builder = Conversations(mode=mode, data_dir=str(folder))
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=Conversations.name, split=SPLIT, filetype_suffix=FORMAT)
    builder.info.set_splits(splits.SplitDict([splits.SplitInfo(
        name=SPLIT, shard_lengths=list(lengths), num_bytes=num_bytes, filename_template=template)]))
    builder.info.write_to_directory(folder)
