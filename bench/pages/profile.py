"""The page that says where the time of whole networks goes, kernel by kernel, from the file that bench/profile_networks.py writes."""

from collections.abc import Sequence
from typing import Any

from .kernels import KINDS, kind, short
from .results import hardware, not_quiet, prose, software
from .tables import Cell, Table

FILE = "profile.json"
OF_A_PROFILE = ("machine", "settings", "date", "commit", "others_cores")
LEAST = 0.001  # of a call: kernels below it share a row
Profile = dict[str, Any]


def markdown(data: dict[str, Any], source: str) -> str:
    """The whole page. data: the file's content; source: where a reader finds it."""
    m, how = data["machine"], data["settings"]
    on_gpu = m["device"] == "cuda"
    cuda = f", CUDA {m['cuda']['torch']}, cuDNN {m['cuda']['cudnn']}, driver {m.get('gpu_driver', 'unknown')}" if on_gpu else ""
    shape = f"{how['model']}, {how['pixels']} pixels, B = {how['batch']}, {how['dtype']}, {how['layout']}, K = {how['classes']}"
    shape += f", width {how['width']:g}" * (how["width"] != 1)
    of = (
        f"the GPU's kernels, the mean of {how['calls']} calls"
        if on_gpu
        else f"the CPU's operators, each without those in it, in the median of {how['turns']} calls"
    )
    lines = [
        f"# Where the time goes: VGG-16 with Interflow and without, {m['gpu'] if on_gpu else m['cpu']}",
        "",
        f"{hardware(m)}; {software(m, 'torch', 'triton')}{cuda}; {data['date']}, commit {data['commit']}.{not_quiet(data['others_cores'], m)}",
        "",
        f"{shape}. A call is a training step with its optimizer (SGD) or an inference. Times are microseconds: {of}, as torch.profiler tells them. "
        f"By the clock: the median of {how['turns']} calls without the profiler. Bias, ReLU, pool, mean, add: PyTorch's operators between convolutions, "
        "their backward passes and the sums of gradients. Tap and head: those of this package, and what the classifier in plain PyTorch does.",
        "",
        f"Made by `make profile-page` from `{source}`, which `make {'gpu' if on_gpu else 'profile'}` measured.",
        "",
        *(f"Left out, {reason}: {name}.\n" for name, reason in data.get("missing", {}).items()),
    ]
    profiles = [{"torch": m["versions"]["torch"].split("+")[0], **profile} for profile in data["profiles"]]
    lines += [line for profile in profiles for line in inductor_lines(profile)]
    tables = [table for group in grouped(profiles) for table in (by_kind(group), *(by_kernel(profile, on_gpu) for profile in group))]
    return "\n".join(line if line.startswith(("#", "|")) else prose(line) for line in lines) + "\n" + "\n".join(table.markdown() for table in tables)


def grouped(profiles: Sequence[Profile]) -> list[list[Profile]]:
    """The networks that ran the same way, plain first."""
    groups: dict[str, list[Profile]] = {}
    for profile in profiles:
        groups.setdefault(way(profile), []).append(profile)
    return [sorted(group, key=lambda profile: profile["network"] != "plain") for group in groups.values()]


def way(profile: Profile) -> str:
    return profile["direction"] + (f", compiled by torch {profile['torch']}" if profile["compiled"] else "")


def inductor_lines(profile: Profile) -> list[str]:
    """What torch.compile made of a training step's max-pools, and the largest kernels that it wrote."""
    told = profile.get("inductor")
    if not told or profile["direction"] == "inference":
        return []
    kernels = ", ".join(f"`{short(name)}` {us:,.0f} us" for name, us in told["kernels"][:3])
    return [f"torch.compile of torch {profile['torch']}, {profile['network']}: max-pool backward by {told['pool_backward']}; largest kernels: {kernels}.\n"]


def sums(profile: Profile) -> dict[str, float]:
    """Microseconds a call of each of KINDS."""
    total = dict.fromkeys(KINDS, 0.0)
    for entry in profile["entries"]:
        total[kind(entry["name"], entry["operators"])] += entry["us"]
    return total


def by_kind(group: Sequence[Profile]) -> Table:
    """A column for each network, and what each has more or less than the first."""
    found = [sums(profile) for profile in group]
    whole = [sum(total.values()) for total in found]

    def row(name: str, values: Sequence[float], wholes: Sequence[float] = ()) -> list[Cell]:
        shares = [f" ({value / max(of, 1e-9):.1%})" for value, of in zip(values, wholes, strict=True)] if wholes else [""] * len(values)
        shown: list[Cell] = [(f"{value:,.0f}{share}", value) for value, share in zip(values, shares, strict=True)]
        return [(name, name), *shown, *((f"{value - values[0]:+,.0f}", value - values[0]) for value in values[1:])]

    rows = [row(name, [total[name] for total in found], whole) for name in KINDS if any(total[name] for total in found)]
    rows += [row("**sum**", whole), row("by the clock", [profile["clock_us"] for profile in group])]
    if any(profile["launches"] for profile in group):
        rows.append(row("launches", [profile["launches"] for profile in group]))
    names = [profile["network"] for profile in group]
    header = ["kind", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    return Table(f"{way(group[0]).capitalize()}, by kind", "Microseconds a call and the share of the sum.", header, rows)


def by_kernel(profile: Profile, on_gpu: bool) -> Table:
    """The kernels that take most, on a GPU with the operators that launched them."""
    whole = max(sum(entry["us"] for entry in profile["entries"]), 1e-9)
    merged: dict[tuple[str, str, str], list[float]] = {}
    for entry in profile["entries"]:
        within = entry["operators"][0] if on_gpu and entry["operators"] else ""
        total = merged.setdefault((short(entry["name"]), within, kind(entry["name"], entry["operators"])), [0.0, 0.0])
        total[0] += entry["calls"]
        total[1] += entry["us"]
    ranked = sorted(merged.items(), key=lambda item: -item[1][1])
    shown = [item for item in ranked if item[1][1] >= LEAST * whole]
    rest = [total for _, total in ranked[len(shown) :]]
    if rest:
        shown.append(((f"{len(rest)} more", "", ""), [sum(calls for calls, _ in rest), sum(us for _, us in rest)]))
    rows = [
        [(f"`{name}`" if what else name, name), *([(within or "-", within)] if on_gpu else []), (what or "-", what), (f"{calls:g}", calls), (f"{us:,.1f}", us),
         (f"{us / whole:.1%}", us)]
        for (name, within, what), (calls, us) in shown
    ]  # fmt: skip
    header = ["kernel", "launched by", "kind", "calls", "us", "share"] if on_gpu else ["operator", "kind", "calls", "us", "share"]
    return Table(f"{way(profile).capitalize()}: {profile['network']}", f"{whole:,.0f} us; {profile['clock_us']:,.0f} by the clock.", header, rows)
