from lmplay.stats.cli import run

run()
