"""Says in a sentence what a person likes, or what an item is: from evidence, and only what the evidence holds.

The evidence is read from ratings and catalog fields. Without a language model a template says it. With one, the model
writes, each of its claims is checked against the evidence, and those that it does not hold are left out.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from metarec.data.interactions import Catalog, Ratings
from metarec.data.item_fields import choose_fields, tokens_in
from metarec.data.titles import read_title, words
from metarec.errors import ConfigError

if TYPE_CHECKING:
    from metarec.adapted_user import AdaptedUser
    from metarec.lm.backbone import Backbone
    from metarec.training.fitting import Fitted

_MOST = 3
_LEAST_RATED = 2
_LIKED_SHARE, _DISLIKED_SHARE = 2 / 3, 1 / 3
_MOST_TOKENS = 60
_LIKES = "like likes liked enjoy enjoys enjoyed love loves loved prefer prefers preferred fan fond favourite favorite"
_DISLIKES = "dislike dislikes disliked hate hates hated avoid avoids avoided"
_TURNS = "not never no less nor dont doesnt didnt isnt neither"
# Words that claim nothing by themselves.
_NEUTRAL = """
a an the this that these those they them their he she his her it its is are was were be who which person people viewer
user reader someone one both each and or of in on as for to with from by at such like likes also especially mostly often
very much more most such some movies movie films film books book items item titles title genre genres kind kinds things
taste rated ratings ratings watches watch watching called named include includes including e g
"""
_NEUTRAL_WORDS = frozenset(_NEUTRAL.split())
_LIKE_WORDS, _DISLIKE_WORDS = frozenset(_LIKES.split()), frozenset(_DISLIKES.split())
_TURN_WORDS = frozenset(_TURNS.split())
_VERB = "|".join((*_LIKES.split(), *_DISLIKES.split()))
# Where one claim ends and the next begins.
_BETWEEN = re.compile(
    rf"[.;!?\n]+(?=\s|$)|,?\s+(?:but|while|and|or)\s+(?=(?:they\s+|who\s+)?(?:do(?:es)?\s+not\s+|don't\s+|doesn't\s+)?(?:{_VERB})\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Evidence:
    """What is known of a person's taste, or of an item.

    Args:
        likes: Categories whose items the person mostly liked.
        dislikes: Categories whose items the person mostly did not like.
        liked: Titles that the person liked most.
        disliked: Titles that the person liked least.
        facts: Of an item, what the catalog says of it.
    """

    likes: tuple[str, ...] = ()
    dislikes: tuple[str, ...] = ()
    liked: tuple[str, ...] = ()
    disliked: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.likes, self.dislikes, self.liked, self.disliked, self.facts))

    def holds(self, claim: str) -> bool:
        """Says whether the evidence holds a claim: all that it names is there, on the side where it says so.

        Whatever else the claim says must be words that claim nothing; a number, a name or an adjective that the
        evidence does not have makes it fall.

        Args:
            claim: A clause, such as ``they enjoy Comedy``.
        """
        left = words(claim)
        sides: set[bool | None] = set()
        good, bad = (*self.likes, *self.liked), (*self.dislikes, *self.disliked)
        known: list[tuple[str, bool | None]] = [
            *((text, True) for text in good), *((text, False) for text in bad), *((text, None) for text in self.facts)
        ]  # fmt: skip
        for text, side in sorted(known, key=lambda one: -len(words(one[0]))):
            left, found = _without(left, words(text))
            if found:
                sides.add(side)
        if not sides:
            return False
        says = bool(_LIKE_WORDS.intersection(left)), bool(_DISLIKE_WORDS.intersection(left))
        if sum(word in _LIKE_WORDS | _DISLIKE_WORDS for word in left) > 1:
            return False  # one of them may be meant as a name
        turned = bool(_TURN_WORDS.intersection(left))
        if not set(left) <= _NEUTRAL_WORDS | _LIKE_WORDS | _DISLIKE_WORDS | _TURN_WORDS | {"do", "does"}:
            return False
        if sides == {None}:
            return not (says[0] or says[1] or turned)
        return says != (False, False) and sides == {says[0] != turned}


def _without(text: list[str], part: list[str]) -> tuple[list[str], bool]:
    """Returns words without each run of some others, and whether there was one; a mark stays where it was."""
    out: list[str] = []
    place, found = 0, False
    while place < len(text):
        if part and text[place : place + len(part)] == part:
            place, found = place + len(part), True
        else:
            out.append(text[place])
            place += 1
    return out, found


@dataclass(frozen=True)
class Claim:
    """Something that a language model said, and whether the evidence holds it."""

    text: str
    held: bool


@dataclass(frozen=True)
class Profile:
    """A sentence about a person or an item.

    Args:
        text: The sentence.
        source: Who wrote it: ``model`` where a claim of the language model's was left, else ``template``.
        evidence: What it rests on.
        claims: What the language model said, held or not; none where it was not asked.
    """

    text: str
    source: Literal["template", "model"]
    evidence: Evidence
    claims: tuple[Claim, ...] = ()

    def __str__(self) -> str:
        return self.text


def taste(catalog: Catalog, support: Ratings, threshold: float, middle: float) -> Evidence:
    """Returns what a person's ratings say of their taste.

    Args:
        catalog: The items.
        support: What the person rated.
        threshold: See `Ratings.likes`.
        middle: The middle of the rating scale. Where likes are ratings above the person's mean, and all of theirs are
            alike, likes are those above the middle.
    """
    mean = float(support.values.mean()) if len(support) else 0.0
    alike = np.isnan(threshold) and len(support) > 0 and support.values.min() == support.values.max()
    liked = support.values > middle if alike else support.likes(threshold)
    order = sorted(range(len(support)), key=lambda row: (-abs(float(support.values[row]) - mean), row))
    titles = [_spoken(catalog, int(code)) for code in support.items]
    seen, good = Counter[str](), Counter[str]()
    for name, kind in choose_fields(catalog).read.items():
        if kind != "category":
            continue
        rated = [catalog.fields[name][code] for code in support.items]
        for tokens, like in zip(tokens_in(rated), liked, strict=True):
            seen.update(tokens)
            good.update(tokens if like else ())
    share = {token: good[token] / count for token, count in seen.items() if count >= _LEAST_RATED}
    likes = [token for token, value in share.items() if value >= _LIKED_SHARE]
    dislikes = [token for token, value in share.items() if value <= _DISLIKED_SHARE]
    return Evidence(
        likes=_first(sorted(likes, key=lambda token: (-good[token], token))),
        dislikes=_first(sorted(dislikes, key=lambda token: (good[token] - seen[token], token))),
        liked=_first(titles[row] for row in order if liked[row]),
        disliked=_first(titles[row] for row in order if not liked[row] and float(support.values[row]) <= mean),
    )


def item_facts(catalog: Catalog, code: int) -> Evidence:
    """Returns what the catalog says of an item: its title, its categories, and the other short fields."""
    read = choose_fields(catalog).read
    facts = [_spoken(catalog, code)]
    for name, kind in read.items():
        text = catalog.fields[name][code].strip()
        facts += sorted(tokens_in([*catalog.fields[name][:1], text])[1]) if kind == "category" else [text]
    return Evidence(facts=tuple(fact for fact in dict.fromkeys(facts) if fact))


def _spoken(catalog: Catalog, code: int) -> str:
    return read_title(catalog.fields["title"][code])[0]


def _first(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))[:_MOST]


def template(evidence: Evidence) -> str:
    """Returns a sentence that says the evidence and nothing else."""
    if evidence.facts:
        title, *facts = evidence.facts
        return f"{title}: {', '.join(facts)}." if facts else f"{title}."
    parts = [
        f"likes {_listed(evidence.likes)}" if evidence.likes else "",
        f"rated {_listed(evidence.liked)} high" if evidence.liked else "",
        f"dislikes {_listed(evidence.dislikes)}" if evidence.dislikes else "",
        f"rated {_listed(evidence.disliked)} low" if evidence.disliked else "",
    ]
    said = "; ".join(filter(None, parts))
    return f"{said[:1].upper()}{said[1:]}." if said else "Nothing is known of this person yet."


def _listed(texts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def checked(text: str, evidence: Evidence) -> Profile:
    """Returns what is left of a text when every claim that the evidence does not hold is left out.

    Args:
        text: What a language model wrote.
        evidence: What it may say.
    """
    parts = [" ".join(part.split()) for part in _BETWEEN.split(text)]
    claims = tuple(Claim(part, evidence.holds(part)) for part in parts if part.strip(" ,"))
    kept = list(dict.fromkeys(_sentence(claim.text, not evidence.facts) for claim in claims if claim.held))
    if not kept:
        return Profile(template(evidence), "template", evidence, claims)
    return Profile(" ".join(kept), "model", evidence, claims)


def _sentence(claim: str, of_person: bool) -> str:
    claim = claim.strip(" ,")
    first, *rest = claim.split()
    if of_person and first.lower() in (*_LIKE_WORDS, *_DISLIKE_WORDS, "do", "does"):
        who = "This person" if first.lower().endswith("s") else "They"
        claim = " ".join([who, first.lower(), *rest])
    return f"{claim[:1].upper()}{claim[1:]}."


_ASK_TASTE = """Evidence: likes Drama, War; liked Casablanca, Glory; dislikes Horror; disliked Saw.
Taste: They like Drama and War, such as Casablanca and Glory, but they dislike Horror such as Saw.

Evidence: {evidence}.
Taste: They"""
_ASK_ITEM = """Evidence: Casablanca; Drama, Romance, 1942.
Description: Casablanca is a Drama and Romance movie from 1942.

Evidence: {evidence}.
Description:"""


def write(backbone: Backbone, evidence: Evidence) -> Profile:
    """Returns what a language model writes from evidence, without the claims that the evidence does not hold.

    Raises:
        BackboneError: The model does not read left to right.
    """
    if evidence.facts:
        title, *facts = evidence.facts
        said = continuation(backbone, _ASK_ITEM.format(evidence=f"{title}; {', '.join(facts)}"))
        return checked(said, evidence)
    named = {"likes": evidence.likes, "liked": evidence.liked, "dislikes": evidence.dislikes}
    sides = [f"{side} {', '.join(texts)}" for side, texts in {**named, "disliked": evidence.disliked}.items() if texts]
    said = continuation(backbone, _ASK_TASTE.format(evidence="; ".join(sides)))
    return checked(f"They{said}", evidence)


@torch.no_grad()
def continuation(backbone: Backbone, prompt: str) -> str:
    """Returns the rest of a line as the model continues it, its likeliest token at each step, sixty at most."""
    model, tokenizer = backbone.model, backbone.tokenizer
    fresh = torch.tensor(backbone.tokenize([prompt]), device=backbone.device)
    past, written, special = None, list[int](), set(tokenizer.all_special_ids)
    while len(written) < _MOST_TOKENS:
        read = model(input_ids=fresh, past_key_values=past, use_cache=True)
        token, past = int(read.logits[0, -1].argmax()), read.past_key_values
        if token in special:
            break
        written.append(token)
        if "\n" in str(tokenizer.decode(written)).lstrip():
            break
        fresh = torch.tensor([[token]], device=backbone.device)
    return str(tokenizer.decode(written)).strip("\n").partition("\n")[0]


class WritesProfiles(ABC):
    """What a recommender says of people and items."""

    @property
    @abstractmethod
    def fitted(self) -> Fitted:
        """What fitting left behind."""

    @property
    @abstractmethod
    def backbone(self) -> Backbone:
        """The language model."""

    def profile(self, user: AdaptedUser, *, generate: bool = False) -> Profile:
        """Says in a sentence what a person likes, from their ratings.

        Args:
            user: The person, from `adapt`.
            generate: Lets the language model write it; claims that the ratings do not hold are left out, and where
                nothing is left the template's sentence comes.

        Raises:
            ConfigError: The language model does not read left to right.
        """
        scale = self.fitted.scale
        middle = (scale.low + scale.high) / 2
        evidence = taste(self.fitted.catalog, user.support, self.fitted.task.like_threshold, middle)
        return self._written(evidence, generate)

    def describe(self, item: str, *, generate: bool = False) -> Profile:
        """Says in a sentence what an item is, from the catalog's fields; see `profile`.

        Raises:
            UnknownItemError: The item is not in the catalog.
        """
        return self._written(item_facts(self.fitted.catalog, self.fitted.catalog.find(item)), generate)

    def _written(self, evidence: Evidence, generate: bool) -> Profile:
        if not generate or not evidence:
            return Profile(template(evidence), "template", evidence)
        if self.backbone.kind != "causal":
            raise ConfigError(f"'{self.backbone.name}' writes nothing: it is no causal language model", "Leave it out")
        return write(self.backbone, evidence)
