"""Builds the documentation as a site into build/site: python docs/build_site.py, or make docs.

The pages are the repository's own files in the repository's own folders, so that every relative link means the same on
the site as beside the code. Two kinds of pages are made: the API reference, from docstrings, and lists of folders. A
warning, a link that leads nowhere, a page that nothing leads to and a request to another host are errors.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).resolve().parents[1]
# What is shown, beside README.md as the first page.
SHOWN = (
    "docs/**/*.md",
    "docs/*.svg",
    "docs/*.png",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "tasks/*/README.md",
    "benchmarks/results/*",
    "examples/*",
    "deploy/**/*",
    "metarec/config/*.py",
)
# Pages of the reference: what a program imports, by what it is for.
REFERENCE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "python": (
        "Python",
        (
            "metarec.recommender.MetaRecommender",
            "metarec.adapted_user.AdaptedUser",
            "metarec.adapted_user.Recommendation",
            "metarec.evaluation.report.Report",
            "metarec.presets.preset",
            "metarec.data.task_files.load_task",
            "metarec.errors",
        ),
    ),
    "client": ("Client of the service", ("metarec.client.service_client", "metarec.client.answers")),
    "settings": ("Settings and tasks", ("metarec.config", "metarec.data.task")),
    "parts": (
        "Parts to swap",
        (
            "metarec.registry.Registry",
            "metarec.registries",
            "metarec.data.sources.assembly.Tables",
            "metarec.scorer",
            "metarec.scorers.term",
            "metarec.meta.inner_loop",
            "metarec.meta.algorithms",
            "metarec.meta.losses",
            "metarec.lm.adapter_kinds.AdapterKind",
            "metarec.lm.layouts.Layout",
            "metarec.bench.context",
        ),
    ),
}


def stage(pages: Path) -> None:
    """Copies what is shown, and writes the pages that are made, into a folder that is emptied first."""
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    for pattern in SHOWN:
        for file in sorted(ROOT.glob(pattern)):
            if file.is_file():
                target = pages / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    shutil.copyfile(ROOT / "README.md", pages / "index.md")
    _list_pages(pages / "docs" / "decisions", "*.md", "Decisions")
    _list_pages(pages / "tasks", "*/README.md", "Data sets")
    for name, (title, names) in REFERENCE.items():
        text = "\n\n".join(f"::: {found}" for found in names)
        (pages / "reference").mkdir(exist_ok=True)
        (pages / "reference" / f"{name}.md").write_text(f"# {title}\n\n{text}\n", encoding="utf-8")


def _list_pages(folder: Path, pattern: str, title: str) -> None:
    """Writes a folder's first page, with links to its pages by their headings."""
    links = []
    for page in sorted(folder.glob(pattern)):
        heading = page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        links.append(f"- [{heading}]({page.relative_to(folder).as_posix()})")
    (folder / "index.md").write_text("\n".join([f"# {title}", "", *links, ""]), encoding="utf-8")


@dataclass(frozen=True)
class Page:
    """What other pages may link to, and what a page links to.

    Args:
        anchors: Ids of its elements.
        links: Its links and what it loads, as they are written.
    """

    anchors: frozenset[str]
    links: tuple[str, ...]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.links.append(value)


def read_page(file: Path) -> Page:
    """Returns the anchors and links of an HTML file."""
    reader = _Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    return Page(frozenset(reader.anchors), tuple(reader.links))


def read_pages(site: Path) -> dict[str, Page]:
    """Returns the pages of a site by their paths in it, but for the one that stands in for those that are missing."""
    files = (file for file in sorted(site.rglob("*.html")) if file.name != "404.html")
    return {file.relative_to(site).as_posix(): read_page(file) for file in files}


def _target(page: str, link: str) -> tuple[str, str] | None:
    """Returns the path and the anchor that a link of a page leads to; None where that is another host."""
    target = urlsplit(urljoin(f"http://site/{page}", link))
    if target.netloc != "site" or target.scheme != "http":
        return None
    path = unquote(target.path).lstrip("/")
    return f"{path}index.html" if path.endswith("/") or not path else path, unquote(target.fragment)


def dead_links(site: Path) -> Iterator[str]:
    """Yields a line for each link of a site that leads to no file or anchor of it; other hosts are not visited."""
    pages = read_pages(site)
    for name, page in pages.items():
        for link in page.links:
            target = _target(name, link)
            if target is None:
                continue
            path, anchor = target
            if not (site / path).is_file():
                yield f"{name}: '{link}' leads to no file"
            elif anchor and path in pages and anchor not in pages[path].anchors:
                yield f"{name}: '{link}' leads to no heading"


def unreached(site: Path) -> Iterator[str]:
    """Yields a line for each page of a site that no page links to."""
    pages = read_pages(site)
    targets = ((name, _target(name, link)) for name, page in pages.items() for link in page.links)
    linked = {target[0] for name, target in targets if target is not None and target[0] != name}
    yield from (f"{name}: nothing leads to it" for name in sorted(pages.keys() - linked - {"index.html"}))


def loaded_from_elsewhere(site: Path) -> Iterator[str]:
    """Yields a line for each script, style, font or image that a page loads from another host."""
    loads = re.compile(r"""<(?:(?:script|img|iframe)[^>]*\ssrc|link[^>]*\shref)=["'](?:https?:)?//[^"']+""")
    for file in sorted(site.rglob("*.html")):
        for found in loads.findall(file.read_text(encoding="utf-8")):
            yield f"{file.relative_to(site)}: {found}"


def build(root: Path = ROOT) -> list[str]:
    """Builds the site, and returns what is wrong with it, a line each."""
    stage(root / "build" / "pages")
    shutil.rmtree(root / "build" / "site", ignore_errors=True)
    program = Path(sys.executable).with_name("zensical")
    done = subprocess.run(  # noqa: S603 - a program beside this Python
        [program, "build", "--strict", "--clean", "--config-file", root / "zensical.toml"],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        return said.splitlines()
    site = root / "build" / "site"
    return [*dead_links(site), *unreached(site), *loaded_from_elsewhere(site)]


if __name__ == "__main__":
    problems = build()
    print("\n".join(problems) or f"built {ROOT / 'build' / 'site' / 'index.html'}")
    sys.exit(bool(problems))
