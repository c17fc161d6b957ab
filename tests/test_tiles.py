"""Sizes of Triton's tiles without Triton: the rule, a table that overrides it, what its file may hold, the tuner's command where there is no GPU."""

import json
import math

import pytest
import torch

from interflow_kernels.triton import tiles, tune

KEY = "tap_pixels channels=128 count=4096 bytes=2 max_pool=1"
SIZES = dict(rows=8, cols=32, part=256, num_warps=8, num_stages=2)
TAP = ("tap_pixels", 128, 112, 112, 2, True)  # VGG-16's first stage, bf16


@pytest.fixture
def unread(monkeypatch):
    """As at the start of a process: the table has not been read."""
    with tiles.replaced({}):
        monkeypatch.setattr(tiles, "_table", None)
        yield


def test_the_rule():
    """Pinned: other sizes are other bits."""
    with tiles.replaced({}):
        assert tiles.tap_pixels(*TAP) == ((25, 128, 16, 64), (4, 1))
        assert tiles.tap_pixels("tap_pixels_backward", 512, 14, 14, 4, False) == ((1, 224, 32, 64), (4, 1))
        assert tiles.tap_planes("tap_planes", 512, 28, 28, 2, True) == ((16, 64), (4, 1))
        assert tiles.head_pool(256, 56, 56, 2, True, None) == ((7, 512, 64, 64), (4, 1))
        assert tiles.head_pool(512, 14, 14, 4, False, None) == ((1, 256, 256, 16), (4, 1))
        assert tiles.head_pool(512, 14, 14, 4, False, 49) == ((1, 49, 64, 64), (4, 1))
        assert tiles.head_product("head_tail", 1000, 1408, "bfloat16", False) == ((16, 32, 32), (4, 3))
        assert tiles.head_product("head_scores", 10, 1408, "float32", True) == ((16, 16, 32), (4, 3))
        assert tiles.head_gradients(1000, 1408, "bfloat16") == ((32, 32, 64), (4, 3))
        assert tiles.head_gradients(1000, 1408, "bfloat16", True) == ((16, 16, 64), (4, 3))


def test_an_entry_serves_its_class_and_no_other():
    with tiles.replaced({}):
        rule = {shape: tiles.tap_pixels(*shape) for shape in (TAP, ("tap_pixels", 65, 90, 91, 2, True))}
        others = [("tap_pixels_backward", *TAP[1:]), ("tap_pixels", 129, *TAP[2:]), ("tap_pixels", 64, *TAP[2:]), ("tap_pixels", 128, 90, 90, 2, True)]
        others += [(*TAP[:4], 4, True), (*TAP[:5], False)]
        rule_of_others = [tiles.tap_pixels(*shape) for shape in others]
    with tiles.replaced({KEY: SIZES}) as asked:
        assert tiles.tap_pixels(*TAP) == ((13, 256, 8, 32), (8, 2))
        assert list(asked) == [KEY]
        for shape in rule:  # the smallest of the class too
            assert tiles.tap_pixels(*shape)[0][1:] == (256, 8, 32) and tiles.tap_pixels(*shape) != rule[shape]
        assert [tiles.tap_pixels(*shape) for shape in others] == rule_of_others
        with tiles.replaced({}):
            assert tiles.tap_pixels(*TAP) == rule[TAP]
        assert tiles.tap_pixels(*TAP) == ((13, 256, 8, 32), (8, 2))


@pytest.mark.parametrize("part", [1, 4, 64, 2**30])
@pytest.mark.parametrize("rows", [1, 16, 1024])
def test_parts_are_whole_tiles_and_cover_the_map(rows, part):
    for side in (1, 2, 9, 63, 64):
        n = side * side
        size = dict(rows=rows, cols=8, part=part, num_warps=4, num_stages=1)
        entries = {f"tap_pixels channels=8 count={tiles.power_of_two(n)} bytes=2 max_pool=0": size}
        entries[f"head_pool channels=8 count={tiles.power_of_two(n)} bytes=2 channels_last=1"] = size
        with tiles.replaced(entries):
            for (parts, found, tile, cols), _ in (tiles.tap_pixels("tap_pixels", 8, side, side, 2, False), tiles.head_pool(8, side, side, 2, True, None)):
                assert tile == min(rows, tiles.power_of_two(n)) and cols == 8  # no tile twice the map
                assert found % tile == 0 and (parts - 1) * found < n <= parts * found
                assert parts == 1 or found <= n


def test_no_class_names_the_batch():
    assert not {name for names, _ in tiles.KERNELS.values() for name in names} & {"batch", "images", "programs"}


def write(tmp_path, content):
    path = tmp_path / "tiles.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_file_is_read_once_and_puts_its_entries_to_use(tmp_path, monkeypatch, unread):
    path = write(tmp_path, {"tiles": {KEY: SIZES}, "environment": {"gpu": "none"}})
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert tiles.tap_pixels(*TAP) == ((13, 256, 8, 32), (8, 2))
    path.unlink()
    assert tiles.tap_pixels("tap_pixels", 128, 111, 111, 2, True)[0][2:] == (8, 32)
    assert tiles.described() == f"the rule, and those of {path} (classes: 1)"


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_the_rule_holds(value, monkeypatch, unread):
    monkeypatch.delenv(tiles.VARIABLE, raising=False) if value is None else monkeypatch.setenv(tiles.VARIABLE, value)
    assert tiles.tap_pixels(*TAP) == ((25, 128, 16, 64), (4, 1))
    assert tiles.described() == "the rule"


def entry(key=KEY, **change):
    return {"tiles": {key: {name: size for name, size in (SIZES | change).items() if size is not None}}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"tiles": {', "is no valid JSON (Expecting property name"),
        (f'{{"tiles": {{"{KEY}": {{}}, "{KEY}": {{}}}}}}', f"is no valid JSON ('{KEY}' stands in it twice)"),
        ([], 'must be an object {"tiles": {...}, "environment": {...}}'),
        ({"environment": {}}, 'must be an object {"tiles": {...}, "environment": {...}}'),
        ({"tiles": {}, "tile": {}}, "unknown key 'tile': it must be one of tiles, environment"),
        (entry("tap_pixel channels=128"), "unknown key 'tap_pixel channels=128': it must begin with one of tap_pixels, tap_pixels_backward, tap_planes"),
        (entry("tap_pixels channels=128 batch=4"), "behind 'tap_pixels' it must name channels=..., count=..., bytes=..., max_pool=..."),
        (entry(KEY.replace("128", "100")), "channels must be a power of two, got '100'"),
        (entry(KEY.replace("bytes=2", "bytes=8")), "bytes must be one of 2, 4, got '8'"),
        (entry("head_gradients classes=16 columns=64 dtype=float64"), "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        (entry(rows=24), f"'{KEY}': rows must be a power of two from 1 to 1024, got 24"),
        (entry(rows=0), "rows must be a power of two from 1 to 1024, got 0"),
        (entry(cols=4), "cols must be a power of two from 8 to 256, got 4"),
        (entry(cols=32.0), "cols must be a power of two from 8 to 256, got 32.0"),
        (entry(num_warps=True), "num_warps must be a power of two from 1 to 16, got True"),
        (entry(num_stages=9), "num_stages must be a whole number from 1 to 8, got 9"),
        (entry(rows=1024, cols=256), "rows times cols must be at most 32768, got 262144"),
        (entry(part=None), f"'{KEY}' must give rows, cols, part, num_warps, num_stages and nothing else, got rows, cols, num_warps, num_stages"),
        (entry(step=32), "and nothing else, got rows, cols, part, num_warps, num_stages, step"),
        ({"tiles": {KEY: 8}}, "and nothing else, got 8"),
    ],
    ids=lambda v: v[:40] if isinstance(v, str) else "",
)
def test_a_mistake_in_the_file_is_one_clear_sentence(content, sentence, tmp_path, monkeypatch, unread):
    path = str(write(tmp_path, content))
    monkeypatch.setenv(tiles.VARIABLE, path)
    for _ in range(2):  # at every call, not the first alone
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            tiles.tap_pixels(*TAP)
        assert str(caught.value).startswith(f"the environment variable INTERFLOW_TRITON_TILES, {path!r}: ")
        assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert sentence in tiles.described()


def test_a_missing_file_is_one_clear_sentence(tmp_path, monkeypatch, unread):
    path = str(tmp_path / "none.json")
    monkeypatch.setenv(tiles.VARIABLE, path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        tiles.head_gradients(10, 64, "float32")
    expected = f"{path!r}: cannot be read (No such file or directory); python -m interflow_kernels.triton.tune --out FILE writes one"
    assert str(caught.value) == f"the environment variable INTERFLOW_TRITON_TILES, {expected}"


# --- the tuner ------------------------------------------------------------------------------------------------------------
def test_candidates_are_few_and_each_could_stand_in_a_table():
    with tiles.replaced({}) as asked:
        for side in (1, 7, 112):
            for channels in (1, 128):
                tiles.tap_pixels("tap_pixels", channels, side, side, 2, True)
                tiles.tap_planes("tap_planes", channels, side, side, 4, False)
                tiles.head_pool(channels, side, side, 2, True, None)
                tiles.head_pool(channels, side, side, 2, False, None)
        tiles.head_product("head_tail", 1000, 1408, "bfloat16", False)
        tiles.head_gradients(10, 3, "float32")
    for key, rule in asked.items():
        assert tiles.mistake(key, rule) is None
        found = tune.candidates(key, rule)
        assert 4 <= len(found) <= 18
        assert dict(rule) not in found and all(found.count(each) == 1 for each in found)
        for each in found:
            assert tiles.mistake(key, each) is None
            assert {abs(math.log2(each[name] / rule[name])) for name in rule if name != "num_stages"} <= {0, 1}
    assert dict(asked[KEY], rows=32, num_warps=8) in tune.candidates(KEY, asked[KEY])


GRADIENTS = {"head_gradients classes=16 columns=64 dtype=float16": dict(images=16, classes=16, columns=16, num_warps=1, num_stages=3)}


@pytest.mark.parametrize("entries", [{}, {KEY: SIZES, **GRADIENTS}], ids=["none", "two"])
def test_what_the_tuner_writes_is_read_back(entries, tmp_path):
    text = tune.text_of(entries, {"gpu": 'a "GPU"', "date": "2026-01-02"})
    assert tiles.read(str(write(tmp_path, text))) == entries
    assert json.loads(text)["environment"] == {"gpu": 'a "GPU"', "date": "2026-01-02"}


@pytest.mark.skipif(torch.cuda.is_available() or torch.xpu.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path / "tiles.json"), "--batch", "1", "4", "--shapes", "8x4x4"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "The tuner measures on a GPU and cannot run here: torch sees none.\n" and captured.out == ""
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize(
    ("argument", "sentence"), [("--shapes=8x4", "a shape is CxHxW"), ("--shapes=8x0x4", "a shape is CxHxW"), ("--batch=0", "of at least 1")]
)
def test_arguments_of_the_command(argument, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        tune.main([argument])
    assert caught.value.code == 2 and sentence in capsys.readouterr().err
