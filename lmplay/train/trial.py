"""A session that trains and writes nothing: what is timed or tried, and thrown away."""

from lmplay.data.batches import Data
from lmplay.machine import resolve_device, resolve_precision
from lmplay.model.experiment import Experiment
from lmplay.optim.averages import WeightAverages
from lmplay.optim.joint import optimizer_of
from lmplay.plan import Averages, Plan
from lmplay.run.accelerator import make_accelerator
from lmplay.run.request import Request
from lmplay.run.run import open_run, rows_at_once
from lmplay.train.clock import Clock
from lmplay.train.curves import Curves
from lmplay.train.loop import Session
from lmplay.train.signals import Signals
from lmplay.train.update import Update


def trial_session(
    request: Request, experiment: Experiment, plan: Plan, config: object, data: Data, clock: Clock
) -> Session:
    """A run of a request at its start, which validates and saves nothing.

    Args:
        plan, config: of the trial, whatever the request's are.
    """
    device = resolve_device(request.device)
    precision = resolve_precision(request.precision or plan.precision, device)
    accelerator = make_accelerator(device, precision)
    rows = request.mini_batch_size or rows_at_once(plan, device)
    compiled = bool(request.compiled)
    run = open_run(
        request.folder, plan, experiment, request.seed, config, accelerator, rows, compiled
    )
    run.may_shrink = request.mini_batch_size is None
    update = Update(run, optimizer_of(run, clock.num_steps), plan.clip)
    none = WeightAverages(Averages(), run.model)
    curves = Curves(run, None)
    return Session(run, data, clock, update, none, curves, None, Signals(), lambda *_: None, 0, 0)
