"""What the documentation shows is run: its Python, in order, and the README's shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.agents import end_agents

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Return (line number, text) of each fenced block of a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


def run_python(source: str, folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    script = folder / "page.py"
    script.write_text(source)
    command = [sys.executable, str(script)]
    environment = os.environ | {"EVERPOOL_CACHE_DIR": str(folder / "cache")}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        end_agents(folder)
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    return done


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    # As many empty lines as lie before a block: errors then name the page's own lines.
    source, line = "", 0
    for start, text in blocks(page, "python"):
        source += "\n" * (start - line) + text
        line = start + text.count("\n")
    run_python(source, tmp_path, page.name)


def test_readme_shell_does_what_it_shows(tmp_path: Path) -> None:
    everpool = f"{sys.executable} -m everpool.cli"
    (text,) = [text for _, text in blocks(ROOT / "README.md", "console")]
    for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = step.partition("\n")
        assert command.startswith("everpool ")
        line = everpool + command.removeprefix("everpool")
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, ""), command


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    run_python(example.read_text(), tmp_path, example.name)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
