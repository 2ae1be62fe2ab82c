"""A user's own CSV or JSON lines: read right, or refused by file, line and column (V23)."""

import json

import numpy as np
import pytest

from dpfa_jax.train.data import DataError, load_data
from dpfa_jax.train.data.table import MINIMUM_ROWS

pytest.importorskip("tokenizers")
ROWS = [(f"text number {i}", "yes" if i % 3 else "no") for i in range(2 * MINIMUM_ROWS)]


def csv_file(tmp_path, rows=ROWS, header="text,label", name="data.csv"):
    path = tmp_path / name
    path.write_text("\n".join([header, *(f"{text},{label}" for text, label in rows)]) + "\n")
    return path


def refused(path, match, *, row=None, column=None, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_data(str(path), **options)
    assert caught.value.source == str(path) and str(path) in str(caught.value)
    assert (caught.value.row, caught.value.column) == (row, column)
    assert caught.value.advice


def test_csv_and_jsonl_give_the_same_data(tmp_path):
    table = load_data(str(csv_file(tmp_path)), max_length=8, seed=1)
    lines = tmp_path / "data.jsonl"
    lines.write_text("\n".join(json.dumps({"label": lab, "text": t}) for t, lab in ROWS))
    other = load_data(str(lines), max_length=8, seed=1)
    np.testing.assert_array_equal(table.train_inputs, other.train_inputs)
    np.testing.assert_array_equal(table.test_labels, other.test_labels)
    assert table.class_names == ("no", "yes") and "public schema" in table.notes[0]
    assert len(table.train_inputs) + len(table.test_inputs) == len(ROWS)
    assert 0 < len(table.test_inputs) < len(ROWS) // 2


def test_quotes_byte_order_mark_blank_lines_and_other_columns(tmp_path):
    path = tmp_path / "data.csv"
    rows = "".join(f'{i},"a, ""b""\nc{i}",{"x" if i % 2 else "y"}\r\n\r\n' for i in range(120))
    path.write_bytes(b"\xef\xbb\xbf" + f"id,body,kind\r\n{rows}".encode())
    data = load_data(str(path), text_column="body", label_column="kind")
    assert data.class_names == ("x", "y")


def test_given_class_names_may_hold_a_class_that_no_row_has(tmp_path):
    data = load_data(str(csv_file(tmp_path)), class_names=("yes", "no", "maybe"))
    assert data.class_names == ("yes", "no", "maybe") and "were given" in data.notes[0]
    refused(csv_file(tmp_path), "none of no", class_names=("no",), row=3, column="label")


def test_bad_files(tmp_path):
    refused(tmp_path / "absent.csv", "No such file")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    refused(empty, "empty")
    refused(csv_file(tmp_path, []), "no rows")
    refused(csv_file(tmp_path, ROWS[: MINIMUM_ROWS - 1]), f"{MINIMUM_ROWS - 1} rows")
    refused(csv_file(tmp_path, [(t, "yes") for t, _ in ROWS]), "one class", column="label")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"text,label\nfine,yes\ncaf\xe9,no\n")
    refused(latin, "UTF-8", row=3)


def test_bad_columns(tmp_path):
    refused(csv_file(tmp_path, header="body,label"), "no such column", row=1, column="text")
    refused(csv_file(tmp_path), "no such column", row=1, column="class", label_column="class")
    refused(csv_file(tmp_path, header="text,text"), "twice", row=1, column="text")
    doubled = tmp_path / "doubled.csv"
    doubled.write_text("text,label,label\na,b,c\n")
    refused(doubled, "twice", row=1, column="label")
    refused(csv_file(tmp_path), "same column", column="text", label_column="text")


@pytest.mark.parametrize(
    ("text", "label", "column"),
    [("", "yes", "text"), ("  ", "yes", "text"), ("a", "", "label"), ("a", "NaN", "label")],
)
def test_bad_fields_name_their_line(tmp_path, text, label, column):
    rows = [*ROWS]
    rows[5] = (text, label)
    refused(csv_file(tmp_path, rows), "no text|blank", row=7, column=column)


def test_bad_rows(tmp_path):
    refused(csv_file(tmp_path, [("a", "b,c")]), "3 fields", row=2)
    broken = tmp_path / "broken.csv"
    broken.write_text('text,label\n"never closed,yes\n')
    refused(broken, "not valid CSV", row=2)
    lines = tmp_path / "lines.jsonl"
    for content, match, column in [
        ("{", "not valid JSON", None),
        ("[1, 2]", "not a JSON object", None),
        ('{"text": "a"}', "no such column", "label"),
        ('{"text": "a", "text": "b", "label": 1}', "twice", "text"),
        ('{"text": 3, "label": 1}', "no text", "text"),
        ('{"text": "a", "label": NaN}', "NaN", "label"),
        ('{"text": "a", "label": null}', "no class name", "label"),
        ('{"text": "a", "label": 0.5}', "no class name", "label"),
        ('{"text": "a \\ud800", "label": 1}', "surrogate", "text"),
        ('{"text": "a", "label": "\\udfff"}', "surrogate", "label"),
        ("[" * 100_000, "nested too deeply", None),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "not valid JSON", None),
    ]:
        lines.write_text("\n" + content + "\n")
        refused(lines, match, row=2, column=column)


def test_labels_of_one_row_each_are_refused_unless_they_are_public(tmp_path):
    """The report names all classes: a label that one person alone has would be published."""
    rows = [(text, f"{label}{i}" if i < 3 else label) for i, (text, label) in enumerate(ROWS)]
    path = csv_file(tmp_path, rows)
    refused(path, "3 of its 5 labels occur once only", column="label")
    names = tuple({label for _, label in rows})
    assert set(load_data(str(path), class_names=names).class_names) == set(names)
