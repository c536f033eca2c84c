"""Images that occur more than once, within a split or in both splits."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from datasets.check.findings import Finding
from datasets.check.pixels import Picture

__all__ = ["find_copies"]


def find_copies(
    pictures: Mapping[str, Sequence[Picture]],
    classes: Mapping[str, Sequence[str]] | None = None,
) -> list[Finding]:
    """Return the findings of images with equal pixels.

    Args:
        pictures: Images of each split.
        classes: Class name of each image of each split; None for a detector.
    """
    places: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for split, listed in pictures.items():
        for index, picture in enumerate(listed):
            if not picture.error:
                places[picture.digest].append((split, index))
    groups = [group for group in places.values() if len(group) > 1]

    def names(group: list[tuple[str, int]]) -> str:
        return " = ".join(f"{split}: {pictures[split][index].name}" for split, index in group[:4])

    findings = []
    leaks = [group for group in groups if len({split for split, _ in group}) > 1]
    if leaks:
        count = sum(split == "val" for group in leaks for split, _ in group)
        meaning = "The metrics are too good: remove them from train or from val."
        found = [names(group) for group in leaks]
        findings.append(
            Finding("warning", "images in both splits", "train and val", count, meaning, found)
        )
    for split in pictures:
        copies = [[place for place in group if place[0] == split] for group in groups]
        copies = [group for group in copies if len(group) > 1]
        if not copies:
            continue
        if classes is not None:
            contradictory = [
                group for group in copies if len({classes[split][index] for _, index in group}) > 1
            ]
            if contradictory:
                meaning = "The same image has several classes: remove the wrong ones."
                kind = "copies with different classes"
                found = [names(group) for group in contradictory]
                findings.append(Finding("warning", kind, split, len(found), meaning, found))
        count = sum(len(group) - 1 for group in copies)
        meaning = "The same pixels are counted several times."
        found = [names(group) for group in copies]
        findings.append(Finding("note", "duplicate images", split, count, meaning, found))
    return findings
