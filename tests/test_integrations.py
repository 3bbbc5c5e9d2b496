"""The callback for Hugging Face's Trainer: what it logs, that training does not notice it, what it refuses."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import stiffkit
from stiffkit.sentence_models import build_classifier, tokenizer_of
from stiffkit.sentences import toy_nli

PAIRS = toy_nli()["train"]
CHOSEN = range(0, 1800, 9)  # 200 pairs


@pytest.fixture(scope="module")
def examples():
    tokenizer = tokenizer_of("tiny", PAIRS)
    made = [tokenizer(*PAIRS.sentences[k]) | {"label": int(PAIRS.labels[k]), "genre": "logic"} for k in CHOSEN]
    return tokenizer, [dict(row) for row in made]


def trained(examples, folder, *, callback=None, epochs=2):
    """A Trainer that has trained the tiny model, with dropout; `callback` makes one of it."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer, rows = examples
    model = build_classifier("tiny", tokenizer, 1).transformer
    options = {"num_train_epochs": epochs, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "seed": 3}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 5, "use_cpu": True}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options, **quiet),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if callback:
        trainer.add_callback(callback(trainer))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def both(examples, tmp_path_factory):
    from stiffkit.integrations import StiffnessCallback

    measured = trained(
        examples, tmp_path_factory.mktemp("a"), callback=lambda t: StiffnessCallback(t, examples[1][::4], every=5)
    )
    return measured, trained(examples, tmp_path_factory.mktemp("b"))


def test_metrics_are_logged_with_the_trainers_own(both):
    trainer, _ = both
    logged = [entry for entry in trainer.state.log_history if "stiffness_within_sign" in entry]
    assert [entry["step"] for entry in logged] == [0, 5, 10]  # of fourteen
    assert logged[0]["stiffness_within_sign"] == 1
    assert logged[0]["stiffness_between_sign"] == -1
    assert {name for name in logged[0] if name.startswith("stiffness")} == {
        f"stiffness_{kind}_{measure}" for kind in ("within", "between") for measure in ("sign", "cos")
    }
    for own in both:
        assert [entry["step"] for entry in own.state.log_history if "loss" in entry] == [5, 10]


def test_training_does_not_notice(both):
    measured, plain = both
    for name, weights in plain.model.state_dict().items():
        assert torch.equal(weights, measured.model.state_dict()[name]), name
    assert measured.model.training == plain.model.training


def test_what_is_logged_is_what_is_measured(both, examples):
    from stiffkit.integrations import StiffnessCallback

    trainer, _ = both
    StiffnessCallback(trainer, examples[1][::4]).on_train_begin(None, trainer.state, None, trainer.model)
    logged = trainer.state.log_history[-1]
    batch = dict(trainer.data_collator([{k: v for k, v in row.items() if k != "genre"} for row in examples[1][::4]]))
    y = batch.pop("labels")
    gram = stiffkit.gradient_gram(trainer.model.eval(), torch.nn.CrossEntropyLoss(reduction="none"), (batch, y))
    expected = stiffkit.within_between(stiffkit.class_stiffness(stiffkit.stiffness(gram, "cos"), y))
    np.testing.assert_allclose(logged["stiffness_between_cos"], expected.between, rtol=1e-6)


def test_what_cannot_be_measured_is_refused_at_once(both, examples):
    from stiffkit.integrations import StiffnessCallback

    trainer, rows = both[0], examples[1]
    with pytest.raises(ValueError, match="1 or more: got 0"):
        StiffnessCallback(trainer, rows, every=0)
    with pytest.raises(ValueError, match="examples need labels, as labels, label, label_ids: got columns input_ids"):
        StiffnessCallback(trainer, [{k: v for k, v in row.items() if k != "label"} for row in rows[:4]])
    with pytest.raises(ValueError, match="all 2 examples are of class 0: draw them from a shuffled"):
        StiffnessCallback(trainer, [rows[0], rows[0]])
