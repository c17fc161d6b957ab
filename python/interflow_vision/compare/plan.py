"""The plan of a study: what its YAML file says, checked, and the runs that follow from it."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import UserError, one_line

Options = dict[str, Any]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Of arms, networks and data sets: they become folders."""
_KEYS = {"title", "about", "rates", "tuning_seeds", "seeds", "threads", "recipe", "data", "networks", "arms", "baseline", "cells", "claims"}
_RECIPE = {"batch_size": 64, "momentum": 0.9, "weight_decay": 5e-4, "label_smoothing": 0.0, "warmup": 0.25}


@dataclass(frozen=True, order=True)
class Cell:
    """One arm on one network and one data set, by their names; the unit that has a learning rate and a mean over seeds."""

    data: str
    network: str
    arm: str

    def __str__(self) -> str:
        return f"{self.data}/{self.network}/{self.arm}"


@dataclass(frozen=True)
class Run:
    """One training of a cell. Of a tuning run only the validation images are looked at, of a final one the test images once, at its end."""

    cell: Cell
    seed: int
    rate: float  # highest learning rate
    final: bool
    options: Options = field(hash=False)  # all that its numbers follow from: "data", "model", "recipe"

    @property
    def path(self) -> Path:
        """Of its result, below the folder of results."""
        name = f"seed{self.seed}.json" if self.final else f"rate{self.rate:g}-seed{self.seed}.json"
        return Path("final" if self.final else "tuning", self.cell.data, self.cell.network, self.cell.arm, name)


@dataclass(frozen=True)
class Claim:
    """A sentence that a figure decides: the measure of one cell less that of another, seed by seed, should be above (or below) 0."""

    says: str
    measure: str
    of: Cell
    than: Cell
    expect: str  # "greater" or "less"


@dataclass(frozen=True)
class Study:
    """What the file says. seeds: of each cell; arms, networks, data: options by name, each with a "title"."""

    title: str
    about: str
    rates: tuple[float, ...]
    tuning_seeds: tuple[int, ...]
    threads: int
    recipe: Options
    data: Mapping[str, Options]
    networks: Mapping[str, Options]
    arms: Mapping[str, Options]
    baseline: str
    seeds: Mapping[Cell, tuple[int, ...]]
    claims: tuple[Claim, ...]

    def run(self, cell: Cell, seed: int, rate: float, final: bool) -> Run:
        """A run of a cell."""
        arm, network, data = self.arms[cell.arm], self.networks[cell.network], self.data[cell.data]
        model = {key: value for key, value in {**network, **arm}.items() if key not in ("title", "depth")}
        options = {"data": {k: v for k, v in data.items() if k != "title"}, "model": model, "recipe": dict(self.recipe)}
        return Run(cell, seed, rate, final, options)

    def tuning(self) -> Iterator[Run]:
        """The runs that choose the learning rates; none where there is but one."""
        if len(self.rates) > 1:
            for seed in self.tuning_seeds:
                for cell in self.seeds:
                    for rate in self.rates:
                        yield self.run(cell, seed, rate, final=False)

    def finals(self, rates: Mapping[Cell, float]) -> Iterator[Run]:
        """The runs that count, with the rates that were chosen; the first seeds of all cells first."""
        for position in range(max(map(len, self.seeds.values()), default=0)):
            for cell, seeds in self.seeds.items():
                if position < len(seeds):
                    yield self.run(cell, seeds[position], rates[cell], final=True)


def read(path: Path) -> Study:
    """The study that a YAML file describes; UserError, one sentence, for what does not fit."""
    try:
        given = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"the study {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the study {path} is no YAML: {one_line(error)}") from error
    try:
        return _study(given)
    except ValueError as error:
        raise UserError(f"the study {path} does not fit: {one_line(error)}") from error


def _study(given: Any) -> Study:
    _mapping("the file", given)
    unknown = sorted(set(given) - _KEYS)
    if unknown:
        raise ValueError(f"it has {unknown[0]!r}; it may have {', '.join(sorted(_KEYS))}")
    lacking = sorted({"title", "rates", "seeds", "data", "networks", "arms", "baseline", "cells"} - set(given))
    if lacking:
        raise ValueError(f"{lacking[0]!r} is missing")
    rates = tuple(_number("rates", rate, least=0) for rate in _list("rates", given["rates"]))
    recipe = {**_RECIPE, **_mapping("recipe", given.get("recipe", {}))}
    if set(recipe) != set(_RECIPE):
        raise ValueError(f"recipe has {sorted(set(recipe) - set(_RECIPE))[0]!r}; it may have {', '.join(_RECIPE)}")
    named = {key: _named(key, given[key]) for key in ("data", "networks", "arms")}
    for name, options in named["data"].items():
        if "source" not in options or "epochs" not in options:
            raise ValueError(f"data {name!r} must have a source and epochs, got {options}")
    if given["baseline"] not in named["arms"]:
        raise ValueError(f"baseline must be one of the arms, {', '.join(named['arms'])}, got {given['baseline']!r}")
    tuning, seeds = _seeds("tuning_seeds", given.get("tuning_seeds", [1000])), _seeds("seeds", given["seeds"])
    cells = _cells(given["cells"], named, seeds)
    shared = set(tuning) & {seed for each in cells.values() for seed in each}
    if shared:
        raise ValueError(f"tuning_seeds must be none of the seeds that count, got {min(shared)} in both")
    threads = given.get("threads", 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a whole number of at least 1, got {threads!r}")
    claims = tuple(_claim(each, cells) for each in _list("claims", given.get("claims", []), least=0))
    texts = (str(given["title"]), " ".join(str(given.get("about", "")).split()))
    return Study(*texts, rates, tuning, threads, recipe, named["data"], named["networks"], named["arms"], given["baseline"], cells, claims)


def _cells(given: Any, named: Mapping[str, Mapping[str, Options]], seeds: tuple[int, ...]) -> dict[Cell, tuple[int, ...]]:
    """Each block is a product of data, networks and arms; a later block replaces the seeds of a cell that is there already."""
    found: dict[Cell, tuple[int, ...]] = {}
    for block in _list("cells", given):
        _mapping("each of cells", block)
        if not {"data", "networks", "arms"} <= set(block) <= {"data", "networks", "arms", "seeds"}:
            raise ValueError(f"each of cells must have data, networks, arms, and may have seeds, got {', '.join(map(str, block))}")
        lists = {key: _list(key, block[key]) for key in ("data", "networks", "arms")}
        for key, names in lists.items():
            for name in names:
                if name not in named[key]:
                    raise ValueError(f"cells name {name!r}, which is none of {key}: {', '.join(named[key])}")
        own = _seeds("seeds", block["seeds"]) if "seeds" in block else seeds
        found.update({Cell(d, n, a): own for d in lists["data"] for n in lists["networks"] for a in lists["arms"]})
    return found


def _claim(given: Any, cells: Mapping[Cell, Any]) -> Claim:
    _mapping("each of claims", given)
    if set(given) != {"says", "measure", "of", "than", "expect"}:
        raise ValueError(f"each of claims must have says, measure, of, than and expect, got {', '.join(map(str, given))}")
    if given["expect"] not in ("greater", "less"):
        raise ValueError(f"expect must be greater or less, got {given['expect']!r}")
    of = {**_mapping("of", given["of"])}
    sides = []
    for side in (of, {**of, **_mapping("than", given["than"])}):
        if set(side) != {"data", "network", "arm"} or Cell(**side) not in cells:
            raise ValueError(f"the claim {given['says']!r} speaks of {side}, which is no cell of the study")
        sides.append(Cell(**side))
    return Claim(str(given["says"]), str(given["measure"]), sides[0], sides[1], given["expect"])


def _named(key: str, given: Any) -> dict[str, Options]:
    found = {}
    for name, options in _mapping(key, given).items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"{key} must have names of letters, digits and _ . + -, got {name!r}")
        found[name] = {"title": name, **_mapping(f"{key} {name!r}", options)}
    if not found:
        raise ValueError(f"{key} must not be empty")
    return found


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping, got {type(given).__name__}")
    return given


def _list(name: str, given: Any, least: int = 1) -> Sequence[Any]:
    if not isinstance(given, list) or len(given) < least:
        raise ValueError(f"{name} must be a list{' that is not empty' if least else ''}, got {given!r}")
    return given


def _seeds(name: str, given: Any) -> tuple[int, ...]:
    seeds = _list(name, given)
    if any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"{name} must be different whole numbers of at least 0, got {given}")
    return tuple(seeds)


def _number(name: str, given: Any, least: float) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given) or given <= least:
        raise ValueError(f"{name} must be numbers above {least}, got {given!r}")
    return float(given)
