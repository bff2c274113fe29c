"""Every fault test at full length, then one table of what each measured: docs/reliability.md.

    make soak                    all of it: an hour or two on two cores
    make soak SOAK="kills disk"  only the tests whose names hold one of these words; "elsewhere"
                                 is those that lie outside this folder

A figure that is not measured again stays as it was; docs/reliability.json has them with their
values.
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

CHECKPOINT = "tests/run/test_checkpoint.py"
SESSION = "tests/train/test_session.py"
KINDS = "tests/data/test_preparation.py"
NONE = "does not apply: "
# the name of each fault, and the names under which its figures are kept, else the tests that hold
# it elsewhere in the suite, else why there is none
FAULTS: list[tuple[str, list[str] | str]] = [
    ("SIGKILL at every named place", ["kill_at_every_save_point"]),
    ("SIGKILL at random times", ["random_kill_soak"]),
    ("a cut after any part of any step", ["bitwise_resume_every_step"]),
    ("a cut of what was cut before", ["resume_of_resume"]),
    ("a cut of every optimizer", ["bitwise_resume_every_optimizer"]),
    ("a file of a checkpoint cut short", ["truncate_any_file"]),
    ("a flipped bit", ["bit_flip"]),
    ("a power cut at any call of a save", [f"{CHECKPOINT}::test_a_power_cut"]),
    ("a disk that is full or fails", ["disk_full"]),
    ("pruning", [f"{CHECKPOINT}::test_pruning"]),
    ("publishing in the background", NONE + "checkpoints are written before the next step"),
    ("SIGTERM in every phase", ["sigterm_every_phase"]),
    ("Ctrl-C once and twice", ["ctrl_c_once_twice"]),
    ("SIGUSR1", ["sigusr1_checkpoint"]),
    ("signals and processes of a grid", ["worker_signal_inheritance"]),
    ("validating more often", [f"{SESSION}::test_validating_and_saving_more_often"]),
    ("order under processes and micro-batches", ["order_invariance"]),
    ("two processes as one", ["two_processes_as_one", "bitwise_resume_of_two"]),
    ("2, 1, 2 processes", ["elastic_resume"]),
    (
        "gradients under micro-batches, short last parts",
        ["microbatch_gradient_equality_float64", "microbatch_gradient_equality_float32"],
    ),
    ("validation over processes", ["distributed_eval_exact"]),
    ("overflows of several optimizers", ["tests/train/test_update.py::test_"]),
    ("a number that is not finite", ["nan_injection"]),
    ("a spike of the loss", NONE + "no step is skipped or altered for its loss; rows show it"),
    ("rows of train.csv", ["metrics_file_integrity"]),
    ("the lock of a run", ["tests/run/test_lock.py::test_"]),
    ("preparing twice at once, or killed", [f"{KINDS}::test_killed_at", f"{KINDS}::test_a_second"]),
    ("a hub that fails or hangs", ["hub_flaky", "tests/test_network.py::test_"]),
    ("a tokenizer's host that never answers", ["tokenizer_blackhole"]),
    ("no network at all", ["fully_offline"]),
    (
        "hostile checkpoints and run folders",
        ["damaged_run_folders", f"{CHECKPOINT}::test_a_hostile", f"{CHECKPOINT}::test_a_pickle"],
    ),
    ("hostile plans", ["hostile_plan", "hostile_plan_trained"]),
    ("what changes under a run", ["changed_on_resume"]),
    ("compiled and not", [f"{SESSION}::test_a_compiled_run_has_the_same_names"]),
    ("tensors lost, added, tied", [f"{CHECKPOINT}::test_tied", "tests/run/test_run.py::test_"]),
    ("checkpoints of earlier formats", NONE + "no format has been released before this one"),
    ("the death of a process of a group", ["rank_death", "rank_hangs"]),
    ("20,000 steps", ["rss_and_file_growth"]),
    ("the time that saving takes", ["checkpoint_share"]),
    ("closed streams", ["tests/test_streams.py::test_"]),
    ("bad paths", ["bad_paths"]),
    ("a device that computes wrongly", ["tests/proofs/test_device.py::test_"]),
    ("too little memory", [f"{SESSION}::test_a_device_without_enough_memory"]),
    ("exit codes", ["exit_code_table"]),
    ("a clock that jumps", ["clock_jump"]),
]


ELSEWHERE = [
    name for _, names in FAULTS if isinstance(names, list) for name in names if "::" in name
]


def pytest(*args: str) -> subprocess.CompletedProcess:
    """Run it here, with everything at full length."""
    environ = os.environ | {"LMP_SOAK": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--timeout=7200", *args],
        cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE if "--co" in args else None,
    )  # fmt: skip


def run_elsewhere() -> int:
    """Run the tests that lie outside this folder, and keep how many of their cases hold."""
    files = sorted({name.partition("::")[0] for name in ELSEWHERE})
    found = [line for line in pytest("--co", *files).stdout.splitlines() if "::" in line]
    wanted = [line for line in found if line.startswith(tuple(ELSEWHERE))]
    report = ROOT / ".soak.xml"
    code = pytest(f"--junitxml={report}", *wanted).returncode
    known = json.loads(FIGURES.read_text())
    for name in ELSEWHERE:
        file, _, start = name.partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        cases = [
            case
            for case in ElementTree.parse(report).iter("testcase")
            if case.get("classname") == module and case.get("name").startswith(start)
        ]
        bad = sum(case.find(kind) is not None for case in cases for kind in ("failure", "error"))
        known[name] = {"figure": f"{len(cases) - bad} of {len(cases)} cases hold", "test": name}
    report.unlink()
    FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return code


def table() -> str:
    """The page: one row for each fault, in the order of FAULTS."""
    known = json.loads(FIGURES.read_text())
    rows = ["| fault | what was measured | tests |", "|---|---|---|"]
    for fault, names in FAULTS:
        if isinstance(names, str):
            rows.append(f"| {fault} | {names} | |")
            continue
        figures = [known[name]["figure"] for name in names if name in known]
        tests = [known[name]["test"] for name in names if name in known]
        files = sorted({test.partition("::")[0] for test in tests})
        shown = "; ".join(figures) or "not measured"
        rows.append(f"| {fault} | {shown} | {', '.join(f'`{file}`' for file in files)} |")
    return "\n".join(rows) + "\n"


def write_page() -> None:
    """Put the table into the page, between what people wrote."""
    when = datetime.now(UTC).date().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    made = f"<!-- table -->\nMade by `make soak` on {when} ({machine}).\n\n{table()}<!-- end -->"
    text = PAGE.read_text()
    PAGE.write_text(re.sub("<!-- table -->.*<!-- end -->", lambda _: made, text, flags=re.DOTALL))
    print(table())


if __name__ == "__main__":
    words = sys.argv[1:]
    code = pytest("tests/faults", *(["-k", " or ".join(words)] if words else [])).returncode
    if not words or "elsewhere" in words:
        code = run_elsewhere() or code
    write_page()
    sys.exit(code)
