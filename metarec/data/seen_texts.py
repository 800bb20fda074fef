"""Says what of the items' texts a model does not see, and which items it cannot tell apart.

Knows a task and its catalog; nothing of models or tokens.
"""

from __future__ import annotations

from metarec.data.interactions import Catalog
from metarec.data.task import Task
from metarec.data.templates import PromptTemplate, cut_fields
from metarec.errors import ConfigError


def check_texts(task: Task, catalog: Catalog, *, prompt: bool, text: bool) -> list[str]:
    """Returns sentences about texts that are cut, and about items whose texts are the same.

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
    return cut_sentences(cut, characters) + shared


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
