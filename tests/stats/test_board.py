import os
import shlex

import pytest

from lmplay.errors import UserError
from lmplay.stats.board import END, START, write_board
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import judge

COMMAND = ["/some/venv/bin/lmp-trainer", "--exp", "gpt2ish,ue", "--seeds", "2"]
VERSIONS = {"lmplay": "0.2.0", "torch": "2.13.0", "python": "3.11.7", "numpy": "2"}
FACTS = {
    "command": COMMAND,
    "git_commit": "abc123+",
    "versions": VERSIONS,
    "device_name": "a CPU",
    "threads": 2,
}


@pytest.fixture
def write(make_run):
    """Writes a board of a baseline and a worse idea, two seeds each, into a file."""

    def write_to(path, **facts):
        runs = [
            read_run(make_run(label, seed=seed, losses=[loss] * 20, **(FACTS | facts)))
            for label, loss in (("gpt2ish", 4.0), ("ue", 4.5))
            for seed in (0, 1)
        ]
        write_board(path, judge(pair_runs(runs, None)), {str(r.path): r.facts for r in runs})
        return path.read_text()

    return write_to


def test_a_missing_file_is_made_with_a_title_and_markers(write, tmp_path):
    text = write(tmp_path / "BOARD.md")

    assert text.startswith(f"# Board\n\n{START}\n")
    assert text.endswith(f"\n{END}\n")


def test_every_experiment_is_there_with_its_verdict_the_bad_ones_too(write, tmp_path):
    rows = [line for line in write(tmp_path / "BOARD.md").splitlines() if line.startswith("| ")]

    assert [row.split(" | ")[0] for row in rows[2:]] == ["| gpt2ish", "| ue"]
    assert "| worse | +0.5000 | [+0.5000, +0.5000] |" in rows[3]


def test_it_says_all_that_repeats_a_row(write, tmp_path):
    text = write(tmp_path / "BOARD.md")

    how = text.partition("### How to repeat")[2].partition("**gpt2ish, ue**")[2]
    assert "- seeds: 0, 1\n" in how
    assert "- commit: abc123+\n" in how
    assert "- versions: lmplay 0.2.0, torch 2.13.0, Python 3.11.7\n" in how
    assert "- data: a, validation b, tokenizer byte\n" in how
    assert "- machine: a CPU, threads 2\n" in how
    assert "```sh\nlmp-trainer --exp gpt2ish,ue --seeds 2\n```" in how
    assert "/some/venv" not in text


@pytest.mark.parametrize(
    "argv, shown",
    [
        (["/a/lmplay/train/__main__.py", "--exp", "ue"], "python -m lmplay.train --exp ue"),
        (["/lmplay/lmplay/__main__.py", "train"], "python -m lmplay train"),
        (["/elsewhere/__main__.py"], "__main__.py"),
        (["lmp-trainer", "--data", "a b", "$x"], "lmp-trainer --data 'a b' '$x'"),
        (["lmp-trainer", "--data", "```"], "lmp-trainer --data '```'"),
    ],
)
def test_a_command_can_be_pasted(write, tmp_path, argv, shown):
    text = write(tmp_path / "BOARD.md", command=argv)

    lines = text.splitlines()
    at = lines.index(shown)
    fence = lines[at - 1].removesuffix("sh")
    assert lines[at + 1] == fence and set(fence) == {"`"} and fence not in shown
    assert shlex.split(shown)[1:] == argv[1:] or "-m" in shown


def test_facts_that_differ_between_seeds_are_all_there(make_run, tmp_path):
    runs = [
        read_run(make_run(seed=seed, **(FACTS | {"git_commit": commit})))
        for seed, commit in enumerate(["abc", None, "abc"])
    ]

    write_board(
        tmp_path / "B.md", judge(pair_runs(runs, None)), {str(r.path): r.facts for r in runs}
    )

    assert "- commit: abc; unknown\n" in (tmp_path / "B.md").read_text()


def test_what_is_repeated_in_another_way_stands_apart(make_run, tmp_path):
    commits = {"gpt2ish": "abc", "ue": "def", "apos": "abc"}
    runs = [read_run(make_run(name, **FACTS | {"git_commit": c})) for name, c in commits.items()]

    write_board(
        tmp_path / "B.md", judge(pair_runs(runs, None)), {str(r.path): r.facts for r in runs}
    )

    how = (tmp_path / "B.md").read_text().partition("### How to repeat")[2]
    shared, own = how.partition("**ue**")[::2]
    assert shared.lstrip().startswith("**gpt2ish, apos**\n\n- seeds: 0\n")
    assert "- commit: abc\n" in shared and shared.count("- commit") == 1
    assert "- commit: def\n" in own and own.count("- commit") == 1


def test_each_plan_has_its_own_table(make_run, tmp_path):
    runs = [read_run(make_run(plan=plan, **FACTS)) for plan in ("quick", "a|b")]

    write_board(
        tmp_path / "B.md", judge(pair_runs(runs, None)), {str(r.path): r.facts for r in runs}
    )

    lines = (tmp_path / "B.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("## ")] == ["## Plan quick", "## Plan a\\|b"]


def test_what_stands_around_a_board_stays_byte_for_byte(write, tmp_path):
    path = tmp_path / "BOARD.md"
    before, after = (
        b"# Mine\r\n\xff\n<!-- x -->\n" + START.encode() + b"\n",
        END.encode() + b" \r\nend",
    )
    path.write_bytes(before + b"old\n" + after)
    path.chmod(0o640)

    write_board(path, [], {})

    data = path.read_bytes()
    assert data.startswith(before) and data.endswith(after) and b"old" not in data
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["BOARD.md"]


def test_writing_twice_gives_the_same_bytes(make_run, tmp_path):
    runs = [read_run(make_run(label, **FACTS)) for label in ("gpt2ish", "ue")]
    rows, facts = judge(pair_runs(runs, None)), {str(run.path): run.facts for run in runs}
    path = tmp_path / "BOARD.md"

    write_board(path, rows, facts)
    once = path.read_bytes()
    write_board(path, rows, facts)

    assert path.read_bytes() == once


@pytest.mark.parametrize(
    "text",
    [
        "# Mine\n",
        f"{START}\n",
        f"{END}\n{START}\n",
        f"{START}\n{END}\n{START}\n{END}\n",
        f"in a line {START} {END}\n",
        "",
    ],
)
def test_a_file_without_a_place_for_a_board_is_left_alone(tmp_path, text):
    path = tmp_path / "BOARD.md"
    path.write_text(text)

    with pytest.raises(UserError, match="no place for a board") as raised:
        write_board(path, [], {})

    assert START in raised.value.hint and END in raised.value.hint and raised.value.code == 2
    assert path.read_text() == text


@pytest.mark.parametrize("name", ["folder", "missing/BOARD.md"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()

    with pytest.raises(UserError, match=name):
        write_board(tmp_path / name, [], {})


def test_a_link_to_a_board_stays_a_link(tmp_path):
    (tmp_path / "real.md").write_text(f"{START}\n{END}\n")
    (tmp_path / "link.md").symlink_to("real.md")

    write_board(tmp_path / "link.md", [], {})

    assert (tmp_path / "link.md").is_symlink()
