"""Settings: named once, checked once, frozen."""

import difflib
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import ParameterError


class Settings(BaseModel):
    """What a training or a notebook can be told, each with its default. Raises ``ParameterError``, one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        else:
            return
        raise ParameterError("; ".join(self._sentence(problem) for problem in problems))

    @classmethod
    def _sentence(cls, problem: dict) -> str:
        name = ".".join(str(part) for part in problem["loc"]) or "parameters"
        if problem["type"] == "extra_forbidden":
            return unknown_name(name, cls.model_fields)
        if not problem["loc"]:  # what several settings make together
            return problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            return f"parameter {name} is missing; the notebook's parameters cell must set it"
        given = repr(problem["input"])
        given = given if len(given) <= 60 else given[:57] + "..."
        if problem["type"] == "string_type":
            kind = {"int": "number", "float": "number"}.get(kind := type(problem["input"]).__name__, kind)
            advice = "put it in quotes, or give papermill -r in place of -p"
            return f"parameter {name}={given} was read as a {kind}, not as a string: {advice}"
        if name == "run_name":
            allowed = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
            return f"run_name={given} cannot name a folder: use {allowed}"
        message = problem["msg"].removeprefix("Value error, ")
        return f"parameter {name}={given}: {message[0].lower()}{message[1:]}"

    @classmethod
    def of(cls, settings: Self | None, **changed) -> Self:
        """Return ``settings``, by default this class's own, with some changed. Raises ``ParameterError``."""
        if not isinstance(settings, cls | None):
            raise ParameterError(f"settings are a {type(settings).__name__}; they must be a {cls.__name__}")
        return (settings or cls()).but(**changed)

    @classmethod
    def among(cls, values: dict, **changed) -> Self:
        """Return the settings that stand among ``values``, such as a recipe's, with some changed. Raises as any."""
        return cls(**{name: values[name] for name in cls.model_fields} | changed)

    def but(self, **changed) -> Self:
        """The same settings with some changed. Raises ``ParameterError``."""
        return type(self)(**self.model_dump() | changed)


def unknown_name(name: str, known) -> str:
    """The sentence for a name that is not a parameter, with the nearest one that is."""
    shown = name if len(name) <= 60 else name[:57] + "..."
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(sorted(known))
    return f"unknown parameter {shown!r}; {hint}"
