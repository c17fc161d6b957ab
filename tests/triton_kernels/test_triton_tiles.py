"""Under another table of tiles: results beside the fp64 reference, bits, batches; and what the tuner chooses by a made-up clock."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from test_triton_head import check as check_head
from test_triton_tap import check as check_tap

from interflow_kernels import FusedInterflowHead
from interflow_kernels.testing import HeadCase, TapCase, gradients, head_inputs, in_layout
from interflow_kernels.triton import tiles, tune
from interflow_kernels.triton.common.launch import noted
from interflow_kernels.triton.stage_tap.forward import stage_tap


def different(launches):
    return {(launch.kernel.__name__, launch.constants, launch.warps) for launch in launches}


def other_table(run, factor):
    """For every class that `run` looks up each size of the rule, and the warps, times `factor` as far as a table may go; and the rule's launches."""
    with tiles.replaced({}) as asked, noted(launching=False) as by_rule, suppress(AssertionError):
        run()
    entries = {}
    for key, rule in asked.items():
        limits = tiles.KERNELS[key.split(" ")[0]][1]
        entries[key] = {name: min(max(int(size * factor), limits[name][0]), limits[name][1]) for name, size in rule.items()}
        assert tiles.mistake(key, entries[key]) is None
    return entries, different(by_rule)


def check_under_another_table(run, factor):
    entries, by_rule = other_table(run, factor)
    with tiles.replaced(entries), noted() as launches:
        run()
    served = {launch.kernel.__name__ for launch in launches} & set(tiles.KERNELS)
    assert {name for name, *_ in different(launches) - by_rule} >= served, "the table was not used"
    assert {launch.warps for launch in launches if launch.kernel.__name__ in served} == {int(tiles.WARPS * factor)}
    return launches


@pytest.mark.parametrize(
    ("case", "factor"),
    [
        (TapCase((1, 10, 7, 9), torch.float16, "channels_last", True), 0.5),  # parts: the last to arrive adds them
        (TapCase((1, 10, 7, 9), torch.bfloat16, "channels_last", True), 2),
        (TapCase((2, 9, 5, 6), torch.float32, "channels_last", False), 0.5),
        (TapCase((1, 9, 9, 11), torch.bfloat16, "contiguous", True), 0.5),
        (TapCase((1, 9, 5, 6), torch.float16, "cropped", False), 0.25),
    ],
    ids=["parts", "larger", "mean", "planes", "planes' mean"],
)
def test_a_tap_under_another_table_agrees_with_the_reference(case, factor, device):
    launches = check_under_another_table(lambda: check_tap(case, device), factor)
    assert factor == 2 or case.layout != "channels_last" or launches[0].constants[8] == 2  # PARTS


@pytest.mark.parametrize(
    ("case", "factor"),
    [
        (HeadCase(1, ((9, 7, 5), (18, 1, 2)), 5, "classwise", layout="channels_last", dtype=torch.bfloat16), 0.5),  # parts that meet in the tail
        (HeadCase(1, ((9, 5, 5), (3, 8, 9)), 17, "gated", dtype=torch.float16), 2),
        (HeadCase(33, ((8, 1, 1),), 3, "nxn"), 0.5),  # images in three tiles
        (HeadCase(1, ((17, 5, 4),), 3, pool_size=(2, 1), layout="channels_last"), 0.5),
    ],
    ids=["parts", "larger", "batch", "bins"],
)
def test_a_head_under_another_table_agrees_with_the_reference(case, factor, device):
    check_under_another_table(lambda: check_head(case, device, use=("y",)), factor)


def images_of(case, device):
    """A function of chosen images: what a head gives for each of them, forward and backward."""
    head, maps = FusedInterflowHead.from_eager(case.head()).to(device), [x.to(device) for x in head_inputs(case)]
    dy = torch.randn(case.batch, case.classes, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)

    def run(chosen):
        outputs, grads = gradients(head, [in_layout(x[chosen], case.layout) for x in maps], dy[chosen], None)
        return [outputs["y"], outputs["branches"], *(grads[f"features[{i}]"] for i in range(len(maps)))]

    return run


@pytest.mark.parametrize(("attention", "dtype", "factor"), [("nxn", torch.float32, 0.5), ("gated", torch.bfloat16, 2)], ids=str)
def test_an_image_does_not_depend_on_its_batch_under_another_table(attention, dtype, factor, device):
    run = images_of(HeadCase(17, ((9, 2, 1), (8, 1, 1)), 3, attention, layout="channels_last", dtype=dtype), device)
    entries, _ = other_table(lambda: run([0]), factor)
    with tiles.replaced(entries) as asked:
        whole = run(torch.arange(17))
        chosen = [3, 16]
        for a, b in zip(whole, run(torch.tensor(chosen)), strict=True):
            assert torch.equal(a[chosen], b)
        assert set(asked) == set(entries)  # no batch asks for a class of its own


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_tap_of_an_image_does_not_depend_on_its_batch_under_another_table(layout, device):
    u = torch.randn(2, 24, 9, 8).to(device)
    run = lambda chosen: stage_tap(in_layout(u[chosen], layout), None, True, False)[:2]  # noqa: E731
    by_rule = run(torch.arange(2))
    entries, _ = other_table(lambda: run([0]), 0.25)
    with tiles.replaced(entries):
        whole = run(torch.arange(2))
        for chosen in ([1], [1, 0]):  # alone, and in another place
            assert all(torch.equal(a[chosen], b) for a, b in zip(whole, run(chosen), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(whole, run(torch.arange(2)), strict=True))
    assert torch.equal(whole[0], by_rule[0])  # a maximum has no order
    if layout == "channels_last":
        assert not torch.equal(whole[1], by_rule[1]), "another order of the sum, and no bit of 48 means moved: was the table used?"
    assert all(torch.equal(a, b) for a, b in zip(by_rule, run(torch.arange(2)), strict=True))  # the rule is back


# --- the tuner ------------------------------------------------------------------------------------------------------------
TAP = dict(shape=(8, 4, 4), dtype=torch.bfloat16, layout="channels_last", max_pool=True)
KEY = "tap_pixels channels=8 count=4 bytes=2 max_pool=1"


@pytest.fixture
def three(monkeypatch):
    """Of the candidates those of 2 and of 8 warps, and one that is clamped to the rule's launch, to save time under the interpreter."""
    whole = tune.candidates
    few = lambda key, rule: [e for e in whole(key, rule) if e["num_warps"] != 4 and e | {"num_warps": 4} == rule] + [dict(rule, cols=32)]  # noqa: E731
    monkeypatch.setattr(tune, "candidates", few)


def made(device):
    """Problems of a tap, of the forward kernel alone."""
    return lambda batch: replace(tune.tap_problem(batch, **TAP, device=device), kernels=("tap_pixels",))


def by_warps(**times):
    """A clock that only looks at the warps."""
    return lambda launch: times.get(f"w{launch.warps}", 1.0)


def no_spills(launch):
    return 0


def test_the_fastest_wins_and_is_written_with_its_gain(device, three):
    said = []
    entries = tune.tune([made(device)], [1, 2], by_warps(w4=1.0, w2=0.8, w8=0.5), no_spills, said.append)
    assert set(entries) == {KEY} and entries[KEY] == dict(rows=4, cols=8, part=4, num_warps=8, num_stages=1)
    assert said == [f"{KEY}: 2.00x (B=1 2.00x, B=2 2.00x): rows=4 cols=8 part=4 num_warps=8 num_stages=1; 2 timed, 0 passed over"]


def test_every_batch_counts(device, three):
    """8 warps halve the time of one image and quadruple that of three: the geometric mean decides."""
    clock = lambda launch: {(8, 1): 0.5, (8, 3): 4.0, (2, 1): 0.9, (2, 3): 0.9}.get((launch.warps, launch.programs), 1.0)  # noqa: E731
    entries = tune.tune([made(device)], [1, 3], clock, no_spills, lambda line: None)
    assert entries[KEY]["num_warps"] == 2


def test_less_than_noise_leaves_the_rule(device, three):
    said = []
    assert tune.tune([made(device)], [1], by_warps(w8=0.98), no_spills, said.append) == {}
    assert "the rule stays" in said[0]


def test_what_spills_is_passed_over(device, three):
    said = []
    spills = lambda launch: 12 if launch.warps == 8 else 0  # noqa: E731
    entries = tune.tune([made(device)], [1], by_warps(w2=0.8, w8=0.5), spills, said.append, verbose=True)
    assert entries[KEY]["num_warps"] == 2
    assert any("'num_warps': 8" in line and line.endswith("spills 12") for line in said)


def test_what_does_not_compile_is_passed_over(device, three):
    def clock(launch):
        if launch.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return {2: 0.8}.get(launch.warps, 1.0)

    said = []
    entries = tune.tune([made(device)], [1], clock, no_spills, said.append, verbose=True)
    assert entries[KEY]["num_warps"] == 2
    assert any(line.endswith("RuntimeError: out of resource: shared memory") for line in said)


@pytest.mark.parametrize("wrong", ["p", "m", "unwritten"])
def test_what_disagrees_with_the_reference_is_passed_over(wrong, device, three):
    """One mean off by 2e-6 of itself, one maximum by a step, or an output that nothing wrote."""

    def make(batch):
        problem = made(device)(batch)

        def run():
            outputs = problem.run()
            if tiles.table().get(KEY, {}).get("num_warps") == 8:
                if wrong == "unwritten":
                    outputs["du"] = torch.where(torch.empty_like(outputs["du"]).isnan(), torch.nan, outputs["du"])  # right, or stale
                elif wrong == "p":
                    outputs["p"][0, 3] *= 1 + 2e-6
                else:
                    outputs["m"][0, 2, 1, 1] += 1
            return outputs

        return replace(problem, run=run)

    said = []
    entries = tune.tune([make], [1], by_warps(w2=0.8, w8=0.5), no_spills, said.append, verbose=True)
    assert entries[KEY]["num_warps"] == 2
    assert any(f"disagrees with the reference: {'du' if wrong == 'unwritten' else wrong}[" in line for line in said)


def test_a_rule_that_is_wrong_is_an_error(device):
    def make(batch):
        problem = made(device)(batch)
        return replace(problem, expected=dict(problem.expected, p=problem.expected["p"] + 1))

    with pytest.raises(tune.Unfit, match="disagrees with the reference: p"):
        tune.tune([make], [1], by_warps(), no_spills, lambda line: None)


def test_a_class_is_tuned_once_and_its_own_kernel_is_timed(device, three):
    timed = []

    def clock(launch):
        timed.append(launch.kernel.__name__)
        return 1.0

    larger = lambda batch: tune.tap_problem(batch, **TAP | dict(shape=(7, 3, 4)), device=device)  # noqa: E731
    both = lambda batch: tune.tap_problem(batch, **TAP, device=device)  # noqa: E731
    said = []
    tune.tune([both, larger], [1], clock, no_spills, said.append)
    assert [line.split(" ")[0] for line in said] == ["tap_pixels", "tap_pixels_backward"]
    assert set(timed) == {"tap_pixels", "tap_pixels_backward"}


def test_a_networks_cases_reach_every_kernel(device):
    found = set()
    for make in tune.cases([(8, 2, 2)], [3], [torch.bfloat16], device):
        problem = make(1)
        launches = [tune.launched(problem, kernel, {}) for kernel in problem.kernels[-1:]]
        with noted(launching=False) as noted_too:
            problem.run()
        assert {launch.kernel.__name__ for launch in noted_too} >= set(problem.kernels)
        found |= set(problem.kernels) | {launch.kernel.__name__ for launch in launches}
    assert found == set(tiles.KERNELS)


def test_a_tuned_table_is_read_back_and_serves(device, three, tmp_path, monkeypatch):
    entries = tune.tune([made(device)], [1], by_warps(w8=0.5), no_spills, lambda line: None)
    path = tmp_path / "tiles.json"
    path.write_text(tune.text_of(entries, {"gpu": "none"}))
    assert json.loads(path.read_text())["environment"] == {"gpu": "none"}
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    problem = made(device)(2)
    with tiles.replaced({}), noted() as launches:
        monkeypatch.setattr(tiles, "_table", None)
        problem.run()
    assert {launch.kernel.__name__: launch.warps for launch in launches} == {"tap_pixels": 8, "tap_pixels_backward": 4, "sum_rows": 4}


@pytest.mark.gpu
def test_the_command_on_a_gpu(device, three, tmp_path, monkeypatch):
    cases = tune.cases
    monkeypatch.setattr(tune, "cases", lambda *arguments: list(cases(*arguments))[::7])  # a tap and a head
    out = tmp_path / "tiles.json"
    assert tune.main(["--out", str(out), "--batch", "2", "--shapes", "64x16x16", "--classes", "10", "--verbose"]) == 0
    written = json.loads(out.read_text())
    assert tiles.read(str(out)) == written["tiles"]
    assert {"gpu", "torch", "triton", "date"} <= set(written["environment"])
