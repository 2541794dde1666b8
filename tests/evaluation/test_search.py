"""Queries, the images nearest to them, and which are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation.errors import UserError
from evaluation.search import Query, is_match, nearest_images, read_query_file


def test_nearest_images_and_matches() -> None:
    images = torch.eye(4)
    queries = [Query("red disc", "disc"), Query("Square icon")]
    features = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.9, 0.1, 0.2, 0.3]])
    facts = [("square icon", "square"), ("a thing", "Disc"), ("disc icon", "disc b"), ("red disc", "")]
    hits = nearest_images(queries, features, images, lambda i: facts[i], number=3)
    assert [[hit.image for hit in row] for row in hits] == [[1, 3, 2], [0, 3, 2]]
    assert [[hit.matches for hit in row] for row in hits] == [[True, True, False], [True, False, False]]
    assert hits[0][0].similarity == pytest.approx(0.9)
    assert len(nearest_images(queries, features, images, lambda i: facts[i])[0]) == 4
    assert not is_match(Query("disc"), "", "")


@pytest.mark.parametrize("query", [Query(""), Query(" "), Query("disc", " "), Query(" ", "disc")])
def test_nothing_matches_nothing(query: Query) -> None:
    """Images need not have a caption or a concept."""
    for caption, concept in (("a thing", ""), ("", "a thing"), (" ", "")):
        assert not is_match(query, caption, concept)


def test_a_file_of_queries(tmp_path: Path) -> None:
    file = tmp_path / "queries.json"
    file.write_text(json.dumps(["a", {"text": "b", "concept": "c"}, {"query": "d", "keys": [1]}]))
    assert read_query_file(file) == [Query("a"), Query("b", "c"), Query("d")]
    for content in ("{}", "[1]", "[[]]", '[{"concept": "x"}]', "[]", '[" "]', "nothing", "[" * 100_000):
        file.write_text(content)
        with pytest.raises(UserError, match=r"^--queries .*queries\.json") as caught:
            read_query_file(file)
        assert "\n" not in str(caught.value)
