"""Tables: columns line up, nothing is cut however narrow the terminal, and no frame or markup gets in."""

import pytest

from ttt_video_engine.planning.table import text_table


@pytest.mark.parametrize("columns", ["20", "200"])
def test_a_table_is_plain_text_that_is_never_cut(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")
    long = "no [bold]reason[/bold] was given " * 20
    lines = text_table([("a", "1", long.strip()), ("transformer", "1,234,567,890", "")], numbers=[1])
    assert lines == [f"{'a':<11}  {'1':>13}  {long.strip()}", "transformer  1,234,567,890"]
