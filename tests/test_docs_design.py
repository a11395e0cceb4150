"""The pages in docs/design/ name tests that exist, and files that exist."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = next(parent for parent in Path(__file__).resolve().parents if (parent / "pyproject.toml").exists())
NAMED = "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md", "docs/glossary.md"
PAGES = [*(ROOT / "docs" / "design").glob("*.md"), *(ROOT / name for name in NAMED)]
_FILE = re.compile(r"[\w./-]+\.(?:py|md|h|cpp|cu|txt)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def places() -> dict[str, set[str]]:
    """Return the names of the files that define each test function."""
    found = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE):
            found[name].add(path.name)
    return found


@every_page
def test_tests_that_a_page_names_exist(page):
    known, wrong = places(), []
    for span in re.findall(r"`([^`\n]+)`", page.read_text()):
        file, _, name = span.rpartition("::")
        if name.startswith("test_") and not name.endswith(".py"):
            now = known.get(name, set())
            if not now or (file and file not in now):
                wrong.append(f"{span}: {'now in ' + ', '.join(sorted(now)) if now else 'no such test'}")
    assert not wrong, "\n".join([f"{page.relative_to(ROOT)} names tests that do not exist:", *wrong])


@every_page
def test_files_that_a_page_names_exist(page):
    """Names in backticks may begin at the root, in the package, in csrc/ or next to the page; links at the page."""
    text, wrong = page.read_text(), []
    for name in re.findall(r"`([^`\n]+)`", text):
        bases = ROOT, ROOT / "lowrank_optim", ROOT / "lowrank_optim" / "ops", ROOT / "csrc", page.parent
        below = name.startswith("test_") and any((ROOT / "tests").rglob(name))
        if _FILE.fullmatch(name) and not below and not any((base / name).exists() for base in bases):
            wrong.append(name)
    for link in re.findall(r"\]\(([^)#:]+)", text):
        if link != "https" and not (page.parent / link).exists():
            wrong.append(link)
    assert not wrong, f"{page.relative_to(ROOT)} names files that do not exist: {wrong}"


def test_design_pages_say_which_tests_hold_a_decision():
    for page in PAGES:
        if page.parent.name == "design" and page.stem not in ("README", "deviations"):
            decisions = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
            for decision in decisions:
                fields = re.findall(r"^\*\*(Problem|Choice|Cost|Tests)\.\*\* ", decision, re.MULTILINE)
                assert fields == ["Problem", "Choice", "Cost", "Tests"], f"{page.name}: {decision.splitlines()[0]}"
