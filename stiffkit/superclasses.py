"""Classes of classes: the superclasses of CIFAR-100 and of the generated `hierarchy`, and realms of superclasses.

The 20 superclasses of CIFAR-100, five classes each, are Krizhevsky's (2009). No paper lists the coarser groups; ours
are data, below, with the reason for each.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_CIFAR100 = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
_HIERARCHY = {f"{a}{b}": " ".join(f"{a}{b}{c}" for c in "abcd") for a in "AB" for b in "123"}


@dataclass(frozen=True)
class Realm:
    """A group of superclasses.

    Attributes:
        superclasses: that are in it.
        reason: why these.

    """

    superclasses: tuple[str, ...]
    reason: str


SUPERCLASSES = {  # by data set: the classes of each superclass
    name: {superclass: tuple(classes.split()) for superclass, classes in table.items()}
    for name, table in (("hierarchy", _HIERARCHY), ("cifar100", _CIFAR100))
}
REALMS = {  # by data set: coarser groups
    "hierarchy": {
        letter: Realm(tuple(f"{letter}{k}" for k in "123"), "the images are generated from a pattern of the realm's")
        for letter in "AB"
    },
    "cifar100": {
        "living": Realm(
            (
                "aquatic_mammals",
                "fish",
                "flowers",
                "fruit_and_vegetables",
                "insects",
                "large_carnivores",
                "large_omnivores_and_herbivores",
                "medium_mammals",
                "non-insect_invertebrates",
                "people",
                "reptiles",
                "small_mammals",
                "trees",
            ),
            "animals, people included, and plants; fruit counts as part of a plant, and the mushroom lives too",
        ),
        "not living": Realm(
            (
                "food_containers",
                "household_electrical_devices",
                "household_furniture",
                "large_man-made_outdoor_things",
                "large_natural_outdoor_scenes",
                "vehicles_1",
                "vehicles_2",
            ),
            "what people made, and landscapes, although a forest or a plain has living parts",
        ),
    },
}
KINDS = {  # of cells of a class matrix: what figures call their means
    "within": "one class",
    "related": "one superclass",
    "unrelated": "different superclasses",
}


def classes_of(dataset: str) -> tuple[str, ...]:
    """The classes of a data set with superclasses, in the order of their numbers, which is alphabetical."""
    return tuple(sorted(name for classes in SUPERCLASSES[dataset].values() for name in classes))


def superclass_of(classes: Iterable[str]) -> tuple[str, ...]:
    """The superclass of each class, by name.

    Raises:
        ValueError: a class without one; the message names the data sets that have superclasses.

    >>> superclass_of(["trout", "poppy"])
    ('fish', 'flowers')

    """
    names = list(classes)
    if unknown := [name for name in names if name not in _BY_CLASS]:
        raise ValueError(
            f"no superclass is known of the class {unknown[0]!r}; data sets with superclasses are "
            f"{', '.join(SUPERCLASSES)}"
        )
    return tuple(_BY_CLASS[name] for name in names)


def realm_of_superclass(name: str) -> str:
    """The realm of a superclass."""
    return _BY_SUPERCLASS[name]


def realm_of(classes: Iterable[str]) -> tuple[str, ...]:
    """The realm of each class, by name.

    >>> realm_of(["trout", "poppy", "forest", "A1a"])
    ('living', 'living', 'not living', 'A')

    """
    return tuple(map(realm_of_superclass, superclass_of(classes)))


_BY_CLASS = {name: s for table in SUPERCLASSES.values() for s, classes in table.items() for name in classes}
_BY_SUPERCLASS = {
    name: realm for table in REALMS.values() for realm, group in table.items() for name in group.superclasses
}
