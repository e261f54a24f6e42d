"""Parameters on disk: one Orbax tree with a leaf for every layer, written and read piece by piece.

A whole 7B stack of one parameter is 4 GB; a leaf is at most the embedding's 1.1, so a checkpoint of any
size passes through little memory.
"""

import contextlib
import hashlib
import math
import pathlib
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from irg_jax.checkpoints import names
from irg_jax.checkpoints.names import listing
from irg_jax.checkpoints.pages import let_go

DTYPES = ("float32", "bfloat16")
# What is gathered before it is written. Orbax compares the names in a piece with those of all pieces before it:
# a hundred pieces of a 7B model would take it minutes, thirty some seconds.
PIECE_BYTES = 2**30


class Writer:
    """Writes leaves as they come; the folder takes its name when the block ends without an error.

    A thread hashes and writes one piece while the next is gathered: two are in memory. Its errors come from
    `add` or from the end of the block.

    They go into a folder beside it: Orbax would go on with what a killed process had begun, and refuse to
    write a leaf again.

    `digests` has the sha256 of every leaf, `dtypes` their names by the first word of the path.
    """

    def __init__(self, folder: pathlib.Path):
        self.digests: dict[str, str] = {}
        self.dtypes: dict[str, set[str]] = {}
        self._folder, self._held, self._size = folder.absolute(), {}, 0
        self._room = self._folder.with_name(f".{folder.name}.partial")
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def __enter__(self) -> "Writer":
        shutil.rmtree(self._room, ignore_errors=True)   # left by a run that was killed
        self._room.mkdir(parents=True)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._flush()
                self._wait()
                ocp.partial.finalize(self._room / self._folder.name)
                (self._room / self._folder.name).rename(self._folder)
        finally:
            self._thread.shutdown()
            shutil.rmtree(self._room, ignore_errors=True)

    def add(self, path: str, leaf: np.ndarray) -> None:
        """Takes a leaf, which must not change until it is written."""
        self.dtypes.setdefault(path.partition(".")[0], set()).add(leaf.dtype.name)
        if self._size + leaf.nbytes > PIECE_BYTES:
            self._flush()
        self._held[path] = leaf
        self._size += leaf.nbytes
        if self._size >= PIECE_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Hands over what is held, once the piece before it is written."""
        self._wait()
        if self._held:
            self._writing = self._thread.submit(self._write, self._held)
            self._held, self._size = {}, 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, piece: dict[str, np.ndarray]) -> None:
        self.digests |= {path: digest(leaf) for path, leaf in piece.items()}
        context = ocp.Context()
        # bf16 weights would shrink by a fifth only, in three times as long
        context.array.saving.use_compression = False
        context.memory.deepcopy_host_arrays = False   # nobody changes them meanwhile
        with context:
            ocp.partial.save(self._room / self._folder.name, names.unflatten(piece))
        for file in self._room.rglob("*"):
            if file.is_file():
                let_go(file)


class Reader:
    """The leaves of a folder that a `Writer` wrote, checked against what they must be.

    Raises: ValueError naming every leaf that is missing, unknown, misshapen or wrongly typed.
    """

    def __init__(self, folder: pathlib.Path, shapes: dict[str, tuple[int, ...]], digests: dict[str, Any]):
        """Args: shapes and digests are what the description beside the folder says."""
        self._folder, self._digests = folder.absolute(), digests
        if not folder.is_dir():
            raise ValueError(f"{str(folder.parent)!r} has no {folder.name}/; it is not whole")
        with damage(self._folder), _alone():
            metadata = ocp.metadata(self._folder).metadata
            if metadata is None:
                raise ValueError("Orbax cannot read its structure")
            self.leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                           for path, leaf in names.flatten(metadata).items()}
        check_shapes(self._folder, self.leaves, shapes)

    def read(self, paths: Iterable[str]) -> dict[str, np.ndarray]:
        """These leaves. Raises ValueError naming every one whose bytes have changed."""
        # Orbax returns numpy arrays in place of numpy arrays; these stand-ins occupy no memory.
        like = {path: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
                for path in paths for leaf in (self.leaves[path],)}
        context = _alone()
        context.pytree.loading.partial_load = len(like) < len(self.leaves)
        with damage(self._folder), context:
            found = names.flatten(ocp.load(self._folder, names.unflatten(like)))
        # Orbax checks its own structure but not the values: a flipped bit there would go unseen.
        check_digests(self._folder, found, self._digests)
        return found

    def in_turn(self, paths: Sequence[str]) -> Iterator[np.ndarray]:
        """These leaves one by one, read in pieces: Orbax takes long to open a checkpoint.

        While one piece is in use the next is read, unless both are large.
        """
        pieces = self._pieces(paths)
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for number, (piece, size) in enumerate(pieces):
                found = self.read(piece) if coming is None else coming.result()
                coming = None
                if number + 1 < len(pieces) and size + pieces[number + 1][1] <= 1.5 * PIECE_BYTES:
                    coming = thread.submit(self.read, pieces[number + 1][0])
                for path in piece:
                    yield found.pop(path)

    def _pieces(self, paths: Sequence[str]) -> list[tuple[list[str], int]]:
        """Paths to read together, and the bytes of their leaves: half a piece, for Orbax holds them twice."""
        pieces: list[tuple[list[str], int]] = []
        for path in paths:
            size = math.prod(self.leaves[path].shape) * self.leaves[path].dtype.itemsize
            held, held_size = pieces.pop() if pieces and pieces[-1][1] + size <= PIECE_BYTES // 2 else ([], 0)
            pieces.append(([*held, path], held_size + size))
        return pieces


def _alone() -> ocp.Context:
    """Orbax as one process uses it: it would wait until all hosts of a run read, and one may have failed."""
    context = ocp.Context()
    if jax.process_count() > 1:
        me = jax.process_index()
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
        context.multiprocessing.barrier_sync_key_prefix = f"alone_{me}"
    return context


def check_shapes(place: pathlib.Path, leaves: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError naming every leaf that is missing, unknown, misshapen or wrongly typed."""
    both = [path for path in shapes if path in leaves]
    faults = {
        "missing": [path for path in shapes if path not in leaves],
        "unknown": [path for path in leaves if path not in shapes],
        "misshapen": [f"{path} {list(leaves[path].shape)}, expected {list(shapes[path])}"
                      for path in both if tuple(leaves[path].shape) != tuple(shapes[path])],
        "wrongly typed": [f"{path} {leaves[path].dtype.name}, expected one of {' '.join(DTYPES)}"
                          for path in both if leaves[path].dtype.name not in DTYPES]}
    lines = [f"{kind}: {listing(group)}" for kind, group in faults.items() if group]
    if lines:
        raise ValueError(f"{str(place)!r} does not fit its description:\n  " + "\n  ".join(lines))


def check_digests(place: pathlib.Path, leaves: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Raises ValueError naming every leaf whose bytes are not those of its digest."""
    changed = [path for path, leaf in leaves.items() if digests.get(path) != digest(leaf)]
    if changed:
        raise ValueError(f"{str(place.parent)!r} is damaged; these parameters are not what was written: "
                         f"{listing(changed)}")


def digest(array: Any) -> str:
    """sha256 of an array's bytes, row by row."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


@contextlib.contextmanager
def damage(folder: pathlib.Path) -> Iterator[None]:
    """Orbax's various errors about files that are not what it wrote, as one ValueError."""
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r} is damaged or no Orbax checkpoint: "
                         f"{textwrap.shorten(str(error), 300)}") from error

