"""Fields of a row: which values are texts, labels and parts of a prompt."""

import decimal

import numpy as np
import pytest

from warp_jax.data import fields

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("value", [None, 3, 0.5, True, b"a", {"a": 1}, [], MESSAGES, np.array(["a"]), "", " \n<br />"])
def test_only_a_text_is_a_text(value):
    """Fails when str() makes a text of anything: then a model learns to write 'None'. Or when HTML counts as text."""
    fields.check_text({"x": "a"}, "x", str)
    with pytest.raises(ValueError, match=r"^field 'x' (holds|is empty)") as error:
        fields.check_text({"x": value}, "x", str)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, 3, [], ["hi"], [{"role": "user"}], [{"role": "narrator", "content": "a"}]])
def test_a_list_must_be_a_conversation(value):
    """Fails when a list of anything is a prompt, or a conversation is refused where it is one."""
    fields.check_text({"x": MESSAGES}, "x", str | list)
    with pytest.raises(ValueError, match=r"^field 'x'"):
        fields.check_text({"x": value}, "x", str | list)


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0), (1, 1), (False, 0), (True, 1), (1.0, 1), ("0", 0), ("1", 1), (np.int64(1), 1), (np.bool_(True), 1)],
)
def test_labels(value, label):
    """Fails when a label of CSV (text), TFDS (numpy) or JSON (true) is refused, or stays what it was."""
    found = fields.label_of({"y": value}, "y")
    assert (found, type(found)) == (label, int)


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, float("nan"), "pos", " 1", "01", "", [1], {}, np.array([1, 0])])
def test_other_labels_are_refused(value):
    """Fails when int() or bool() makes a label of anything."""
    with pytest.raises(ValueError, match=r"^field 'y' holds .*, want 0 or 1; set data\.label_field"):
        fields.label_of({"y": value}, "y")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a", "a"),
        (3, "3"),
        (0.5, "0.5"),
        (10**400, str(10**400)),
        (np.float32(2), "2.0"),
        (decimal.Decimal("2.50"), "2.50"),
    ],
)
def test_texts_and_numbers_fill_a_template(value, written):
    """Fails when a number of JSON, TFDS or Parquet is refused, or a field inside another is not found."""
    assert fields.asked({"a": value, "b": {"c": value}}, "a", "{a} and {b[c]}") == f"{written} and {written}"


@pytest.mark.parametrize(
    "value", [None, True, [1], {"d": 1}, float("nan"), float("-inf"), b"a", decimal.Decimal("NaN")]
)
@pytest.mark.parametrize("template", ["{a}?", "{b[c]}?", "{a!r}?"])
def test_other_values_do_not_fill_a_template(template, value):
    """Fails when a prompt asks about 'None' or 'nan'."""
    with pytest.raises(ValueError, match=r"^field '(a|b\[c\])' of data.prompt_template holds .*, want a text or a num"):
        fields.asked({"a": value, "b": {"c": value}}, "a", template)
    fields.asked({"a": value, "question": "b"}, "a", "{question}")


def test_an_empty_prompt_is_refused():
    """Fails when a model is asked nothing: a row without tokens has no last position to continue."""
    with pytest.raises(ValueError, match="give an empty prompt"):
        fields.asked({"a": " ", "text": "b"}, "text", "{a}")


@pytest.mark.parametrize("template", ["{question}", "{", "{text.none}", "{text:d}", "{}"])
def test_templates_that_do_not_fit_the_row_are_refused(template):
    """Fails when a wrong template is a traceback, or its fields are not listed."""
    with pytest.raises(
        ValueError, match=r"config.data.prompt_template: got .*, want names of fields in braces, of label"
    ):
        fields.asked({"text": "a", "label": 1}, "text", template)
