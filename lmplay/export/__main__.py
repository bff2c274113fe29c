from lmplay.export.cli import run

run()
