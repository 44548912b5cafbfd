"""Answers to mathematical problems: which are the same, and which one a text gives."""

import importlib.util
import signal
import sys
import threading
import time

import pytest

from warp_jax.rewards import math_answers, text_reward

SAME = [
    ("7 months", "7"),
    ("1.5e3", "1500"),
    ("18", "18.00"),
    ("18.", "+18"),
    ("-3", "\N{MINUS SIGN}3"),
    ("-0", "0"),
    ("1,234,567", "1234567"),
    (r"1{,}234", "1234"),
    (r"10,\!000", "10000"),
    ("$1,234.50", "1234.5"),
    (r"\$18", "18 dollars"),
    ("$18$", "18"),
    ("5%", "5"),
    (r"5\%", "5 percent"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", ".50"),
    (r"\dfrac12", r"\tfrac{3}{6}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", "-.5"),
    (r"2\frac{1}{2}", "2.5"),
    ("-2 1/2", "-5/2"),
    ("18 apples", "18"),
    ("1 apple", "1 apples"),
    ("18 km", "18 km"),
    (r"10 \text{ m}", "10"),
    (r"5\,\mathrm{cm}^2", "5"),
    (r"90^\circ", "90 degrees"),
    (r"90^{\circ}", "90°"),
    ("(1, 2)", "(1,2.0)"),
    (r"\left( 1, \frac{1}{2} \right)", "(1,0.5)"),
    ("(1,234)", "(1, 234)"),
    ("1, 2", "1,2"),
    ("((1,2),3)", "((1.0,2),3)"),
    ("(1,2), (3,4)", "(1,2),(3.0,4)"),
    (r"\{1,2\}", r"\{1, 2\}"),
    (r"(-\infty, 2]", r"(-\infty,\,2]"),
    (r"\text{Tuesday}", "tuesday"),
    (r"\text{(C)}", "C"),
    ("x = 5", "5"),
    (r"x \in [1,2]", "[1, 2]"),
    (r"\sqrt{2}", r"\sqrt2"),
    ("x^{2} + 1", "x^2+1"),
    (r"\frac{x+1}{2}", r"\dfrac{x + 1}{2}"),
    ("9" * 5000, "9" * 5000),
    (r"32,\! 349", "32349"),
    (r"\cfrac{1}{3}", "1/3"),
    ("{42}", "42"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    ("5 m/s", "5"),
    (r"5\ \text{m/s}", "5 m/s"),
    (r"5\,\text{m}/\text{s}", "5 m/s"),
    ("m/s", r"\text{m}/\text{s}"),
    ("18km", "18 km"),
    ("about 18", "18"),
    ("**18**", "18"),
    ("Answer: 18", "18"),
    (r"\(34\)", "34"),
    ("1 000", "1000"),
    ("\N{EN DASH}5", "-5"),
    ("9 + 9", "18"),  # evaluated
    ("(16 - 3 - 4) * 2", "18"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    ("5!", "120"),
    (r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}", r"\begin{pmatrix}1\\0.5\end{pmatrix}"),
    ("(1,2)", "1,2"),
    ("1, -2", "-2, 1"),
    ("X", "x"),
    (r"\text{Evelyn}", "evelyn"),
]
DIFFERENT = [
    ("18", "180"),
    ("18", "-18"),
    ("1/2", "12"),
    ("1/2", "1/3"),
    ("0.333", "1/3"),
    (r"2\frac12", "21/2"),
    ("2 1/2", "1"),
    ("5%", "0.05"),
    ("18 km", "18 miles"),
    ("18 million", "18"),
    ("18 millions", "18"),
    ("7 hundreds", "7"),
    ("3 thirds", "3"),
    ("7 tenths", "7"),
    ("7 thousandths", "7"),
    ("10 base two", "10"),
    ("18 and 19", "18"),
    ("17 or 18", "18"),
    ("17, 18", "18"),
    ("1,234", "1, 234"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "(1,3)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("2x", "2"),
    ("2 x", "2"),
    ("2abc", "2"),
    (r"3\pi", "3"),
    ("5 sin x", "5"),
    (r"5\sqrt{2}", "5"),
    ("2^10", "210"),
    ("3:30", "330"),
    ("5!", "5"),
    ("1 2", "12"),
    ("x 1 2", "x 12"),
    (r"\frac{1}{2}x", r"\frac{1}{2x}"),
    ("1/0", "0"),
    ("1e999999999", "1"),
    ("9" * 5000, "9" * 4999),
    ("", ""),
    ("$", "%"),
    ("1 000", "0"),
    ("H2O", "2"),
    (r"\frac{1+\sqrt5}{2}", "2"),
    ("2,74", "74"),
    ("\N{EN DASH}5", "5"),
    ("\N{EM DASH}5", "5"),
    ("I do not know", "not I do know"),
    ("18 km/h", "18 m/s"),
]
EXTRACTED = [
    (r"so \boxed{\frac{1}{2}} it is 7", r"\frac{1}{2}"),
    (r"\boxed{1}, no, \boxed{2}", "2"),
    (r"\boxed{3} and then \boxed{4", "3"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"$\boxed 5$", "5"),
    (r"\boxed{3} #### 4", "3"),
    ("9 + 9 = 18\n#### 18\nThe answer is 7", "18"),
    ("#### 17 #### 18", "18"),
    ("it is 18\n#### ", None),
    ("The answer is 17. The answer is 18.50. I had 3", "18.50"),
    ("Final Answer: the final answer is 18\nQuestion 2", "18"),
    ("**Answer:** **18**.", "18"),
    ("It is 3. The answer is", None),
    ("The answer is 17 or 18", "17 or 18"),
    ("17 18 16", "16"),
    ("about 1e5 men", "1e5"),
    ("10-3", "10-3"),
    ("x = -3", "-3"),
    ("(\N{MINUS SIGN}5)", "\N{MINUS SIGN}5"),
    ("so 1,234.5 men", "1,234.5"),
    ("add 2 1/2 cups.", "2 1/2"),
    (r"is -\frac{3}{4} now", r"-\frac{3}{4}"),
    ("costs $18.", "$18"),
    (r"The final answer is \(34\).", r"\(34\)"),
    ("The answer is 18, because 9 * 2 = 18.", "18"),
    ("The answer is 18! Next", "18"),
    ("#### **18**", "18"),
    ("<answer>18</answer> I tried 2 times", "18"),
    (r"<answer>\boxed{18}</answer>", "18"),
    (r"\boxed{5!}", "5!"),
    ("9 + 9 = 18", "18"),
    (r"so it is $\frac{1 + \sqrt{5}}{2}$.", r"$\frac{1 + \sqrt{5}}{2}$"),
    ("She has $5 and makes $18 now", "$18"),
    ("so 1 000 men", "1 000"),
    ("H2O", "H2O"),
    ("costs 2,74 euros", "2,74"),
    ("it is \N{EN DASH}5.", "\N{EN DASH}5"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    """Fails when a rewrite, a unit or the evaluation by math-verify is dropped, or only one side is simplified."""
    assert math_answers.equal(a, b)
    assert math_answers.equal(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    """Fails when digits are joined, percent divides, any letter is a unit, different units are equal, the order or kind
    of brackets is lost, a word is a product of letters, or what is left after dropping signs may be empty.
    """
    assert not math_answers.equal(a, b)
    assert not math_answers.equal(b, a)


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_extract(text, answer):
    """Fails when the first mark wins instead of the last, marks are tried in another order, braces are not counted, a
    decimal point ends the sentence, or a mark with nothing after it falls back to another number.
    """
    assert math_answers.extract(text) == answer


def test_gold_of_both_datasets():
    """Fails when an unmarked answer loses all but its last number, or the solution precedes the answer."""
    assert math_answers.gold({"answer": "9 * 2 = <<9*2=18>>18\n#### 1,800"}) == "1,800"
    assert math_answers.gold({"solution": r"So $x = \boxed{\frac{3}{4}}$ of 5."}) == r"\frac{3}{4}"
    assert math_answers.gold({"answer": "(1, 2)", "solution": r"\boxed{7}"}) == "(1, 2)"
    assert math_answers.gold({"answer": 18}) == "18"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "9 + 9"},
        {"solution": "it is 18"},
        {"answer": " "},
        {"answer": "####"},
        {"answer": ""},
        {"answer": []},
        {"answer": ["18"]},
        {"answer": float("nan")},
        {"answer": float("inf")},
        {"answer": None, "solution": None},
    ],
)
def test_rows_without_a_gold_answer_are_refused(row):
    """Fails when a row that can never be answered right gives 0, or the error does not show the row."""
    with pytest.raises(ValueError, match=r"got (answer|solution) .* in row \{.*\}, want the right answer") as error:
        math_answers.score([""], ["18"], [row])
    assert str(row) in str(error.value)


# written for this test in the style of GSM8K
GSM8K_GOLDS = ["18", "3", "70000", "1,450", "-12", "2,125,000", "0", "07", "65", "100"]


@pytest.mark.parametrize("answer", GSM8K_GOLDS)
def test_gold_answers_of_gsm8k_are_their_own_answer(answer):
    """Fails when a separator, a sign or a zero is lost on one of the ways to write an answer."""
    row = {"answer": f"He has 2 * 3 = <<2*3=6>>6.\nThen some more.\n#### {answer}"}
    completions = [f"#### {answer}", f"so ${answer}.", rf"\boxed{{{answer}}}", f"The answer is {answer} apples!"]
    assert math_answers.score([""] * 4, completions, [row] * 4) == [1.0] * 4
    assert math_answers.score([""], [f"#### {answer}1"], [row]) == [0.0]


@pytest.mark.parametrize(
    "answer", ["1e999999999", "9**9**9**9", "9^{9^{9^9}}", r"\frac{1}{" * 25 + "2" + "}" * 25, "9^9^9^9", "{" * 299]
)
def test_a_hostile_answer_cannot_hang(answer):
    """Fails when an answer is evaluated without a limit, or the next answer after it is not."""
    start = time.monotonic()
    rows = [{"answer": "18"}, {"answer": "1/2"}]
    assert math_answers.score([""] * 2, [rf"\boxed{{{answer}}}", r"\boxed{\frac{2}{4}}"], rows) == [0.0, 1.0]
    assert time.monotonic() - start < 60


def test_braces_without_an_end_are_read_in_linear_time():
    """Fails when a pattern backtracks: minutes for a completion of some thousand characters."""
    start = time.monotonic()
    for text in (
        "\\boxed{" * 2000,
        "\\boxed{" + "{" * 9000,
        "a" * 20_000,
        "<answer>" * 2000,
        "\\(" * 2000,
        "$1" * 4000,
    ):
        math_answers.extract(text)
    assert time.monotonic() - start < 20


def test_scores_in_a_thread():
    """Fails when a comparison needs signals of the main thread."""
    scores = []
    thread = threading.Thread(
        target=lambda: scores.extend(math_answers.score([""], [r"\boxed{\frac{3}{24}}"], [{"answer": "1/8"}]))
    )
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_a_killed_child_is_started_again():
    """Fails when the end of math-verify's process ends the training too."""
    assert math_answers.equal("7/21", r"\frac{1}{3}")
    math_answers._child().send_signal(signal.SIGKILL)
    math_answers._child().wait()
    math_answers.equal("8/24", r"\frac{1}{3}")
    assert math_answers.equal("9/27", r"\frac{1}{3}")


def test_a_broken_installation_is_no_wrong_answer(monkeypatch):
    """Fails when every answer is wrong because math-verify cannot be imported."""
    math_answers._child().communicate()
    math_answers._child.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="math-verify ended with exit code 1"):
        math_answers.equal("10/30", r"\frac{1}{3}")


def test_missing_package_is_named(monkeypatch):
    """Fails when the package's absence is a traceback, or found only when rewards are computed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    monkeypatch.delitem(sys.modules, "warp_jax.rewards.math_answers")
    with pytest.raises(ValueError, match=r"run: pip install 'warp_jax\[math\]'"):
        text_reward.load_function("warp_jax.math_answers:score")


def test_score_is_one_or_zero_for_each_completion():
    """Fails when rows or completions are taken in another order, or an unanswered completion is scored by its text."""
    rows = [{"answer": "#### 18"}, {"answer": "7"}, {"solution": r"\boxed{1/2}"}, {"answer": "None"}]
    completions = ["It is 18.00", "#### 18", r"\boxed{0.5}", "I do not know"]
    assert math_answers.score(["?"] * 4, completions, rows) == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "completion",
    [
        " ".join(map(str, range(30))),
        ", ".join(rf"\boxed{{{n}}}" for n in range(30)),
        rf"\boxed{{{', '.join(map(str, range(30)))}}}",
        "The answer is " + " or ".join(map(str, range(30))),
    ],
)
def test_listing_many_numbers_earns_nothing(completion):
    """Fails when any number of the text, or any part of a list, may equal the gold answer."""
    assert math_answers.score([""], [completion], [{"answer": "18"}]) == [0.0]
