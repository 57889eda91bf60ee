"""How many hostile cases there are, by kind: `python -m tests.hostile.count`. Knows no service."""

from __future__ import annotations

from tests.hostile import archives, bodies, grammars, headers, names, numbers, test_fuzz, text
from tests.hostile.training_files import FILES


def counts() -> dict[str, int]:
    """Written by hand, and generated for the readers of files; requests after the description are counted by a run."""
    nouns = (headers, bodies, numbers, text, grammars, names)
    written = {noun.__name__.rpartition(".")[2]: len(noun.CASES) for noun in nouns}
    written |= {"training files": len(FILES), "archives": len(archives.ARCHIVES)}
    return {**written, "fuzzed files, few": test_fuzz.FEW, "fuzzed files, many": test_fuzz.MANY}


if __name__ == "__main__":
    for kind, number in counts().items():
        print(f"{number:6} {kind}")
