"""Cases of options: YAML files and flags with wrong values, kinds, tags and syntax."""

import random
from itertools import pairwise
from pathlib import Path

import yaml

from classification.config import ClassificationConfig
from classification.main import main as classify
from detection.config import DetectionConfig
from detection.main import main as detect
from engine import dump, parse_config
from tests.campaign.base import CLASSIFIER, DETECTOR, Base
from tests.campaign.mutations import mutate_bytes, mutate_value
from tests.campaign.oracle import Verdict, trial

__all__ = ["flags_case", "yaml_case"]

_TAGS = (
    "!!int abc",
    "!!float x",
    "!!timestamp 0000-00-00",
    "!!bool maybe",
    "!!binary $",
    "!!set 1",
)
_SYNTAX = ("*a", "&a [*a]", "0000-01-01", "{", "[1, 2", "? x", "<<: 1", "'", "\0", "%x", "0o9", "~")
_WORDS = (
    *("", "0", "-1", "1", "0.5", "nan", "inf", "-inf", "1e400", "none", "true", "--", "-", "1 2"),
    *("[1, 2]", "{}", "x" * 300, "a/b/c", str(2**63), str(2**64), str(-(10**30)), "é", "\n", ","),
)
# Words of errors about a path that an option gives, or a word that belongs to no option.
_PLACES = ("folder", "checkpoint", "argument", "unknown flag")
# A valid value of these starts a compiler or a download, or writes outside of the case.
_LEFT_OUT = {"compile", "pretrained", "backbone_weights", "output_dir", "config"}


def yaml_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Mutate a YAML file of all options and train one step with it."""
    main, cls, flags, data = _trainer(rng, base)
    config = parse_config(cls, [*flags, *data, "--output_dir", str(folder / "output")], prog="")
    values = {key: value for key, value in dump(config).items() if key not in _LEFT_OUT}
    kind = rng.choice(("value", "value", "tag", "bytes"))
    place = ""
    if kind == "value":
        values, place = mutate_value(rng, values)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if kind == "tag":
        lines = text.splitlines()
        index = rng.randrange(len(lines))
        place = lines[index].partition(":")[0]
        lines[index] = f"{place}: {rng.choice(_TAGS + _SYNTAX)}"
        text = "\n".join(lines)
    content = text.encode("utf-8", "surrogatepass")
    path = folder / "input" / "run.yaml"
    path.parent.mkdir(parents=True)
    if kind == "bytes":
        content = mutate_bytes(rng, content)
    path.write_bytes(content)
    argv = ["--config", str(path), "--max_steps=1", "--output_dir", str(folder / "output")]
    argv += ["--backbone_weights=none"] if cls is DetectionConfig else []
    argv += _lost(flags, content)
    name = place.partition(".")[0]
    # Damaged bytes change any option, and an error names one as a flag.
    culprits = _culprits(name, path.name, *_PLACES, *(["--"] if kind == "bytes" else []))
    return trial(folder, main, argv, culprits=culprits, kept=[path, *base.folders])


def _lost(flags: list[str], content: bytes) -> list[str]:
    """Return the flags whose options a YAML file has lost; the default model is a large one."""
    pairs = [pair for pair in pairwise(flags) if pair[0].startswith("--")]
    return [
        word
        for name, value in pairs
        if not value.startswith("--") and f"{name[2:]}:".encode() not in content
        for word in (name, value)
    ]


def flags_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Add one to three flags with hostile words and train one step."""
    main, cls, flags, data = _trainer(rng, base)
    names = [name for name in cls.model_fields if name not in _LEFT_OUT]
    chosen = rng.sample(names, rng.choice((1, 1, 2, 3)))
    argv = [*flags, *data, "--max_steps=1", "--output_dir", str(folder / "output")]
    for name in chosen:
        word = rng.choice(_WORDS)
        argv += rng.choice(([f"--{name}={word}"], [f"--{name}", word], [f"--{name}"]))
    if rng.random() < 0.2:
        argv[rng.randrange(len(argv))] = rng.choice(_WORDS)
    culprits = [word for name in chosen for word in _culprits(name)]
    # A long value names itself.
    culprits += [word[:100] for word in _WORDS if len(word) > 100]
    return trial(folder, main, argv, culprits=[*culprits, *_PLACES, "--"], kept=base.folders)


def _trainer(rng: random.Random, base: Base) -> tuple:
    """Return the command of a trainer, its configuration, small flags and flags of its data."""
    return rng.choice(
        (
            (classify, ClassificationConfig, CLASSIFIER, ["--data_path", str(base.images)]),
            (detect, DetectionConfig, DETECTOR, ["--coco_path", str(base.scenes)]),
        )
    )


def _culprits(name: str, *others: str) -> list[str]:
    """Return the spellings of an option."""
    return [*([name, name.replace("_", "-")] if name else []), *others]
