"""Export a stage of a workdir as a Hugging Face folder.

  python scripts/export_hf.py --workdir=runs/quickstart --stage=liti:0.3 --out=exported

writes exported/ with model.safetensors, config.json and the tokenizer; transformers and vLLM load it.
"""

import functools
from pathlib import Path

from absl import app, flags, logging

from warp_jax import cli
from warp_jax.experiment import export
from warp_jax.storage.weight_files import OUTPUT_DTYPES

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that warp_jax.main made.")
STAGE = flags.DEFINE_string("stage", None, f"What to export: {export.WHAT}.")
OUT = flags.DEFINE_string("out", None, "New folder.")
DTYPE = flags.DEFINE_enum("dtype", None, list(OUTPUT_DTYPES), "Of the weights; default: that of the model's source.")


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.ERROR)  # of libraries
    try:
        export.export_stage(Path(WORKDIR.value), STAGE.value, Path(OUT.value), DTYPE.value or "")
    except (ValueError, OSError) as error:
        cli.fail(str(error))
    print(f"{STAGE.value} of {WORKDIR.value}: {OUT.value}")


if __name__ == "__main__":
    parse_flags = functools.partial(
        cli.parse_flags,
        required=("workdir", "stage", "out"),
        example="--workdir=runs/quickstart --stage=liti:0.3 --out=exported",
    )
    app.run(main, flags_parser=parse_flags)
