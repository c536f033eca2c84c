"""The sections of the GPU benchmark and their share of the time."""

from dataclasses import dataclass

__all__ = ["SECTIONS", "Section"]


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        title: Heading in the report.
        seconds: Seconds in a run of eight minutes; other run times are divided in proportion.
        lanes: Number of processes that share the checks on a GPU; 1 for everything that is timed.
        limit: Seconds after which a single check is ended and recorded as failed.
        stage: Sections of one stage run at the same time on a GPU, stages one after another.
        is_timed: Whether an error is only an error of a measurement, so that the exit status of
            the command is not 1.
    """

    title: str
    seconds: int
    lanes: int
    limit: int
    stage: int
    is_timed: bool = False


SECTIONS = {
    "correctness": Section("Correctness against float64", 170, 8, 120, 0),
    "extension": Section("CUDA extension", 170, 1, 280, 0),
    "end_to_end": Section("Training from end to end", 170, 3, 280, 0),
    "attention": Section("Attention", 130, 1, 120, 1, is_timed=True),
    "train": Section("Training steps", 160, 1, 180, 2, is_timed=True),
}
