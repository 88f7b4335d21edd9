"""Tar shards by random access: what they give, what is kept of them, what is wrong with them."""

import concurrent.futures
import functools
import io
import json
import pickle
import re
import tarfile
import threading
import time
import tracemalloc

import fsspec
import numpy as np
import pytest

from base.errors import UserError
from base.progress import Progress, StatusLine
from input_pipeline.errors import BadExample
from input_pipeline.sources import storage
from input_pipeline.sources.webdataset import index, tar_headers
from input_pipeline.sources.webdataset import sample as tar_sample
from input_pipeline.sources.webdataset.source import WebDataset

BLOCK = 512


@pytest.fixture(autouse=True)
def indexes(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_index_folder", str(tmp_path / "indexes"))
    return tmp_path / "indexes"


@pytest.fixture
def walks(monkeypatch):
    """The shards whose headers were walked."""
    seen, walk = [], index.walk
    monkeypatch.setattr(
        index, "walk", lambda blob, layout: (seen.append(blob.path), walk(blob, layout))[1]
    )
    return seen


def packed(members, format=tarfile.GNU_FORMAT, **kw):
    """Tar of (name, bytes) and of whole TarInfos."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, **kw) as tar_headers:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar_headers.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar_headers.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def sample(i, text=None, **more):
    """Members of one sample; the image is large for some, so that reads differ."""
    name = f"{i:06d}"
    members = [(f"{name}.jpg", f"image {i} ".encode() * (1 + i % 7 * 900))]
    members.append((f"{name}.txt", (text or f"caption {i} é").encode()))
    return members + [(f"{name}.{suffix}", content) for suffix, content in more.items()]


def flat(lists):
    return [member for members in lists for member in members]


def put(path, members, **kw):
    path.write_bytes(members if isinstance(members, bytes) else packed(members, **kw))
    return str(path)


def assert_refused(pattern, **kw):
    with pytest.raises(UserError, match=re.escape(pattern)) as error:
        WebDataset(**kw)
    assert "\n" not in str(error.value)


def bad(source, i, kind, pattern=""):
    with pytest.raises(BadExample) as error:
        source[i]
    assert error.value.kind == kind and pattern in error.value.detail
    return error.value


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.size = 100_000  # as some writers do; no data follows
    return info


GOOD = sample(0), sample(1), sample(2)


def good_but(*members):
    return flat([GOOD[0], members, GOOD[1]])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_equal_what_tarfile_reads_in_order_across_shards(tmp_path, format):
    expected = []
    for shard in range(3):
        # Of every length up to what needs an extended header, and in folders.
        members = flat(
            [(f"{'d' * 90}/{name * 12 if i % 2 else name}", data) for name, data in sample(i)]
            if format != tarfile.USTAR_FORMAT
            else [(f"{'d' * 90}/{name}", data) for name, data in sample(i)]
            for i in range(shard * 10, shard * 10 + 10)
        )
        members = [(re.sub(r"\.(jpg|txt)(?=.)", "", name), data) for name, data in members]
        path = put(tmp_path / f"s-{shard:03d}.tar", members, format=format)
        with tarfile.open(path) as tar_headers:
            found = [(info.name, tar_headers.extractfile(info).read()) for info in tar_headers]
        for (name, image), (_, text) in zip(found[::2], found[1::2]):
            expected.append(
                {
                    "image": image,
                    "texts": [text.decode()],
                    "weights": [1.0],
                    "id": f"s-{shard:03d}.tar/{name}",
                    "shard": path,
                }
            )
    source = WebDataset(path=str(tmp_path / "s-{000..002}.tar"))
    assert len(source) == 30 and source.class_names is None and not source.damage
    assert [source[i] for i in range(30)] == expected
    assert WebDataset(path=(str(tmp_path / "s-*.tar"),))[29] == expected[29]
    for i in (-1, 30):
        with pytest.raises(IndexError):
            source[i]


def test_shards_behind_a_url(monkeypatch):
    monkeypatch.setattr(tar_headers.Reader, "REMOTE_CHUNK", 2 * BLOCK)  # many reads
    fs = fsspec.filesystem("memory")
    for shard in range(2):
        fs.pipe(f"/wds/{shard}.tar", packed(flat(sample(i) for i in (2 * shard, 2 * shard + 1))))
    source = WebDataset(path="memory://wds/{0..1}.tar")
    assert [source[i]["texts"] for i in range(4)] == [[f"caption {i} é"] for i in range(4)]
    assert source[3]["shard"] == "memory://wds/1.tar" and source[3]["id"] == "1.tar/000003.jpg"
    assert WebDataset(path="memory://wds/*.tar")[3]["image"] == source[3]["image"]


def test_a_sample_whose_members_lie_together_is_one_read(tmp_path, monkeypatch):
    far = [sample(1)[0], ("000001.wav", b"x" * (1 << 20)), sample(1)[1]]
    source = WebDataset(path=put(tmp_path / "a.tar", [*sample(0), *far]))
    reads, read = [], storage.Blob.read
    monkeypatch.setattr(storage.Blob, "read", lambda self, *a: (reads.append(a), read(self, *a))[1])
    assert source[0]["texts"] == ["caption 0 é"] and len(reads) == 1
    assert source[1]["texts"] == ["caption 1 é"] and len(reads) == 3
    assert sum(size for size, _ in reads) < 20_000


def test_suffixes_are_of_any_case_and_the_order_of_the_setting_decides(tmp_path):
    both = [("a.PNG", b"png"), ("a.Jpg", b"jpg"), ("a.TXT", b"x"), ("b.left.jpg", b"l")]
    path = put(tmp_path / "a.tar", [*both, ("b.txt", b"y")])
    assert WebDataset(path=path)[0]["image"] == b"jpg"
    source = WebDataset(path=path, image=("png", "left.jpg"))
    assert [source[i]["image"] for i in range(2)] == [b"png", b"l"]


# ---- what a sample says --------------------------------------------------------------------------

CAPTIONS = (("txt", 0.25), ("json.alt", 0.5), ("json.long one", 1))


def test_all_captions_that_a_sample_has_come_with_their_probabilities(tmp_path):
    def more(**fields):
        return {"json": json.dumps(fields).encode()}

    members = [
        *sample(0, "zero", **more(alt="Null", other=3)),
        *sample(1, "one", **more(alt=None, **{"long one": "eine lange"})),
        *sample(2, " ", **more(alt="", **{"long one": "l"})),
        *sample(3, "\ufeffthree"),
    ]
    source = WebDataset(path=put(tmp_path / "a.tar", members), captions=CAPTIONS)
    pairs = [list(zip(e["texts"], e["weights"])) for e in (source[i] for i in range(4))]
    assert pairs == [
        [("zero", 0.25), ("Null", 0.5)],
        [("one", 0.25), ("eine lange", 1.0)],
        [("l", 1.0)],
        [("three", 0.25)],
    ]
    assert "languages" not in source[0] and "label" not in source[0]


def test_languages_choose_samples(tmp_path):
    tags = ["en", "de", None, "en", 3, "zh-Hant"]
    for shard in range(2):
        members = flat(
            sample(i, json=json.dumps({"lang": tag}).encode() if i != 5 * shard else b"{")
            for i, tag in enumerate(tags)
        )
        put(tmp_path / f"{shard}.tar", members)
    kw = dict(path=str(tmp_path / "{0..1}.tar"), language="json.lang")
    for source in (WebDataset(**kw), WebDataset(**kw)):  # from the walk, from the index
        found = {language: where.tolist() for language, where in source.by_language().items()}
        assert found == {"de": [1, 7], "en": [3, 6, 9], "zh-Hant": [5]}
        assert all(where.dtype == np.int64 for where in source.by_language().values())
        assert source[7]["languages"] == ["de"] and source[0]["languages"] == [""]
    assert WebDataset(path=kw["path"]).by_language() == {}


def test_labels_from_a_member_or_from_json(tmp_path):
    members = [*sample(0, cls=b"7\n", json=b'{"y": -3}'), *sample(1, cls=b"x", json=b'{"y": 1.5}')]
    path = put(tmp_path / "a.tar", [*members, *sample(2)])
    source = WebDataset(path=path, label="cls")
    assert source[0]["label"] == 7
    assert bad(source, 1, "damaged record", "no integer in cls").id == "a.tar/000001.jpg"
    bad(source, 2, "damaged record", "no integer in cls")
    source = WebDataset(path=path, label="json.y", captions=())
    assert source[0]["label"] == -3 and source[0]["texts"] == [] and "weights" not in source[0]
    bad(source, 1, "damaged record", "no integer in json.y")


@pytest.mark.parametrize(
    ("content", "kind", "pattern"),
    [
        (b'{"alt": "x"', "damaged record", "JSON"),
        (b"[" * 100_000, "damaged record", "JSON"),
        (b'["alt"]', "damaged record", "JSON that is no object"),
        (b'{"alt": ["x", 3]}', "damaged record", "json.alt is not text"),
        (b'{"alt": {"x": 1}}', "damaged record", "json.alt is not text"),
        (b'{"alt": "H\xfcndin"}', "caption not UTF-8", ""),
        (b'{"alt": "\\ud83d"}', "caption not UTF-8", "half a character"),
        (b'{"alt": "%s"}' % (b"x" * 70_000), "damaged record", "more than 65536"),
        (b'{"alt": "%s"}' % (b"x" * 1_100_000), "damaged record", "more than 1048576"),
    ],
)
def test_bad_json_is_a_bad_example_when_it_is_read(tmp_path, content, kind, pattern):
    path = put(tmp_path / "a.tar", [*sample(0, json=b'{"alt": "x"}'), *sample(1, json=content)])
    source = WebDataset(path=path, captions=(("json.alt", 1.0),))
    assert source[0]["texts"] == ["x"]
    error = bad(source, 1, kind, pattern)
    assert error.id == "a.tar/000001.jpg" and error.shard == path


def test_bad_text_and_too_large_images_are_bad_examples(tmp_path, monkeypatch):
    members = [*sample(0), ("a.txt", "Hündin".encode("latin-1")), ("a.jpg", b"x")]
    members += [("b.jpg", b"x"), ("b.txt", b"x" * 70_000), ("c.jpg", b"x" * 9000), ("c.txt", b"c")]
    source = WebDataset(path=put(tmp_path / "a.tar", members))
    assert bad(source, 1, "caption not UTF-8").id == "a.tar/a.jpg"
    bad(source, 2, "damaged record", "more than 65536")
    assert source[3]["texts"] == ["c"]
    monkeypatch.setattr(tar_sample, "MAX_IMAGE_BYTES", 8000)
    assert bad(source, 3, "image too large", "9000 bytes").id == "a.tar/c.jpg"


# ---- the index -----------------------------------------------------------------------------------


def test_a_second_start_walks_no_shard_and_a_changed_shard_is_walked_again(
    tmp_path, indexes, walks
):
    for shard in range(3):
        put(tmp_path / f"{shard}.tar", flat(GOOD))
    path = str(tmp_path / "{0..2}.tar")
    source = WebDataset(path=path)
    assert len(walks) == 3 and len(list(indexes.iterdir())) == 3
    assert indexes.stat().st_mode & 0o777 == 0o700
    again = WebDataset(path=path, captions=(("txt", 0.5),))  # no matter of the index
    assert len(walks) == 3 and again[8]["image"] == source[8]["image"]
    put(tmp_path / "1.tar", flat([*GOOD, sample(9)]))
    source = WebDataset(path=path)
    assert len(walks) == 4 and len(source) == 10 and source[6]["texts"] == ["caption 9 é"]
    WebDataset(path=path, image=("jpg",))  # other members
    assert len(walks) == 7


@pytest.mark.parametrize(
    "damage", ["nothing", "cut", "count", "columns", "zeros", "pickle", "zip", "summary"]
)
def test_a_damaged_index_is_made_again(tmp_path, indexes, walks, damage):
    path = put(tmp_path / "a.tar", flat(GOOD))
    expected = [dict(e) for e in map(WebDataset(path=path).__getitem__, range(3))]
    (file,) = indexes.iterdir()
    data = file.read_bytes()
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return touched.touch, ()

    def saved(values, **kw):
        out = io.BytesIO()
        np.save(out, values, **kw)
        return out.getvalue()

    words = np.load(file)
    changed = {
        "nothing": b"",
        "cut": data[:-8],
        "count": saved(np.r_[words[0] - 1, words[1:]]),
        "columns": saved(np.r_[words[1], words[0], words[2:]]),
        "zeros": bytes(len(data)),
        "pickle": saved(np.array([Evil()]), allow_pickle=True),
        "zip": b"PK\3\4" + data[4:],
        "summary": data.replace(b'"damage"', b'"damaqe"'),
    }[damage]
    assert changed != data
    file.write_bytes(changed)
    source = WebDataset(path=path)
    assert len(walks) == 2 and [source[i] for i in range(3)] == expected
    assert file.read_bytes() == data and not touched.exists()
    assert [f.name for f in indexes.iterdir()] == [file.name]  # nothing temporary stays


def test_an_index_that_is_gone_is_made_again_when_it_is_needed(tmp_path, indexes, walks):
    members = flat(sample(i, json=b'{"lang": "en"}') for i in range(3))
    path = put(tmp_path / "a.tar", members)
    source = WebDataset(path=path, language="json.lang")
    (file,) = indexes.iterdir()
    for i, use in enumerate([lambda: source[2]["texts"], source.by_language]):
        expected = use()
        file.unlink()
        assert str(use()) == str(expected) and len(walks) == 2 + i
    put(tmp_path / "a.tar", flat([*GOOD, sample(9)]))
    file.unlink()
    error = bad(source, 2, "damaged record", "the shard is not the one that was indexed")
    assert error.shard == path and len(walks) == 3


def test_processes_that_share_the_folder_share_the_work(tmp_path, monkeypatch):
    """Here threads, which know as little of each other, and of the order of the other."""
    for shard in range(24):
        put(tmp_path / f"{shard:02d}.tar", sample(shard))
    walks, walk = [], index.walk

    def slow(blob, layout):
        walks.append(blob.path)
        time.sleep(0.05)
        return walk(blob, layout)

    monkeypatch.setattr(index, "walk", slow)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    path = str(tmp_path / "*.tar")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sources = [task.result() for task in [pool.submit(WebDataset, path=path) for _ in "ab"]]
    assert len(set(walks)) == 24 and len(walks) < 40
    for source in sources:
        assert [source[i]["texts"] for i in range(24)] == [[f"caption {i} é"] for i in range(24)]


def test_progress_is_told_when_it_takes_long(tmp_path, monkeypatch, capfd):
    put(tmp_path / "a.tar", flat(GOOD))
    WebDataset(path=str(tmp_path / "a.tar"))
    assert capfd.readouterr().err == ""
    shown, walk, show = threading.Event(), index.walk, StatusLine.show

    def show_and_note(self, text, *rest):
        show(self, text, *rest)
        if "1/2 shards" in text:
            shown.set()

    monkeypatch.setattr(StatusLine, "show", show_and_note)
    monkeypatch.setattr(index, "QUIET", 0.01)
    monkeypatch.setattr(index, "Progress", functools.partial(Progress, interval=0.0))
    monkeypatch.setattr(
        index, "walk", lambda *a: (shown.wait(600) if "1.tar" in a[0].path else 0, walk(*a))[1]
    )
    for shard in range(2):
        put(tmp_path / f"{shard}.tar", sample(shard))
    WebDataset(path=str(tmp_path / "{0..1}.tar"))
    assert re.search(r"indexing tar: 1/2 shards, .* left\n", capfd.readouterr().err)


def test_folder_of_indexes_can_be_chosen_and_must_be_one_to_write_to(tmp_path, monkeypatch):
    storage.keep_indexes_in(str(tmp_path / "x" / "y"))
    path = put(tmp_path / "a.tar", flat(GOOD))
    WebDataset(path=path)
    assert len(list((tmp_path / "x" / "y").iterdir())) == 1
    with pytest.raises(UserError, match="local folder"):
        storage.keep_indexes_in("gs://bucket/x")

    def full(*paths):
        raise OSError(28, "No space left on device")

    storage.keep_indexes_in(str(tmp_path / "z"))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        assert_refused("takes no index: [Errno 28] No space left on device", path=path)
    assert not list((tmp_path / "z").iterdir())
    storage.keep_indexes_in(path)  # a file
    assert_refused("indexes cannot be kept in", path=path)


def test_100_000_tiny_members_take_little_memory_and_few_reads(tmp_path, monkeypatch):
    def header(name, size):
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf()

    image, text = header("000000.jpg", 2), header("000000.txt", 1)

    def renamed(block, i):
        block = f"{i:06d}".encode() + block[6:148] + b" " * 8 + block[156:]
        return block[:148] + b"%06o\0 " % sum(block) + block[156:]

    with (tmp_path / "a.tar").open("wb") as out:
        for i in range(50_000):
            out.write(renamed(image, i) + b"ij".ljust(BLOCK, b"\0"))
            out.write(renamed(text, i) + b"t".ljust(BLOCK, b"\0"))
        out.write(bytes(2 * BLOCK))
    reads, read = [], storage.Blob.read
    monkeypatch.setattr(storage.Blob, "read", lambda self, *a: (reads.append(a), read(self, *a))[1])
    source = WebDataset(path=str(tmp_path / "a.tar"))
    assert len(source) == 50_000 and source[49_999]["id"] == "a.tar/049999.jpg"
    assert len(reads) < 200 and max(size for size, _ in reads) <= 1 << 20
    monkeypatch.setattr(storage, "_index_folder", str(tmp_path / "others"))
    small = put(tmp_path / "b.tar", flat(GOOD))
    tracemalloc.start()
    try:
        WebDataset(path=small)
        tracemalloc.reset_peak()
        with (tmp_path / "a.tar").open("r+b") as out:
            out.truncate(20_000 * 2 * BLOCK)
        assert len(WebDataset(path=str(tmp_path / "a.tar"))) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20  # 20 MB of tar, 640 kB of index
    finally:
        tracemalloc.stop()


def test_large_members_are_passed_over(tmp_path, monkeypatch):
    members = flat([(f"{i}.jpg", bytes([i]) * 300_000), (f"{i}.txt", b"x")] for i in range(40))
    path = put(tmp_path / "a.tar", members)
    reads, read = [], storage.Blob.read
    monkeypatch.setattr(storage.Blob, "read", lambda self, *a: (reads.append(a), read(self, *a))[1])
    assert len(WebDataset(path=path)) == 40
    assert sum(size for size, _ in reads) < 1_000_000  # of 12 MB


def test_random_access_from_many_threads_equals_reading_in_order(tmp_path):
    for shard in range(5):
        put(tmp_path / f"{shard}.tar", flat(sample(i) for i in range(shard * 9, shard * 9 + 9)))
    source = WebDataset(path=str(tmp_path / "*.tar"))
    expected = [source[i] for i in range(45)]
    order = np.random.default_rng(0).integers(45, size=2000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, example in zip(order, pool.map(source.__getitem__, order)):
            assert example == expected[i]


# ---- bad data ------------------------------------------------------------------------------------


def opened(tmp_path, members, **kw):
    """The source, its captions and its damage by kind."""
    path = put(tmp_path / "a.tar", members)
    source = WebDataset(path=path, **kw)
    texts = [source[i]["texts"][0][:9] for i in range(len(source))]
    assert all(shard == path for _, shard in source.damage)
    return source, texts, {kind: count for (kind, _), count in source.damage.items()}


TWO = ["caption 0", "caption 1"]


def test_a_folder_is_no_damage(tmp_path):
    _, texts, damage = opened(tmp_path, good_but(link("x", tarfile.DIRTYPE)))
    assert texts == TWO and damage == {}


@pytest.mark.parametrize(
    "member",
    [
        link("x.jpg"),
        link("x.txt", tarfile.LNKTYPE),
        link("x.jpg", tarfile.CHRTYPE),
        link("x.jpg", tarfile.BLKTYPE),
        link("x.jpg", tarfile.FIFOTYPE),
        link("x.jpg", tarfile.GNUTYPE_SPARSE),
        ("/x.jpg", b"x"),
        ("../x.jpg", b"x"),
        ("a/../../x.jpg", b"x"),
        ("..", b"x"),
    ],
)
def test_members_that_are_no_files_or_lead_elsewhere_are_counted(tmp_path, member):
    before = sorted(p for p in tmp_path.parent.rglob("*"))
    _, texts, damage = opened(tmp_path, good_but(member))
    assert texts == TWO and damage == {"damaged record": 1}
    made = {p.name for p in set(tmp_path.parent.rglob("*")) - set(before)}
    assert all(name in ("a.tar", "indexes") or name.endswith(".npy") for name in made)


def test_a_link_in_place_of_an_image_is_counted_once_and_not_followed(tmp_path):
    members = good_but(link("x.jpg"), ("x.txt", b"x"), ("y.txt", b"y"), link("y.jpg"))
    _, texts, damage = opened(tmp_path, members)
    assert texts == TWO and damage == {"damaged record": 2}


def test_nothing_is_unpickled(tmp_path):
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return touched.touch, ()

    evil = pickle.dumps(Evil())
    members = sample(0, pkl=evil, pyd=evil, npy=evil, pickle=evil, cls=b"0")
    members += [("1.pkl", evil), ("1.txt", b"t"), ("2.jpg", b"i"), ("2.pyd", evil)]
    source, texts, damage = opened(tmp_path, members)
    assert texts == ["caption 0"] and not touched.exists()
    assert damage == {"no image": 1, "no caption": 1}
    assert evil not in source[0].values()
    pickle.loads(evil)
    assert touched.exists()  # it would have shown
    for suffix in ("pkl", "pyd", "npy"):
        assert_refused("is no image", path="x.tar", image=("jpg", suffix))
        assert_refused("hold no text", path="x.tar", captions=((suffix, 1.0),))
        assert_refused("hold no text", path="x.tar", label=f"a.{suffix}")


def test_of_a_suffix_that_comes_twice_the_first_is_taken(tmp_path):
    members = [*GOOD[0], ("000000.txt", b"second"), ("000000.jpg", b"second"), *GOOD[1]]
    source, texts, damage = opened(tmp_path, members)
    assert texts == TWO and damage == {} and source[0]["image"] == GOOD[0][0][1]


def test_samples_without_an_image_or_a_caption_are_counted(tmp_path):
    members = good_but(
        ("x.jpg", b""), ("x.txt", b"x"), ("y.txt", b"y"), ("z.jpg", b"z"), ("z.json", b"{}")
    )
    source, texts, damage = opened(tmp_path, members)
    assert texts == TWO and damage == {"no image": 2, "no caption": 1}
    path = source[0]["shard"]
    twice = WebDataset(path=(path, path))
    assert len(twice) == 4 and set(twice.damage.values()) == {4, 2}


def test_members_that_belong_to_no_sample_part_none(tmp_path):
    members = [GOOD[0][0], ("README", b"r"), (".hidden", b"h"), ("._000000.jpg", b"m"), GOOD[0][1]]
    _, texts, damage = opened(tmp_path, [*members, *GOOD[1]])
    assert texts == TWO and damage == {}


def cut_inside(data, name):
    """Up to the first byte of this member."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar_headers:
        return data[: tar_headers.getmember(name).offset_data + 1]


def test_a_torn_tar_keeps_the_samples_before(tmp_path, caplog):
    data = packed(flat(GOOD))
    for name, kept in (("000002.txt", 2), ("000002.jpg", 2), ("000001.txt", 1)):
        caplog.clear()
        _, texts, damage = opened(tmp_path, cut_inside(data, name))
        assert texts == [*TWO, "caption 2"][:kept] and damage == {"damaged record": 1}
        assert "ends inside a member, which begins at byte" in caplog.text
        assert f"{kept} samples before it" in caplog.text
    more = packed(flat([*GOOD[:2], sample(2, wav=b"sound")]))  # torn where nobody reads
    _, texts, damage = opened(tmp_path, cut_inside(more, "000002.wav"))
    assert texts == TWO and damage == {"damaged record": 1}
    end = len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK
    for size in (end, end + 100):  # where the zeros begin, and within their first block
        _, texts, damage = opened(tmp_path, data[:size])
        assert texts == [*TWO, "caption 2"] and damage == {"damaged record": 1}
    assert "ends without the zeros" in caplog.text
    _, texts, damage = opened(tmp_path, data[: end + BLOCK])  # one block of them is enough
    assert texts == [*TWO, "caption 2"] and damage == {}
    _, texts, damage = opened(tmp_path, data[: end - 2 * BLOCK])  # no caption, but it had one
    assert texts == TWO and damage == {"damaged record": 1}


def test_a_hole_in_place_of_a_header_is_no_end(tmp_path, caplog):
    data = packed(flat(GOOD))
    _, texts, damage = opened(tmp_path, data + bytes(2 << 20))
    assert len(texts) == 3 and damage == {"damaged record": 1}
    assert "zeros in place of a header" in caplog.text


def changed_header(data, name, at, value, checksum=True):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar_headers:
        start = tar_headers.getmember(name).offset
    block = bytearray(data[start : start + BLOCK])
    block[at : at + len(value)] = value
    if checksum:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return data[:start] + bytes(block) + data[start + BLOCK :]


@pytest.mark.parametrize(
    ("at", "value", "checksum", "pattern"),
    [
        (0, b"X", False, "has no valid tar header"),
        (124, b"77777777777\0", True, "ends inside a member"),
        (124, b"\x80" + b"\x7f" * 11, True, "ends inside a member"),
        (124, b"\xff" * 12, True, "negative number"),
        (124, b"-0000000001\0", True, "no valid number"),
        (124, b"0_0\0", True, "no valid number"),
        (124, b"9\0", True, "no valid number"),
    ],
)
def test_a_damaged_header_keeps_the_samples_before(tmp_path, caplog, at, value, checksum, pattern):
    data = changed_header(packed(flat(GOOD)), "000002.jpg", at, value, checksum)
    source, texts, damage = opened(tmp_path, data)
    assert texts == TWO and damage == {"damaged record": 1}
    assert source._blobs[0].path in caplog.text and pattern in caplog.text


@pytest.mark.parametrize(
    ("kind", "content", "pattern"),
    [
        (b"x", b"9" * 30 + b" path=x\n", "invalid pax header"),
        (b"x", b"2 a=b\n", "invalid pax header"),
        (b"x", b"999 path=x\n", "invalid pax header"),
        (b"x", b"11 size=-5\n", "without a valid size"),
        (b"L", None, "pax header of 2000000 bytes"),
    ],
)
def test_a_damaged_extended_header_keeps_the_samples_before(
    tmp_path, caplog, kind, content, pattern
):
    content = content if content is not None else b"x" * 2_000_000
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(content)
    block = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)
    before = packed(flat(GOOD[:2]))
    before = before[: len(before.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK]
    _, texts, damage = opened(tmp_path, before + block + packed(GOOD[2]))
    assert texts == TWO and damage == {"damaged record": 1} and pattern in caplog.text


def test_sizes_in_base_256_and_in_pax_headers(tmp_path):
    data = packed(flat(GOOD))
    size = len(GOOD[1][0][1])
    data = changed_header(data, "000001.jpg", 124, b"\x80" + size.to_bytes(11, "big"))
    source, texts, _ = opened(tmp_path, data)
    assert len(texts) == 3 and source[1]["image"] == GOOD[1][0][1]
    info = tarfile.TarInfo("x.jpg")
    info.size = 5
    record = info.create_pax_header({**info.get_info(), "size": 8**11}, "utf-8")
    assert record[BLOCK:].startswith(b"19 size=8589934592\n")
    record = record.replace(b"19 size=8589934592\n", b"19 size=0000000005\n")
    comments = packed([], format=tarfile.PAX_FORMAT, pax_headers={"comment": "from git"})
    comments = comments[: 2 * BLOCK]
    data = record + b"12345".ljust(BLOCK, b"\0") + comments + packed([("x.txt", b"t"), *GOOD[0]])
    source, texts, damage = opened(tmp_path, data)
    assert source[0]["image"] == b"12345" and len(texts) == 2 and damage == {}


def test_checksums_of_signed_bytes_as_old_writers_made_them(tmp_path):
    data = packed([("\xfc.jpg", b"x"), ("\xfc.txt", b"t")], encoding="latin-1")
    block = bytearray(data[:BLOCK])
    old = int(block[148:154], 8)
    block[148:154] = b"%06o" % (old - 256)
    source, texts, damage = opened(tmp_path, bytes(block) + data[BLOCK:])
    assert texts == ["t"] and damage == {} and source[0]["id"] == "a.tar/\ufffd.jpg"


def test_names_cannot_write_to_a_terminal(tmp_path):
    source, _, _ = opened(tmp_path, [("a\n\x1b[2J.jpg", b"x"), ("a\n\x1b[2J.txt", b"t")])
    assert source[0]["id"] == "a.tar/a\ufffd\ufffd[2J.jpg"


def test_a_shard_that_changes_after_it_was_indexed_gives_no_wrong_bytes(tmp_path):
    path = tmp_path / "a.tar"
    source = WebDataset(path=put(path, flat(GOOD)))
    data = path.read_bytes()
    path.write_bytes(packed([("x.jpg", b"other"), ("x.txt", b"other")]).ljust(len(data), b"\0"))
    assert source._blobs[0].size == len(data)
    for i in range(3):
        bad(source, i, "damaged record")
    path.write_bytes(cut_inside(data, "000002.txt"))
    bad(source, 2, "damaged record")
    assert source[1]["texts"] == ["caption 1 é"]
    path.unlink()
    bad(source, 0, "damaged record", "No such file")


def test_a_shard_without_samples_is_a_warning_and_no_shard_with_samples_an_error(tmp_path, caplog):
    put(tmp_path / "0.tar", [])
    put(tmp_path / "1.tar", flat(GOOD))
    put(tmp_path / "2.tar", [("a.jpg", b"x"), ("a.text", b"x"), ("b.text", b"b")])
    put(tmp_path / "3.tar", b"<html>not found</html>" * 100)
    put(tmp_path / "4.tar", b"")
    source = WebDataset(path=str(tmp_path / "{0..4}.tar"))
    assert [source[i]["texts"] for i in range(3)] == [[f"caption {i} é"] for i in range(3)]
    assert source.damage == {
        ("no caption", str(tmp_path / "2.tar")): 1,
        ("no image", str(tmp_path / "2.tar")): 1,
        ("damaged record", str(tmp_path / "3.tar")): 1,
        ("damaged record", str(tmp_path / "4.tar")): 1,
    }
    assert [re.sub(r".*/", "", r.getMessage()) for r in caplog.records] == [
        "0.tar has no usable sample: it is empty",
        "2.tar has no usable sample: no caption: 1, no image: 1",
        "3.tar has no usable sample: has no valid tar header, at byte 0",
        "4.tar has no usable sample: ends without the zeros that close a tar file, at byte 0",
    ]
    path = str(tmp_path / "{2..3}.tar")
    assert_refused("(damaged record: 1, no caption: 1, no image: 1)", path=path)
    assert_refused("members end in jpg, text; set `image` and `captions`", path=path)


def test_many_bad_shards_are_few_lines(tmp_path, caplog):
    for shard in range(15):
        put(tmp_path / f"{shard:02d}.tar", [])
    put(tmp_path / "z.tar", GOOD[0])
    WebDataset(path=str(tmp_path / "*.tar"))
    assert len(caplog.records) == 11 and "and 5 more shards" in caplog.text


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_whatever_their_name(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as tar_headers:
        tar_headers.addfile(tarfile.TarInfo("a.jpg"))
    assert_refused("a.tar is compressed, which has no random access", path=str(tmp_path / "a.tar"))


def test_mistakes_in_the_settings(tmp_path):
    path = put(tmp_path / "a.tar", flat(GOOD))
    assert_refused("no file matches", path=str(tmp_path / "x*.tar"))
    assert_refused(f"{tmp_path}/1.tar cannot be read", path=(path, str(tmp_path / "{1..1}.tar")))
    assert_refused("pipe: is not read", path="pipe:cat a.tar")
    assert_refused("'jgp' is no image; the nearest: jpg", path=path, image=("jgp",))
    assert_refused("image='jpg' is no list", path=path, image="jpg")
    assert_refused("'txt' is no (name, probability)", path=path, captions=("txt", 1.0))
    assert_refused("'txt' is no (name, probability)", path=path, captions="txt")
    for weight in (0, -1, "1", True, float("nan"), float("inf")):
        assert_refused("'txt' has no probability above 0", path=path, captions=(("txt", weight),))
    assert_refused("'json' needs the key", path=path, captions=(("json", 1.0),))
    assert_refused("'a/b' is neither a suffix nor", path=path, captions=(("a/b", 1.0),))
    assert_refused("language='cls' is no 'json.KEY'", path=path, language="cls")


def test_misspelt_keys_show_at_the_start(tmp_path, caplog):
    fields = json.dumps({"caption": "x", "language": "en", "y": 1}).encode()
    path = put(tmp_path / "a.tar", flat(sample(i, json=fields) for i in range(3)))
    message = "has a key 'captoin'; the nearest: caption"
    assert_refused(message, path=path, captions=(("json.captoin", 1.0),))
    assert_refused("has a key 'lang'; the nearest: language", path=path, language="json.lang")
    assert_refused("has a key 'z'; there are: caption, language, y", path=path, label="json.z")
    WebDataset(path=path, captions=(("txt", 1.0), ("json.captoin", 1.0)))
    assert message in caplog.text


def test_json_captions_may_be_lists_nested_or_nan(tmp_path):
    content = b'{"alt": ["a", "b"], "meta": {"title": "c"}, "none": NaN, "d.e": "f"}'
    path = put(tmp_path / "a.tar", sample(0, json=content))
    names = (("json.alt", 1.0), ("json.meta.title", 3.0), ("json.d.e", 1.0))
    example = WebDataset(path=path, captions=names)[0]
    assert example["texts"] == ["a", "b", "c", "f"]
    assert example["weights"] == [0.5, 0.5, 3.0, 1.0]
    both = WebDataset(path=path, captions=(("txt", 1.0), ("json.none", 1.0)))[0]
    assert both["texts"] == ["caption 0 é"]


def test_a_label_beyond_64_bits_is_a_bad_example(tmp_path):
    path = put(tmp_path / "a.tar", sample(0, json=b'{"label": %d}' % 2**70))
    bad(WebDataset(path=path, label="json.label"), 0, "damaged record", "no integer")


def test_what_lies_behind_the_end_of_a_tar_is_told(tmp_path):
    for name in "ab":
        put(tmp_path / f"{name}.tar", sample(ord(name) - 97))
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    source = WebDataset(path=str(tmp_path / "both.tar"))
    assert len(source) == 1 and sum(source.damage.values()) == 1


def test_threads_that_find_the_index_gone_walk_the_shard_once(tmp_path, monkeypatch):
    path = put(tmp_path / "a.tar", flat([sample(0), sample(1)]))
    source = WebDataset(path=path)
    walks, walk = [], index.walk
    monkeypatch.setattr(index, "walk", lambda *a: (walks.append(1), walk(*a))[1])
    for file in storage.index_folder().iterdir():
        file.unlink()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: source[i % 2]["texts"], range(32)))
    assert texts == [["caption 0 é"], ["caption 1 é"]] * 16 and len(walks) == 1
