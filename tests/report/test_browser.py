"""The page in Chromium: what a reader can do with it, and that it stays quiet."""

import csv
import json
import shutil
import time

import pytest

from tests.report import hand_made
from warp_jax.evaluation import summary
from warp_jax.report import compared, data, page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (apt-get install chromium chromium-driver)"
)
NUMBERS = summary.summarise(hand_made.SETTINGS, hand_made.points())
OPTIONS = (
    "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync"
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS.split():
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    workdir = hand_made.write(tmp_path_factory.mktemp("first") / "first")
    results = data.make_results(hand_made.SETTINGS, workdir, hand_made.points(), NUMBERS)
    return data.gather(results, hand_made.held_out(), hand_made.PROGRESS)


@pytest.fixture(scope="module")
def opened(browser, gathered, tmp_path_factory):
    """The page of two workdirs. The second is not finished: it has SFT and one run."""
    folder = tmp_path_factory.mktemp("page")
    results = data.make_results(hand_made.SETTINGS, folder / "<b>second", hand_made.points()[:2])
    parts = [{"part": "iteration_1/run_2", "state": "running, step 3 of 5"}]
    state = {"finished": False, "steps": [8, 20], "left": "about 3.0 min left", "parts": parts}
    second = data.gather(results, "no prompts", hand_made.PROGRESS | state)
    other = hand_made.SETTINGS.replace({"warp.ema_rate": 0.3})
    tables = compared.tables([], {"first": hand_made.SETTINGS, "<b>second": other})
    (folder / "report.html").write_text(page.render([gathered, second], tables))
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    browser.get(f"file://{folder / 'report.html'}")
    wait(lambda: browser.execute_script("return 'ready' in document.body.dataset"), browser)
    return browser, folder


def wait(is_true, browser=None):
    end = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < end, browser and browser.get_log("browser")
        time.sleep(0.05)


def text(browser, selector):
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def choose(browser, name, value):
    """Set an input or a select, as a hand would."""
    script = """const [node, value] = [document.getElementById(arguments[0]), arguments[1]];
    node.value = value; for (const event of ["input", "change"]) node.dispatchEvent(new Event(event));"""
    browser.execute_script(script, name, str(value))


def test_the_eta_slider_changes_the_answers(opened):
    """Fails when the slider shows the answers or rewards of another eta or iteration, or a text runs as HTML."""
    browser, _ = opened
    for iteration, position, start, reward in ((2, 0, "s0e0", 0), (2, 1, "l2e0.5", 1.5), (1, 2, "l1e1", 1.5)):
        choose(browser, "answers-front", iteration)
        choose(browser, "eta", position)
        answers = text(browser, "#answers-list").split("\n")
        assert f"q0{hand_made.ATTACK} {start}p0{hand_made.ATTACK}" in answers
        assert f"q19 {start}p19" in answers
        assert sum(f"reward {reward + 1.9:g} (SFT 1.9)" in answer for answer in answers) == 1
    assert browser.execute_script("return window.hacked") is None


def test_the_slider_moves_by_the_keyboard(opened):
    """Fails when the slider is no native input, or keys leave the answers as they are."""
    from selenium.webdriver.common.keys import Keys

    browser, _ = opened
    choose(browser, "answers-front", 2)
    slider = browser.find_element("id", "eta")
    slider.send_keys(Keys.ARROW_LEFT)
    assert text(browser, "#eta-value") == "0.5"
    assert "l2e0.5p19" in text(browser, "#answers-list")
    assert slider.get_attribute("aria-valuetext") == "0.5"


def test_the_budget_names_the_best_eta(opened, gathered):
    """Fails when the page names another eta than summary.json for the budget of the config, or does not follow."""
    browser, _ = opened
    rows = gathered["budgets"]["2"]
    (given,) = [i for i, row in enumerate(rows) if row["budget"] == 5.0]
    assert browser.execute_script("return Number(document.getElementById('budget-range').value)") == given
    for position, want in ((given, rows[given]), (len(rows) - 1, rows[-1])):
        choose(browser, "budget-range", position)
        found = text(browser, "#budget-best")
        assert f"Best eta: {want['eta']:g}, with reward {want['reward']:.4g} at {want['sft_kl']:.4g} nats" in found
        assert f"probability {want['probability_within_budget']:.2f}" in found
    choose(browser, "budget-range", 0)
    assert text(browser, "#budget-best") == "No eta of the front is within this budget."


def test_a_click_on_a_header_sorts(opened):
    """Fails when numbers are sorted as texts, empty cells are not last, or a second click does not reverse."""
    browser, _ = opened
    script = """const heads = [...document.querySelectorAll("#rows th")];
    const column = heads.findIndex((head) => head.textContent === arguments[0]);
    heads[column].querySelector("button").click();
    const cells = [...document.querySelectorAll(`#rows td:nth-child(${column + 1})`)].map((cell) => cell.textContent);
    return [heads[column].getAttribute("aria-sort"), cells];"""
    for order, sign in (("ascending", 1), ("descending", -1)):
        state, cells = browser.execute_script(script, "sft_kl")
        numbers = [float(cell) * sign for cell in cells]
        assert (state, numbers) == (order, sorted(numbers))
    for filled in (["0", "0.5", "0.5", "1", "1"], ["1", "1", "0.5", "0.5", "0"]):
        assert browser.execute_script(script, "eta")[1] == [*filled, *[""] * 6]


def test_the_csv_holds_all_rows(opened, gathered):
    """Fails when a row, a column or the command of a point is not in the file, or a sorted table changes it."""
    browser, folder = opened
    browser.execute_script("document.getElementById('csv').click()")
    wait((folder / "first_front.csv").exists)
    with (folder / "first_front.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, want in zip(rows, gathered["rows"], strict=True):
        assert row.keys() == want.keys()
        assert float(row["reward"]) == want["reward"]
        assert row["export"] == (want["export"] or "")


def test_a_point_shows_its_numbers_and_command(opened, gathered):
    """Fails when the panel or the hover text of a point is that of another point."""
    browser, _ = opened
    for number, row in enumerate(gathered["rows"]):
        choose(browser, "point", number)
        assert text(browser, "#command") == (row["export"] or text(browser, "#command"))
        assert f"{row['gold_reward']:.4g}" in text(browser, "#point-numbers")
    script = (
        "return document.getElementById('front-chart').data.map((one) => [one.name, one.x, one.text, one.customdata])"
    )
    traces = {name: rest for name, *rest in browser.execute_script(script)}
    kls, hovers, data_ = traces["first: front of iteration 2"]
    assert kls == [gathered["rows"][place]["sft_kl"] for _, place in data_]
    assert "--stage=liti:0.5" in hovers[1]
    assert "&lt;b>second: runs of iteration 1" in traces


def test_a_click_on_a_point_chooses_it(opened, gathered):
    """Fails when the panel stays at the point before, or shows a neighbour."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser, _ = opened
    choose(browser, "point", 0)
    browser.execute_script("document.getElementById('front').scrollIntoView()")
    point = browser.find_elements("css selector", "#front-chart .scatterlayer .trace:nth-child(4) .point")[2]
    ActionChains(browser).move_to_element(point).click().perform()
    wait(lambda: "--stage=liti:1 " in text(browser, "#command"))
    assert text(browser, "#point-numbers").startswith("reward")


def test_another_workdir_is_shown(opened):
    """Fails when the page of an unfinished job does not say what is left, or parts of another workdir stay."""
    browser, _ = opened
    assert "warp.ema_rate" in text(browser, "#compared")
    choose(browser, "work", 1)
    assert "8 of 20 training steps are done (40 %); about 3.0 min left" in text(browser, "#progress")
    assert "iteration_1/run_2\trunning, step 3 of 5" in text(browser, "#parts")
    assert text(browser, "#answers").endswith("no prompts")
    hidden = "return [...document.querySelectorAll('section[hidden]')].map((one) => one.id)"
    assert browser.execute_script(hidden) == ["budget", "comparisons"]
    choose(browser, "work", 0)
    assert browser.execute_script(hidden) == ["progress"]


def test_it_fits_a_phone_and_paper(opened):
    """Fails when a phone must scroll sideways, or charts keep the width of the screen in print."""
    browser, _ = opened
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    wait(lambda: browser.execute_script("return document.querySelector('#gold-chart svg').clientWidth") < 390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    script = "dispatchEvent(new Event(arguments[0])); return document.querySelector('#front-chart svg').clientWidth"
    assert browser.execute_script(script, "beforeprint") == 680
    assert browser.execute_script(script, "afterprint") != 680


def test_it_is_quiet_and_loads_nothing(opened):
    """Fails when the page asks for an address, logs an error, or its policy lets a script do either."""
    browser, _ = opened
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in requests if one["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "blob", "data"}
    assert browser.get_log("browser") == []
    refused = """const done = arguments[arguments.length - 1];
    fetch("http://127.0.0.1:9/").then(() => done("loaded"), () => done("refused"));
    const script = document.createElement("script"); script.textContent = "window.hacked = 2";
    document.head.append(script);"""
    assert browser.execute_async_script(refused) == "refused"
    messages = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert messages.count("Content Security Policy") >= 2
    assert browser.execute_script("return window.hacked") is None
