"""Classes that are too rare to learn, for detection and classification."""

from collections.abc import Mapping

from datasets.check.findings import Finding

__all__ = ["find_bad_classes"]


def find_bad_classes(
    counts: Mapping[str, int], split: str, *, unit: str = "object"
) -> list[Finding]:
    """Return the findings of training classes that are too rare to learn, and of their balance.

    Args:
        counts: Number of objects or images by class.
        split: Name of the split.
        unit: What is counted, `object` or `image`.
    """
    findings = []
    for amount, word, meaning in (
        (0, f"classes without {unit}s", "They are never learned. Remove them, or add data."),
        (1, f"classes with one {unit}", "They can hardly be learned. Add data."),
    ):
        names = [name for name, count in counts.items() if count == amount]
        if names and any(counts.values()):
            findings.append(Finding("warning", word, split, len(names), meaning, names))
    ordered = sorted((count, name) for name, count in counts.items() if count)
    if len(ordered) > 1 and ordered[-1][0] >= 100 * ordered[0][0]:
        (fewest, rare), (most, common) = ordered[0], ordered[-1]
        meaning = (
            f"{common} has {most:,} {unit}s and {rare} has {fewest:,}: expect weak rare classes."
        )
        findings.append(Finding("note", "imbalanced classes", split, len(ordered), meaning))
    return findings
