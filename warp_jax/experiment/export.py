"""Export a stage of a workdir as a Hugging Face folder for transformers, vLLM and lm-evaluation-harness."""

from pathlib import Path
from typing import Any

from warp_jax import files
from warp_jax.experiment.stages import Workdir
from warp_jax.pretrained import hf_config, hf_weights
from warp_jax.storage import weight_files


def export_stage(workdir: Path, stage: str, out: Path, dtype: str = "") -> None:
    """Write a stage as a new folder, which appears when it is complete.

    Args:
        workdir: a folder that warp_jax.main made.
        stage: a name as `stages.NAMES` lists them.
        out: the new folder.
        dtype: of the weights; '' = the dtype of the model's source, or float32 without one.

    Raises:
        ValueError: `out` exists, or the stage is unknown or not saved.
    """
    if out.exists():
        raise ValueError(f"out: {out} exists, and nothing is overwritten; choose another folder")
    job = Workdir(workdir)
    params, model = job.load(stage)
    source, sidecars = {}, []  # config.json of the source, and its tokenizer and other files
    if job.source is not None:
        source = files.read_json(job.source / hf_config.CONFIG)
        sidecars = [path for path in weight_files.open_weights(job.source).sidecars() if path.name != hf_config.CONFIG]
    dtype = dtype or source.get("dtype") or source.get("torch_dtype") or "float32"
    is_same_kind = source and model.head == "language" and source["architectures"][0].endswith("ForCausalLM")
    config = source if is_same_kind else {**hf_config.to_json(model, "float32"), **_token_ids(job)}
    with files.staged(out) as staging:
        hf_weights.export_params(params, model, staging, dtype=dtype, config_json=config, sidecars=sidecars)
        if job.source is None:  # then the workdir trained a tokenizer
            files.write_text(staging / "tokenizer.json", job.tokenizer.to_json())
            files.write_json(staging / "generation_config.json", _token_ids(job))
            names = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
            files.write_json(staging / "tokenizer_config.json", names | job.tokenizer.special_tokens)


def _token_ids(job: Workdir) -> dict[str, Any]:
    """Special tokens under their names in config.json and generation_config.json."""
    tokenizer = job.tokenizer
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, "eos_token_id": list(tokenizer.stop_ids)}
    return {name: value for name, value in ids.items() if value is not None}
