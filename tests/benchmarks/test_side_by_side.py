"""Side-by-side comparison, against arithmetic by hand and scipy."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning

from warp_jax import cli, exit_codes
from warp_jax.benchmarks import side_by_side

ROOT = Path(__file__).parents[2]
MARGINS = (0.5, 1.0, 2.0)
# score of ours minus theirs -> grade at MARGINS: every edge, and both signs at different places
GRADED = {
    "a": (3.0, 1.5),
    "g": (0.75, 0.5),
    "b": (0.5, 0.0),
    "c": (-0.75, -0.5),
    "d": (1.0, 0.5),
    "e": (2.0, 1.0),
    "f": (-2.5, -1.5),
}


def _row(prompt, score, completion="x"):
    return {"prompt": prompt, "completion": completion, "score": score}


def _judge(prompts, completions, rows):
    return [row["score"] for row in rows]


def _answers():
    """Ours and theirs; theirs score 1 to 7 and stand in another order; ours have 2 words each, theirs 1."""
    ours = [_row(p, i + 1 + difference, "xyz " + p) for i, (p, (difference, _)) in enumerate(GRADED.items())]
    theirs = [_row(p, i + 1.0, "u" * (i + 1)) for i, p in enumerate(GRADED)]
    return ours, theirs[3:] + theirs[:3]


def _compare(ours, theirs, *, margins=MARGINS, length_unit="characters", seed=0, judge=_judge):
    return side_by_side.compare(judge, ours, theirs, margins=margins, length_unit=length_unit, resamples=200, seed=seed)


def test_comparison_by_hand():
    """Fails when ours and theirs are swapped, a tie counts as a loss or 1, or rows are not matched by prompt."""
    found = _compare(*_answers())
    assert found.score.value == pytest.approx((1.5 + 0.5 + 0 - 0.5 + 0.5 + 1 - 1.5) / 7)
    assert found.win_rate.value == pytest.approx((1 + 1 + 0.5 + 0 + 1 + 1 + 0) / 7)
    assert list(found.grades.values()) == [1, 1, 2, 1, 1, 0, 1]
    assert found.mean_judge_score == pytest.approx((4 + 4 / 7, 4))
    assert (found.mean_length, found.longer) == ((5.0, 4.0), (4, 2))
    assert (found.prompts, found.answers, found.margins) == (7, 7, MARGINS)


def test_swapped_policies_get_the_opposite():
    """Fails when a grade or the length control looks at the size of a difference only."""
    ours, theirs = _answers()
    found, swapped = _compare(ours, theirs), _compare(theirs, ours)
    assert swapped.score.value == pytest.approx(-found.score.value)
    assert swapped.win_rate.value == pytest.approx(1 - found.win_rate.value)
    rates = [c.length_controlled_win_rate.value for c in (found, swapped)]
    assert sum(rates) == pytest.approx(1)
    assert abs(rates[0] - found.win_rate.value) > 0.02
    assert list(swapped.grades.values()) == [1, 0, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(("difference", "grade"), GRADED.values())
def test_a_margin_belongs_to_the_grade_below(difference, grade):
    """Fails when the edge counts as above the margin (side="right"), or the sign is lost."""
    assert side_by_side.grade(np.array([difference]), MARGINS).tolist() == [grade]
    above = np.nextafter(abs(difference), np.inf) * np.sign(difference)
    more = 0.5 if abs(difference) in MARGINS else 0
    assert side_by_side.grade(np.array([above]), MARGINS).tolist() == [grade + np.sign(difference) * more]


def test_margin_zero_leaves_only_equal_scores_as_ties():
    """Fails when 0 is not a margin: the grades of small and of no differences."""
    assert side_by_side.grade(np.array([0.0, 1e-9, -1e-9]), (0.0, 1.0, 2.0)).tolist() == [0, 0.5, -0.5]


def test_default_margins_are_in_deviations_of_all_scores():
    """Fails when the deviation is that of one policy, of the differences, or a sample's."""
    ours = [_row("a", 1.0), _row("b", 3.0)]
    theirs = [_row("a", 5.0), _row("b", 11.0)]  # all four: mean 5, squares 16 + 4 + 0 + 36
    found = _compare(ours, theirs, margins=None)
    assert found.margins == pytest.approx(np.sqrt(14) * np.array([0.25, 0.75, 1.5]))
    assert found.grades["much worse"] == found.grades["worse"] == 1


def test_a_judge_that_tells_nothing_apart_gives_ties():
    """Fails when default margins of 0 are refused, or grade 0 as a win."""
    found = _compare([_row("a", 2.0), _row("b", 2.0, "long")], [_row("b", 2.0), _row("a", 2.0)], margins=None)
    assert found.grades["tie"] == 2
    assert (found.score.value, found.win_rate.value, found.length_controlled_win_rate.value) == (0, 0.5, 0.5)


def test_words_and_characters():
    """Fails when the unit is ignored, or blanks are counted as words."""
    ours, theirs = _answers()
    ours[0]["completion"] = " four  words\nare here "
    assert _compare(ours, theirs, length_unit="words").mean_length == pytest.approx((16 / 7, 1))
    assert _compare(ours, theirs).mean_length == pytest.approx((52 / 7, 4))


def _pairs(count, seed=1):
    """Answers to `count` prompts; ours are better by 0.4 +- 1 and of any length."""
    rng = np.random.default_rng(seed)
    ours, theirs = (
        [_row(f"p{i}", mean + rng.normal(0, 0.7), "x" * rng.integers(1, 30)) for i in range(count)] for mean in (0.4, 0)
    )
    return ours, theirs


def test_intervals_cover_and_repeat():
    """Fails when the seed is ignored or unset, or prompts are drawn without replacement."""
    ours, theirs = _pairs(300)
    found = _compare(ours, theirs)
    differences = np.array([a["score"] - b["score"] for a, b in zip(ours, theirs, strict=True)])
    grades = np.sign(differences) * (0.5 * (abs(differences[:, None]) > np.array(MARGINS)).sum(1))
    half = 1.96 * grades.std() / np.sqrt(300)
    assert found.score == pytest.approx((grades.mean(), grades.mean() - half, grades.mean() + half), abs=0.03)
    assert found.score.high - found.score.low == pytest.approx(2 * half, rel=0.15)
    for interval in (found.score, found.win_rate, found.length_controlled_win_rate):
        assert interval.low < interval.value < interval.high
    assert _compare(ours, theirs) == found
    assert _compare(ours, theirs, seed=1).score.low != found.score.low


def test_answers_to_one_prompt_are_drawn_together():
    """Fails when rows are drawn instead of prompts: copies of every pair would halve the intervals."""
    ours, theirs = _pairs(40)
    once, often = _compare(ours, theirs), _compare(ours * 4, theirs * 4)
    assert (often.prompts, often.answers) == (40, 160)
    for name in ("score", "win_rate"):
        assert getattr(often, name) == pytest.approx(getattr(once, name))


def test_duplicates_are_matched_in_order():
    """Fails when the last answer to a prompt is matched first, or one answer serves for all."""
    ours = [_row("a", 1), _row("b", 2), _row("a", 3)]
    theirs = [_row("a", 10), _row("a", 30), _row("b", 20)]
    assert [row["score"] for row in side_by_side.match(ours, theirs)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("mine", "other", "message"),
    [
        ("abc", "ab", "'c': got 1 answers of ours and 0 of theirs"),
        ("ab", "cab", "'c': got 0 answers of ours and 1 of theirs"),
        ("aab", "ab", "'a': got 2 answers of ours and 1 of theirs"),
        ("ab", "abb", "'b': got 1 answers of ours and 2 of theirs"),
    ],
)
def test_other_prompts_are_refused(mine, other, message):
    """Fails when only missing, or only extra prompts are found, or the prompt is not named."""
    with pytest.raises(ValueError, match=f"^prompt {message}"):
        side_by_side.match([_row(p, 0) for p in mine], [_row(p, 0) for p in other])


def _by_scipy(wins, difference):
    """The win rate at equal length, from a general minimiser."""
    effect = np.tanh(difference / np.sqrt(((difference - difference.mean()) ** 2).mean()))

    def loss(weights):
        log_odds = weights[0] + weights[1] * effect
        entropy = (np.logaddexp(0, log_odds) - wins * log_odds).sum()
        return entropy + 0.05 * (weights**2).sum()

    intercept = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x[0]
    return 1 / (1 + np.exp(-intercept))


DIFFERENCE = np.array([40.0, 25, -10, 60, 5, -30, 80, 15])


@pytest.mark.parametrize(
    "wins",
    [
        [1, 1, 0.5, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 0, 1, 1],  # the longer always wins
        [0.5] * 8,
        [1] * 8,
        [0.5, 0.5, 0, 0.5, 0, 0, 0.5, 0.5],  # no win
    ],
)
def test_length_control_is_the_documented_formula(wins):
    """Fails when d is centred, tanh, deviation or ridge is wrong, a tie is no half win, or the fit stops early."""
    wins = np.array(wins, float)
    found = side_by_side.length_controlled_win_rate(wins, DIFFERENCE)
    assert found == pytest.approx(_by_scipy(wins, DIFFERENCE), abs=1e-6)


def test_length_control_of_many_pairs_is_the_documented_formula():
    """Fails when the ridge or the tolerance depends on the number of pairs."""
    rng = np.random.default_rng(3)
    wins, difference = rng.choice([0, 0.5, 1], 2000, p=[0.1, 0.2, 0.7]), rng.normal(30, 40, 2000)
    found = side_by_side.length_controlled_win_rate(wins, difference)
    assert found == pytest.approx(_by_scipy(wins, difference), abs=1e-6)


def test_a_fit_that_does_not_converge_is_no_result(monkeypatch):
    """Fails when the weights of the last step are returned."""
    monkeypatch.setattr(side_by_side, "MAX_STEPS", 2)
    with pytest.warns(ConvergenceWarning), pytest.raises(FloatingPointError, match="no minimum after 2"):
        side_by_side.length_controlled_win_rate(np.ones(8), DIFFERENCE)


def _synthetic(quality, slope, count=4000):
    """Wins and length differences (ours mostly longer) with log-odds quality + slope * tanh(difference / deviation)."""
    rng = np.random.default_rng(5)
    difference = rng.normal(30, 40, count)
    log_odds = quality + slope * np.tanh(difference / 40)
    return (rng.random(count) < 1 / (1 + np.exp(-log_odds))).astype(float), difference


def test_length_control_removes_length_and_keeps_quality():
    """Fails when the rate is the raw one, or 1/2 whatever the quality."""
    wins, difference = _synthetic(0.0, 2.5)
    assert wins.mean() > 0.7
    assert side_by_side.length_controlled_win_rate(wins, difference) == pytest.approx(0.5, abs=0.03)
    wins, difference = _synthetic(-0.8, 2.5)  # worse answers that win by their length
    assert wins.mean() > 0.55
    assert side_by_side.length_controlled_win_rate(wins, difference) == pytest.approx(0.31, abs=0.03)
    wins, difference = _synthetic(0.8, -0.5)
    assert side_by_side.length_controlled_win_rate(wins, difference) == pytest.approx(0.69, abs=0.03)


def test_length_control_stays_finite_when_the_longer_always_wins():
    """Fails when there is no ridge: the weights grow without end."""
    _, difference = _synthetic(0, 0)
    wins = (difference > 0).astype(float)
    assert side_by_side.length_controlled_win_rate(wins, difference) == pytest.approx(0.5, abs=0.05)
    assert 0.95 < side_by_side.length_controlled_win_rate(np.ones(4000), difference) < 1


def test_length_control_without_length_differences():
    """Fails when a deviation of 0 is divided by, or a constant difference is taken for equal length."""
    wins = np.array([1.0] * 30 + [0.0] * 10)
    assert side_by_side.length_controlled_win_rate(wins, np.zeros(40)) == pytest.approx(0.75, abs=0.005)
    assert np.isnan(side_by_side.length_controlled_win_rate(wins, np.full(40, 7)))


def test_lines_are_parsed(tmp_path):
    """Fails when blank lines are answers, a separator inside a text cuts its line, or further fields are dropped."""
    text = '{"prompt": "a", "completion": "x\u2028y", "id": 3}\r\n\n{"prompt": "b", "completion": ""}'
    (tmp_path / "ours.jsonl").write_bytes(text.encode())
    first, second = side_by_side.read_answers(tmp_path / "ours.jsonl")
    assert first == {"prompt": "a", "completion": "x\u2028y", "id": 3}
    assert second["completion"] == ""


GOOD = '{"prompt": "a", "completion": "x"}\n\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.jsonl: got no answers"),
        ("\n \n", "f.jsonl: got no answers"),
        (GOOD + "{", "f.jsonl line 3: broken JSON: Expecting property name"),
        (GOOD + "[1]", "f.jsonl line 3: got list"),
        (GOOD + '{"prompt": "a", "text": "x"}', r'f.jsonl line 3: field "completion": got fields \[.prompt., .text.\]'),
        ('{"completion": "x"}', 'f.jsonl line 1: field "prompt": got fields'),
        ('{"prompt": ["a"], "completion": "x"}', 'f.jsonl line 1: field "prompt": got list, want a text'),
        ('{"prompt": "a", "completion": null}', 'f.jsonl line 1: field "completion": got NoneType'),
        ("[" * 100_000, "f.jsonl line 1: broken JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, message):
    """Fails when a check is left out, or lines are counted from 0 or without the blank ones."""
    (tmp_path / "f.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        side_by_side.read_answers(tmp_path / "f.jsonl")


@pytest.mark.parametrize("margins", [(1, 2), (1, 2, 2), (2, 1, 3), (-1, 1, 2), (0, 1, np.inf), (0, np.nan, 2)])
def test_bad_margins_are_refused(margins):
    """Fails when the number, order, sign or finiteness of the margins is not checked."""
    with pytest.raises(ValueError, match="margins: got"):
        _compare(*_answers(), margins=margins)


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda prompts, completions, rows: np.zeros((14, 1)), r"judge: returned shape \(14, 1\), want \(14,\)"),
        (lambda prompts, completions, rows: np.zeros(7), r"judge: returned shape \(7,\)"),
        (lambda prompts, completions, rows: None, "judge: "),
        (lambda prompts, completions, rows: [row["missing"] for row in rows], "judge: KeyError: 'missing'"),
        (
            lambda prompts, completions, rows: [np.nan if p == "e" else 1 for p in prompts],
            "judge: got nan for prompt 'e'",
        ),
    ],
)
def test_bad_judges_are_refused(judge, message):
    """Fails when shape or finiteness is not checked, or the judge's own error escapes."""
    with pytest.raises(ValueError, match=message):
        _compare(*_answers(), judge=judge)


def test_one_prompt_is_refused():
    """Fails when an interval over one prompt, of width 0, is given."""
    with pytest.raises(ValueError, match="got 1, want at least 2"):
        _compare([_row("a", 1)] * 3, [_row("a", 2)] * 3)


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def _run(folder, *arguments):
    command = [sys.executable, str(ROOT / "scripts" / "side_by_side.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _flags(folder):
    (folder / "judges.py").write_text("def length_and_score(p, c, rows):\n    return [r['score'] for r in rows]\n")
    ours, theirs = _answers()
    names = _write(folder / "[red]ours.jsonl", ours), _write(folder / "theirs.jsonl", theirs)
    return [f"--ours={names[0]}", f"--theirs={names[1]}", "--judge=judges:length_and_score"]


def test_the_program(tmp_path):
    """Fails when a flag is not passed on, files are swapped, or a name is read as markup of the table."""
    options = ["--margins=0.5,1,2", "--length_unit=words", "--resamples=150", "--seed=7", "--out=new/result.json"]
    done = _run(tmp_path, *_flags(tmp_path), *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "[red]ours.jsonl" in done.stdout
    assert "+0.214" in done.stdout
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    direct = side_by_side.compare(_judge, *_answers(), margins=MARGINS, length_unit="words", resamples=150, seed=7)
    assert result["score"] == direct.score._asdict()
    assert result["length_controlled_win_rate"] == {"value": None, "low": None, "high": None}  # always one word more
    assert result["mean_length"] == {"ours": 2.0, "theirs": 1.0}
    assert result["margins"] == list(MARGINS)
    assert (result["ours"], result["judge"]) == ("[red]ours.jsonl", "judges:length_and_score")
    want = {"margins_given": True, "length_unit": "words", "resamples": 150, "seed": 7, "ridge": side_by_side.RIDGE}
    assert result["settings"] == want


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--margins=0.5,x,2", "--margins: got '0.5,x,2'"),
        ("--out=theirs.jsonl", "--out: got 'theirs.jsonl'"),
        ("--ours=nosuch.jsonl", "nosuch.jsonl"),
        ("--ours=bytes.jsonl", "bytes.jsonl: not UTF-8"),
        ("--judge=judges:nosuch", "cannot load 'judges:nosuch'"),
        ("--judge=", "--judge is missing"),
    ],
)
def test_bad_arguments_give_one_line(tmp_path, argument, message):
    """Fails when a check is left out: a traceback, an input overwritten, or a result for other input."""
    arguments = _flags(tmp_path)
    before = (tmp_path / "theirs.jsonl").read_text()
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff", "completion": ""}\n')
    done = _run(tmp_path, *arguments, argument)
    code = exit_codes.USER_FUNCTION if "nosuch'" in message else cli.BAD_INPUT
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert message in done.stderr
    assert (tmp_path / "theirs.jsonl").read_text() == before
