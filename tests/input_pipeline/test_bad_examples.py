"""Bad examples: counted by file and kind, some named, in bounded memory."""

import threading

from input_pipeline import bad_examples as bads
from input_pipeline.bad_examples import BadExamples
from input_pipeline.errors import KINDS, BadExample


def test_files_and_examples_met_most_often_come_first():
    bad = BadExamples()
    for id, shard, kind, times in (
        ("b.tar/1.jpg", "b.tar", "damaged image", 1),
        ("b.tar/2.jpg", "b.tar", "no caption", 1),
        ("a.tar/7.jpg", "a.tar", "no image", 3),
    ):
        for _ in range(times):
            bad.record(BadExample(kind, "why"), id, shard)
    assert bad.count == 5
    assert bad.kinds() == {"no image": 3, "damaged image": 1, "no caption": 1}
    assert list(bad.shards()) == ["a.tar", "b.tar"]
    assert bad.worst(1) == (
        "a.tar: 3 no image; and 1 more files; such as a.tar/7.jpg (no image: why), and 2 more"
    )


def test_an_error_that_knows_its_place_is_believed():
    bad = BadExamples()
    bad.record(BadExample("no image", id="x", shard="s"), "other", "")
    assert bad.worst() == "s: 1 no image; such as x (no image)"


def test_sources_without_files_name_examples_only():
    bad = BadExamples()
    bad.record(BadExample("no image"), "memory/3")
    assert bad.worst() == "memory/3 (no image)"
    assert BadExamples().worst() == ""


def test_memory_is_bounded_and_counts_go_on(monkeypatch):
    monkeypatch.setattr(bads, "MAX_NAMES", 10)
    bad = BadExamples()
    for i in range(100):
        bad.record(BadExample("no image"), f"{i}", "s")
    assert bad.count == 100 and len(bad._reasons) == len(bad._names) == 10


def test_many_threads_count_every_one():
    bad = BadExamples()

    def work():
        for i in range(200):
            bad.record(BadExample(KINDS[i % len(KINDS)]), f"{i % 7}", f"{i % 3}")
            bad.worst()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert bad.count == 1600 and sum(bad.kinds().values()) == 1600


def test_counts_without_names():
    bad = BadExamples()
    bad.add("no caption", "a.tar", 3)
    assert bad.count == 3 and bad.worst() == "a.tar: 3 no caption"


def test_one_bad_example_is_too_many_only_where_none_is_allowed():
    assert not bads.too_many(1, 10, 0.01) and bads.too_many(1, 10, 0)
    assert not bads.too_many(10, 1000, 0.01) and bads.too_many(11, 1000, 0.01)


def test_a_sample_is_mostly_bad_beyond_half_of_it_and_beyond_what_is_allowed():
    assert not bads.mostly_bad(128, 256, 0.01) and bads.mostly_bad(129, 256, 0.01)
    assert not bads.mostly_bad(200, 256, 0.9) and bads.mostly_bad(250, 256, 0.9)
