"""`make licences`: the licences of everything that this environment has installed for the package, docs/licences.md, from the packages' own metadata."""

import argparse
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/licences.md"
EXTRAS = ("train", "data", "backbones", "bench", "dev", "serve")
HEADER = """# Licences of what the package needs

Written by `make licences` from the metadata of the packages themselves, of the versions in `constraints.txt`. The
package is Apache-2.0. "run": what `pip install` brings along; else the extra that asks for it, itself or through
another package. Not listed: `kernels` and `openvino`, of which only an extra has need and which the environment lacks,
and the CUDA libraries that torch's GPU builds bring along under NVIDIA's own licences.

| package | version | for | licence |
|---|---|---|---|
"""


def licence(of: Distribution) -> str:
    """As SPDX, else the classifiers, else the first line of the field."""
    found = of.metadata
    if found.get("License-Expression"):
        return str(found["License-Expression"])
    classified = [each.rpartition(" :: ")[2] for each in found.get_all("Classifier") or [] if each.startswith("License ::")]
    if classified and classified != ["OSI Approved"]:
        return ", ".join(classified)
    text = (found.get("License") or "").strip()
    return re.split(r"[\n|]", text)[0].strip() if text else ""


def needed(extra: str) -> dict[str, Distribution]:
    """What "run" or an extra of the package needs, by canonical name, directly and through others; what is not installed is left out."""
    found: dict[str, Distribution] = {}
    open_ = [("interflow-kernels", () if extra == "run" else (extra,))]
    seen = set()
    while open_:
        name, extras = open_.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        found[canonicalize_name(name)] = package
        for text in package.requires or []:
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": each}) for each in extras or ("",)):
                open_.append((canonicalize_name(wanted.name), tuple(sorted(wanted.extras))))
    del found["interflow-kernels"]
    return found


def rows() -> list[tuple[str, str, str, str]]:
    """(name, version, for what, licence) of every package, in order; each for the first that needs it."""
    found: dict[str, tuple[str, str, str, str]] = {}
    for extra in ("run", *EXTRAS):
        for name, package in needed(extra).items():
            found.setdefault(name, (name, package.version.partition("+")[0], extra, licence(package)))
    return [found[name] for name in sorted(found)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.path.append(str(Path(sys.prefix) / "backbones"))  # where timm and torchvision lie, see the Makefile
    listed = rows()
    PAGE.write_text(HEADER + "".join(f"| {' | '.join(row)} |\n" for row in listed))
    unknown = [name for name, *_, said in listed if not said]
    print(f"{len(listed)} packages in {PAGE.relative_to(ROOT)}; without a licence in their metadata: {', '.join(unknown) or 'none'}")


if __name__ == "__main__":
    main()
