"""The Hugging Face hub: the one place that calls `datasets`."""

import os
from collections.abc import Iterator
from itertools import islice

from lmplay.errors import UserError
from lmplay.network import bounded
from lmplay.plan import Dataset

_SECONDS = 60.0  # without one new row, all attempts together
_ROWS = 128  # read in one call
_HINT = (
    "check the network; set HF_TOKEN for a gated dataset, HF_ENDPOINT for a mirror, "
    "HF_HUB_OFFLINE=1 to use only what was downloaded; or use --data PATH, or --plan quick, "
    "which needs no network"
)
_OFFLINE_HINT = (
    "{variable} is set: unset it to download; or use --data PATH, or --plan quick, which needs no "
    "network"
)
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def open_hub(dataset: Dataset, split: str, skip: int) -> Iterator[dict]:
    """The rows of a hub dataset in its order, streamed."""
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    rows = datasets.load_dataset(
        dataset.hub, dataset.config, split=split, revision=dataset.revision, streaming=True
    )
    return iter(rows.skip(skip) if skip else rows)


def hub_rows(dataset: Dataset, split: str, skip: int) -> Iterator[dict]:
    """Rows from `skip` on; after a failure the source is opened again where it broke off."""
    rows, done = None, 0

    def read() -> list[dict]:
        nonlocal rows
        source, rows = rows, None  # a source that fails or hangs is not used again
        if source is None:
            source = open_hub(dataset, split, skip + done)
        batch = list(islice(source, _ROWS))
        rows = source
        return batch

    problem = f"cannot read {dataset.hub} ({split}) from the Hugging Face hub"
    offline = next((name for name in _OFFLINE if os.environ.get(name, "0") not in ("", "0")), None)
    hint = _OFFLINE_HINT.format(variable=offline) if offline else _HINT
    while True:
        try:
            batch = bounded(read, _SECONDS, problem, hint)
        except ValueError as error:  # an unknown configuration or split, with the known ones
            raise UserError(f"{problem}: {error}", "mend the dataset in the plan") from error
        if not batch:
            return
        yield from batch
        done += len(batch)
