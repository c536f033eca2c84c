"""Learning curves: several runs in one picture, and errors of one line."""

import json
import sys

import pytest
from matplotlib.figure import Figure
from PIL import Image

from engine import UserError
from scripts.plot import main, read_log
from tests.commands import failure_of


@pytest.fixture
def runs(tmp_path):
    """Return the folders of a classifier's run and of a detector's, which evaluates rarely."""
    for name, metric in (("classifier", "test_acc1"), ("detector", "test_AP")):
        (tmp_path / name).mkdir()
        lines = [
            {"epoch": epoch, "train_loss": 3 - epoch, "train_lr": 0.1, "n_parameters": 5}
            | ({"test_loss": 2 - epoch, metric: epoch / 9} if epoch % 2 else {})
            for epoch in range(4)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 4, "tra'
        (tmp_path / name / "log.txt").write_text(text)
    return tmp_path / "classifier", tmp_path / "detector"


@pytest.fixture
def figures(monkeypatch):
    """Return the list of the figures that are saved."""
    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: saved.append(self) or savefig(self, *a, **k)
    )
    return saved


def curves(figure):
    """Return the points of all curves by panel and label."""
    return {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes
        if axes.axison
    }


def test_one_run_is_drawn_into_its_folder(runs, figures, capsys):
    main([str(runs[0])])
    assert capsys.readouterr().out.strip() == str(runs[0] / "curves.png")
    with Image.open(runs[0] / "curves.png") as image:
        assert image.format == "PNG"
    (figure,) = figures
    drawn = curves(figure)
    assert list(drawn) == ["loss", "top-1 accuracy in %", "learning rate"]
    assert drawn["loss"] == {
        "train_loss": [[0, 3], [1, 2], [2, 1], [3, 0]],
        "test_loss": [[1, 1], [3, -1]],
    }


def test_several_runs_share_a_picture(runs, figures, tmp_path):
    main([*map(str, runs), "--output", str(tmp_path / "both.svg")])
    assert "<svg" in (tmp_path / "both.svg").read_text()
    drawn = curves(figures[0])
    assert set(drawn["loss"]) == {
        f"{run}  {name}"
        for run in ("classifier", "detector")
        for name in ("train_loss", "test_loss")
    }
    assert list(drawn["box AP"]) == ["detector"]
    colors = {line.get_color() for line in figures[0].axes[0].lines}
    assert len(colors) == 2


def test_chosen_metrics_and_log_files_are_drawn(runs, figures):
    main([str(runs[1] / "log.txt"), "--metrics", "test_AP", "train_lr"])
    drawn = curves(figures[0])
    assert list(drawn) == ["test_AP", "train_lr"]
    assert list(drawn["test_AP"].values()) == [[[1, 1 / 9], [3, 3 / 9]]]


def test_folders_of_the_same_name_are_labeled_with_their_paths(runs, figures, tmp_path):
    runs[1].rename(tmp_path / "other")
    (tmp_path / "other").rename(runs[0] / "classifier")
    paths = [str(runs[0]), str(runs[0] / "classifier")]
    main(paths)
    assert list(curves(figures[0])["learning rate"]) == paths


def test_an_incomplete_line_is_left_out(runs):
    assert [record["epoch"] for record in read_log(runs[0])] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{}/missing"], "cannot read {}/missing: No such file or directory"),
        (["{}/empty"], "{}/empty/log.txt has no finished epoch"),
        (["{}/picture"], "cannot read {}/picture: not a text file"),
        (
            ["{}/classifier", "--metrics", "test_AP"],
            "no run has the metric test_AP; they have test_",
        ),
        (["{}/classifier", "--output", "{}/x.doc"], "cannot write {}/x.doc: Format 'doc' is not"),
        (["{}/classifier", "--output", "{}/no/x.png"], "cannot write {}/no/x.png: No such file"),
    ],
    ids=["missing", "empty", "picture", "metric", "format", "folder"],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, argv, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.txt").write_text("[1]\n{}\n")
    (tmp_path / "picture").write_bytes(bytes(range(256)))
    code, line = failure_of(main, [word.format(tmp_path) for word in argv], capsys)
    assert code == 1
    assert expected.format(tmp_path) in line


def test_without_matplotlib_the_error_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs the package matplotlib: pip install matplotlib"):
        main([str(runs[0])])
