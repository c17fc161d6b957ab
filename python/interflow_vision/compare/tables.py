"""The page's tables, in Markdown."""

from collections.abc import Mapping, Sequence

from . import claims, results, statistics
from .plan import Cell, Study

Found = claims.Found


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown, the first `words` columns of text, the others of numbers."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Of fractions, mean and standard deviation in percent; of one value that alone, of none nothing."""
    if not values:
        return ""
    s = statistics.summary(values)
    return percent(s.mean) + (f" ± {percent(s.sd)}" if s.n > 1 else "")


def interval(bounds: statistics.Interval | None, digits: int = 2) -> str:
    return "" if bounds is None else f"[{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def places(found: Found) -> list[tuple[str, str]]:
    """Data sets and networks that have results, in the study's order."""
    return list(dict.fromkeys((cell.data, cell.network) for cell in found))


def arms_of(found: Found, data: str, network: str) -> list[Cell]:
    return [cell for cell in found if (cell.data, cell.network) == (data, network)]


def accuracy(study: Study, found: Found, data: str, network: str) -> str:
    """Test accuracy of each arm, in percent, and its difference from the baseline, seed by seed, in points."""
    base = results.accuracies(found.get(Cell(data, network, study.baseline), {}))
    rows = []
    for cell in arms_of(found, data, network):
        runs = found[cell]
        own, any_run = results.accuracies(runs), next(iter(runs.values()))
        row = [study.arms[cell.arm]["title"], f"{any_run['parameters']:,}", f"{any_run['rate']:g}", str(len(own))]
        if own:
            s = statistics.summary(list(own.values()))
            row += [spread(list(own.values())), f"{percent(s.low)} to {percent(s.high)}" if s.n > 1 else ""]
        else:
            row += ["diverged", ""]
        d = None if cell.arm == study.baseline else statistics.paired(_scaled(own), _scaled(base))
        row += ["", "", ""] if d is None else [f"{d.mean:+.2f}", interval(d.t), interval(d.bootstrap)]
        times = [run["train_seconds"] for run in runs.values() if run["status"] == "done"]
        row += [f"{sum(times) / len(times):.0f}" if times else "", str(len(runs) - len(own)) if len(own) < len(runs) else ""]
        rows.append(row)
    title = study.arms[study.baseline]["title"]
    head = ["arm", "parameters", "learning rate", "seeds", "test accuracy, %", "range, %", f"less {title}, points", "95 %, t", "95 %, bootstrap"]
    return table([*head, "training, s", "diverged"], rows)


def _scaled(values: Mapping[int, float]) -> dict[int, float]:
    return {seed: 100 * value for seed, value in values.items()}


def fit(study: Study, found: Found, data: str, network: str) -> str:
    """Accuracy on training and test images, and the gap, in percent and points, means over seeds."""
    rows = []
    for cell in arms_of(found, data, network):
        done = [run for run in found[cell].values() if run["status"] == "done"]
        if done:
            rows.append([study.arms[cell.arm]["title"], *(spread(each) for each in zip(*map(_fit, done), strict=True))])
    return table(["arm", "training images, %", "test images, %", "gap, points"], rows)


def _fit(run: results.Result) -> tuple[float, float, float]:
    training, test = run["training"]["accuracy"], run["test"]["accuracy"]
    return training, test, training - test


def branches(study: Study, found: Found, data: str, network: str) -> str:
    """Of arms with branches: test accuracy of each alone, in percent, and its contribution to the logits; "" where there are none."""
    rows = []
    for cell in arms_of(found, data, network):
        done = [run for run in found[cell].values() if run["status"] == "done"]
        each = [claims.branch_accuracies(run) for run in done]
        if not each or not each[0]:
            continue
        accuracy = [sum(column) / len(column) for column in zip(*each, strict=True)]
        terms = [claims.contributions(run) for run in done]
        shares = [f"{sum(column) / len(column):.2f}" for column in zip(*terms, strict=True)]
        rows.append([study.arms[cell.arm]["title"], " / ".join(f"{100 * value:.1f}" for value in accuracy), " / ".join(shares)])
    return table(["arm", "each branch alone, test accuracy, %", "contribution, logits"], rows) if rows else ""


def gradients(study: Study, found: Found, data: str, network: str) -> str:
    """Gradient norms of the first, the middle and the last convolution in the first step, and the first over the last one's over training; means."""
    rows = []
    for cell in arms_of(found, data, network):
        done = [run for run in found[cell].values() if run["status"] == "done"]
        if done:
            starts = [run["gradients"]["start"] for run in done]
            row = [_mean_norm([start[i] for start in starts]) for i in (0, len(starts[0]) // 2, len(starts[0]) - 1)]
            ratio = [sum(claims.values(claims.MEASURES[name], dict(enumerate(done))).values()) / len(done) for name in ("start_gradient", "gradient")]
            rows.append([study.arms[cell.arm]["title"], *row, *(f"{value:+.2f}" for value in ratio)])
    head = ["arm", "first convolution", "middle", "last", "first over last at start, decades", "over training, decades"]
    return table(head, rows)


def _mean_norm(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1e}"


def depth(study: Study, found: Found, data: str) -> str:
    """Test accuracy against the number of convolutions, of the networks whose depth the study gives, in percent; "" for fewer than two."""
    networks = sorted((n for d, n in places(found) if d == data and "depth" in study.networks[n]), key=lambda n: study.networks[n]["depth"])
    if len(networks) < 2:
        return ""
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in found if cell.data == data and cell.network in networks):
        row = [study.arms[arm]["title"]]
        for network in networks:
            own = results.accuracies(found.get(Cell(data, network, arm), {}))
            row.append(spread(list(own.values())))
        rows.append(row)
    return table(["arm", *(f"{study.networks[n]['depth']} convolutions, %" for n in networks)], rows)


def rates(study: Study, accuracies: Mapping[Cell, Mapping[float, float]]) -> str:
    """Validation accuracy of the tuning runs, in percent; the chosen rate in bold."""
    rows = []
    for cell, found in accuracies.items():
        best = max(sorted(found), key=lambda rate: found[rate])
        shown = ["diverged" if found[rate] < 0 else percent(found[rate]) for rate in study.rates]
        rows.append([str(cell), *(f"**{text}**" if rate == best else text for rate, text in zip(study.rates, shown, strict=True))])
    return table(["cell", *(f"{rate:g}" for rate in study.rates)], rows)


def verdicts(study: Study, found: Found) -> str:
    """Each claim with its verdict, the two means, and the difference with its interval."""
    rows = []
    for each in (claims.verdict(claim, found) for claim in study.claims):
        measure, claim = claims.MEASURES[each.claim.measure], each.claim
        row = [claim.says, f"**{each.verdict}**", f"{measure.title}: {_name(study, claim.of)} and {_name(study, claim.than)}"]
        if each.difference is not None and each.ours is not None and each.theirs is not None:
            d = each.difference
            row += [f"{each.ours:.2f} and {each.theirs:.2f}", f"{d.mean:+.2f} {measure.unit} {interval(d.t)}, {d.n} seeds"]
        else:
            row += ["no results", ""]
        rows.append(row)
    return table(["claim", "verdict", "measure", "means", "difference, 95 % by t"], rows, words=3)


def _name(study: Study, cell: Cell) -> str:
    return f"{study.arms[cell.arm]['title']} on {study.networks[cell.network]['title']}, {study.data[cell.data]['title']}"
