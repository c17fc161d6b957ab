"""`interflow report`: what an evaluation counts, how much memory it takes, the page, and what is said where something is missing."""

import base64
import io
import re
import shutil
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from interflow_vision.cli import command as cli
from interflow_vision.data.order import SharedShuffle
from interflow_vision.reports import curves, page
from interflow_vision.reports.evaluation import BINS, Evaluation

pytestmark = pytest.mark.filterwarnings("ignore")


def answers(count=200, classes=4, branches=3, seed=0):
    """Random scores, classes, images, branches and terms."""
    torch.manual_seed(seed)
    z = torch.randn(count, branches, classes)
    return z.sum(1) * 2, torch.randint(classes, (count,)), torch.rand(count, 1, 3, 3), z, z * torch.rand(branches, 1)


def gathered(given, pieces=(200,), **options) -> Evaluation:
    logits, target, images, z, terms = given
    found = Evaluation(logits.shape[1], z.shape[1], **options)
    for part in zip(*(each.split(list(pieces)) for each in (logits, target, images, z, terms)), strict=True):
        found.update(*part)
    return found


def test_an_evaluation_counts_what_the_definitions_say():
    given = answers()
    found = gathered(given, (7, 1, 192))
    logits, target, _, z, terms = given
    answer, probability = logits.argmax(1), logits.softmax(1).max(1).values
    for a in range(4):
        for b in range(4):
            assert found.confusion[a, b] == sum(1 for t, p in zip(target, answer, strict=True) if (t, p) == (a, b))
    assert found.images == 200 and found.accuracy == pytest.approx((answer == target).float().mean().item())
    for k in range(4):
        for i in range(3):
            assert found.right[i, k] == ((z[:, i].argmax(1) == target) & (target == k)).sum()
        assert found.right[3, k] == ((answer == target) & (target == k)).sum()
    own = z.argmax(2) == target[:, None]
    for i in range(3):
        others = [j for j in range(3) if j != i]
        assert found.alone[i] == sum(bool(row[i]) and not row[others].any() for row in own)
        assert found.rescued[i] == (own[:, i] & (answer != target)).sum()
    torch.testing.assert_close(found.contribution.by_class(), terms.double().std(0))
    error = 0.0
    for j in range(BINS):
        inside = (probability >= j / BINS) & (probability < (j + 1) / BINS)
        if inside.any():
            error += inside.float().mean() * ((answer == target)[inside].float().mean() - probability[inside].mean()).abs()
    assert found.calibration_error == pytest.approx(float(error), abs=1e-5)
    top = logits.topk(4).indices
    assert found.top5 == (top == target[:, None]).any(1).sum() == 200


def test_pieces_do_not_matter():
    a, b = gathered(answers()), gathered(answers(), (50, 100, 50))
    for name in ("confusion", "right", "alone", "rescued", "calibration"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name))
    assert [each.confidence for each in a.mistakes()] == [each.confidence for each in b.mistakes()]


def test_the_most_confident_mistakes_are_kept():
    given = answers()
    logits, target, images, *_ = given
    found = gathered(given, (20,) * 10, mistakes=5).mistakes()
    probability, answer = logits.softmax(1).max(1)
    wrong = (answer != target).nonzero().flatten()
    expected = wrong[probability[wrong].argsort(descending=True)][:5]
    for each, i in zip(found, expected, strict=True):
        assert each.confidence == pytest.approx(probability[i].item()) and (each.target, each.answer) == (target[i], answer[i])
        assert torch.equal(each.image, images[i])


def test_precision_recall_and_confused_pairs():
    found = Evaluation(3, 0)
    found.confusion = torch.tensor([[5, 3, 0], [1, 9, 0], [0, 2, 0]])
    (n, precision, recall, f1), _, last = found.per_class()
    assert (n, precision, recall) == (8, pytest.approx(5 / 6), pytest.approx(5 / 8))
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    assert last[0] == 2 and last[1] != last[1] and last[2] == 0  # never answered: no precision
    assert found.confused() == [(0, 1, 3), (2, 1, 2), (1, 0, 1)]


def kept_bytes(found: Evaluation) -> int:
    """Of all tensors that an evaluation holds."""
    tensors = [each for each in (*vars(found).values(), *vars(found.contribution).values()) if isinstance(each, torch.Tensor)]
    return sum(each.untyped_storage().nbytes() for each in [*tensors, *(mistake.image for mistake in found.mistakes())])


def test_an_evaluation_does_not_grow_with_its_images():
    found = Evaluation(10, 4)
    sizes = []
    for _ in range(3):
        found.update(*answers(1000, 10, 4))
        sizes.append(kept_bytes(found))
    assert sizes[0] == sizes[1] == sizes[2] < 20_000 and len(found.mistakes()) == found.kept


@pytest.mark.slow
def test_memory_does_not_grow_with_ten_million_images():
    """The order in which images are read, and an evaluation; the bound is 8 bytes an image for the order alone."""
    count, batch = 10_000_000, 100_000
    tracemalloc.start()
    order = iter(SharedShuffle(range(count)))
    for _ in range(100_000):  # Python numbers come piece by piece
        next(order)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    found, given = Evaluation(10, 4), answers(batch, 10, 4)
    for _ in range(count // batch):
        found.update(*given)
    assert found.images == count and kept_bytes(found) < 20_000


class Reader(HTMLParser):
    """Collects what a page refers to, its texts and pictures; every tag must be closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.references, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.references += [values[name] for name in ("src", "href") if name in values]
        if tag == "img":
            self.pictures.append(values["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def command(lightning_cli, one_thread, monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["interflow", *map(str, arguments)])
        code = cli.main()
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def run_folder(lightning_cli, tmp_path_factory):
    """A run of two short epochs."""
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    quick = ("--model.width", "0.0625", "--data.size", "16", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2", "--trainer.max_epochs",
        "2", "--trainer.limit_test_batches", "2", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false")  # fmt: skip
    patch.setattr(sys, "argv", ["interflow", "fit", *quick])
    try:
        assert cli.main() == 0
    finally:
        patch.undo()
    return folder / "runs" / "digits" / "version_0"


def test_a_report_of_two_runs(command, run_folder, tmp_path):
    other = tmp_path / "other" / "version_1"
    shutil.copytree(run_folder, other)
    code, out, err = command("report", run_folder, other, "--out", tmp_path / "page.html")
    assert code == 0 and out == f"{tmp_path / 'page.html'}\n" and "interflow" not in err
    text = (tmp_path / "page.html").read_text()
    found = Reader(text)
    assert not found.open and all(each.startswith("data:image/png;base64,") for each in found.references)  # nothing from outside
    for url in found.pictures:
        with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
            picture.load()
    words = " ".join(found.words)
    for title in ("Summary", "Loss", "Accuracy", "Learning rate", "Throughput", "Contributions by epoch", "Gradient norms", "Calibration",
                  "Where each branch is right alone", "Each branch alone, by class", "Contributions by class", "Confusion matrix",
                  "The most confident mistakes", "The most frequent mistakes", "Class by class", "Configuration", "max_epochs: 2"):  # fmt: skip
        assert title in words, title
    assert "digits/version_0" in words and "other/version_1" in words
    accuracy = re.search(r"the model\s*</td><td>([\d.]+) %", text)
    logged = curves.read_log(run_folder)
    assert accuracy and 0 <= float(accuracy[1]) <= 100 and len(logged["test/accuracy"]) == 1
    assert len(found.pictures) > 2 * 24


def test_the_evaluation_of_a_report_is_that_of_the_test(command, run_folder, tmp_path):
    code, out, _ = command("test", "--ckpt_path", run_folder, "--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", tmp_path)
    assert code == 0
    logged = float(re.search(r"test/accuracy +\W+ +([\d.]+)", out)[1])
    assert command("report", run_folder, "--out", tmp_path / "page.html")[0] == 0
    text = (tmp_path / "page.html").read_text()
    assert float(re.search(r"the model</td><td>([\d.]+) %", text)[1]) == pytest.approx(100 * logged, abs=0.01)


def test_a_report_without_data_and_without_runs(command, run_folder, tmp_path):
    broken = tmp_path / "version_0"
    shutil.copytree(run_folder, broken)
    (broken / "checkpoints" / "best.ckpt").unlink()
    (broken / "checkpoints" / "last.ckpt").unlink()
    code, out, err = command("report", broken)
    assert code == 1 and Path(out.strip()) == broken / "report.html"
    assert len(err.splitlines()) == 1 and f"{broken} was not evaluated: the folder {broken} is not that of a run" in err
    assert "Not evaluated" in (broken / "report.html").read_text()
    assert command("report", broken, "--no-evaluation")[::2] == (0, "")
    for arguments, message in (
        ((), "the following arguments are required: RUN"),
        ((tmp_path / "none",), f"there is no run {tmp_path / 'none'}: give the folder of a run"),
        ((tmp_path,), "is not that of a run: it has neither config.yaml nor metrics.csv"),
        ((run_folder, "--out", run_folder / "config.yaml" / "x.html"), "cannot be written"),
    ):
        code, _, err = command("report", *arguments)
        assert code == 2 and len(err.splitlines()) == 1 and message in err, err


def test_a_checkpoint_whose_data_set_is_gone(command, run_folder, tmp_path):
    copy = tmp_path / "version_0"
    shutil.copytree(run_folder, copy)
    path = copy / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["datamodule_hyper_parameters"]["_class_path"] = "gone.Data"
    torch.save(content, path)
    code, _, err = command("report", copy)
    assert code == 1 and "the data set gone.Data of" in err and "cannot be made again: No module named 'gone'" in err


@pytest.mark.parametrize("classes", [3, 40])
def test_pages_escape_names_and_take_many_classes(classes, tmp_path):
    names = [f"<b>{i}&" for i in range(classes)]
    found = gathered(answers(200, classes))
    text = page.page([page.Run("<run>", tmp_path, {}, "a: <script>", evaluation=found, class_names=names)])
    assert not Reader(text).open and "<script>" not in text and "<b>" not in text and "&lt;b&gt;0&amp;" in text


def test_a_network_without_branches():
    found = Evaluation(3, 0)
    logits, target, images, *_ = answers(50, 3)
    found.update(logits, target, images)
    text = page.page([page.Run("plain", Path("folder"), {"train/loss": {0: 1.0}}, "", evaluation=found, class_names="abc")])
    assert "Confusion matrix" in text and "branch" not in text.lower()
