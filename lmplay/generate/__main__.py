from lmplay.generate.cli import run

run()
