from lmplay.cli import run

run()
