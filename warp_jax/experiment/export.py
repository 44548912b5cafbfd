"""Any stage of a workdir as a Hugging Face folder that transformers, vLLM and lm-evaluation-harness load."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from warp_jax import files, merging, trees
from warp_jax.data.tokenizer import Tokenizer
from warp_jax.experiment import architecture
from warp_jax.models import apply, freezing, partitioning
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_config, hf_weights, sources
from warp_jax.pretrained.hf_config import CONFIG
from warp_jax.storage import checkpoint, weight_files
from warp_jax.types import Params

WHAT = "sft, reward_model, iteration_I/run_M, iteration_I/merged, or liti:ETA (from sft to the last merge)"


def export_stage(workdir: Path, stage: str, out: Path, dtype: str = "") -> None:
    """Write the folder `out`, which must not exist; it appears when it is complete.

    stage: see WHAT. dtype: of the weights, '' = as in the source of the model, else float32. Raises ValueError.
    """
    if out.exists():
        raise ValueError(f"out: {out} exists, and nothing is overwritten; choose another folder")
    job = Workdir(workdir)
    params, model = job.load(stage)
    with files.staged(out) as staging:
        hf_weights.export_params(
            params,
            model,
            staging,
            dtype=dtype or job.stored_dtype(),
            config_json=job.config_json(model),
            sidecars=job.sidecars(),
        )
        if job.source is None:
            job.write_tokenizer(staging)


class Workdir:
    """A workdir that `warp_jax.main` made, opened for reading."""

    def __init__(self, path: Path):
        if not (path / "config.json").is_file():
            raise ValueError(f"workdir: {path} has no config.json, want a folder that warp_jax.main made")
        self.path = path
        self.config = ConfigDict(files.read_json(path / "config.json"))
        self.mesh: Mesh = meshes.make_mesh((1, -1, 1))
        self.source = sources.find(self.config.model.source) if self.config.model.source else None
        architecture.check_unchanged(self.config, path)
        self.tokenizer = self._load_tokenizer()
        self.policy = architecture.policy_config(self.config.model, self.tokenizer.vocab_size)

    def stages(self) -> list[str]:
        """Names of the stages that are there."""
        folders = sorted(p.parent for p in self.path.glob("iteration_*/run_*/params"))
        merged = sorted(self.path.glob("iteration_*/merged"))
        return ["sft", *(str(p.relative_to(self.path)) for p in [*folders, *merged])]

    def load(self, stage: str) -> tuple[Params, TransformerConfig]:
        """All weights of a stage, and its settings."""
        if stage == "reward_model":
            return self._reward_model()
        sft = self._sft()
        trained, frozen = freezing.split(sft, self.config.model.trainable)
        kind, _, number = stage.partition(":")
        if kind == "liti" and number:
            last = self._restore(f"iteration_{self.config.warp.num_iterations}/merged", trained)
            trained = merging.liti(trained, last, _number(stage, number))
        elif stage != "sft":
            trained = self._restore(stage, trained)
        return trees.join(trained, frozen), self.policy

    def config_json(self, model: TransformerConfig) -> dict[str, Any]:
        """That of the model's source, if it is of the same kind; else one made from the settings."""
        if self.source is not None:
            content = files.read_json(self.source / CONFIG)
            if model.head == "language" and content["architectures"][0].endswith("ForCausalLM"):
                return content
        return {**hf_config.to_json(model, "float32"), **self.token_ids()}

    def stored_dtype(self) -> str:
        """The dtype of the source's weights, float32 without one."""
        if self.source is None:
            return "float32"
        content = files.read_json(self.source / CONFIG)
        return content.get("dtype") or content.get("torch_dtype") or "float32"

    def sidecars(self) -> list[Path]:
        """Tokenizer and other files that the model's source has beside its weights."""
        if self.source is None:
            return []
        return [path for path in weight_files.open_weights(self.source).sidecars() if path.name != CONFIG]

    def token_ids(self) -> dict[str, Any]:
        """Special tokens as config.json and generation_config.json call them."""
        stops = list(self.tokenizer.stop_ids)
        ids = {"bos_token_id": self.tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": self.tokenizer.pad_id}
        return {name: value for name, value in ids.items() if value is not None}

    def write_tokenizer(self, out: Path) -> None:
        """The tokenizer that the workdir trained, in the files that transformers reads."""
        files.write_text(out / "tokenizer.json", self.tokenizer.to_json())
        files.write_json(out / "generation_config.json", self.token_ids())
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
        files.write_json(out / "tokenizer_config.json", settings | self.tokenizer.special_tokens)

    def _load_tokenizer(self) -> Tokenizer:
        if self.source is not None:
            return Tokenizer.from_folder(self.source)
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"workdir: {self.path} has no tokenizer.json yet; let warp_jax.main begin first")
        return Tokenizer.load(path)

    def _sft(self) -> Params:
        like = partitioning.with_shardings(self.mesh, apply.param_shapes(self.policy))

        def source_params() -> Params:
            assert self.source is not None  # only a pretrained model goes without SFT, or has frozen weights before it
            return hf_weights.load_params(self.source, self.policy, like)

        if not self.config.sft.num_steps:
            return source_params()
        return self._restore_part("sft", like, self.config.model.trainable, source_params)

    def _reward_model(self) -> tuple[Params, TransformerConfig]:
        model = architecture.reward_model_config(self.config.reward_model, self.policy)
        like = partitioning.with_shardings(self.mesh, apply.param_shapes(model))
        pattern = self.config.reward_model.trainable
        return self._restore_part("reward_model", like, pattern, lambda: freezing.restacked(self._sft(), like)), model

    def _restore_part(self, stage: str, like: Params, trainable: str, start: Callable[[], Params]) -> Params:
        """What a stage trained, and its other leaves from start(), where it began."""
        trained, frozen = freezing.split(like, trainable)
        restored = self._restore(stage, trained)
        if not jax.tree.leaves(frozen):
            return restored
        return trees.join(restored, freezing.split(start(), trainable)[1])

    def _restore(self, stage: str, like: Params) -> Params:
        folder = self.path / stage
        path = folder if stage.endswith("merged") else folder / "params"
        if not checkpoint.has_params(path):
            raise ValueError(
                f"stage: {stage!r} is not in {self.path}, which has {', '.join(self.stages())}; want {WHAT}"
            )
        return checkpoint.restore_params(path, like)


def _number(stage: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"stage: got {stage!r}, want liti:ETA with a number, such as liti:0.3")
    return number
