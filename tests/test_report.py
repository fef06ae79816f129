"""The report: one HTML page from the files of a run folder, which loads nothing and shows the numbers of the card."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minitron_hf.errors import OutputError
from minitron_hf.publishing.card import render_model_card, write_model_card
from minitron_hf.publishing.report import render_report, write_report
from run_folder import SAMPLES, TEACHER, evaluation, plan, write_json, write_run

#: Elements without an end tag.
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, and its tables; refuses tags that are not closed in order."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows: list[list[str]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "caption":
            self.caption = ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        elif self.open and self.open[-1] == "caption":
            self.caption += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A complete run folder with its plots, its report and its card."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run")
    write_model_card(folder)
    return folder


@pytest.fixture
def run_dir(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def tables_of_card(content: str) -> list[list[list[str]]]:
    blocks = re.findall(r"(?:^\|.*\n)+", content, flags=re.M)
    cells = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in row] for row in (rows[0], *rows[2:])] for rows in cells]


def test_the_tables_are_those_of_the_card(written):
    page = Page(render_report(written))
    found = list(page.tables.values())
    expected = tables_of_card(render_model_card(written))
    assert len(expected) >= 4
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_the_page_is_whole_and_loads_nothing(written):
    content = (written / "report.html").read_text(encoding="utf-8")
    page = Page(content)
    assert content.startswith("<!doctype html>\n")
    policy = next(one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "base", "form")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "@import" not in content
    assert "url(" not in content
    assert "@media (prefers-color-scheme: dark)" in content
    drawn = [one["src"].removeprefix("data:image/png;base64,") for one in page.all("img")]
    files = {path.read_bytes() for path in (written / "plots").iterdir()}
    assert {base64.b64decode(one, validate=True) for one in drawn} == files
    assert all(one["alt"] for one in page.all("img"))
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    links = [one["href"] for one in page.all("a")]
    assert {link.removeprefix("#") for link in links if link.startswith("#")} == set(anchors)
    assert all(link.startswith(("#", "https://")) for link in links)
    # Every table and every picture scrolls in its own box.
    assert content.count('<div class="scroll"') == len(page.all("table"))
    assert content.count('<div class="picture"') == len(page.all("img")) == 5


def test_samples_stand_side_by_side(written):
    content = render_report(written)
    (beside,) = re.findall(r'<div class="beside">(.*?)</article>', content, flags=re.S)
    pairs = re.findall(r"<h4>(\w+)</h4><pre>(.*?)</pre>", beside, flags=re.S)
    found = [html.unescape(text) for pair in pairs for text in pair]
    assert found == ["Teacher", SAMPLES[0]["completions"]["teacher"], "Student", SAMPLES[0]["completions"]["student"]]


def test_a_pure_function_of_the_files(written, run_dir):
    content = (written / "report.html").read_bytes()
    (run_dir / "README.md").unlink()
    (run_dir / "report.html").unlink()
    assert write_report(run_dir) == run_dir / "report.html"
    assert (run_dir / "report.html").read_bytes() == content
    assert render_report(run_dir).encode() == content, "its own presence changes nothing"


def test_the_card_links_the_report_that_is_there(run_dir):
    assert "[report.html](report.html)" in (run_dir / "README.md").read_text()
    (run_dir / "report.html").unlink()
    assert "report.html" not in render_model_card(run_dir)


def test_free_text_is_text(run_dir):
    evil = "<script>alert('x')</script> & \"quotes\" <img src=x onerror=alert(1)>"
    changed = plan()
    changed["notes"] = [evil]
    changed["selection"] = evil
    write_json(run_dir / "pruning_plan.json", changed)
    measured = evaluation()
    measured["models"][evil] = measured["models"]["pruned"] | {"description": evil}
    measured["device"]["name"] = measured["data"]["name"] = evil
    write_json(run_dir / "evaluation.json", measured)
    write_json(run_dir / "samples.json", [{"prompt": evil, "completions": {"teacher": evil, evil: evil}}])
    write_json(
        run_dir / "teacher.json",
        TEACHER | {"license": "other", "license_name": evil, "license_link": "javascript://%0aalert(1)"},
    )
    write_json(run_dir / "hub.json", {"repo_id": f"lab/{evil}"})
    (run_dir / "recipe.yaml").write_text(json.dumps({"teacher": evil}))
    page = Page(render_report(run_dir))
    assert not page.all("script")
    assert len(page.all("img")) == 5
    assert all(link["href"].startswith(("#", "https://")) for link in page.all("a"))
    assert page.text.count("<script>alert('x')</script>") >= 10


@pytest.mark.parametrize(
    "missing",
    ["teacher", "distillation", "evaluation", "samples", "recipe", "config", "pruning_plan", "search", "plots"],
)
def test_any_optional_file_may_be_missing(run_dir, missing):
    for path in [*run_dir.glob(f"{missing}.[jy]*"), *run_dir.glob("plots/*" if missing == "plots" else "none")]:
        path.unlink()
    page = Page(render_report(run_dir))
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    gone = {"samples": "samples", "distillation": "distillation", "pruning_plan": "shapes", "plots": "importance"}
    assert gone.get(missing) not in anchors
    assert "Undefined" not in page.text


def test_a_folder_without_a_student_is_refused(tmp_path):
    with pytest.raises(OutputError, match="no student to describe"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_but_the_boxes_scrolls_sideways(written, tmp_path, width):
    """A browser lays the page out: as wide as its window, boxes with tables no wider."""
    content = render_report(written)
    frame = re.sub(r"<meta http-equiv[^>]*>", "", content)
    measure = (
        "onload = () => { const page = document.querySelector('iframe').contentDocument, whole = page.documentElement;"
        "document.title = [whole.scrollWidth, whole.clientWidth, page.querySelector('h1').textContent,"
        "Math.max(...[...page.querySelectorAll('.scroll, .picture')].map(one => one.clientWidth))].join('|') }"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"<script>{measure}</script><iframe width={width} height=900 frameborder=0 "
        f'srcdoc="{html.escape(frame)}"></iframe>'
    )
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", wrapper.as_uri()]
    done = subprocess.run(
        [*command, f"--user-data-dir={tmp_path / 'profile'}"], capture_output=True, text=True, timeout=120, check=True
    )
    total, visible, title, widest = re.search(r"<title>(.*?)</title>", done.stdout)[1].split("|")
    assert title == "stories-10M-minitron"
    assert width - 20 <= int(visible) <= width  # without a scroll bar
    assert int(total) == int(visible)
    assert int(widest) < int(visible)
