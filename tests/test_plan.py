import json
import os
import subprocess
import sys

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmplay import plan as plan_module
from lmplay.errors import BAD_INPUT, UserError
from lmplay.plan import Plan, has_key
from lmplay.plan_file import MOST_BYTES, plan_paths, plan_schema, read_plan
from lmplay.roots import bundled_root

LEAST = {
    "tokenizer": "byte",
    "sequence_length": 8,
    "batch_size": 2,
    "datasets": {"mine": {"files": ["a.txt"]}},
    "stages": [{"datasets": ["mine"]}],
    "optimizer": {"name": "AdamW", "lr": 1e-3, "options": {"betas": [0.9, 0.95]}},
    "validation": {"tokens": 100, "every_tokens": 1000},
    "checkpoints": {"every_tokens": 1000},
}

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def plans(tmp_path, monkeypatch):
    """The plans folder of an empty working directory; write(name, plan) puts a file there."""
    (tmp_path / "plans").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "plans"


def write(folder, name, plan):
    text = plan if isinstance(plan, str) else json.dumps(plan)
    (folder / f"{name}.json").write_text(text, encoding="utf-8")


def changed(path, value):
    """LEAST with the value at a path, a tuple of keys, replaced."""
    plan = json.loads(json.dumps(LEAST))
    *parents, last = path
    inner = plan
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return plan


def error_of(name, **kwargs):
    with pytest.raises(UserError) as caught:
        read_plan(name, **kwargs)
    assert caught.value.code == BAD_INPUT
    assert f"{caught.value.problem}{caught.value.hint}".isprintable()
    return caught.value


def places(value, path=()):
    """Every path into a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def test_a_plan_is_found_by_name_and_by_file(plans):
    write(plans, "mine", LEAST)

    assert read_plan("mine") == read_plan("plans/mine.json") == read_plan(str(plans / "mine.json"))
    assert read_plan("mine").name == "mine"


def test_a_folder_or_a_link_that_leads_nowhere_is_no_plan(plans):
    (plans / "folder.json").mkdir()
    (plans / "loop.json").symlink_to("loop.json")

    for name in ("folder", "loop"):
        assert name in plan_paths()
        with pytest.raises(UserError, match=rf"{name}\.json is no file"):
            read_plan(name)


def test_an_unknown_plan_names_the_nearest_one(plans):
    error = error_of("quik")

    assert "'quik'" in error.problem and "'quick'" in error.hint


@pytest.mark.parametrize(
    "path, nearest",
    [
        (("sequence_lenght",), "sequence_length"),
        (("extend",), "extends"),
        (("optimizer", "weigth_decay"), "weight_decay"),
        (("schedule", "warm_up"), "warmup"),
        (("stages", 0, "epocs"), "epochs"),
        (("datasets", "mine", "prompts"), "prompt"),
        (("validation", "every_token"), "every_tokens"),
        (("checkpoints", "keeps"), "keep"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_known_one(plans, path, nearest):
    plan = changed(("schedule",), {})
    inner = plan
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = 1
    write(plans, "mine", plan)

    error = error_of("mine")

    assert ".".join(map(str, path)) + " is an unknown key" in error.problem
    assert f"did you mean '{nearest}'?" in error.hint


def test_a_misspelt_key_is_reported_before_the_one_that_it_leaves_missing(plans):
    plan = {**LEAST, "tokeniser": "byte"}
    del plan["tokenizer"]
    write(plans, "mine", plan)

    assert "tokeniser" in error_of("mine").problem


@pytest.mark.parametrize(
    "path, value, where",
    [
        (("tokenizer",), 3, "tokenizer"),
        (("tokens",), 1.5, "tokens"),
        (("tokens",), "1e6", "tokens"),
        (("tokens",), True, "tokens"),
        (("batch_size",), 0, "batch_size"),
        (("batch_size",), 10**30, "batch_size"),
        (("batch_size",), [], "batch_size"),
        (("batch_size",), [[0, 8, 3]], "batch_size.0"),
        (("batch_size",), [[0, 8], [0.5, 0]], "batch_size.1.1"),
        (("batch_size",), [[0, 8], [1.5, 16]], "batch_size.1.0"),
        (("batch_size",), [[0.1, 8]], "batch_size"),
        (("sequence_length",), [[0, 8], [0.5, 16], [0.2, 32]], "sequence_length"),
        (("sequence_length",), [[0, 100], [0.5, 256]], "sequence_length"),
        (("clip",), 0, "clip"),
        (("freeze",), "blocks.*", "freeze"),
        (("freeze",), [0], "freeze.0"),
        (("precision",), "bfloat16", "precision"),
        (("schedule",), "cosine", "schedule"),
        (("schedule",), {"name": "cosin"}, "schedule.name"),
        (("schedule",), {"name": "wsd", "warmup": 0.9, "decay": 0.2}, "schedule"),
        (("model",), {"width": None}, "model.width"),
        (("model",), {"width": {}}, "model.width"),
        (("optimizer", "lr"), "6e-4", "optimizer.lr"),
        (("optimizer", "lr"), 0, "optimizer.lr"),
        (("optimizer", "options", "betas"), [0.9, "x"], "optimizer.options.betas.1"),
        (("optimizer", "options", "betas"), None, "optimizer.options.betas"),
        (("validation", "fraction"), 1, "validation.fraction"),
        (("stages",), [], "stages"),
        (("stages",), {}, "stages"),
        (("stages", 0), "mine", "stages.0"),
        (("stages", 0, "datasets"), "mine", "stages.0.datasets"),
        (("stages", 0, "datasets"), [3], "stages.0.datasets.0"),
        (("stages", 0, "datasets"), ["mine", "mine"], "stages.0"),
        (("stages", 0, "mixing"), "first", "stages.0.mixing"),
        (("stages", 0, "mixing"), [0.5, 0.5], "stages.0"),
        (("stages", 0, "mixing"), [0], "stages.0"),
        (("stages", 0, "mixing"), ["a"], "stages.0.mixing.0"),
        (("stages", 0, "epochs"), 0, "stages.0.epochs"),
        (("datasets",), [], "datasets"),
        (("datasets", "mine"), 3, "datasets.mine"),
        (("datasets", "mine"), {}, "datasets.mine"),
        (("datasets", "mine"), {"files": ["a"], "hub": "a/b"}, "datasets.mine"),
        (("datasets", "mine"), {"files": ["a"], "split": "test"}, "datasets.mine"),
        (("datasets", "mine"), {"files": ["a"], "truth": "b"}, "datasets.mine"),
        (("datasets", "mine"), {"files": ["a"], "text": ["b"], "messages": "c"}, "datasets.mine"),
    ],
)
def test_a_value_that_breaks_a_rule_is_named_with_its_path(plans, path, value, where):
    write(plans, "mine", changed(path, value))

    problem = error_of("mine").problem.removeprefix(f"{plans / 'mine.json'}: ")

    assert problem.startswith((f"{where} should be ", f"{where}: "))


def test_a_missing_key_is_named(plans):
    plan = changed(("optimizer",), {"name": "AdamW"})
    write(plans, "mine", plan)

    assert error_of("mine").problem.endswith("optimizer.lr is missing")


def test_whole_numbers_may_be_written_with_an_exponent_and_fractions_without_a_point(plans):
    write(plans, "mine", {**LEAST, "tokens": 1e6, "clip": 2})

    plan = read_plan("mine", changes={"optimizer.lr": 1, "validation.tokens": 2e3})

    assert (plan.tokens, plan.clip) == (1_000_000, 2.0)
    assert (plan.optimizer.lr, plan.validation.tokens) == (1.0, 2000)
    assert isinstance(plan.tokens, int) and isinstance(plan.validation.tokens, int)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["optimizer.lr", "clip", "model.width", "tokens"])
def test_a_number_that_is_not_finite_is_refused(plans, key, number):
    write(plans, "mine", LEAST)

    assert error_of("mine", changes={key: number}).problem.startswith(f"{key} should be ")


def test_batch_and_rows_may_ramp_over_the_tokens_of_the_run(plans):
    write(plans, "mine", {**LEAST, "batch_size": [[0, 8], [0.25, 32]]})
    plain = read_plan("mine", {"batch_size": 16, "sequence_length": 64})
    plan = read_plan("mine", {"sequence_length": [[0, 32], [0.5, 128.0], [0.75, 64]]})

    assert plan.batch_sizes == [(0, 8), (0.25, 32)] and plain.batch_sizes == [(0, 16)]
    assert plan.sequence_lengths == [(0, 32), (0.5, 128), (0.75, 64)]
    assert plan.max_len == 128 and plain.max_len == 64
    assert Plan.model_validate(json.loads(json.dumps(plan.model_dump()))) == plan
    assert jsonschema.Draft202012Validator(plan_schema()).is_valid(
        json.loads(plan.model_dump_json())
    )


def test_a_wrong_ramp_given_as_a_change_is_not_blamed_on_the_file(plans):
    write(plans, "mine", LEAST)
    error = error_of("mine", changes={"batch_size": [[0, 8], [0.5, "x"]]})

    assert error.problem.startswith("batch_size.1.1 should be")


def test_extends_merges_objects_and_replaces_all_else(plans):
    write(plans, "parent", LEAST)
    optimizer = {"lr": 0.5, "options": {"eps": 1e-6}}
    write(plans, "child", {"extends": "parent", "clip": None, "optimizer": optimizer})
    write(plans, "grandchild", {"extends": "child", "optimizer": {"options": {"betas": [0.5]}}})

    grandchild, parent = read_plan("grandchild"), read_plan("parent")

    assert grandchild.optimizer.options == {"betas": [0.5], "eps": 1e-6}
    assert (grandchild.optimizer.name, grandchild.optimizer.lr) == ("AdamW", 0.5)
    assert (grandchild.clip, parent.clip) == (None, 1.0)
    unchanged = set(Plan.model_fields) - {"name", "clip", "optimizer"}
    assert grandchild.model_dump(include=unchanged) == parent.model_dump(include=unchanged)


def test_a_file_to_extend_is_looked_for_beside_the_plan(plans, monkeypatch):
    write(plans, "parent", LEAST)
    write(plans, "child", {"extends": "./parent.json"})
    monkeypatch.chdir("/")

    assert read_plan(str(plans / "child.json")).tokenizer == "byte"


def test_files_too_may_have_a_held_out_split(plans):
    write(plans, "mine", changed(("datasets", "mine", "validation_split"), "dev"))

    assert read_plan("mine").datasets["mine"].validation_split == "dev"


@pytest.mark.parametrize("circle", [("a",), ("a", "b"), ("a", "b", "c")])
def test_a_circle_of_plans_is_refused(plans, circle):
    for name, parent in zip(circle, circle[1:] + circle[:1], strict=True):
        write(plans, name, {"extends": parent})

    problem = error_of("a").problem

    assert all(f"{name}.json" in problem for name in circle)


def test_a_plan_that_is_extended_may_be_missing_or_no_name_at_all(plans):
    write(plans, "a", {"extends": "quik"})
    write(plans, "b", {"extends": 3})

    assert "'quick'" in error_of("a").hint
    assert "not 3" in error_of("b").problem


def test_changes_come_last_and_make_the_objects_on_their_way(plans):
    write(plans, "mine", LEAST)

    plan = read_plan("mine", changes={"optimizer.lr": 0.25, "schedule.warmup": 0.1, "tokens": 64})

    assert (plan.optimizer.lr, plan.schedule.warmup, plan.tokens) == (0.25, 0.1, 64)


def test_a_wrong_change_is_not_blamed_on_the_file(plans):
    write(plans, "mine", LEAST)

    assert error_of("mine", changes={"optimizer.lrr": 1}).problem.startswith("optimizer.lrr is")
    assert error_of("mine", changes={"tokenizer.x": 1}).problem.startswith("tokenizer.x: ")


def test_data_takes_the_place_of_datasets_and_stages(plans):
    write(plans, "mine", LEAST)

    plan = read_plan("mine", data=["a.txt", "b.jsonl"])

    assert {name: d.files for name, d in plan.datasets.items()} == {"data": ["a.txt", "b.jsonl"]}
    assert [stage.datasets for stage in plan.stages] == [["data"]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (".", "here"),
        ("../here/", "here"),
        ("b/c.tar.gz", "c"),
        (".hidden.txt", "hidden"),
        ("/", "data"),
    ],
)
def test_a_plans_name_says_what_data_it_was_given(plans, tmp_path, monkeypatch, path, name):
    write(plans, "mine", LEAST)
    plan = plans / "mine.json"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert read_plan(str(plan), data=[path]).name == f"mine+{name}"


def test_a_change_may_name_a_key_of_a_dataset_also_of_a_shared_one(plans):
    write(plans, "_datasets", {"shared": {"hub": "a/b", "split": "all"}})
    write(plans, "mine", {**LEAST, "stages": [{"datasets": ["shared"]}]})
    columns = {"datasets.data.text": ["content"]}

    shared = read_plan("mine", {"datasets.shared.revision": "v1"}).datasets["shared"]
    own = read_plan("mine", columns, ["a.jsonl"]).datasets["data"]

    assert (shared.hub, shared.split, shared.revision) == ("a/b", "all", "v1")
    assert (own.files, own.text) == (["a.jsonl"], ["content"])
    assert "did you mean 'shared'?" in error_of("mine", changes={"datasets.shred.split": "a"}).hint
    wrong = error_of("mine", changes={"datasets.shared.split": 3})
    assert wrong.problem.startswith("datasets.shared.split should be")


def test_datasets_come_from_the_plan_then_beside_it_then_from_the_roots(plans, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write(plans, "_datasets", {"a": {"hub": "root/a"}, "b": {"hub": "root/b"}})
    write(elsewhere, "_datasets", {"a": {"hub": "beside/a"}, "c": {"hub": "beside/c"}})
    names = ["a", "b", "c", "wiki_en"]
    stages = [{"datasets": names}]
    own = {"c": {"hub": "own/c"}, "unused": {"hub": "own/unused"}}
    write(elsewhere, "mine", {**LEAST, "stages": stages, "datasets": own})

    plan = read_plan(str(elsewhere / "mine.json"))

    hubs = [plan.datasets[name].hub for name in names]
    assert hubs == ["beside/a", "root/b", "own/c", "wikimedia/wikipedia"]
    assert list(plan.datasets) == names


def test_an_unknown_dataset_names_the_nearest_one(plans):
    write(plans, "mine", changed(("stages", 0, "datasets"), ["wiki_eng"]))

    error = error_of("mine")

    assert "'wiki_eng'" in error.problem and "'wiki_en'" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        "{,}",
        '{"tokens": NaN}',
        '{"tokens": -Infinity}',
        '{"tokens": 1e400}',
        '{"tokens": 1' + "0" * 5000 + "}",
        '{"clip": 1, "clip": 2}',
        '{"\\ud800": 1}',
        '{"tokenizer": "\\ud800"}',
        '{"\\u001b[31m": 1}',
        '{"' + "k" * 100_000 + '": 1}',
        '{"tokenizer": ["' + "v" * 100_000 + '"]}',
        '{"model": {"x": ' * 400 + "1" + "}}" * 400,
        '{"extends": "deep", "a": ' + '{"a": ' * 900 + "1" + "}" * 901,
        "[" * 100_000,
        '{"stages": [{"datasets": [["a"], {"b": 1}, "../../x"]}]}',
        '{"extends": "../../../../etc/passwd"}',
        '{"extends": "/dev/zero"}',
        "\x00",
    ],
    ids=lambda text: text[:30],
)
def test_a_hostile_file_is_a_user_error(plans, text):
    write(plans, "deep", '{"a": ' * 900 + "1" + "}" * 900)
    write(plans, "mine", text)

    error = error_of("mine")

    assert len(error.problem) < 400 + 2 * len(str(plans))


def test_a_file_of_ten_megabytes_is_refused_unread(plans):
    write(plans, "mine", json.dumps({**LEAST, "description": "x" * 10_000_000}))

    assert f"at most {MOST_BYTES:,}" in error_of("mine").problem


def test_a_file_that_is_not_utf8_or_cannot_be_read_is_a_user_error(plans):
    (plans / "mine.json").write_bytes(json.dumps(LEAST).encode("utf-16"))
    (plans / "folder.json").mkdir()

    error_of("mine")
    error_of("folder")
    error_of("plans/folder.json")


def test_a_byte_order_mark_is_skipped(plans):
    write(plans, "mine", "\ufeff" + json.dumps(LEAST))

    assert read_plan("mine").tokenizer == "byte"


@pytest.mark.parametrize("name", ["", "..", "a\0b", "x" * 5000, "x" * 5000 + ".json", "plans/"])
def test_no_name_of_a_plan_can_do_more_than_fail(plans, name):
    error_of(name)


@pytest.mark.parametrize("stem", ["..", "."])
def test_a_file_whose_stem_would_leave_the_folder_of_runs_is_refused(plans, stem):
    write(plans, stem, LEAST)

    assert "no name for a plan" in error_of(f"plans/{stem}.json").problem


def test_names_of_datasets_are_never_paths(plans):
    write(plans, "mine", {**LEAST, "stages": [{"datasets": ["../plans/mine"]}]})

    assert "no dataset called '../plans/mine'" in error_of("mine").problem


@given(path=st.sampled_from(list(places(LEAST))), value=json_values)
@same_folder
def test_a_plan_with_any_value_in_any_place_is_read_or_refused(plans, path, value):
    write(plans, "mine", changed(path, value))

    try:
        plan = read_plan("mine")
    except UserError as error:
        assert f"{error.problem}{error.hint}".isprintable()
    else:
        write(plans, "mine", plan.model_dump_json())
        assert read_plan("mine") == plan


@given(
    lr=st.floats(1e-9, 10),
    tokens=st.none() | st.integers(1, 2**53 - 1),
    epochs=st.floats(0.001, 100),
    betas=st.lists(st.floats(0, 1), max_size=3),
    width=st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
)
@same_folder
def test_a_resolved_plan_reads_back_as_itself(plans, lr, tokens, epochs, betas, width):
    write(plans, "mine", LEAST)
    changes = {"optimizer.lr": lr, "tokens": tokens, "optimizer.options.betas": betas}
    stages = [{"datasets": ["mine"], "epochs": epochs, "mixing": [epochs]}]
    if width not in (float("inf"), -float("inf")):
        changes["model.width"] = width
    plan = read_plan("mine", changes={**changes, "stages": stages})

    write(plans, "mine", plan.model_dump_json())

    assert read_plan("mine") == plan


def test_the_schema_takes_resolved_plans_and_files_and_no_unknown_key():
    check = jsonschema.Draft202012Validator(plan_schema())
    for name, path in plan_paths().items():
        check.validate(json.loads(path.read_text()))
        check.validate(json.loads(read_plan(name).model_dump_json()))
    for path in places(LEAST):
        outside = changed(path, {"no_such_key": 1})
        free = path[-1] in ("model", "options", "datasets")
        assert check.is_valid(LEAST) and (free or not check.is_valid(outside))


def test_has_key_tells_what_a_dotted_path_can_mean():
    for key in ["tokens", "optimizer.lr", "optimizer.options.eps", "model.width", "stages"]:
        assert has_key(key), key
    for key in ["datasets", "datasets.mine.text", "datasets.wiki_en.revision"]:
        assert has_key(key), key
    for key in ["datasets.mine", "datasets.mine.txt", "datasets.mine.text.x", "datasets."]:
        assert not has_key(key), key
    for key in ["width", "", "name", "optimizer.lrr", "tokens.x", "stages.0", "lr", "extends"]:
        assert not has_key(key), key


def test_every_field_of_a_plan_says_what_it_is():
    for model in vars(plan_module).values():
        if isinstance(model, type) and issubclass(model, plan_module._Strict):
            for key, field in model.model_fields.items():
                is_object = plan_module.object_at(model, key) is not None
                is_obvious = is_object or key in ("description", "stages")
                assert field.description or is_obvious, f"{model.__name__}.{key}"


def test_reading_a_plan_loads_nothing_heavy():
    heavy = {"torch", "numpy", "accelerate", "datasets", "pandas", "matplotlib"}
    read = "from lmplay.plan_file import read_plan; read_plan('default')"
    code = f"import sys; {read}; print(*sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(bundled_root())}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)

    assert "lmplay.plan" in done.stdout, done.stderr
    assert not heavy & set(done.stdout.split())


def test_an_object_is_set_before_what_is_in_it(plans):
    whole = {"name": "SGD", "lr": 1.0, "weight_decay": 0.5}
    plan = read_plan("quick", {"optimizer.lr": 0.25, "optimizer": whole})

    assert (plan.optimizer.name, plan.optimizer.lr) == ("SGD", 0.25)
    assert plan.optimizer.weight_decay == 0.5 and plan.optimizer.options == {}
