"""The page in a real browser: opens in silence, runs nothing of the data, filters, and shows the stated colours.

`make test-browser` runs these; they need Debian's chromium and chromium-driver.
"""

import shutil

import pytest
import tiny_hazards as rows

from qwen3vl_train.inspect.page import write_page

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
        "headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
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
    assert len(shown(page, ".warning h3")) == len(facts.hazards)
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
    box = open_sample(page, rows.BOXES).find_element("css selector", ".box text")
    assert box.get_attribute("textContent") == "<b>cup</b>"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_trained_and_untrained_tokens_have_the_stated_colours(page, theme, inspection):
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    open_sample(page, rows.WEIGHTED)
    sample = next(one for one in inspection.samples if one["id"] == f"train.jsonl:{rows.WEIGHTED}")
    spans = find(page, ".sample[open] .tokens .token")
    assert len(spans) == len(sample["ids"])
    for place, span in enumerate(spans):
        colour = span.value_of_css_property("background-color")
        assert colour == (TRAINED[theme] if sample["weights"][place] else NONE), (place, span.text)
    underlined = [span.value_of_css_property("border-bottom-style") == "solid" for span in spans]
    assert underlined == [weight > 0 for weight in sample["weights"]]  # not told by colour alone
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
    choose(page, "kind", "boxes_pixel")
    assert [card.get_attribute("data-id") for card in shown(page, ".sample")] == [f"train.jsonl:{rows.PIXEL}"]
    assert [card.get_attribute("data-kind") for card in shown(page, "article.warning")] == ["boxes_pixel"]
    choose(page, "kind", "")
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
    card = next(card for card in find(page, "article.warning") if card.get_attribute("data-kind") == "empty_answer")
    card.find_element("tag name", "button").click()
    assert [one.get_attribute("data-id") for one in shown(page, ".sample[open]")] == [f"train.jsonl:{rows.EMPTY}"]
    assert shown(page, ".sample .tokens")


def test_pointer_tells_positions(page, inspection):
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


def test_grid_and_boxes_switch(page):
    open_sample(page, rows.BOXES)
    grid, box = find(page, ".sample[open] .grid")[0], find(page, ".sample[open] .box")[0]
    assert (grid.value_of_css_property("display"), box.value_of_css_property("display")) == ("none", "inline")
    find(page, "#grid")[0].click()
    find(page, "#boxes")[0].click()
    assert (grid.value_of_css_property("display"), box.value_of_css_property("display")) == ("inline", "none")
    drawn = box.find_element("tag name", "rect")
    assert [float(drawn.get_attribute(name)) for name in ("x", "y", "width", "height")] == [0.4, 0.5, 2.0, 1.0]


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
