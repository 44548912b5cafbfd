"""Export a stage of a workdir as a Hugging Face folder.

  python scripts/export_hf.py --workdir=runs/quickstart --stage=liti:0.3 --out=exported

The new folder holds model.safetensors, config.json and the tokenizer; transformers and vLLM can load it.
"""

from pathlib import Path

from absl import flags, logging

from warp_jax import cli
from warp_jax.experiment import export, stages
from warp_jax.storage.weight_files import OUTPUT_DTYPES

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run of warp_jax.main.")
STAGE = flags.DEFINE_string("stage", None, f"Stage to export: {stages.NAMES}.")
OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.")
DTYPE = flags.DEFINE_enum("dtype", None, list(OUTPUT_DTYPES), "Dtype of weights; default: that of the source model.")


def main(argv: list[str]) -> None:
    """Export the stage."""
    del argv
    logging.set_verbosity(logging.ERROR)  # hide warnings of libraries
    try:
        export.export_stage(Path(WORKDIR.value), STAGE.value, Path(OUT.value), DTYPE.value or "")
    except (ValueError, OSError) as error:
        cli.fail(str(error))
    print(f"exported {STAGE.value} of {WORKDIR.value} to {OUT.value}")


if __name__ == "__main__":
    cli.run(
        main, required=("workdir", "stage", "out"), example="--workdir=runs/quickstart --stage=liti:0.3 --out=exported"
    )
