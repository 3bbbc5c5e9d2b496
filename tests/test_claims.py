"""The ledger: what it refuses, how estimates become verdicts, and that a changed number changes them."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import xarray as xr
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stiffkit import claims, endpoints, results
from stiffkit.attribution import PAIRS
from stiffkit.claims import (
    CONTRADICTED,
    DEPENDS,
    INCONCLUSIVE,
    MIXED,
    NOT_RUN,
    REPRODUCED,
    VERDICTS,
    Answer,
    Claim,
    Criterion,
    Judgement,
    LedgerError,
    judge,
    judge_all,
    verdict_of,
)
from stiffkit.endpoints import ALLOWED, QUANTITIES
from stiffkit.experiment import Experiment
from stiffkit.measurement import MEASUREMENT_VERSION
from stiffkit.spaces import JUDGED
from stiffkit.superclasses import classes_of
from stiffkit.training import TRAINING_VERSION
from stiffkit.windows import places

ATTRIBUTED = {  # what the quantities of chapters 3, 4 and 8 take
    **{
        f"{prefix}{kind}": ("arithmetic", "regime", "measure")
        for prefix in ("", "realm_")
        for kind in ("related", "unrelated")
    },
    "stiffness": ("arithmetic", "regime", "measure", "class_a", "class_b"),
    "input_similarity": ("regime", "class_a", "class_b"),
    "true_within": ("arithmetic", "regime", "measure"),
    "true_between": ("arithmetic", "regime", "measure"),
    "coherence": ("part",),
    "layer_within": ("layer", "regime", "measure"),
    "pair_within": ("rightness", "regime", "measure"),
    "unclipped": ("arithmetic", "part", "class_a"),
    "past_gap": ("part",),
}
LEVEL = {"name": "level", "variable": "within", "measure": "sign", "regime": "val-val", "at": "start"}
CLAIM = {
    "id": "first",
    "chapter": 2,
    "title": "The first claim",
    "source": {"paper": "fort2020stiffness", "version": "v1", "where": "Fig 1", "code": "C1"},
    "v1": "stiffness is high",
    "quantity": LEVEL,
    "criterion": {"above": 0.5},
    "datasets": ["digits"],
}
SMALL = {"dataset": "digits", "model": "fc", "epochs": 1, "points": 20}
LEDGER = {
    "runs": {
        "digits": {"title": "Digits, fully-connected network", "experiment": SMALL, "seeds": 5},
        "mnist": {"title": "MNIST, something else", "experiment": SMALL | {"points": 30}, "seeds": 3},
    },
    "claims": [
        copy.deepcopy(CLAIM),
        copy.deepcopy(CLAIM) | {"id": "second", "title": "The second claim", "datasets": ["digits", "mnist"]},
    ],
    "answer": {
        "sentence": "A step {does} others, and it {is}.",
        "blanks": {
            "does": [{"say": "helps", "when": {"first": ["reproduced"]}}, {"say": "does not help", "when": {}}],
            "is": [
                {"say": "certain", "when": {"first": ["reproduced", "contradicted"], "second": ["reproduced"]}},
                {"say": "nearly certain", "when": {"first": ["reproduced"]}},
                {"say": "not settled yet", "when": {}},
            ],
        },
    },
    "unchecked": "Nobody saw the code.",
}


@pytest.fixture
def written(tmp_path):
    """Write a ledger, given as a dict or as text, and read it."""

    def read(content):
        path = tmp_path / "claims.yml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return claims.read(path)

    return read


def changed(place, value):
    """The ledger with another value somewhere; None takes the entry out."""
    ledger = copy.deepcopy(LEDGER)
    *outer, last = place
    entry = ledger
    for key in outer:
        entry = entry[key]
    if value is None:
        del entry[last]
    else:
        entry[last] = value
    return ledger


# ----------------------------------------------------------------------------------------------------------- the ledger


def test_the_committed_ledger_loads(monkeypatch):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    ledger = claims.read()
    assert len({claim.id for claim in ledger.claims}) == len(ledger.claims) >= 15
    for wanted in ledger.runs.values():
        found = [e.training.seed for e in wanted.experiments()]
        assert found == [k for k in range(1, wanted.seeds + 1) for _ in wanted.of_seed(k)]
    for claim in ledger.claims:
        assert claim.v1 or claim.v2 or claim.v3 or claim.ours
        assert str(claim.criterion)


def test_the_ledger_is_the_books(tmp_path, monkeypatch):
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path))
    (tmp_path / "claims.yml").write_text(yaml.safe_dump(LEDGER), encoding="utf-8")
    assert [claim.id for claim in claims.read().claims] == ["first", "second"]


def test_a_sound_ledger(written):
    ledger = written(LEDGER)
    assert ledger.claims[0].arithmetics == ("exact",)
    assert [e.training.seed for e in ledger.runs["mnist"].experiments()] == [1, 2, 3]
    assert ledger.runs["mnist"].experiments()[0] == Experiment.of(**SMALL | {"points": 30}, seed=1)


SECOND = ("claims", 1)
BROKEN = {
    "unknown quantity": ((*SECOND, "quantity", "name"), "heat", ["claims: 1: quantity", "'heat'", "level, change"]),
    "no quantity": ((*SECOND, "quantity", "name"), None, ["claims: 1: quantity", "level, change"]),
    "unknown argument": ((*SECOND, "quantity", "since"), "late", ["claims: 1: quantity", "level", "since", "variable"]),
    "the runs as an argument": ((*SECOND, "quantity", "runs"), "x", ["claims: 1: quantity", "no argument runs"]),
    "missing argument": ((*SECOND, "quantity", "at"), None, ["claims: 1: quantity", "level needs at"]),
    "no arguments": ((*SECOND, "quantity"), {"name": "ratio"}, ["ratio needs at, measure, regime, since, variable"]),
    "two criteria": ((*SECOND, "criterion"), {"above": 0, "below": 1}, ["claims: 1: criterion", "above, below"]),
    "no criterion": ((*SECOND, "criterion"), {}, ["claims: 1: criterion", "above, below, between"]),
    "criterion left out": ((*SECOND, "criterion"), None, ["claims: 1: criterion", "required"]),
    "reversed interval": ((*SECOND, "criterion"), {"between": [0.1, -0.1]}, ["claims: 1: criterion", "lower"]),
    "empty interval": ((*SECOND, "criterion"), {"between": [0.1, 0.1]}, ["claims: 1: criterion", "lower"]),
    "half an interval": ((*SECOND, "criterion"), {"between": [0.1]}, ["claims: 1: criterion: between"]),
    "a word as criterion": ((*SECOND, "criterion"), {"above": "much"}, ["claims: 1: criterion: above", "number"]),
    "infinite": ((*SECOND, "criterion"), {"above": -math.inf}, ["claims: 1: criterion: above", "finite"]),
    "not a number": ((*SECOND, "criterion"), {"between": [math.nan, 1.0]}, ["claims: 1: criterion: between", "finite"]),
    "misspelled criterion": ((*SECOND, "criterion"), {"abov": 1}, ["claims: 1: criterion: abov"]),
    "unknown runs": ((*SECOND, "datasets"), ["digits", "svhn"], ["second", "svhn"]),
    "no runs": ((*SECOND, "datasets"), [], ["claims: 1: datasets"]),
    "doubled claim": ((*SECOND, "id"), "first", ["two claims are called first"]),
    "a name with spaces": ((*SECOND, "id"), "The second", ["claims: 1: id"]),
    "no title": ((*SECOND, "title"), None, ["claims: 1: title", "required"]),
    "no code": ((*SECOND, "source", "code"), None, ["claims: 1: source: code", "required"]),
    "chapter 0": ((*SECOND, "chapter"), 0, ["claims: 1: chapter"]),
    "a field too many": ((*SECOND, "verdict"), "reproduced", ["claims: 1: verdict", "not permitted"]),
    "a part too many": (("verdicts",), {}, ["verdicts", "not permitted"]),
    "former without a reason": ((*SECOND, "former"), [{"criterion": {"above": 0}}], ["claims: 1: former: 0: reason"]),
    "no seeds": (("runs", "mnist", "seeds"), 0, ["runs: mnist: seeds"]),
    "no experiment": (("runs", "mnist", "experiment"), None, ["runs: mnist: experiment", "required"]),
    "unknown claim in the answer": (
        ("answer", "blanks", "does", 0, "when"),
        {"third": [REPRODUCED]},
        ["answer", "third"],
    ),
    "unknown verdict": (("answer", "blanks", "does", 0, "when"), {"first": ["true"]}, ["answer", "true", "reproduced"]),
    "nothing for other cases": (("answer", "blanks", "is", 2), None, ["answer", "is"]),
    "an empty blank": (("answer", "blanks", "is"), [], ["answer", "is"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_refused_and_named(written, name):
    place, value, words = BROKEN[name]
    with pytest.raises(LedgerError) as error:
        written(changed(place, value))
    assert str(error.value).startswith("claims.yml: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "claims: [1, 2", "- a\n- b\n", "runs:\n\t- a", "just a sentence", "claims: {a: {b}"]
)
def test_what_is_no_ledger_is_refused(written, text):
    with pytest.raises(LedgerError, match=r"^claims\.yml: "):
        written(text)


def test_every_broken_entry_is_named(written):
    ledger = changed((*SECOND, "title"), None)
    ledger["claims"][0]["criterion"] = {}
    with pytest.raises(LedgerError, match=r"(?s)claims: 0: criterion.*claims: 1: title"):
        written(ledger)


UNCHECKED = {
    "a criterion without its number": ((*SECOND, "criterion"), {"above": "null"}, "claims: 1: criterion"),
    "an interval without its numbers": ((*SECOND, "criterion"), {"between": "null"}, "claims: 1: criterion"),
    "an unknown window": ((*SECOND, "quantity", "at"), "later", "later"),
    "an unknown measure": ((*SECOND, "quantity", "measure"), "sine", "sine"),
    "an unknown regime": ((*SECOND, "quantity", "regime"), "val-train", "val-train"),
    "an unknown variable": ((*SECOND, "quantity", "variable"), "without", "without"),
    "an unknown turn": (
        (*SECOND, "quantity"),
        {"name": "stopping_excess", "signal": "disparity", "turn": "maximum"},
        "maximum",
    ),
    "a signal without its regime": (
        (*SECOND, "quantity"),
        {"name": "stopping_excess", "signal": "between", "turn": "max"},
        "regime",
    ),
    "an unknown arithmetic": ((*SECOND, "arithmetics"), ["exactly"], "exactly"),
    "no arithmetic": ((*SECOND, "arithmetics"), [], "arithmetics"),
    "a name that is a list": ((*SECOND, "quantity", "name"), ["level"], "claims: 1: quantity"),
    "runs of an unknown data set": (("runs", "mnist", "experiment"), SMALL | {"dataset": "mnits"}, "mnits"),
    "runs that have their own seed": (("runs", "mnist", "experiment"), SMALL | {"seed": 9}, "seed"),
    "a sentence with another blank": (("answer", "sentence"), "A step {has} others.", "has"),
}


@pytest.mark.parametrize("name", UNCHECKED)
def test_what_cannot_be_judged_is_refused_too(written, name):
    place, value, word = UNCHECKED[name]
    with pytest.raises(LedgerError, match=word):
        written(yaml.safe_dump(changed(place, value)).replace("'null'", "null"))


def test_a_criterion_that_is_there_twice_is_refused(written):
    text = yaml.safe_dump(LEDGER).replace("    above: 0.5\n", "    above: 0.9\n    above: 0.5\n", 1)
    with pytest.raises(LedgerError, match="above"):
        written(text)


def test_a_broken_claim_is_named_by_its_id(written):
    with pytest.raises(LedgerError, match="second"):
        written(changed((*SECOND, "quantity", "name"), "heat"))


def test_a_ledger_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "claims.yml").write_bytes("title: gr\xfcn".encode("latin-1"))
    with pytest.raises(LedgerError):
        claims.read(tmp_path / "claims.yml")


@pytest.mark.parametrize(
    ("criterion", "text", "limits"),
    [
        ({"above": 0.5}, "above 0.5", (0.5, math.inf)),
        ({"above": 0}, "above 0", (0, math.inf)),
        ({"below": -0.25}, "below −0.25", (-math.inf, -0.25)),
        ({"between": [-0.05, 0.05]}, "between −0.05 and 0.05", (-0.05, 0.05)),
    ],
)
def test_criteria(criterion, text, limits):
    assert str(Criterion(**criterion)) == text
    assert Criterion(**criterion).limits == limits


# -------------------------------------------------------------------------------------------- one data set, one verdict

FIVE = [-0.02, -0.01, 0.0, 0.01, 0.02]  # 95 % interval: 0 +- 0.0196


def about(centre, n=5):
    return [centre + v for v in FIVE[:n]]


@pytest.mark.parametrize(
    ("criterion", "values", "verdict"),
    [
        ({"above": 0.5}, about(0.6), REPRODUCED),
        ({"above": 0.5}, about(0.4), CONTRADICTED),
        ({"above": 0.5}, about(0.5), INCONCLUSIVE),
        ({"above": 0.5}, about(0.51), INCONCLUSIVE),
        ({"above": 0.5}, about(0.49), INCONCLUSIVE),
        ({"below": 0.5}, about(0.4), REPRODUCED),
        ({"below": 0.5}, about(0.6), CONTRADICTED),
        ({"below": 0.5}, about(0.51), INCONCLUSIVE),
        ({"between": (-0.05, 0.05)}, about(0.0), REPRODUCED),
        ({"between": (-0.05, 0.05)}, about(0.029), REPRODUCED),
        ({"between": (-0.05, 0.05)}, about(0.031), INCONCLUSIVE),
        ({"between": (-0.05, 0.05)}, about(0.069), INCONCLUSIVE),
        ({"between": (-0.05, 0.05)}, about(0.071), CONTRADICTED),
        ({"between": (-0.05, 0.05)}, about(-0.2), CONTRADICTED),
        ({"between": (-0.01, 0.01)}, about(0.0), INCONCLUSIVE),
        ({"above": 0.5}, [0.5] * 5, CONTRADICTED),
        ({"between": (0.0, 1.0)}, [0.3] * 2, REPRODUCED),
        ({"above": 0.5}, [], NOT_RUN),
    ],
)
def test_the_verdict_is_the_whole_intervals(criterion, values, verdict):
    assert verdict_of(Criterion(**criterion), values) == verdict


def test_the_bounds_are_those_of_the_t_distribution():
    """Quantiles 0.975 of Student's t as every textbook prints them."""
    for n, quantile in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (8, 2.365)):
        values = [0.7 + 0.1 * (-1) ** k * (k + 1) for k in range(n)]
        half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
        low = sum(values) / n - half
        assert verdict_of(Criterion(above=low - 1e-3 * half), values) == REPRODUCED
        assert verdict_of(Criterion(above=low + 1e-3 * half), values) == INCONCLUSIVE


def test_a_true_mean_is_rarely_contradicted():
    """Where the true value lies on the limit, 2.5 % of verdicts are reproduced, and 2.5 % contradicted."""
    draws = np.random.default_rng(0).normal(0.3, 1, size=(600, 5))
    verdicts = [verdict_of(Criterion(above=0.3), row) for row in draws]
    for wrong in (REPRODUCED, CONTRADICTED):
        assert verdicts.count(wrong) / 600 == pytest.approx(0.025, abs=0.019)


numbers = st.floats(-1, 1).map(lambda v: round(v, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=2, max_size=8), numbers)
def test_verdicts_turn_with_the_criterion_and_with_the_sign(values, limit):
    above = verdict_of(Criterion(above=limit), values)
    assert verdict_of(Criterion(below=-limit), [-v for v in values]) == above
    below = verdict_of(Criterion(below=limit), values)
    if above != INCONCLUSIVE and len(set(values)) > 1:
        assert below == {REPRODUCED: CONTRADICTED, CONTRADICTED: REPRODUCED}[above]
    mean = sum(values) / len(values)
    assert above != REPRODUCED or mean > limit
    assert above != CONTRADICTED or mean <= limit + 1e-9


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(numbers, min_size=2, max_size=4), numbers, st.sampled_from(["above", "below"]))
def test_with_fewer_than_five_every_seed_says_the_same(values, limit, kind):
    verdict = verdict_of(Criterion(**{kind: limit}), values)
    inside = [(v > limit) == (kind == "above") and v != limit for v in values]
    assert verdict != REPRODUCED or all(inside)
    assert verdict != CONTRADICTED or not any(inside)


def test_with_five_the_interval_decides_alone():
    assert verdict_of(Criterion(above=0.5), [1.0, 1.0, 1.0, 1.0, 0.4]) == REPRODUCED
    assert verdict_of(Criterion(above=0.5), [1.0, 1.0, 1.0, 0.4]) == INCONCLUSIVE


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("values", [[0.9], [math.nan], [math.nan] * 6, [0.9, math.inf, 0.9], [math.nan, 0.9]])
def test_a_single_seed_and_what_is_no_number_decide_nothing(values):
    assert verdict_of(Criterion(above=0.5), values) == INCONCLUSIVE
    assert verdict_of(Criterion(below=0.5), values) == INCONCLUSIVE


def test_nothing_is_warned_about_a_single_seed():
    assert verdict_of(Criterion(above=0.5), [0.9]) == INCONCLUSIVE


def test_nothing_is_warned_about_an_infinite_ratio():
    assert verdict_of(Criterion(above=0.5), [0.9, math.inf, 0.9]) == INCONCLUSIVE


@pytest.mark.parametrize("values", [[0.9, 0.91, math.nan], [*about(0.9), math.nan], [0.9, 0.91, 0.9, 0.91, math.nan]])
def test_one_missing_seed_decides_nothing(values):
    assert verdict_of(Criterion(below=0.5), values) == INCONCLUSIVE
    assert verdict_of(Criterion(above=0.5), values) == INCONCLUSIVE


# -------------------------------------------------------------------------------------------------------------- claims


def made_up(values, clipped=None):
    """Runs whose within-class sign stiffness before training is as given, one value a seed."""
    clipped = values if clipped is None else clipped
    within = np.zeros((len(values), 2, 2, 3, 2))
    within[:, 0, :, 2, 0] = np.stack([values, clipped], axis=1)
    return xr.Dataset(
        {
            "within": (("seed", "images", "arithmetic", "regime", "measure"), within),
            "between": (("seed", "images", "arithmetic", "regime", "measure"), -within),
            "epochs": (("seed", "images"), [[0.0, 1.0]] * len(values)),
        },
        {
            "seed": range(1, len(values) + 1),
            "images": [0, 1_000],
            "arithmetic": ["exact", "keras2019"],
            "regime": ["train-train", "train-val", "val-val"],
            "measure": ["sign", "cos"],
        },
    )


def a_claim(**fields):
    return Claim.model_validate(CLAIM | fields)


def test_estimates():
    judgement = judge(a_claim(arithmetics=["exact", "keras2019"]), {"digits": made_up(about(0.9), about(0.1))})
    exact, clipped = judgement.estimates
    assert (exact.dataset, exact.arithmetic, clipped.arithmetic) == ("digits", "exact", "keras2019")
    assert exact.values == pytest.approx(about(0.9))
    half = 2.776445 * float(np.std(FIVE, ddof=1)) / math.sqrt(5)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((0.9, 0.9 - half, 0.9 + half))
    assert (exact.verdict, clipped.verdict) == (REPRODUCED, CONTRADICTED)
    assert clipped.mean == pytest.approx(0.1)
    assert judgement.by_dataset == {"digits": DEPENDS}


def test_a_changed_number_changes_the_verdict():
    """The ledger can say no."""
    values = about(0.9)
    assert judge(a_claim(), {"digits": made_up(values)}).verdict == REPRODUCED
    assert judge(a_claim(), {"digits": made_up([0.1, *values[1:]])}).verdict == INCONCLUSIVE
    assert judge(a_claim(), {"digits": made_up([v - 0.8 for v in values])}).verdict == CONTRADICTED
    assert judge(a_claim(criterion={"above": 0.95}), {"digits": made_up(values)}).verdict == CONTRADICTED
    assert judge(a_claim(criterion={"above": 0.89}), {"digits": made_up(values)}).verdict == INCONCLUSIVE
    assert judge(a_claim(criterion={"below": 0.5}), {"digits": made_up(values)}).verdict == CONTRADICTED
    between = LEVEL | {"variable": "between"}
    assert judge(a_claim(quantity=between), {"digits": made_up(values)}).verdict == CONTRADICTED


@pytest.mark.parametrize("place", range(5))
def test_any_one_seed_can_change_it(place):
    values = about(0.9)
    values[place] = -3.0
    assert judge(a_claim(), {"digits": made_up(values)}).verdict == INCONCLUSIVE


def test_a_changed_number_in_the_file_changes_the_verdict(written):
    runs = {"digits": made_up(about(0.9)), "mnist": made_up(about(0.9))}
    before = judge_all(written(LEDGER), runs)
    after = judge_all(written(changed((*SECOND, "criterion", "above"), 0.95)), runs)
    assert [j.verdict for j in before] == [REPRODUCED, REPRODUCED]
    assert [j.verdict for j in after] == [REPRODUCED, CONTRADICTED]


YES, NO, PERHAPS = about(0.9), about(0.1), about(0.5)


@pytest.mark.parametrize(
    ("digits", "mnist", "verdict"),
    [
        ((YES, YES), (YES, YES), REPRODUCED),
        ((NO, NO), (NO, NO), CONTRADICTED),
        ((YES, NO), (YES, NO), DEPENDS),
        ((NO, YES), (YES, NO), DEPENDS),
        ((YES, YES), (NO, NO), MIXED),
        ((YES, YES), (YES, NO), MIXED),
        ((NO, NO), (YES, NO), MIXED),
        ((PERHAPS, PERHAPS), (YES, YES), INCONCLUSIVE),
        ((PERHAPS, YES), (YES, YES), INCONCLUSIVE),
        ((YES, PERHAPS), (NO, NO), INCONCLUSIVE),
        ((PERHAPS, PERHAPS), (PERHAPS, PERHAPS), INCONCLUSIVE),
        ((YES, YES), None, REPRODUCED),
        ((NO, NO), None, CONTRADICTED),
        ((YES, NO), None, DEPENDS),
        (None, (PERHAPS, YES), INCONCLUSIVE),
        (None, None, NOT_RUN),
    ],
)
def test_verdicts_over_arithmetics_and_data_sets(digits, mnist, verdict):
    runs = {name: made_up(*values) for name, values in (("digits", digits), ("mnist", mnist)) if values}
    claim = a_claim(datasets=["digits", "mnist"], arithmetics=["exact", "keras2019"])
    judgement = judge(claim, runs)
    assert judgement.verdict == verdict
    assert {name: v == NOT_RUN for name, v in judgement.by_dataset.items()} == {
        "digits": digits is None,
        "mnist": mnist is None,
    }
    assert len(judgement.estimates) == 2 * len(runs)


def test_two_that_disagree_are_mixed_whatever_the_third_says():
    claim = a_claim(datasets=["a", "b", "c"])
    runs = {"a": made_up(YES), "b": made_up(NO), "c": made_up(PERHAPS)}
    assert judge(claim, runs).verdict == MIXED
    assert judge(claim, {"a": runs["a"], "c": runs["c"]}).verdict == INCONCLUSIVE


def test_an_arithmetic_that_is_not_asked_for_does_not_count():
    assert judge(a_claim(), {"digits": made_up(YES, NO)}).verdict == REPRODUCED


def test_one_recorded_seed_is_inconclusive():
    judgement = judge(a_claim(), {"digits": made_up([0.9])})
    assert judgement.verdict == INCONCLUSIVE
    assert judgement.estimates[0].mean == pytest.approx(0.9)
    assert math.isnan(judgement.estimates[0].low)


def test_a_run_without_the_number_is_inconclusive():
    assert judge(a_claim(), {"digits": made_up([math.nan] * 5)}).verdict == INCONCLUSIVE


def at_rates(runs, random):
    """The same at two learning rates, with curves and lines in windows at losses and epochs."""
    labels = {"seed": runs.seed.values, "learning_rate": [1e-4, 1e-3], "at": places([0.3, 0.1, 0.03], 30)}
    labels |= {"space": ["input", "layer 1", "output"], "arithmetic": list(JUDGED), "measure": ["sign", "cos"]}
    labels |= {"pairs": ["same class", "different classes"], "of": ["pooled", "0", "1"], "end": ["near", "far"]}
    labels |= {"coefficient": ["intercept", "slope"], "distance": np.linspace(0.05, 1.95, 20)}

    def uniform(low, high, *dims):
        return xr.DataArray(
            random.uniform(low, high, [len(labels[d]) for d in dims]), {d: labels[d] for d in dims}, dims
        )

    everywhere = ("seed", "learning_rate", "at", "space", "arithmetic", "measure")
    found = runs[["within", "between", "epochs"]].sel(arithmetic=list(JUDGED))
    found = found * uniform(0.5, 1, "seed", "learning_rate")
    loss = np.exp(-runs.epochs * xr.DataArray([0.3, 0.5], {"learning_rate": labels["learning_rate"]}))
    curve = uniform(0.2, 1, *everywhere, "pairs") - xr.DataArray(labels["distance"], {"distance": labels["distance"]})
    return found.assign(
        epochs=runs.epochs,
        loss=loss.expand_dims(split=["train"]),
        line=uniform(-1, 1, *everywhere, "of", "coefficient"),
        observed=uniform(0.1, 0.9, "seed", "learning_rate", "at", "space", "end"),
        curve=curve,
        count=xr.full_like(curve.isel(arithmetic=0, measure=0, drop=True), 100),
    )


@pytest.mark.slow
def test_every_committed_claim_can_be_judged(monkeypatch):
    """From runs of the standard schedule, with numbers drawn at random, and with what all chapters measure."""
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    ledger, random = claims.read(), np.random.default_rng(0)
    images = Experiment.of(dataset="mnist", model="fc", epochs=30, seed=1).training.images(60_000)
    base = made_up([0.0] * 3)
    labels = {name: values.values for name, values in base.coords.items()} | {"images": images}
    labels["arithmetic"] = ["exact", "float32", "keras2019", "own"]
    shape = {name: len(values) for name, values in labels.items()}
    runs = xr.Dataset(
        {name: (tuple(base[name].dims), random.normal(size=[shape[d] for d in base[name].dims])) for name in base},
        labels,
    )
    runs["epochs"] = runs.epochs * 0 + runs.images / 60_000
    labels |= {"layer": [1, 2, 3], "rightness": list(PAIRS), "part": ["train", "val"]}
    labels |= {"class_a": range(24), "class_b": range(24)}
    for name, dims in ATTRIBUTED.items():
        dims = ("seed", *(() if name == "input_similarity" else ("images",)), *dims)
        runs[name] = xr.DataArray(random.uniform(size=[len(labels[d]) for d in dims]), {d: labels[d] for d in dims})
    runs["loss"] = (runs.epochs - 12) ** 2 + xr.DataArray([1.0, 2.0], {"split": ["train", "validation"]}, "split")
    runs.attrs["classes"] = json.dumps(classes_of("hierarchy"))
    rates = at_rates(runs, random)
    judgements = judge_all(ledger, {name: rates if wanted.axes else runs for name, wanted in ledger.runs.items()})
    assert [j.claim for j in judgements] == list(ledger.claims)
    for judgement in judgements:
        assert NOT_RUN not in judgement.by_dataset.values()
        assert set(judgement.by_dataset) == set(judgement.claim.datasets)
        assert np.isfinite([[e.mean, e.low, e.high, *e.values] for e in judgement.estimates]).all()


def test_every_quantity_can_be_asked_for():
    for name, function in QUANTITIES.items():
        count = function.__code__.co_argcount
        arguments = {name: ALLOWED[name][0] for name in function.__code__.co_varnames[1:count]}
        assert a_claim(quantity={"name": name} | arguments).quantity["name"] == name


# ------------------------------------------------------------------------------------------------------------- recorded


def test_only_recorded_runs_judge(tmp_path, monkeypatch, written):
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path / "book"))
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / "cache"))
    ledger = written(LEDGER)
    runs = made_up(about(0.9)).assign(stiffness=xr.zeros_like(made_up(about(0.9)).within))
    runs = runs.assign_attrs(training_version=TRAINING_VERSION, measurement_version=MEASUREMENT_VERSION)
    for k, experiment in enumerate(ledger.runs["digits"].experiments()):
        results.save(experiment, runs.isel(seed=k, drop=True))
    assert claims.recorded_runs(ledger) == {}
    assert [j.verdict for j in judge_all(ledger)] == [NOT_RUN, NOT_RUN]
    results.pack("01_a", ["*-s1-*", "*-s3-*"])
    found = claims.recorded_runs(ledger)
    assert list(found) == ["digits"]
    assert found["digits"].seed.values.tolist() == [1, 3]
    results.pack("02_b", ["*"])
    assert claims.recorded_runs(ledger)["digits"].seed.values.tolist() == [1, 2, 3, 4, 5]
    assert [j.verdict for j in judge_all(ledger)] == [REPRODUCED, REPRODUCED]


def test_seeds_that_have_not_learnt_judge_only_where_they_may(tmp_path, monkeypatch, written):
    monkeypatch.setenv("STIFFKIT_BOOK", str(tmp_path / "book"))
    monkeypatch.setenv("STIFFKIT_CACHE", str(tmp_path / "cache"))
    entries = LEDGER["runs"] | {"learnt": LEDGER["runs"]["digits"] | {"only_learnt": True}}
    ledger = written(LEDGER | {"runs": entries})
    runs = made_up(about(0.9)).assign_attrs(
        training_version=TRAINING_VERSION, measurement_version=MEASUREMENT_VERSION, classes=json.dumps([*"abc"])
    )
    end = xr.DataArray([0.5, math.log(3), 0.995 * math.log(3), 0.98 * math.log(3), 2.0], {"seed": runs.seed}, "seed")
    loss = xr.where(runs.images == 0, math.log(3), end).expand_dims(split=["train"])
    runs = runs.assign(loss=loss, stiffness=xr.zeros_like(runs.within))
    assert endpoints.has_learnt(runs).values.tolist() == [True, False, False, True, False]
    for k, experiment in enumerate(ledger.runs["digits"].experiments()):
        results.save(experiment, runs.isel(seed=k, drop=True))
    results.pack("01_a", ["*"])
    found = claims.recorded_runs(ledger)
    assert {name: r.seed.values.tolist() for name, r in found.items()} == {"digits": [1, 2, 3, 4, 5], "learnt": [1, 4]}


def test_seeds_that_do_not_overfit_are_left_out_of_claims_about_overfitting():
    claim, runs = a_claim(only_overfitted=True), made_up(about(0.9))
    end = xr.DataArray([0.5, 1.04, 1.06, 2.0, math.nan], {"seed": runs.seed}, "seed")
    runs = runs.assign(loss=xr.where(runs.images == 0, 1.0, end).expand_dims(split=["validation"]))
    assert endpoints.has_overfitted(runs).values.tolist() == [False, False, True, True, False]
    assert [len(e.values) for e in claims.judge(claim, {"digits": runs}).estimates] == [2]
    none = claims.judge(claim, {"digits": runs.isel(seed=[0, 1])})
    assert (none.verdict, none.estimates) == (NOT_RUN, ())
    assert claims.found(none, LEDGER) == "no recorded run that overfits"
    assert ": above 0.5, of seeds that overfit |" in claims.table([none], LEDGER)


# ----------------------------------------------------------------------------------------------------------- the answer


def judgements(ledger, verdicts):
    """Judgements of these verdicts, {claim, or claim/runs: verdict}; *not run* where none is given."""
    return [
        Judgement(
            claim,
            (),
            {name: verdicts.get(f"{claim.id}/{name}", NOT_RUN) for name in claim.datasets},
            verdicts.get(claim.id, NOT_RUN),
        )
        for claim in ledger.claims
    ]


def test_one_chapter_is_judged_as_in_the_whole(written, monkeypatch):
    ledger = written(changed((*SECOND, "chapter"), 3))
    asked = []
    monkeypatch.setattr(claims, "recorded_runs", lambda _, names: asked.append(list(names)) or {"digits": made_up(YES)})
    assert judge_all(ledger, chapter=2) == [judge_all(ledger)[0]]
    assert judge_all(ledger, chapter=4) == []
    assert asked == [["digits"], ["digits", "mnist"], []], "runs of other chapters are not read"


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (REPRODUCED, REPRODUCED, "A step helps others, and it certain."),
        (REPRODUCED, MIXED, "A step helps others, and it nearly certain."),
        (CONTRADICTED, REPRODUCED, "A step does not help others, and it certain."),
        (DEPENDS, REPRODUCED, "A step does not help others, and it not settled yet."),
        (NOT_RUN, NOT_RUN, "A step does not help others, and it not settled yet."),
    ],
)
def test_the_first_alternative_that_fits_is_said(written, first, second, sentence):
    ledger = written(LEDGER)
    assert claims.answer(ledger, judgements(ledger, {"first": first, "second": second})) == sentence


def test_every_alternative_of_the_committed_answer_can_be_said(monkeypatch):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    ledger = claims.read()
    for blank, options in ledger.answer.blanks.items():
        asked = sorted({claim for option in options for claim in option.when})
        wanted_of = {claim: {v for option in options for v in option.when.get(claim, ())} for claim in asked}
        told_apart = [[*wanted, next(v for v in VERDICTS if v not in wanted)] for wanted in wanted_of.values()]
        only = ledger.model_copy(update={"answer": Answer(sentence=f"{{{blank}}}", blanks={blank: options})})
        said = []
        for combination in itertools.product(*told_apart):
            verdicts = dict(zip(asked, combination, strict=True))
            fits = [all(verdicts[c] in wanted for c, wanted in option.when.items()) for option in options]
            expected = options[fits.index(True)].say
            assert claims.answer(only, judgements(ledger, verdicts)) == expected
            said.append(expected)
        assert set(said) == {option.say for option in options}


def test_the_committed_answer_is_one_sentence_whatever_the_verdicts(monkeypatch):
    monkeypatch.delenv("STIFFKIT_BOOK", raising=False)
    ledger = claims.read()
    for verdict in VERDICTS:
        sentence = claims.answer(ledger, judgements(ledger, dict.fromkeys((c.id for c in ledger.claims), verdict)))
        assert sentence.endswith(".")
        assert not set("{}\n") & set(sentence)


# ------------------------------------------------------------------------------------------------------------- as text


def test_estimates_as_they_are_printed():
    assert claims.estimate(0.5, 0.4, 0.6) == "0.50 [0.40, 0.60]"
    assert claims.estimate(-0.5, -0.6, -0.001) == "\N{MINUS SIGN}0.50 [\N{MINUS SIGN}0.60, 0.00]"
    assert claims.estimate(12.34, math.nan, math.nan, digits=1) == "12.3"
    assert claims.estimate(math.nan, math.nan, math.nan) == "\N{EN DASH}"


def test_what_was_found_in_one_line(written):
    ledger = written(changed((*SECOND, "arithmetics"), ["exact", "keras2019"]))
    first, second = judge_all(ledger, {"digits": made_up(YES, NO)})
    assert claims.found(first, ledger) == "Digits 0.90 [0.88, 0.92] (reproduced, n = 5)"
    assert claims.found(second, ledger) == (
        "Digits exact 0.90 [0.88, 0.92], clipped 0.10 [0.08, 0.12] (depends on the arithmetic, n = 5)"
    )
    assert claims.found(judge(ledger.claims[0], {}), ledger) == "no recorded run"


def test_tables_have_a_row_for_every_claim(written):
    ledger = changed((*SECOND, "exploratory"), "seen in a pilot")
    ledger["claims"][1]["former"] = [{"criterion": {"above": 0.1}, "reason": "it was noise"}]
    ledger = written(ledger)
    found = judge_all(ledger, {"digits": made_up(YES), "mnist": made_up(NO)})
    for text in (claims.table(found, ledger), claims.front(found, ledger), claims.box(found, 2)):
        rows = [line for line in text.splitlines() if line.startswith("| The ")]
        assert [row.split(" | ")[0] for row in rows] == ["| The first claim", "| The second claim"]
        assert len({row.count(" |") for row in text.splitlines() if row.startswith("| ")}) == 1
        assert "**reproduced**" in rows[0]
        assert "**mixed**" in rows[1]
    assert "above 0.5; formerly above 0.1, changed because it was noise" in claims.table(found, ledger)
    assert "exploratory" in claims.table(found, ledger)
    assert "exploratory" in claims.box(found, 2)
    assert claims.box(found, 3).splitlines()[2:] == []
    assert claims.answer(ledger, found) in claims.front(found, ledger)
    assert "Questions of our own" not in claims.front(found, ledger)
    assert "| **mixed**: Digits 0.90 [0.88, 0.92] (reproduced, n = 5); MNIST" in claims.front(found, ledger)
    assert "nobody saw the code." in claims.front(found, ledger)
    assert claims.said(found, ledger, "second").startswith("* The second claim: **mixed** (exploratory). Digits 0.90")


def test_the_front_names_claims_by_verdict(written):
    ledger = written(LEDGER)
    found = [judge(ledger.claims[0], {"digits": made_up(YES)}), judge(ledger.claims[1], {})]
    lines = claims.front(found, ledger).splitlines()
    begin = lines.index("* **reproduced**")
    assert [line.partition(": ")[::2] for line in lines[begin : begin + 4]] == [
        ("* **reproduced**", ""),
        ("  * chapter [2](02_class_matrices.ipynb)", "The first claim"),
        ("* **not run**", ""),
        ("  * chapter [2](02_class_matrices.ipynb)", "The second claim"),
    ]
    assert any(line.startswith("| The first claim | **reproduced**: Digits 0.90 [0.88, 0.92] |") for line in lines)
    assert any(line.startswith("| The second claim | **not run**: no recorded run |") for line in lines)


def test_questions_of_our_own_have_a_table_of_their_own(written):
    entries = changed((*SECOND, "ours"), "is it so")
    del entries["claims"][1]["v1"]
    ledger = written(entries)
    lines = claims.front(judge_all(ledger, {"digits": made_up(YES)}), ledger).splitlines()
    (begin,) = [i for i, line in enumerate(lines) if line.startswith("<summary>Questions of our own")]
    assert any("The first claim" in line for line in lines[:begin])
    assert not any("The second claim" in line for line in lines[:begin])
    (row,) = [line for line in lines[begin:] if line.startswith("| The second claim")]
    assert row.startswith("| The second claim | **reproduced**: Digits 0.90 [0.88, 0.92] |")


def test_an_answer_may_ask_for_the_verdict_of_one_set(written):
    entries = copy.deepcopy(LEDGER)
    entries["answer"]["blanks"]["does"][0]["when"] = {"second/mnist": ["contradicted"]}
    ledger = written(entries)
    assert claims.answer(ledger, judge_all(ledger, {"mnist": made_up(NO)})).startswith("A step helps")
    assert claims.answer(ledger, judge_all(ledger, {"digits": made_up(NO)})).startswith("A step does not help")
    entries["answer"]["blanks"]["does"][0]["when"] = {"first/mnist": ["contradicted"]}
    with pytest.raises(LedgerError, match="first/mnist"):
        written(entries)


def test_sets_that_lack_seeds_are_named(written):
    ledger = written(LEDGER)
    some = claims.seeds_so_far(judge_all(ledger, {"digits": made_up(YES), "mnist": made_up(YES[:2])}), ledger)
    assert some == "1 of 2 planned sets have all their seeds; MNIST 2 of 3"
    every = claims.seeds_so_far(judge_all(ledger, {"digits": made_up(YES), "mnist": made_up(YES[:3])}), ledger)
    assert every == "2 of 2 planned sets have all their seeds"
