"""Parameters and training states on disk, through Orbax. A checkpoint is there whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from warp_jax.parallel import hosts
from warp_jax.types import Params


def save_params(path: Path, params: Params) -> None:
    """Write a pytree; Orbax renames it into place when it is complete. ValueError if there is a checkpoint already."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)


def forget_state(directory: Path) -> None:
    """Delete the state of a loop whose result is stored elsewhere."""
    if hosts.is_first():
        shutil.rmtree(directory / "state", ignore_errors=True)


def has_params(path: Path) -> bool:
    """True if `save_params` has completed for this path."""
    return hosts.exists(path)


def restore_params(path: Path, like: Params) -> Params:
    """Read a pytree with the structure, dtypes and shardings of `like` (arrays or jax.ShapeDtypeStruct)."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), abstract(like))


class StateStore:
    """The newest state of one optimisation, saved in the background."""

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int:
        """Step of the stored state, 0 if there is none."""
        return int(hosts.broadcast(self._manager.latest_step() or 0))

    def save(self, step: int, state: Any) -> None:
        """Store the state after `step` steps; returns before it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """Read the newest state, laid out as `like` (jax.ShapeDtypeStruct with shardings)."""
        return self._manager.restore(self.latest_step(), args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
