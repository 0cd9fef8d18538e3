"""The Python in README.md runs, from top to bottom, as one program."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.minutes
@pytest.mark.slow
@pytest.mark.usefixtures("relaxed_promotion")
def test_readme_runs(tmp_path, monkeypatch):
    text = README.read_text()
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        # Empty lines in front make line numbers in tracebacks those of the file.
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], README, "exec"), namespace)
