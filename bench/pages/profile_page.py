"""The page of docs/ from a profile that was measured: make profile-page FROM=bench/results/NAME writes docs/profile-NAME.md"""

import sys
from pathlib import Path

from pages.profile import FILE, OF_A_PROFILE, markdown
from pages.results import read_json, run_command

ROOT = Path(__file__).resolve().parents[2]


def page(folder: Path) -> tuple[Path, str]:
    """Where it goes, and its text."""
    source = folder.resolve() / FILE
    return ROOT / "docs" / f"profile-{source.parent.name}.md", markdown(read_json(source, OF_A_PROFILE)[0], source.relative_to(ROOT).as_posix())


def main(folder: Path) -> None:
    path, text = page(folder)
    path.write_text(text)
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run_command(lambda: main(Path(sys.argv[1])))
