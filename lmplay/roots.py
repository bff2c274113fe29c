"""Where experiments and plans live, and where what can be made again is kept."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def bundled_root() -> Path:
    """The folder that holds our own `experiments/` and `plans/`.

    In a wheel it lies inside the package; in a checkout, beside it. The wheel's is looked for
    first: beside an installed package a stranger may also be called `experiments`.
    """
    inside = _PACKAGE / "_bundled"
    return inside if inside.is_dir() else _PACKAGE.parent


def roots() -> list[Path]:
    """Every root, the first one to hold a name wins."""
    extra = [Path(part) for part in os.environ.get("LMPLAY_PATH", "").split(os.pathsep) if part]
    return [Path.cwd(), *extra, bundled_root()]


def files(kind: str, suffix: str) -> dict[str, Path]:
    """Name to file of every `kind` ("experiments" or "plans").

    Names that start with _ are no experiments; those with a dot are an editor's, or hidden.
    """
    found: dict[str, Path] = {}
    for root in roots():
        for path in sorted((root / kind).glob(f"*{suffix}")):
            if not path.name.startswith(("_", ".")):
                found.setdefault(path.stem, _real(path))
    return found


def file_called(name: str, kind: str, suffix: str) -> Path | None:
    """The file that `files` has under this name, without reading whole folders."""
    if name.startswith(("_", ".")):
        return None
    found = (root / kind / f"{name}{suffix}" for root in roots())
    return next((_real(path) for path in found if os.path.isfile(path)), None)


def _real(path: Path) -> Path:
    """The file that a link leads to; the link itself where it leads nowhere, or to itself."""
    return Path(os.path.realpath(path) if os.path.exists(path) else os.path.abspath(path))


def cache_root() -> Path:
    """Where prepared text and remembered checks lie: $LMP_DATASETS, else the user's cache."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("LMP_DATASETS") or user_cache_dir("lmplay"))


def looks_like_path(name: str, suffix: str) -> bool:
    """True where a user's value is a path rather than a name: it has a suffix or a slash."""
    return name.endswith(suffix) or "/" in name or os.sep in name
