"""The report in a real browser: filters, search, links, attacks, small screens, accessibility.

Needs Chromium on the PATH (Debian: apt-get install chromium), and is skipped without it.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import made_up
import pytest

from page import write
from page.problems import entries_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on the PATH")

write_report = write.write_report  # which `no_reports` replaces during a test
CYCLE = ["right", "arithmetic", "right", "reasoning", "format", "cut", "flexible", "right"]
NUM_PROBLEMS = 1319  # as many as GSM8K's test split has
HOSTILE = 17
PHONE = {"width": 320, "height": 640}
AT_FIRST = 200  # problems that are listed until all are asked for


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return made_up.rows_of((CYCLE * 165)[:NUM_PROBLEMS], hostile=HOSTILE)


@pytest.fixture(scope="module")
def one(rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with as many problems as GSM8K has."""
    return write_report([made_up.make_run(tmp_path_factory.mktemp("one") / "first", rows)])


@pytest.fixture(scope="module")
def two(rows: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs of 24 problems."""
    folder = tmp_path_factory.mktemp("two")
    others = made_up.rows_of(["right", *CYCLE * 3][:24], hostile=HOSTILE)
    made_up.make_run(folder / "first", rows[:24])
    made_up.make_run(folder / "second", others, learning_rate=1e-5)
    return write_report([folder / "first", folder / "second"])


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER)
        yield chromium
        chromium.close()


Opener = Callable[..., "playwright.Page"]


@pytest.fixture
def show(browser: "playwright.Browser") -> Iterator[Opener]:
    """Opens a report; at the end, checks that it asked for nothing and complained about nothing."""
    faults: list[str] = []
    contexts = []

    def open_page(file: Path, link: str = "", **options: object) -> "playwright.Page":
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        address = file.as_uri() + link
        page.on("request", lambda request: faults.append(request.url) if request.url.split("#")[0]
                != file.as_uri() else None)  # fmt: skip
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def shown(page: "playwright.Page") -> list[int]:
    """The ids of the problems in the list that are not hidden, in their order."""
    return page.eval_on_selector_all(
        "#list > li:not([hidden])", "all => all.map(one => Number(one.id.slice(8)))"
    )


def hits(page: "playwright.Page") -> str:
    return page.inner_text("#hits")


# ---------------------------------------------------------------- finding problems


@pytest.mark.parametrize("which", ["one", "two"])
def test_each_filter_finds_what_it_says(
    show: Opener, rows: list[dict], which: str, request: pytest.FixtureRequest
) -> None:
    page = show(request.getfixturevalue(which))
    others = made_up.rows_of(["right", *CYCLE * 3][:24], hostile=HOSTILE)
    entries = entries_of([rows] if which == "one" else [rows[:24], others])
    found = page.evaluate(
        """() => Array.from(document.forms[0].elements.show.options, (option) => {
            option.selected = true;
            option.parentElement.dispatchEvent(new Event("input", {bubbles: true}));
            const shown = Array.from(document.querySelectorAll("#list > li:not([hidden])"));
            return [option.value, option.textContent, location.hash,
                    document.getElementById("hits").textContent, shown.map((one) => one.id)];
        })"""
    )
    assert len(found) == (8 if which == "one" else 19)
    for tag, words, link, said, shown_ids in found[1:]:
        expected = [entry.number for entry in entries if tag in entry.tags]
        assert shown_ids == [f"problem-{number}" for number in expected[:AT_FIRST]], tag
        assert words.endswith(f"({len(expected)})") and link == f"#show={tag}"
        assert said == f"{len(expected)} of {len(entries):,} problems"
    page.get_by_text("Reset").click()
    playwright.expect(page.locator("#hits")).to_have_text(f"{len(entries):,} problems")
    assert len(shown(page)) == min(len(entries), AT_FIRST)
    playwright.expect(page).to_have_url(page.url.partition("#")[0])


def test_search_steps_and_order(show: Opener, one: Path, rows: list[dict]) -> None:
    page = show(one)
    page.locator("input[type=search]").fill("1310  SURELY k.")  # in the question and the completion
    assert shown(page) == [1310] and hits(page) == "1 of 1,319 problems"
    page.locator("input[type=search]").fill("<<1201+2=1213>>1213.")  # past "false: it is 1,203"
    assert shown(page) == [1201]
    page.locator("input[type=search]").fill("false:")
    assert shown(page) == []
    page.locator("input[type=search]").fill("no such words")
    assert shown(page) == [] and hits(page) == "0 of 1,319 problems"
    page.locator("input[type=search]").fill("kind r.")
    page.select_option("select[name=show]", "arithmetic")
    page.select_option("select[name=steps]", "2")
    page.select_option("select[name=sort]", "length")
    expected = [
        row
        for row in rows
        if "kind r." in row["question"] and row["label"] == "arithmetic" and row["steps"] == 2
    ]
    expected.sort(key=lambda row: (-row["num_tokens"], row["id"]))
    assert shown(page) == [row["id"] for row in expected] and len(expected) > 3
    page.select_option("select[name=sort]", "")
    assert shown(page) == sorted(shown(page))
    # The address finds the same again, in another window.
    again = show(one, page.evaluate("location.hash"))
    assert shown(again) == shown(page)
    assert again.locator("input[type=search]").input_value() == "kind r."


def test_all_are_listed_when_asked_for(show: Opener, one: Path, rows: list[dict]) -> None:
    page = show(one, "#show=right")
    expected = [row["id"] for row in rows if row["correct"]]
    assert shown(page) == expected[:AT_FIRST]
    page.locator("#more").click()
    assert shown(page) == expected and not page.locator("#more").is_visible()
    # The keyboard goes on where the list did.
    focused = page.evaluate("document.activeElement.closest('li').id")
    assert focused == f"problem-{expected[AT_FIRST]}"


def test_a_link_leads_to_a_problem(show: Opener, one: Path) -> None:
    page = show(one, "#problem-1201")
    problem = page.locator("#problem-1201")
    playwright.expect(problem.locator(".t")).to_be_in_viewport()
    # What the browser does with the address at the end of loading does not take the focus away.
    playwright.expect(problem.locator("summary")).to_be_focused()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('li').id") == "problem-1201"
    # Also from within the page, past a filter that hides it.
    page.select_option("select[name=show]", "cut")
    page.evaluate("location.hash = '#problem-16'")
    playwright.expect(page.locator("#problem-16 .t")).to_be_in_viewport()
    assert page.evaluate("location.hash") == "#problem-16" and len(shown(page)) == NUM_PROBLEMS
    assert not page.locator("#more").is_visible()
    page.locator("a[href='#show=reasoning']").click()
    playwright.expect(page).to_have_url(f"{one.as_uri()}#show=reasoning")
    assert shown(page)[:4] == [3, 11, HOSTILE, 19]
    playwright.expect(page.locator("#hits")).to_have_text("166 of 1,319 problems")
    playwright.expect(page.locator("#problems-title")).to_be_in_viewport()


def test_each_link_to_problems_finds_some(show: Opener, rows: list[dict], tmp_path: Path) -> None:
    """Guards against a link that says 0 and lists all, since there is no such filter."""
    for name in ("first", "second"):
        made_up.make_run(tmp_path / name, rows[:2] if name == "second" else rows[:1])
    page = show(write_report([tmp_path / "first"]))
    playwright.expect(page.locator("#hits")).to_have_text("1 problem")
    page = show(write_report([tmp_path / "first", tmp_path / "second"]))
    links = page.locator("main a[href^='#show=']")
    assert [link.get_attribute("href") for link in links.all()] == ["#show=second-arithmetic"]
    links.click()
    playwright.expect(page.locator("#hits")).to_have_text("1 of 2 problems")
    assert "Won 0, lost 0." in page.inner_text("#comparison")


def test_reset_after_a_link_to_a_problem(show: Opener, one: Path) -> None:
    """Guards against controls in their first state above a list that is still filtered."""
    page = show(one, "#show=cut")
    page.locator("#problem-5 summary").click()
    page.locator("#problem-5 .gold a").click()
    playwright.expect(page).to_have_url(f"{one.as_uri()}#problem-5")
    page.get_by_text("Reset").click()
    playwright.expect(page.locator("#hits")).to_have_text("1,319 problems")
    assert shown(page) == list(range(AT_FIRST)) and page.url == one.as_uri()


def test_the_way_back_leads_out_of_a_filter(show: Opener, one: Path) -> None:
    """Guards against an address without a filter above a list that is still filtered."""
    page = show(one)
    page.locator("#more").click()
    page.evaluate("location.hash = '#problem-900'")
    page.go_back()
    playwright.expect(page).to_have_url(one.as_uri())
    assert len(shown(page)) == NUM_PROBLEMS  # what is listed without a filter stays
    page.locator("a[href='#show=cut']").click()
    playwright.expect(page.locator("#hits")).to_have_text("165 of 1,319 problems")
    page.go_back()
    playwright.expect(page.locator("#hits")).to_have_text("1,319 problems")
    assert shown(page) == list(range(AT_FIRST))
    page.go_forward()
    playwright.expect(page.locator("#hits")).to_have_text("165 of 1,319 problems")


@pytest.mark.parametrize("link", ["#show=nonsense&sort=x&find=", "#problem-99999", "#=&&=%", "#a"])
def test_a_wrong_link_shows_all(show: Opener, one: Path, link: str) -> None:
    page = show(one, link)
    assert shown(page) == list(range(AT_FIRST))
    chosen = "Array.from(document.querySelectorAll('#filters select'), (one) => one.selectedIndex)"
    assert page.evaluate(chosen) == [0, 0, 0]


def test_all_problems_of_gsm8k_are_light(one: Path) -> None:
    """How fast they are shown and filtered is measured by benchmarks/report_page.py."""
    assert one.stat().st_size < 5e6


# ---------------------------------------------------------------- what it must not do


def test_nothing_that_a_model_wrote_acts(show: Opener, one: Path) -> None:
    """`show` has checked that nothing was asked for, and no dialog opened."""
    page = show(one, f"#problem-{HOSTILE}")
    problem = page.locator(f"#problem-{HOSTILE}")
    text = problem.locator(".t").inner_text()
    for part in ("<script>document.title='pwned'</script></script><img", "&lt;b&gt; {{ 7 * 7 }}"):
        assert part in text
    for point in ("U+202E", "U+001B", "U+D800", "U+200B"):
        assert point in text
    assert problem.locator("script, img, .t a, b b").count() == 0
    assert page.title() == "first: report"


def test_the_policy_stops_what_escaping_would_let_through(
    rows: list[dict], browser: "playwright.Browser", tmp_path: Path
) -> None:
    """Guards against a policy that is written but does not hold."""
    content = write_report([made_up.make_run(tmp_path / "run", rows[:1])]).read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(content.replace("<h1>", f"{made_up.HOSTILE[:-20]}<h1>".replace("\ud800", "")))
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(broken.as_uri())
    page.wait_for_timeout(100)
    assert page.title() == "run: report"
    assert any("Content Security Policy" in complaint for complaint in complaints)
    page.close()


# ---------------------------------------------------------------- for everyone


@pytest.mark.parametrize("which", ["one", "two"])
def test_a_phone_needs_no_sideways_scrolling(
    show: Opener, which: str, request: pytest.FixtureRequest
) -> None:
    page = show(request.getfixturevalue(which), f"#problem-{HOSTILE}", viewport=PHONE)
    page.locator("#settings summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.locator("input[type=search]").bounding_box()["width"] > 250


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 320)])
def test_it_is_accessible(show: Opener, two: Path, scheme: str, width: int) -> None:
    """The rules of axe: landmarks, names, contrast, headings, keyboard."""
    page = show(two, color_scheme=scheme, viewport={"width": width, "height": 900})
    for number in (1, 4, HOSTILE):
        page.locator(f"#problem-{number} summary").click()
    page.locator("#settings summary").click()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    # A hint inside a field, which axe does not look at, is as legible as the labels.
    colours = "[getComputedStyle(one).color, getComputedStyle(one.control, '::placeholder').color]"
    label, hint = page.eval_on_selector("label.find", f"one => {colours}")
    assert label == hint
    results = axe.Axe().run(page)
    found = [(rule["id"], rule["nodes"][0]["html"]) for rule in results.response["violations"]]
    assert found == []


def test_the_keyboard_is_enough(show: Opener, one: Path) -> None:
    page = show(one)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the problems"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.name") == "find"
    page.keyboard.type("707 kind f.")
    assert shown(page) == [707] and hits(page) == "1 of 1,319 problems"
    for _ in range(6):  # past the selects and buttons
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.parentElement.parentElement.id") == "problem-707"
    page.keyboard.press("Enter")
    assert page.locator("#problem-707 details").get_attribute("open") is not None


def test_without_scripts_all_is_there(show: Opener, two: Path) -> None:
    page = show(two, java_script_enabled=False)
    assert page.locator("#list > li").count() == 24 and not page.locator("#filters").is_visible()
    page.locator("#problem-3 summary").click()
    assert page.locator("#problem-3 .t").first.is_visible()


def test_on_paper_are_the_results_and_no_controls(show: Opener, one: Path) -> None:
    page = show(one, "#show=flexible", color_scheme="dark")
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible() and not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.locator("svg").first.is_visible()


def test_all_that_is_found_is_printed(show: Opener, one: Path, rows: list[dict]) -> None:
    """Guards against paper that lacks problems, and a page that is another after printing."""
    page = show(one, "#show=right")
    page.locator("#problem-0 summary").click()
    opened = "Array.from(document.querySelectorAll('#list > li:not([hidden]) > [open]'),\
        (one) => Number(one.parentElement.id.slice(8)))"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = {opened} }})")
    page.pdf()
    expected = [row["id"] for row in rows if row["correct"]]
    assert len(expected) > AT_FIRST and page.evaluate("window.printed") == expected
    assert shown(page) == expected[:AT_FIRST] and page.locator("#more").is_visible()
    assert page.evaluate(opened) == [0]


def test_opening_all_opens_what_is_shown(show: Opener, two: Path) -> None:
    page = show(two, "#show=won")
    page.get_by_text("Open all shown").click()
    opened = page.locator("details[open]").count()
    assert opened == len(shown(page)) > 0
