"""The demonstration: its passages, and what a run does to a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_lance
from gpu_lance import demo, topics
from gpu_lance.errors import BadInputError, GpuLanceError
from gpu_lance.topics import LEAST, MOST, Passage, passages


@pytest.fixture(scope="module")
def text() -> list[Passage]:
    return passages()


def test_over_a_thousand_passages_and_none_twice(text: list[Passage]) -> None:
    assert len(text) > 1000
    assert len({passage.text for passage in text}) == len(text)
    assert len({(passage.topic, passage.passage) for passage in text}) == len(text)
    assert text == sorted(text, key=lambda passage: (passage.topic, passage.passage))


def test_passages_are_of_bounded_size_and_clean(text: list[Passage]) -> None:
    sizes = [len(passage.text) for passage in text]
    assert min(sizes) > 0
    assert max(sizes) <= MOST
    assert sum(size < LEAST for size in sizes) < len(sizes) / 4
    for passage in text:
        assert passage.text == passage.text.strip()
        assert passage.title.strip("*=-~ ") == passage.title
        assert passage.text.isprintable() or "\n" in passage.text


def test_nothing_of_the_text_is_lost(text: list[Passage]) -> None:
    kept = {word for passage in text for word in passage.text.replace("*", "").split()}
    headings = {word for passage in text for word in passage.title.replace("*", "").split()}
    source = " ".join(topics._python_topics().values()).replace("*", "")
    lost = set(source.split()) - kept - headings
    assert len(lost) / len(set(source.split())) < 0.02, sorted(lost)[:20]


def test_a_text_in_two_topics_is_taken_from_the_shorter_one() -> None:
    shared = "A sentence that stands in both of them."
    found = passages({"a-long-one": f"{shared}\n\n{'Other words. ' * 60}", "short": shared})
    assert [p.topic for p in found if p.text == shared] == ["short"]
    assert sum(shared in passage.text for passage in found if passage.topic == "short") == 1


@pytest.mark.parametrize(
    "body", ["x" * 5000, "word " * 2000, "A sentence. " * 300, "line\n" * 900, "(" * 1201]
)
def test_a_long_paragraph_is_cut_and_nothing_is_lost(body: str) -> None:
    found = passages({"t": body})
    assert all(0 < len(passage.text) <= MOST for passage in found)
    characters = set("".join(body.split()))
    assert set("".join("".join(p.text for p in found).split())) == characters
    if body[0] in "x(":  # nothing repeats in these but one letter, so a lost one would show
        assert sum(len(p.text) for p in found) <= len(body)


def test_the_text_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    found = passages({"t": f"Title\n=====\n\n{{{code}}}\n\n   {code}\n\n$({code}) `{code}`"})
    assert any("touch" in passage.text for passage in found)
    assert not mark.exists()


@pytest.mark.parametrize("given", [{}, {"t": ""}, {"t": "\n \n\n"}, {"t": "Title\n*****"}])
def test_no_text_makes_no_passage(given: dict[str, str]) -> None:
    assert passages(given) == []


def test_a_python_without_topics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(GpuLanceError, match=r"no help topics .*Use a Python from"):
        passages()


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REPEATS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "db"


def test_run_indexes_once_and_then_reuses_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BATCH", 16)
    moved: list[tuple[int, int]] = []
    notes: list[str] = []
    question = "Which values does an assertion take?"
    first = demo.run(
        [question],
        db=folder,
        device="cpu",
        rows=40,
        progress=lambda *state: moved.append(state),
        note=notes.append,
    )
    assert (first.rows, first.reused, first.device, first.dims) == (40, False, "cpu", 384)
    assert first.rows_per_s is not None
    assert first.rows_per_s > 0
    assert moved[:3] == [(16, 40), (32, 40), (40, 40)]
    assert moved[-1] == (40, 40)
    assert [note.split()[0] for note in notes] == ["loading", "embedding"]
    assert Path(first.path).is_dir()
    assert [answer.question for answer in first.answers] == [*demo.QUESTIONS, question]
    assert first.answers[-1].hits[0]["topic"] == "assert"
    for answer in first.answers:
        distances = [hit["_distance"] for hit in answer.hits]
        assert len(distances) == 3
        assert distances == sorted(distances)
        assert answer.median_ms > 0

    second = demo.run([question], db=folder, device="cpu", rows=40, limit=2)
    assert (second.reused, second.version, second.rows) == (True, first.version, 40)
    assert (second.index_s, second.rows_per_s) == (None, None)
    for before, after in zip(first.answers, second.answers, strict=True):
        assert after.hits == before.hits[:2]

    fresh = demo.run(db=folder, device="cpu", rows=40, fresh=True)
    assert (fresh.reused, fresh.rows) == (False, 40)
    assert fresh.version > first.version


def test_a_table_of_other_text_is_indexed_again(folder: Path) -> None:
    before = demo.run(db=folder, device="cpu", rows=12)
    assert before.rows == 12
    gpu_lance.connect(folder, device="cpu")[demo.TABLE].update(
        where="passage = 0", values={"title": "changed"}
    )
    after = demo.run(db=folder, device="cpu", rows=12)
    assert (after.reused, after.rows) == (False, 12)


@pytest.mark.parametrize("fresh", [False, True])
def test_another_table_of_that_name_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    db = gpu_lance.connect(tmp_path, device="cpu")
    table = db.create_table(demo.TABLE, [{"mine": 1, "vector": [0.0, 1.0]}])
    with pytest.raises(BadInputError, match=r"not the demo's table .*mine, vector.*--db"):
        demo.run(db=tmp_path, device="cpu", fresh=fresh)
    assert table.to_arrow().to_pylist() == [{"mine": 1, "vector": [0.0, 1.0]}]
    assert table.version == 1


def test_a_table_with_the_same_columns_and_no_function_is_left_alone(tmp_path: Path) -> None:
    row = {"topic": "a", "title": "b", "passage": 0, "text": "c", "vector": [0.0, 1.0]}
    table = gpu_lance.connect(tmp_path, device="cpu").create_table(demo.TABLE, [row])
    with pytest.raises(BadInputError, match="left alone"):
        demo.run(db=tmp_path, device="cpu", fresh=True)
    assert table.to_arrow().to_pylist() == [row]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": [""]}, "question is empty"),
        ({"questions": ["fine", " \n"]}, "question is empty"),
        ({"questions": ["\udcff"]}, "lone surrogate at character 0"),
        ({"questions": [7]}, "got a int"),
        ({"rows": 0}, "rows is 0"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        demo.run(db=tmp_path / "db", device="cpu", **arguments)
    assert not (tmp_path / "db").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "db").write_text("")
    with pytest.raises(BadInputError, match="is a file"):
        demo.run(db=tmp_path / "db", device="cpu", rows=3)
