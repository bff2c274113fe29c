"""What an experiment stacks with: every other idea on its baseline is merged with it as text."""

from lmplay.catalog.entries import entries, family_of, line_of, shared_ancestor
from lmplay.catalog.entry import Entry
from lmplay.catalog.merge import Conflict
from lmplay.catalog.stack import composed_tiny, merged_body
from lmplay.errors import UserError


def partners(entry: Entry) -> dict[str, str]:
    """The files of the other ideas on its baseline, each with what keeps the two from stacking.

    That is nothing, a kind of `Conflict`, or "values" where TINY would need two. What it was
    copied from, and what was copied from it, is no other idea. A baseline has no partners.
    """
    known = entries()
    if family_of(entry, known) is None:
        return {}
    baseline, line = baseline_of(entry, known), [one.path for one in line_of(entry)]
    found = {}
    for name, other in known.items():
        if name != other.file or family_of(other, known) is None or other.path in line:
            continue
        is_below = entry.path in [one.path for one in line_of(other)]
        if not is_below and baseline_of(other, known) == baseline:
            found[name] = collision(entry, other)
    return found


def baseline_of(entry: Entry, known: dict[str, Entry]) -> str:
    """The file of the nearest ancestor that belongs to no family, or else of the root."""
    line = line_of(entry)
    return next((one.file for one in line if family_of(one, known) is None), line[-1].file)


def collision(one: Entry, other: Entry) -> str:
    """What keeps two files of one root from stacking; nothing where they do."""
    base = shared_ancestor([line_of(one), line_of(other)])
    parts = [entry for entry in (one, other) if entry.path != base.path]
    try:
        merged_body(f"{one.name}+{other.name}", base, parts)
        composed_tiny(base, parts)
    except Conflict as conflict:
        return conflict.kind
    except SyntaxError:  # of a file that is listed, since its head is Python
        return "syntax"
    except UserError:
        return "values"
    return ""
