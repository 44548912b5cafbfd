"""Write the change of a model's kernels as a LoRA adapter of the PEFT library.

Format: adapter_config.json and adapter_model.safetensors (https://huggingface.co/docs/peft, checkpoint format);
`warp_jax.storage.lora_folder` reads it too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from warp_jax import files, trees
from warp_jax.models import lora
from warp_jax.models.transformer import TransformerConfig
from warp_jax.pretrained.hf_weights import slices_of
from warp_jax.storage.lora_folder import CONFIG, PREFIX, WEIGHTS
from warp_jax.storage.safetensors_header import Tensor
from warp_jax.storage.weight_files import OUTPUT_DTYPES, SafetensorsWriter
from warp_jax.types import Params


class Adapter(NamedTuple):
    """A written adapter: the weights that it makes of its base model, and the squared length of each change."""

    params: Params  # numpy, shaped like the base model
    lengths: Mapping[str, float]  # |exact change|^2 of each kernel that changes, by its name in the folder
    errors: Mapping[str, float]  # |exact change - written change|^2


def export_adapter(
    params: Params,
    base: Params,
    config: TransformerConfig,
    out: Path,
    *,
    rank: int,
    dtype: str,
    base_is: Mapping[str, str | None],
) -> Adapter:
    """Write to a new folder the factors of `rank` whose products are nearest to params - base, one kernel at a time.

    dtype: of the factors. base_is: fields of adapter_config.json by which PEFT finds the base model. Raises ValueError
    if another weight than a kernel changes, or none does.
    """
    before, after = (
        {
            trees.path_name(path): np.array(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
        }
        for tree in (base, params)
    )
    factors: dict[str, np.ndarray] = {}
    lengths, errors = dict[str, float](), dict[str, float]()
    for name, part in slices_of(base, config).items():
        place = ... if part.layer is None else part.layer
        start = before[part.leaf][place]
        change = after[part.leaf][place].astype(np.float64) - start
        if not change.any():
            continue
        if not part.num_inputs:
            raise ValueError(
                f"lora_rank: got {rank}, but weight {name!r} changes and is no kernel; export without --lora_rank, or "
                "train with model.lora"
            )
        module = name.removesuffix(".weight")
        exact = part.to_stored(change).reshape(part.stored_shape)
        b, a = (factor.astype(OUTPUT_DTYPES[dtype]) for factor in lora.refactor(exact, rank))
        written = b.astype(np.float64) @ a.astype(np.float64)
        factors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        lengths[module], errors[module] = float((exact**2).sum()), float(((exact - written) ** 2).sum())
        start += part.from_stored(written.reshape(-1)).astype(start.dtype)
    if not factors:
        raise ValueError(
            f"lora_rank: got {rank}, but no weight differs from the base model; there is nothing to export"
        )
    _write(out, factors, {"r": rank, "target_modules": sorted(lengths), **base_is})
    return Adapter(jax.tree.unflatten(jax.tree.structure(base), before.values()), lengths, errors)


def _write(out: Path, factors: Mapping[str, np.ndarray], config: Mapping[str, object]) -> None:
    """Write both files. The scale lora_alpha / r is 1."""
    out.mkdir(parents=True)
    writer = SafetensorsWriter(out, [Tensor(name, x.dtype, x.shape, WEIGHTS) for name, x in factors.items()])
    for name, values in factors.items():
        writer.write(name, 0, values.reshape(-1))
    writer.close()
    plain = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "lora_alpha": config["r"],
        "lora_dropout": 0.0,
        "bias": "none",
    }
    more = {"fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True}
    files.write_json(out / CONFIG, {**plain, **more, **config})
