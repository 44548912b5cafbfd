"""Sample answers of one or more stages of a workdir, and print them side by side.

  warp-jax sample --workdir=runs/quickstart --stages=sft,liti:0.3,liti:1.0 --prompt="This film is"
  warp-jax sample --workdir=runs/quickstart --stages=sft,liti:1.0 --prompts=questions.jsonl --out=answers

The second command also writes answers/sft.jsonl and answers/liti_1.0.jsonl; compare them with scripts/side_by_side.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from rich import console, text
    from rich import table as tables

    from warp_jax.benchmarks import answers
    from warp_jax.data import stop_tokens
    from warp_jax.experiment import export, stages
    from warp_jax.generation import sampling


WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a warp-jax run.")
STAGES = flags.DEFINE_list("stages", ["sft"], f"Stages to sample, separated by commas: {cli.STAGES}.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text of a prompt; the flag may be repeated.")
PROMPTS = flags.DEFINE_string("prompts", None, "JSONL file of prompts, one object per line; see --field.")
FIELD = flags.DEFINE_string("field", "prompt", "Field of --prompts that holds the text or the conversation.")
CHAT = flags.DEFINE_bool("chat", None, "Apply the model's chat template to prompts; default: data.chat of the workdir.")
OUT = flags.DEFINE_string("out", None, "Folder to write one JSONL file of answers per stage; must not exist.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Maximum length of an answer in tokens.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Sampling temperature; default: that of the evaluations of the workdir.", lower_bound=1e-6
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many likeliest tokens; 0 = all, 1 = greedy.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the smallest set of tokens with this probability.", 1e-6, 1.0)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of weights and activations.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the sampling, the same for every stage.")


def main(argv: list[str]) -> None:
    """Sample the answers, print them and write them to --out."""
    del argv
    try:
        prompts = [*PROMPT.value, *(answers.read_prompts(Path(PROMPTS.value), FIELD.value) if PROMPTS.value else [])]
        if not prompts:
            raise ValueError("got no prompt, want --prompt=TEXT or --prompts=FILE.jsonl")
        if OUT.value and Path(OUT.value).exists():
            raise ValueError(f"--out: {OUT.value} exists and would be overwritten; choose another folder")
        columns = sample_stages(stages.Workdir(files.as_path(str(WORKDIR.value))), prompts)
        if OUT.value:
            write(Path(OUT.value), prompts, columns)
    except (ValueError, OSError) as error:
        cli.fail(error)
    table = tables.Table(show_lines=True)
    for name in ("prompt", *columns):
        table.add_column(text.Text(name))
    for texts in zip(map(str, prompts), *columns.values(), strict=True):
        table.add_row(*map(text.Text, texts))  # Text: an answer must not be read as markup
    console.Console().print(table)


def sample_stages(job: stages.Workdir, prompts: list[object]) -> dict[str, list[str]]:
    """Answers to the prompts, by stage."""
    use_chat = job.settings.data.chat if CHAT.value is None else CHAT.value
    if job.settings.data.prompt_template:
        print("note: prompts are used as given, without data.prompt_template of the workdir", file=sys.stderr)
    tokenizer = stop_tokens.extend(job.tokenizer, (), use_chat=use_chat)
    rows = answers.encode(tokenizer, prompts, use_chat=use_chat)
    temperature = TEMPERATURE.value or job.settings.evaluation_temperature
    ids = tokenizer.stop_ids, tokenizer.pad_id
    config = sampling.SamplingConfig(MAX_NEW_TOKENS.value, temperature, *ids, TOP_K.value, TOP_P.value)
    columns = {}
    for stage in STAGES.value:
        params, model = job.load(stage)
        if model.head != "language":
            raise ValueError(f"--stages: got {stage}, want policies, such as sft, iteration_1/merged, liti:0.3")
        if DTYPE.value != "float32":
            for line in export.delivered(params, job.load("sft")[0], DTYPE.value)["warnings"]:
                print(f"{stage}: warning: {line}", file=sys.stderr)
        model = dataclasses.replace(model, dtype=DTYPE.value)
        columns[stage] = answers.sample_answers(
            params, model, tokenizer, rows, mesh=job.mesh, seed=SEED.value, config=config
        )
    return columns


def write(out: Path, prompts: list[object], columns: dict[str, list[str]]) -> None:
    """Write one JSONL file of answers per stage."""
    with files.staged(out) as folder:
        for stage, texts in columns.items():
            lines = (
                json.dumps({**_prompt_fields(prompt), "completion": text}, ensure_ascii=False)
                for prompt, text in zip(prompts, texts, strict=True)
            )
            files.write_text(folder / f"{stage.replace('/', '_').replace(':', '_')}.jsonl", "\n".join(lines) + "\n")


def _prompt_fields(prompt: object) -> dict[str, object]:
    """Fields of a prompt in a file of answers; "prompt" is always a text, the JSON of a conversation."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return {"prompt": json.dumps(prompt, ensure_ascii=False), "messages": prompt}


def start() -> None:
    """Parse the flags and run."""
    cli.run(
        main, required=("workdir",), example='--workdir=runs/quickstart --stages=sft,liti:1.0 --prompt="This film is"'
    )
