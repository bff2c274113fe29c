import shutil

import pytest

from lmplay.run.folder import RunFolder
from lmplay.run.records import TRAIN_COLUMNS, VALIDATION_COLUMNS, Record


@pytest.fixture
def make_run(tmp_path, make_facts):
    """Writes a run's folder under tmp_path/runs; what is not said is a small finished run."""

    def make(
        label="gpt2ish",
        plan="quick",
        seed=0,
        done=None,
        losses=None,
        data=None,
        lr=0.001,
        schedule="constant",
        **facts,
    ):
        num_steps, tokens_per_step = facts.get("num_steps", 20), facts.get("tokens_per_step", 100)
        done = num_steps if done is None else done
        losses = losses or [5 - step / num_steps for step in range(1, done + 1)]
        folder = RunFolder(tmp_path / "runs" / plan / label / f"seed-{seed}")
        shutil.rmtree(folder.path, ignore_errors=True)  # it may be made again
        folder.write(
            make_facts(
                label=label,
                plan_name=plan,
                seed=seed,
                data=data,
                **{
                    "num_tokens": num_steps * tokens_per_step,
                    "status": "finished" if done == num_steps else "stopped",
                    "plan": {"optimizer": {"lr": lr}, "schedule": {"name": schedule}},
                    **facts,
                },
            )
        )
        rows = [
            {
                "step": step,
                "tokens": step * tokens_per_step,
                "loss": loss,
                "bits_per_byte": None if loss is None else loss / 2,
                "accuracy": None if loss is None else 1 / loss,
                "seconds": step * 0.5,
            }
            for step, loss in enumerate(losses, start=1)
        ]
        with Record(folder.train_csv, TRAIN_COLUMNS) as record:
            for row in rows:
                record.write(row)
        with Record(folder.validation_csv, VALIDATION_COLUMNS) as record:
            for row in rows[4::5]:
                record.write(row)
        return folder

    return make
