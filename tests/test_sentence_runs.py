"""Runs of transformers on pairs of sentences: the same experiment, training and measuring as for images."""

import numpy as np
import pytest
import torch

from stiffkit import experiment as experiments
from stiffkit import sentence_models, stopped
from stiffkit.attribution import in_sections, whole
from stiffkit.experiment import Experiment, Training
from stiffkit.gradients import gradient_gram
from stiffkit.losses import cross_entropy
from stiffkit.measurement import measured_points

pytest.importorskip("transformers")

TINY = {"dataset": "toy_nli", "model": "tiny", "initialisation": "random", "optimizer": "adamw", "points": 12}
RUN = TINY | {"epochs": 0.2, "checkpoints": (0, 160, 384), "seed": 1, "arithmetics": ("exact",), "attribution": True}
RUN |= {"distances": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STIFFKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Experiment.of(**RUN).run(progress=False)


def test_a_run_has_what_a_run_of_images_has(run):
    assert run.images.values.tolist() == [0, 160, 384]
    assert run.loss.sizes == {"images": 3, "split": 3}
    assert run.within.sel(images=0, arithmetic="exact", measure="sign").values.tolist() == [1, 1, 1]
    assert (run.between.sel(images=0, arithmetic="exact", measure="sign") < -0.9).all()
    assert run.layer.values.tolist() == [1, 2, 3, 4, 5], "embeddings, two layers, the pooler and the head"
    assert np.isfinite(run.layer_within).all()
    assert run.stiffness.sizes["class_a"] == 3


def test_a_run_has_curves_in_the_models_own_spaces(run):
    assert run.space.values.tolist() == ["embedding", "[CLS]"]
    assert run["curve"].dims[:2] == ("images", "space")
    assert (run["count"].sum(["pairs", "distance"]) == 12 * 11).all()
    assert (run.observed.sel(end="near") < run.observed.sel(end="far")).all()


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(run, own_folders, monkeypatch):
    """Dropout, batches of about one length and AdamW included."""
    experiment, really = Experiment.of(**RUN), experiments.measure
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return really(*args, **kwargs)

    monkeypatch.setattr(experiments, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(progress=False)
    assert stopped.images_seen(experiment.training.key) == 160
    monkeypatch.setattr(experiments, "measure", really)
    again = experiment.run(progress=False)
    for name in ("stiffness", "loss", "layer_within"):
        np.testing.assert_array_equal(again[name], run[name])


def test_sections_add_up_to_the_whole():
    dataset = sentence_models.load("toy_nli", "tiny")
    tokenizer = sentence_models.tokenizer_for("toy_nli", "tiny")
    model = sentence_models.build_classifier("tiny", tokenizer, 1)
    points, _ = measured_points(dataset, 12, 1)
    lengths = sentence_models.lengths_of(points[0])
    assert torch.equal(lengths, lengths.sort().values), "chunks of about one length need little padding"
    found = in_sections(gradient_gram(model, cross_entropy, points, by="layer"), model.section)
    assert list(found) == ["embeddings", "layer 1", "layer 2", "pooler", "head"]
    together = gradient_gram(model, cross_entropy, points)
    torch.testing.assert_close(whole(found).cos, together.cos, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sum(gram.dot for gram in found.values()), together.dot, atol=1e-8, rtol=1e-5)
    for memory in (1, 2**20, 2**23):  # blocks of one batch, of some, and all at once: each batch is as long as it is
        again = gradient_gram(model, cross_entropy, points, max_memory=memory)
        torch.testing.assert_close(again.cos, together.cos, atol=1e-6, rtol=1e-5)
        two = gradient_gram(model, cross_entropy, points, (points[0][5:], points[1][5:]), max_memory=memory)
        torch.testing.assert_close(two.cos, together.cos[:, 5:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "fc"}, "'model' = 'fc' reads images, and toy_nli has sentences: take tiny, minilm"),
        ({"initialisation": "keras"}, "'initialisation' = 'keras': toy_nli allows pretrained, random"),
        ({"initialisation": "pretrained"}, "tiny has random weights alone"),
        ({"points": 13}, "toy_nli allows multiples of 3"),
        ({"dataset": "mnist"}, "allowed are fc, cnn, cnn_v1, resnet20"),
        ({"dataset": "mnist", "model": "fc"}, "'initialisation' = 'random': mnist allows keras, torch"),
        ({"activation": "tanh"}, "'activation' is an option of networks that read images, toy_nli has none"),
        ({"sphere": False}, "'sphere' is an option of networks that read images"),
        ({"optimizer": "rmsprop"}, "adamw"),
        ({"clip": -1}, "clip"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ValueError, match=r"\w") as caught:
        Experiment.of(**RUN | fields)
    assert words in str(caught.value)


def test_any_model_of_the_hub_or_a_folder_has_a_key_that_is_a_file_name():
    fields = TINY | {"epochs": 1, "seed": 1, "initialisation": "pretrained"}
    keys = {m: Experiment.of(**fields | {"model": m}).key for m in ("google/bert_uncased_L-2", "../my models/bert")}
    assert all("/" not in key and " " not in key for key in keys.values())
    assert keys["google/bert_uncased_L-2"].startswith("toy_nli-google_bert_uncased_L_2-1ep-s1-")


def test_a_folder_whose_files_change_is_another_run(tmp_path):
    def key(**fields):
        return Experiment.of(**TINY | {"epochs": 1, "seed": 1, "initialisation": "pretrained"} | fields).key

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"one")
    before = key(model=str(tmp_path / "model"))
    assert key(model=str(tmp_path / "model")) == before
    (tmp_path / "model" / "weights").write_bytes(b"another")
    after = Experiment.of(**TINY | {"epochs": 1, "seed": 1, "model": str(tmp_path / "model")})
    assert key(model=str(tmp_path / "model")) != before
    assert Training.model_validate_json(after.training.model_dump_json()) == after.training
    assert Experiment.of(**TINY | {"epochs": 1, "seed": 1}).training.folder == ""


def test_estimates_follow_from_the_pairs_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path))
    training = Training(dataset="mnli", model="minilm", epochs=1, seed=1, initialisation="pretrained")
    assert training.images_an_epoch == 392_702
    (tmp_path / "mnli").mkdir()
    line = '{"gold_label": "neutral", "sentence1": "A.", "sentence2": "B."}\n'
    for n in (7, 9):
        (tmp_path / "mnli" / "train.jsonl").write_text(line * n + "bad\n", encoding="utf-8")
        assert training.images_an_epoch == n
