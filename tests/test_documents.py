"""What the documents promise a reader about themselves."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_can_be_finished():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_make_target_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    missing = [to for to in links if "://" not in to and not (page.parent / to).exists()]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"`make ([a-z][a-z-]*)", text)
    assert missing + [name for name in named if name not in targets] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_the_project_that_is_named_is_there(page):
    roots = [ROOT, ROOT / "smg_sglang", ROOT / "smg_sglang" / "engine"]
    named = re.findall(r"`(?!sglang/)([a-z_]+(?:/[a-z_]+)+\.py)", page.read_text())
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []
