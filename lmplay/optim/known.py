"""Every optimizer that a plan can name, as data: what it is, what it takes, where it comes from."""

from dataclasses import dataclass, field, replace
from types import MappingProxyType

from lmplay.errors import UserError, nearest
from lmplay.plan import Optimizer

_FROM_LIBRARY = (
    "pytorch_optimizer", "lmplay.optim.soap", "lmplay.optim.schedule_free", "lmplay.optim.sophia",
    "lmplay.optim.kron", "lmplay.optim.prodigy", "lmplay.optim.scion",
)  # fmt: skip
EXTRA = 'pip install "lmplay[optimizers]"'
MATRIX = frozenset({"matrix"})
WITH_ROWS = frozenset({"matrix", "table", "head"})
REST = {"betas": [0.9, 0.95]}  # of AdamW, where it trains the roles that another does not take


@dataclass(frozen=True)
class KnownOptimizer:
    """An optimizer that a plan can name. Rates and decays are for 124 M parameters."""

    name: str
    summary: str
    paper: str  # arXiv number, or where else it is described
    state: str  # bytes for each parameter, in fp32
    lr: float  # where AdamW has 1e-3
    weight_decay: float = 0.0
    options: dict = field(default_factory=dict)  # what `--optimizer` gives it
    fixed: dict = field(default_factory=dict)  # arguments without which it is another one
    by_role: dict = field(default_factory=dict)  # further arguments for some roles
    source: str = "torch.optim"  # module that has it
    attribute: str = ""  # what it is called there, if not `name`
    takes: frozenset[str] | None = None  # roles that it trains; None for all
    rest: str = "AdamW"  # trains the other roles, where the plan names nothing else
    rest_lr: float = 1.0  # its rate, in rates of this one
    is_elementwise: bool = False  # it updates a slice of a weight as in the whole weight
    holds_weights: bool = False  # in a ball or an average: nothing else may move them
    lr_is_absolute: bool = False  # not to be scaled with the plan's rate
    steps_option: str = ""  # gets the number of steps of the run
    needs_names: bool = False  # of its parameters, for what their places in the model say
    local_gradients: bool = False  # each process's own, which nobody has averaged
    by_matrix: bool = False  # processes may share the work, each taking some whole matrices
    is_comparable: bool = True  # some gradients alone say what its steps are on any device

    @property
    def kind(self) -> type:
        """The class.

        Raises:
            UserError: it belongs to the extra `optimizers`, which is not installed.
        """
        from importlib import import_module

        try:
            return getattr(import_module(self.source), self.attribute or self.name)
        except ModuleNotFoundError as error:
            problem = f"optimizer {self.name} needs the package {error.name}"
            raise UserError(problem, hint=EXTRA) from None

    @property
    def package(self) -> str:
        """What has to be installed: torch, lmplay itself, or pytorch-optimizer."""
        if self.source in _FROM_LIBRARY:
            return "pytorch-optimizer"
        return "torch" if self.source == "torch.optim" else "lmplay"

    def takes_role(self, role: str) -> bool:
        """Whether it trains parameters of this role by itself."""
        return self.takes is None or role in self.takes


def _torch(name: str, summary: str, paper: str, state: str, lr: float, **more) -> KnownOptimizer:
    return KnownOptimizer(name, summary, paper, state, lr, is_elementwise=True, **more)


def _library(name: str, summary: str, paper: str, state: str, lr: float, **more) -> KnownOptimizer:
    more = {"source": "pytorch_optimizer", "is_elementwise": True, **more}
    return KnownOptimizer(name, summary, paper, state, lr, **more)


def _matrix(name: str, summary: str, paper: str, state: str, **more) -> KnownOptimizer:
    more = {"source": "lmplay.optim.muon", "by_matrix": True, **more}
    return KnownOptimizer(name, summary, paper, state, 1e-3, 0.1, takes=MATRIX, **more)


def _on_ball(name: str, summary: str, of: KnownOptimizer, lr: float) -> KnownOptimizer:
    """Another optimizer's steps, at a rate of its own; the rest is trained as AdamW would."""
    return replace(
        of, name=name, summary=summary, paper="2606.16899", lr=lr, fixed={"hyperball": True},
        attribute=of.name, takes=MATRIX, rest_lr=1e-3 / lr, is_elementwise=False,
    )  # fmt: skip


def _decaying(name: str, summary: str, paper: str, decay: str, **more) -> KnownOptimizer:
    fixed = {"decay": decay}
    return replace(
        _ADAMW, name=name, summary=summary, paper=paper, attribute="AdamW", fixed=fixed, **more
    )


_LMO = {"spectral": 2, "sign": 4, "bias": 5, "column": 6}  # numbers, for checkpoints hold no enums
_ADAMW = _torch("AdamW", "Adam whose decay is no gradient", "1711.05101", "8", 1e-3,
                weight_decay=0.1, options=REST)  # fmt: skip
_MUON = _matrix("Muon", "momentum made orthogonal", "2502.16982; Jordan et al. 2024", "4")
_SOAP = _library(
    "SOAP", "Adam in the eigenbasis of Shampoo", "2409.11321", "10 to 24", 3e-3,
    weight_decay=0.1, takes=MATRIX, is_elementwise=False, rest_lr=1 / 3, by_matrix=True,
    source="lmplay.optim.soap", options={"betas": [0.95, 0.95], "max_precondition_dim": 2048},
)  # fmt: skip
_ALL = [
    _torch("SGD", "the gradient, with momentum", "Robbins and Monro 1951", "4", 0.3,
           options={"momentum": 0.9}),
    _torch("Adagrad", "divided by the root of all squares so far", "JMLR 12 (2011)", "4", 1e-2),
    _torch("RMSprop", "divided by the root of recent squares", "Hinton 2012, lecture 6", "4", 3e-4),
    _torch("Adadelta", "RMSprop that finds its own unit", "1212.5701", "8", 1.0),
    _torch("Adam", "momentum over the root of recent squares", "1412.6980", "8", 1e-3,
           options=REST),
    _ADAMW,
    _decaying("AdamWIndependent", "AdamW whose decay does not know the rate", "2309.14322",
              "independent", weight_decay=1e-4),
    _decaying("AdamC", "AdamW whose decay falls with the rate's square", "2506.02285", "corrected"),
    _decaying("AdamCWD", "AdamW that decays where its step goes that way too", "2510.12402",
              "cautious"),
    replace(_ADAMW, name="CAdamW", summary="AdamW's steps where they go against the gradient",
            paper="2411.16085", attribute="AdamW", fixed={"cautious": True}, is_elementwise=False),
    _on_ball("AdamH", "AdamW on matrices that keep their length", _ADAMW, 0.014),
    _torch("Adamax", "Adam by the largest recent gradient", "1412.6980", "8", 2e-3),
    _torch("NAdam", "Adam with Nesterov's momentum", "Dozat 2016", "8", 1e-3, weight_decay=0.1,
           options={"betas": [0.9, 0.95], "decoupled_weight_decay": True}),
    _torch("RAdam", "Adam that waits for its variance", "1908.03265", "8", 1e-3, weight_decay=0.1,
           options={"betas": [0.9, 0.95], "decoupled_weight_decay": True}),
    _torch("ASGD", "SGD that keeps an average", "Polyak and Juditsky 1992", "4", 0.1),
    KnownOptimizer("Rprop", "by the gradient's sign alone", "Riedmiller and Braun 1993", "8", 1e-4),
    KnownOptimizer("Adafactor", "Adam's squares as rows times columns", "1804.04235", "0", 1e-2,
                   options={"eps": [1e-16, 1e-3]}),  # torch's own is not scale-free
    _MUON,
    _matrix("MuonPolar", "Muon by the rounds of Polar Express", "2505.16932", "4",
            attribute="Muon", fixed={"iteration": "polar_express"}),
    _on_ball("MuonH", "Muon on matrices that keep their length", _MUON, 0.018),
    _matrix("MuonPlus", "Muon whose rows and columns become of one length", "2602.21545", "4",
            source="lmplay.optim.muon_plus"),
    _matrix("TEON", "Muon on pairs of neighbouring layers", "2601.23261", "4",
            source="lmplay.optim.teon", needs_names=True, by_matrix=False),
    _matrix("RMNP", "momentum whose rows become of one length", "2603.20527", "4",
            source="lmplay.optim.rmnp"),
    _matrix("KMaxwell", "Muon on averages of several ages", "modded-nanogpt 359", "24",
            source="lmplay.optim.k_maxwell"),
    _matrix("NorMuon", "Muon whose rows are of one size", "2510.05491", "4"),
    _matrix("AdaMuon", "Muon over the root of its recent squares (v1)", "2507.11005", "8"),
    KnownOptimizer("AdamMini", "AdamW with one divisor for each row", "2406.16793", "4", 1e-3,
                   weight_decay=0.1, options=REST, source="lmplay.optim.adam_mini"),
    KnownOptimizer("BiClip", "the gradient's numbers between two sizes", "2502.04164", "0", 10.0,
                   options={"low": 1e-6, "high": 1e-4}, source="lmplay.optim.biclip",
                   is_elementwise=True),
    _library("Lion", "sign of an average of momentum and gradient", "2302.06675", "4", 3e-4,
             weight_decay=0.3, options={"betas": [0.9, 0.99]}),
    _library("Signum", "sign of momentum", "1802.04434", "4", 3e-4, weight_decay=0.3,
             attribute="SignSGD", options={"momentum": 0.9}),
    _library("AdEMAMix", "AdamW with a second, slow momentum", "2409.03137", "12", 1e-3,
             weight_decay=0.1, options={"betas": [0.9, 0.999, 0.999], "alpha": 5.0},
             fixed={"weight_decouple": True}, steps_option="t_alpha_beta3"),
    _library("ADOPT", "Adam whose divisor has not seen the gradient", "2411.02853", "8", 1e-3,
             weight_decay=0.1, options={"betas": [0.9, 0.999]}, is_elementwise=False,
             fixed={"weight_decouple": True, "clip_lambda": lambda t: (t - 1) ** 0.25}),
    _library("MARS", "AdamW on gradients of less variance", "2411.10438", "12", 3e-3,
             weight_decay=0.1, takes=WITH_ROWS, is_elementwise=False,
             options={"betas": [0.95, 0.99], "gamma": 0.025}),
    _library("LAMB", "Adam's direction at the weight's own length", "1904.00962", "8", 3e-3,
             weight_decay=0.1, attribute="Lamb", takes=WITH_ROWS, is_elementwise=False,
             rest_lr=1 / 3, fixed={"weight_decouple": False, "adam_debias": True}),
    _library("Prodigy", "Adam that finds its own rate", "2306.06101", "16", 1.0, weight_decay=0.1,
             is_elementwise=False, lr_is_absolute=True, source="lmplay.optim.prodigy",
             options={"bias_correction": True, "safeguard_warmup": True}),
    _library("ScheduleFreeAdamW", "AdamW judged by its average; wants a constant rate",
             "2405.15682", "8", 2e-3, weight_decay=0.1, source="lmplay.optim.schedule_free",
             is_elementwise=False, holds_weights=True, options={"betas": [0.9, 0.99]}),
    _SOAP,
    replace(_SOAP, name="PaLMSOAP", summary="SOAP whose average of squares grows longer",
            attribute="PaLMSOAP", options={"max_precondition_dim": 2048}),
    _library("Kron", "gradients made white by triangular factors (PSGD)", "2402.04553", "5 to 12",
             5e-4, weight_decay=0.6, takes=MATRIX, rest_lr=2.0, is_elementwise=False,
             is_comparable=False, source="lmplay.optim.kron",
             options={"max_size_triangular": 2048},
             fixed={"precondition_dtype": None}),  # the weight's own; a checkpoint holds no types
    _library("Sophia", "momentum over curvature, clipped; one more pass in ten steps", "2305.14342",
             "8", 6e-4, weight_decay=0.2, source="lmplay.optim.sophia", is_elementwise=False,
             is_comparable=False, options={"betas": [0.965, 0.99]}),
    KnownOptimizer("DeMo", "signs of what processes tell each other of their momentum",
                   "2411.19870", "4", 1e-3, 0.1, source="lmplay.optim.demo", local_gradients=True),
    _library("Scion", "steps of one norm, weights inside a ball", "2502.07529", "4", 2**-12,
             source="lmplay.optim.scion", is_elementwise=False, lr_is_absolute=True,
             holds_weights=True,
             fixed={"constraint": True, "norm_kwargs": {}},
             by_role={
                 "matrix": {"norm_type": _LMO["spectral"], "scale": 50.0},
                 "head": {"norm_type": _LMO["sign"], "scale": 3000.0},
                 "table": {"norm_type": _LMO["column"], "norm_kwargs": {"transpose": True},
                           "scale": 50.0},
                 "vector": {"norm_type": _LMO["bias"], "scale": 50.0},
             }, takes=frozenset({"matrix", "head", "table", "vector"}), rest_lr=4.0),
]  # fmt: skip
KNOWN = MappingProxyType({known.name: known for known in sorted(_ALL, key=lambda k: k.name)})


def find(name: str, key: str) -> KnownOptimizer:
    """The optimizer called `name`.

    Args:
        key: what named it, such as optimizer.name, for the message.
    Raises:
        UserError: there is none.
    """
    if name not in KNOWN:
        hint = nearest(name, KNOWN) + "--optimizer list shows them all"
        raise UserError(f"{key}: no optimizer called {name!r}", hint=hint)
    return KNOWN[name]


def replaced(plans_own: Optimizer, name: str) -> dict[str, object]:
    """What a plan's `optimizer` becomes with another one, given in upper or lower case.

    It gets its own defaults, rate and decay as far above or below them as the plan's optimizer is
    above or below its.

    Raises:
        UserError: there is no such optimizer.
    """
    by_case = {known.lower(): known for known in KNOWN}
    new = find(by_case.get(name.lower(), name), "--optimizer")
    if new.name == plans_own.name:
        return plans_own.model_dump(mode="json")
    old = find(plans_own.name, "optimizer.name")
    lr, decay = new.lr, new.weight_decay
    if not new.lr_is_absolute and not old.lr_is_absolute:
        lr *= plans_own.lr / old.lr
    if old.weight_decay:
        decay *= plans_own.weight_decay / old.weight_decay
    return {"name": new.name, "lr": _short(lr), "weight_decay": _short(decay),
            "options": dict(new.options), "roles": {}}  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.3g}")
