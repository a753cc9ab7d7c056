"""The page in a real browser: opens without errors, runs nothing of the data, filters, and shows the stated colours.

`make test-browser` runs these; they need Debian's chromium and chromium-driver.
"""

import re
import shutil

import pytest

from qwen3vl_train.inspect.findings import CHECKS
from qwen3vl_train.inspect.page import write_page
from qwen3vl_train.inspect.recipe import inspect_recipe
from tests.helpers import finding_rows as rows
from tests.helpers.finding_rows import finding_rows_recipe
from tests.helpers.small_runs import picture, row, write_rows

pytestmark = pytest.mark.browser

# The colours that page.css states, light and dark.
TRAINED = {"light": "rgba(205, 227, 255, 1)", "dark": "rgba(22, 66, 115, 1)"}
VISUAL = {"light": "rgba(247, 227, 189, 1)", "dark": "rgba(74, 56, 19, 1)"}
NONE = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1000",
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(inspection, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(inspection, file)
    return file


@pytest.fixture
def page(browser, file):
    """A freshly opened page; at the end, nothing was written to the console and nothing was fetched."""
    browser.get(file.as_uri())
    yield browser
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []


@pytest.fixture
def grounded(browser, tiny_folder, tmp_path):
    """A freshly opened page of one row with a box and a point on each of two pictures, and one on neither."""
    picture(128, 64, 1).save(tmp_path / "a.png")
    picture(96, 160, 2).save(tmp_path / "b.png")
    line = {
        "image": ["a.png", "b.png"],
        "question": "<image><image>Where?",
        "answer": '[{"bbox_2d": <box>, "label": "cup"}, {"bbox_2d": <box>}] <point> <point> [1, 2, 3, 4]',
        "boxes": [{"box": [0, 0, 96, 80], "image": 1}, {"box": [32, 16, 96, 48], "image": 0}],
        "points": [{"point": [64, 32], "image": 0}, {"point": [48, 160], "image": 1}],
        "bbox": "pixel",
    }
    write_rows(tmp_path / "train.jsonl", [line])
    data = {"train": [{"path": str(tmp_path / "train.jsonl")}], "num_workers": 0}
    write_page(inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data)), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []


def find(page, selector):
    return page.find_elements("css selector", selector)


def shown(page, selector):
    return [element for element in find(page, selector) if element.is_displayed()]


def open_sample(page, line):
    page.execute_script("document.querySelectorAll('.sample').forEach((card) => { card.open = false; })")
    card = next(card for card in find(page, ".sample") if card.get_attribute("data-id") == f"train.jsonl:{line}")
    page.execute_script("arguments[0].open = true; arguments[0].scrollIntoView()", card)
    return card


def choose(page, control, value):
    page.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
        find(page, f"#{control}")[0],
        value,
    )


def test_opens_with_all_its_parts(page, inspection):
    facts = inspection.facts
    assert page.title == "Data of looked-at"
    assert len(shown(page, ".warning h3")) == len(facts.findings)
    assert len(shown(page, ".source")) == 3
    assert len(shown(page, ".chart svg")) == 3 * 5 + 2 - 1  # the source of text alone has no shapes of pictures
    assert len(shown(page, ".sample")) == len(inspection.samples) == 25
    assert "[object" not in page.find_element("tag name", "main").text
    bars = page.execute_script(
        "return [...document.querySelectorAll('.bar')].every((bar) => bar.getAttribute('height') >= 0)"
    )
    assert bars


def test_data_runs_nothing_and_is_shown_as_it_is(page):
    card = open_sample(page, rows.SCRIPT)
    tokens = card.find_element("class name", "tokens")
    assert rows.ATTACK in tokens.text.replace("\n", "")
    assert page.title == "Data of looked-at"
    assert find(page, "main script, main img[onerror], .tokens img") == []
    box = open_sample(page, rows.BOXES).find_element("css selector", ".mark text")
    assert box.get_attribute("textContent") == "<b>cup</b>"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_trained_and_untrained_tokens_have_their_colours(page, theme, inspection):
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    open_sample(page, rows.WEIGHTED)
    sample = next(one for one in inspection.samples if one["id"] == f"train.jsonl:{rows.WEIGHTED}")
    spans = find(page, ".sample[open] .tokens .token")
    assert len(spans) == len(sample["ids"])
    for place, span in enumerate(spans):
        colour = span.value_of_css_property("background-color")
        assert colour == (TRAINED[theme] if sample["weights"][place] else NONE), (place, span.text)
    underlined = [span.value_of_css_property("border-bottom-style") == "solid" for span in spans]
    assert underlined == [weight > 0 for weight in sample["weights"]]  # not by colour alone
    open_sample(page, rows.PLAIN)
    visual = find(page, ".sample[open] .tokens .visual")
    assert [span.value_of_css_property("background-color") for span in visual] == [VISUAL[theme]]
    legend = find(page, "#samples > .legend .trained")[0]
    assert legend.value_of_css_property("background-color") == TRAINED[theme]


def test_weights_other_than_one_are_written(page):
    open_sample(page, rows.WEIGHTED)
    marks = [span.get_attribute("data-weight") for span in find(page, ".sample[open] [data-weight]")]
    assert marks == ["×2.5"]


def test_filters(page):
    assert find(page, "#shown")[0].text == "25 of 25 samples"
    choose(page, "check", "boxes_pixel")
    assert [card.get_attribute("data-id") for card in shown(page, ".sample")] == [f"train.jsonl:{rows.PIXEL}"]
    assert [card.get_attribute("data-check") for card in shown(page, "article.warning")] == ["boxes_pixel"]
    choose(page, "check", "")
    source = next(card.get_attribute("data-source") for card in find(page, ".source") if "eval" in card.text)
    choose(page, "source", source)
    assert find(page, "#shown")[0].text == "2 of 25 samples"
    assert [card.get_attribute("data-source") for card in shown(page, ".source")] == [source]
    choose(page, "source", "")
    choose(page, "search", "HEAVY answer")
    assert [card.get_attribute("data-id") for card in shown(page, ".sample")] == [f"train.jsonl:{rows.WEIGHTED}"]
    choose(page, "search", "nowhere to be found")
    assert find(page, "#shown")[0].text == "0 of 25 samples"
    assert shown(page, "#none")


def test_button_of_a_warning_shows_its_samples(page):
    card = next(card for card in find(page, "article.warning") if card.get_attribute("data-check") == "empty_answer")
    card.find_element("tag name", "button").click()
    assert [one.get_attribute("data-id") for one in shown(page, ".sample[open]")] == [f"train.jsonl:{rows.EMPTY}"]
    assert shown(page, ".sample .tokens")


def test_badges_have_level_and_message_of_their_warning(page):
    badge = open_sample(page, rows.PIXEL).find_element("class name", "badge")
    assert badge.get_attribute("class").split() == ["badge", "error"]
    assert badge.get_attribute("title") == CHECKS["boxes_pixel"].message
    # One picture of twelve is no warning of the source.
    assert open_sample(page, rows.ENLARGED).find_element("class name", "badge").get_attribute("class") == "badge note"


def test_pointer_shows_positions(page, inspection):
    from selenium.webdriver import ActionChains

    sample = next(one for one in inspection.samples if one["id"] == f"train.jsonl:{rows.PLAIN}")
    card = open_sample(page, rows.PLAIN)
    view = card.find_element("class name", "view")
    # The middle of a grid of 2 x 4 tokens lies at the corner of four; 3 pixels on, it is row 2, column 3.
    ActionChains(page).move_to_element_with_offset(view, 3, 3).perform()
    place = sample["visual"][0][0] + 1 * 4 + 2
    t, h, w = (axis[place] for axis in sample["positions"])
    assert find(page, "#tip")[0].text.splitlines()[:3] == [
        "row 2, column 3",
        f"token {place}, id {sample['ids'][place]}",
        f"position (t, h, w) = ({t}, {h}, {w})",
    ]
    ActionChains(page).move_to_element(card.find_element("css selector", ".token.trained")).perform()
    assert find(page, "#tip")[0].text.splitlines()[-1] == "trained, weight 1"


def test_arrow_keys_step_through_tokens(page):
    card = open_sample(page, rows.PLAIN)
    tokens = card.find_element("class name", "tokens")
    tokens.send_keys("\ue014")  # right
    tokens.send_keys("\ue014")
    assert find(page, "#tip")[0].text.startswith("token 1,")
    tokens.send_keys("\ue012")  # left
    assert find(page, "#tip")[0].text.startswith("token 0,")


def lines(path):
    """The lines of an SVG path of M and H or V, as (direction, place)."""
    return {(kind, float(x if kind == "V" else y)) for x, y, kind in re.findall(r"M(\S+) (\S+)([HV])", path)}


def test_patches_and_tokens_are_drawn_apart(page):
    open_sample(page, rows.PLAIN)  # 128 x 64 pixels: 8 x 4 patches, 4 x 2 tokens, which are the unit of the drawing
    layers = find(page, ".sample[open] .grid")
    assert [layer.is_displayed() for layer in layers] == [True] * 4
    patches, tokens = (
        [layer for layer in layers if name in layer.get_attribute("class").split()] for name in ("patch", "token-edge")
    )
    wholes, halves = ({("V", x + add) for x in range(4)} | {("H", y + add) for y in range(2)} for add in (0, 0.5))
    for of, expected in ((tokens, wholes - {("V", 0), ("H", 0)}), (patches, halves)):
        assert [lines(layer.get_attribute("d")) for layer in of] == [expected] * 2  # dark and light
    dashes = [{layer.value_of_css_property("stroke-dasharray") for layer in of} for of in (patches, tokens)]
    assert dashes[1] == {"none"}
    assert "none" not in dashes[0]


def area(element):
    return [float(element.get_attribute(name)) for name in ("x", "y", "width", "height")]


def test_boxes_and_points_are_drawn_on_their_images(grounded):
    first, second = find(grounded, ".sample[open] .overlay")  # 4 x 2 and 3 x 5 tokens
    assert [area(box) for box in first.find_elements("css selector", ".box rect")] == [[1.0, 0.5, 2.0, 1.0]]
    assert [area(box) for box in second.find_elements("css selector", ".box rect")] == [[0.0, 0.0, 3.0, 2.5]]
    assert [text.get_attribute("textContent") for text in second.find_elements("css selector", ".mark text")] == ["cup"]
    places = [
        [float(point.get_attribute(name)) for name in ("cx", "cy")]
        for overlay in (first, second)
        for point in overlay.find_elements("css selector", ".point .heart")
    ]
    assert places == [[2.0, 1.0], [1.5, 5.0]]
    assert all(mark.is_displayed() for mark in find(grounded, ".sample[open] .mark"))
    assert "1 box or point is not drawn" in find(grounded, ".sample[open]")[0].text


def test_grid_and_marks_switch(grounded):
    grid, marks = find(grounded, ".sample[open] .grid"), find(grounded, ".sample[open] .mark")
    find(grounded, "#grid")[0].click()
    assert not any(line.is_displayed() for line in grid)
    assert all(mark.is_displayed() for mark in marks)
    find(grounded, "#marks")[0].click()
    assert not any(mark.is_displayed() for mark in marks)
    find(grounded, "#grid")[0].click()
    find(grounded, "#marks")[0].click()
    assert all(drawn.is_displayed() for drawn in grid + marks)


def test_page_without_a_usable_row(browser, tiny_folder, tmp_path):
    data = {"train": [{"path": str(write_rows(tmp_path / "train.jsonl", ["not json"]))}], "num_workers": 0}
    write_page(inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data)), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    assert [card.get_attribute("data-check") for card in shown(browser, "article.warning")] == ["rejects", "no_rows"]
    assert "not JSON" in shown(browser, ".rejects td:nth-child(2)")[0].text
    assert find(browser, "#shown")[0].text == "0 of 0 samples"
    assert "there is no pack" in find(browser, "#packs")[0].text
    assert browser.get_log("browser") == []


def test_sample_that_breaks_shows_its_fault(browser, tiny_folder, tmp_path):
    picture(256, 256, 0).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    data = {"train": [{"path": str(write_rows(tmp_path / "a.jsonl", [row("a", "b", ["cut.jpg"])]))}], "num_workers": 0}
    write_page(inspect_recipe(finding_rows_recipe(tiny_folder, tmp_path, data=data)), tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    card = find(browser, ".sample[open]")[0]
    assert "image cut.jpg: is truncated or damaged" in card.find_element("class name", "fault").text
    assert [badge.text for badge in card.find_elements("class name", "badge")] == ["undecodable"]
    assert browser.get_log("browser") == []


def test_pack_is_named_and_its_boundaries_are_drawn(page, inspection):
    pack = inspection.pack
    assert find(page, "#pack h3")[0].text.startswith(f"Pack {pack['number']} of {inspection.facts.packs.packs}")
    ends = [sequence["start"] + sequence["length"] for sequence in pack["sequences"]]
    assert [float(line.get_attribute("x1")) for line in find(page, "#pack .boundary")] == ends
    lengths = [length for sequence in pack["sequences"] for _, length in sequence["runs"]]
    assert [float(run.get_attribute("width")) for run in find(page, "#pack .run")] == lengths


def test_sources_are_listed_with_their_counts(page, inspection):
    table = [
        [cell.text for cell in line.find_elements("tag name", "td")]
        for line in find(page, "#sources > .scroll tbody tr")
    ]
    assert [line[0] for line in table] == [source.name for source in inspection.facts.sources]
    first = inspection.facts.sources[0]
    assert table[0][1:7] == ["training × 1", "openai", "1", *(str(first.rows), str(first.usable), str(first.rejected))]


@pytest.mark.parametrize("width", [1280, 390])
def test_fits_a_screen_and_a_phone(browser, file, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(file.as_uri())
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_theme_button(page):
    before = page.find_element("tag name", "body").value_of_css_property("background-color")
    find(page, "#theme")[0].click()
    assert page.find_element("tag name", "body").value_of_css_property("background-color") != before
