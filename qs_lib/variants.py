"""Variants: named sets of parameters, one YAML file per stage, ``params/<stage>/<variant>.yaml``."""

from pathlib import Path

import yaml

from .errors import ParameterError
from .params import check_parameters, unknown_name
from .stage import REPOSITORY


def read_yaml(path: Path):
    """What a YAML file holds, plain values only. Raises ParameterError if it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def read_variant(stage: str, variant: str, root: Path = REPOSITORY) -> dict:
    """What a variant sets for a stage, nothing where it has no file; not checked yet.

    Raises ParameterError if the file is not a flat YAML mapping.
    """
    path = root / "params" / stage / f"{variant}.yaml"
    if not path.is_file():
        return {}
    given = read_yaml(path) or {}
    if not isinstance(given, dict):
        raise ParameterError(f"{path} must hold lines of the form 'name: value'")
    return given


def stages_of(variant: str) -> dict[str, dict]:
    """Stage -> what a variant sets for it, for all stages it has a file for."""
    return {path.parent.name: read_variant(path.parent.name, variant)
            for path in sorted((REPOSITORY / "params").glob(f"[0-9]*/{variant}.yaml"))}  # fmt: skip


def recipe(stage: str, variant: str = "pocket") -> dict:
    """All parameters of a stage's notebook under a variant, its defaults included. Raises ParameterError."""
    return check_parameters(REPOSITORY / "notebooks" / f"{stage}.ipynb", read_variant(stage, variant))


def check_variant(variant: str, root: Path = REPOSITORY) -> None:
    """Raises ParameterError if no notebook has a parameter file of this name."""
    known = {path.stem for path in (root / "params").glob("[0-9]*/*.yaml")} | {"defaults"}
    if variant not in known:
        raise ParameterError(unknown_name(variant, known).replace("parameter", "variant", 1))
