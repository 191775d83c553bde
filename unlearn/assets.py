"""Where the files that come with the package lie: the recipes and the lm-eval task pack.

The wheel carries them inside the package (``unlearn/recipes``, ``unlearn/eval``); an editable install and a bare
checkout have them one folder up. ``importlib.resources`` sees only the first, so both places are looked at here.
"""

from __future__ import annotations

from pathlib import Path

from unlearn.errors import UnlearnError

_PACKAGE = Path(__file__).resolve().parent


def recipes_folder() -> Path:
    """Folder of the packaged recipes (``*.yaml``, and their data in ``data/``).

    Raises:
        UnlearnError: the installation lacks it.
    """
    return _folder("recipes")


def tasks_folder() -> Path:
    """Folder of the lm-eval task pack, to be given to lm-eval as its include path.

    Raises:
        UnlearnError: the installation lacks it.
    """
    return _folder("eval")


def _folder(name: str) -> Path:
    places = (_PACKAGE / name, _PACKAGE.parent / name)
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise UnlearnError(f"this installation is incomplete: no folder '{name}' (looked at {looked}); install it again")
