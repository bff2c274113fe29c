"""lmplay: the commands under one name."""

import typer

from lmplay.console import Version, run_app
from lmplay.export.cli import main as export
from lmplay.generate.cli import main as generate
from lmplay.stats.cli import main as plot
from lmplay.train.cli import main as train

_HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, context_settings=_HELP)
for _name, _command in {
    "train": train,
    "generate": generate,
    "plot": plot,
    "export": export,
}.items():
    app.command(_name, context_settings=_HELP)(_command)


@app.callback()
def main(version: Version = None) -> None:
    """A bench for language-model ideas.

    Example: lmplay train --exp ue --plan quick
    """


def run() -> None:
    """The console script."""
    run_app(app)
