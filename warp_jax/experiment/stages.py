"""The stages of a workdir by name: sft, the policies of its runs, their merges, and LITI from sft to the last merge."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from warp_jax import cli, merging, progress, trees
from warp_jax.evaluation import measure
from warp_jax.experiment import architecture, preparation, workdir
from warp_jax.models import apply, freezing, partitioning
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.pretrained import sources
from warp_jax.storage import checkpoint, manifest
from warp_jax.types import Params

_SAVED = re.compile(r"sft|reward_model|iteration_\d+/(run_\d+|(?P<itself>run_\d+/(anchor|average|step_\d+)|merged))")


class Workdir:
    """A workdir that `warp_jax.main` made, opened for reading. source: folder of its pretrained model, or None."""

    def __init__(self, path: Path):
        if not (path / workdir.CONFIG).is_file():
            raise ValueError(f"workdir: {path} has no config.json, want a folder that warp-jax run made")
        self.path = path
        self.settings = workdir.read_settings(path)
        self.mesh: Mesh = meshes.make_mesh((1, -1, 1))
        self.source = sources.find(self.settings.model.source) if self.settings.model.source else None
        workdir.check_models_unchanged(self.settings, path)
        workdir.check_made(path)
        if self.source is None and not (path / "tokenizer.json").is_file():
            raise ValueError(f"workdir: {path} has no tokenizer.json yet; start warp-jax run first")
        self.tokenizer = preparation.read_tokenizer(self.settings, path / "tokenizer.json")
        self.policy = architecture.policy_config(self.settings.model, self.tokenizer.vocab_size)

    def stages(self) -> list[str]:
        """Names of the saved stages."""
        found = [path for kind in ("run_*/*", "merged") for path in sorted(self.path.glob(f"iteration_*/{kind}"))]
        names = [
            str(path.relative_to(self.path)).removesuffix("/params") for path in found if manifest.is_complete(path)
        ]
        return ["sft", *filter(_SAVED.fullmatch, names)]

    def load(self, stage: str) -> tuple[Params, TransformerConfig]:
        """All weights of a stage, and its architecture. Raises ValueError if the stage is unknown or not saved."""
        if stage == "reward_model":
            model = architecture.reward_model_config(self.settings.reward_model, self.policy)
            like = partitioning.with_shardings(self.mesh, apply.param_shapes(model))
            pattern = self.settings.reward_model.trainable
            return self._restore_part(stage, like, pattern, lambda: freezing.restacked(self._sft, like)), model
        trained, frozen = freezing.split(self._sft, *self.settings.model.trained)
        kind, _, number = stage.partition(":")
        if kind == "liti" and number:
            last = self._restore(f"iteration_{self.settings.warp.num_iterations}/merged", trained)
            trained = merging.liti(trained, last, _eta(stage, number))
        elif stage != "sft":
            trained = self._restore(stage, trained)
        return trees.join(trained, frozen), self.policy

    def examiner(self) -> measure.Examiner:
        """Make the examiner of the workdir's job, for more evaluations. Raises ValueError if something is missing."""
        settings = self.settings.replace({"mesh": tuple(self.mesh.shape.values())})
        corpora = preparation.load_corpora(settings)
        workdir.check_rows_unchanged(settings.data.source, corpora, self.path)
        workdir.check_ingredients(settings, self.path, "an evaluation")
        with progress.JobProgress(0, quiet=True) as quiet:
            return preparation.prepare(settings, corpora, self.path, quiet)[2]

    @functools.cached_property
    def _sft(self) -> Params:
        like = partitioning.with_shardings(self.mesh, apply.param_shapes(self.policy))
        start_params = functools.partial(architecture.start_params, self.settings, self.policy, self.mesh)
        if not self.settings.sft.num_steps:
            return start_params()
        return self._restore_part("sft", like, self.settings.model.trainable, start_params)

    def _restore_part(self, stage: str, like: Params, trainable: str, start: Callable[[], Params]) -> Params:
        """The trained leaves of a stage from its checkpoint, and the others from start(), where its training began."""
        trained, frozen = freezing.split(like, trainable)
        restored = self._restore(stage, trained)
        if not jax.tree.leaves(frozen):
            return restored
        return trees.join(restored, freezing.split(start(), trainable)[1])

    def _restore(self, stage: str, like: Params) -> Params:
        known = _SAVED.fullmatch(stage)
        path = self.path / stage if known and known["itself"] else self.path / stage / "params"
        if not known or not checkpoint.has_params(path):
            raise ValueError(
                f"stage: {stage!r} is not in {self.path}, which has {', '.join(self.stages())}; want {cli.STAGES}"
            )
        return checkpoint.restore_params(path, like)


def _eta(stage: str, text: str) -> float:
    try:
        eta = float(text)
    except ValueError:
        eta = math.nan
    if not math.isfinite(eta):
        raise ValueError(f"stage: got {stage!r}, want liti:ETA with a number, such as liti:0.3")
    return eta
