"""Tests of the written digits: complete or not at all, equal in folders and tars."""

import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datasets import DataError, build_imagenet, embedded
from datasets.embedded import write_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "new" / "digits")


def contents(root: Path) -> dict[str, bytes]:
    """Return {name: content} of the files in a folder, without the stored indices."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.endswith(".index.npz")
    }


@pytest.mark.parametrize(("split", "count"), [("train", 1438), ("val", 359)])
def test_folder_and_tar_hold_the_same_balanced_split(digits: Path, split: str, count: int) -> None:
    folder = build_imagenet(digits, split)
    tar = build_imagenet(digits, split, load_tar=True)
    assert len(folder) == count
    assert folder.samples == tar.samples
    assert folder.classes == tar.classes == list("0123456789")
    assert all(np.array_equal(folder[i][0], tar[i][0]) for i in range(0, count, 29))
    shares = Counter(folder.targets.tolist())
    assert max(shares.values()) - min(shares.values()) <= 0.08 * count / 10 + 1


def test_the_splits_divide_the_images_of_scikit_learn(digits: Path) -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    numbers = []
    for split in ("train", "val"):
        data = build_imagenet(digits, split)
        for i in range(len(data)):
            name, target = data.names[i], int(data.targets[i])
            number = int(Path(name).stem)
            numbers.append(number)
            assert labels[number] == target
            if i % 50 == 0:
                ink = np.asarray(data[i][0])[..., 0] * (16 / 255)
                assert np.abs(ink.reshape(-1) - images[number]).max() < 0.04
    assert sorted(numbers) == list(range(1797))


def test_writing_again_changes_nothing_and_another_folder_gets_the_same(
    digits: Path, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*")}
    assert write_digits(digits) == digits
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*")} == before
    (tmp_path / "empty").mkdir()
    assert contents(write_digits(tmp_path / "empty")) == contents(digits)


def test_several_threads_can_write_at_the_same_time(tmp_path: Path, digits: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(write_digits, [tmp_path / "digits"] * 4))
    assert roots == [tmp_path / "digits"] * 4
    assert contents(tmp_path / "digits") == contents(digits)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, files: dict[str, bytes]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(embedded, "_write_tar", fail)
        with pytest.raises(DataError, match=r"cannot write the digits.*No space left"):
            write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []
    assert (write_digits(tmp_path / "digits") / "val.tar").is_file()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_other_data_is_not_changed(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "ImageNet"
    if kind == "folder":
        (root / "train" / "n01440764").mkdir(parents=True)
    else:
        root.write_text("")
    with pytest.raises(DataError, match="ImageNet holds other files"):
        write_digits(root)
    assert len(list(tmp_path.rglob("*"))) == (3 if kind == "folder" else 1)


def test_the_command_writes_the_digits(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    command = [sys.executable, "-m", "datasets.embedded", str(root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{root}\n", "")
    assert (root / "val.tar").is_file()


def test_without_scikit_learn_the_installation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"need scikit-learn .*: pip install scikit-learn$"):
        write_digits(tmp_path / "digits")


def test_the_command_fails_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with pytest.raises(SystemExit) as caught:
        embedded.main([str(tmp_path)])
    # With a string as the code, Python prints it to stderr and exits with status 1.
    assert str(caught.value.code).startswith(f"error: {tmp_path} holds other files")
    assert "\n" not in caught.value.code
