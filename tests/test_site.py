"""The documentation as a site: it builds without a warning, holds every public name, and asks no other host."""

import html
import logging
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

import transformers_msd
from transformers_msd import trainer


build = pytest.importorskip("mkdocs.commands.build", reason="needs the extra `docs`")
mkdocs_config = pytest.importorskip("mkdocs.config")

ROOT = Path(__file__).parents[1]
# What a browser fetches as it opens a page.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|embed|video|audio)\b[^>]*?\bsrc=[\"']?([^\"' >]+)"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|icon|preload|preconnect|modulepreload|dns-prefetch))"
    r"[^>]*?\bhref=[\"']?([^\"' >]+)"
    r"|url\([\"']?([^\"')]+)|@import\s+[\"']([^\"']+)"
)
# What the theme's script would ask for: mermaid where a page has a diagram, GitHub where a repository is named.
ASKED_FOR = re.compile(r"class=\"mermaid\"|data-md-component=\"source\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, where a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = mkdocs_config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(collector)
    try:
        config.plugins.on_startup(command="build", dirty=False)
        build.build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(collector)
        config.plugins.on_shutdown()
    assert warnings == []
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    names = {f"transformers_msd.{name}" for name in transformers_msd.__all__}
    names |= {f"transformers_msd.trainer.{name}" for name in trainer.__all__}
    assert [name for name in sorted(names) if pages.count(f'id="{name}"') != 1] == []


def test_no_markup_is_left_in_the_reference(site: Path) -> None:
    for name in ("calls", "drafters", "models", "trainer"):
        shown = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / f"{name}.html").read_text()))
        assert re.findall(r".*`.*", shown) == [], name


def test_every_command_and_field_is_in_the_reference(site: Path) -> None:
    commands, recipes = ((site / f"reference/{name}.html").read_text() for name in ("command_line", "recipes"))
    for name in ("train", "generate-data", "check-parity", "convert", "tune", "bench"):
        assert f"transformers-msd {name}" in commands
    for option in ("--target_model", "--dry_run", "--draft_vocab_size", "--tolerance", "--time_limit"):
        assert f"<code>{option}</code>" in commands
    for field in ("draft_vlm", "num_unroll_steps", "warmup_steps"):
        assert f"<code>{field}</code>" in recipes


def test_opening_a_page_asks_no_other_host(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not ASKED_FOR.search(text), page
        for groups in FETCHED.findall(text):
            link = "".join(groups)
            assert not re.match(r"(https?:)?//", link), f"{page}: {link}"


def test_links_lead_to_pages_of_the_site_and_data_stay_in_the_clone(site: Path) -> None:
    assert not [*site.rglob("*.json")][1:]  # but for the search index
    for page in site.rglob("*.html"):
        for link in re.findall(r"<a\b[^>]*?\bhref=\"([^\"]+)\"", page.read_text()):
            path = unquote(html.unescape(link)).partition("#")[0]
            if page.name != "404.html" and path and "://" not in path:
                assert (page.parent / path).exists(), f"{page}: {link}"
