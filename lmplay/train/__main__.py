from lmplay.train.cli import run

run()
