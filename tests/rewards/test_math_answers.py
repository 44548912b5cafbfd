"""Answers to mathematical problems: which are the same, and which one a text gives."""

import pytest

from warp_jax.rewards import math_answers

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
    ("(1,2)", "1,2"),
    ("2x", "2"),
    ("2 x", "2"),
    ("2abc", "2"),
    (r"3\pi", "3"),
    ("5 sin x", "5"),
    (r"5\sqrt{2}", "5"),
    ("2^10", "210"),
    ("9+9", "18"),
    ("3:30", "330"),
    ("5!", "5"),
    ("1 2", "12"),
    ("x 1 2", "x 12"),
    (r"\frac{1}{2}x", r"\frac{1}{2x}"),
    ("X", "x"),
    (r"\Delta", r"\delta"),
    ("1/0", "0"),
    ("1e999999999", "1"),
    ("9" * 5000, "9" * 4999),
    ("", ""),
    ("$", "%"),
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
    ("10-3", "3"),
    ("x = -3", "-3"),
    ("(\N{MINUS SIGN}5)", "-5"),
    ("so 1,234.5 men", "1,234.5"),
    ("add 2 1/2 cups.", "2 1/2"),
    (r"is -\frac{3}{4} now", r"-\frac{3}{4}"),
    ("costs $18.", "$18"),
    ("no number", None),
    ("", None),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a, b):
    """Fails when a rule of _REWRITES, fractions, mixed numbers, units or a bracket's parts are dropped."""
    assert math_answers.equal(a, b)
    assert math_answers.equal(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different(a, b):
    """Fails when digits are joined, percent divides, any letter is a unit, the order or kind of brackets is lost,
    numbers are rounded, or what is left after dropping signs may be empty.
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


@pytest.mark.parametrize("row", [{"text": "9 + 9"}, {"solution": "it is 18"}, {"answer": " "}, {"answer": "####"}])
def test_rows_without_a_gold_answer_are_refused(row):
    """Fails when a row that can never be answered right gives 0 in silence."""
    with pytest.raises(ValueError, match="no gold answer, want it in the field 'answer'"):
        math_answers.score([""], ["18"], [row])


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
