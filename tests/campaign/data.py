"""Cases of data: annotations, zips, tars and images, read by trainers, check and prediction."""

import io
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from classification.main import main as classify
from classification.predict import main as predict_classes
from datasets.check.command import main as check
from detection.main import main as detect
from tests.campaign.base import CLASSIFIER, DETECTOR, Base
from tests.campaign.files import damage_image, write_special
from tests.campaign.mutations import mutate_bytes, mutate_value, nested
from tests.campaign.oracle import Verdict, trial

__all__ = ["annotations_case", "images_case", "tars_case", "zips_case"]


def annotations_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Mutate an annotation file and train, evaluate or check with it."""
    data = _copy(base.scenes, folder)
    path = data / "annotations" / f"instances_{rng.choice(('train', 'val'))}2017.json"
    content = json.loads(path.read_text())
    kind = rng.choice(("value",) * 6 + ("list", "bytes", "deep"))
    if kind == "bytes":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif kind == "deep":
        path.write_text("[" * 10**6 if rng.random() < 0.5 else json.dumps(nested(content, 500)))
    else:
        for _ in range(rng.choice((1, 1, 3))):
            # Most values of the file are numbers of annotations.
            part = rng.choice(("images", "annotations", "annotations", "categories"))
            if kind == "list" or not isinstance(content, dict) or not content.get(part):
                content, _ = mutate_value(rng, content)
            else:
                content[part], _ = mutate_value(rng, content[part])
        path.write_text(json.dumps(_with_json_keys(content), default=repr))
    return _use_scenes(rng, base, folder, data, culprits=(path.name, "scenes", "annotation"))


def zips_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Mutate a zip of images, or its index, and train, evaluate or check with it."""
    data = _copy(base.zipped, folder)
    path = data / f"{rng.choice(('train', 'val'))}2017.zip"
    kind = rng.choice(("bytes", "bytes", "directory", "members", "bomb", "index", "special"))
    if kind == "directory":  # The end of the file has sizes and offsets.
        content = path.read_bytes()
        path.write_bytes(content[:-500] + mutate_bytes(rng, content[-500:]))
    elif kind in ("members", "bomb"):
        _write_zip(rng, path, bomb=kind == "bomb")
    else:
        _damage(rng, path, kind)
    return _use_scenes(rng, base, folder, data, culprits=(path.stem, "index"))


def tars_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Mutate a tar of images, or its index, and train, evaluate or check with it."""
    data = _copy(base.images, folder)
    path = data / f"{rng.choice(('train', 'val'))}.tar"
    kind = rng.choice(("bytes", "bytes", "header", "members", "index", "special"))
    if kind == "header":
        content = bytearray(path.read_bytes())
        start = 512 * rng.randrange(len(content) // 512)
        content[start : start + 512] = _tar_header(rng, bytes(content[start : start + 512]))
        path.write_bytes(content)
    elif kind == "members":
        _write_tar(rng, path)
    else:
        _damage(rng, path, kind)
    return _use_folders(rng, base, folder, data, ["--load-tar"], culprits=(path.name, "images"))


def images_case(rng: random.Random, base: Base, folder: Path) -> Verdict:
    """Replace or damage one to all image files and train, evaluate, check or predict."""
    scenes = rng.random() < 0.4
    data = _copy(base.scenes if scenes else base.images, folder)
    files = sorted((*data.rglob("*.png"), *data.rglob("*.jpg")))
    for path in rng.sample(files, rng.choice((1, 2, len(files)))):
        damage_image(rng, path)
    culprits = ("images", "scenes", ".png", ".jpg")
    use = _use_scenes if scenes else _use_folders
    return use(rng, base, folder, data, culprits=culprits)


def _with_json_keys(tree: Any) -> Any:
    """Return nested values with text as keys, as JSON has them."""
    if isinstance(tree, dict):
        return {str(key): _with_json_keys(value) for key, value in tree.items()}
    return [_with_json_keys(value) for value in tree] if isinstance(tree, list) else tree


def _copy(source: Path, folder: Path) -> Path:
    """Copy data into the folder of the case."""
    return Path(shutil.copytree(source, folder / "input" / source.name))


def _use_scenes(
    rng: random.Random, base: Base, folder: Path, data: Path, *, culprits: tuple[str, ...]
) -> Verdict:
    """Train, evaluate or check with the data of detection."""
    saved = str(base.detector / "checkpoint.pth")
    masks = rng.choice(([], ["--masks"]))
    command, argv = rng.choice(
        (
            (detect, [*DETECTOR, *masks, "--max_steps=1", "--output_dir", str(folder / "output")]),
            (detect, [*DETECTOR, "--eval", "--resume", saved]),
            (check, [*masks, *rng.choice(([], ["--images", "--num_workers=1"]))]),
        )
    )
    return _trial(folder, command, [*argv, "--coco_path", str(data)], culprits, base)


def _use_folders(
    rng: random.Random,
    base: Base,
    folder: Path,
    data: Path,
    flags: list[str] | None = None,
    *,
    culprits: tuple[str, ...],
) -> Verdict:
    """Train, evaluate, check or predict with the data of classification."""
    saved = str(base.classifier / "checkpoint.pth")
    place = ["--data_path", str(data), *(flags or [])]
    images = data / "val.tar" if flags else data / "val"
    command, argv = rng.choice(
        (
            (classify, [*CLASSIFIER, *place, "--max_steps=1"]),
            (classify, [*CLASSIFIER, *place, "--eval", "--resume", saved]),
            (check, [*place, *rng.choice(([], ["--images", "--num_workers=1"]))]),
            (predict_classes, [saved, str(images), "--num_workers=0", "--device=cpu"]),
        )
    )
    return _trial(folder, command, argv, culprits, base)


def _trial(
    folder: Path,
    command: Callable[..., Any],
    argv: list[str],
    culprits: tuple[str, ...],
    base: Base,
) -> Verdict:
    """Run a command that must change neither the data of the case nor the base."""
    runner = _checked if command is check else command
    return trial(folder, runner, argv, culprits=culprits, kept=[folder / "input", *base.folders])


def _checked(argv: list[str]) -> int:
    """Run the check of a data set; its report is its answer, so findings are no failure."""
    code = check(argv)
    return 0 if code == 1 else code


def _damage(rng: random.Random, path: Path, kind: str) -> None:
    """Damage an archive or its index, or put something else in its place."""
    if kind == "index":
        index = path.with_name(f"{path.name}.index.npz")
        if index.exists() and rng.random() < 0.5:
            index.write_bytes(mutate_bytes(rng, index.read_bytes()))
        else:
            status = path.stat()
            np.savez(index, **_wrong_index(rng, (status.st_size, status.st_mtime_ns)))
    elif kind == "special":
        path.unlink()
        write_special(rng, path)
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))


def _wrong_index(rng: random.Random, signature: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the arrays of an index that has the right signature and wrong members."""
    names = np.frombuffer(b"a/0.png\0b/0.png\0c/0.png\0", dtype=np.uint8)
    many = rng.choice((2, 3, 3, 1000))
    return {
        "format": np.int64(1),
        "signature": np.array(signature),
        "names": rng.choice((names, names[:5], names.astype(np.float64), names.reshape(2, -1))),
        "offsets": np.full(many, rng.choice((-1, 0, 512, 2**40, 2**62))),
        "sizes": np.full(many, rng.choice((-1, 0, 10, 2**40, 2**62))),
    }


def _write_zip(rng: random.Random, path: Path, *, bomb: bool) -> None:
    """Write a zip again with other names, methods, doubled or huge members."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    method = zipfile.ZIP_DEFLATED if bomb else rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            if bomb and rng.random() < 0.5:
                content = content + b"\0" * rng.choice((10**6, 10**8))
            elif rng.random() < 0.3:
                name = rng.choice((f"../{name}", f"/{name}", name.upper(), f"{name}/", "é" * 50))
            archive.writestr(name, content)


def _tar_header(rng: random.Random, header: bytes) -> bytes:
    """Change a field of a tar's header and write its checksum again."""
    changed = bytearray(header)
    start, length = rng.choice(((0, 100), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)))
    field = rng.choice((b"7" * length, b"\xff" * length, b"\0" * length, rng.randbytes(length)))
    field = rng.choice(b"xgLKSV57").to_bytes() if length == 1 else field
    changed[start : start + length] = field
    if start != 148:
        changed[148:156] = b" " * 8
        changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def _write_tar(rng: random.Random, path: Path) -> None:
    """Write a tar again with links, devices, pax headers and other names."""
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar if info.isfile()]
    pax = (
        "size",
        "GNU.sparse.major",
        "GNU.sparse.realsize",
        "GNU.sparse.map",
        "path",
        "hdrcharset",
    )
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if rng.random() < 0.3:
                info.pax_headers = {rng.choice(pax): rng.choice(("1", "-1", "9" * 15, "x", "0,1"))}
            elif rng.random() < 0.3:
                info.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, b"Z"))
                info.linkname, info.size, content = name, 0, b""
            elif rng.random() < 0.3:
                info.name = rng.choice((f"../{name}", f"/{name}", "x" * 300, name, "é.png"))
            tar.addfile(info, io.BytesIO(content))
