"""The page: the rows of the Markdown board, in one file that needs nothing else."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lmplay.run.design import design_of
from lmplay.stats.board import COLUMNS
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import judge
from lmplay.stats.page import page, write_page
from lmplay.stats.table import markdown, plain


class Cells(HTMLParser):
    """The cells of every row, and the attributes of every tag."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.fixture
def judged(make_run):
    def make(num_ideas=2):
        runs = []
        for number in range(num_ideas + 1):
            for seed in range(3):
                loss = 4 + 0.01 * seed - 0.1 * (number % 2) + 0.001 * number * seed
                label = "gpt2ish" if not number else f"idea{number}<b>"
                folder = make_run(
                    label, seed=seed, losses=[5.0] * 19 + [loss], design=design_of("3"),
                    command=["lmp-trainer", "--exp", "a&b"],
                )  # fmt: skip
                folder.experiment_py.write_text(f"x = {number}\n")
                runs.append(read_run(folder))
        pairs = pair_runs(runs, "gpt2ish")
        return judge(pairs), pairs

    return make


def test_the_page_has_the_rows_of_the_markdown_board(judged):
    rows, pairs = judged()
    lines = markdown(rows, COLUMNS).splitlines()[: len(rows) + 2]
    board = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in lines if "---" not in line]
    shown = Cells(page(rows, pairs)).rows

    assert [[plain(cell) for cell in row[:-1]] for row in shown] == [
        row + [""] * (len(shown[0]) - 1 - len(row)) for row in board
    ]


def test_nothing_is_loaded_from_elsewhere_and_no_name_is_read_as_html(judged):
    text = page(*judged())
    loads = {name for name, _ in Cells(text).attributes} & {"src", "href", "xlink:href", "action"}

    assert not loads and "url(" not in text and "http:" not in text and "https:" not in text
    assert "idea1<b>" not in text and "idea1&lt;b&gt;" in text and "a&amp;b" in text


def test_each_experiment_has_its_diff_its_command_and_its_curve(judged):
    text = page(*judged())

    assert text.count("<polyline") == 2 and text.count("-x = 0") == 2
    assert "lmp-trainer --exp &#x27;a&amp;b&#x27;" in text and "--seeds 3" in text


def test_it_looks_again_only_while_runs_are_to_come(judged):
    rows, pairs = judged()

    assert "refresh" in page(rows, pairs, is_running=True) and "refresh" not in page(rows, pairs)


def test_a_page_of_forty_ideas_is_smaller_than_a_megabyte(judged, tmp_path):
    write_page(tmp_path / "board.html", *judged(40))

    assert (tmp_path / "board.html").stat().st_size < 1_000_000


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no browser here")
def test_a_browser_shows_it(judged, tmp_path):
    write_page(tmp_path / "board.html", *judged())
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    command = [browser, "--headless", "--no-sandbox", "--dump-dom", str(tmp_path / "board.html")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True).stdout

    assert "better" in shown and "<polyline" in shown
