"""The page of docs/ from a profile that was measured: python bench/profile_page.py bench/results/NAME writes docs/profile-NAME.md"""

import json
import sys
from pathlib import Path

from reporting.profile import FILE, markdown

ROOT = Path(__file__).resolve().parent.parent


def page(folder: Path) -> tuple[Path, str]:
    """Where it goes, and its text."""
    source = folder.resolve() / FILE
    return ROOT / "docs" / f"profile-{source.parent.name}.md", markdown(json.loads(source.read_text()), source.relative_to(ROOT).as_posix())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path, text = page(Path(sys.argv[1]))
    path.write_text(text)
    print(path.relative_to(ROOT))
