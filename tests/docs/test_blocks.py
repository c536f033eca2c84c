"""The Python blocks of the documents run, in order, and print what their comments say."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a block prints stands behind the call, or below it on lines of its own.
BEHIND = re.compile(r"^\s*print\(.*\)  # (.*)$")
BELOW = re.compile(r"^# (.*)$")


def blocks(document: str) -> list[str]:
    return BLOCK.findall((ROOT / document).read_text())


def promised(block: str) -> list[str]:
    """The lines that a block says it prints."""
    found, printing = [], False
    for line in block.splitlines():
        match = BEHIND.match(line) or (printing and BELOW.match(line))
        if match:
            found.append(match[1])
        printing = bool(match) or "print(" in line
    return found


def run(document: str) -> None:
    """Execute the blocks of a document in one namespace."""
    namespace: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks(document), 1):
        # Published weights would be downloaded.
        code = block.replace("pretrained=True", "pretrained=False")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"{document}, block {number}", "exec"), namespace)
        assert output.getvalue().splitlines() == promised(block), block


def test_a_promise_that_is_not_kept_is_seen(tmp_path, monkeypatch):
    text = "```python\nx = 1\nprint(x)  # 1\n```\n\n```python\nfor i in (x, 3):\n    print(i)\n"
    (tmp_path / "a.md").write_text(f"{text}# 1\n# 3\n```\n")
    (tmp_path / "b.md").write_text(f"{text}# 1\n# 2\n```\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    run("a.md")
    with pytest.raises(AssertionError):
        run("b.md")


@pytest.mark.parametrize("document", ["README.md", "docs/equip.md"])
@pytest.mark.filterwarnings("ignore:.*nested.tensor")
def test_the_blocks_of_a_document_run_and_print_what_they_say(document):
    assert len(blocks(document)) >= 2
    run(document)
