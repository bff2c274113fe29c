import pytest
from rich.console import Console

from lmplay import console
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import judge
from lmplay.stats.table import cells_of, legend, markdown, plain, print_ladder, print_verdicts

ROW = {
    "plan": "quick", "experiment": "ue", "baseline": "gpt2ish", "seeds": 5, "mean": 3.9, "sd": 0.01,
    "bits_per_byte": 1.8, "accuracy": 0.3, "difference": -0.1, "interval": [-0.2, 0.0],
    "p": 0.02, "p_holm": 0.04, "verdict": "better", "next": None, "margin": None,
    "difference_sd": 0.05, "correlation": 0.9, "look": None, "rates": None, "sensitivity": None,
    "tokens_ratio": {"value": 0.8, "interval": [0.7, 0.9], "bound": ""}, "seconds_ratio": None,
    "tokens_per_second": 1234.5, "memory": 2**30, "trained": 3_405_952, "matmul": 2_000_000,
    "lookup": 999_999, "folded": None, "failures": 0, "unfinished": 0, "runs": [], "marks": [],
}  # fmt: skip
UNSURE = ROW | {"verdict": "cannot tell", "next": "--seed 5 --seeds 12"}


def test_a_row_has_what_a_reader_needs():
    cells = {title: column[0] for title, column in cells_of([ROW]).items()}

    assert cells == {
        "experiment": "ue",
        "seeds": "5",
        "loss": "3.9000 ± 0.0100",
        "difference": "-0.1000",
        "sd of diff": "0.0500",
        "pairs r": "0.90",
        "95 % interval": "[-0.2000, +0.0000]",
        "p (Holm)": "0.0400",
        "verdict": "better",
        "tokens x": "0.8 [0.7, 0.9]",
        "bits/byte": "1.8000",
        "tokens/s": "1,234",
        "memory": "1.00 GiB",
        "trained": "3.41 M",
        "matmul": "2 M",
        "look-up": "1 M",
    }


@pytest.mark.parametrize(
    "changed, title, cell",
    [
        ({"p_holm": 1e-9}, "p (Holm)", "<0.0001"),
        ({"experiment": "gpt2ish", "difference": None}, "difference", "baseline"),
        ({"verdict": "equal within 0.01"}, "verdict", "equal within 0.01"),
        ({"next": "--seed 5 --seeds 12"}, "next", "--seed 5 --seeds 12"),
        ({"sensitivity": 0.12}, "sensitivity", "0.1200"),
        ({"seconds_ratio": {"value": 1.0, "interval": None, "bound": ">="}}, "seconds x", ">=1"),
        ({"marks": ["not finished: seed 1", "2 of 5 runs failed"]}, "notes",
         "not finished: seed 1; 2 of 5 runs failed"),
    ],
)  # fmt: skip
def test_a_cell_says_it_in_short(changed, title, cell):
    assert cells_of([ROW | changed])[title] == [cell]


def test_the_legend_explains_only_the_signs_that_are_there():
    bound = ROW | {"tokens_ratio": {"value": 0.8, "interval": None, "bound": "<="}}

    assert [sign for sign, _ in legend([ROW], ["tokens x"])] == ["x"]
    assert [sign for sign, _ in legend([ROW, bound], ["tokens x"])] == ["x", "<="]
    assert [sign for sign, _ in legend([bound, UNSURE], ["next"])] == ["next"]


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_no_line_is_longer_than_the_terminal_and_the_verdict_never_goes(width, monkeypatch, capsys):
    monkeypatch.setattr(console, "out", Console(force_terminal=True, width=width, no_color=True))
    odd = ROW | {"experiment": "a+long_name+of_a_stack,lr=0.001", "marks": ["said once"]}

    print_verdicts([ROW, UNSURE, odd, odd | {"verdict": "worse"}])

    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    for word in ("better", "worse", "cannot tell", "--seed 5 --seeds 12", "difference"):
        assert word in out
    assert out.count("said once") == (2 if width == 300 else 1)
    assert ("no room for" in err) == (width < 300)
    assert out.count("what it took") == ("tokens x" in out)


def test_each_plan_has_a_table_and_marks_are_numbered_through(monkeypatch, capsys):
    monkeypatch.setattr(console, "out", Console(force_terminal=True, width=70, no_color=True))

    print_verdicts(
        [ROW | {"marks": ["one", "two"]}, ROW | {"plan": "other", "marks": ["two", "three"]}]
    )

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-2:] for line in lines if line[:1] == ["ue"]] == [["1", "2"], ["2", "3"]]
    assert [line for line in lines if line[:1] in (["1"], ["2"], ["3"])] == [
        ["1", "one"],
        ["2", "two"],
        ["3", "three"],
    ]


def test_markdown_keeps_a_pipe_within_its_cell():
    text = markdown([ROW | {"experiment": "a|b", "marks": ["x <y>"]}], ["experiment", "notes"])

    assert text == "| experiment | notes |\n| --- | --- |\n| a\\|b | x \\<y\\> |\n"


def test_markdown_has_every_column_and_the_legend():
    lines = markdown([ROW, UNSURE]).splitlines()

    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[4] == "" and lines[5].startswith("- next: ")


@pytest.mark.parametrize("text", ["`a`", "<!-- b -->", "a\nb", "*a*", "\\|", "~~a~~"])
def test_text_stays_text_in_markdown(text):
    shown = plain(text)

    assert "\n" not in shown
    for sign in "`<>*|~":
        assert shown.count(sign) == shown.count(f"\\{sign}") == text.count(sign)


def test_runs_that_are_not_compared_are_rows_too(make_run, capsys):
    runs = [read_run(make_run()), read_run(make_run("odd", data={"fingerprint": "z"}))]

    print_verdicts(judge(pair_runs(runs, None)))

    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("odd") and lines[-1].endswith("not compared: other training data")


def test_a_ladder_says_the_worth_at_each_size_and_whether_it_grows(capsys):
    rung = {"size": 0.5, "flops": 1e12, "worth": 1.234, "interval": [1.1, 1.4]}
    rungs = [rung | {"worth_in_seconds": 1.5}, rung | {"size": 1, "worth_in_seconds": None}]
    trend = {"0.5": "grows", "1": "grows", "1.5": "cannot tell"}
    row = {"plan": "quick", "experiment": "ue", "sizes": rungs, "trend": trend, "floor": 1.3}

    print_ladder([row, row | {"experiment": "odd", "sizes": []}])
    out, err = capsys.readouterr()

    assert (
        "[1.10, 1.40]        1.50  floor x 0.5: grows" in out and "floor x 1.5: cannot tell" in out
    )
    assert out.count("floor x 1:") == 1 and "odd: no law fits the baseline" in err
