"""What the site adds to the pages of this folder: a reference read off the code, and links that lead out of it."""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath

import reference
import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, speculative_trace


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "training/recipes").glob("*.yaml"))
# Pages that lie elsewhere in the repository, as they are there.
OUTSIDE = ["CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("training/*/README.md")))]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")
# Names so long that they may break in a table, at their dots and underscores.
LONG_NAME = re.compile(r"<code>([\w.-]{24,})</code>")
FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of the folder, and those that are made of code."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for name, text in reference.pages(RECIPES).items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "trace_example.html", content=traced()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead every link to its place on the site; what is not published is named by its path in the repository."""
    uri = page.file.src_uri
    place = uri if uri in OUTSIDE else f"docs/{uri}"

    def lead(match: re.Match[str]) -> str:
        text, link = match.groups()
        path, _, anchor = link.partition("#")
        if "://" in link or not path:
            return match[0]
        path = normpath(f"{dirname(place)}/{path}")
        target = target_of(path, files)
        is_name = text.strip("`").endswith((".md", ".json", ".yaml", ".py", ".toml")) or text.strip("`") == path
        if target is None:
            return f"`{path}`" if is_name else f"{text} (`{path}`)"
        if is_name and path.endswith(".md"):
            text = title_of(path)
        target, _, own = target.partition("#")
        anchor = f"#{anchor or own}" if anchor or own else ""
        return f"[{text}]({relpath(target, dirname(uri) or '.')}{anchor})"

    # Code stays as it is.
    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let long names break."""

    def broken(match: re.Match[str]) -> str:
        name = re.sub(r"([._])", r"\1<wbr>", match[1])
        return f'<code class="long">{name}</code>'

    return LONG_NAME.sub(broken, html)


def traced() -> str:
    """Make the page of a call of the shipped pair, which `how_it_works.md` shows."""
    target, processor = load_target()
    draft = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)
    prompt = next(prompt for prompt in evaluation_prompts() if prompt["group"] == "image")
    inputs = encode_prompts(processor, [prompt])
    target.generate(**inputs, max_new_tokens=8, assistant_model=draft)  # so that the first round is as the others
    with speculative_trace(processor) as trace:
        target.generate(**inputs, max_new_tokens=100, assistant_model=draft)
    return trace.to_html()


def target_of(path: str, files: Files) -> str | None:
    """Find where the site has a file of the repository."""
    if path == "training/recipes":
        return "reference/recipes.md#recipes-in-a-clone"
    if ROOT / path in RECIPES:
        return f"reference/recipes.md#{slugify(case='lower')(Path(path).name, '-')}"
    uri = path if path in OUTSIDE else path.removeprefix("docs/")
    file = files.get_file_from_path(uri)
    is_here = file is not None and (path.startswith("docs/") or path in OUTSIDE) and file.inclusion.is_included()
    return uri if is_here else None


def title_of(path: str) -> str:
    """Read the title of a page."""
    return re.search(r"^# (.+)$", (ROOT / path).read_text(), re.MULTILINE)[1]
