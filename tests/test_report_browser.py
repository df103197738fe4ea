"""The HTML report in a real browser: the table's search and order, no overflow, no error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from report_page import NASTY, chromium, made_content, many_effects

from cradle_pyro.reporting.report import MOST_GENES, write_report

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="needs Chromium and its driver: apt install chromium-driver"
)

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage"
).split()
PAGE = 25


@contextmanager
def opened(profile) -> Iterator:
    """Give a browser with a profile of its own, closed afterwards."""
    from selenium import webdriver

    browser, driver = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    window = webdriver.Chrome(options=options, service=service)
    try:
        yield window
    finally:
        window.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page about 60 perturbations, of which one has a name that looks like markup."""
    effects = many_effects(60, 200)
    effects.obs_names = [NASTY, *effects.obs_names[1:]]
    content = dataclasses.replace(made_content(), effects=effects)
    return write_report(content, tmp_path_factory.mktemp("page") / "report.html")


def show(browser, path, *, width=1280, theme="light"):
    """Open the page anew in a window of this width and colour scheme."""
    # A page that scrolls smoothly moves away from under a click.
    media = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@pytest.fixture
def page(browser, path):
    show(browser, path)
    return browser


def found(page, selector):
    return page.find_element("css selector", selector)


def column(page, number):
    """Return the texts of a column of the table of effects, counted from one."""
    cells = f"#effects-table tbody tr > :nth-child({number})"
    return [cell.text for cell in page.find_elements("css selector", cells)]


def status(page):
    return found(page, "#status").text


def number(text):
    return float(text.replace("−", "-"))


def test_search_narrows_the_rows(page):
    assert status(page) == f"rows 1 to {PAGE} of {60 * MOST_GENES:,}"
    found(page, "#query").send_keys("p7 gene1")
    names = list(zip(column(page, 1), column(page, 2), strict=True))
    assert names
    assert all("P7" in label and "GENE1" in gene for label, gene in names)
    found(page, "#query").send_keys("no such gene")
    assert status(page) == "0 rows"
    assert "No row of this table fits" in column(page, 1)[0]


def test_one_perturbation_can_be_chosen_and_all_shown_again(page):
    from selenium.webdriver.support.ui import Select

    Select(found(page, "#perturbation")).select_by_visible_text(NASTY)
    assert set(column(page, 1)) == {f"{NASTY} †"}
    assert status(page).endswith(f"of {MOST_GENES}")
    found(page, "button[type=reset]").click()
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert status(page).endswith(f"of {60 * MOST_GENES:,}")


def test_only_called_effects_can_be_shown(page):
    assert "no" in page.execute_script(
        "return JSON.parse(document.getElementById('effects-data').textContent).rows"
        ".map((row) => row[6] ? 'yes' : 'no')"
    )
    found(page, "#called").click()
    assert set(column(page, 7)) == {"yes"}
    assert not status(page).endswith(f"of {60 * MOST_GENES:,}")


@pytest.mark.parametrize(("key", "place"), [("mean", 3), ("lfsr", 6), ("gene", 2)])
def test_headings_sort_both_ways(page, key, place):
    head = found(page, f"button[data-key={key}]")

    def values():
        texts = column(page, place)
        if key == "gene":
            return [int(text.removeprefix("GENE")) for text in texts]
        return [number(text.removeprefix("< ")) for text in texts]

    def direction():
        return head.find_element("xpath", "..").get_attribute("aria-sort")

    assert direction() == "none"
    orders = {}
    for _ in range(2):
        head.click()
        orders[direction()] = values()
    assert orders["ascending"] == sorted(orders["ascending"])
    assert orders["descending"] == sorted(orders["descending"], reverse=True)
    assert max(orders["descending"]) > min(orders["ascending"])
    others = page.find_elements("css selector", "#effects-table th[aria-sort=none]")
    assert len(others) == 4


def test_the_table_is_used_from_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    head = found(page, "button[data-key=mean]")
    page.execute_script("arguments[0].focus()", head)
    page.switch_to.active_element.send_keys(Keys.ENTER)
    means = [number(text) for text in column(page, 3)]
    assert means == sorted(means, reverse=True)
    assert min(means) > 0


def test_pages_turn(page):
    first = column(page, 2)
    found(page, "#next").click()
    assert status(page) == f"rows {PAGE + 1} to {2 * PAGE} of {60 * MOST_GENES:,}"
    assert column(page, 2) != first
    found(page, "#previous").click()
    assert column(page, 2) == first
    assert not found(page, "#previous").is_enabled()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 360])
def test_nothing_overflows_nothing_fails_nothing_is_loaded(browser, path, width, theme):
    browser.get_log("browser")
    show(browser, path, width=width, theme=theme)
    inside, outside, loaded, back = browser.execute_script(
        "const e = document.documentElement;"
        "return [e.scrollWidth, e.clientWidth, performance.getEntriesByType('resource').length,"
        " getComputedStyle(document.body).backgroundColor]"
    )
    assert inside <= outside <= width
    assert loaded == 0
    assert browser.get_log("browser") == []
    assert (back == "rgb(255, 255, 255)") == (theme == "light")


def test_every_figure_and_table_has_a_size(page):
    sizes = page.execute_script(
        "return [...document.querySelectorAll('figure svg, table')]"
        ".map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])"
    )
    assert len(sizes) > 20
    assert min(min(size) for size in sizes) > 30


def test_the_contents_fold_on_a_narrow_screen(browser, path):
    show(browser, path, width=390)
    assert found(browser, "#contents").get_attribute("open") is None
    found(browser, "#contents summary").click()
    found(browser, "#contents a[href='#effects']").click()
    assert found(browser, "#contents").get_attribute("open") is None
    assert browser.execute_script("return location.hash") == "#effects"
