"""Ask one or several stages of a workdir, side by side.

  python scripts/sample.py --workdir=runs/quickstart --stages=sft,liti:0.3,liti:1.0 --prompt="This film is"
  python scripts/sample.py --workdir=runs/quickstart --stages=sft,liti:1.0 --prompts=asked.jsonl --out=answers

The second writes answers/sft.jsonl and answers/liti_1.0.jsonl, which scripts/side_by_side.py compares.
"""

import functools
import json
import sys
from pathlib import Path

from absl import app, flags, logging
from rich.console import Console
from rich.table import Table
from rich.text import Text

from warp_jax import cli, files
from warp_jax.benchmarks import answers
from warp_jax.experiment import export

WORKDIR = flags.DEFINE_string("workdir", None, "Folder that warp_jax.main made.")
STAGES = flags.DEFINE_list("stages", ["sft"], f"Stages, separated by commas: {export.WHAT}.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; give it several times for several.")
PROMPTS = flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
FIELD = flags.DEFINE_string("field", "prompt", "The field of --prompts with a text or a conversation.")
CHAT = flags.DEFINE_bool("chat", None, "Write prompts in the model's chat template; default: as the workdir's config.")
OUT = flags.DEFINE_string("out", None, "New folder for one JSONL file of answers for each stage.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Length of an answer, at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", None, "Default: the workdir's.", lower_bound=1e-6)
TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the likeliest tokens only, 0 = all; 1 = greedy.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the smallest set of tokens with this probability.", 1e-6, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling; the same for all stages.")


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.ERROR)  # of libraries
    try:
        asked = [*PROMPT.value, *(answers.read_prompts(Path(PROMPTS.value), FIELD.value) if PROMPTS.value else [])]
        if not asked:
            raise ValueError("no prompt: give --prompt=TEXT or --prompts=FILE.jsonl")
        if OUT.value and Path(OUT.value).exists():
            raise ValueError(f"--out: {OUT.value} exists, and nothing is overwritten; choose another folder")
        columns = ask(export.Workdir(Path(WORKDIR.value)), asked)
        if OUT.value:
            write(Path(OUT.value), asked, columns)
    except (ValueError, OSError) as error:
        cli.fail(str(error))
    table = Table(show_lines=True)
    for name in ("prompt", *columns):
        table.add_column(Text(name))
    for texts in zip(map(str, asked), *columns.values(), strict=True):
        table.add_row(*map(Text, texts))  # plain: answers may look like markup
    Console().print(table)


def ask(job: export.Workdir, asked: list[object]) -> dict[str, list[str]]:
    """The answers of every stage."""
    use_chat = job.config.data.chat if CHAT.value is None else CHAT.value
    if job.config.data.prompt_template:
        print("note: prompts are asked as they are, without the workdir's data.prompt_template", file=sys.stderr)
    rows = answers.encode(job.tokenizer, asked, use_chat=use_chat)
    settings = {
        "max_new_tokens": MAX_NEW_TOKENS.value,
        "temperature": TEMPERATURE.value or job.config.sampling.temperature,
        "top_k": TOP_K.value,
        "top_p": TOP_P.value,
    }
    found = {}
    for stage in STAGES.value:
        params, model = job.load(stage)
        if model.head != "language":
            raise ValueError(f"--stages: {stage} answers nothing, want policies: sft, iteration_I/merged, liti:ETA")
        found[stage] = answers.sample_answers(
            params, model, job.tokenizer, rows, mesh=job.mesh, seed=SEED.value, settings=settings
        )
    return found


def write(out: Path, asked: list[object], columns: dict[str, list[str]]) -> None:
    """One JSONL file for each stage."""
    with files.staged(out) as folder:
        for stage, texts in columns.items():
            lines = (
                json.dumps({**_asked(prompt), "completion": text}, ensure_ascii=False)
                for prompt, text in zip(asked, texts, strict=True)
            )
            files.write_text(folder / f"{stage.replace('/', '_').replace(':', '_')}.jsonl", "\n".join(lines) + "\n")


def _asked(prompt: object) -> dict[str, object]:
    """A text, or a conversation and its JSON, so that files of answers match by one text."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"prompt": json.dumps(prompt, ensure_ascii=False), "messages": prompt}


if __name__ == "__main__":
    parse_flags = functools.partial(
        cli.parse_flags,
        required=("workdir",),
        example='--workdir=runs/quickstart --stages=sft,liti:1.0 --prompt="This film is"',
    )
    app.run(main, flags_parser=parse_flags)
