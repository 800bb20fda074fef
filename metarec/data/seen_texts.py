"""Says what of the items' texts and fields is not read, and which items a model cannot tell apart.

Knows a task and its catalog; nothing of models or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from metarec.data.interactions import Catalog
from metarec.data.item_fields import MADE as _MADE
from metarec.data.sandbox import names_in
from metarec.data.task import Task
from metarec.data.templates import PromptTemplate, cut_fields
from metarec.errors import ConfigError


def check_texts(task: Task, catalog: Catalog, *, prompt: bool, text: bool) -> list[str]:
    """Returns sentences about texts that are cut, items whose texts are the same, and fields that nothing reads.

    Args:
        task: The task.
        catalog: The items.
        prompt: Whether a language model reads the prompt.
        text: Whether a sentence encoder reads the items' text.

    Raises:
        ConfigError: All items have the same text; a template does not fit the catalog.
    """
    read = [
        (what, template)
        for what, template, wanted in (("prompt", task.template, prompt), ("text", task.item_text, text))
        if wanted
    ]
    shared = [sentence for what, template in read for sentence in _shared(what, template, catalog)]
    sentences = task.hidden_states if prompt else ()
    characters = task.prompt.characters
    cut = cut_fields(catalog, [*(template.text for _, template in read), *sentences], characters)
    unread = unread_fields(task, catalog, [*(template.text for _, template in read), *sentences])
    return cut_sentences(cut, characters) + shared + unread


def unread_fields(task: Task, catalog: Catalog, templates: Sequence[str]) -> list[str]:
    """Says which fields of items are neither features nor named by a template, where the task does not choose them."""
    if task.features.fields is not None:
        return []
    named = {name for text in templates for name in names_in(text)}
    left = {name: why for name, why in task.read_fields(catalog).unread.items() if name not in named and why != _MADE}
    if not left:
        return []
    said = ", ".join(f"'{name}' ({why})" for name, why in left.items())
    return [f"fields of items that nothing reads: {said}; name them in 'features.fields' or in the prompt to read them"]


def cut_sentences(fields: dict[str, int], characters: int) -> list[str]:
    """Says which fields are longer than a prompt shows.

    Args:
        fields: What `metarec.data.templates.cut_fields` returns.
        characters: How many characters a prompt shows.
    """
    return [
        f"'{name}' of {count} items has more than {characters} characters: prompts show the beginning "
        "(prompt.characters in the task)"
        for name, count in fields.items()
    ]


def _shared(what: str, template: PromptTemplate, catalog: Catalog) -> list[str]:
    texts = [template.render(catalog, code) for code in range(len(catalog))]
    different = len(set(texts))
    if different == 1:
        raise ConfigError(
            f"all {len(texts)} items have the same {what}: {texts[0][:200]!r}",
            f"Name a field in '{template.where}' that tells them apart",
        )
    count = len(texts) - different
    return (
        [f"{count} of {len(texts)} items have the same {what} as another: no model tells them apart"] if count else []
    )
