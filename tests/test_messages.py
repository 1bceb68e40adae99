"""The helper that tests of messages share: it finds a value as a whole, and nothing that only looks like it."""

import pytest
from messages import holds, names, refused_with, subjects


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("a.json: line 3, text: missing", "line 3"),
        ("a.json: line 3, text: missing", "text"),
        ("/tmp/a.json: empty", "a.json"),
        ("use --gpu-memory, or --gpu", "--gpu"),
        ("needs 15,000 bytes", 15_000),
        ("must lie in 1 … 1000", 1000),
        ("must lie in 1-1000", 1000),
        ("must lie in 1-1000", 1),
        ("over 1e-04; see", 0.0001),
        ("fps is 0.0: low", 0),
        ("scale is nan.", float("nan")),
        ("seed is -1.", -1),
        ("`$.width` is off", "width"),
        ("found [3, 4]", "[3, 4]"),
        ("found [3, 4]", 3),
    ],
)
def test_a_value_is_found(message: str, value: object) -> None:
    assert holds(message, value)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("line 13", "line 1"),
        ("line 13", 3),
        ("line 13", 1),
        ("is 0.3", 3),
        ("is 3.5", 3),
        ("is 1,003", 3),
        ("is -3", 3),
        ("neg_text: missing", "text"),
        ("/tmp/pytest-3/4/a.json", 3),
        ("/tmp/pytest-3/4/a.json", 4),
        ("layers.4.weight is cut", 4),
        ("transformer-9s: new", "transformer"),
        ("transformer.ttt is 3", "ttt"),
        ("use --gpu-memory", "--gpu"),
        ("/tmp/bundle/bundle.json: cut", "/tmp/bundle"),
        ("model.onnx_data is cut", "model.onnx"),
        ("all is unchanged", "changed"),
    ],
)
def test_what_only_looks_like_a_value_is_not(message: str, value: object) -> None:
    assert not holds(message, value)


def test_every_value_must_be_named_in_one_line() -> None:
    names("a.json: line 3", "a.json", "line 3")
    for message in ("b.json: line 3", "a.json: line 4", "a.json:\nline 3"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            names(message, "a.json", "line 3")
    with pytest.raises(pytest.fail.Exception), refused_with(ValueError, "a.json"):
        raise ValueError("b.json: is cut")


def test_lines_of_a_report_are_told_apart() -> None:
    report = ["a: unchanged", "b: weights changed (1 → 2)", "c: new"]
    assert subjects(report, "unchanged") == ["a"] and subjects(report, "changed") == ["b"]
