"""The demo page in a real browser, with the bundled model; skipped where there is no Chromium."""

import io
import re
import shutil

import pytest
from demo_app import load_app
from PIL import Image


pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
]

# A pass at a scale takes a moment; a busy machine takes more.
PATIENCE = 180_000


@pytest.fixture(scope="module")
def pipe():
    return load_app().load(load_app().default_model())


@pytest.fixture(scope="module")
def address(pipe):
    page = load_app().page(pipe, "demo")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address, tmp_path):
    """Opens the page in a session of its own; what it looks like at the end is kept."""
    pages = []

    def open_page():
        page = browser.new_page(viewport={"width": 1200, "height": 1100})
        page.set_default_timeout(PATIENCE)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector("#draw")
        pages.append(page)
        return page

    yield open_page
    for number, page in enumerate(pages):
        page.screenshot(path=tmp_path / f"page-{number}.png", full_page=True)
        page.close()


def status(page, key, pattern):
    """Wait for a line that says so, and return it."""
    place = page.locator(f"#{key}-status")
    playwright.expect(place).to_contain_text(re.compile(pattern), timeout=PATIENCE)
    return place.inner_text()


def picture(page, key):
    """The picture as the browser has it."""
    source = page.locator(f"#{key}-picture img").get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()


def test_a_picture_is_drawn_edited_and_enlarged(open_page, pipe):
    page = open_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.click("#draw")
    status(page, "draw", "Done after")
    drawn = picture(page, "draw")
    steps = page.locator("#draw-steps .thumbnail-item img")
    assert steps.count() == len(pipe.scheduler.scales)
    loaded = "[...document.querySelectorAll('#draw-steps img')].every(image => image.naturalWidth > 0)"
    page.wait_for_function(loaded)

    page.click("#to-editor")
    page.click("#to-enlarge")
    open_tab(page, "Edit")
    page.wait_for_timeout(2000)  # the editor fits its canvas to the picture
    canvas = page.locator("#editor canvas").first.bounding_box()
    middle = canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 100, middle[1], steps=10)
    page.mouse.up()
    for _ in range(20):  # what was painted reaches the page's own picture a moment later
        page.wait_for_timeout(500)
        page.click("#inpaint")
        if "Done after" in status(page, "edit", "Done after|Error"):
            break
    status(page, "edit", "Done after")
    edited = picture(page, "edit")
    assert edited.size == drawn.size
    width, height = drawn.size
    untouched = (0, 0, width, height // 4)
    assert edited.crop(untouched).tobytes() == drawn.crop(untouched).tobytes()
    assert edited.tobytes() != drawn.tobytes()

    page.click("#outpaint")
    width, height = (round(1.5 * side) for side in reversed(pipe.sample_size))
    status(page, "edit", f"Done after .* {width}×{height}")

    open_tab(page, "Enlarge")
    page.click("#enlarge")
    status(page, "enlarge", "Done after")
    assert not errors


def test_two_schedules_are_compared(open_page):
    page = open_page()
    open_tab(page, "Compare")
    page.click("text=The other schedule")
    page.get_by_label("simple").last.check()
    page.get_by_label("Further passes").last.fill("1")
    page.click("#compare")
    once = int(re.search(r"(\d+) passes", status(page, "left", "Done after"))[1])
    twice = int(re.search(r"(\d+) passes", status(page, "right", "Done after"))[1])
    assert twice == 2 * once
    assert picture(page, "left").tobytes() != picture(page, "right").tobytes()


def test_stop_ends_the_drawing_of_its_page_only(open_page):
    pages = [open_page(), open_page()]
    for page in pages:
        page.click("text=Schedule and refinement")
        page.get_by_label("simple").first.check()
        page.get_by_label("Further passes").first.fill("1000")
        page.click("#draw")
        status(page, "draw", "Drawing")
    pages[0].click("#stop")
    assert "Stopped after" in status(pages[0], "draw", "Stopped after")
    line = status(pages[1], "draw", "Drawing")
    playwright.expect(pages[1].locator("#draw-status")).not_to_have_text(line, timeout=PATIENCE)
    status(pages[1], "draw", "Drawing")
    pages[1].click("#stop")
    status(pages[1], "draw", "Stopped after")


def test_what_cannot_be_done_is_said(open_page):
    page = open_page()
    open_tab(page, "Edit")
    page.click("#inpaint")
    playwright.expect(page.locator(".toast-body")).to_contain_text("There is no picture yet", timeout=PATIENCE)
