"""Compare two policies' answers to the same prompts: score of the paper's Table 1, win rate, win rate at equal length.

  python scripts/side_by_side.py --ours=warp.jsonl --theirs=sft.jsonl --judge=my_judges:helpful --out=result.json

Each line of a file is one answer, {"prompt": "...", "completion": "..."}, with any further fields the judge may want.
Lines are matched by prompt, in any order. The judge is the folder of a reward model (...ForSequenceClassification with
one label), or a Python function of (prompts, completions, rows) that returns one number a text, higher is better; it
may live in a file of the current folder. See docs/evaluation.md.
"""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from warp_jax import cli, files
from warp_jax.benchmarks import side_by_side
from warp_jax.benchmarks.side_by_side import Comparison
from warp_jax.evaluation.pareto import Interval
from warp_jax.parallel import meshes
from warp_jax.rewards import from_folder, reward_functions

OURS = flags.DEFINE_string("ours", "", "JSONL file of the answers that positive figures speak for.")
THEIRS = flags.DEFINE_string("theirs", "", "JSONL file of the answers to compare with.")
JUDGE = flags.DEFINE_string("judge", "", "What scores both: a reward model's folder or package.module:function.")
OUT = flags.DEFINE_string("out", None, "JSON file for all figures and settings; default: only the table is printed.")
MARGINS = flags.DEFINE_list(
    "margins",
    None,
    "tie,slightly,better: score differences up to which a pair is a tie, slightly better, better; in the judge's "
    "units. Default: 0.25, 0.75 and 1.5 standard deviations of all scores together. Set it to compare several results.",
)
LENGTH_UNIT = flags.DEFINE_enum("length_unit", "characters", list(side_by_side.LENGTHS), "What lengths count.")
RESAMPLES = flags.DEFINE_integer("resamples", 1000, "Bootstrap resamples of the prompts.", lower_bound=100)
SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.", lower_bound=0)
JUDGED_AT_ONCE = 64
MESSAGES = "messages"  # the field with a conversation, which a reward model reads in its chat template


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    sys.path.append(str(Path.cwd()))  # for judges of the user's own
    try:
        margins = _numbers(MARGINS.value) if MARGINS.value is not None else None
        out = _checked_out(OUT.value) if OUT.value is not None else None
        ours, theirs = (side_by_side.parse_answers(_read(path), path) for path in (OURS.value, THEIRS.value))
        comparison = side_by_side.compare(
            load_judge(JUDGE.value),
            ours,
            theirs,
            margins=margins,
            length_unit=LENGTH_UNIT.value,
            resamples=RESAMPLES.value,
            seed=SEED.value,
        )
        if out is not None:
            files.write_json(out, as_json(comparison))
    except (ValueError, OSError, SyntaxError) as error:
        cli.fail(str(error))
    Console(highlight=False).print(as_table(comparison))


def load_judge(source: str) -> reward_functions.TextFn:
    """The text reward that a folder or the name of a function stands for; a model reads JUDGED_AT_ONCE texts a time."""
    if not Path(source).is_dir():
        return reward_functions.load_function(source)

    def judge(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        is_chat = [MESSAGES in row for row in rows]
        if any(is_chat) != all(is_chat):
            raise ValueError(f"some answers have a conversation in {MESSAGES!r} and some have not, want all or none")
        conversation_of = (lambda row: row[MESSAGES]) if all(is_chat) else None
        reward = from_folder.load(Path(source), meshes.make_mesh((-1, 1, 1)), "float32", conversation_of)
        starts = range(0, len(prompts), JUDGED_AT_ONCE)
        parts = [slice(start, start + JUDGED_AT_ONCE) for start in starts]
        return np.concatenate([reward(prompts[part], completions[part], rows[part]) for part in parts])

    return judge


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures and the settings they depend on; null where a figure cannot be known."""
    settings = {
        "margins_given": MARGINS.value is not None,
        "length_unit": LENGTH_UNIT.value,
        "resamples": RESAMPLES.value,
        "seed": SEED.value,
        "ridge": side_by_side.RIDGE,
    }
    figures = {
        name: {key: x if math.isfinite(x) else None for key, x in value._asdict().items()}
        if isinstance(value, Interval)
        else value
        for name, value in comparison._asdict().items()
    }
    for name in ("mean_judge_score", "mean_length", "longer"):
        figures[name] = dict(zip(("ours", "theirs"), figures[name], strict=True))
    return {"ours": OURS.value, "theirs": THEIRS.value, "judge": JUDGE.value, "settings": settings, **figures}


def as_table(comparison: Comparison) -> Table:
    """The figures for people."""
    title = f"ours: {OURS.value}\ntheirs: {THEIRS.value}\njudge: {JUDGE.value}"
    table = Table(title=Text(title), title_justify="left", caption=Text(_caption(comparison)), caption_justify="left")
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
    table.add_row("pairs with the longer: ours, theirs", *(str(x) for x in comparison.longer))
    return table


def _caption(comparison: Comparison) -> str:
    origin = "as given" if MARGINS.value is not None else "from the spread of these scores; see --margins"
    margins = ", ".join(f"{margin:.4g}" for margin in comparison.margins)
    return (
        f"{comparison.answers} pairs of answers to {comparison.prompts} prompts; margins {margins} ({origin}); "
        f"{RESAMPLES.value} resamples, seed {SEED.value}"
    )


def _cells(interval: Interval, form: str) -> tuple[str, str]:
    if not math.isfinite(interval.value):
        return "unknown", "lengths always differ by the same"
    return f"{interval.value:{form}}", f"95 %: {interval.low:{form}} .. {interval.high:{form}}"


def _checked_out(name: str) -> Path:
    """The path for the result, refused before the judge works if it cannot be meant."""
    out = Path(name)
    if out.is_dir() or out.resolve() in (Path(OURS.value).resolve(), Path(THEIRS.value).resolve()):
        raise ValueError(f"--out: got {name!r}, which is a folder or an input; want a new JSON file")
    return out


def _numbers(values: list[str]) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except ValueError:
        raise ValueError(f"--margins: got {','.join(values)!r}, want three numbers, for example 0.1,0.5,1") from None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


if __name__ == "__main__":
    parse_flags = functools.partial(
        cli.parse_flags,
        required=("ours", "theirs", "judge"),
        example="--ours=warp.jsonl --theirs=sft.jsonl --judge=my_judges:helpful --out=result.json",
    )
    app.run(main, flags_parser=parse_flags)
