"""What torch's compiler has done in this process."""

from lmplay.run.facts import Compilation


def compiled_so_far() -> Compilation:
    """Graphs made in this process, breaks between them, and seconds of compiling them."""
    from torch._dynamo import utils as dynamo  # here, not at the top: it takes a second to load

    seconds = dynamo.compile_times("csv", aggregate=True)
    spent = dict(zip(*seconds, strict=True)).get("_compile.compile_inner", "0")
    return Compilation(
        graphs=dynamo.counters["stats"]["unique_graphs"],
        breaks=sum(dynamo.counters["graph_break"].values()),
        seconds=float(spent),
    )
