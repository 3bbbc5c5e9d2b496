"""Chapter 4: superclasses, the generated set that has them, its parameters, what its figures and tables take."""

import base64
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from stiffkit import archives, claims, data, endpoints, group_stiffness, hovering, relatedness, results, sentences
from stiffkit.chapters import ParameterError, Superclasses
from stiffkit.endpoints import beyond_inputs, realm_excess, superclass_excess
from stiffkit.experiment import SCALES, Experiment, stages
from stiffkit.measurement import input_similarity, measure, measured_points
from stiffkit.models import build_model
from stiffkit.statistics import partial_mantel
from stiffkit.superclasses import REALMS, SUPERCLASSES, classes_of, realm_of, superclass_of
from stiffkit.sweeps import Sweep

ROOT = Path(__file__).resolve().parent.parent
OWN = {name: runs for name, runs in claims.read().runs.items() if runs.chapter == 4}
QUICK = {"dataset": "hierarchy", "epochs": 2, "points": 3, "seeds": 2, "permutations": 99}


# Superclasses


@pytest.mark.parametrize(("dataset", "classes", "superclasses"), [("cifar100", 100, 20), ("hierarchy", 24, 6)])
def test_every_class_has_one_superclass_and_every_superclass_one_realm(dataset, classes, superclasses):
    names = classes_of(dataset)
    assert len(set(names)) == len(names) == classes
    assert len(set(superclass_of(names))) == superclasses
    assert {len(group) for group in SUPERCLASSES[dataset].values()} == {classes // superclasses}
    grouped = [name for realm in REALMS[dataset].values() for name in realm.superclasses]
    assert sorted(grouped) == sorted(SUPERCLASSES[dataset])
    assert all(len(realm.reason) > 10 for realm in REALMS[dataset].values())
    assert len(set(realm_of(names))) == 2


def test_a_class_without_a_superclass_is_named_with_the_sets_that_have_them():
    with pytest.raises(ValueError, match=r"'Sneaker'; data sets with superclasses are hierarchy, cifar100"):
        superclass_of(["apple", "Sneaker"])


def test_the_table_is_that_of_the_official_files():
    path = archives.location("cifar100")
    if not path.exists():
        pytest.skip(f"{path} is not there (stiffkit data fetch cifar100)")
    with np.load(path) as file:
        if "superclass_of" not in file.files:
            pytest.skip("the file has no superclasses")
        names = [str(file["superclasses"][k]) for k in file["superclass_of"]]
        assert tuple(map(str, file["classes"])) == classes_of("cifar100")
    assert tuple(names) == superclass_of(classes_of("cifar100"))


def test_the_generated_set_shows_its_groups():
    """Mean images are alike within superclasses, less so within realms, and least between realms."""
    hierarchy = data.load("hierarchy")
    assert hierarchy.classes == classes_of("hierarchy")
    assert archives.verify("hierarchy") == hierarchy.checksum
    x, y = hierarchy.train
    means = torch.stack([x[y == k].flatten(1).mean(0) for k in range(24)])
    C = xr.DataArray(torch.corrcoef(means), dims=("class_a", "class_b"))
    groups = superclass_of(hierarchy.classes)
    near = group_stiffness(C, groups)
    same = np.equal.outer(groups, groups)
    far = group_stiffness(C.where(xr.DataArray(~same, dims=C.dims)), realm_of(hierarchy.classes))
    assert near.related > far.related + 0.2 > far.unrelated + 0.3


def test_scales_are_those_of_the_data():
    for name in ("digits", "hierarchy"):
        loaded = data.load(name)
        scale = SCALES[name]
        assert (len(loaded.train[1]), len(loaded.classes)) == (scale.images, scale.classes)
        for most in (scale.points, scale.most):
            assert len(data.balanced_subset(loaded.validation[1], most, 1)) == most
    assert set(SCALES) == {*data.NAMES, *sentences.NAMES}


# Parameters and runs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "mnist"}, "allowed are hierarchy, cifar100, those whose classes have superclasses"),
        ({"dataset": "hierarchy", "model": "cnn_v1"}, "16 x 16 pixels"),
        ({"dataset": "hierarchy", "points": 1}, "hierarchy allows 2 to 20 of each class"),
        ({"dataset": "hierarchy", "points": 48}, "hierarchy allows 2 to 20 of each class"),
        ({"batch_norm": True}, "-p model resnet20"),
        ({"permutations": 10}, "greater than or equal to 99"),
        ({"model": "resnet50"}, "allowed are fc, cnn, cnn_v1, resnet20"),
        ({"arithmetic": "exact"}, "unknown parameter 'arithmetic'"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(values, words):
    with pytest.raises(ParameterError) as caught:
        Superclasses.check(values)
    assert words in str(caught.value)


def test_the_parameters_are_the_ledgers_runs():
    for name, values in (
        ("cifar100", {}),
        ("cifar100_resnet20", {"model": "resnet20", "learning_rate": 3e-4}),
        ("cifar100_resnet20_fast", {"model": "resnet20", "seeds": 1}),
        ("cifar100_resnet20_norm", {"model": "resnet20", "batch_norm": True}),
    ):
        assert Superclasses.check(values).experiments == OWN[name].experiments()
    assert set(OWN["cifar100_shuffled"].experiments()) <= set(Superclasses().shuffled)
    for path in ROOT.rglob("parameters/paper/04_*.yml"):
        chosen = Superclasses.check(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert chosen.experiments == OWN[f"cifar100_{path.stem.removeprefix('04_')}"].experiments()
        assert sum(e.minutes for e in chosen.experiments) <= chosen.max_minutes


def test_every_planned_run_is_in_a_committed_sweep():
    swept = {e for path in ROOT.glob("book/sweeps/04_*.yml") for e in Sweep.read(path).experiments}
    assert {e for runs in OWN.values() for e in runs.experiments()} == swept


def test_planned_runs_that_are_nowhere_are_named(no_runs):
    with pytest.raises(ParameterError, match=r"no run of cifar100.*stiffkit sweep"):
        relatedness.results(Superclasses())


# What is measured


@pytest.fixture(scope="module")
def measured(one_thread):
    hierarchy = data.load("hierarchy")
    model = build_model("fc", hierarchy, 1)
    points = measured_points(hierarchy, 72, 1)
    groups = {"superclass": superclass_of(hierarchy.classes), "realm": realm_of(hierarchy.classes)}
    return model, points, groups, measure(model, *points, errors=False, groups=groups)


def test_means_by_superclass_and_by_realm_are_those_of_their_cells(measured):
    _, _, groups, found = measured
    C = found.stiffness.sel(arithmetic="exact", regime="val-val", measure="cos").values
    superclass, realm = (np.equal.outer(*[np.array(groups[name])] * 2) for name in ("superclass", "realm"))
    own = np.eye(24, dtype=bool)
    here = found.sel(arithmetic="exact", regime="val-val", measure="cos")
    for name, cells in {
        "within": own,
        "related": superclass & ~own,
        "unrelated": ~superclass,
        "realm_related": realm & ~superclass,
        "realm_unrelated": ~realm,
    }.items():
        assert float(here[name]) == pytest.approx(C[cells].mean())


def test_the_scale_of_logits(measured):
    model, (training, _), _, found = measured
    with torch.no_grad():
        z = model(training[0]).double()
    expected = (z - z.mean(1, keepdim=True)).square().mean(1).sqrt().mean()
    assert float(found.logit_scale.sel(part="train")) == pytest.approx(float(expected))


def test_similarity_of_inputs_leaves_points_with_themselves_out(measured):
    _, (training, validation), _, _ = measured
    found = input_similarity(training, validation)
    x, y = training[0].flatten(1).double(), training[1]
    unit = x / x.norm(dim=1, keepdim=True)
    cos = unit @ unit.T
    cos.fill_diagonal_(torch.nan)
    for a, b in ((0, 0), (0, 1), (5, 20)):
        cell = cos[y == a][:, y == b].nanmean()
        assert float(found.sel(regime="train-train", class_a=a, class_b=b)) == pytest.approx(float(cell))


# What is shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        p = Superclasses(**QUICK)
        p.prepare(progress=False)
        yield p, relatedness.results(p), relatedness.shuffled(p)


def test_other_arithmetics_are_measured_at_the_end_alone(shown):
    _p, runs, _ = shown
    clipped = runs.within.sel(arithmetic="keras2019").isel(seed=0, regime=0, measure=0)
    assert clipped.notnull().values.tolist() == [False] * (runs.sizes["images"] - 1) + [True]
    assert runs.within.sel(arithmetic="exact").notnull().all()


def test_seeds_that_have_not_learnt_are_left_out_and_named(shown, monkeypatch):
    p, runs, _ = shown
    uniform = np.log(24)
    loss = runs.loss.where(runs.seed == 1, uniform).where((runs.seed == 2) | (runs.images == 0), 1.0)
    for learnt, seeds, left_out in ((loss, [1], [2]), (0 * loss + uniform, [1, 2], [])):
        monkeypatch.setattr(Superclasses, "found", lambda *_, learnt=learnt: runs.assign(loss=learnt))
        found = relatedness.results(p)
        assert (found.seed.values.tolist(), found.attrs["left_out"]) == (seeds, left_out)
    monkeypatch.setattr(Superclasses, "found", lambda *_: runs.assign(loss=loss))
    assert "Left out: seed 2, whose loss" in relatedness.description(p, relatedness.results(p))
    assert "Left out" not in relatedness.description(p, runs.assign_attrs(left_out=[]))


def test_where_all_classes_are_alike_nothing_is_left_to_explain(shown):
    p, runs, _ = shown
    last = runs.images == runs.images[-1]
    uniform = runs.assign(stiffness=runs.stiffness.where(~last, -1 / 23))
    table = relatedness.beyond(p, {"true labels": runs, "labels shuffled": uniform})
    assert set(table.loc["labels shuffled, sign"]) == {"all cells alike", "", "2"}
    assert float(table.loc["true labels, sign", "correlation alone"].replace("\N{MINUS SIGN}", "-"))
    found = endpoints.beyond_inputs(uniform, "cos", "val-val", "late")
    assert found.isnull().all()
    assert endpoints.beyond_inputs(runs, "cos", "val-val", "late").notnull().all()


def test_matrices_are_ordered_and_named(shown):
    _, runs, _ = shown
    C = relatedness.matrices(runs, "val-val", "sign")
    assert C.dims == ("stage", "class_a", "class_b")
    assert C.sizes["stage"] == 4
    assert C.stage.values[0] == "before training"
    assert C.class_a.values.tolist() == list(classes_of("hierarchy"))  # whose order is that of the groups already
    assert C.superclass.values.tolist() == list(superclass_of(classes_of("hierarchy")))
    names = list(classes_of("cifar100"))
    cells = xr.DataArray(np.arange(10_000.0).reshape(100, 100), dims=("class_a", "class_b"))
    ordered = relatedness.in_order(cells, names)
    groups = list(ordered.superclass.values)
    assert len([1 for a, b in itertools.pairwise(groups) if a != b]) == 19, "superclasses lie together"
    assert float(ordered.sel(class_a="wolf", class_b="apple")) == 100 * names.index("wolf") + names.index("apple")


def test_tests_of_the_grouping(shown):
    p, runs, _ = shown
    C = relatedness.matrices(runs, "val-val", "sign")
    found = relatedness.groupings(p, C)
    assert list(found) == list(C.stage.values)
    last = runs.sel(arithmetic="exact", regime="val-val", measure="sign").isel(images=-1).mean("seed")
    assert float(found[list(found)[-1]].observed) == pytest.approx(float(last.related - last.unrelated))
    table = relatedness.tests(p, runs)
    assert len(table) == 6
    assert {"p, before training", "p, at the end", "effect, at the end"} <= set(table.columns)


def test_realms_are_means_between_superclasses(shown):
    p, runs, _ = shown
    here = runs.sel(arithmetic="exact", regime="val-val", measure="cos").isel(images=-1).mean("seed")
    row = relatedness.realms(p, runs).iloc[-1]
    assert float(row["one realm"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(float(here.realm_related), abs=6e-4)
    assert float(row["two realms"].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        float(here.realm_unrelated), abs=6e-4
    )


def test_what_is_beyond_the_inputs(shown):
    p, runs, shuffled = shown
    table = relatedness.beyond(p, {"true labels": runs, **shuffled})
    assert table.index.tolist() == [
        f"{name}, {measure}" for name in ("true labels", "labels shuffled") for measure in ("sign", "cosine")
    ]
    found = beyond_inputs(runs, "sign", "val-val", "last")
    C = runs.stiffness.sel(arithmetic="exact", regime="val-val", measure="sign", seed=2)
    expected = partial_mantel(
        C.isel(images=-1),
        superclass_of(classes_of("hierarchy")),
        [runs.input_similarity.sel(regime="val-val", seed=2), C.isel(images=0)],
        permutations=2,
    )
    assert float(found.sel(seed=2)) == pytest.approx(float(expected.observed))


def test_excesses_are_differences_of_means(shown):
    _, runs, _ = shown
    here = runs.sel(arithmetic="exact", regime="train-val", measure="cos")
    for at, place in (("start", 0), ("last", -1)):
        one = here.isel(images=place)
        np.testing.assert_allclose(superclass_excess(runs, "cos", "train-val", at), one.related - one.unrelated)
        np.testing.assert_allclose(realm_excess(runs, "cos", "train-val", at), one.realm_related - one.realm_unrelated)


def test_tables_and_sentences(shown):
    p, runs, _ = shown
    assert "`hierarchy`, network `fc`, 2 epochs, 2 seeds, 72 + 72 images (cached)" in relatedness.description(p, runs)
    assert relatedness.realms(p, runs).shape == (8, 4)
    assert relatedness.by_superclass(runs, "val-val", "sign").index.tolist() == list(SUPERCLASSES["hierarchy"])
    assert set(relatedness.reasons(Superclasses()).index) == {"living", "not living"}
    assert list(relatedness.through_training(runs, "val-val")) == ["sign", "cosine"]


def test_the_matrix_to_point_at_holds_every_value(shown):
    _, runs, _ = shown
    C = relatedness.matrices(runs, "val-val", "cos")
    page = hovering.matrix(C, 'a "matrix"')
    (values,) = re.findall(r'atob\("([^"]+)"\)', page)
    stored = np.frombuffer(base64.b64decode(values), "<i2").reshape(C.shape) / 10_000
    np.testing.assert_allclose(stored, C, atol=6e-5)
    empty = hovering.matrix(C.where(C.class_a != "A1a"), "x")
    (values,) = re.findall(r'atob\("([^"]+)"\)', empty)
    assert (np.frombuffer(base64.b64decode(values), "<i2").reshape(C.shape)[:, 0] == hovering.NOTHING).all()
    (names,) = re.findall(r"names = (\[.*?\]), groups", page)
    assert json.loads(names) == C.class_a.values.tolist()
    assert 'aria-label="a &quot;matrix&quot;"' in page
    assert "http" not in page, "it works without a network"


def test_a_network_with_batch_norm_trains_in_train_mode_and_goes_on_where_it_stopped(own_folders, monkeypatch):
    """A run that was stopped after its first checkpoints gives the numbers of one that was not."""
    from stiffkit import experiment as module

    e = Experiment.of(
        dataset="hierarchy",
        model="resnet20",
        epochs=0.2,
        seed=1,
        batch_norm=True,
        points=48,
        checkpoints=(0, 64, 128, 192),
        arithmetics=("exact",),
    )
    whole = module.compute([e], progress=False)[0]
    calls, evaluated = [], module.evaluate

    def stops(model, points):
        assert not model.training
        calls.append(1)
        if len(calls) == 3 * 2 + 1:
            raise KeyboardInterrupt
        return evaluated(model, points)

    module.stopped.forget(e.training.key)
    monkeypatch.setattr(module, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        module.compute([e], progress=False)
    monkeypatch.setattr(module, "evaluate", evaluated)
    xr.testing.assert_identical(module.compute([e], progress=False)[0].drop_attrs(), whole.drop_attrs())


def test_two_points_a_class_or_fewer_leave_no_nan_behind():
    """A class with one point in a part has no pair of its own: NaN in its cell, and left out of the mean."""
    hierarchy = data.load("hierarchy")
    training, validation = measured_points(hierarchy, 48, 1)
    less = tuple(t[1:] for t in training)
    found = measure(
        build_model("fc", hierarchy, 1),
        less,
        validation,
        errors=False,
        groups={"superclass": superclass_of(hierarchy.classes), "realm": realm_of(hierarchy.classes)},
    )
    own = found.stiffness.sel(arithmetic="exact", regime="train-train", measure="sign", class_a=0, class_b=0)
    assert own.isnull()
    assert found[["within", "related", "unrelated"]].notnull().to_array().all()


# What is recorded


@pytest.mark.parametrize("name", sorted(OWN))
def test_recorded_runs_are_whole_official_and_say_where_they_come_from(name):
    recorded = [run for run in map(results.find_recorded, OWN[name].experiments()) if run is not None]
    for run in recorded:
        assert run.attrs["data_checksum"] == archives.SOURCES["cifar100"].checksum
        assert re.fullmatch(r"[0-9a-f]{7,40}", run.attrs["commit"]), "recorded from a clean checkout"
        assert run.attrs["diverged"] == 0
        exact = run.sel(arithmetic="exact")
        assert not exact[["within", "related", "unrelated", "loss", "accuracy"]].isnull().to_array().any()
        kept = exact.stiffness.sel(regime="val-val").notnull().all(["measure", "class_a", "class_b"])
        assert run.images[kept].values.tolist() == stages(run.images.values)
        assert not run.input_similarity.isnull().any()


def test_checkpoints_are_few():
    for name in OWN:
        training = OWN[name].experiments()[0].training
        due = training.images(50_000)
        assert len(due) == (2 if training.label_noise else 12)
        assert due[0] == 0
        assert due[-1] == training.epochs * 50_000


def test_batch_norm_is_resnets():
    with pytest.raises(ValueError, match="batch_norm"):
        Experiment.of(dataset="cifar100", model="cnn_v1", epochs=1, seed=1, batch_norm=True)


# The real command


@pytest.mark.slow
def test_the_command_runs_the_chapter_with_another_network(tmp_path):
    out = tmp_path / "out.html"
    line = [sys.executable, "-m", "stiffkit", "chapter", "4", "--profile", "quick", "-o", str(out)]
    for pair in ("model cnn", "points 2", "epochs 1", "permutations 99"):
        line += ["-p", *pair.split()]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_text(encoding="utf-8").count('src="data:image/png;base64,') == 5
