"""FAULTS.md against the tests: each row names those that show it.

`python tests/test_faults.py` writes the names.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS / "FAULTS.md"
ROWS = {"A": 23, "B": 14, "C": 26, "D": 20}


def marked_tests() -> Iterator[tuple[str, str, str]]:
    """``(row, file, function)`` of each ``@pytest.mark.fault(row, ...)``."""
    for file in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if ast.unparse(decorator).startswith("pytest.mark.fault("):
                    assert isinstance(decorator, ast.Call)
                    for row in decorator.args:
                        yield ast.literal_eval(row), file.name, node.name


def with_tests(text: str) -> str:
    """``text`` with the tests of each row in its last cell."""
    marked = list(marked_tests())

    def complete(row: re.Match[str]) -> str:
        names = [f"[{name}]({file})" for number, file, name in marked if number == row[2]]
        return f"{row[1]}| {', '.join(names)} |"

    return re.sub(r"^(\| ([A-D]\d+) \|.*)\|[^|]*\|$", complete, text, flags=re.MULTILINE)


def test_every_fault_names_the_tests_that_show_it() -> None:
    text = TABLE.read_text()
    assert text == with_tests(text), "python tests/test_faults.py writes the names of the tests"
    rows = re.findall(r"^\| ([A-D]\d+) \|.*\|([^|]*)\|$", text, re.MULTILINE)
    assert [row for row, _ in rows] == [
        f"{section}{n}" for section, count in ROWS.items() for n in range(1, count + 1)
    ]
    assert [row for row, tests in rows if not tests.strip()] == [], "rows without a test"
    assert {row for row, _, _ in marked_tests()} <= {row for row, _ in rows}


if __name__ == "__main__":
    TABLE.write_text(with_tests(TABLE.read_text()))
