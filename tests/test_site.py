"""The documentation website builds without warnings, is complete, and can be read without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.launching import REPOSITORY

import rankllm_composer


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The website, built as `make site` builds it, with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    (line,) = re.findall(r"\$\(BIN\)/mkdocs (build .*)", (REPOSITORY / "Makefile").read_text())
    assert "--strict" in line
    command = [sys.executable, "-m", "mkdocs", *line.split(), "--site-dir", folder]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site_and_in_its_index(site):
    pages = {path.stem for path in (REPOSITORY / "docs").glob("*.md")}
    assert pages == {path.stem for path in site.glob("*.html")} - {"404", "demo"}
    examples = {path.name for path in (REPOSITORY / "examples").iterdir() if path.is_file()}
    assert examples == {path.name for path in (site / "examples").iterdir()}
    index = (REPOSITORY / "docs" / "index.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+)\.md\)", index)) == pages - {"index"}


def test_the_api_page_documents_every_public_name(site):
    page = (site / "api.html").read_text()
    documented = re.findall(r'id="rankllm_composer\.(?:[a-z_]+\.)*(\w+)"', page)  # not members of classes
    assert set(rankllm_composer.__all__) <= set(documented)
    assert "Raises:\n" not in page  # sections are rendered as tables


class _Resources(HTMLParser):
    """URLs that a browser loads by itself: scripts, styles, images, fonts, frames."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and (name in ("src", "srcset", "poster") or (name == "href" and tag == "link")):
                self.urls.append(value)


def test_no_page_loads_anything_from_the_network(site):
    remote = re.compile(r"(https?:)?//")
    for page in site.glob("*.html"):
        resources = _Resources()
        resources.feed(page.read_text())
        assert resources.urls and not [url for url in resources.urls if remote.match(url)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style
