"""Imports released weights: `python -m irg_jax.convert --source DIR --target DIR`.

DIR in the layout of the BAGEL release (`checkpoints/bagel.py`) becomes a model checkpoint
(`checkpoints/model.py`). A target that was made from the same files is left as it is.
"""

import pathlib

from absl import flags

from data_pipelines import command
from irg_jax.checkpoints import names
from irg_jax.checkpoints.bagel import open_folder, source_digests
from irg_jax.checkpoints.model import DESCRIPTION, load_description, model_slots, open_model, write_model
from irg_jax.checkpoints.store import Reader


def convert(source: str | pathlib.Path, target: str | pathlib.Path, *,
            overwrite: bool = False) -> str:
    """Imports `source` and writes `target`, whole or not at all; returns what happened, for people.

    Raises: ValueError as `open_folder` does, and if `target` holds anything but this very
        conversion (another model checkpoint is replaced with `overwrite`).
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if (target / DESCRIPTION).is_file() and not overwrite:
        if load_description(target)[1].get("source") == source_digests(source):
            return f"{target} is already the conversion of {source}"
        raise ValueError(f"{str(target)!r} holds another model; pass --overwrite to replace it, or "
                         "choose another --target")
    opened = open_folder(source)
    write_model(target, opened.config, opened.tokenizer, opened.leaves, source=opened.digests,
                replace=overwrite)
    return f"converted {source} to {target}\n{coverage(target)}"


def coverage(target: pathlib.Path) -> str:
    """What an import used and filled: every tensor and every parameter, or it had failed."""
    config, tokenizer, reader = open_model(target)
    rebuilt = [table.name for table in names.fixed_tables(config)]
    tokens = f"{tokenizer.vocab_size} ids" if tokenizer else "none in the source"
    network, autoencoder = (f"{len(slots)} tensors -> {_count(part, reader, slots)}"
                            for part, slots in model_slots(config).items())
    return "\n".join([
        f"network:     {network}",
        f"  rebuilt:   {len(rebuilt)} fixed tables ({', '.join(rebuilt)})",
        f"autoencoder: {autoencoder}",
        f"tokenizer:   {tokens}",
        f"a sha256 of each tensor's leaf and of each source file is in {DESCRIPTION}"])


def _count(part: str, reader: Reader, slots: list[names.Slot]) -> str:
    leaves = [leaf for name, leaf in reader.leaves.items() if name.startswith(f"{part}.")]
    dtypes = sorted({leaf.dtype.name for leaf in leaves})
    size = sum(leaf.size for leaf in leaves)
    return f"{len({slot.path for slot in slots})} parameters of {size:,} values ({' '.join(dtypes)})"


def main(values) -> None:
    print(convert(values.source, values.target, overwrite=values.overwrite))


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "Folder in the layout of the BAGEL release.")
    flags.DEFINE_string("target", None, "Folder of the model checkpoint to write.")
    flags.DEFINE_bool("overwrite", False, "Replace another model checkpoint in --target.")
    flags.mark_flags_as_required(["source", "target"])
    command.run(main)
