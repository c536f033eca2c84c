"""Rows of the zoo: parameters and MACs, tables of documents, commands and their errors."""

import errno
import math
import os
import re
from pathlib import Path

import pytest
import yaml

from classification.models import PUBLISHED, default_cfgs
from engine import UsageError, UserError
from scripts.zoo.__main__ import main
from scripts.zoo.macs import cost_of
from scripts.zoo.rows import ROOT, TASKS, load_zoo
from tests.commands import failure_of

ROWS = load_zoo().rows
CLASSIFIERS = [row for row in ROWS if row.task == "classification"]
DETECTORS = [row for row in ROWS if row.task == "detection"]
TINY = CLASSIFIERS[0]
RELEASE = "https://github.com/wkcn/iRPE-model-zoo/releases/download/1.0"


def write_zoo(folder: Path, task: str = "classification", **rows: dict) -> Path:
    """Write a zoo whose rows have the configuration of the tiny model by default."""
    rows = {name: {"config": str(TINY.config_file)} | facts for name, facts in rows.items()}
    path = folder / "zoo.yaml"
    path.write_text(yaml.safe_dump({"source": "a test", task: rows}))
    return path


def without_checkpoint(folder: Path) -> Path:
    """Write a zoo whose only row, `mine`, has no checkpoint."""
    return write_zoo(folder, "detection", mine={"config": str(DETECTORS[0].config_file)})


@pytest.mark.parametrize("row", CLASSIFIERS, ids=lambda row: row.name)
def test_a_model_has_the_published_parameters_and_macs(row):
    cost = cost_of(row)
    assert f"{cost.params / 1e6:.2f}" == f"{row.published['params']:.2f}"
    assert math.ceil(cost.macs / 1e6) == row.published["macs"]


def test_irpe_on_values_costs_products_with_buckets_instead_of_keys():
    saved = [cost.macs - cost.macs_run for cost in map(cost_of, CLASSIFIERS)]
    # 12 blocks, 197 tokens, 50 buckets; DeiT-S has 384 channels, DeiT-B 768.
    assert saved == [0, 0, 0, 12 * 197 * (197 - 50) * 384, 0, 12 * 197 * (197 - 50) * 768]


def test_detectors_differ_in_cost_by_their_buckets():
    few, many, same = (cost_of(row) for row in DETECTORS)
    # Six tables of 32 channels by 49 or 81 buckets; 25 x 34 tokens in 8 heads and 6 layers.
    assert many.params - few.params == 6 * 32 * (81 - 49)
    assert many.macs_run - few.macs_run == 6 * 8 * 25 * 34 * 32 * (81 - 49)
    assert same == many


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_header_of_a_configuration_has_the_published_metrics(row):
    p = row.published
    if row.task == "classification":
        expected = f"top-1 {p['top1']:.1f}, top-5 {p['top5']:.1f}; {p['params']:.2f} M parameters, "
        expected += f"{p['macs']:.0f} M MACs"
    else:
        expected = ", ".join(f"{name} {value:.3f}" for name, value in p.items())
    text = row.config_file.read_text()
    assert f"# Expected  {expected}\n" in text
    assert (", published checkpoint\n" in text) == (row.checkpoint is not None)


def test_every_released_model_is_a_row_with_all_metrics_and_the_url_of_the_model():
    assert [row.name for row in CLASSIFIERS] == [
        name for name in PUBLISHED if default_cfgs[name].default.url
    ]
    for row in ROWS:
        assert row.published.keys() == {**TASKS[row.task].costs, **TASKS[row.task].metrics}.keys()
    urls = [row.checkpoint for row in ROWS if row.checkpoint]
    assert len(set(urls)) == len(ROWS) == 9
    assert len({url.rpartition("/")[0] for url in urls}) == 1
    for row in CLASSIFIERS:
        assert row.config.model == row.name
        assert row.checkpoint == default_cfgs[row.name].default.url
    for row in DETECTORS:
        suffix = "_300epochs" if row.config.epochs == 300 else ""
        assert row.checkpoint.endswith(f"/{row.config.enc_rpe2d}{suffix}.pth")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (TINY.name, TINY.name),
        ("rpe-1.9-product-ctx-1-k_150_epochs", "rpe-1.9-product-ctx-1-k"),
        ("rpe-2.0-product-ctx-1-k_300_epochs", "rpe-2.0-product-ctx-1-k_300epochs"),
    ],
)
def test_a_published_row_has_the_urls_of_its_checkpoint_and_its_logs(row, name, capsys):
    main(["list", "--urls", "--rows", row])
    assert capsys.readouterr().out.splitlines() == [
        f"{row}:",
        f"  {RELEASE}/{name}.pth",
        f"  {RELEASE}/log_{name}.txt",
        f"  {RELEASE}/detail_{name}.log",
    ]
    links = (
        f"| [link]({RELEASE}/{name}.pth) "
        f"| [log]({RELEASE}/log_{name}.txt) [detail]({RELEASE}/detail_{name}.log) |"
    )
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(line.endswith(links) for line in lines) == 1


def test_a_zoo_without_logs_has_links_to_checkpoints_alone(tmp_path, capsys):
    zoo = write_zoo(tmp_path, mine={"checkpoint": "http://x/mine.pth"})
    assert load_zoo(zoo).rows[0].logs is None
    path = tmp_path / "README.md"
    path.write_text("<!-- zoo: classification -->\n<!-- end of zoo -->\n")
    main(["readme", "--zoo", str(zoo), "--readme", str(path)])
    header, _, line = path.read_text().splitlines()[1:4]
    assert header.endswith("| Link                      |")
    assert line.endswith("| [link](http://x/mine.pth) |")
    main(["list", "--urls", "--zoo", str(zoo)])
    assert capsys.readouterr().out == "mine:\n  http://x/mine.pth\n"


def test_a_row_without_checkpoint_has_no_logs(tmp_path, capsys):
    zoo = without_checkpoint(tmp_path)
    zoo.write_text(f"logs: true\n{zoo.read_text()}")
    main(["list", "--urls", "--zoo", str(zoo)])
    assert capsys.readouterr().out == "mine:\n  not published\n"


def test_readme_has_the_tables_of_the_zoo():
    main(["readme", "--check"])


def test_readme_compares_the_macs_of_irpe_on_values_with_the_published_ones():
    costs = [cost_of(row) for row in CLASSIFIERS if "v" in row.rpe.rpe_on]
    run, published = (
        " and ".join(str(math.ceil(count / 1e6)) for count in counts)
        for counts in ([cost.macs_run for cost in costs], [cost.macs for cost in costs])
    )
    text = " ".join((ROOT / "README.md").read_text().split())
    assert run in text
    assert published in text


def test_an_outdated_readme_is_refused_and_updated(tmp_path):
    path = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text()
    path.write_text(text.replace("| 73.7  |", "| 73.8  |"))
    assert path.read_text() != text
    with pytest.raises(
        UserError, match=r"README\.md is out of date: run python -m scripts.zoo readme"
    ):
        main(["readme", "--check", "--readme", str(path)])
    main(["readme", "--readme", str(path)])
    assert path.read_text() == text


def test_a_readme_without_the_lines_of_a_table_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("<!-- zoo: classification -->\n<!-- end of zoo -->\n")
    with pytest.raises(UserError, match="must have the lines '<!-- zoo: detection -->'"):
        main(["readme", "--readme", str(path)])


def test_a_readme_in_another_encoding_is_refused_and_kept(tmp_path, capsys):
    path = tmp_path / "README.md"
    content = (ROOT / "README.md").read_text().replace("73.7", "73.8").encode("utf-16")
    path.write_bytes(content)
    code, line = failure_of(main, ["readme", "--readme", str(path)], capsys)
    assert (code, line) == (2, f"error: --readme {path}: not a text file in UTF-8")
    assert path.read_bytes() == content


def test_a_readme_that_cannot_be_written_is_kept_whole(tmp_path, capsys, monkeypatch):
    path = tmp_path / "README.md"
    stale = (ROOT / "README.md").read_text().replace("| 73.7  |", "| 73.8  |")
    path.write_text(stale)

    def full_disk(path: Path, text: str, **options: str) -> None:
        with path.open("w", **options) as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full_disk)
    code, line = failure_of(main, ["readme", "--readme", str(path)], capsys)
    assert (code, line) == (1, f"error: cannot write {path}: No space left on device")
    assert path.read_text() == stale
    assert list(tmp_path.iterdir()) == [path]


def test_table_prints_counted_and_published_values_and_fails_if_they_differ(tmp_path, capsys):
    zoo = write_zoo(
        tmp_path,
        right={"published": {"params": 5.76, "macs": 1284}},
        unknown={},
        wrong={"published": {"params": 5.76, "macs": 1283}},
    )
    code, line = failure_of(main, ["table", "--zoo", str(zoo)], capsys)
    assert (code, line) == (1, "error: wrong: MACs (M) must be 1283 as published, got 1284")
    main(["table", "--zoo", str(zoo), "--rows", "right", "unknown"])
    cells = [
        re.split(r"\s*\|\s*", line)[1:-1]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert cells[2:] == [
        ["right", "5.76", "5.76", "1284", "1284", "1284"],
        ["unknown", "5.76", "—", "1284", "—", "1284"],
    ]


def test_list_shows_which_checkpoints_are_in_the_cache(tmp_path, cache, capsys):
    cache.mkdir(parents=True)
    (cache / f"{TINY.name}.pth").write_bytes(b"here")
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    state = {row.name: next(x for x in lines if f"| {row.name} " in x) for row in ROWS}
    assert "| in the cache " in state[TINY.name]
    assert "| 73.7 " in state[TINY.name]
    assert sum("| not in the cache " in line for line in state.values()) == 8
    main(["list", "--zoo", str(without_checkpoint(tmp_path))])
    assert "| not published " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["list", "table", "download", "evaluate"])
def test_an_unknown_row_is_an_error_that_names_all_rows(command, capsys):
    code, line = failure_of(main, [command, "--rows", "deit_huge"], capsys)
    assert code == 2
    assert "'deit_huge'" in line
    assert all(row.name in line for row in ROWS)
    assert "(classification, detection)" in line


@pytest.mark.parametrize("command", ["download", "evaluate"])
def test_a_row_without_checkpoint_cannot_be_chosen(command, tmp_path, capsys):
    zoo = without_checkpoint(tmp_path)
    code, line = failure_of(main, [command, "--rows", "mine", "--zoo", str(zoo)], capsys)
    assert code == 2
    assert line == "error: --rows must have a published checkpoint, got 'mine'"


def test_a_row_without_checkpoint_is_skipped_among_all_rows(tmp_path, cache, capsys):
    zoo = without_checkpoint(tmp_path)
    main(["download", "--zoo", str(zoo)])
    data = ["--coco", str(tmp_path), "--device", "cpu"]
    main(["evaluate", "--zoo", str(zoo), "--output", str(tmp_path / "out"), *data])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "mine: its checkpoint is not published"
    assert printed[1] == "[1/1] mine: not run: its checkpoint is not published"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["tabel"], "tabel"),
        (["evaluate"], "needs a data set"),
        (["evaluate", "--coco", ".", "--nproc", "0"], "--nproc must be at least 1, got 0"),
        (["evaluate", "--imagenet", ".", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["evaluate", "--coco", ".", "--nproc", "two"], "--nproc: invalid int value: 'two'"),
        (["evaluate", "--coco", ".", "--device", "tpu"], "'tpu'"),
        (["table", "--zoo", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["readme", "--readme", "nowhere.md"], "nowhere.md: No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_option_is_an_error_in_one_line(argv, words, capsys):
    code, line = failure_of(main, argv, capsys)
    assert code == 2
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{source: x, classification: {a: {config: no.yaml}}}", "classification, a: .*no.yaml"),
        ("{source: x, classification: {a: {weights: b}}}", "a, weights: Extra inputs"),
        (
            "{source: x, classification: {a: {published: {AP: 1}}}}",
            "must be among .*top1, top5, got 'AP'",
        ),
        ("{source: x, detection: {a: {sha256: abc}}}", "detection, a, sha256"),
        (
            "{source: x, classification: {a: {}}, detection: {a: {}}}",
            "must be unique, got 'a' twice",
        ),
        (
            "{source: x, detection: {a: {checkpoint: 'http://x/a'}, b: {checkpoint: 'http://y/a'}}}",
            "must be unique, got http://x/a and http://y/a",
        ),
        ("{classification: {}}", "source: Field required"),
        ("[", "line 1: not valid YAML"),
        ("", "should be a valid dictionary"),
    ],
)
def test_an_invalid_zoo_is_an_error_that_names_the_key(content, words, tmp_path):
    path = tmp_path / "zoo.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        load_zoo(path)


def test_the_default_configuration_is_named_after_the_row(tmp_path):
    (tmp_path / "classification").mkdir()
    (tmp_path / "classification" / "mine.yaml").write_text("model: deit_tiny_patch16_224\n")
    (tmp_path / "zoo.yaml").write_text("{source: me, classification: {mine: {}}}")
    (row,) = load_zoo(tmp_path / "zoo.yaml").rows
    assert row.config.model == "deit_tiny_patch16_224"
    assert row.rpe is None
    assert row.checkpoint is None
