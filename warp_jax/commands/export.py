"""Export a stage of a workdir as a Hugging Face folder.

  warp-jax export --workdir=runs/quickstart --stage=liti:0.3 --out=exported

  warp-jax export --workdir=runs/lora --stage=liti:0.3 --lora_rank=16 --out=adapter

The new folder holds the weights, config.json and the tokenizer; transformers and vLLM can load it. Its
warp_export.json says how much of the training the dtype keeps, and compares reward and KL with those of the stage. Its
model card, README.md, says how the model was made and what was measured. --push=ORG/NAME uploads the folder to the
Hugging Face Hub.

With --lora_rank the folder is an adapter of the PEFT library instead, of the base model SFT: the factors of this rank
that are nearest to the displacement from SFT. How much they lack is printed. A merge of M runs of rank R has the rank
M R, and so many more in each later iteration.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from absl import flags
from etils import epy

from warp_jax import cli, files
from warp_jax.files import hub
from warp_jax.storage.weight_files import OUTPUT_DTYPES

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from warp_jax.experiment import export


WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a warp-jax run.")
STAGE = flags.DEFINE_string("stage", None, f"Stage to export: {cli.STAGES}.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
DTYPE = flags.DEFINE_enum("dtype", "float32", list(OUTPUT_DTYPES), "Dtype of weights; 16 bits lose a part of training.")
PROMPTS = flags.DEFINE_integer(
    "prompts",
    64,
    "Held-out prompts on which the export is compared with the stage, rounded up to whole batches; 0 = none.",
    lower_bound=0,
)
LORA_RANK = flags.DEFINE_integer(
    "lora_rank",
    0,
    "Export a LoRA adapter of this rank, for the stage sft as base model; 0 = the whole model.",
    lower_bound=0,
)
PUSH = flags.DEFINE_string(
    "push", "", "Repository ORG/NAME of the Hugging Face Hub to upload the folder to; a new one is private."
)


def main(argv: list[str]) -> None:
    """Export the stage."""
    del argv
    out = Path(str(OUT.value))
    try:
        if PUSH.value:
            hub.check_login(PUSH.value)
        report = export.export_stage(
            files.as_path(str(WORKDIR.value)),
            str(STAGE.value),
            out,
            dtype=DTYPE.value,
            prompts=PROMPTS.value,
            lora_rank=LORA_RANK.value,
            command=shlex.join(["warp-jax", "export", *sys.argv[1:]]),
        )
    except (ValueError, OSError) as error:
        cli.fail(error)
    for line in report["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    if "cut" in report:
        lost = report["cut"]
        print(
            f"the adapter lacks {lost['total']:.3g} of the displacement from SFT (relative Frobenius norm), at most "
            f"{lost['largest']:.3g} of one kernel ({lost['of']})"
        )
    compared = report.get("compared", {})
    if "skipped" in compared:
        print(f"not compared with the stage: {compared['skipped']}")
    for name in ("reward", "sft_kl"):
        if name in compared:
            numbers = compared[name]
            print(
                f"{name} on {compared['completions']} completions of {compared['prompts']} held-out prompts: "
                f"{numbers['exported']:.4f}, the stage has {numbers['stage']:.4f} "
                f"(difference {numbers['difference']:+.4f} +- {numbers['difference_se']:.4f})"
            )
    print(f"exported {STAGE.value} of {WORKDIR.value} to {OUT.value}")
    if PUSH.value:
        try:
            print(f"pushed: {hub.push(out, PUSH.value, f'Add {STAGE.value} of a WARP run')}")
        except (ValueError, OSError) as error:
            print(f"{OUT.value} is complete; upload it with: hf upload {PUSH.value} {OUT.value}", file=sys.stderr)
            cli.fail(error)


def start() -> None:
    """Parse the flags and run."""
    cli.run(
        main, required=("workdir", "stage", "out"), example="--workdir=runs/quickstart --stage=liti:0.3 --out=exported"
    )
