"""Titles in Chinese, Japanese and Korean, made of words drawn at random, and what people might type for them.

Chinese and Japanese are written without spaces; Korean words carry particles, which a query leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from metarec.bench.query_items import ItemQuery
from metarec.data.interactions import Catalog

WORDS: dict[str, tuple[str, ...]] = {
    "Chinese": (
        *("北京", "上海", "月亮", "太阳", "花园", "河流", "英雄", "少年", "老师", "故事", "传说", "秘密"),
        *("春天", "冬天", "火车", "飞机", "森林", "大海", "城市", "村庄", "音乐", "电影", "战争", "和平"),
    ),
    "Japanese": (
        *("東京", "京都", "物語", "桜", "侍", "猫", "ゴジラ", "ロボット", "さくら", "ひかり", "夏休み", "花火"),
        *("電車", "少女", "魔法", "学校", "先生", "約束", "星空", "海辺", "カメラ", "ピアノ", "手紙", "思い出"),
    ),
    "Korean": (
        *("서울", "부산", "바다", "하늘", "나무", "사랑", "기억", "전쟁", "평화", "소년", "소녀", "선생님"),
        *("학교", "기차", "비행기", "봄날", "겨울", "음악", "영화", "편지", "비밀", "전설", "영웅", "고양이"),
    ),
}
_PARTICLES = ("의", "와", "에서", "은", "를")
_WORDS_IN_A_TITLE = 3


def made_titles(language: str, count: int, seed: int) -> list[tuple[str, ...]]:
    """Returns the words of titles, each of three different ones, in no order twice."""
    generator = np.random.default_rng([seed, 17])
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[tuple(generator.choice(WORDS[language], _WORDS_IN_A_TITLE, replace=False).tolist())] = None
    return list(found)


def written(language: str, words: Sequence[str], seed: int) -> str:
    """Returns words as a title is written: Korean ones with particles and spaces, others side by side."""
    if language != "Korean":
        return ("の" if language == "Japanese" and len(words[0]) > 1 else "").join(words)
    generator = np.random.default_rng([seed, 18])
    return " ".join([*(word + str(generator.choice(_PARTICLES)) for word in words[:-1]), words[-1]])


def titles_and_queries(language: str, count: int, seed: int) -> tuple[Catalog, dict[str, list[ItemQuery]]]:
    """Returns a catalog of made titles, and for each a query without one of its words and one in another order.

    What answers a query is every title that has all of its words.
    """
    words = made_titles(language, count, seed)
    titles = tuple(written(language, row, place) for place, row in enumerate(words))
    catalog = Catalog(tuple(map(str, range(count))), {"title": titles})
    joint = " " if language == "Korean" else ""
    kinds: dict[str, Callable[[tuple[str, ...]], Sequence[str]]] = {
        "a word dropped": lambda row: row[::2],
        "words in another order": lambda row: row[::-1],
    }
    having: dict[str, set[int]] = {}
    for place, row in enumerate(words):
        for word in row:
            having.setdefault(word, set()).add(place)
    queries = {
        kind: [
            ItemQuery(joint.join(asked), frozenset(set.intersection(*(having[word] for word in asked))))
            for asked in map(change, words)
        ]
        for kind, change in kinds.items()
    }
    return catalog, queries
