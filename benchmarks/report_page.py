"""A report in headless Chromium: how long it takes to show and to filter, or a picture of it.

python benchmarks/report_page.py --report demo/run/report.html
python benchmarks/report_page.py --report demo/run/report.html --picture docs/report.png

Needs Chromium on the PATH (Debian: apt-get install chromium). A time ends with the layout that
follows the change; each is the median, with the range, of --rounds rounds.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from run.errors import UserError
from run.script import run_script

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1280, 900  # of the window, in pixels
PICTURED = 1500  # pixels of the page, from its top
# What is set, and the values that take turns.
CONTROLS = {
    "filter": ("show", ("wrong", "")),
    "search": ("find", ("how many", "boxes", "")),
    "sort": ("sort", ("steps", "length", "")),
}
SET = """([name, value]) => {
    const control = document.forms[0].elements[name];
    const start = performance.now();
    control.value = value;
    if (control.value !== value) throw new Error(`${name} has no value ${value}`);
    control.dispatchEvent(new Event("input", {bubbles: true}));
    document.body.getBoundingClientRect();
    return performance.now() - start;
}"""


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=Path, required=True, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it as a PNG instead")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("there is no Chromium on the PATH: install it, or name its folder in PATH")
    if not arguments.report.is_file():
        raise UserError(f"{arguments.report}: there is no such report: make one with report.py")
    address = arguments.report.resolve().as_uri()
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser)
        if arguments.picture:
            page = chromium.new_page(viewport={"width": WIDTH, "height": PICTURED})
            page.goto(address)
            page.screenshot(path=arguments.picture)
            print(f"picture: {arguments.picture}")
        else:
            page = chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            print(f"{arguments.report.stat().st_size / 1e6:.2f} MB")
            print_times("load", loading_times(page, address, arguments.rounds))
            for name, (control, values) in CONTROLS.items():
                rounds = [
                    [page.evaluate(SET, [control, value]) for value in values]
                    for _ in range(arguments.rounds)
                ]
                for value, times in zip(values, zip(*rounds, strict=True), strict=True):
                    print_times(f"{name} {value!r}", times)
        chromium.close()


def loading_times(page: Page, address: str, rounds: int) -> list[float]:
    """Milliseconds until a report is shown, each time anew."""
    times = []
    for _ in range(rounds):
        page.goto(address)
        times.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    return times


def print_times(name: str, milliseconds: Sequence[float]) -> None:
    median, low, high = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    print(f"{name:<20} {median:7.1f} ms  ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    run_script(main, read_arguments(sys.argv[1:]))
