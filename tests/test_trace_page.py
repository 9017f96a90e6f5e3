"""The page of a trace in a real browser: all of it by mouse, by keys, and read out, on any screen, without a fault."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from training.tiny_world.build.target import encode_prompts, load_target
from training.tiny_world.build.train_draft import DRAFT_CHECKPOINT
from training.tiny_world.world.rows import evaluation_prompts
from transformers_msd import MSDDraftModel, NgramDrafter, TreeConfig, speculative_trace
from transformers_msd.tracing.page import render


playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def trace() -> Any:
    """A greedy call, a sampled one of three prompts, and one of n-grams."""
    target, processor = load_target()
    draft = MSDDraftModel.from_pretrained(DRAFT_CHECKPOINT, dtype=torch.float32)
    draft.tree_config = TreeConfig(num_nodes=16, depth=4, top_k=4)
    prompts = [prompt for prompt in evaluation_prompts() if prompt["group"] == "image"][:3]
    with speculative_trace(processor) as trace:
        target.generate(**encode_prompts(processor, prompts[:1]), assistant_model=draft, max_new_tokens=40)
        inputs = encode_prompts(processor, prompts)
        target.generate(**inputs, assistant_model=draft, do_sample=True, max_new_tokens=16)
        target.generate(**encode_prompts(processor, prompts[:1]), assistant_model=NgramDrafter(), max_new_tokens=30)
    return trace


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Open pages, and see in the end that none of them complained or asked for anything."""
    faults, contexts = [], []

    def open_page(text: str, width: int = 1400, **settings: Any) -> Any:
        path = tmp_path / "trace.html"
        path.write_text(text, encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **settings))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.append(asked.url) if asked.url[:5] not in ("file:", "data:") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1400])
def test_nothing_is_wider_than_the_screen_and_all_can_be_read(
    trace: Any, open_page: Any, width: int, scheme: str
) -> None:
    page = open_page(trace.to_html(), width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for number in range(3):
        page.select_option("#call", str(number))
        assert page.evaluate(CONTRASTS) == []
        assert page.locator("#pictures img").evaluate_all("all => all.every((own) => own.naturalWidth > 0)")


# Texts whose colour has a contrast below 4.5 to what they stand on (WCAG AA); marks of spaces are no text.
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (element) => {
    const box = element.closest("g.node")?.querySelector(".box");
    if (box) return rgb(getComputedStyle(box).fill);
    for (let own = element; own; own = own.parentElement) {
      const colour = rgb(getComputedStyle(own).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((own) => own.nodeType === 3 && own.textContent.trim());
    if (!hasText || element.matches(".mark, script, option, :disabled, :disabled + span")) continue;
    const style = getComputedStyle(element);
    const colours = [rgb(element.closest("svg") ? style.fill : style.color), ground(element)];
    const [dark, bright] = colours.map(light).sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (element.checkVisibility() && ratio < 4.5) found.push([element.textContent, ratio]);
  }
  return found;
}"""


PLACE = "own => { const { x, y, height } = own.getClientRects()[0]; return [x + 3, y + height / 2]; }"


def test_the_answer_stands_round_by_round(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html())
    rounds = trace.to_dict()["calls"][0]["rounds"]
    chunks = page.locator("#answer .chunk")
    assert chunks.count() == len(rounds)
    answer = "".join(piece for each in rounds for piece in each["rows"][0]["pieces"])
    assert page.locator("#answer").text_content().replace("\u21b5", "") == answer
    for number, each in enumerate(rounds):
        # Where it begins: one that goes over two lines has no middle.
        x, y = chunks.nth(number).evaluate(PLACE)
        page.mouse.click(x, y)
        own = each["rows"][0]
        assert page.locator("#round-heading").text_content().startswith(f"Round {number} " if number else "Prompt")
        if each["kind"] == "drafted":
            assert page.locator("#tree .node").count() == len(own["tree"]["parents"]) + (own["bonus"] is not None)
            assert page.locator("#tree .node.accepted").count() == len(own["accepted"])
            assert page.locator("#sentence").text_content().startswith(f"{len(own['tree']['parents']) - 1} token")


def test_keys_lead_through_rounds_and_tree(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html())
    last = len(trace.calls[0].rounds) - 1

    def heading() -> str:
        return page.locator("#round-heading").text_content()

    for key, title in (("End", f"Round {last} "), ("ArrowLeft", f"Round {last - 1} "), ("Home", "Prompt")):
        page.keyboard.press(key)
        assert heading().startswith(title)
    assert page.locator("#live").text_content().startswith("Prompt. The target read the prompt")
    page.locator("#timeline").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#timeline").get_attribute("aria-valuenow") == "1"
    page.locator("#tree [tabindex='0']").focus()
    before = heading()
    focused = "document.activeElement.getAttribute('aria-label')"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "rejected" in page.evaluate(focused)
    assert "rejected" in page.locator("#detail").text_content()
    page.keyboard.press("ArrowLeft")
    assert "emitted last" in page.evaluate(focused)
    page.keyboard.press("End")
    assert "the target's own" in page.evaluate(focused)
    assert heading() == before
    # All that can be used is reached by Tab, and the many parts of one thing are one stop.
    page.locator("h1").click()
    stops = []
    for _ in range(10):
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate("({ id, type, role }) => id || role || type".join(("(", ")(document.activeElement)")))
        )
    assert stops[:9] == ["call", "theme", "option", "before", "after", "play", "timeline", "radio", "treeitem"]


def test_what_is_read_out_has_roles_and_names(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html())
    for role, number in (("listbox", 1), ("slider", 1), ("tree", 1), ("status", 1), ("radio", 2), ("combobox", 1)):
        assert page.get_by_role(role).count() == number, role
    assert page.get_by_role("treeitem").first.get_attribute("aria-level") == "1"
    unnamed = "all => all.filter((own) => !(own.getAttribute('aria-label') || own.textContent.trim())).length"
    assert page.locator("button, [role=option], [role=treeitem]").evaluate_all(unnamed) == 0
    assert page.locator("img").evaluate_all("all => all.every((own) => own.alt)")


def test_sampled_calls_show_no_number_of_the_draft_and_every_prompt(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html())
    page.select_option("#call", "1")
    assert page.locator("#numbers input").evaluate_all("all => all.map((own) => own.disabled)") == [True, False]
    assert "noise" in page.locator("#note").text_content()
    pictures = []
    for row in range(3):
        page.select_option("#row", str(row))
        pictures.append(page.locator("#pictures img").get_attribute("src"))
    assert len(set(pictures)) == 3


def test_colours_follow_the_system_until_they_are_chosen(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html(), color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    found = [page.evaluate(ground)]
    for _ in range(3):
        page.locator("#theme").click()
        found.append(page.evaluate(ground))
    dark, light = found[:2]
    assert found == [dark, light, dark, dark]
    assert dark != light


def test_play_goes_on_by_itself_and_stops_at_the_end(trace: Any, open_page: Any) -> None:
    page = open_page(trace.to_html(), reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('.chunk')).transitionDuration") == "0s"
    last = len(trace.calls[0].rounds) - 1
    page.locator("#timeline").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.locator("#play").click()
    playwright.expect(page.locator("#timeline")).to_have_attribute("aria-valuenow", str(last))
    playwright.expect(page.locator("#play")).to_have_attribute("aria-pressed", "false")


def test_tokens_are_text_and_never_markup(open_page: Any) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    tree = {"token_ids": [1, 2], "pieces": [evil, evil], "parents": [-1, 0]}
    tree |= {"draft": [None, 0.5], "target": [None, 0.4], "ngram": [0, 0]}
    row = {"start": 0, "pieces": [evil], "special": [False], "accepted": [], "tree": tree}
    row["bonus"] = {"token_id": 3, "piece": evil, "target": 0.3}
    seconds = {"draft": 0.1, "verify": 0.1, "rest": 0.0}
    rounds = [{"kind": "drafted", "rests": False, "seconds": seconds, "rows": [row]}]
    prompt = [{"prompt": [{"text": evil}], "pictures": [], "num_tokens": 1}]
    call = {"target": evil, "drafter": evil, "device": "cpu", "sampled": False, "pictures": []}
    page = open_page(render({"calls": [call | {"rows": prompt, "rounds": rounds}]}))
    assert page.locator("img").count() == 0
    assert page.locator("#answer").text_content() == evil
    assert page.locator("#prompt").text_content() == evil


def test_a_notebook_shows_it_in_a_frame_of_its_own(trace: Any, open_page: Any) -> None:
    page = open_page(f"<!doctype html><link rel='icon' href='data:,'><p>A notebook</p>{trace._repr_html_()}")
    frame = page.frame_locator("iframe")
    frame.locator("#after").click()
    assert frame.locator("#round-heading").text_content().startswith("Round 2 ")
    assert frame.locator("#tree .node").count() > 1


def test_five_hundred_rounds_open_in_two_seconds(trace: Any, open_page: Any) -> None:
    found = trace.to_dict()
    call = found["calls"][0]
    drafted = next(each for each in call["rounds"] if each["kind"] == "drafted")
    call["rounds"] += [json.loads(json.dumps(drafted)) for _ in range(500)]
    took = []
    for _ in range(3):  # whatever else the machine does
        page = open_page(render(found))
        page.locator("#tree .node").first.wait_for()
        took.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        if took[-1] < 2000:
            break
    assert min(took) < 2000
    assert page.locator("#answer .chunk").count() > 500
