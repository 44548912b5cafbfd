"""Save and restore parameters and training states with Orbax. An unfinished checkpoint is never visible."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from warp_jax.parallel import hosts
from warp_jax.types import Params


def save_params(path: Path, params: Params) -> None:
    """Save a pytree; Orbax renames it to `path` when it is complete. Raises ValueError if `path` exists."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)


def forget_state(directory: Path) -> None:
    """Delete the training state of a loop, after its result has been saved elsewhere."""
    if hosts.is_first():
        shutil.rmtree(directory / "state", ignore_errors=True)


def has_params(path: Path) -> bool:
    """Return True if `save_params` has completed for this path."""
    return hosts.exists(path)


def restore_params(path: Path, like: Params) -> Params:
    """Restore a pytree with the structure, dtypes and shardings of `like` (arrays or jax.ShapeDtypeStruct)."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), abstract(like))


class StateStore:
    """The latest training state of one loop, saved in the background."""

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int:
        """Step of the saved state; 0 if no state is saved."""
        return int(multihost_utils.broadcast_one_to_all(self._manager.latest_step() or 0))

    def save(self, step: int, state: Any) -> None:
        """Start saving the state after `step` steps; return before it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """Restore the latest state with the structure and shardings of `like` (jax.ShapeDtypeStruct)."""
        return self._manager.restore(self.latest_step(), args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Wait until saving has finished."""
        self._manager.close()


def abstract(tree: Any) -> Any:
    """Turn arrays into jax.ShapeDtypeStruct with the same shapes, dtypes and shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
