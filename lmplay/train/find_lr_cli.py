"""lmp-trainer --find-lr: the range test, its figure, and the rate that it proposes."""

from typing import TYPE_CHECKING

from lmplay.console import note, out, print_json, show, table

if TYPE_CHECKING:
    from lmplay.run.request import Request


def print_rates(request: "Request", role: str | None, as_json: bool) -> None:
    """Print what a range test of the request's optimizer shows; a figure lies beside its runs."""
    from lmplay.optim.scaling import rates_times
    from lmplay.stats.range_plot import draw_range
    from lmplay.train.display import Display
    from lmplay.train.range_test import find_rate

    plan, of_role = request.plan, "" if role is None else f"_{role}"
    with Display(f"rates for {request.label} on {plan.name}") as display:
        test = find_rate(request, role, display)
    rates = rates_times(plan.optimizer, test.suggestion, role)
    lr = next(iter(rates.values())) / test.suggestion
    marks = {name: getattr(test, name) for name in ("steepest", "elbow", "divergence")}
    at = {name: None if factor is None else lr * factor for name, factor in marks.items()}
    whose = plan.optimizer.name if role is None else f"{plan.optimizer.name}, {role} alone"
    figure = request.folder.path.parent / f"find_lr{of_role}.png"
    draw_range(test, lr, f"{request.label} on {plan.name}: rates for {whose}", figure)
    settings = [f"{key}={value:.3g}" for key, value in rates.items()]
    if as_json:
        points = zip(test.factors, test.losses, test.smoothed, strict=True)
        return print_json(
            {
                "schema_version": 1,
                "experiment": request.label,
                "plan": plan.name,
                "optimizer": plan.optimizer.name,
                "role": role,
                "lr": lr,
                "suggestion": test.suggestion * lr,
                **at,
                "set": settings,
                "figure": str(figure),
                "points": [
                    {"lr": lr * factor, "loss": loss, "smoothed": smoothed}
                    for factor, loss, smoothed in points
                ],
            }
        )
    rows = [[name, "never" if rate is None else f"{rate:.3g}"] for name, rate in at.items()]
    rows += [["suggestion", f"{lr * test.suggestion:.3g}"], ["the plan's", f"{lr:.3g}"]]
    show(table(None, ["mark", "rate"], rows, right={"rate"}))
    out.print(f"try {' '.join(f'--set {setting}' for setting in settings)}", markup=False)
    note(f"look at it: {figure}")
    return None
