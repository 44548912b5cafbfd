"""Compare the answers of two policies with a judge: score of the paper's Table 1, win rate, win rate at equal length.

  python scripts/side_by_side.py --ours=warp.jsonl --theirs=sft.jsonl --judge=my_judges:helpful --out=result.json

Each line of a file is one answer, {"prompt": "...", "completion": "..."}, with any further fields that the judge needs.
Lines are matched by prompt, in any order; scripts/sample.py writes such files. The judge is a reward model's folder
(...ForSequenceClassification with one label), or a Python function of (prompts, completions, rows) that returns one
score per answer, higher is better. Its module may be a file in the current folder. See docs/evaluation.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epy

from warp_jax import cli, files

with epy.lazy_imports():  # at their first use: --help does not wait for JAX
    from rich import console, text
    from rich import table as tables

    from warp_jax.benchmarks import side_by_side
    from warp_jax.evaluation import statistics
    from warp_jax.parallel import meshes
    from warp_jax.pretrained import sources
    from warp_jax.rewards import from_folder, text_reward


OURS = flags.DEFINE_string("ours", "", "JSONL file of answers; a positive score means these are better.")
THEIRS = flags.DEFINE_string("theirs", "", "JSONL file of answers to compare with, to the same prompts.")
JUDGE = flags.DEFINE_string(
    "judge", "", "Judge of both: folder of a reward model, hf://ORG/NAME, or package.module:function."
)
OUT = flags.DEFINE_string("out", None, "JSON file to write with all results; default: only print the table.")
MARGINS = flags.DEFINE_list(
    "margins",
    None,
    "Three numbers tie,slightly,better: the largest difference of the judge's scores that counts as a tie, as slightly "
    "better and as better. Default: 0.25, 0.75, 1.5 standard deviations of all scores. Set it to compare results.",
)
LENGTH_UNIT = flags.DEFINE_enum("length_unit", "characters", ["characters", "words"], "Unit of length.")
RESAMPLES = flags.DEFINE_integer("resamples", 1000, "Number of bootstrap samples for the intervals.", lower_bound=100)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the bootstrap.", lower_bound=0)
JUDGE_BATCH = 64  # answers
MESSAGES = "messages"  # optional field: the conversation, to which a reward model applies its chat template


def main(argv: list[str]) -> None:
    """Compare the two files, print the table and write --out."""
    del argv
    sys.path.append(str(Path.cwd()))  # a judge may be a file in this folder
    try:
        wanted = "three numbers, for example 0.1,0.5,1"
        margins = cli.numbers(MARGINS, wanted) if MARGINS.value is not None else None
        out = Path(OUT.value) if OUT.value is not None else None
        if out and (out.is_dir() or out.resolve() in (Path(OURS.value).resolve(), Path(THEIRS.value).resolve())):
            raise ValueError(f"--out: got {OUT.value!r}, a folder or an input file; want a new JSON file")
        answers = [side_by_side.read_answers(Path(path)) for path in (OURS.value, THEIRS.value)]
        options = {"length_unit": LENGTH_UNIT.value, "resamples": RESAMPLES.value, "seed": SEED.value}
        comparison = side_by_side.compare(load_judge(JUDGE.value), *answers, margins=margins, **options)
        if out:
            files.write_json(out, as_json(comparison, options))
    except (ValueError, OSError, SyntaxError) as error:
        cli.fail(error)
    console.Console(highlight=False).print(as_table(comparison))


def load_judge(source: str) -> text_reward.TextFn:
    """Load a judge from a reward model's folder or package.module:function."""
    if not sources.is_folder(source):
        return text_reward.load_function(source)

    def judge(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        is_chat = [MESSAGES in row for row in rows]
        if any(is_chat) != all(is_chat):
            raise ValueError(f"got the field {MESSAGES!r} in some answers only, want it in all or none")
        conversation_of = (lambda row: row[MESSAGES]) if all(is_chat) else None
        reward = from_folder.load(sources.find(source), meshes.make_mesh((-1, 1, 1)), "float32", conversation_of)
        parts = [slice(start, start + JUDGE_BATCH) for start in range(0, len(prompts), JUDGE_BATCH)]
        return np.concatenate([reward(prompts[part], completions[part], rows[part]) for part in parts])

    return judge


def as_json(comparison: side_by_side.Comparison, options: Mapping[str, Any]) -> dict[str, Any]:
    """All results and settings as JSON values; null for a result that is not defined."""
    settings = {"margins_given": MARGINS.value is not None, **options, "ridge": side_by_side.RIDGE}
    figures = {
        name: {key: x if math.isfinite(x) else None for key, x in value._asdict().items()}
        if isinstance(value, statistics.Interval)
        else value
        for name, value in comparison._asdict().items()
    }
    for name in ("mean_judge_score", "mean_length", "longer"):
        figures[name] = dict(zip(("ours", "theirs"), figures[name], strict=True))
    return {"ours": OURS.value, "theirs": THEIRS.value, "judge": JUDGE.value, "settings": settings, **figures}


def as_table(comparison: side_by_side.Comparison) -> tables.Table:
    """Results as a table for the terminal."""
    title = f"ours: {OURS.value}\ntheirs: {THEIRS.value}\njudge: {JUDGE.value}"
    origin = "as given" if MARGINS.value is not None else "from the deviation of these scores; see --margins"
    margins = ", ".join(f"{margin:.4g}" for margin in comparison.margins)
    caption = (
        f"{comparison.answers} pairs of answers to {comparison.prompts} prompts; margins {margins} ({origin}); "
        f"{RESAMPLES.value} resamples, seed {SEED.value}"
    )
    said = {"title": text.Text(title), "caption": text.Text(caption)}
    table = tables.Table(**said, title_justify="left", caption_justify="left")
    table.add_column()
    table.add_column("value", justify="right")
    table.add_column()
    table.add_row("score of ours, -1.5 to 1.5", *_cells(comparison.score, "+.3f"))
    table.add_row("win rate of ours, ties half", *_cells(comparison.win_rate, ".3f"))
    table.add_row("win rate at equal length", *_cells(comparison.length_controlled_win_rate, ".3f"), end_section=True)
    for name, count in comparison.grades.items():
        table.add_row(f"ours {name}" if name != "tie" else name, str(count), f"{count / comparison.answers:.1%}")
    table.add_section()
    table.add_row("judge's mean score: ours, theirs", *(f"{x:.4g}" for x in comparison.mean_judge_score))
    table.add_row(f"mean {LENGTH_UNIT.value}: ours, theirs", *(f"{x:.1f}" for x in comparison.mean_length))
    table.add_row("pairs with the longer answer: ours, theirs", *(str(x) for x in comparison.longer))
    return table


def _cells(interval: statistics.Interval, form: str) -> tuple[str, str]:
    if not math.isfinite(interval.value):
        return "undefined", "every pair has the same length difference"
    if not math.isfinite(interval.low):
        return f"{interval.value:{form}}", f"no interval: fewer than {statistics.MIN_CLUSTERS} prompts"
    return f"{interval.value:{form}}", f"95 %: {interval.low:{form}} .. {interval.high:{form}}"


if __name__ == "__main__":
    cli.run(
        main,
        required=("ours", "theirs", "judge"),
        example="--ours=warp.jsonl --theirs=sft.jsonl --judge=my_judges:helpful",
    )
