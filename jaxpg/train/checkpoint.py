"""Checkpoints of a training state: a folder of steps, each written whole or not at all.

A state is stored by orbax, leaf by leaf under its path (`state.params['w']`). Beside it
`manifest.json` says every leaf's shape and dtype, the metric, and every file's CRC-32.
The structure is not stored: `restore` takes it from a template, checks the files and
the leaves against the manifest, and hands back the template's own types with the stored
bits, on the template's devices. Typed keys are stored as their key data. Nothing is
pickled, and reading runs no code.

A step appears in the folder by one rename, and disappears by one, so a process killed
at any moment leaves only whole checkpoints (and rubbish, which the next save sweeps).
One run at a time may write to a folder; anyone may read it meanwhile. Of several
processes the first one writes, whole arrays, so what is read does not depend on how
many there were; each process reads all of it.
"""

import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxpg._checks import check_positive
from jaxpg.train.agreement import is_first, wait_for_all
from jaxpg.train.provenance import read_json, write_json_atomically
from jaxpg.train.sharding import gather
from jaxpg.types import PyTree

__all__ = ["CheckpointStore"]

_SAVING, _DELETED = ".saving-", ".deleted-"


class CheckpointStore:
    """The checkpoints of one run: the last few, and the best one.

    Args:
        folder: where they lie; made by the first save.
        keep: how many of the last checkpoints stay, at least 1. The one with the
            highest metric stays besides.

    Raises:
        ValueError: if `keep` is not a positive whole number.

    >>> import tempfile, jax.numpy as jnp
    >>> store = CheckpointStore(tempfile.mkdtemp())
    >>> store.save(10, {"w": jnp.arange(3)}, metric=1.5)
    >>> store.restore({"w": jnp.zeros(3, jnp.int32)})
    {'w': Array([0, 1, 2], dtype=int32)}
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        check_positive("keep", keep)
        self.folder = pathlib.Path(folder).absolute()  # orbax refuses relative ones
        self.keep = keep

    def save(self, step: int, state: PyTree, metric: float | None = None) -> None:
        """Write a checkpoint and return when it is on disk; then drop what is old.

        Of several processes all must call it.

        Args:
            step: its number, not yet taken; usually the updates done so far.
            state: any tree of arrays, typed keys and Python numbers.
            metric: what the best checkpoint is best in, higher is better; None or
                NaN for a checkpoint that does not compete.

        Raises:
            ValueError: if the step is taken or negative, or a leaf is no array.
        """
        self._check_free(step)
        state = gather(state)
        leaves = {name: _describe(name, leaf) for name, leaf in _named(state)}
        arrays = {n: _to_storage(leaf) for n, leaf in _named(state) if _size(leaves[n])}
        if not arrays:
            raise ValueError("state has no numbers in it, needs at least one array")
        finite = metric is not None and math.isfinite(metric)
        if is_first():
            self._sweep()
            staging = self.folder / f"{_SAVING}{step}"
            staging.mkdir(parents=True)
            _write_arrays(staging / "state", arrays)
            _write_manifest(staging, leaves, metric if finite else None)
            os.rename(staging, self._path(step))
            self._retain()
        wait_for_all(f"checkpoint {step} is in place")

    def restore(self, template: PyTree, step: int | None = None) -> PyTree:
        """Read a checkpoint.

        Args:
            template: a state with the structure, shapes, dtypes and shardings that are
                wanted, as arrays or `jax.ShapeDtypeStruct`s; its values do not matter.
            step: which checkpoint; None for the latest one.

        Returns:
            The state that was saved, bit for bit, in the template's types and on the
            template's devices.

        Raises:
            ValueError: if there is no such checkpoint, if it is damaged (an older one
                is named, never taken silently), or if the template is of another shape.
        """
        step = self._existing(step)
        self._check_intact(step)
        leaves = _read_manifest(self._path(step))["leaves"]
        self._check_template(step, leaves, template)
        wanted = [name for name, _ in _named(template) if _size(leaves[name])]
        arrays = _read_arrays(self._path(step) / "state", wanted)
        rebuilt = [
            _from_storage(arrays.get(name), leaves[name], leaf)
            for name, leaf in _named(template)
        ]
        return jax.tree.unflatten(jax.tree.structure(template), rebuilt)

    def steps(self) -> list[int]:
        """The steps that can be restored, in ascending order."""
        if not self.folder.is_dir():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(n[5:]) for n in names if re.fullmatch(r"step_\d{10,}", n))

    def latest_step(self) -> int | None:
        """The last step, or None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the highest metric, the later of equals; None without one."""
        metrics = [(self._metric(step), step) for step in self.steps()]
        rated = [(metric, step) for metric, step in metrics if metric is not None]
        return max(rated)[1] if rated else None

    def rewind(self, step: int) -> None:
        """Delete every checkpoint later than `step`, to go on from there.

        Args:
            step: the step that was restored.
        """
        for later in reversed(self.steps()) if is_first() else ():
            if later > step:
                self._delete(later)
        wait_for_all(f"checkpoints later than {step} are gone")

    def _path(self, step: int) -> pathlib.Path:
        return self.folder / f"step_{step:010d}"

    def _metric(self, step: int) -> float | None:
        try:
            return _read_manifest(self._path(step))["metric"]
        except (OSError, ValueError):  # a damaged checkpoint does not compete
            return None

    def _check_free(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"step is {step!r}, needs a whole number of at least 0")
        if self._path(step).exists():
            raise ValueError(
                f"step is {step}, which {self.folder} holds already, needs a new one; "
                "to go on from an earlier checkpoint call rewind(step) with its step"
            )

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if steps and step is None:
            return steps[-1]
        if step is not None and step in steps:
            return step
        wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        cure = f"it holds the steps {steps}" if steps else "start without resuming"
        raise ValueError(f"folder {self.folder} holds {wanted}; {cure}")

    def _check_intact(self, step: int) -> None:
        damage = _damage(self._path(step))
        if damage is None:
            return
        earlier = (s for s in reversed(self.steps()) if s < step)
        intact = next((s for s in earlier if _damage(self._path(s)) is None), None)
        cure = "no earlier step is intact: start the run afresh"
        if intact is not None:
            cure = f"step {intact} is intact: restore it with step={intact}"
        raise ValueError(
            f"checkpoint {self._path(step)} is damaged: {damage}; needs every file as "
            f"it was saved; {cure}"
        )

    def _check_template(
        self, step: int, leaves: dict[str, Any], template: PyTree
    ) -> None:
        wanted = {name: _describe(name, leaf) for name, leaf in _named(template)}
        for name in [*wanted, *(name for name in leaves if name not in wanted)]:
            here, there = _spoken(wanted.get(name)), _spoken(leaves.get(name))
            if here != there:
                raise ValueError(
                    f"template does not fit checkpoint {self._path(step)}: {name} is "
                    f"{here} in the template, but {there} in the checkpoint; use the "
                    "network, the optimiser and the number of environments that the "
                    "run was started with"
                )

    def _retain(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best_step()}
        for step in self.steps():
            if step not in kept:
                self._delete(step)

    def _delete(self, step: int) -> None:
        # Renamed first: a half-deleted checkpoint must not look like a whole one.
        doomed = self.folder / f"{_DELETED}{step}"
        os.rename(self._path(step), doomed)
        shutil.rmtree(doomed)

    def _sweep(self) -> None:
        """Clear away what a killed process left half written or half deleted."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.startswith((_SAVING, _DELETED)):
                shutil.rmtree(path)


def _write_manifest(
    folder: pathlib.Path, leaves: dict[str, Any], metric: float | None
) -> None:
    files = {
        path.relative_to(folder).as_posix(): zlib.crc32(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"metric": metric, "leaves": leaves, "files": files}
    seal = zlib.crc32(json.dumps(manifest).encode())
    write_json_atomically(folder / "manifest.json", manifest | {"crc32": seal})


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    manifest = read_json(folder / "manifest.json")
    seal = manifest.pop("crc32", None) if isinstance(manifest, dict) else None
    if seal != zlib.crc32(json.dumps(manifest).encode()):
        raise ValueError("manifest.json was changed")
    return manifest


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, found before orbax opens them."""
    try:
        files = _read_manifest(folder)["files"]
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be trusted ({type(error).__name__})"
    for name, checksum in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if zlib.crc32((folder / name).read_bytes()) != checksum:
            return f"{name} was cut or changed"
    return None


def _checkpointer() -> Any:
    """Orbax for this process alone: with others it would wait for them."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _write_arrays(folder: pathlib.Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(arrays))


def _read_arrays(folder: pathlib.Path, wanted: Iterable[str]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in wanted}
    with _checkpointer() as checkpointer:
        return checkpointer.restore(
            folder, args=ocp.args.PyTreeRestore(restore_args=args)
        )


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves and their paths, written as Python would: `state.params['w']`."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return [("state" + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    numeric = jax.dtypes.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    if not (numeric or _is_key(leaf)):
        raise ValueError(
            f"{name} is {leaf!r}, needs an array, a typed key or a number; keep "
            "settings and names out of the state"
        )
    described = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        described["impl"] = str(jax.random.key_impl(leaf))
    return described


def _spoken(leaf: dict[str, Any] | None) -> str:
    if leaf is None:
        return "missing"
    return f"{leaf['dtype']} of shape {tuple(leaf['shape'])}"


def _size(leaf: dict[str, Any]) -> int:
    """How many numbers there are; orbax refuses to store none."""
    return math.prod(leaf["shape"])


def _to_storage(leaf: Any) -> Any:
    """The leaf as numbers of this process."""
    # NumPy arrays take orbax half the time that JAX's take.
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _from_storage(array: Any, leaf: dict[str, Any], template: Any) -> Any:
    """The stored numbers in the type and on the devices of the template's leaf."""
    if array is None:  # nothing was stored where there is nothing to store
        array = np.zeros(leaf["shape"], template.dtype)
    if isinstance(template, np.ndarray):
        return array
    if isinstance(template, np.generic):
        return array[()]
    if not hasattr(template, "dtype"):
        return type(template)(array.item())
    # Without x64, JAX would round a state that was made with it.
    with jax.enable_x64(True):
        if _is_key(template):
            array = jax.random.wrap_key_data(array, impl=leaf["impl"])
        # An array that JAX may move has no home, and must not get one.
        home = template.sharding if getattr(template, "committed", True) else None
        return jax.device_put(array, home)


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", np.dtype(bool))
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
