"""A check of a data set before training: `python -m datasets.check --help`.

It opens the data with the readers of the trainers, but collects all problems instead of stopping at
the first one. With `--images` it also decodes every image.
"""

from datasets.check.coco import check_coco
from datasets.check.findings import Finding, Report
from datasets.check.folders import check_folders
from datasets.check.page import format_page
from datasets.check.text import format_text

__all__ = ["Finding", "Report", "check_coco", "check_folders", "format_page", "format_text"]
