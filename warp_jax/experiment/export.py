"""Export a stage of a workdir as a Hugging Face folder for transformers, vLLM and lm-evaluation-harness."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from warp_jax import files, trees
from warp_jax.data import batches
from warp_jax.evaluation import measure, model_card, points, statistics
from warp_jax.experiment import preparation
from warp_jax.experiment.stages import Workdir
from warp_jax.experiment.workdir import check_ingredients, check_rows_unchanged, first_command
from warp_jax.files import hub
from warp_jax.merging import rounding
from warp_jax.models import partitioning
from warp_jax.models.apply import param_shapes
from warp_jax.models.transformer import TransformerConfig
from warp_jax.parallel import meshes
from warp_jax.pretrained import hf_adapter, hf_config, hf_weights
from warp_jax.progress import JobProgress
from warp_jax.storage import model_files, weight_files
from warp_jax.types import Params, Rollout, States, StorageError

REPORT, GENERATION = model_files.EXPORT_REPORT, "generation_config.json"


def export_stage(
    workdir: Path,
    stage: str,
    out: Path,
    *,
    dtype: str = "float32",
    prompts: int = 0,
    lora_rank: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Write a stage to a new folder, which appears when it is complete; return the content of its warp_export.json.

    Args:
        workdir: a folder that warp-jax run made.
        stage: one of those in `cli.STAGES`.
        out: the new folder.
        dtype: of the weights. Fewer bits than float32 undo a part of the training; the report says how much.
        prompts: number of held-out prompts, rounded up to whole batches, on which the exported policy is compared with
            the stage; 0 = not compared.
        lora_rank: 0 = the whole model; else a LoRA adapter of this rank, whose base model is SFT. The report says how
            much of the training it lacks.
        command: the command line of the export, for the model card.

    Raises:
        ValueError: `out` exists, the stage is unknown or not saved, or it is no adapter of SFT.
    """
    if out.exists():
        raise ValueError(f"out: {out} exists, and nothing is overwritten; choose another folder")
    job = Workdir(workdir)
    params, model = job.load(stage)
    if lora_rank and model.head != "language":
        raise ValueError(f"lora_rank: got {lora_rank}, want 0: {stage} is no adapter of SFT")
    sft = job.load("sft")[0] if model.head == "language" else {}
    report: dict[str, Any] = {"workdir": str(workdir), "stage": stage, "dtype": dtype, "warnings": []}
    with files.staged(out) as staging:
        if lora_rank:
            base = _base_of_adapter(job)
            adapter = hf_adapter.export_adapter(params, sft, model, staging, rank=lora_rank, dtype=dtype, base_is=base)
            report |= cut(adapter)
        else:
            _write_whole(job, params, model, staging, dtype)
            report |= delivered(params, sft, dtype) if sft else {}
        if sft and prompts:
            like = partitioning.with_shardings(job.mesh, param_shapes(model))
            if lora_rank:
                exported = jax.tree.map(lambda leaf, x: jax.device_put(leaf, x.sharding), adapter.params, like)
            else:
                exported = hf_weights.load_params(staging, model, like)
            report["compared"] = _compared(job, {"stage": params, "exported": exported}, sft, prompts)
        files.write_json(staging / REPORT, report)
        files.write_text(staging / model_card.FILE, _card(job, report, command))
    return report


def _write_whole(job: Workdir, params: Params, model: TransformerConfig, out: Path, dtype: str) -> None:
    """Write weights, configs and tokenizer of a whole model to a new folder."""
    config, generation = _configs(job, model)
    sidecars = []  # the tokenizer and other files of the source
    if job.source is not None:
        sidecars = [path for path in weight_files.open_weights(job.source).sidecars() if path.name != hf_config.CONFIG]
    hf_weights.export_params(params, model, out, dtype=dtype, config_json=config, sidecars=sidecars)
    files.write_json(out / GENERATION, generation)
    if job.source is None:  # then the workdir trained a tokenizer
        files.write_text(out / "tokenizer.json", job.tokenizer.to_json())
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}
        files.write_json(out / "tokenizer_config.json", names | job.tokenizer.special_tokens)


def _base_of_adapter(job: Workdir) -> dict[str, str | None]:
    """The fields of adapter_config.json that name the base model: the source, if it is SFT and PEFT finds its weights.

    A model with images has other names than its text tower.
    """
    source = job.settings.model.source
    unnamed: dict[str, str | None] = {"base_model_name_or_path": None}
    if job.source is None or job.settings.sft.num_steps:
        return unnamed
    kind = files.read_json(job.source / hf_config.CONFIG)["architectures"][0]
    if kind.endswith("ForConditionalGeneration"):
        return unnamed
    if source.startswith(hub.PREFIX):
        found = hub.parse(source)
        return {"base_model_name_or_path": found.repo, "revision": found.revision}
    return {"base_model_name_or_path": str(job.source)}


def cut(adapter: hf_adapter.Adapter) -> dict[str, Any]:
    """Share of the displacement from SFT that an adapter lacks: length of the difference / that of the displacement."""
    each = {name: (adapter.errors[name] / length) ** 0.5 for name, length in adapter.lengths.items()}
    worst = max(each, key=lambda name: each[name])
    total = (sum(adapter.errors.values()) / sum(adapter.lengths.values())) ** 0.5
    return {"cut": {"total": total, "largest": each[worst], "of": worst}}


def _card(job: Workdir, report: dict[str, Any], command: str) -> str:
    """The model card of an export."""
    last_step = functools.partial(points.last_step, job.settings, job.path)
    names = {"this model": points.name_of_stage(job.settings, report["stage"], last_step), "SFT": "sft"}
    paths = {who: job.path / "evaluations" / f"{name}.npz" for who, name in names.items() if name}
    return model_card.make(
        job.settings,
        report,
        measured={who: measure.summary(measure.load_evaluation(path)) for who, path in paths.items() if path.exists()},
        commands=(first_command(job.path), command),
    )


def delivered(params: Params, sft_params: Params, dtype: str) -> dict[str, Any]:
    """Delivered share and relative error of the displacement from SFT after rounding to a dtype, and warnings."""
    leaves = {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    kept = {}
    for (name, leaf), start in zip(leaves.items(), jax.tree.leaves(sft_params), strict=True):
        values, before = (np.asarray(x, np.float64).reshape(-1) for x in jax.device_get((leaf, start)))
        rounded = values.astype(weight_files.OUTPUT_DTYPES[dtype]).astype(np.float64)
        kept[name] = rounding.measure(values - before, rounded - before)
    whole = rounding.Delivery(*np.sum(list(kept.values()), axis=0).tolist())
    line = rounding.warning(whole, {name: found.share for name, found in kept.items()})
    return {
        "delivered": {"share": whole.share, "relative_error": whole.relative_error},
        "warnings": [f"{dtype}: {line}; use --dtype=float32"] if line else [],
    }


def _compared(job: Workdir, policies: dict[str, Params], sft: Params, prompts: int) -> dict[str, Any]:
    """Reward and KL to SFT of each policy on the same held-out prompts, and exported minus stage; or why not."""
    if not (job.path / "evaluations" / "sft.npz").is_file():
        return {"skipped": "the workdir has no evaluation yet"}
    settings = job.settings.replace({"mesh": tuple(job.mesh.shape.values())})
    samples, batch = settings.evaluation.samples_per_prompt, settings.evaluation.batch_size
    if batch % (devices := meshes.batch_devices(job.mesh)):
        return {"skipped": f"evaluation.batch_size is {batch}, want a multiple of {devices} devices; use fewer devices"}
    try:
        corpora = preparation.load_corpora(settings)
        check_rows_unchanged(settings.data.source, corpora, job.path)
        check_ingredients(settings, job.path, "an evaluation")
        with JobProgress(0, quiet=True) as progress:
            _, _, examiner = preparation.prepare(settings, corpora, job.path, progress)
        # whole batches draw the completions of the saved evaluations
        count = min(-(-prompts * samples // batch) * batch, len(examiner.eval_prompts.example_ids))
        examiner = examiner._replace(
            eval_prompts=batches.take(examiner.eval_prompts, np.arange(count)),
            sft_params=sft,
            frozen_params={},
            kl_to_sft=_kl_of_whole_models(examiner.kl_to_sft),
        )
        found = {name: measure.evaluate(examiner, params) for name, params in policies.items()}
    except (ValueError, OSError, ImportError, FloatingPointError, StorageError) as error:
        return {"skipped": str(error)}
    result: dict[str, Any] = {"prompts": -(-count // samples), "completions": count}
    for name in ("reward", "sft_kl"):
        stage, exported = (np.asarray(getattr(found[kind], name), np.float64) for kind in ("stage", "exported"))
        clusters = found["stage"].clusters
        mean, mean_se = statistics.mean_and_se(stage, clusters)
        difference, difference_se = statistics.mean_and_se(exported - stage, clusters)
        result[name] = {
            "stage": mean,
            "stage_se": mean_se,
            "exported": mean + difference,
            "difference": difference,
            "difference_se": difference_se,
        }
    return result


def _kl_of_whole_models(kl_to_sft: measure.KlFn) -> measure.KlFn:
    """The KL of an exported policy: rounding moves its frozen layers too, so SFT is computed from its own."""

    def kl(
        params: Params, sft_params: Params, frozen_params: Params, rollout: Rollout, states: States | None = None
    ) -> jax.Array:
        own = states and states._replace(trunk=None)
        return kl_to_sft(params, sft_params, frozen_params, rollout, own)

    return kl


def _configs(job: Workdir, model: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of config.json and of generation_config.json: those of the source, with the stop tokens of the job."""
    tokenizer = job.tokenizer
    stops = {"eos_token_id": list(tokenizer.stop_ids)}
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids = {name: value for name, value in ids.items() if value is not None}
    config: dict[str, Any] = {}
    generation = ids
    if job.source is not None:
        config = files.read_json(job.source / hf_config.CONFIG)
        if (job.source / GENERATION).is_file():
            generation = files.read_json(job.source / GENERATION)
    if model.head != "language" or not config.get("architectures", [""])[0].endswith("ForCausalLM"):
        config = hf_config.to_json(model, "float32") | ids
    return config | stops, generation | stops
