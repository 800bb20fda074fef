"""Varies the texts of items for training: empty fields, another order of values, other wording.

A variation is a function of a random generator alone. What is evaluated and served is never varied.
"""

from __future__ import annotations

import re

import numpy as np

from metarec.config import AugmentConfig
from metarec.data.interactions import Catalog, Codes
from metarec.errors import ConfigError, suggest

# What lies between the values of a field that holds several.
_BETWEEN = re.compile(r"\s*([,;|])\s*")


def check_augmentation(catalog: Catalog, settings: AugmentConfig) -> None:
    """Refuses a column of rewrites that the catalog does not have.

    Raises:
        ConfigError: There is no such column.
    """
    if settings.rewrites is not None and settings.rewrites not in catalog.fields:
        raise ConfigError(
            f"augment.rewrites is '{settings.rewrites}', and items have no such field",
            suggest(settings.rewrites, catalog.fields),
        )


def varied(catalog: Catalog, items: Codes, settings: AugmentConfig, generator: np.random.Generator) -> Catalog:
    """Returns the catalog with other texts of some items.

    Args:
        catalog: The items.
        items: Codes of the items whose texts are varied.
        settings: How.
        generator: Draws the variation.
    """
    if not (settings.drop_fields or settings.shuffle_fields or settings.rewrites):
        return catalog
    columns = {name: list(column) for name, column in catalog.fields.items()}
    for code in np.unique(items).tolist():
        for name, column in columns.items():
            if name == "title":
                rewritten = columns[settings.rewrites][code] if settings.rewrites else ""
                if rewritten and generator.random() < 0.5:
                    column[code] = rewritten
            elif settings.drop_fields and generator.random() < settings.drop_fields and name != settings.rewrites:
                column[code] = ""
            elif settings.shuffle_fields:
                column[code] = _shuffled(column[code], generator)
    return Catalog(catalog.ids, {name: tuple(column) for name, column in columns.items()})


def _shuffled(text: str, generator: np.random.Generator) -> str:
    """Returns the values of a field in another order; a field of one value, or of long ones, stays as it is."""
    found = _BETWEEN.search(text)
    if found is None:
        return text
    values = [part.strip() for part in text.split(found[1])]
    if any(len(value.split()) > 3 for value in values):  # a sentence with commas
        return text
    return found[0].join(values[place] for place in generator.permutation(len(values)))
