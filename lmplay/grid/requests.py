"""What was asked for as a flat list of requests, each of which is one run."""

from dataclasses import replace

from lmplay.catalog.entry import Entry
from lmplay.grid.budget import sized
from lmplay.model.experiment import load_experiment
from lmplay.run.request import Request
from lmplay.train.display import Display
from lmplay.train.prepared import refuse_unknown_names, refuse_unproven


def expand(
    template: Request,
    entries: list[Entry],
    seeds: range,
    root: Entry,
    budget: str,
    display: Display,
) -> list[Request]:
    """A request for every experiment and seed: all experiments of one seed, then the next seed.

    Args:
        template: of any of them; the entry and the seed are replaced.
        root: the experiment whose budget the league gives to all.
        budget: the league: "tokens", "seconds" or "flops".
    Raises:
        UserError: an experiment fails the check, or two of them are the same.
    """
    of_first = []
    for entry in entries:
        experiment = load_experiment(entry)
        refuse_unproven(experiment)
        refuse_unknown_names(template, experiment)
        request = replace(template, entry=entry, seed=seeds[0])
        of_first.append(sized(request, replace(template, entry=root), budget, display))
    return [replace(first, seed=seed) for seed in seeds for first in of_first]
