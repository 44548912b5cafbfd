"""The metrics of a training as a run of Weights & Biases (W&B), which gets the rows of metrics.jsonl.

Each start sends all rows that W&B lacks. Online, W&B says which step is next. Offline, the rows of all starts are
written again, into one new folder: a killed job leaves no row twice and none out, and `wandb sync` uploads one folder.
"""

import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warp_jax import files
from warp_jax.exit_codes import TRY_AGAIN
from warp_jax.settings import Settings

FILE = "wandb.json"  # the id of the run, beside metrics.jsonl


class WandbError(Exception):
    """W&B cannot be reached, or refuses the run."""

    exit_code = TRY_AGAIN


class WandbRun:
    """The W&B run of SFT, the reward model or a run of RL; a resumed job goes on with it.

    Its group is the workdir, with the folder that holds it (--out of a sweep), which is also a tag.
    """

    def __init__(self, settings: Settings, workdir: Path, directory: Path):
        import wandb  # noqa: PLC0415  an extra

        path = directory / FILE
        if not path.exists():
            files.write_json(path, {"id": secrets.token_hex(8)})
        number, sweep, is_online = files.read_json(path)["id"], workdir.parent.name, _mode() == "online"
        try:
            self._run = wandb.init(
                project=settings.logging.wandb_project,
                id=number,
                name=f"{workdir.name}/{directory.relative_to(workdir)}",
                group="/".join(filter(None, [sweep, workdir.name])),
                job_type="rl" if directory.name.startswith("run_") else directory.name,
                tags=[sweep[:64]] if sweep else None,
                config=settings.as_json(),
                dir=None if files.is_remote(directory) else str(directory),  # None: ./wandb
                resume="allow" if is_online else None,
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            line = " ".join(str(error).split())[:200]
            raise WandbError(f"config.logging.wandb_project: {line}; try again, or set WANDB_MODE=offline") from error
        if self._run.offline:
            folder = Path(self._run.settings.sync_dir)
            for old in folder.parent.glob(f"offline-run-*-{number}"):
                if old.name != folder.name:
                    shutil.rmtree(old, ignore_errors=True)
        self._next_step = self._run.step

    def write(self, row: Mapping[str, Any]) -> None:
        """Send a row of metrics.jsonl, unless W&B has it."""
        if row["step"] >= self._next_step:
            self._run.log(dict(row), step=row["step"], commit=True)

    def close(self) -> None:
        """Send what is left. If an error or a signal ends the training, the run is shown as failed, not as finished."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def open_run(settings: Settings, workdir: Path, directory: Path) -> WandbRun | None:
    """The W&B run of a training that writes into `directory`; None without a project."""
    return WandbRun(settings, workdir, directory) if settings.logging.wandb_project else None


def check(settings: Settings) -> None:
    """Raise ValueError if the config names a project, but wandb is not installed or not logged in."""
    if not settings.logging.wandb_project:
        return
    try:
        import wandb  # noqa: PLC0415  an extra
    except ImportError as error:
        raise ValueError(
            "config.logging.wandb_project: needs the package wandb; run: pip install 'warp_jax[wandb]'"
        ) from error
    if _mode() == "online" and not wandb.login(prompt=False, verify=False):
        raise ValueError("config.logging.wandb_project: not logged in; run: wandb login, or set WANDB_MODE=offline")


def _mode() -> str:
    import wandb  # noqa: PLC0415  an extra

    return wandb.setup().settings.mode
